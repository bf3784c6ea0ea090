"""`make chaos`: runs scenarios, one stage each, and prints what the oracle says."""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from chaos import controls, report, scenarios
from chaos.report import Run
from chaos.running import run
from stack.folder import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="which (default: all but the long run)")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--short", action="store_true", help="what CI runs, in under two minutes")
    parser.add_argument("--long", action="store_true", help="a million votes and 300 kills")
    parser.add_argument("--controls", action="store_true", help="break the product on purpose, once in each way: each must be found out")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at a time (default: 1)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="what chance decides (default: chance)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".local" / "chaos", help="where stages and ledgers are kept")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="print the tables of the docs from what these runs wrote")
    wanted = parser.parse_args()
    if wanted.report:
        print(report.markdown([run for path in wanted.report for run in report.read(path)]), end="")
        return 0
    known = controls.ALL if wanted.controls else scenarios.ALL
    if wanted.list:
        for each in known.values():
            print(f"{each.name:<26} {each.what}")
        return 0
    names = wanted.names or [name for name in known if name != scenarios.LONG]
    if wanted.short or wanted.long:
        names = list(scenarios.SHORT) if wanted.short else [scenarios.LONG]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no scenario {', '.join(unknown)}; --list shows all")
    if wanted.jobs < 1:
        parser.error("--jobs: at least 1")
    return run_all(names, wanted.seed, wanted.folder, wanted.jobs, is_control=wanted.controls)


def run_all(names: list[str], seed: int, folder: Path, jobs: int, *, is_control: bool) -> int:
    """Run the scenarios, `jobs` at a time; print each when it has ended, and write all to a file. Returns the exit code."""
    print(f"seed {seed}\n{report.HEAD}", flush=True)
    file = folder / f"{seed}{'-controls' if is_control else ''}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    # A process each: the proxy and the oracle of one must not wait for those of another.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run, name, seed, folder / str(seed) / name, is_control=is_control) for name in names]
        for ended in as_completed(running):
            runs.append(ended.result())
            print(report.line(runs[-1]), flush=True)
            report.write(file, sorted(runs, key=lambda each: names.index(each.name)))
    failed = sorted(run.name for run in runs if not run.is_as_it_should_be)
    print(f"{len(runs) - len(failed)} of {len(runs)} as they should be, with {runs[-1].versions}. {file}")
    if failed:
        print(f"Not: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
