"""The end of a poll: final only when nothing accepted in time can be uncounted, and what comes later all the same counts."""

import json
import logging
import os
import threading
from base64 import b64encode
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import pytest
from celery import current_app
from django.conf import settings as project
from django.db import transaction
from django.utils.timezone import now

from polls import bundles, closing, counting, deadletters, finality, outbox, problems, results, stages
from polls.counting import count_votes
from polls.journal import Act
from polls.models import JournalEntry, OutboxBundle, Poll, PollStatus
from tasks import periodic
from tests.conftest import bundle_of, free_port, outcome_of, tallies, task_message, vote_of, wait_until, worker
from tests.test_stages import MICROSECOND, actions, run_at_once

QUEUES = "The broker does not tell what waits in its queue and with its workers."
BUSY = "Bundles of votes wait in the queue or with the workers."
DEAD = "Votes of the poll are among the dead letters, to be replayed by an operator."
DEAD_UNKNOWN = "Nobody can tell whose votes are among the dead letters."
KEPT = "Votes of the poll wait in the outbox."
KEPT_UNKNOWN = "Nobody can tell whose votes wait in the outbox: a bundle there can't be read."
NOTHING = {"messages_ready": 0, "messages_unacknowledged": 0, "messages": 0}


@pytest.fixture
def closed_poll(make_poll):
    poll = make_poll(closes_in=-600)
    closing.close_expired_polls(now())
    poll.refresh_from_db()
    return poll


@pytest.fixture
def management(settings):
    """What RabbitMQ's management would say: `figures`, with `status`; `asked` is what it was asked for."""

    class Management(BaseHTTPRequestHandler):
        figures = NOTHING
        status = 200
        asked = []

        def do_GET(self):
            body = self.figures if isinstance(self.figures, bytes) else json.dumps(self.figures).encode()
            self.asked.append((self.path, self.headers["Authorization"]))
            self.send_response(self.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    Management.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Management)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings.BROKER_API_URL = f"http://nexus:s%2Fcret@127.0.0.1:{server.server_port}/api/"
    yield Management
    server.shutdown()
    server.server_close()


def is_final(poll):
    return Poll.objects.get(pk=poll.pk).finalised_at is not None


def why_not(poll):
    poll.refresh_from_db()
    return finality.why_not(poll, finality.look(), now())


# --- When its time has come -------------------------------------------------------------------------------------------


def test_a_poll_is_final_when_its_time_has_passed_and_not_a_microsecond_before(make_poll):
    poll = make_poll(closes_in=-5)
    due = poll.closes_at + timedelta(seconds=project.FINAL_AFTER_SECONDS)

    assert closing.finalise_polls(due, [poll.pk]) == 0  # the clock has not closed it yet
    closing.close_expired_polls(due)
    assert closing.finalise_polls(due - MICROSECOND, [poll.pk]) == 0
    assert not is_final(poll)
    assert closing.finalise_polls(due, [poll.pk]) == 1

    assert Poll.objects.get(pk=poll.pk).finalised_at == due
    with pytest.raises(problems.Refusal, match="final"):
        stages.reopen_poll(poll.pk, Act("olga", due), due + timedelta(hours=1))


def test_figures_count_only_when_they_must_be_younger_than_the_last_vote(make_poll, management, broker):
    poll = make_poll(closes_in=-5)
    due = poll.closes_at + timedelta(seconds=project.FINAL_AFTER_SECONDS) + finality.FIGURES_AGE
    closing.close_expired_polls(due)

    finality.finalise_polls(due - MICROSECOND)
    assert not is_final(poll)
    assert finality.why_not(Poll.objects.get(pk=poll.pk), finality.look(), due - MICROSECOND).startswith("Its end is not long enough ago")
    finality.finalise_polls(due)

    assert Poll.objects.get(pk=poll.pk).finalised_at == due


def test_only_polls_that_are_due_are_called_final(make_poll, closed_poll):
    still_open = make_poll()

    assert closing.finalise_polls(now(), [closed_poll.pk, still_open.pk, uuid4()]) == 1
    assert (is_final(closed_poll), is_final(still_open)) == (True, False)


def test_no_poll_is_final_while_its_votes_are_being_counted(closed_poll):
    with transaction.atomic():
        count_votes([vote_of(closed_poll, "alice")])
        run_at_once(lambda at: closing.finalise_polls(at, [closed_poll.pk]), now(), threads=1)
        assert not is_final(closed_poll)

    closing.finalise_polls(now(), [closed_poll.pk])
    assert is_final(closed_poll)


# --- What it waits for ------------------------------------------------------------------------------------------------


def test_a_poll_waits_for_its_votes_in_the_outbox_and_not_for_others(closed_poll, make_poll, management, broker):
    other = make_poll(closes_in=-600)
    closing.close_expired_polls(now())
    outbox.keep(bundles.write([vote_of(closed_poll, "alice")]))
    try:
        assert (why_not(closed_poll), why_not(other)) == (KEPT, None)
        periodic.finalise_polls()
        assert (is_final(closed_poll), is_final(other)) == (False, True)
    finally:
        outbox.drain()

    assert not OutboxBundle.objects.exists()
    periodic.finalise_polls()
    assert is_final(closed_poll)
    assert JournalEntry.objects.filter(poll=closed_poll, action="late").count() == 0


