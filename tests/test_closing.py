"""The end of a poll: final only when nothing accepted in time can be uncounted, and what comes later all the same counts."""

import json
import logging
import os
import socket
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

import msgspec
import pytest
from celery import current_app
from django.conf import settings as project
from django.db import OperationalError, connection, transaction
from django.utils.timezone import now

from polls import bundles, closing, counting, deadletters, finality, jobs, outbox, problems, results, stages, stamps, turns
from polls.counting import count_votes
from polls.journal import Act
from polls.models import JournalEntry, Moment, OutboxBundle, Poll, PollStatus, Tally
from tasks import periodic
from tests.conftest import bundle_of, free_port, outcome_of, tallies, task_message, vote_of, wait_until, worker
from tests.test_stages import MICROSECOND, actions, run_at_once

EVEN, ODD = project.VOTES_QUEUES
QUEUES = "The broker does not tell what waits in its queues and with its workers."
BUSY = f"{EVEN} has not been seen empty since the poll's end."
BUSY_ODD = f"{ODD} has not been seen empty since the poll's end."
DEAD = "Votes of the poll are among the dead letters, to be replayed by an operator."
DEAD_UNKNOWN = "Nobody can tell whose votes are among the dead letters."
KEPT = "Votes of the poll wait in the outbox."
KEPT_UNKNOWN = "Nobody can tell whose votes wait in the outbox: a bundle there can't be read."
FIGURED = [*project.VOTES_QUEUES, project.DEAD_LETTER_QUEUE]
NOTHING = {"messages_ready": 0, "messages_unacknowledged": 0, "messages": 0}
SOMETHING = {**NOTHING, "messages_ready": 1}


@pytest.fixture(autouse=True)
def _nothing_seen_before(_database):
    Moment.objects.all().delete()


@pytest.fixture
def closed_poll(make_poll):
    poll = make_poll(closes_in=-600)
    closing.close_expired_polls(now())
    poll.refresh_from_db()
    return poll


@pytest.fixture
def management(settings):
    """What RabbitMQ's management would say: `figures`, or those `of` a queue, with `status`; `asked` is what it was asked for."""

    class Management(BaseHTTPRequestHandler):
        figures = NOTHING
        of = {}
        status = 200
        asked = []

        def do_GET(self):
            figures = self.of.get(self.path.rpartition("/")[2], self.figures)
            body = figures if isinstance(figures, bytes) else json.dumps(figures).encode()
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


def seconds_taken(do):
    started = time.monotonic()
    do()
    return time.monotonic() - started


def is_final(poll):
    return Poll.objects.get(pk=poll.pk).finalised_at is not None


def why_not(poll):
    poll.refresh_from_db()
    return finality.why_not(poll, finality.look(now()), now())


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
    poll = make_poll(closes_in=-65)
    due = poll.closes_at + timedelta(seconds=project.FINAL_AFTER_SECONDS) + finality.FIGURES_AGE
    closing.close_expired_polls(due)

    finality.finalise_polls(due - MICROSECOND)
    assert not is_final(poll)
    assert finality.why_not(Poll.objects.get(pk=poll.pk), finality.look(due), due - MICROSECOND).startswith(
        "Its end is not long enough ago"
    )
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
def test_a_poll_waits_for_what_a_queue_and_what_workers_hold(closed_poll, management, broker, ready, held, messages):
    management.of = {ODD: {"messages_ready": ready, "messages_unacknowledged": held, "messages": messages}}
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, BUSY_ODD)
    assert finality.count_bundles() == max(ready + held, messages)

    management.of = {}
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (True, None)


def test_the_management_is_asked_for_each_queue_with_its_login(management, settings):
    settings.CELERY_BROKER_URL = "amqp://nexus@mq/a%2Fb;amqp://nexus@mq2/"
    settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE = ("a b/votes", "odd"), "dead"

    assert finality.count_bundles() == 0

    login = f"Basic {b64encode(b'nexus:s/cret').decode()}"
    assert management.asked == [(f"/api/queues/a%2Fb/{queue}", login) for queue in ("a%20b%2Fvotes", "odd", "dead")]


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


