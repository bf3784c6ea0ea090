"""What one vote costs each part: `make bench-costs`. docs/scaling.md reckons with these figures.

Processor time is read from /proc (Linux) before and after, so it hardly depends on what else the machine does; rates do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiormq
import psycopg2
from pamqp.commands import Basic
from tqdm import tqdm

from bench.contestants import BATCH, ENV, Database, address, measure
from bench.processes import processor_seconds
from stack import rabbitmq
from stack.demo import make_poll
from stack.folder import ROOT
from stack.load import Cast, cast_all, post
from stack.stack import Stack
from stack.up import manage, seed_demo

PARTS = ("web", "worker", "rabbitmq", "postgres")
QUEUES = ("votes.even", "votes.odd")
# How long bundles are published to a queue that nobody consumes (seconds), and how many at once.
QUEUE_SECONDS, QUEUE_AT_ONCE = 5, 32


# As polls/counting.py changes one.
CHANGE_TALLY = """
    INSERT INTO tallies (poll_id, selection, votes, counted, revision) VALUES (%s, ARRAY[%s], 1, 1, 1)
    ON CONFLICT (poll_id, selection) DO UPDATE SET votes = tallies.votes + excluded.votes,
        counted = tallies.counted + excluded.counted, revision = tallies.revision + 1
"""


@dataclass
class Cost:
    """Of one vote; times are of a processor, in microseconds."""

    votes_per_bundle: float
    web_us: float
    worker_us: float
    rabbitmq_us: float
    postgres_us: float
    wal_bytes: float
    counted_per_s: float


def measure_cost(
    stack: Stack, database: Database, dev: dict[str, str], votes: int, *, each: int, connections: int, poll: dict[str, Any] | None = None
) -> Cost:
    """Have so many votes cast, `each` in a request, and counted; in a poll of their own, if not in this one."""
    poll = poll or make_poll(dev, title="Bench", options=[{"text": "a"}, {"text": "b"}])
    options = [option["id"] for option in poll["options"]]
    headers = {"authorization": f"Api-Key {dev['client_key']}", "x-forwarded-for": address(0)}

    def casts(number: int) -> Iterator[Cast]:
        if each == 1:
            yield from (
                Cast(post(poll["links"]["votes"], {"option": options[n % 2], "voter": uuid4().hex}, headers)) for n in range(number)
            )
            return
        for start in range(0, number, each):
            rows = [{"option": options[n % 2], "voter": uuid4().hex, "idempotency_key": str(n)} for n in range(start, start + each)]
            yield Cast(post(f"{poll['links']['votes']}/batch", rows, headers))

    def looked() -> list[float]:
        pids = stack.pids()
        return [sum(processor_seconds(pid) for name, pid in pids.items() if name.rstrip("23456789") == part) for part in PARTS]

    port, warm, stored = int(stack.env["PORT"]), max(each, votes // 10 // each * each), database.tallied(poll["id"])
    cast_all(port, casts(warm), connections=connections)
    while database.tallied(poll["id"]) < stored + warm:
        time.sleep(0.05)
    ready = list(casts(votes))
    before, wal, bundles = looked(), _wal(database), _bundles(database, poll["id"])
    done = measure(port, ready, lambda: database.tallied(poll["id"]) - stored - warm, votes=votes, connections=connections)
    web, worker, broker, postgres = ((now - then) * 1e6 / votes for now, then in zip(looked(), before, strict=True))
    written = (_wal(database) - wal) / votes
    each_bundle = votes / (_bundles(database, poll["id"]) - bundles)
    return Cost(each_bundle, web, worker, broker, postgres, written, done["counted_per_s"])


def _wal(database: Database) -> float:
    return database.value("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")


def _bundles(database: Database, poll_id: str) -> float:
    """Each bundle changes the tally of each option that it has votes for, once."""
    return database.value("SELECT max(revision) FROM tallies WHERE poll_id = %s", poll_id)


def measure_size(database: Database) -> dict[str, float]:
    """Return bytes per row of the votes that are stored now: of the table itself and of each index."""
    rows = database.value("SELECT count(*) FROM votes")
    sizes = {"rows": rows, "votes": database.value("SELECT pg_relation_size('votes')") / rows}
    with database.connection.cursor() as cursor:
        cursor.execute("SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) FROM pg_index WHERE indrelid = 'votes'::regclass")
        sizes |= {name: size / rows for name, size in cursor.fetchall()}
    return sizes | {"all": database.value("SELECT pg_total_relation_size('votes')") / rows}


def measure_bundles(stack: Stack, dev: dict[str, str]) -> dict[int, float]:
    """Return {votes in a bundle: bytes of its message's body}, as the queue has them."""
    stack.stop("worker")
    poll = make_poll(dev, title="Bench", options=[{"text": "a"}, {"text": "b"}])
    headers = {"authorization": f"Api-Key {dev['client_key']}"}
    sizes: dict[int, float] = {}
    for votes in (1, 10, 100, BATCH):
        rows = [{"option": poll["options"][n % 2]["id"], "voter": uuid4().hex} for n in range(votes)]
        cast_all(int(stack.env["PORT"]), [Cast(post(f"{poll['links']['votes']}/batch", rows, headers))], connections=1)
        with rabbitmq.connect(stack.broker_url, 5) as connection:
            channel = connection.channel()
            taken = [message for queue in QUEUES if (message := channel.basic_get(queue))]
            sizes[votes] = sum(len(message.body) for message in taken)
            for message in taken:
                channel.basic_ack(message.delivery_tag)
    stack.start("worker")
    return sizes


def measure_queue(stack: Stack, bytes_: int) -> float:
    """Return how many bundles of this size a second one quorum queue confirms; nobody consumes it."""

    async def run() -> float:
        connection = await aiormq.connect(stack.broker_url.split(";")[0])
        channel = await connection.channel(publisher_confirms=True)
        await channel.queue_declare("costs", durable=True, arguments={"x-queue-type": "quorum"})
        body, confirmed, over_at = os.urandom(bytes_), 0, time.monotonic() + QUEUE_SECONDS

        async def publish() -> None:
            nonlocal confirmed
            while time.monotonic() < over_at:
                await channel.basic_publish(body, routing_key="costs", properties=Basic.Properties(delivery_mode=2), mandatory=True)
                confirmed += 1

        await asyncio.gather(*(publish() for _ in range(QUEUE_AT_ONCE)))
        await channel.queue_delete("costs")
        await connection.close()
        return confirmed / QUEUE_SECONDS

    return asyncio.run(run())


def measure_hot_row(stack: Stack, dev: dict[str, str], *, rows: int, workers: int = 4) -> float:
    """Return how many transactions a second change one of so many tallies and commit: whoever counts in one poll waits for its rows."""
    poll = make_poll(dev, title="Bench", options=[{"text": str(n)} for n in range(max(rows, 2))])
    options = [int(option["id"]) for option in poll["options"]][:rows]

    def change(worker: int) -> int:
        done, over_at = 0, time.monotonic() + QUEUE_SECONDS
        with closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
            while time.monotonic() < over_at:
                cursor.execute(CHANGE_TALLY, [poll["id"], options[worker % rows]])
                connection.commit()
                done += 1
        return done

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(change, range(workers))) / QUEUE_SECONDS