def test_a_bundle_in_the_outbox_that_nobody_can_read_may_be_of_any_poll(closed_poll, management, broker):
    kept = OutboxBundle.objects.create(body=b"no bundle")
    try:
        periodic.finalise_polls()
        assert (is_final(closed_poll), why_not(closed_poll)) == (False, KEPT_UNKNOWN)
    finally:
        kept.delete()


# The last: one on its way to the dead letters.
@pytest.mark.parametrize(("ready", "held", "messages"), [(1, 0, 1), (0, 1, 1), (3, 4, 0), (0, 0, 7)])
def test_a_poll_waits_for_what_the_queue_and_what_workers_hold(closed_poll, management, broker, ready, held, messages):
    management.figures = {"messages_ready": ready, "messages_unacknowledged": held, "messages": messages}
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, BUSY)
    assert finality.count_bundles() == max(ready + held, messages)

    management.figures = NOTHING
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (True, None)


def test_the_management_is_asked_for_the_queue_of_votes_with_its_login(management, settings):
    settings.CELERY_BROKER_URL = "amqp://nexus@mq/a%2Fb;amqp://nexus@mq2/"
    settings.VOTES_QUEUE = "a b/votes"

    assert finality.count_bundles() == 0

    login = b64encode(b"nexus:s/cret").decode()
    assert management.asked == [("/api/queues/a%2Fb/a%20b%2Fvotes", f"Basic {login}")]


@pytest.mark.parametrize(
    ("status", "figures"),
    [
        (200, b"nonsense"),
        (200, b""),
        (200, {}),
        (200, {"messages_ready": 0, "messages": 0}),
        (200, {"messages_ready": 0, "messages_unacknowledged": 0}),
        (200, {**NOTHING, "messages_unacknowledged": None}),
        (200, {**NOTHING, "messages_ready": "0"}),
        (200, [0, 0]),
        (401, NOTHING),
        (404, {"error": "Object Not Found"}),
        (503, NOTHING),
    ],
)
def test_figures_that_are_none_say_nothing(closed_poll, management, broker, status, figures):
    management.status, management.figures = status, figures
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, QUEUES)


def test_without_the_management_no_poll_is_final_and_nobody_waits_long(closed_poll, settings, broker, caplog):
    for url in (f"http://nexus:terces@127.0.0.1:{free_port()}/api/", "http://nexus:terces@nowhere.invalid/api/"):
        settings.BROKER_API_URL = url
        periodic.finalise_polls()
        assert (is_final(closed_poll), why_not(closed_poll)) == (False, QUEUES)
    assert "terces" not in caplog.text


def test_a_management_that_never_answers_is_left_after_seconds(closed_poll, settings):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # nobody serves
        settings.BROKER_API_URL = f"http://127.0.0.1:{silent.server_port}/api/"
        started = now()
        assert finality.count_bundles() is None
        assert now() - started < timedelta(seconds=finality.PATIENCE_SECONDS + 1)


def test_another_node_tells_when_the_first_does_not(management, settings):
    settings.BROKER_API_URL = f"http://127.0.0.1:{free_port()}/api;{settings.BROKER_API_URL}"
    management.figures = {**NOTHING, "messages_ready": 2}
    assert finality.count_bundles() == 2


def test_no_proxy_comes_between(management, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert finality.count_bundles() == 0


def test_a_poll_waits_for_its_votes_among_the_dead_letters_and_not_for_others(closed_poll, make_poll, management, bury):
    other = make_poll(closes_in=-600)
    closing.close_expired_polls(now())
    bury(*bundle_of(vote_of(closed_poll, "alice")))

    periodic.finalise_polls()

    assert (is_final(closed_poll), is_final(other)) == (False, True)
    assert why_not(closed_poll) == DEAD
    assert deadletters.count() == 1  # looked at, and still there


@pytest.mark.parametrize("body", [b"nonsense", b"[]", b"{}", task_message("no bundle")[1], task_message([["half", "a", "vote"]])[1]])
def test_a_dead_letter_that_nobody_can_read_may_be_of_any_poll(closed_poll, management, bury, body):
    bury({}, body)
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, DEAD_UNKNOWN)


def test_more_dead_letters_than_anybody_reads_may_be_of_any_poll(closed_poll, poll, management, bury, monkeypatch):
    monkeypatch.setattr(deadletters, "MOST_READ", 2)
    for voter in ("alice", "bob"):
        bury(*bundle_of(vote_of(poll, voter)))
    assert why_not(closed_poll) is None
    bury(*bundle_of(vote_of(poll, "carol")))
    assert why_not(closed_poll) == DEAD_UNKNOWN


def test_dead_letters_that_can_not_be_reached_may_be_of_any_poll(closed_poll, management, broker, settings, request):
    settings.DEAD_LETTER_QUEUE = f"none-{uuid4()}"
    assert why_not(closed_poll) == DEAD_UNKNOWN
    request.getfixturevalue("broker_away")
    assert why_not(closed_poll) == DEAD_UNKNOWN