@pytest.fixture
def impatient(monkeypatch):
    assert finality.PATIENCE_SECONDS < finality.LOOK_SECONDS < 4
    monkeypatch.setattr(finality, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(finality, "LOOK_SECONDS", 0.6)


def test_nobody_waits_longer_than_a_look_takes_when_broker_and_all_nodes_of_its_management_hang(
    closed_poll, settings, impatient, monkeypatch
):
    """They let everybody in, and then say nothing."""
    with ExitStack() as ending:
        ports = [ending.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(4)]
        settings.BROKER_API_URL = ";".join(f"http://127.0.0.1:{port}/api/" for port in ports[:3])
        monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"amqp://guest:guest@127.0.0.1:{ports[3]}//")
        assert seconds_taken(lambda: why_not(closed_poll)) < finality.LOOK_SECONDS + 1

        monkeypatch.setattr(finality, "_ask_management", lambda: dict.fromkeys(FIGURED, msgspec.convert(NOTHING, finality._Figures)))
        assert seconds_taken(lambda: finality.look(now())) < finality.LOOK_SECONDS + 1


def test_a_node_of_the_management_that_hangs_leaves_time_for_the_others(management, settings):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings.BROKER_API_URL = f"http://127.0.0.1:{silent.getsockname()[1]}/api;{settings.BROKER_API_URL}"
        assert finality.count_bundles() == 0


def test_a_management_that_answers_byte_by_byte_is_left_too(settings, impatient):
    def trickle(self):
        self.send_response(200)
        while not ended.is_set():
            self.wfile.write(b" ")
            ended.wait(0.1)

    ended = threading.Event()
    handler = type("Trickle", (BaseHTTPRequestHandler,), {"do_GET": trickle})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as slow:
        threading.Thread(target=slow.serve_forever, daemon=True).start()
        settings.BROKER_API_URL = f"http://127.0.0.1:{slow.server_port}/api/"
        assert seconds_taken(finality.count_bundles) < finality.PATIENCE_SECONDS + 1
        ended.set()
        slow.shutdown()


def test_another_node_tells_when_the_first_does_not(management, settings):
    settings.BROKER_API_URL = f"http://127.0.0.1:{free_port()}/api;{settings.BROKER_API_URL}"
    management.figures = SOMETHING
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
    management.figures = SOMETHING
    assert [told(), told()] == [[f"polls can't become final: {BUSY}"], []]
    management.status = 500
    assert [told(), told()] == [[f"polls can't become final: {QUEUES}"], []]
    management.status, management.figures = 200, NOTHING
    assert told() == []
    assert is_final(closed_poll)


def test_nobody_is_asked_while_no_poll_is_due(management):
    finality.finalise_polls(now() - timedelta(days=365))
    assert management.asked == []


def test_the_job_finalises_once_nothing_is_outstanding(closed_poll, management, broker):
    for _ in range(2):
        periodic.finalise_polls()
        assert actions(closed_poll) == [("olga", "created"), ("the clock", "closed"), ("the clock", "finalised")]


def test_a_worker_does_every_job_of_the_clock(closed_poll, poll, management, broker, tmp_path, settings):
    count_votes([vote_of(poll, "alice")])
    Tally.objects.filter(poll=poll).update(votes=7)  # by hand

    with worker(project.PERIODIC_QUEUE, tmp_path / "periodic.log", concurrency=1, BROKER_API_URL=settings.BROKER_API_URL):
        for job in jobs.intervals():
            current_app.send_task(job)
        wait_until(lambda: None not in jobs.successes().values())

    assert Poll.objects.get(pk=closed_poll.pk).status == PollStatus.FINAL
    assert tallies(poll) == {"soup": 1}


# --- Turns ------------------------------------------------------------------------------------------------------------


def test_even_minutes_are_the_turn_of_one_queue_and_odd_ones_of_the_other():
    at = [0, 59.999, 60, 119.999, 120, 1_800_000_000, 1_800_000_060]
    assert [turns.queue_at(seconds) for seconds in at] == [EVEN, EVEN, ODD, ODD, EVEN, EVEN, ODD]


