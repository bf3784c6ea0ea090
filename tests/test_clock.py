"""Beat: what it sends, and when, whatever clocks say."""

import time
from datetime import timedelta

import pytest
from celery import current_app
from django.conf import settings
from django.utils.timezone import now
from django_celery_beat.models import PeriodicTask

from polls import jobs
from polls.models import Moment
from tasks import clock, periodic
from tests.conftest import process, queues_of_their_own, wait_until

SHORT, SELDOM = "polls.finalise", "outcomes.purge"


@pytest.fixture
def periodic_queue(broker):
    """The queue of the clock's jobs, of which no worker takes; yields a function that gets a message from it."""
    with current_app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_purge(settings.PERIODIC_QUEUE)
        yield lambda: channel.basic_get(settings.PERIODIC_QUEUE, no_ack=True)
        channel.queue_purge(settings.PERIODIC_QUEUE)


def waiting():
    with current_app.connection_for_write() as connection:
        return connection.default_channel.queue_declare(settings.PERIODIC_QUEUE, passive=True).message_count


def taken(get):
    """The messages that wait, by their task."""
    found = {}
    while message := get():
        found.setdefault(message.headers["task"], []).append(message)
    return found


@pytest.fixture
def scheduler(periodic_queue, monkeypatch):
    """Beat's scheduler, whose wall clock is set by `scheduler.is_ahead(by)`; what it sends is in `scheduler.sent`."""
    PeriodicTask.objects.update(last_run_at=None)
    made = clock.NotingScheduler(app=current_app._get_current_object())
    made.sent, made.ahead = [], timedelta()
    send = made.apply_entry

    def apply_entry(entry, producer=None):
        made.sent.append(entry.task)
        send(entry, producer=producer)

    monkeypatch.setattr(made, "apply_entry", apply_entry)
    monkeypatch.setattr(clock.Entry, "_default_now", lambda self: now() + made.ahead)
    monkeypatch.setattr("celery.schedules.BaseSchedule.now", lambda self: now() + made.ahead)
    yield made
    made.close()


def run(scheduler, ticks=40):
    """Let the scheduler go on until nothing is due; return what it sent."""
    scheduler.sent.clear()
    for _ in range(ticks):
        if scheduler.tick() != 0:
            break
    return set(scheduler.sent)


JOBS = set(jobs.intervals())


def make_all_due(scheduler):
    PeriodicTask.objects.update(last_run_at=now() - timedelta(days=400))
    scheduler._schedule = scheduler.all_as_schedule()
    scheduler._heap = None


# --- A clock that is wrong --------------------------------------------------------------------------------------------


def test_a_clock_that_is_put_back_while_beat_runs_holds_no_job_up(scheduler):
    scheduler.ahead = timedelta(hours=2)
    make_all_due(scheduler)
    assert run(scheduler) >= JOBS

    scheduler.ahead = timedelta()

    assert run(scheduler) >= JOBS
    assert run(scheduler) == set()  # and once only


def test_moments_in_the_future_that_a_beat_has_left_hold_no_job_up(scheduler):
    PeriodicTask.objects.update(last_run_at=now() + timedelta(hours=2))
    scheduler._schedule = scheduler.all_as_schedule()
    scheduler._heap = None

    assert run(scheduler) >= JOBS


def test_a_clock_that_goes_right_makes_nothing_run_twice(scheduler):
    make_all_due(scheduler)
    assert run(scheduler) >= JOBS
    assert run(scheduler) == set()


# --- What is dropped --------------------------------------------------------------------------------------------------


def test_the_broker_is_told_how_long_a_run_may_wait_and_no_worker_is(scheduler, periodic_queue):
    make_all_due(scheduler)
    run(scheduler)

    found = taken(periodic_queue)

    assert set(found) >= JOBS
    for task in JOBS:
        [message] = found[task]
        assert message.properties["expiration"] == f"{settings.JOB_WAITS_SECONDS}000"
        assert message.headers["expires"] is None  # a moment by beat's clock, which a worker would compare with its own


def test_the_schedule_of_an_installation_of_before_is_put_right(scheduler):
    PeriodicTask.objects.filter(task__in=JOBS).update(expire_seconds=None, expires=None)
    clock.NotingScheduler(app=current_app._get_current_object()).close()
    assert set(PeriodicTask.objects.filter(task__in=JOBS).values_list("expire_seconds", flat=True)) == {settings.JOB_WAITS_SECONDS}


@pytest.mark.parametrize("seconds", [None, 43_200])
def test_no_run_waits_longer_than_the_others(scheduler, seconds):
    """Behind one that stays, the broker would drop nothing."""
    added = PeriodicTask.objects.get(task=SHORT)
    added.pk, added.name, added.expire_seconds = None, "an operator's own", seconds
    added.save()
    try:
        assert scheduler.all_as_schedule()["an operator's own"].options["expiration"] == settings.JOB_WAITS_SECONDS
    finally:
        added.delete()


def test_what_nobody_takes_is_bounded(broker, tmp_path):
    """Beat goes on for longer than a run may wait, and no worker takes anything."""
    with queues_of_their_own(), process("core", "beat", log=tmp_path / "beat.log", QUEUE_PREFIX=settings.QUEUE_PREFIX):
        wait_until(lambda: waiting() > 0, seconds=40)
        time.sleep(22)
        first = waiting()
        time.sleep(6)
        assert waiting() <= first + 2 < 45  # two jobs every 2 s, one every 5 s, two more now and then: for 20 s


@pytest.mark.parametrize("has_begun", [True, False])
def test_what_runs_seldom_is_sent_again_until_a_worker_has_begun_it(scheduler, monkeypatch, has_begun):
    Moment.objects.filter(name__contains=SELDOM).delete()
    jobs.note_beginning(SELDOM, now() - timedelta(hours=1))
    make_all_due(scheduler)
    assert run(scheduler) >= {SHORT, SELDOM}
    if has_begun:
        periodic.note_beginning(periodic.purge_outcomes)
    monkeypatch.setattr(clock, "SENT_AGAIN_SECONDS", 0)

    scheduler.sent.clear()
    scheduler._send_again()

    assert (SELDOM in scheduler.sent) == (not has_begun)
    assert SHORT not in scheduler.sent
