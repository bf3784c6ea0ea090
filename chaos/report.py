"""What runs found: a line on the screen each, a file, and the tables of docs/reliability.md."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chaos.oracle import Verdict


@dataclass
class Run:
    """A scenario that was run once."""

    name: str
    what: str
    seed: int
    is_control: bool = False
    is_long: bool = False
    faults: int = 0
    seconds: float = 0
    versions: str = ""
    # {program: how often it was killed}
    kills: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)
    # Whether a control made its scenario say what it should: see scenario.Scenario.
    is_found: bool = False

    @property
    def is_as_it_should_be(self) -> bool:
        """Whether nothing was found, or, where the product was broken on purpose, something by the oracle itself, or by the scenario."""
        return bool(self.verdict.faults or self.is_found) if self.is_control else not self.complaints


def write(path: Path, runs: Iterable[Run]) -> None:
    path.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def read(path: Path) -> list[Run]:
    return [Run(**{**run, "verdict": Verdict(**run["verdict"])}) for run in json.loads(path.read_text())]


# --- On the screen ----------------------------------------------------------------------------------------------------

# Heading and width of each column, as `line` fills them.
_COLUMNS = {
    "scenario": -26, "faults": 6, "attempts": 9, "202": 9, "unclear": 8, "lost": 5, "twice": 5, "wrong": 5, "drift": 5,
    "slowest": 8, "stall": 7, "back": 7, "took": 6,
}  # fmt: skip
HEAD = " ".join(heading.ljust(-width) if width < 0 else heading.rjust(width) for heading, width in _COLUMNS.items())


def line(run: Run) -> str:
    found = run.verdict
    cells = [
        run.name, run.faults, f"{found.attempts:,}", f"{found.accepted:,}", f"{found.unclear:,}", found.lost,
        found.doubled + found.unexpected, found.wrong, found.drifted, f"{found.longest_answer:.2f} s", f"{found.longest_stall:.1f} s",
        f"{found.longest_return:.1f} s", f"{run.seconds:.0f} s",
    ]  # fmt: skip
    shown = [str(cell).ljust(-width) if width < 0 else str(cell).rjust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)]
    said = " ".join(shown) + (" ok " if run.is_as_it_should_be else " FAILED ") + "; ".join(run.complaints)
    more = run.notes if run.is_as_it_should_be else run.notes + found.examples
    return "\n    ".join([said, *more])


# --- In the docs ------------------------------------------------------------------------------------------------------


def markdown(runs: Sequence[Run]) -> str:
    """Return the tables for docs/reliability.md: several runs of one scenario are one row, their counts added up."""
    parts = []
    if scenarios := [run for run in runs if not run.is_control and not run.is_long]:
        parts += [_scenarios(scenarios), _total(scenarios)]
    parts += [f"- `{run.name}` (seed {run.seed}): {note}" for run in runs for note in run.notes]
    parts += [_long(run) for run in runs if run.is_long]
    if controls := [run for run in runs if run.is_control]:
        parts.append(_controls(controls))
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def _scenarios(runs: Iterable[Run]) -> str:
    rows = [
        "| scenario: what fails | faults | `202`s | unclear | lost | twice | wrong | drift | slowest | stall | back | seed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.name].append(run)
    for name, same in sorted(by_name.items()):
        found = [run.verdict for run in same]
        failed = "; ".join(complaint for run in same for complaint in run.complaints)
        cells = [
            f"`{name}`: {same[-1].what}" + (f" **FAILED: {failed}**" if failed else ""),
            f"{sum(run.faults for run in same):,}",
            *(f"{sum(numbers):,}" for numbers in zip(*map(_counts, found), strict=True)),
            f"{max(each.longest_answer for each in found):.2f} s",
            f"{max(each.longest_stall for each in found):.1f} s",
            f"{max(each.longest_return for each in found):.1f} s",
            ", ".join(str(run.seed) for run in same),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _counts(found: Verdict) -> tuple[int, ...]:
    return found.accepted, found.unclear, found.lost, found.doubled + found.unexpected, found.wrong, found.drifted


def _total(runs: Sequence[Run]) -> str:
    accepted, unclear, *wrong = (sum(numbers) for numbers in zip(*(_counts(run.verdict) for run in runs), strict=True))
    good = sum(run.is_as_it_should_be for run in runs)
    return (
        f"{good} of {len(runs)} runs as they should be, with {runs[-1].versions}: {sum(run.faults for run in runs):,} faults, "
        f"**{accepted:,} `202`s**, {unclear:,} attempts without a definite answer; {_named(wrong)}."
    )


def _long(run: Run) -> str:
    _, unclear, *wrong = _counts(run.verdict)
    killed = ", ".join(f"{times} {name}" for name, times in sorted(run.kills.items(), key=lambda kill: -kill[1]))
    found = run.verdict
    return (
        f"The long run (seed {run.seed}, {run.versions}): {found.attempts:,} attempts, **{found.accepted:,} `202`s, "
        f"{sum(run.kills.values())} kills** ({killed}), judged after {run.seconds / 60:.0f} minutes: **{_named(wrong)}**; "
        f"{unclear:,} attempts without a definite answer, all repeated. Slowest answer {found.longest_answer:.2f} s, "
        f"longest stall {found.longest_stall:.1f} s, back {found.longest_return:.1f} s."
        + (f" **FAILED: {'; '.join(run.complaints)}**" if run.complaints else "")
    )


def _named(numbers: Iterable[int]) -> str:
    return ", ".join(f"{number:,} {name}" for number, name in zip(numbers, ("lost", "twice", "wrong", "drift"), strict=True))


def _controls(runs: Iterable[Run]) -> str:
    rows = ["| what was broken (under) | what the oracle said | seed |", "|---|---|--:|"]
    for run in runs:
        said = "; ".join(run.complaints) or "**NOTHING**"
        rows.append(f"| `{run.name}`: {run.what} | {said} | {run.seed} |")
    return "\n".join(rows)
