"""The real broker, database and processes: what happens to a message on its way, and to those that are no bundle."""

import asyncio
import base64
import itertools
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import msgspec
import pytest
from celery import current_app
from django.conf import settings
from django.core.management import call_command
from django.db import OperationalError, connection, transaction
from django.utils.timezone import now
from kombu import Producer

from polls import bundles, closing, counting, deadletters, outbox, patience, problems, publishing, turns
from polls.models import OutboxBundle, Poll, VoteAside
from polls.publishing import Publisher
from tests.conftest import (
    Api,
    answers,
    assert_tallies_equal_votes,
    bundle_of,
    database_url,
    free_port,
    process,
    tallies,
    task_message,
    vote_of,
    wait_until,
    web,
    worker,
)
from tests.test_intake import assert_refused


@pytest.fixture
def queue(broker):
    """The broker's own door: puts anything on the queue of votes."""
    with current_app.connection_for_write() as connection:
        yield Producer(connection.default_channel)


def put(queue, body, headers=None, content_type="application/json", content_encoding="utf-8"):
    queue.publish(
        body,
        routing_key=settings.VOTES_QUEUES[0],
        headers=headers or {},
        content_type=content_type,
        content_encoding=content_encoding,
        delivery_mode=2,
    )


@pytest.fixture
def no_dead_letters(broker):
    def purge():
        with current_app.connection_for_write() as connection:
            connection.default_channel.queue_purge(settings.DEAD_LETTER_QUEUE)

    purge()
    yield
    purge()


def test_messages_that_are_no_bundle_go_to_the_dead_letters_and_none_is_dropped(pipeline, queue, poll, no_dead_letters):
    headers, good = bundle_of(vote_of(poll, "alice"))
    put(queue, b"{not json", headers)
    put(queue, good, headers, content_type="application/x-python-serialize", content_encoding="binary")
    put(queue, b"\x80\x04.", headers, content_encoding="no-such-encoding")
    put(queue, good, {**headers, "task": "os.system"})
    put(queue, good)  # no task at all
    put(queue, b"[]", headers)
    put(queue, b"", headers)
    put(queue, *reversed(task_message("nonsense")))
    put(queue, *reversed(task_message([["x"], None])))
    put(queue, good, headers)

    wait_until(lambda: deadletters.count() == 9)
    wait_until(lambda: tallies(poll) == {"soup": 1})


def test_a_bundle_with_a_bad_vote_is_counted_kept_and_replayed_without_counting_twice(pipeline, queue, make_poll, no_dead_letters, capsys):
    poll = make_poll()
    packed = msgspec.msgpack.decode(base64.b64decode(bundles.write([vote_of(poll, "alice"), vote_of(poll, "bob")])))
    put(queue, *reversed(task_message(base64.b64encode(msgspec.msgpack.encode([*packed, "spam"])).decode())))
    wait_until(lambda: deadletters.count() == 1)
    assert tallies(poll) == {"soup": 2}

    [letter] = deadletters.peek()
    assert (letter.reason, letter.votes, letter.unreadable) == ("rejected", 2, 1)
    assert deadletters.count() == 1  # looking takes nothing

    call_command("replay_dead_letters", "--dry-run")
    call_command("replay_dead_letters")
    assert "1 dead letters replayed" in capsys.readouterr().out
    wait_until(lambda: deadletters.count() == 1)  # it still can't be counted in full
    assert tallies(poll) == {"soup": 2}


def test_a_dead_letter_whose_cause_is_cured_is_counted_on_replay(pipeline, make_poll, no_dead_letters):
    """Put among the dead letters as RabbitMQ would after a hundred crashes of its worker."""
    poll = make_poll()
    headers, body = bundle_of(vote_of(poll, "alice"))
    with current_app.connection_for_write() as connection:
        death = {"x-death": [{"queue": settings.VOTES_QUEUES[0], "reason": "delivery_limit", "count": 1}], "x-delivery-count": 100}
        Producer(connection.default_channel).publish(
            body,
            routing_key=settings.DEAD_LETTER_QUEUE,
            headers={**headers, **death},
            content_type="application/json",
            content_encoding="utf-8",
        )
    wait_until(lambda: deadletters.count() == 1)

    assert deadletters.replay() == 1

    wait_until(lambda: tallies(poll) == {"soup": 1})
    assert deadletters.count() == 0


