"""Nothing lost, nothing counted twice: processes and servers die under load, and an oracle of plain Python judges.

A stack of its own (PostgreSQL, RabbitMQ, web, worker, periodic, beat), because its servers are killed too.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import amqp
import psutil
import psycopg2
import pytest
from kombu import Connection

from stack.demo import ask, make_poll
from stack.load import Cast, cast_all, post
from stack.stack import Stack
from stack.up import manage, seed_demo
from tests.conftest import wait_until
from tests.test_following import followed

PROGRAMS = ("web", "worker", "periodic", "beat")


class Scene:
    """A running stack, its tables and its queues."""

    def __init__(self, stack: Stack, dev: dict[str, Any]) -> None:
        self.stack, self.dev = stack, dev
        self.port = int(stack.env["PORT"])
        self.headers = {"authorization": f"Api-Key {dev['client_key']}"}

    def make_poll(self, **fields: Any) -> dict[str, Any]:
        return make_poll(self.dev, title="Faults", options=[{"text": "soup"}, {"text": "salad"}], **fields)

    def cast(self, poll: dict[str, Any], voter: str, choice: int, key: str) -> Cast:
        body = {"option": poll["options"][choice]["id"], "voter": voter}
        return Cast(post(poll["links"]["votes"], body, {**self.headers, "idempotency-key": key}))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg2.connect(self.stack.database_url) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def depth(self, queue: str) -> int:
        """Messages that wait in the queue; those that a worker holds are not among them."""
        with Connection(self.stack.broker_url) as connection:
            return connection.default_channel.queue_declare(self.stack.env.get("QUEUE_PREFIX", "") + queue, passive=True).message_count

    def is_settled(self) -> bool:
        try:
            return self.depth("votes.even") == self.depth("votes.odd") == 0 and self.query("SELECT count(*) FROM outbox") == [(0,)]
        except (psycopg2.Error, OSError, amqp.AMQPError):
            return False


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    stack = Stack(tmp_path_factory.mktemp("faults"))
    with ExitStack() as ending:
        ending.callback(stack.destroy)
        ending.enter_context(stack)
        manage(stack, "setup")
        dev = seed_demo(stack)
        stack.start(*PROGRAMS)
        yield Scene(stack, dev)


def test_nothing_is_lost_or_doubled_while_everything_dies_in_turn(scene: Scene):
    stack = scene.stack
    first_stands, last_stands = scene.make_poll(), scene.make_poll(allow_change=True)
    enough = threading.Event()
    casts: list[tuple[dict[str, Any], str, int, Cast]] = []

    def votes() -> Iterator[Cast]:
        number = 0
        while not enough.is_set():
            number += 1
            poll = (first_stands, last_stands)[number % 2]
            # Every fifth voter votes twice, the second time for the other option.
            for choice in (0, 1) if number % 5 == 0 else (number % 3 % 2,):
                cast = scene.cast(poll, f"voter {number}", choice, f"{number}.{choice}")
                casts.append((poll, f"voter {number}", choice, cast))
                yield cast

    load = threading.Thread(target=lambda: cast_all(scene.port, votes(), connections=8, seconds=100))
    drift: list[Any] = []

    def watch_tallies() -> None:
        while not enough.wait(0.2):
            try:
                drift.extend(scene.query(_DRIFT))
            except psycopg2.Error:
                continue

    watcher = threading.Thread(target=watch_tallies)
    load.start()
    watcher.start()

    def kill_and_wait(name: str) -> None:
        stack.wait_until_back(name, stack.kill(name))

    time.sleep(1)
    worker = psutil.Process(stack.pid("worker"))
    for _ in range(8):
        wait_until(worker.children)  # on a busy machine those that were killed have no successors yet
        worker.children()[0].kill()
        time.sleep(0.3)
    for name in ("worker", "web", "beat"):
        kill_and_wait(name)
    for name in ("rabbitmq", "postgres"):
        stack.restart(name)
        time.sleep(1)
        kill_and_wait(name)
        time.sleep(1)
    stack.wait(*PROGRAMS)
    time.sleep(1)
    enough.set()
    load.join()
    watcher.join()
    wait_until(scene.is_settled, seconds=60)
    # A message that is being counted is in no queue's depth of ready ones: the last commit may be a moment away.
    accepted = {json.loads(cast.body)["id"] for *_, cast in casts if cast.status == 202}
    wait_until(
        lambda: (
            len(accepted - {row[0] for row in scene.query("SELECT vote_id::text FROM votes UNION SELECT vote_id::text FROM outcomes")}) == 0
        )
    )

    assert {cast.status for *_, cast in casts} == {202}
    assert max(seconds for *_, cast in casts for seconds in [cast.seconds, *(s for _, s in cast.unknown)]) < 4
    outcomes = scene.query(
        "SELECT vote_id::text, count(*) FROM (SELECT vote_id FROM votes UNION ALL SELECT vote_id FROM outcomes) v GROUP BY 1"
    )
    assert {count for _, count in outcomes} == {1}
    assert {vote_id for vote_id, _ in outcomes} == accepted  # none lost, none from nowhere
    assert drift == [] and scene.query(_DRIFT) == []
    assert scene.depth("votes.dead") == 0
    assert_the_right_vote_of_each_voter_stands(scene, casts, first_stands["id"])


_DRIFT = """
    SELECT * FROM (SELECT poll_id, selection, votes FROM tallies WHERE votes <> 0) t
    FULL JOIN (SELECT poll_id, selection, count(*) AS votes FROM votes GROUP BY 1, 2) v USING (poll_id, selection)
    WHERE t.votes IS DISTINCT FROM v.votes
