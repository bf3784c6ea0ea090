"""RabbitMQ fails."""

import re
from typing import Any

from chaos import messages
from chaos.scenario import scenario
from chaos.stage import Stage


@scenario("kill -9 of the broker")
def broker_killed(stage: Stage) -> None:
    for _ in range(3):
        stage.pause(1, 3)
        stage.kill("rabbitmq")
    stage.pause(6, 7)


@scenario("the broker is restarted in good order")
def broker_restarted(stage: Stage) -> None:
    for _ in range(2):
        stage.pause(1, 3)
        with stage.away("rabbitmq"):
            pass
        stage.pause(6, 7)


@scenario("the broker is away for a minute", crowd={"rate": 400})
def broker_away(stage: Stage) -> None:
    stage.pause(1, 2)
    with stage.away("rabbitmq"):
        stage.pause(60, 61)
    stage.pause(6, 7)


@scenario("the broker hangs (SIGSTOP)")
def broker_hangs(stage: Stage) -> None:
    for _ in range(2):
        stage.pause(1, 2)
        with stage.stopped("rabbitmq"):
            stage.pause(5, 8)
        stage.pause(6, 7)


@scenario("the broker raises its memory alarm")
def memory_alarm(stage: Stage) -> None:
    for _ in range(2):
        stage.pause(1, 2)
        stage.rabbitmqctl("set_vm_memory_high_watermark", "0.00001")
        stage.did()
        stage.pause(6, 8)
        stage.rabbitmqctl("set_vm_memory_high_watermark", "0.4")
        stage.is_back("rabbitmq")
        stage.pause(6, 7)


@scenario("the queues are full while the worker is away", crowd={"rate": 500})
def queue_full(stage: Stage) -> None:
    _set_policy(stage, '{"max-length": 20}')
    stage.stack.stop("worker")
    stage.did()
    stage.pause(6, 8)
    stage.stack.start("worker")
    stage.rabbitmqctl("clear_policy", "chaos")
    stage.pause(3, 4)


def _delete_queue(stage: Stage) -> None:
    """With nothing in it: deleting a queue with votes in it is not a fault but a wish."""
    stage.stack.stop("worker")
    for queue in messages.QUEUES:
        stage.rabbitmqctl("delete_queue", queue)


@scenario("the queues were deleted", before=_delete_queue)
def queue_deleted(stage: Stage) -> None:
    stage.did()
    stage.pause(4, 5)
    stage.stack.start("worker")
    stage.pause(4, 5)


def _replay(stage: Stage) -> None:
    stage.rabbitmqctl("clear_policy", "chaos")
    dead = stage.depth("votes.dead")
    if not dead:
        stage.complaints.append("no bundle died")
    said = stage.manage("replay_dead_letters")
    if not said.startswith(f"{dead} "):
        stage.complaints.append(f"{dead} dead letters, but: {said}")
    stage.settle()


@scenario("a bundle whose worker dies goes to the dead letters at once, and is replayed", after=_replay)
def delivery_limit_reached(stage: Stage) -> None:
    _set_policy(stage, '{"delivery-limit": 0}')
    for _ in range(40):
        stage.pause(0.05, 0.3)
        stage.kill_child("worker")


def _set_policy(stage: Stage, policy: Any) -> None:
    stage.rabbitmqctl("set_policy", "chaos", f"^({'|'.join(map(re.escape, messages.QUEUES))})$", policy, "--apply-to", "queues")
