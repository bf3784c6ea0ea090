"""`make bench`: contestants in turn on one private stack, several rounds; medians, ranges and ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from bench.contestants import Database, Round, measure_batches, measure_bulk_insert, measure_product, measure_task_per_vote
from stack.folder import ROOT
from stack.stack import Stack
from stack.up import manage, seed_demo

# What the product is compared with, and what of it is compared: {ratio: (ours, theirs)}.
RATIOS = {
    "one vote a request : one task per vote": ("product_single", "task_per_vote"),
    "session : ip": ("policy_session", "policy_ip"),
    "account : ip": ("policy_account", "policy_ip"),
    "code : ip": ("policy_code", "policy_ip"),
    "batches of 1,000 : bare bulk INSERT": ("product_batch", "bulk_insert"),
}


def prepare(stack: Stack) -> dict[str, str]:
    """Set up both contestants' tables and queues; return the product's users and keys."""
    manage(stack, "setup")
    env = {**stack.env, "DJANGO_SETTINGS_MODULE": "bench.task_per_vote.settings"}
    subprocess.run([sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"], cwd=ROOT, env=env, check=True)
    return seed_demo(stack)


def report(rounds: dict[str, list[Round]]) -> None:
    """Print medians with their range and the ratios, and write `.local/bench.json`."""
    names = [field.name for field in fields(Round)]
    contestants = {}
    for contestant, done in rounds.items():
        contestants[contestant] = {name: statistics.median(getattr(round_, name) for round_ in done) for name in names}
        print(f"\n{contestant}")
        for name in names:
            values = sorted(getattr(round_, name) for round_ in done)
            print(f"  {name:<16}{contestants[contestant][name]:>10,.1f}   ({values[0]:,.1f} to {values[-1]:,.1f})")
    print("\nend to end, all counted:")
    medians = {}
    for ratio, (ours, theirs) in RATIOS.items():
        if ours in rounds and theirs in rounds:
            values = sorted(one.counted_per_s / other.counted_per_s for one, other in zip(rounds[ours], rounds[theirs], strict=True))
            medians[f"{ours}/{theirs}"] = statistics.median(values)
            print(f"  {ratio:<42}{statistics.median(values):>6.2f}   ({values[0]:.2f} to {values[-1]:.2f})")
    target = ROOT / ".local" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"contestants": contestants, "ratios": medians}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--votes", type=int, default=30_000, help="of a contestant in a round; one task per vote gets a tenth, batches the triple"
    )
    parser.add_argument("--only", help="contestants, parted by commas")
    arguments = parser.parse_args()
    votes = arguments.votes
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        stack = Stack(Path(folder))
        # Every voter has an address of their own; without limits, for one client is the whole crowd.
        stack.env.update(TRUSTED_PROXIES="1", CLIENT_VOTES_PER_MINUTE="0")
        ending.callback(stack.destroy)
        ending.enter_context(stack)
        dev = prepare(stack)
        database = Database(stack.database_url)
        contestants: dict[str, Callable[[], Round]] = {
            "product_single": lambda: measure_product(stack, database, dev, votes),
            "task_per_vote": lambda: measure_task_per_vote(stack, database, votes // 10),
            "policy_ip": lambda: measure_product(stack, database, dev, votes, "ip"),
            "policy_session": lambda: measure_product(stack, database, dev, votes, "session"),
            "policy_account": lambda: measure_product(stack, database, dev, votes, "account"),
            "policy_code": lambda: measure_product(stack, database, dev, votes, "code"),
            "product_batch": lambda: measure_batches(stack, database, dev, 3 * votes),
            "bulk_insert": lambda: measure_bulk_insert(stack, database, dev, 3 * votes),
        }
        chosen = arguments.only.split(",") if arguments.only else list(contestants)
        rounds: dict[str, list[Round]] = {name: [] for name in chosen}
        for name in tqdm([name for _ in range(arguments.rounds) for name in chosen], unit=" measured"):
            rounds[name].append(contestants[name]())
    report(rounds)


if __name__ == "__main__":
    main()