def test_a_poll_is_final_when_each_queue_was_empty_once_though_never_both(closed_poll, management, broker):
    management.of = {EVEN: SOMETHING}
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, BUSY)

    management.of = {EVEN: SOMETHING, ODD: SOMETHING}
    periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, BUSY)  # what was seen of the other is remembered

    management.of = {ODD: SOMETHING}
    assert why_not(closed_poll) is None
    periodic.finalise_polls()
    assert is_final(closed_poll)


def test_while_no_figure_says_that_a_queue_is_empty_no_poll_is_final(closed_poll, management, broker):
    management.of = {EVEN: SOMETHING, ODD: SOMETHING}
    for _ in range(3):
        periodic.finalise_polls()
    assert (is_final(closed_poll), why_not(closed_poll)) == (False, BUSY)
    assert not Moment.objects.filter(name__in=[f"{EVEN} was empty", f"{ODD} was empty"]).exists()


@pytest.mark.parametrize(("microseconds", "is_enough"), [(0, True), (1, False)])
def test_only_what_was_seen_when_all_votes_had_arrived_counts(closed_poll, management, broker, microseconds, is_enough):
    settled_at = closed_poll.closes_at + timedelta(seconds=project.FINAL_AFTER_SECONDS)
    for queue in (EVEN, ODD):
        stamps.stamp(f"{queue} was empty", settled_at - microseconds * MICROSECOND)
    management.of = {EVEN: SOMETHING, ODD: SOMETHING}

    assert why_not(closed_poll) == (None if is_enough else BUSY)
    periodic.finalise_polls()
    assert is_final(closed_poll) == is_enough


def test_what_was_seen_counts_while_the_management_is_away_but_for_the_dead_letters(closed_poll, management, broker):
    management.of = {EVEN: SOMETHING}
    periodic.finalise_polls()
    management.of = {ODD: SOMETHING}
    management.status = 500
    assert why_not(closed_poll) == QUEUES
    stamps.stamp(f"{EVEN} was empty", now())
    assert why_not(closed_poll) == DEAD_UNKNOWN


def test_a_stamp_moves_on_and_never_back():
    at = now() - timedelta(seconds=1)
    for moment in (at, at - MICROSECOND, at + MICROSECOND, at):
        stamps.stamp("tea", moment)
    assert stamps.read(["tea", "coffee"]) == {"tea": at + MICROSECOND}


# --- Clocks that are wrong --------------------------------------------------------------------------------------------


def set_ahead(names, ahead=timedelta(hours=2), **also):
    """Have these stamps as a clock that is ahead leaves them; with `noted_at`, PostgreSQL's clock was ahead, too."""
    assert Moment.objects.filter(name__in=names).update(at=now() + ahead, **also) == len(names)


EMPTIED = [f"{queue} was empty" for queue in project.VOTES_QUEUES]


@pytest.mark.parametrize("is_database_ahead", [False, True])
def test_a_queue_that_was_seen_empty_in_the_future_was_not_seen_empty(make_poll, management, broker, is_database_ahead):
    for name in EMPTIED:
        stamps.stamp(name, now() - timedelta(minutes=20))
    set_ahead(EMPTIED, **({"noted_at": now() + timedelta(hours=2)} if is_database_ahead else {}))
    Moment.objects.filter(noted_at__lte=now()).update(noted_at=now() - timedelta(minutes=20))
    poll = make_poll(closes_in=-600)
    closing.close_expired_polls(now())
    management.of = {EVEN: SOMETHING, ODD: SOMETHING}

    periodic.finalise_polls()

    assert (is_final(poll), why_not(poll)) == (False, BUSY)
    management.of = {}
    periodic.finalise_polls()
    assert is_final(poll)  # the wrong moments are in nobody's way


def test_what_a_clock_that_was_ahead_has_seen_does_not_count_when_that_moment_comes(make_poll, management, broker, monkeypatch):
    """The worker was 20 minutes ahead when it saw the queues empty; now is then."""
    earlier = now() - timedelta(minutes=20)
    for name in EMPTIED:
        stamps.stamp(name, now())
    Moment.objects.filter(name__in=EMPTIED).update(noted_at=earlier)
    poll = make_poll(closes_in=-600)
    closing.close_expired_polls(now())
    management.of = {EVEN: SOMETHING, ODD: SOMETHING}

    periodic.finalise_polls()

    assert (is_final(poll), why_not(poll)) == (False, BUSY)