"""


def assert_the_right_vote_of_each_voter_stands(scene: Scene, casts: list[Any], first_stands: str) -> None:
    """Where a first attempt's fate was unknown, the vote may have been accepted then already: only one may stand."""
    by_voter: dict[tuple[str, str], list[Cast]] = defaultdict(list)
    for poll, voter, _, cast in casts:
        by_voter[poll["id"], voter].append(cast)
    standing = {row[0] for row in scene.query("SELECT vote_id::text FROM votes")}
    judged = 0
    for (poll_id, _), votes in by_voter.items():
        ids = [json.loads(vote.body)["id"] for vote in votes]
        assert len(standing & set(ids)) == 1
        if not any(vote.unknown for vote in votes):
            answers = [json.loads(vote.body) for vote in votes]
            accepted = sorted((datetime.fromisoformat(answer["accepted_at"]), answer["id"]) for answer in answers)
            assert accepted[0 if poll_id == first_stands else -1][1] in standing, (poll_id == first_stands, answers)
            judged += len(votes) > 1
    assert judged > 100


def test_a_broker_that_hangs_costs_no_vote_and_no_client_more_than_four_seconds(scene: Scene):
    poll = scene.make_poll()
    broker = scene.stack.pid("rabbitmq")
    os.kill(broker, signal.SIGSTOP)
    try:
        casts = [scene.cast(poll, f"{n}", 0, f"{n}") for n in range(200)]
        cast_all(scene.port, casts, connections=20, seconds=30)
    finally:
        os.kill(broker, signal.SIGCONT)

    assert {cast.status for cast in casts} == {202}
    assert max(cast.seconds for cast in casts) < 4
    assert sorted(cast.seconds for cast in casts)[-21] < 0.5  # only those that were there when it began to hang waited for it
    wait_until(lambda: votes_in(scene, poll) == 200, seconds=30)
    wait_until(lambda: broker_takes_votes(scene, poll), seconds=5)


def test_a_broker_with_a_memory_alarm_costs_no_vote_either(scene: Scene):
    """It lets clients connect and publish, and then just stops reading."""
    poll = scene.make_poll()
    try:
        limit_the_brokers_memory(scene, "0.00001")
        casts = [scene.cast(poll, f"{n}", 0, f"{n}") for n in range(200)]
        cast_all(scene.port, casts, connections=20, seconds=30)
    finally:
        limit_the_brokers_memory(scene, "0.4")

    assert {cast.status for cast in casts} == {202}
    assert max(cast.seconds for cast in casts) < 4
    assert sorted(cast.seconds for cast in casts)[-41] < 0.5
    wait_until(lambda: broker_takes_votes(scene, poll), seconds=5)
    wait_until(lambda: votes_in(scene, poll) == 200, seconds=30)


def limit_the_brokers_memory(scene: Scene, share: str) -> None:
    node = scene.stack.programs["rabbitmq"]
    command = ["./rabbitmqctl", "-q", "set_vm_memory_high_watermark", share]
    subprocess.run(command, cwd=node.directory, env={**os.environ, **node.env}, check=True, timeout=30)


def test_without_broker_and_database_a_vote_is_refused_in_time_and_accepted_within_5_s_of_their_return(scene: Scene):
    poll = scene.make_poll()
    cast_all(scene.port, [scene.cast(poll, "warm", 0, "warm")])
    servers = [*processes_of(scene.stack, "rabbitmq"), *processes_of(scene.stack, "postgres")]
    for process in servers:
        process.suspend()
    try:
        started = time.perf_counter()
        casts = [scene.cast(poll, f"{n}", 0, f"{n}") for n in range(8)]
        with pytest.raises(TimeoutError):
            cast_all(scene.port, casts, connections=8, seconds=9)
    finally:
        for process in servers:
            process.resume()

    unknown = [answer for cast in casts for answer in cast.unknown]
    assert time.perf_counter() - started < 15
    assert len(unknown) >= 8
    assert {status for status, _ in unknown if status} == {503}
    assert max(seconds for _, seconds in unknown) < 4
    again = [scene.cast(poll, f"{n}", 0, f"{n}") for n in range(8)]
    cast_all(scene.port, again, connections=8, seconds=5)
    assert {cast.status for cast in again} == {202}
    wait_until(lambda: votes_in(scene, poll) == 9, seconds=30)


def test_who_follows_keeps_the_stream_while_the_database_is_away_and_then_learns_what_changed(scene: Scene):
    poll = scene.make_poll()
    cast_all(scene.port, [scene.cast(poll, "warm", 0, "warm")])
    wait_until(lambda: votes_in(scene, poll) == 1)
    with followed(scene.port, f"{poll['links']['results']}/stream") as stream:
        assert stream.next_results()["total_votes"] == 1
        servers = processes_of(scene.stack, "postgres")
        for process in servers:
            process.suspend()
        try:
            cast_all(scene.port, [scene.cast(poll, "alice", 0, "alice")], seconds=20)
            time.sleep(3)  # longer than a web process waits for any query
        finally:
            for process in servers:
                process.resume()

        assert stream.next_results()["total_votes"] == 2


def processes_of(stack: Stack, name: str) -> list[psutil.Process]:
    process = psutil.Process(stack.pid(name))
    return [process, *process.children(recursive=True)]


def votes_in(scene: Scene, poll: dict[str, Any]) -> int:
    try:
        return ask(f"{scene.stack.base_url}{poll['links']['results']}")["total_votes"]
    except OSError:
        return -1


def broker_takes_votes(scene: Scene, poll: dict[str, Any]) -> bool:
    """The web process says so in its log when it is back."""
    log = Path(scene.stack.folder.log("web")).read_text()
    return log.rfind("the broker takes votes") > log.rfind("the broker is away")