@pytest.fixture
def start_web(broker, tmp_path):
    """Starts a web process whose queues begin with `prefix`; whoever wants them to exist declares them."""
    with ExitStack() as stack:

        def start(prefix, **environment):
            port = free_port()
            stack.enter_context(web(port, tmp_path / "web.log", QUEUE_PREFIX=prefix, **environment))
            wait_until(lambda: answers(port))
            return port

        yield start


def test_what_flower_and_the_broker_show_of_a_bundle_names_no_voter(api, poll, start_web):
    """The message as it waits in the queue: its headers are what Flower shows."""
    prefix, secret_voter = settings.QUEUE_PREFIX + "seen.", f"alice-{uuid4()}"
    with current_app.connection_for_write() as connection:
        channel, names = connection.default_channel, [prefix + "votes.even", prefix + "votes.odd"]
        for name in names:
            channel.queue_declare(name, durable=True, auto_delete=False)
        try:
            port, turn = start_web(prefix), {turns.queue_at(time.time())}
            assert Api(port, api.headers).cast(poll, secret_voter).status == 202
            turn.add(turns.queue_at(time.time()))
            [(queue, message)] = [(name, message) for name in names if (message := channel.basic_get(name))]
        finally:
            for name in names:
                channel.queue_delete(name)
    assert queue.replace("seen.", "") in turn
    assert message.headers["argsrepr"] == "<1 votes>"
    assert secret_voter not in str(message.headers) + str(message.body) + str(message.properties)
    assert message.properties["delivery_mode"] == 2


def test_what_a_worker_tells_of_its_tasks_names_no_voter(api, make_poll):
    """Flower asks workers what they are doing; Celery's own answer holds the arguments."""
    poll = make_poll()
    with transaction.atomic():
        Poll.objects.select_for_update().get(pk=poll.pk)  # the counts wait for this
        for voter in ("alice", "bob", "carol", "dave"):
            assert api.cast(poll, voter).status == 202
        told = {}
        for _ in range(20):
            inspect = current_app.control.inspect(timeout=0.5)
            told = {**(inspect.active() or {}), **{f"{name} reserved": tasks for name, tasks in (inspect.reserved() or {}).items()}}
            if sum(len(tasks) for tasks in told.values()) >= 4:
                break
    shown = {task["args"] for tasks in told.values() for task in tasks if task["name"] == "votes.count"}
    assert shown == {"<1 votes>"}
    wait_until(lambda: tallies(poll) == {"soup": 4})


def test_a_vote_that_no_queue_takes_is_kept_in_the_outbox_before_the_202(api, poll, start_web):
    """Without `mandatory` the broker would confirm it and forget it."""
    outbox.drain()  # what other files' tests have left
    answer = Api(start_web(settings.QUEUE_PREFIX + "missing."), api.headers).cast(poll, "alice")

    assert answer.status == 202
    assert tallies(poll) == {}
    kept = [vote for bundle in OutboxBundle.objects.all() for vote in bundles.decode(bundle.body)]
    assert [str(vote.vote_id) for vote in kept] == [answer.json["id"]]
    assert outbox.drain() == 1
    assert tallies(poll) == {"soup": 1}
    assert api.get(answer.json["links"]["self"]).json["status"] == "counted"


def test_a_broker_that_is_not_there_costs_no_vote(api, poll, start_web):
    outbox.drain()  # what other files' tests have left
    port = start_web(settings.QUEUE_PREFIX, CELERY_BROKER_URL=f"amqp://guest:guest@127.0.0.1:{free_port()}//")

    started = time.monotonic()
    answer = Api(port, api.headers).cast(poll, "alice")

    assert answer.status == 202 and time.monotonic() - started < 4
    assert outbox.drain() == 1
    assert tallies(poll) == {"soup": 1}


