"""Processes of the product end, in every way that there is."""

import os
import signal
import time
from contextlib import suppress

from chaos.scenario import scenario
from chaos.stage import Edit, Stage

_DIES = "import os, random\n{indent}if random.random() < 0.05:\n{indent}    os._exit(9)\n"
# What a worker says of a child that ended like that.
_DEATH = "exited with 'exitcode 9'"


@scenario("kill -9 of the web process while confirms are outstanding")
def web_killed(stage: Stage) -> None:
    for _ in range(6):
        stage.pause(0.3, 1.5)
        stage.kill("web")


@scenario("kill -9 of a worker's child, at any moment of its work")
def child_killed(stage: Stage) -> None:
    for _ in range(40):
        stage.pause(0.05, 0.4)
        stage.kill_child("worker")


@scenario(
    "a worker's child dies after its commit and before its acknowledgement",
    edits=(
        Edit(
            "tasks/votes.py",
            "patience.until_committed(lambda: counting.count_bundle(bundle))\n",
            "patience.until_committed(lambda: counting.count_bundle(bundle))\n        " + _DIES.format(indent=" " * 8),
        ),
    ),
)
def dies_after_commit(stage: Stage) -> None:
    _let_children_die(stage)


@scenario(
    "a worker's child dies with everything written and nothing committed",
    edits=(
        Edit(
            "polls/counting.py",
            "        count = _Count(cursor).run(votes)\n",
            "        count = _Count(cursor).run(votes)\n        " + _DIES.format(indent=" " * 8),
        ),
    ),
)
def dies_before_commit(stage: Stage) -> None:
    _let_children_die(stage)


def _let_children_die(stage: Stage) -> None:
    stage.pause(10, 10)
    stage.did(stage.lines("worker", _DEATH))


@scenario("kill -9 of the worker's parent")
def worker_killed(stage: Stage) -> None:
    for _ in range(6):
        stage.pause(0.2, 1.5)
        stage.kill("worker")


@scenario("kill -9 of beat and of the periodic worker")
def clock_killed(stage: Stage) -> None:
    for _ in range(3):
        for name in ("beat", "periodic"):
            stage.pause(0.1, 1)
            stage.kill(name)


@scenario("SIGSTOP of the worker for a minute: the broker gives its bundles to nobody, then to it once more")
def worker_stopped(stage: Stage) -> None:
    stage.pause(1, 2)
    with stage.stopped("worker"):
        stage.pause(60, 62)
    stage.pause(3, 4)


@scenario("SIGTERM to web and worker, SIGKILL two seconds later")
def terminated_then_killed(stage: Stage) -> None:
    for name in ("worker", "web", "worker", "web"):
        stage.pause(0.5, 1.5)
        stage.did()
        pid = stage.stack.kill(name, signal.SIGTERM)
        time.sleep(2)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        stage.stack.wait_until_back(name, pid)


@scenario("SIGQUIT to web, worker, periodic and beat: they leave at once")
def quit_at_once(stage: Stage) -> None:
    for name in ("worker", "web", "periodic", "worker", "web", "beat"):
        stage.pause(0.5, 1.5)
        stage.kill(name, signal.SIGQUIT)
