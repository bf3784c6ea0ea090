"""The database is lost, and a backup takes its place."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import amqp

from chaos import ledger, messages
from chaos.clients import Clients
from chaos.scenario import scenario
from chaos.stage import PROGRAMS, Stage
from stack.folder import ROOT

# What a make that we run in says to those that it starts.
_OF_MAKE = ("ARGS", "FROM", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")


def _make(stage: Stage, target: str, **variables: object) -> str:
    """Run `make TARGET` in a copy of the checkout, for the stage's servers; return what it prints."""
    env = {name: value for name, value in stage.stack.env.items() if name not in _OF_MAKE}
    # The virtual environment is ours, whatever its age: nothing is to be installed into it.
    command = ["make", "--old-file=.venv/.runtime", target, *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(command, cwd=stage.root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"make {target}: {done.stdout}{done.stderr}")
    return done.stdout


def _make_checkout(stage: Stage) -> None:
    """Make a checkout of the copy, as far as `make backup` and `make restore` need one."""
    shutil.copytree(ROOT / "stack", stage.root / "stack", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, stage.root)
    (stage.root / ".venv").symlink_to(ROOT / ".venv")


def _copies_of_waiting(stage: Stage) -> list[amqp.Message]:
    """Let messages wait for a while; return copies of them, which are counted after that."""
    stage.stack.stop("worker")
    stage.pause(2, 3)
    copies = messages.copies(stage.stack.broker_url)
    stage.stack.start("worker")
    return copies


def _send_again(stage: Stage) -> None:
    """Complain of votes that are missing and need not be; have the clients send all of theirs again, as they are told to."""
    may_be_missing, _ = stage.forgotten
    told = ledger.accepted(stage.ledgers())
    missing = told.keys() - stage.ids()
    if more := missing - set(may_be_missing):
        stage.complaints.append(f"{len(more)} votes are missing that the backup had or the broker held")
    if not missing:
        stage.complaints.append("no vote was lost with the database: nothing was tried")
    stage.forgotten = frozenset(missing), time.time_ns() // 1000
    with Clients(stage.crowd("again", votes=tuple(told.values()))) as clients:
        clients.cast_all()
    stage.settle()
    stage.notes.append(
        f"{len(may_be_missing):,} votes had been counted since the backup. Copies of the queues' messages brought "
        f"{len(may_be_missing - missing):,} of them back, clients who sent theirs again {len(missing):,}."
    )


@scenario(
    "the database is lost and restored from a backup made under load; messages from before and after come again",
    before=_make_checkout,
    after=_send_again,
    crowd={"rate": 400},
)
def restored(stage: Stage) -> None:
    stage.pause(2, 3)
    again = _copies_of_waiting(stage)
    began = time.monotonic()
    backup = Path(_make(stage, "backup", ARGS=f"--to {stage.folder}/backups --wait 5").splitlines()[0])
    made = time.monotonic() - began
    stage.pause(2, 3)
    again += _copies_of_waiting(stage)
    stage.pause(1, 2)
    stage.stack.stop("worker")
    stage.pause(2, 3)  # and these messages wait when it happens
    with stage.unwatched():
        began = time.monotonic()
        stage.did()
        stage.stack.stop("web", "periodic", "beat")
        counted = stage.ids()
        stage.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        said = _make(stage, "restore", FROM=backup)
        kept = stage.ids()
        stage.forgotten = frozenset(counted - kept), 0
        stage.did(messages.put(stage.stack.broker_url, stage.dice.sample(again, len(again))))
    stage.stack.start(*PROGRAMS)
    stage.is_back("the database")
    took = re.search(r"Done in ([\d.]+) s", said)
    stage.notes.append(
        f"`make backup` under load: {made:.1f} s. `make restore` of {len(kept):,} votes: {took[1] if took else '?'} s;"
        f" no vote was accepted for {time.monotonic() - began:.1f} s."
    )
    stage.pause(3, 4)