def test_without_broker_and_database_the_answer_is_503_and_quick(api, poll, start_web):
    """The poll is known from before; then both are gone."""
    nowhere = free_port()
    with proxy_to_database() as (url, cut):
        port = start_web(settings.QUEUE_PREFIX, CELERY_BROKER_URL=f"amqp://guest:guest@127.0.0.1:{nowhere}//", DATABASE_URL=url)
        web_api = Api(port, api.headers)
        assert web_api.cast(poll, "alice").status == 202
        cut()

        started = time.monotonic()
        answer = web_api.cast(poll, "bob", idempotency_key="1")

    assert_refused(answer, problems.NOT_ACCEPTED)
    assert int(answer.headers["retry-after"]) > 0
    assert time.monotonic() - started < 4
    assert_refused(web_api.get(f"/api/v1/polls/{uuid4()}/results"), problems.UNAVAILABLE)
    outbox.drain()
    assert tallies(poll) == {"soup": 1}


def test_no_vote_waits_for_two_slow_confirms_in_a_row(poll):
    """Each confirm comes just in time; waiting for the bundle before and then for one's own would be too long together."""

    class SlowChannel:
        async def basic_publish(self, *args, **kwargs):
            await asyncio.sleep(settings.CONFIRM_SECONDS - 0.1)

    first, second = vote_of(poll, "alice"), vote_of(poll, "bob")

    async def cast_one_after_the_other():
        publisher = Publisher()
        publisher._channel = SlowChannel()
        before = publisher.take(first)
        await asyncio.sleep(0.05)
        started = time.monotonic()
        await publisher.take(second)
        waited = time.monotonic() - started
        await before
        return waited

    assert asyncio.run(cast_one_after_the_other()) < settings.CONFIRM_SECONDS + 0.5


def test_votes_that_come_before_the_next_bundle_may_leave_share_it(poll, monkeypatch):
    monkeypatch.setattr(settings, "BUNDLE_SECONDS", 0.1)
    first, *others = [vote_of(poll, name) for name in ("alice", "bob", "carol", "dave")]
    sent = []

    class QuickChannel:
        async def basic_publish(self, body, *args, **kwargs):
            sent.append(body)

    async def cast_one_after_the_other():
        publisher = Publisher()
        publisher._channel = QuickChannel()
        await publisher.take(first)
        waiting = []
        for vote in others:
            waiting.append(publisher.take(vote))
            await asyncio.sleep(0.01)
        await asyncio.gather(*waiting)

    asyncio.run(cast_one_after_the_other())

    assert len(sent) == 2


def test_what_is_sent_in_answer_to_an_answer_joins_the_next_bundle(poll, monkeypatch):
    monkeypatch.setattr(settings, "BUNDLE_SECONDS", 0.05)
    first, second, third = [vote_of(poll, name) for name in ("alice", "bob", "carol")]
    sent = []

    class Channel:
        async def basic_publish(self, body, *args, **kwargs):
            sent.append(body)
            await asyncio.sleep(0.08)  # longer than a bundle waits for its time, shorter than it waits for the one on its way

    async def cast():
        publisher = Publisher()
        publisher._channel = Channel()
        before = publisher.take(first)
        await asyncio.sleep(0.01)
        waiting = publisher.take(second)
        await before
        await asyncio.sleep(0)  # the answer is written, and the next turn of the loop reads
        await asyncio.gather(waiting, publisher.take(third))

    asyncio.run(cast())

    assert len(sent) == 2


def test_a_publisher_that_ends_sends_what_still_waits_for_its_time(poll, monkeypatch):
    monkeypatch.setattr(settings, "BUNDLE_SECONDS", 0.1)

    class QuickChannel:
        async def basic_publish(self, *args, **kwargs):
            pass

    first, second = vote_of(poll, "alice"), vote_of(poll, "bob")

    async def end_in_between():
        publisher = Publisher()
        publisher._channel = QuickChannel()
        await publisher.take(first)
        waiting = publisher.take(second)
        await publisher.stop()
        assert waiting.done()

    asyncio.run(end_in_between())


