"""`make bench`: contestants and limits in turn on one private stack, several rounds; medians, ranges, ratios and their bars."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import django
from tqdm import tqdm

from bench import figures, limits
from bench.contestants import (
    CELERY,
    ENV,
    GUNICORN,
    PEERS,
    Bench,
    Database,
    measure_batches,
    measure_peer,
    measure_product_reads,
    measure_single,
)
from bench.figures import Values
from bench.followers import measure_stream
from bench.limits import Recorded
from core.__main__ import command
from stack import rabbitmq
from stack.folder import ROOT
from stack.stack import Stack
from stack.up import manage, seed_demo

TARGET = ROOT / ".local" / "bench.json"


def prepare(stack: Stack) -> dict[str, str]:
    """Set up all contestants' tables and queues; return the product's users and keys."""
    manage(stack, "setup")
    env = {**stack.env, "DJANGO_SETTINGS_MODULE": "bench.peers.settings"}
    subprocess.run([sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v", "0"], cwd=ROOT, env=env, check=True)
    return seed_demo(stack)


def measurements(bench: Bench, recorded: Recorded) -> dict[str, Callable[[], Values]]:
    """{name: what measures it}, in the order of a round: whoever is compared with another is measured close to it."""
    peers = {peer.name: partial(measure_peer, bench, peer) for peer in PEERS}
    return {
        "noop": partial(limits.measure_noop, bench, recorded),
        "product_reads": partial(measure_product_reads, bench),
        "product_single": partial(measure_single, bench, "product_single", half_rate=True),
        "noop_half_rate": partial(limits.measure_noop_at_half_rate, bench, recorded),
        "product_single_64": partial(measure_single, bench, "product_single_64", connections=64),
        "stream": partial(measure_stream, bench),
        "product_batch": partial(measure_batches, bench),
        "bulk_insert": partial(limits.measure_bulk_insert, bench),
        **peers,
        "confirmed_publish": partial(limits.measure_publish, bench, recorded),
        "single_commits": partial(limits.measure_commits, bench),
        "generator": partial(limits.measure_generator, bench, recorded),
    }


def policies(bench: Bench) -> dict[str, Callable[[], Values]]:
    """Only when they are asked for: what telling voters apart costs."""
    return {f"policy_{policy}": partial(measure_single, bench, f"policy_{policy}", policy=policy) for policy in POLICIES}


POLICIES = ("ip", "session", "account", "code")


def about(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    with rabbitmq.connect(bench.stack.broker_url, 5) as connection:
        broker = connection.server_properties["version"]
    return {
        "python": platform.python_version(),
        "postgresql": bench.database.rows("SHOW server_version")[0][0].split()[0],
        "rabbitmq": broker.decode() if isinstance(broker, bytes) else broker,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": given.rounds,
        "votes": given.votes,
        "load_average": list(os.getloadavg()),
        "single_commits_by": f"{'pgbench' if limits.find_pgbench(bench) else 'threads'}, {limits.COMMIT_CONNECTIONS} connections",
        "commands": {
            "bench": f'make bench ARGS="{" ".join(sys.argv[1:])}"' if sys.argv[1:] else "make bench",
            "settings": " ".join(f"{name}={value}" for name, value in ENV.items()),
            "web": f"python -m {' '.join(command('web') or [])}",
            "worker": f"python -m {' '.join(command('worker') or [])}",
            "peers": f"python -m {GUNICORN} bench.peers.app:application",
            "peers' worker": f"python -m {CELERY}",
        },
    }


def report(summary: dict[str, Any]) -> None:
    """Print medians with their range, then the ratios beside what is wanted."""
    for section, title in (("contestants", ""), ("limits", "limits"), ("reads", "reads"), ("stream", "stream"), ("half_rate", "half rate")):
        found = summary.get(section, {})
        for name, values in found.items() if section == "contestants" else [(title, found)]:
            if values:
                print(f"\n{name}")
                print_values(values)
    print("\nround by round:")
    for claim in summary["claims"].values():
        print(f"  {figures.in_words(claim)}")


def print_values(values: dict[str, Any]) -> None:
    for name, (least, most) in values["range"].items():
        spread = f"   ({figures.shown(least)} to {figures.shown(most)})" if least != most else ""
        print(f"  {name:<28}{figures.shown(values[name]):>12}{spread}")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that is wanted; return what bench.json says."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")  # for core's own command lines, and counting's statements
    django.setup()
    # For followers: the private stack inherits it.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        stack = Stack(Path(folder))
        stack.env.update(ENV)
        ending.callback(stack.destroy)
        ending.enter_context(stack)
        bench = Bench(stack, Database(stack.database_url), prepare(stack), given.votes)
        recorded = Recorded(bench)
        known = measurements(bench, recorded)
        chosen = given.only.split(",") if given.only else list(known)
        known |= policies(bench)
        rounds: list[Values] = [{} for _ in range(given.rounds)]
        with tqdm(total=given.rounds * len(chosen), unit=" measured") as bar:
            for values in rounds:
                for name in chosen:
                    bar.set_description(name)
                    values |= known[name]()
                    bar.update()
        return {"about": about(bench, given)} | figures.summed_up(rounds) | {"rounds": rounds, "series": bench.series}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--votes", type=int, default=30_000, help="of a contestant in a round; the peers get a tenth or a seventh of it, batches the triple"
    )
    parser.add_argument("--only", help="what to measure, parted by commas; also " + ", ".join(f"policy_{policy}" for policy in POLICIES))
    parser.add_argument("--strict", action="store_true", help="exit with 1 when something that is wanted was missed")
    return parser.parse_args(given)


def main() -> int:
    given = arguments()
    summary = run(given)
    report(summary)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(summary, indent=1) + "\n")
    missed = [claim for claim in summary["claims"].values() if not claim["met"]]
    return 1 if given.strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