def test_it_is_said_once_what_polls_wait_for_and_again_when_that_changes(closed_poll, management, broker, caplog):
    def told():
        caplog.clear()
        periodic.finalise_polls()
        return [record.getMessage() for record in caplog.records if record.name == "polls.finality" and record.levelno == logging.WARNING]

    finality.finalise_polls(now() - timedelta(days=365))  # nothing is due: what was told is forgotten
    management.figures = {**NOTHING, "messages_ready": 1}
    assert [told(), told()] == [[f"polls can't become final: {BUSY}"], []]
    management.status = 500
    assert [told(), told()] == [[f"polls can't become final: {QUEUES}"], []]
    management.status, management.figures = 200, NOTHING
    assert told() == []
    assert is_final(closed_poll)


def test_nobody_is_asked_while_no_poll_is_due(management):
    finality.finalise_polls(now() - timedelta(days=365))
    assert management.asked == []


def test_the_job_finalises_once_nothing_is_outstanding(closed_poll, bury, management, tmp_path, settings):
    with worker(project.PERIODIC_QUEUE, tmp_path / "periodic.log", concurrency=1, BROKER_API_URL=settings.BROKER_API_URL):
        periodic.finalise_polls.delay()
        wait_until(lambda: Poll.objects.get(pk=closed_poll.pk).status == PollStatus.FINAL)

    assert actions(closed_poll) == [("olga", "created"), ("the clock", "closed"), ("the clock", "finalised")]


@pytest.mark.skipif("BROKER_API_URL" not in os.environ, reason="this RabbitMQ's management is not known")
def test_the_real_figures_know_what_workers_hold_and_have_not_acknowledged(broker, closed_poll, settings):
    settings.VOTES_QUEUE = f"{project.QUEUE_PREFIX}held"
    with current_app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(settings.VOTES_QUEUE, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        try:
            wait_until(lambda: finality.count_bundles() == 0)
            channel.basic_publish(channel.prepare_message(b"a bundle"), exchange="", routing_key=settings.VOTES_QUEUE)
            wait_until(lambda: channel.basic_get(settings.VOTES_QUEUE) is not None)
            wait_until(lambda: finality.count_bundles() == 1, seconds=finality.FIGURES_AGE.total_seconds())
            assert channel.queue_declare(settings.VOTES_QUEUE, passive=True).message_count == 0  # all that AMQP tells
        finally:
            channel.queue_delete(settings.VOTES_QUEUE)


# --- A late vote ------------------------------------------------------------------------------------------------------


def late(poll):
    return list(JournalEntry.objects.filter(poll=poll, action="late").order_by("id").values_list("actor", "changes"))


@pytest.fixture
def final_poll(closed_poll):
    count_votes([vote_of(closed_poll, "alice")])
    closing.finalise_polls(now(), [closed_poll.pk])
    assert is_final(closed_poll)
    return closed_poll


def test_a_vote_that_comes_after_its_poll_was_final_counts_and_is_told(final_poll, caplog):
    revision = results.read_results(final_poll.pk, now())["revision"]

    count_votes([vote_of(final_poll, "bob"), vote_of(final_poll, "carol", "salad")])

    assert tallies(final_poll) == {"soup": 2, "salad": 1}
    assert results.read_results(final_poll.pk, now())["revision"] > revision
    assert late(final_poll) == [("the clock", {"late_votes": [0, 2]})]
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == [f"2 votes came after poll {final_poll.pk} was final; they are counted"]


def test_a_late_vote_that_does_not_stand_is_told_too(final_poll):
    second = vote_of(final_poll, "alice", "salad", at=1)
    count_votes([second])
    assert outcome_of(second) == ("rejected", "duplicate")
    assert late(final_poll) == [("the clock", {"late_votes": [0, 1]})]


def test_a_repeat_of_a_vote_is_not_late(closed_poll):
    first = vote_of(closed_poll, "alice")
    count_votes([first])
    closing.finalise_polls(now(), [closed_poll.pk])

    count_votes([first])

    assert late(closed_poll) == []


def test_votes_of_a_poll_that_is_not_final_are_not_late(closed_poll, caplog):
    count_votes([vote_of(closed_poll, "alice")])
    assert late(closed_poll) == []
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]


def test_the_entry_about_late_votes_comes_with_their_count_or_not_at_all(final_poll, monkeypatch):
    def fail(self):
        raise RuntimeError

    monkeypatch.setattr(counting._Count, "change_tallies", fail)
    with pytest.raises(RuntimeError):
        count_votes([vote_of(final_poll, "bob")])

    assert (late(final_poll), tallies(final_poll)) == ([], {"soup": 1})


def test_late_votes_in_a_bundle_of_several_polls_are_told_of_their_poll(final_poll, poll):
    count_votes([vote_of(final_poll, "bob"), vote_of(poll, "bob")])
    assert (late(final_poll), late(poll)) == ([("the clock", {"late_votes": [0, 1]})], [])