def test_the_more_votes_come_the_fewer_bundles_leave(poll, monkeypatch):
    """A client alone waits for BUNDLE_SECONDS at most; a crowd's bundles leave half as often."""
    monkeypatch.setattr(settings, "BUNDLE_SECONDS", 0.1)
    sent_at = []

    class QuickChannel:
        async def basic_publish(self, *args, **kwargs):
            sent_at.append(time.monotonic())

    many = publishing.MANY_VOTES
    crowds = [[vote_of(poll, uuid4().hex) for _ in range(votes)] for votes in (1, many, 3 * many, 1)]

    async def cast_one_after_the_other():
        publisher = Publisher()
        publisher._channel = QuickChannel()
        for crowd in crowds:
            await asyncio.gather(*map(publisher.take, crowd))

    asyncio.run(cast_one_after_the_other())

    after_one, after_many, after_more = (later - sooner for sooner, later in itertools.pairwise(sent_at))

    assert 0.09 < after_one < 0.18
    assert after_many > 0.19
    assert 0.19 < after_more < 0.36


@contextmanager
def proxy_to_database():
    """A way to the database that can be cut: its URL, and the function that ends every connection and takes no new one."""
    url = urlsplit(database_url())
    ends, listener = [], socket.create_server(("127.0.0.1", 0))

    def pass_on(source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        target.close()

    def serve():
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((url.hostname, url.port))
                ends.extend([near, far])
                for pair in [(near, far), (far, near)]:
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    def cut():
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=serve, daemon=True).start()
    credentials = url.netloc.rpartition("@")[0]
    yield urlunsplit(url._replace(netloc=f"{credentials}@127.0.0.1:{listener.getsockname()[1]}")), cut
    with suppress(OSError):
        cut()


# --- Outbox -----------------------------------------------------------------------------------------------------------