def have_commits_wait(database: Database) -> None:
    """Have every commit wait until the standby has it on disk, too."""
    with database.connection.cursor() as cursor:
        cursor.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        cursor.execute("SELECT pg_reload_conf()")
    while not database.value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"):
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=__doc__)
    parser.add_argument("--votes", type=int, default=30_000, help="with one vote a request; batches get the tenfold")
    parser.add_argument("--rows", type=int, default=1_000_000, help="votes in the table when its size is measured")
    parser.add_argument("--nodes", type=int, default=1, help="of RabbitMQ; their work is then added up")
    parser.add_argument("--standby", action="store_true", help="with a standby that every commit waits for")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        stack = Stack(Path(folder), broker_nodes=given.nodes, standby=given.standby)
        stack.env.update(ENV)
        ending.callback(stack.destroy)
        ending.enter_context(stack)
        manage(stack, "setup")
        dev = seed_demo(stack)
        database = Database(stack.database_url)
        if given.standby:
            have_commits_wait(database)
        stack.start("web", "worker")
        steps: dict[str, Callable[[], Cost]] = {
            "one a request, 64 connections": lambda: measure_cost(stack, database, dev, given.votes, each=1, connections=64),
            "one a request, 512 connections": lambda: measure_cost(stack, database, dev, given.votes, each=1, connections=512),
            "100 a request": lambda: measure_cost(stack, database, dev, 10 * given.votes, each=100, connections=8),
            "1,000 a request": lambda: measure_cost(stack, database, dev, 10 * given.votes, each=BATCH, connections=6),
        }
        costs = {name: step() for name, step in tqdm(steps.items(), unit=" measured")}
        bundles = measure_bundles(stack, dev)
        queue = {size: measure_queue(stack, int(size)) for size in bundles.values()}
        hot = {rows: measure_hot_row(stack, dev, rows=rows) for rows in (1, 4)}
        if (missing := given.rows - int(database.value("SELECT count(*) FROM votes"))) > 0:
            measure_cost(stack, database, dev, missing // BATCH * BATCH, each=BATCH, connections=6)
        sizes = measure_size(database)
    report(costs, bundles, queue, hot, sizes)


def report(
    costs: dict[str, Cost], bundles: dict[int, float], queue: dict[float, float], hot: dict[int, float], sizes: dict[str, float]
) -> None:
    names = list(Cost.__dataclass_fields__)
    print("\nmicroseconds of a processor for each vote, and the bytes of WAL\n" + " " * 32 + "".join(f"{name:>18}" for name in names))
    for step, cost in costs.items():
        print(f"{step:<32}" + "".join(f"{value:>18,.1f}" for value in asdict(cost).values()))
    print("\nvotes in a bundle: bytes in the queue; how many such bundles a second one queue confirms")
    for votes, size in bundles.items():
        print(f"{votes:>8,}: {size:>10,.0f} bytes   {queue[size]:>10,.0f} a second")
    print("\ntransactions a second of four workers that change tallies: all the same row, and each its own")
    print(f"{hot[1]:>10,.0f} {hot[4]:>10,.0f}")
    print(f"\nbytes per vote in a table of {sizes['rows']:,.0f}")
    for name, size in sizes.items():
        if name != "rows":
            print(f"  {name:<44}{size:>8,.1f}")
    print(f"load average {os.getloadavg()[0]:.1f} at the end, {os.cpu_count()} processors")
    target = ROOT / ".local" / "costs.json"
    target.parent.mkdir(exist_ok=True)
    shown = {"costs": {name: asdict(cost) for name, cost in costs.items()}, "bundles": bundles, "queue": queue, "hot": hot, "sizes": sizes}
    target.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
