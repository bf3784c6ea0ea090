"""The operators' page about the pipeline: what it shows, to whom, and that it costs the same however many votes there are."""

import re
import time
from datetime import timedelta
from uuid import uuid4

import pytest
from django.conf import settings
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now

from polls import bundles, jobs, outbox, roles
from polls.admin import pipeline
from polls.counting import count_votes
from polls.models import Moment, OutboxBundle
from tests.conftest import bundle_of, make_user, vote_of, wait_until

PAGE = "/admin/polls/pipelinedesk/"


def browser_of(*its_roles):
    user = make_user(f"desk-{uuid4().hex[:8]}", *its_roles)
    user.is_staff = True
    user.save(update_fields=["is_staff"])
    browser = Client()
    browser.force_login(user)
    return browser


@pytest.fixture(scope="module")
def browser(broker):
    return browser_of(roles.OPERATOR)


def text_of(answer):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", answer.content.decode()))


@pytest.mark.parametrize("role", [roles.OPERATOR, roles.AUDITOR, roles.ADMIN])
def test_who_looks_after_the_pipeline_sees_it(role, broker):
    browser = browser_of(role)

    assert browser.get(PAGE).status_code == 200
    assert PAGE in browser.get("/admin/").content.decode()


def test_nobody_else_sees_it(broker):
    assert browser_of(roles.OWNER).get(PAGE).status_code == 403
    assert Client().get(PAGE)["location"].startswith("/admin/login/")


def test_it_shows_what_waits_and_where(browser, poll, bury):
    bury(*bundle_of(vote_of(poll, "alice")))
    outbox.keep(bundles.write([vote_of(poll, "bob")]))
    try:
        shown = text_of(browser.get(PAGE))
    finally:
        OutboxBundle.objects.all().delete()

    assert re.search(r"Dead letters 1 ", shown) and re.search(r"Bundles in the outbox 1 the oldest for \d s", shown)
    assert re.search(r"Bundles that wait 0 ", shown)
    for queue in (*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE, settings.PERIODIC_QUEUE):
        assert queue in shown


def test_it_says_what_a_poll_that_has_ended_waits_for(browser, make_poll, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_POLLS", 100_000)  # those of other tests have ended earlier
    poll = make_poll(closes_in=-5)

    assert re.search(rf"{poll.title} [\d: -]+ Its end is not long enough ago", text_of(browser.get(PAGE)))


def test_it_tells_which_jobs_are_late(browser):
    for job in ("integrity.check", "outbox.drain", "cases.expire"):  # other tests' processes ran them; the last one runs once a day
        Moment.objects.filter(name__contains=job).delete()
    jobs.note_success("integrity.check", now() - timedelta(hours=2))
    jobs.note_success("outbox.drain", now() - timedelta(minutes=5))

    shown = text_of(browser.get(PAGE))

    assert re.search(r"integrity\.check 1:00:00 [\d-]+ [\d:]+ (?!\(late\))", shown)
    assert re.search(r"outbox\.drain 0:00:02 [\d-]+ [\d:]+ \(late\)", shown)
    assert re.search(r"cases\.expire 1 day, 0:00:00 never (?!\(late\))", shown)
    assert next(job for job in pipeline.look(now() + timedelta(days=4))["jobs"] if job.name == "cases.expire").is_late


def test_it_shows_how_fast_votes_are_counted_and_how_long_that_took(browser, poll, monkeypatch):
    monkeypatch.setattr(pipeline, "REFRESH_SECONDS", 0.2)
    with connection.cursor() as cursor:
        # Where other tests' votes were is room: the newest would go there, and not to the table's end, where it is looked for.
        cursor.execute("VACUUM FULL votes")
    browser.get(PAGE)
    count_votes([vote_of(poll, f"voter {number}") for number in range(50)])

    wait_until(lambda: (found := pipeline.look(now())["rates"]) and found[0][1] > 0)
    newest = pipeline.look(now())["newest"]
    assert timedelta() <= now() - newest.counted_at < timedelta(seconds=60)


def test_no_row_of_votes_is_looked_for_through_the_whole_table(browser, poll):
    count_votes([vote_of(poll, "alice")])

    with CaptureQueriesContext(
        connection,
    ) as asked:
        browser.get(PAGE)

    of_votes = [query["sql"] for query in asked if re.search(r"FROM (votes|outcomes)\b", query["sql"])]
    assert len(of_votes) == 1
    with connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")  # else chosen while few tests have voted, and then rightly
        cursor.execute(f"EXPLAIN {of_votes[0]}")
        assert "Tid Range Scan on votes" in str(cursor.fetchall())
        cursor.execute("RESET enable_seqscan")


def test_while_the_broker_is_away_the_rest_is_shown(browser, broker_away):
    asked_at = time.monotonic()
    answer = browser.get(PAGE)

    assert answer.status_code == 200 and time.monotonic() - asked_at < 4
    shown = text_of(answer)
    assert "The broker does not answer." in shown and "Bundles that wait ?" in shown and "Jobs of the clock" in shown


def test_it_shows_itself_anew_without_a_script(browser):
    answer = browser.get(PAGE)

    assert answer["refresh"] == "5"
    content = answer.content.decode().partition('id="content-main"')[2].partition("</main>")[0]
    assert "<script" not in content and "style=" not in content and "onclick" not in content
