"""`make profile`: where the time of one vote goes, and of a thousand in one request, hop by hop, on an idle private stack.

What is only computed is timed in this process, by the product's own functions; what crosses to a server is timed from outside, on the
real one. Then what a vote costs each part in processor time, when there are as many as it takes (bench/costs.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
from tqdm import tqdm

from bench import limits
from bench.contestants import BATCH, ENV, Bench, Database, batches_of, casts_of
from bench.costs import measure_cost
from stack.folder import ROOT
from stack.load import Cast, cast_all
from stack.stack import Stack
from stack.up import manage, seed_demo

TARGET = ROOT / ".local" / "bench" / "hops.json"
# {hop: microseconds}
Hops = dict[str, float]


def microseconds(work: Callable[[], object], times: int) -> float:
    """Return how long it takes in the middle of so many times."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def body_of(cast: Cast) -> bytes:
    return cast.request.partition(b"\r\n\r\n")[2]


def measure_web(poll: dict[str, Any], cast: Cast, votes: int, times: int) -> tuple[Hops, list[Any]]:
    """What a web process computes for this request of so many votes; and these, as they go into a bundle."""
    from polls import accepting, bundles, intake, voters
    from polls.moments import iso_of, microseconds_now
    from polls.snapshots import PollSnapshot

    body, snapshot, authorization = body_of(cast), PollSnapshot.read(poll["id"]), "Api-Key nxs_abcdefgh_" + 43 * "x"
    assert snapshot is not None

    def decode() -> list[Any]:
        return [intake._decode(body, intake._cast_decoder)] if votes == 1 else intake._read_batch(body, "application/json")

    casts = decode()

    def judge() -> list[tuple[int, ...]]:
        selections = []
        for each in casts:
            each.check()
            accepting.check_open(snapshot, microseconds_now())
            selections.append(each.select(snapshot))
        return selections

    def identify() -> list[UUID]:
        voters.client_key_of(authorization)
        return [accepting.voter_of(snapshot, 1, each) for each in casts]  # type: ignore[misc]

    selections, keys, at = judge(), identify(), microseconds_now()

    def name() -> list[Any]:
        return [
            bundles.AcceptedVote(snapshot.vote_ids.of(key, None, selection), snapshot.id, key, selection, at)
            for key, selection in zip(keys, selections, strict=True)
        ]

    taken = name()

    def tell() -> bytes:
        shown = []
        for place, vote in enumerate(taken):
            shown.append(intake.AcceptedItem(*snapshot.show(vote), "pending", iso_of(vote.accepted_at), place))
        return msgspec.json.encode(shown)

    return {
        "decode the body": microseconds(decode, times),
        "judge: open, options, rules": microseconds(judge, times),
        "voter keys": microseconds(identify, times),
        "vote ids": microseconds(name, times),
        "receipts and the answer": microseconds(tell, times),
        "write the bundle": microseconds(lambda: bundles.write(taken), times),
    }, taken


def measure_confirm(stack: Stack, votes: list[Any], times: int) -> float:
    """From sending the bundle to a queue that nobody consumes to the broker's confirm."""
    import aiormq
    from pamqp.commands import Basic

    from polls import bundles

    async def run() -> float:
        connection = await aiormq.connect(stack.broker_url.split(";")[0])
        channel = await connection.channel(publisher_confirms=True)
        await channel.queue_declare("hops", durable=True, arguments={"x-queue-type": "quorum"})
        body, took = bundles.write(votes), []
        for _ in range(times):
            began = time.perf_counter()
            await channel.basic_publish(body, routing_key="hops", properties=Basic.Properties(delivery_mode=2), mandatory=True)
            took.append(time.perf_counter() - began)
        await channel.queue_delete("hops")
        await connection.close()
        return statistics.median(took) * 1e6

    return asyncio.run(run())


