"""`make bench-scale`: what a vote costs in a large table, in many polls, with more processes, after a backlog and after millions of votes.

Writes .local/bench/scale.json, which `make bench-report` shows. With all steps it takes about half an hour and 15 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from tqdm import tqdm

from bench.contestants import BATCH, BATCH_CONNECTIONS, ENV, PRODUCT_CONNECTIONS, Bench, Database, address, batches_of, measure
from bench.costs import measure_cost
from bench.processes import largest_rss_mb
from stack import product
from stack.folder import ROOT
from stack.load import Cast, cast_all, post
from stack.program import Program
from stack.stack import Stack
from stack.up import manage, seed_demo

TARGET = ROOT / ".local" / "bench" / "scale.json"
# Votes stored before new ones are measured.
STORED = (100_000, 1_000_000, 10_000_000, 50_000_000)
# Of a poll's votes, so many times as many as straight after a checkpoint, when each page that they touch goes to the WAL.
LONG = 10
# Polls that the votes of one run go to, at random.
POLLS = (1, 100, 10_000, 100_000)
# (web processes, children of the worker)
PROCESSES = ((1, 1), (1, 2), (2, 2), (2, 4))
BACKLOG = 1_000_000
MEMORY = 5_000_000

# Each of its rows as counting would have written it; in the order in which they came.
FILL = """
    INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, counted_at)
    SELECT %s, gen_random_uuid(), gen_random_uuid(), ARRAY[%s + n %% 2], at, at
    FROM (SELECT n, now() - (%s - n) * interval '1 millisecond' AS at FROM generate_series(1, %s) AS n) AS moments
"""
FILL_POLLS = """
    WITH made AS (
        INSERT INTO polls SELECT (jsonb_populate_record(p, jsonb_build_object('id', gen_random_uuid()))).*
        FROM polls p, generate_series(1, %s) WHERE p.id = %s RETURNING id
    )
    INSERT INTO options (poll_id, text, description, position)
    SELECT id, text, '', position FROM made, (VALUES ('a', 0), ('b', 1)) AS o (text, position)
"""


# --- A large table ----------------------------------------------------------------------------------------------------


def measure_stored(sizes: tuple[int, ...], votes: int, bar: tqdm[Any]) -> list[dict[str, float]]:
    """Costs of a vote with so many stored already, all in one poll: of those that come to that poll first after a checkpoint, of many
    that come to it then, and of those that come to another."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        return _measure_stored(make_bench(folder, ending, votes), sizes, votes, bar)


def _measure_stored(bench: Bench, sizes: tuple[int, ...], votes: int, bar: tqdm[Any]) -> list[dict[str, float]]:
    bench.have("web")
    large = bench.make_poll()
    rows: list[dict[str, float]] = []
    stored = 0
    for size in sizes:
        bench.have()
        fill(bench.database, large, size - stored)
        stored = size
        bench.have("web", "worker")
        row: dict[str, float] = {"stored": size}
        for name, poll, cast in (("first", large, votes), ("same", large, LONG * votes), ("other", bench.make_poll(), votes)):
            cost = measure_cost(bench.stack, bench.database, bench.dev, cast, each=BATCH, connections=BATCH_CONNECTIONS, poll=poll)
            stored += cast + cast // 10 if poll is large else 0
            row |= {f"{name}_{value}": figure for value, figure in asdict(cost).items()}
        rows.append(row)
        bar.update()
    return rows