def test_two_drains_at_once_count_every_bundle_once(make_poll):
    poll = make_poll()
    for number in range(40):
        outbox.keep(bundles.write([vote_of(poll, f"{number}.{n}") for n in range(5)]))

    def drain(drained):
        drained.append(outbox.drain())
        connection.close()

    drained = []
    threads = [threading.Thread(target=drain, args=[drained]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(drained) == 40
    assert tallies(poll) == {"soup": 200}
    assert not OutboxBundle.objects.exists()


def test_a_bundle_that_can_not_be_counted_stays_and_holds_up_no_other(poll, caplog):
    outbox.keep(b"spoilt")
    outbox.keep(bundles.write([vote_of(poll, "alice")]))

    assert outbox.drain() == 1

    assert tallies(poll) == {"soup": 1}
    assert "stays in the outbox" in caplog.text
    assert OutboxBundle.objects.get().body.tobytes() == b"spoilt"
    OutboxBundle.objects.all().delete()


# --- PostgreSQL away --------------------------------------------------------------------------------------------------


def test_counting_goes_on_where_a_broken_connection_interrupted_it(make_poll):
    """Every connection of a counting thread is ended again and again; what it counts is exact all the same."""
    poll = make_poll()
    votes = [[vote_of(poll, f"{number}.{n}") for n in range(20)] for number in range(60)]
    counted = threading.Event()

    def count():
        for number in range(60):
            patience.until_committed(lambda number=number: count_on_a_marked_connection(votes[number]))
        counted.set()
        connection.close()

    def count_on_a_marked_connection(votes):
        with connection.cursor() as cursor:
            cursor.execute("SET application_name = 'to be ended'")
        counting.count_votes(votes)

    thread = threading.Thread(target=count)
    thread.start()
    kills = 0
    while not counted.wait(0.03):
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'to be ended'")
            kills += cursor.fetchone()[0]
    thread.join()

    assert kills > 0
    assert tallies(poll) == {"soup": 1200}
    assert_tallies_equal_votes()


def test_a_database_that_stays_away_is_said_after_the_set_time(settings):
    settings.DATABASE_PATIENCE_SECONDS = 0.3

    def fail():
        raise OperationalError

    with pytest.raises(patience.DatabaseStaysAwayError):
        patience.until_committed(fail)


def test_counting_goes_on_where_a_migration_changes_what_it_has_prepared(make_poll):
    poll = make_poll()
    counting.count_votes([vote_of(poll, "alice")])
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE polls ALTER COLUMN limit_mode TYPE text")
    try:
        patience.until_committed(lambda: counting.count_votes([vote_of(poll, "bob")]))
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE polls ALTER COLUMN limit_mode TYPE varchar(4)")
        connection.close()  # which knows it as a text

    assert tallies(poll) == {"soup": 2}


# --- By the clock -----------------------------------------------------------------------------------------------------


def test_polls_open_and_close_on_time_and_the_outbox_drains_also_with_two_beats(api, make_poll, tmp_path):
    opening, closing_soon, missed = make_poll(opens_in=3), make_poll(closes_in=3), make_poll(opens_in=-60, closes_in=-30)
    outbox.keep(bundles.write([vote_of(opening, "alice")]))
    beat = ["celery", "-A", "core", "beat", "--pidfile="]
    with (
        worker(settings.PERIODIC_QUEUE, tmp_path / "periodic.log", concurrency=1),
        process(*beat, log=tmp_path / "1.log"),
        process(*beat, log=tmp_path / "2.log"),
    ):
        wait_until(lambda: Poll.objects.get(pk=missed.pk).closed_at)  # a run that nobody made is caught up
        wait_until(lambda: tallies(opening) == {"soup": 1})
        wait_until(lambda: Poll.objects.get(pk=opening.pk).opened_at and Poll.objects.get(pk=closing_soon.pk).closed_at)
        then = Poll.objects.get(pk=opening.pk).opened_at, Poll.objects.get(pk=closing_soon.pk).closed_at
        time.sleep(4.5)  # two more runs of each beat
        assert (Poll.objects.get(pk=opening.pk).opened_at, Poll.objects.get(pk=closing_soon.pk).closed_at) == then
    assert then[0] - opening.opens_at < timedelta(seconds=5)
    assert then[1] - closing_soon.closes_at < timedelta(seconds=5)


def test_opening_and_closing_happen_once_at_the_moment_and_not_a_microsecond_before(make_poll):
    poll, tick = make_poll(opens_in=60, closes_in=120), timedelta(microseconds=1)

    for run, moment, field in [
        (closing.open_due_polls, poll.opens_at, "opened_at"),
        (closing.close_expired_polls, poll.closes_at, "closed_at"),
    ]:
        run(at=moment - tick)
        assert getattr(Poll.objects.get(pk=poll.pk), field) is None
        run(at=moment)
        run(at=moment + tick)
        assert getattr(Poll.objects.get(pk=poll.pk), field) == moment


def test_old_outcomes_are_purged_but_never_those_of_a_poll_that_may_get_votes(make_poll):
    old, running = make_poll(closes_in=-10), make_poll()
    for poll in (old, running):
        counting.count_votes([vote_of(poll, "alice", at=1), vote_of(poll, "alice", at=2)])
    closing.close_expired_polls(at=now())
    keep = timedelta(days=settings.OUTCOMES_KEEP_DAYS)

    closing.purge_outcomes(at=now() + keep - timedelta(minutes=1))
    assert VoteAside.objects.filter(poll_id=old.pk).count() == 1

    closing.purge_outcomes(at=now() + keep + timedelta(minutes=1))
    assert VoteAside.objects.filter(poll_id=old.pk).count() == 0
    assert VoteAside.objects.filter(poll_id=running.pk).count() == 1
    assert tallies(old) == {"soup": 1}
