"""Dead letters: the messages in `votes.dead`, looked at and sent back. Nothing takes them from there but a confirmed replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import msgspec
from amqp.basic_message import Message
from amqp.exceptions import AMQPError, NotFound
from celery import current_app
from django.conf import settings
from kombu import Connection, Producer
from kombu.exceptions import KombuError

from polls import bundles

# Seconds; for opening the connection, for each of the broker's answers and for each confirm.
PATIENCE_SECONDS = 5
# Headers by which RabbitMQ follows a dead letter; with them a replayed message could look like one in a circle, and be dropped.
_DEATH_HEADERS = {"x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason", "x-delivery-count"}


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter as an operator may see it: no voter, no choice."""

    message_id: str
    # Why RabbitMQ moved it: "rejected" (the worker could not count all of it) or "delivery_limit" (its worker died too often).
    reason: str
    died_at: datetime | None
    size: int
    # Votes that can be read in it, and items that can't; None when the message is no bundle at all.
    votes: int | None
    unreadable: int | None


@dataclass(frozen=True)
class QueueState:
    """What a queue holds that no worker has taken, and how many workers take from it."""

    name: str
    ready: int
    consumers: int


class UnreachableError(Exception):
    """The dead letters can't be reached; the text is a sentence that says why. Nothing of theirs is lost."""


def survey() -> list[QueueState]:
    """Return the state of each queue of ours. Like all here, raises UnreachableError when the broker does not answer."""
    with _connection() as connection:
        return [_look_at(connection, name) for name in (settings.VOTES_QUEUE, settings.DEAD_LETTER_QUEUE, settings.PERIODIC_QUEUE)]


def count() -> int:
    """Return how many dead letters there are."""
    with _connection() as connection:
        return _depth(connection)


def peek(most: int = 100) -> list[DeadLetter]:
    """Return the oldest dead letters; they stay where they are."""
    with _connection() as connection:
        # Closing the channel gives back what was taken without an answer.
        return [_describe(message) for message in _take(connection, most)]


def replay(most: int | None = None) -> int:
    """Send dead letters back to the queue of votes, oldest first; return how many. At most those there are now.

    Repeatable, and safe to interrupt: a letter leaves only after the broker confirmed its copy, and counting a vote twice
    changes nothing. What still can't be counted comes back.
    """
    with _connection() as connection:
        producer = Producer(connection)
        replayed = 0
        for message in _take(connection, most if most is not None else _depth(connection)):
            known = message.properties
            headers = {name: value for name, value in (message.headers or {}).items() if name not in _DEATH_HEADERS}
            producer.publish(
                message.body,
                routing_key=settings.VOTES_QUEUE,
                content_type=known.get("content_type", "application/octet-stream"),
                content_encoding=known.get("content_encoding", "binary"),
                headers=headers,
                delivery_mode=2,
                mandatory=True,
                confirm_timeout=PATIENCE_SECONDS,
                timeout=PATIENCE_SECONDS,
                **{name: value for name, value in known.items() if name in ("correlation_id", "message_id")},
            )
            connection.default_channel.basic_ack(message.delivery_tag)
            replayed += 1
        return replayed


@contextmanager
def _connection() -> Iterator[Connection]:
    options = {"confirm_publish": True, "max_retries": 1, "interval_start": 0, "read_timeout": PATIENCE_SECONDS}
    connection = current_app.connection_for_write(connect_timeout=PATIENCE_SECONDS, transport_options=options)
    try:
        yield connection
    except (AMQPError, KombuError, OSError) as exc:
        connection.collect()  # a polite goodbye would wait for the answers of a broker that is stuck
        raise UnreachableError("The broker does not answer. It keeps the dead letters; try again.") from exc
    finally:
        connection.release()


def _depth(connection: Connection) -> int:
    return _look_at(connection, settings.DEAD_LETTER_QUEUE).ready


def _look_at(connection: Connection, name: str) -> QueueState:
    with _told_if_missing(name):
        found = connection.default_channel.queue_declare(name, passive=True)
    return QueueState(name, found.message_count, found.consumer_count)


@contextmanager
def _told_if_missing(name: str) -> Iterator[None]:
    try:
        yield
    except NotFound as exc:
        raise UnreachableError(f"The broker has no queue {name}; `manage.py setup` makes it.") from exc


def _take(connection: Connection, most: int) -> Iterator[Message]:
    channel = connection.default_channel
    channel.auto_decode = False  # the very bytes, also of a message that nobody can read
    for _ in range(most):
        with _told_if_missing(settings.DEAD_LETTER_QUEUE):
            message = channel.basic_get(settings.DEAD_LETTER_QUEUE)
        if message is None:
            return
        yield message


def _describe(message: Message) -> DeadLetter:
    death = ((message.headers or {}).get("x-death") or [{}])[0]
    votes: int | None
    unreadable: int | None
    try:
        arguments = msgspec.json.decode(message.body)[0]
        readable, unreadable = bundles.read(arguments[0])
        votes = len(readable)
    except (msgspec.DecodeError, LookupError, TypeError, UnicodeDecodeError):
        votes = unreadable = None
    return DeadLetter(
        message_id=str(message.properties.get("message_id", "")),
        reason=str(death.get("reason", "")),
        died_at=death.get("time"),
        size=len(message.body),
        votes=votes,
        unreadable=unreadable,
    )
