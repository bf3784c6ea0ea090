"""Everything at once."""

import time
from contextlib import suppress

import psycopg2

from chaos.scenario import scenario
from chaos.stage import Stage

# The long run. Mostly children: nothing has to be waited for, and every moment of their work is hit.
_VOTES, _KILLS = 1_000_000, 300
# On a machine that is too slow for both it ends here, and says so.
_MOST_SECONDS = 2 * 60 * 60
_WEIGHTS = {"worker child": 60, "web": 8, "worker": 8, "beat": 4, "periodic": 4, "postgres": 5, "rabbitmq": 3}


def _kill(stage: Stage, name: str) -> None:
    if name == "worker child":
        stage.kill_child("worker")
    else:
        stage.kill(name)


@scenario("everything dies in turn, at random")
def everything_dies(stage: Stage) -> None:
    names = ["web", "worker", "beat", "periodic", "rabbitmq", "postgres", *["worker child"] * 6]
    for name in stage.dice.sample(names, len(names)):
        stage.pause(0.2, 1.2)
        _kill(stage, name)


@scenario("a million votes and 300 kills (--long)", crowd={"rate": 4000, "batching": 8})
def long_run(stage: Stage) -> None:
    began, votes = time.monotonic(), 0
    names, weights = zip(*_WEIGHTS.items(), strict=True)
    while stage.injected < _KILLS or votes < _VOTES:
        if time.monotonic() - began > _MOST_SECONDS:
            stage.complaints.append(f"only {stage.injected} kills and {votes:,} votes in {_MOST_SECONDS / 60:.0f} minutes")
            return
        stage.pause(0.2, 1.2)
        _kill(stage, *stage.dice.choices(names, weights))
        if stage.injected % 20 == 0:
            with suppress(psycopg2.Error):
                votes = stage.stored()