def fill(database: Database, poll: dict[str, Any], votes: int) -> None:
    """Store so many votes of the poll more; the key of many is made at the end, which takes a tenth of the time."""
    first = int(poll["options"][0]["id"])
    database.run("SET statement_timeout = 0; SET synchronous_commit = off; SET maintenance_work_mem = '1GB'")
    if many := votes > 5_000_000:
        ((name, definition),) = database.rows(
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'p' AND conrelid = 'votes'::regclass"
        )
        database.run(f"ALTER TABLE votes DROP CONSTRAINT {name}")
    database.run(FILL, poll["id"], first, votes, votes)
    if many:
        database.run(f"ALTER TABLE votes ADD CONSTRAINT {name} {definition}")
    database.run(
        "INSERT INTO tallies (poll_id, selection, votes, counted, revision)"
        " SELECT poll_id, selection, count(*), count(*), 1 FROM votes WHERE poll_id = %s GROUP BY 1, 2"
        " ON CONFLICT (poll_id, selection) DO UPDATE SET votes = excluded.votes, counted = excluded.counted",
        poll["id"],
    )
    database.run("VACUUM ANALYZE votes")
    database.run("CHECKPOINT")
    database.run("SET synchronous_commit = on")


# --- Many polls -------------------------------------------------------------------------------------------------------