def measure_worker(votes: list[Any], times: int) -> Hops:
    """What counting does with such a bundle: read it, ask PostgreSQL, commit, and what is left for Python."""
    from django.db import connection
    from django.db.backends.base.base import BaseDatabaseWrapper

    from polls import bundles, counting

    named = {"lock_polls": "lock the polls", "insert_standing": "insert the votes", "change_tallies": "change the tallies"}
    took: dict[str, list[float]] = {hop: [] for hop in [*named.values(), "commit", "all"]}

    def note(execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        began = time.perf_counter()
        try:
            return execute(sql, params, many, context)
        finally:
            if hop := next((hop for name, hop in named.items() if f"EXECUTE {name}" in sql), None):
                took[hop].append(time.perf_counter() - began)

    commit = BaseDatabaseWrapper.commit

    def noted_commit(self: BaseDatabaseWrapper) -> None:
        began = time.perf_counter()
        commit(self)
        took["commit"].append(time.perf_counter() - began)

    BaseDatabaseWrapper.commit = noted_commit  # type: ignore[method-assign]
    try:
        with connection.execute_wrapper(note):
            for _ in range(times):
                fresh = [bundles.AcceptedVote(uuid4(), vote.poll_id, uuid4(), vote.selection, vote.accepted_at) for vote in votes]
                began = time.perf_counter()
                counting.count_votes(fresh)
                took["all"].append(time.perf_counter() - began)
    finally:
        BaseDatabaseWrapper.commit = commit  # type: ignore[method-assign]
    # The first of them were planned.
    hops = {hop: statistics.median(seconds[times // 5 :]) * 1e6 for hop, seconds in took.items()}
    text = bundles.write(votes).decode()
    in_all = hops.pop("all")
    return {
        "read the bundle": microseconds(lambda: bundles.read(text), times),
        **hops,
        "counting's own Python": max(0.0, in_all - sum(hops.values())),
    }


def measure_way(bench: Bench, poll: dict[str, Any], casts: list[Cast]) -> dict[str, float]:
    """One request after the other through the running product: how long its 202 takes, and then the count (microseconds)."""
    before = bench.database.tallied(poll["id"])
    votes_each = 1 if b'"voter"' in casts[0].request and not body_of(casts[0]).startswith(b"[") else BATCH
    for number, cast in enumerate(casts, 1):
        cast_all(bench.port, [cast], connections=1)
        while bench.database.tallied(poll["id"]) < before + number * votes_each:
            time.sleep(0.001)
    counted = bench.database.value(
        "SELECT 1e6 * extract(epoch FROM percentile_cont(0.5) WITHIN GROUP (ORDER BY counted_at - accepted_at))"
        " FROM votes WHERE poll_id = %s",
        poll["id"],
    )
    return {"answer": statistics.median(cast.seconds for cast in casts) * 1e6, "accepted_to_counted": counted}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hops", description=__doc__)
    parser.add_argument("--times", type=int, default=200, help="that a hop is measured; a tenth for a thousand votes")
    parser.add_argument("--votes", type=int, default=30_000, help="for the processor time of each part; batches get the tenfold")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending, tqdm(total=5, unit=" measured") as bar:
        stack = Stack(Path(folder))
        stack.env.update(ENV)
        ending.callback(stack.destroy)
        ending.enter_context(stack)
        manage(stack, "setup")
        bench = Bench(stack, Database(stack.database_url), seed_demo(stack), given.votes)
        # From here on this process is one of the product's, as far as its functions are concerned.
        os.environ.update(stack.env, DJANGO_SETTINGS_MODULE="core.settings")
        import django

        django.setup()
        recorded = limits.Recorded(bench)
        server = 1e6 / limits.measure_noop(bench, recorded)["limits.noop_whole_per_s"]
        bar.update()
        bench.have("web", "worker")
        columns: dict[str, Hops] = {}
        ways = {}
        for title, votes, times in (("one vote", 1, given.times), (f"{BATCH:,} votes", BATCH, max(10, given.times // 10))):
            poll = bench.make_poll()
            casts = casts_of(bench, poll, "client", times) if votes == 1 else batches_of(bench, poll, times * BATCH)
            ways[title] = measure_way(bench, poll, casts)
            web, taken = measure_web(poll, casts[0], votes, times)
            confirm = measure_confirm(stack, taken, times)
            columns[title] = {
                **({"HTTP: read and write, below ASGI": server} if votes == 1 else {}),
                **web,
                "the broker's confirm": confirm,
                **measure_worker(taken, times),
            }
            bar.update()
        costs = {}
        for title, votes, each, connections in (("one a request", given.votes, 1, 256), ("1,000 a request", 10 * given.votes, BATCH, 6)):
            costs[title] = measure_cost(stack, bench.database, bench.dev, votes, each=each, connections=connections)
            bar.update()
    report(columns, ways, {title: asdict(cost) for title, cost in costs.items()})


def report(columns: dict[str, Hops], ways: dict[str, dict[str, float]], costs: dict[str, dict[str, float]]) -> None:
    (one, alone), (many, together) = columns.items()
    print(f"\nmicroseconds{'':<26}{one:>14}{many:>14}{'each of these':>16}")
    for hop in alone:
        rest = f"{together[hop]:>14,.0f}{together[hop] / BATCH:>16,.2f}" if hop in together else ""
        print(f"  {hop:<36}{alone[hop]:>14,.1f}{rest}")
    for name, title in (("answer", "until the 202, on an idle stack"), ("accepted_to_counted", "from acceptance to the count")):
        print(f"  {title:<36}{ways[one][name]:>14,.0f}{ways[many][name]:>14,.0f}{ways[many][name] / BATCH:>16,.2f}")
    print("\nprocessor time of a vote at full rate, microseconds")
    for title, cost in costs.items():
        print(f"  {title:<20}" + "".join(f"{name.replace('_', ' '):>20} {value:,.1f}" for name, value in cost.items()))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps({"hops": columns, "ways": ways, "costs": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
