"""Clocks: how wrong each program's is, and where that is told."""

import time
from uuid import uuid4

import pytest
from django.conf import settings
from django.db import connection
from django.utils.timezone import now

from core import health
from polls import clocks, roles, watching
from polls.models import Clock
from tasks import periodic
from tests.conftest import process, queues_of_their_own, wait_until
from tests.test_pipeline_page import PAGE, browser_of, text_of

REAL = time.time


@pytest.fixture(autouse=True)
def _none_known(_database):
    Clock.objects.all().delete()


@pytest.fixture
def ahead(monkeypatch):
    """Sets this process's clock ahead."""

    def ahead(seconds):
        monkeypatch.setattr(clocks.time, "time", lambda: REAL() + seconds)

    return ahead


@pytest.mark.parametrize("seconds", [0, 30, -7200])
def test_a_clock_is_told_by_how_far_it_is_ahead(ahead, seconds):
    ahead(seconds)
    clocks.note("beat")

    [clock] = clocks.known()
    assert clock.program == "beat"
    assert abs(clock.ahead_seconds - seconds) < 0.2
    assert clock.is_wrong == (seconds != 0)


def test_a_clock_that_is_right_again_is_told_as_right(ahead):
    for seconds in (300, 0):
        ahead(seconds)
        clocks.note("beat")
    assert [clock.is_wrong for clock in clocks.known()] == [False]


def test_a_slow_look_is_taken_anew(monkeypatch):
    """One look takes half a second, most of it after PostgreSQL has answered."""
    slow = iter([0.5, 0, 0])
    told = clocks.stamps.clock

    def clock():
        at = told()
        time.sleep(next(slow))
        return at

    monkeypatch.setattr(clocks.stamps, "clock", clock)
    assert abs(clocks.ahead_seconds()) < 0.1


@pytest.mark.parametrize("age", ["3 minutes", "-1 hour"])
def test_what_was_noted_long_ago_or_in_the_future_is_not_told(age):
    clocks.note("beat")
    with connection.cursor() as cursor:
        cursor.execute("UPDATE clocks SET noted_at = clock_timestamp() - %s::interval", [age])
    assert clocks.known() == []


def test_the_clocks_of_hosts_that_are_no_more_are_forgotten():
    clocks.note("beat")
    with connection.cursor() as cursor:
        cursor.execute("UPDATE clocks SET noted_at = clock_timestamp() - interval '2 days'")
    clocks.note("web")

    periodic.renew_networks()

    assert [clock.program for clock in Clock.objects.all()] == ["web"]


def test_the_metrics_tell_the_most_wrong_of_each_program(broker):
    for program, host, seconds in (("web", "one", 0.1), ("web", "two", -40), ("beat", "one", 6)):
        Clock.objects.create(place=f"{program}@{host}", program=program, host=host, ahead_seconds=seconds)

    [family] = [family for family in watching.look(at=now()) if family.name == "nexus_clock_ahead_seconds"]

    told = {sample.labels["program"]: sample.value for sample in family.samples}
    assert abs(told.pop("periodic")) < 0.5  # the one that tells
    assert told == {"web": -40, "beat": 6}


def test_the_pipelines_page_tells_which_is_wrong(broker):
    Clock.objects.create(place="beat@one", program="beat", host="one", ahead_seconds=-30.04)
    Clock.objects.create(place="web@one", program="web", host="one", ahead_seconds=0.01)

    shown = text_of(browser_of(roles.OPERATOR).get(PAGE))

    assert "beat one -30.0 (wrong)" in shown and "web one 0.0 (" not in shown and "web one 0.0 " in shown


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, {}), (12, {"clock": "12 s ahead of PostgreSQL's"}), (-9, {"clock": "9 s behind PostgreSQL's"})]
)
def test_a_web_process_whose_clock_is_wrong_is_degraded(ahead, seconds, told):
    ahead(seconds)
    assert health._ask_database() == told


def test_every_program_notes_its_clock(api, poll, tmp_path):
    """Workers do between two tasks."""

    def programs():
        api.cast(poll, uuid4().hex)
        return {clock.program for clock in clocks.known()}

    with queues_of_their_own():
        prefix = {"QUEUE_PREFIX": settings.QUEUE_PREFIX}
        with (
            process("core", "beat", log=tmp_path / "beat.log", **prefix),
            process("core", "periodic", log=tmp_path / "periodic.log", **prefix),
        ):
            wait_until(lambda: programs() == {"web", "worker", "periodic", "beat"}, seconds=60)
    assert not any(clock.is_wrong for clock in clocks.known())
