"""A RabbitMQ of three nodes loses one."""

import json

from chaos import messages
from chaos.scenario import scenario
from chaos.stage import Stage
from stack import rabbitmq

_NODES = ("rabbitmq", "rabbitmq2", "rabbitmq3")
_THREE = {"nodes": 3}


def _leader(stage: Stage) -> str:
    """Return the program whose node leads the queue whose turn it is."""
    queues = json.loads(stage.rabbitmqctl("list_queues", "name", "leader", "members", "--formatter", "json"))
    queue = next(row for row in queues if row["name"] == messages.queue_now())
    if len(queue["members"]) != len(_NODES):
        stage.complaints.append(f"the queue has {len(queue['members'])} members")
    return next(name for name in _NODES if rabbitmq.node_name(name) == queue["leader"])


@scenario("three nodes: the one that leads the queue is killed", stage=_THREE, crowd={"rate": 400})
def leader_killed(stage: Stage) -> None:
    for _ in range(3):
        stage.pause(2, 4)
        stage.kill(_leader(stage))
    stage.pause(6, 7)


@scenario("three nodes: the one that leads the queue hangs (SIGSTOP)", stage=_THREE, crowd={"rate": 400})
def leader_hangs(stage: Stage) -> None:
    stage.pause(2, 4)
    with stage.stopped(_leader(stage)):
        stage.pause(15, 20)
    stage.pause(8, 10)


@scenario("three nodes: the network cuts off the one that leads the queue", stage=_THREE, crowd={"rate": 400})
def leader_cut_off(stage: Stage) -> None:
    for _ in range(2):
        stage.pause(2, 4)
        alone = _leader(stage)
        others = [name for name in _NODES if name != alone]
        stage.did()
        # Each takes the other for a stranger, and no handshake succeeds, from either side.
        cut = "erlang:set_cookie({0}, {1}), erlang:disconnect_node({0})"
        _evaluate(stage, alone, ", ".join(cut.format(_atom(other), "one") for other in others))
        for other in others:
            _evaluate(stage, other, cut.format(_atom(alone), "other"))
        stage.pause(15, 20)
        if any(rabbitmq.node_name(other) in _evaluate(stage, alone, "nodes()") for other in others):
            stage.complaints.append("the node was not cut off")
        mend = "erlang:set_cookie({}, erlang:get_cookie())"
        _evaluate(stage, alone, ", ".join(mend.format(_atom(other)) for other in others))
        for other in others:
            _evaluate(stage, other, mend.format(_atom(alone)))
        stage.is_back("rabbitmq")
        stage.stack.wait(*_NODES)  # the one that was cut off had stopped taking messages, and has to join first
        stage.pause(10, 12)


def _evaluate(stage: Stage, node: str, expression: str) -> str:
    return stage.rabbitmqctl("eval", f"{expression}.", node=node)


def _atom(program: str) -> str:
    return f"'{rabbitmq.node_name(program)}'"