def measure_polls(bench: Bench, numbers: tuple[int, ...], votes: int, bar: tqdm[Any]) -> list[dict[str, float]]:
    """Votes a second, one a request, that go to so many polls at random."""
    bench.have("web")
    model = bench.make_poll()
    bench.database.run(FILL_POLLS, max(numbers), model["id"])
    polls = bench.database.rows(
        "SELECT o.poll_id, array_agg(o.id) FROM options o JOIN polls p ON p.id = o.poll_id WHERE p.title = 'Bench' GROUP BY 1"
    )
    chance, rows = random.Random(1), []
    for number in numbers:
        bench.have()  # with nothing known of any poll
        bench.have("web", "worker")
        chosen = chance.sample(polls, number)
        casts = [
            Cast(post(f"/api/v1/polls/{poll}/votes", {"option": str(options[0]), "voter": uuid4().hex}, headers_of(bench, n)))
            for n in range(votes + votes // 2)
            for poll, options in [chance.choice(chosen)]
        ]
        ids = [str(poll) for poll, _ in chosen]

        def count(ids: list[str] = ids) -> float:
            return bench.database.value("SELECT sum(votes) FROM tallies WHERE poll_id = ANY(%s::uuid[])", ids)

        before, warm = count(), votes // 2
        cast_all(bench.port, casts[:warm], connections=PRODUCT_CONNECTIONS)
        while count() < before + warm:
            time.sleep(0.05)
        done = measure(bench.port, casts[warm:], lambda: count() - before - warm, connections=PRODUCT_CONNECTIONS)  # noqa: B023
        rows.append({"polls": number, "counted_per_s": done["counted_per_s"], "p99_ms": done["p99_ms"]})
        bar.update()
    return rows


def headers_of(bench: Bench, number: int) -> dict[str, str]:
    return {**bench.client_key, "x-forwarded-for": address(number)}


# --- A backlog, and memory --------------------------------------------------------------------------------------------


def measure_backlog(bench: Bench, votes: int, bar: tqdm[Any]) -> dict[str, Any]:
    """So many votes are accepted while no worker runs; then one does. Memory (MB) of the worker and of RabbitMQ, now and then."""
    bench.have("web")
    poll = bench.make_poll()
    started = time.monotonic()
    cast_all(bench.port, in_batches(bench, poll, votes), connections=BATCH_CONNECTIONS, seconds=600)
    accepted_per_s = votes / (time.monotonic() - started)
    bench.have("worker")
    started, series = time.monotonic(), []
    while (counted := bench.database.tallied(poll["id"])) < votes:
        worker, broker = bench.stack.pid("worker"), bench.stack.pid("rabbitmq")
        series.append([time.monotonic() - started, counted, largest_rss_mb([worker]), largest_rss_mb([broker])])
        time.sleep(1)
    bar.update()
    seconds = time.monotonic() - started
    return {"votes": votes, "accepted_per_s": accepted_per_s, "seconds": seconds, "counted_per_s": votes / seconds, "series": series}


def measure_memory(bench: Bench, votes: int, bar: tqdm[Any]) -> list[list[float]]:
    """[[votes so far, MB of the largest web process, MB of the largest process of the worker]], for so many votes."""
    bench.have()
    bench.have("web", "worker")
    series = []
    for part in range(11):
        poll = bench.make_poll()
        if part:
            cast_all(bench.port, in_batches(bench, poll, votes // 10), connections=BATCH_CONNECTIONS, seconds=600)
            while bench.database.tallied(poll["id"]) < votes // 10:
                time.sleep(0.1)
        sizes = [largest_rss_mb([bench.stack.pid(name)]) for name in ("web", "worker")]
        series.append([part * (votes // 10), *sizes])
    bar.update()
    return series


def in_batches(bench: Bench, poll: dict[str, Any], votes: int) -> Iterator[Cast]:
    """Make them as they are needed: a million at once would be a gigabyte."""
    for _ in range(votes // BATCH):
        yield from batches_of(bench, poll, BATCH)


# --- More processes ---------------------------------------------------------------------------------------------------


def measure_processes(votes: int, numbers: tuple[tuple[int, int], ...], bar: tqdm[Any]) -> list[dict[str, float]]:
    """Votes a second with so many web processes behind one port, and so many children of one worker; each on a stack of its own."""
    rows = []
    for webs, children in numbers:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
            more = {"web": ["--workers", str(webs)] if webs > 1 else [], "worker": ["--concurrency", str(children)]}
            bench = make_bench(folder, ending, votes, more)
            bench.have("web", "worker")
            cost = measure_cost(bench.stack, bench.database, bench.dev, votes, each=1, connections=PRODUCT_CONNECTIONS)
            rows.append({"web": webs, "worker": children, **asdict(cost)})
        bar.update()
    return rows


def make_bench(folder: str, ending: ExitStack, votes: int, options: Mapping[str, list[str]] | None = None) -> Bench:
    """Start a stack; `options` are for the product's programs, by name, on top of their own."""

    def programs(env: Mapping[str, str]) -> list[Program]:
        more = options or {}
        return [replace(program, command=[*program.command, *more.get(program.name, [])]) for program in product.programs(env)]

    stack = Stack(Path(folder), programs=programs)
    stack.env.update(ENV)
    ending.callback(stack.destroy)
    ending.enter_context(stack)
    manage(stack, "setup")
    return Bench(stack, Database(stack.database_url), seed_demo(stack), votes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--votes", type=int, default=200_000, help="measured at each size of the table; a sixth of it elsewhere")
    parser.add_argument("--stored", type=int, default=STORED[-1], help="votes in the table at most")
    parser.add_argument("--only", default="stored,polls,processes,backlog,memory", help="some of these")
    given = parser.parse_args()
    known = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    wanted = given.only.split(",")
    sizes = tuple(size for size in STORED if size <= given.stored)
    steps: dict[str, tuple[int, Callable[[Bench, tqdm[Any]], Any]]] = {
        "backlog": (1, lambda bench, bar: measure_backlog(bench, BACKLOG, bar)),
        "memory": (1, lambda bench, bar: measure_memory(bench, MEMORY, bar)),
        "polls": (len(POLLS), lambda bench, bar: measure_polls(bench, POLLS, given.votes // 6, bar)),
        "processes": (len(PROCESSES), lambda _, bar: measure_processes(given.votes // 6, PROCESSES, bar)),
        "stored": (len(sizes), lambda _, bar: measure_stored(sizes, given.votes, bar)),
    }
    resource.setrlimit(resource.RLIMIT_NOFILE, 2 * resource.getrlimit(resource.RLIMIT_NOFILE)[1:])
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending, tqdm(unit=" measured") as bar:
        bar.total = sum(number for name, (number, _) in steps.items() if name in wanted)
        bench = make_bench(folder, ending, given.votes)
        for name, (_, step) in steps.items():
            if name in wanted:
                bar.set_description(name)
                known[name] = step(bench, bar)
                TARGET.write_text(json.dumps(known | {"load_average": os.getloadavg()[0]}, indent=1) + "\n")
    for name in wanted:
        print(name)
        for row in known[name] if isinstance(known[name], list) else [known[name]]:
            print("  ", row)


if __name__ == "__main__":
    main()