def test_a_stamp_counts_at_most_for_when_postgresql_noted_it():
    stamps.stamp("tea", now() + timedelta(hours=2))
    assert timedelta() <= now() - stamps.read(["tea"])["tea"] < timedelta(seconds=5)

    set_ahead(["tea"], noted_at=now() + timedelta(hours=1))
    assert stamps.read(["tea"]) == {}
    stamps.stamp("tea", at := now() - timedelta(seconds=3))
    assert stamps.read(["tea"]) == {"tea": at}  # what lay in the future holds nothing up


def test_stamps_that_lie_in_the_future_are_forgotten_before_it_comes(management, broker):
    management.of = {EVEN: SOMETHING, ODD: SOMETHING}
    for name in (*EMPTIED, "tea"):
        stamps.stamp(name, now())
    set_ahead([*EMPTIED, "tea"], noted_at=now() + timedelta(hours=2))

    periodic.finalise_polls()

    assert {moment.name for moment in Moment.objects.filter(at__gt=now())} == {"tea"}  # no other's business
    assert all(moment < now() - timedelta(days=365) for moment in stamps.read(EMPTIED).values())


def test_a_worker_whose_clock_is_ahead_ends_no_poll_and_sees_nothing(make_poll, management, broker, monkeypatch):
    poll = make_poll(closes_in=60)
    monkeypatch.setattr(periodic, "now", lambda: now() + timedelta(hours=2))

    periodic.open_and_close_polls()
    periodic.finalise_polls()
    finality.finalise_polls(now() + timedelta(hours=2))

    poll.refresh_from_db()
    assert (poll.status, poll.closed_at, poll.finalised_at) == (PollStatus.OPEN, None, None)
    assert all(moment <= now() - finality.FIGURES_AGE for moment in stamps.read(EMPTIED).values())


def test_a_replay_by_a_clock_that_was_ahead_holds_polls_up_for_a_minute_and_no_longer(closed_poll, management, broker):
    stamps.stamp_ahead(deadletters.REPLAYED, timedelta(hours=2))
    for name in EMPTIED:
        stamps.stamp(name, now())

    assert why_not(closed_poll).endswith("has not been seen empty since dead letters were replayed.")
    until = Moment.objects.get(name=deadletters.REPLAYED).at
    assert timedelta(seconds=50) < until - now() <= deadletters.REPLAY_AHEAD
    assert why_not(closed_poll) and Moment.objects.get(name=deadletters.REPLAYED).at == until  # set once, and not at every look


def test_a_poll_that_nobody_has_closed_waits_for_the_job(make_poll, management, broker):
    poll = make_poll(closes_in=-600)
    assert why_not(poll).startswith("The clock's job that closes polls has not run since its end")


def test_a_poll_that_waits_for_nothing_but_the_job_says_so(closed_poll, management, broker):
    jobs.note_success("polls.finalise", now() - timedelta(minutes=2))
    assert why_not(closed_poll).startswith("Nothing: the clock's job that makes polls final has not run lately.")
    jobs.note_success("polls.finalise", now())
    assert why_not(closed_poll) is None


# --- Letters on the move ----------------------------------------------------------------------------------------------


@pytest.fixture
def private_queues(settings, broker):
    """Two queues of votes that no worker takes from."""
    settings.VOTES_QUEUES = (f"{project.QUEUE_PREFIX}even.alone", f"{project.QUEUE_PREFIX}odd.alone")
    with current_app.connection_for_write() as connection:
        channel = connection.default_channel
        for name in settings.VOTES_QUEUES:
            channel.queue_declare(name, durable=True, auto_delete=False)
        yield channel
        for name in settings.VOTES_QUEUES:
            channel.queue_delete(name)


def replay_all():
    deadletters.replay()


def replay_each():
    assert deadletters.replay_one("first") == deadletters.replay_one("second") == 1


