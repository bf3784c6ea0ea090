"""`make chaos`: runs scenarios, one stage each, and prints what the oracle says."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chaos import controls, scenarios
from chaos.oracle import Verdict
from chaos.scenario import Scenario
from chaos.stage import Stage
from stack.folder import ROOT

# No request may take longer, whatever happens (seconds).
LONGEST_ANSWER = 4.0
# Votes are accepted again so soon after a server has come back (seconds).
LONGEST_RETURN = 5.0


@dataclass
class Outcome:
    scenario: Scenario
    injected: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    seconds: float = 0
    versions: str = ""
    complaints: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="which (default: all but the long run)")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--short", action="store_true", help="what CI runs, in under two minutes")
    parser.add_argument("--long", action="store_true", help="a million votes and 300 kills, about 15 minutes")
    parser.add_argument("--controls", action="store_true", help="break the product on purpose, once in each way: each must be found out")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="what chance decides (default: chance)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".local" / "chaos", help="where stages and ledgers are kept")
    wanted = parser.parse_args()
    known = controls.ALL if wanted.controls else scenarios.ALL
    if wanted.list:
        for each in known.values():
            print(f"{each.name:<24} {each.what}")
        return 0
    names = wanted.names or [name for name in known if name != scenarios.LONG]
    if wanted.short or wanted.long:
        names = list(scenarios.SHORT) if wanted.short else [scenarios.LONG]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no scenario {', '.join(unknown)}; --list shows all")
    print(f"seed {wanted.seed}\n{HEAD}", flush=True)
    report = wanted.folder / f"{wanted.seed}.json"
    outcomes = []
    for name in names:
        outcome = run(known[name], wanted.seed, wanted.folder / str(wanted.seed) / name, is_control=wanted.controls)
        outcomes.append(outcome)
        show(outcome, is_control=wanted.controls)
        report.write_text(json.dumps([summary(each) for each in outcomes], indent=1))
    failed = [outcome for outcome in outcomes if bool(outcome.complaints) != wanted.controls]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} as they should be, with {outcomes[-1].versions}. {report}")
    return 1 if failed else 0


def run(scenario: Scenario, seed: int, folder: Path, *, is_control: bool) -> Outcome:
    """Run the scenario on a stage of its own; what failed otherwise than it should stays in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    stage = Stage(folder, seed, scenario.edits, **scenario.stage)
    outcome = Outcome(scenario)
    try:
        with stage:
            outcome.versions = stage.versions()
            if scenario.before:
                scenario.before(stage)
            with stage.load(**scenario.crowd):
                stage.pause(0.5, 1)
                scenario.happen(stage)
                stage.pause(0.5, 1)
            stage.settle()
            if scenario.after:
                scenario.after(stage)
            outcome.verdict = stage.judge()
            outcome.complaints = complaints(scenario, stage, outcome.verdict)
    except Exception as exc:
        traceback.print_exc()
        outcome.complaints.append(f"{type(exc).__name__}: {exc}")
    outcome.injected, outcome.seconds = stage.injected, time.monotonic() - began
    if bool(outcome.complaints) == is_control:
        stage.stack.destroy()
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.scenario.name,
        "what": outcome.scenario.what,
        "faults": outcome.injected,
        "seconds": round(outcome.seconds),
        "versions": outcome.versions,
        "complaints": outcome.complaints,
        **asdict(outcome.verdict),
    }


def complaints(scenario: Scenario, stage: Stage, verdict: Verdict) -> list[str]:
    """Return all that is not as promised."""
    found = [f"{name} {count}" for name in ("lost", "doubled", "unexpected", "wrong", "drifted") if (count := getattr(verdict, name))]
    if verdict.longest_answer > LONGEST_ANSWER:
        found.append(f"an answer took {verdict.longest_answer:.1f} s")
    if verdict.longest_return > LONGEST_RETURN:
        found.append(f"votes were accepted as before only {verdict.longest_return:.1f} s after a server was back")
    if (dead := stage.depth("votes.dead")) != scenario.dead_letters:
        found.append(f"{dead} dead letters, not {scenario.dead_letters}")
    if not verdict.accepted or not stage.injected:
        found.append("nothing happened")
    return found + stage.complaints


# Heading and width of each column, as `show` fills them.
_COLUMNS = {
    "scenario": -26, "faults": 6, "attempts": 9, "202": 9, "unclear": 8, "lost": 5, "twice": 5, "wrong": 5, "drift": 5,
    "slowest": 8, "stall": 7, "back": 7, "took": 6,
}  # fmt: skip
HEAD = " ".join(heading.ljust(-width) if width < 0 else heading.rjust(width) for heading, width in _COLUMNS.items())


def show(outcome: Outcome, *, is_control: bool) -> None:
    found = outcome.verdict
    cells = [
        outcome.scenario.name, outcome.injected, f"{found.attempts:,}", f"{found.accepted:,}", f"{found.unclear:,}", found.lost,
        found.doubled + found.unexpected, found.wrong, found.drifted, f"{found.longest_answer:.2f} s", f"{found.longest_stall:.1f} s",
        f"{found.longest_return:.1f} s", f"{outcome.seconds:.0f} s",
    ]  # fmt: skip
    shown = [str(cell).ljust(-width) if width < 0 else str(cell).rjust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)]
    as_wanted = bool(outcome.complaints) == is_control
    print(" ".join(shown), "ok" if as_wanted else "FAILED", "; ".join(outcome.complaints), flush=True)
    if not as_wanted:
        for example in found.examples:
            print(f"    {example}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
