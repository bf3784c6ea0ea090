"""`make bench`: contestants in turn on one private stack, several rounds; medians, ranges and ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from uuid import uuid4

import psycopg2
from tqdm import tqdm

from stack.demo import make_poll
from stack.folder import ROOT, is_free
from stack.load import Cast, cast_all, post
from stack.stack import Stack
from stack.up import manage, seed_demo

CONNECTIONS = 64
PATIENCE_SECONDS = 180


@dataclass
class Round:
    """What one contestant did in one round; rates per second, times in milliseconds."""

    counted_per_s: float
    accepted_per_s: float
    p50_ms: float
    p99_ms: float
    # From acceptance to the count, 99 % of the votes; from the last answer to the last count where votes carry no times.
    lag_p99_ms: float


class Database:
    """Straight to the tables: what was really counted."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg2.connect(url)
        self.connection.autocommit = True

    def value(self, query: str, *arguments: object) -> float:
        with self.connection.cursor() as cursor:
            cursor.execute(query, arguments)
            row = cursor.fetchone()
            return float(row[0] or 0) if row else 0.0


def measure(port: int, casts: list[Cast], count: Callable[[], float], lag: Callable[[], float] | None) -> Round:
    """Cast them all, wait until they are all counted, and check that they are: a rate with a lost vote is none."""
    started = time.perf_counter()
    cast_all(port, casts, connections=CONNECTIONS, seconds=PATIENCE_SECONDS)
    accepted = time.perf_counter()
    while count() < len(casts):
        if time.perf_counter() - accepted > PATIENCE_SECONDS:
            raise SystemExit(f"{count():.0f} of {len(casts)} accepted votes were counted: the figures would mean nothing.")
        time.sleep(0.005)
    counted = time.perf_counter()
    assert all(cast.status == 202 for cast in casts)
    assert count() == len(casts)  # and not one more
    seconds = sorted(cast.seconds for cast in casts)
    return Round(
        counted_per_s=len(casts) / (counted - started),
        accepted_per_s=len(casts) / (accepted - started),
        p50_ms=seconds[len(seconds) // 2] * 1000,
        p99_ms=seconds[len(seconds) * 99 // 100] * 1000,
        lag_p99_ms=lag() if lag else (counted - accepted) * 1000,
    )


def measure_product(stack: Stack, database: Database, dev: dict[str, str], votes: int) -> Round:
    stack.start("web", "worker")
    try:
        poll = make_poll(dev, title="Bench", options=[{"text": "a"}, {"text": "b"}])
        options = [option["id"] for option in poll["options"]]
        headers = {"authorization": f"Api-Key {dev['client_key']}"}

        def casts(number: int) -> list[Cast]:
            path = poll["links"]["votes"]
            return [Cast(post(path, {"option": options[n % 2], "voter": uuid4().hex}, headers)) for n in range(number)]

        port = int(stack.env["PORT"])
        cast_all(port, casts(votes // 10), connections=CONNECTIONS)  # warm
        before = votes // 10
        time.sleep(1)
        return measure(
            port,
            casts(votes),
            count=lambda: database.value("SELECT sum(votes) FROM tallies WHERE poll_id = %s", poll["id"]) - before,
            lag=lambda: database.value(
                "SELECT 1000 * extract(epoch FROM percentile_cont(0.99) WITHIN GROUP (ORDER BY counted_at - accepted_at)) "
                "FROM votes WHERE poll_id = %s",
                poll["id"],
            ),
        )
    finally:
        stack.stop("web", "worker")


def measure_task_per_vote(stack: Stack, database: Database, votes: int) -> Round:
    port = stack.folder.port("TASK_PER_VOTE")
    gunicorn = f"gunicorn -k gthread --workers 2 --threads 32 --keep-alive 60 --bind 127.0.0.1:{port} --log-level warning"
    worker = "celery -A bench.task_per_vote.app worker -c 2 -P prefork -O fair --without-gossip --without-mingle --loglevel WARNING"
    with process(stack, *gunicorn.split(), "bench.task_per_vote.app:application"), process(stack, *worker.split()):
        while is_free(port, "127.0.0.1"):
            time.sleep(0.1)
        poll = int(time.time())
        with database.connection.cursor() as cursor:
            cursor.execute("INSERT INTO task_per_vote_choice (poll, votes) VALUES (%s, 0), (%s, 0) RETURNING id", [poll, poll])
            choices = [row[0] for row in cursor.fetchall()]

        def casts(number: int) -> list[Cast]:
            return [Cast(post(f"/polls/{poll}/votes", {"choice": choices[n % 2], "voter": uuid4().hex}, {})) for n in range(number)]

        def count() -> float:
            return database.value("SELECT sum(votes) FROM task_per_vote_choice WHERE poll = %s", poll)

        warm = casts(votes // 10)
        measure(port, warm, count, None)
        return measure(port, casts(votes), lambda: count() - len(warm), None)


@contextmanager
def process(stack: Stack, *command: str) -> Iterator[None]:
    """A process beside the stack, on its servers."""
    with (stack.folder / "log" / f"{command[0]}.log").open("ab") as log:
        env = {**stack.env, "DJANGO_SETTINGS_MODULE": "bench.task_per_vote.settings"}
        running = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            running.terminate()
            running.wait(30)


def prepare(stack: Stack) -> dict[str, str]:
    """Set up both contestants' tables and queues; return the product's users and keys."""
    manage(stack, "setup")
    env = {**stack.env, "DJANGO_SETTINGS_MODULE": "bench.task_per_vote.settings"}
    subprocess.run([sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"], cwd=ROOT, env=env, check=True)
    return seed_demo(stack)


def report(rounds: dict[str, list[Round]]) -> None:
    """Print medians with their range and the ratio, and write `.local/bench.json`."""
    names = [field.name for field in fields(Round)]
    contestants = {}
    for contestant, done in rounds.items():
        contestants[contestant] = {name: statistics.median(getattr(round_, name) for round_ in done) for name in names}
        print(f"\n{contestant}")
        for name in names:
            values = sorted(getattr(round_, name) for round_ in done)
            print(f"  {name:<16}{contestants[contestant][name]:>10,.1f}   ({values[0]:,.1f} to {values[-1]:,.1f})")
    ratios = [ours.counted_per_s / theirs.counted_per_s for ours, theirs in zip(*rounds.values(), strict=True)]
    ratio = statistics.median(ratios)
    print(f"\nend to end, all counted: {ratio:.1f} times one task per vote ({min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} rounds)")
    target = ROOT / ".local" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"contestants": contestants, "ratios": {"product_single/task_per_vote": ratio}}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--votes", type=int, default=30_000, help="of the product in a round; the peer gets a tenth")
    arguments = parser.parse_args()
    rounds: dict[str, list[Round]] = {"product_single": [], "task_per_vote": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        stack = Stack(Path(folder))
        ending.callback(stack.destroy)
        ending.enter_context(stack)
        dev = prepare(stack)
        database = Database(stack.database_url)
        for _ in tqdm(range(arguments.rounds), unit=" rounds"):
            rounds["product_single"].append(measure_product(stack, database, dev, arguments.votes))
            rounds["task_per_vote"].append(measure_task_per_vote(stack, database, arguments.votes // 10))
    report(rounds)


if __name__ == "__main__":
    main()