@pytest.mark.parametrize("replay", [replay_all, replay_each])
def test_what_was_seen_before_a_replay_had_ended_does_not_count(closed_poll, management, bury, private_queues, settings, replay):
    for voter, id in (("alice", "first"), ("bob", "second")):
        headers, body = bundle_of(vote_of(closed_poll, voter))
        bury({**headers, "id": id}, body)
    for queue in settings.VOTES_QUEUES:
        stamps.stamp(f"{queue} was empty", now())
    assert why_not(closed_poll) == DEAD
    turn = {turns.queue_at(time.time())}

    replay()

    turn.add(turns.queue_at(time.time()))
    assert {name for name in settings.VOTES_QUEUES if private_queues.basic_get(name)} <= turn
    waits = f"{settings.VOTES_QUEUES[0]} has not been seen empty since dead letters were replayed."
    assert why_not(closed_poll) == waits
    assert Moment.objects.get(name=deadletters.REPLAYED).at > now() + timedelta(seconds=50)
    periodic.finalise_polls()
    assert not is_final(closed_poll)
    Moment.objects.filter(name=deadletters.REPLAYED).update(at=now() - MICROSECOND)  # a minute later
    for queue in settings.VOTES_QUEUES:
        stamps.stamp(f"{queue} was empty", now())
    assert why_not(closed_poll) is None


def test_a_replay_is_on_record_before_it_takes_a_letter_and_while_it_goes_on(poll, bury, private_queues, monkeypatch):
    for voter in ("alice", "bob"):
        bury(*bundle_of(vote_of(poll, voter)))
    monkeypatch.setattr(deadletters, "_SAID_AGAIN_SECONDS", 0)
    stamped = []
    monkeypatch.setattr(stamps, "stamp_ahead", lambda name, ahead: stamped.append((name, deadletters.count())))

    deadletters.replay()

    assert stamped == [(deadletters.REPLAYED, left) for left in (2, 1, 0)]


def test_a_replay_that_can_not_be_put_on_record_takes_no_letter(poll, bury, monkeypatch):
    def fail(name, ahead):
        raise OperationalError

    bury(*bundle_of(vote_of(poll, "alice")))
    monkeypatch.setattr(stamps, "stamp_ahead", fail)
    for replay in (deadletters.replay, lambda: deadletters.replay_one("any")):
        with pytest.raises(deadletters.UnreachableError, match="The database does not answer"):
            replay()
    assert deadletters.count() == 1


def test_a_dead_letter_that_somebody_holds_may_be_of_any_poll(closed_poll, management, bury):
    bury(*bundle_of(vote_of(closed_poll, "alice")))
    management.of = {project.DEAD_LETTER_QUEUE: {**NOTHING, "messages_unacknowledged": 1}}
    with current_app.connection_for_write() as connection:
        connection.default_channel.basic_get(project.DEAD_LETTER_QUEUE)
        wait_until(lambda: deadletters.count() == 0)
        assert why_not(closed_poll) == DEAD_UNKNOWN
    wait_until(lambda: why_not(closed_poll) == DEAD)


def test_who_looks_at_dead_letters_hides_them_from_nobody(closed_poll, bury):
    bury(*bundle_of(vote_of(closed_poll, "alice")))

    def look(_):
        try:
            return [(deadletters.polls_inside(), len(deadletters.peek())) for _ in range(5)]
        finally:
            connection.close()

    with ThreadPoolExecutor(3) as lookers:
        assert list(lookers.map(look, range(3))) == [[({closed_poll.pk}, 1)] * 5] * 3


@pytest.mark.skipif("BROKER_API_URL" not in os.environ, reason="this RabbitMQ's management is not known")
def test_the_real_figures_know_what_workers_hold_and_have_not_acknowledged(broker, closed_poll, settings):
    held = f"{project.QUEUE_PREFIX}held"
    settings.VOTES_QUEUES = (held, ODD)
    with current_app.connection_for_write() as connection:
        channel = connection.default_channel
        channel.queue_declare(held, durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        try:
            wait_until(lambda: finality.count_bundles() == 0)
            channel.basic_publish(channel.prepare_message(b"a bundle"), exchange="", routing_key=held)
            wait_until(lambda: channel.basic_get(held) is not None)
            wait_until(lambda: finality.count_bundles() == 1, seconds=finality.FIGURES_AGE.total_seconds())
            assert channel.queue_declare(held, passive=True).message_count == 0  # all that AMQP tells
        finally:
            channel.queue_delete(held)


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
