"""Messages by hand: what is put on the queues of votes, or taken from them, past the product."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import amqp
import msgspec

from stack import rabbitmq

# They take turns: this one in the even minutes since 1970, that one in the odd ones.
QUEUES = ("votes.even", "votes.odd")


def queue_now() -> str:
    """Return the queue whose turn it is."""
    return QUEUES[int(time.time()) // 60 % 2]


def headers(task: str = "votes.count") -> dict[str, Any]:
    """Return the headers of a task message (Celery's protocol 2)."""
    id = str(uuid.uuid4())
    return {"lang": "py", "task": task, "id": id, "root_id": id, "parent_id": None, "group": None, "ignore_result": True}


def task_body(bundle: object) -> bytes:
    """Return the body of the message that has a bundle counted."""
    return json.dumps([[bundle], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()


def listed(votes: Iterable[list[Any]]) -> object:
    """Return a bundle as the first web processes sent it: JSON. A vote: [vote id, poll id, voter key, [option], accepted at]."""
    return list(votes)


def packed(votes: Iterable[list[Any]]) -> object:
    """Return a bundle as later ones do: MessagePack, as text."""
    binary = [[*(uuid.UUID(id).bytes for id in vote[:3]), *vote[3:]] for vote in votes]
    return base64.b64encode(msgspec.msgpack.encode(binary)).decode()


def put(broker_url: str, messages: Iterable[amqp.Message]) -> int:
    """Put the messages on the queue whose turn it is, each confirmed; return how many."""
    done = 0
    with rabbitmq.connect(broker_url, 5) as connection:
        channel = connection.channel()
        for message in messages:
            channel.basic_publish_confirm(message, routing_key=queue_now(), mandatory=True)
            done += 1
    return done


def message(body: bytes, task: str | None = "votes.count", content_type: str = "application/json", **properties: Any) -> amqp.Message:
    known = headers(task) if task else {}
    named = {"content_encoding": "utf-8", "delivery_mode": 2, "correlation_id": known.get("id", "")} | properties
    return amqp.Message(body, application_headers=known, content_type=content_type, **named)


def bundle(votes: Iterable[list[Any]], form: Callable[[Iterable[list[Any]]], object] = packed) -> amqp.Message:
    return message(task_body(form(votes)))


def rearrange(broker_url: str, order: Callable[[list[amqp.Message]], Iterable[amqp.Message]]) -> int:
    """Take all messages from the queues and put them back in this order; return how many are there now.

    None is lost on the way: each leaves only when all are back.
    """
    with rabbitmq.connect(broker_url, 5) as connection:
        channel = connection.channel()
        channel.auto_decode = False
        taken = [message for queue in QUEUES for message in iter(partial(channel.basic_get, queue), None)]
        count = put(broker_url, (copy(message) for message in order(taken)))
        for each in taken:
            channel.basic_ack(each.delivery_tag)
        return count


def copies(broker_url: str) -> list[amqp.Message]:
    """Return a copy of every message in the queues; they stay there."""
    with rabbitmq.connect(broker_url, 5) as connection:
        channel = connection.channel()
        channel.auto_decode = False
        # What was taken and not acknowledged goes back when the connection is closed.
        return [copy(message) for queue in QUEUES for message in iter(partial(channel.basic_get, queue), None)]


def copy(message: amqp.Message) -> amqp.Message:
    return amqp.Message(message.body, application_headers=message.headers, **_kept(message.properties))


def _kept(properties: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in properties.items() if name not in ("application_headers", "priority")}
