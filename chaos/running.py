"""One scenario, from an empty folder to its verdict."""

from __future__ import annotations

import shutil
import time
import traceback
from pathlib import Path

from chaos import controls, scenarios
from chaos.oracle import Verdict
from chaos.report import Run
from chaos.scenario import Scenario
from chaos.stage import Stage

# No request may take longer, whatever happens (seconds).
LONGEST_ANSWER = 4.0
# Votes are accepted again so soon after a server has come back (seconds).
LONGEST_RETURN = 5.0


def run(name: str, seed: int, folder: Path, *, is_control: bool) -> Run:
    """Run the scenario on a stage of its own; what failed otherwise than it should stays in the folder."""
    scenario = (controls.ALL if is_control else scenarios.ALL)[name]
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    stage = scenario.on(folder, seed, scenario.edits, **scenario.stage)
    done = Run(name, scenario.what, seed, is_control, is_long=name == scenarios.LONG)
    try:
        with stage:
            done.versions = stage.versions()
            if scenario.before:
                scenario.before(stage)
            with stage.load(**scenario.crowd):
                stage.pause(0.5, 1)
                scenario.happen(stage)
                stage.pause(0.5, 1)
            stage.settle()
            if scenario.after:
                scenario.after(stage)
            done.verdict = stage.judge()
            done.complaints = complaints(scenario, stage, done.verdict)
            done.is_found = bool(scenario.finds) and any(scenario.finds in complaint for complaint in stage.complaints)
    except Exception as exc:
        traceback.print_exc()
        done.complaints.append(f"{type(exc).__name__}: {exc}")
    done.faults, done.kills, done.notes, done.seconds = stage.injected, dict(stage.kills), stage.notes, time.monotonic() - began
    if done.is_as_it_should_be:
        stage.stack.destroy()
        shutil.rmtree(folder, ignore_errors=True)
    return done


def complaints(scenario: Scenario, stage: Stage, verdict: Verdict) -> list[str]:
    """Return all that is not as promised."""
    found = [f"{name} {count}" for name in ("lost", "doubled", "unexpected", "wrong", "drifted") if (count := getattr(verdict, name))]
    if verdict.longest_answer > LONGEST_ANSWER:
        found.append(f"an answer took {verdict.longest_answer:.1f} s")
    if verdict.longest_return > LONGEST_RETURN:
        found.append(f"votes were accepted as before only {verdict.longest_return:.1f} s after a server was back")
    if (dead := stage.depth("votes.dead")) != scenario.dead_letters:
        found.append(f"{dead} dead letters, not {scenario.dead_letters}")
    # Clients send what the API takes: whatever fails, it may only have no answer for a while, or a poll that ended.
    found += [f"{votes} votes were refused: {problem}" for problem, votes in verdict.refused.items() if problem != "/problems/poll-closed"]
    if not verdict.accepted or not stage.injected:
        found.append("nothing happened")
    return found + stage.complaints
