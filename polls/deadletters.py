"""Dead letters: the messages in `votes.dead`, looked at and sent back. Nothing takes them from there but a confirmed replay."""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from amqp.basic_message import Message
from amqp.exceptions import AMQPError, NotFound
from celery import current_app
from django.conf import settings
from django.db import InterfaceError, OperationalError, transaction
from django.db import connection as database
from kombu import Connection, Producer
from kombu.exceptions import KombuError

from polls import bundles, receipts, stamps, turns
from polls.bundles import AcceptedVote
from polls.models import Poll
from polls.moments import from_microseconds
from polls.receipts import Receipt

# Seconds; for opening the connection, for each of the broker's answers and for each confirm.
PATIENCE_SECONDS = 5
# Dead letters that are read for whose votes they hold. Chosen: a second's work, every few seconds while a poll waits for them.
MOST_READ = 1000
# Dead letters among which one is looked for. Chosen: a few seconds' work.
MOST_LOOKED_THROUGH = 10_000
# What can't be read in a dead letter is told of so many items.
MOST_FAULTS = 20
# A stamp: what the queues of votes looked like until then proves nothing, for replayed letters may have come after it. A replay sets it
# ahead before it takes a letter, and again while it goes on; by longer than sending one letter takes.
REPLAYED = "dead letters were replayed"
REPLAY_AHEAD = timedelta(seconds=60)
_SAID_AGAIN_SECONDS = 10
# PostgreSQL's lock for who takes letters to look at them, and gives them back.
_LOOKING = 5_401_201
_GIVEN_BACK_SECONDS = 1
# Headers by which RabbitMQ follows a dead letter; with them a replayed message could look like one in a circle, and be dropped.
_DEATH_HEADERS = {"x-death", "x-first-death-exchange", "x-first-death-queue", "x-first-death-reason", "x-delivery-count"}


@dataclass(frozen=True)
class PollInside:
    """A poll of which a dead letter holds votes; without a title when the poll was deleted."""

    id: UUID
    title: str | None
    votes: int


@dataclass(frozen=True)
class Fault:
    """What can't be read in a dead letter, and why: types and places, never what is written there."""

    item: int | None  # from 0; None: the whole message
    why: str


@dataclass(frozen=True)
class DeadLetter:
    """A dead letter as an operator may see it: no voter, no choice, no address."""

    message_id: str
    # Why RabbitMQ moved it: "rejected" (the worker could not count all of it) or "delivery_limit" (its worker died too often).
    reason: str
    died_at: datetime | None
    size: int
    # Votes that can be read in it, and items that can't; None when the message is no bundle at all.
    votes: int | None
    unreadable: int | None
    # Of the votes that can be read, those without an outcome: a replay is for them.
    pending: int
    polls: list[PollInside]  # those with the most votes first
    faults: list[Fault]  # the first MOST_FAULTS


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
        return [_look_at(connection, name) for name in (*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE, settings.PERIODIC_QUEUE)]


def count() -> int:
    """Return how many dead letters there are."""
    with _connection() as connection:
        return _depth(connection)


def peek(most: int = 100) -> list[DeadLetter]:
    """Return the oldest dead letters; they stay where they are."""
    with _looking_alone(), _connection() as connection:
        letters = [(message, *_read(message)) for message in _borrow(connection, most)]
    polls = {vote.poll_id for _, votes, _ in letters for vote in votes}
    titles = dict(Poll.objects.filter(pk__in=polls).values_list("pk", "title"))
    return [_describe(message, votes, unreadable, titles) for message, votes, unreadable in letters]


def polls_inside(at_least: int = 0) -> set[UUID] | None:
    """Return the polls whose votes are among the dead letters; None when that can't be told.

    Because one can't be read as a whole, there are more than MOST_READ, or fewer than there must be: then somebody holds some.
    """
    with _looking_alone(), _connection() as connection:
        letters = _depth(connection)
        read = [_read(message) for message in _borrow(connection, min(letters, MOST_READ))]
    if not at_least <= letters == len(read) or any(unreadable != 0 for _, unreadable in read):
        return None
    return {vote.poll_id for votes, _ in read for vote in votes}


def replay(most: int | None = None) -> int:
    """Send dead letters back to the queues of votes, oldest first; return how many. At most those there are now.

    Repeatable, and safe to interrupt: a letter leaves only after the broker confirmed its copy, and counting a vote twice
    changes nothing. What still can't be counted comes back.
    """
    with _connection() as connection:
        replayed = 0
        for message in _take_out(connection, most if most is not None else _depth(connection)):
            _send_back(connection, message)
            replayed += 1
        return replayed


def replay_one(message_id: str) -> int:
    """Send the dead letter with this id back to the queues of votes, as `replay` does; return how many there were.

    None, when it is not among the oldest MOST_LOOKED_THROUGH, or was sent back before. Two, after a replay that broke off.
    """
    with _connection() as connection:
        replayed = 0
        for message in _take_out(connection, min(_depth(connection), MOST_LOOKED_THROUGH)):
            if message.properties.get("message_id") == message_id:
                _send_back(connection, message)
                replayed += 1
        return replayed


def _send_back(connection: Connection, message: Message) -> None:
    """Put a copy into the queue whose turn it is, and take the letter away once the broker confirmed the copy."""
    known = message.properties
    Producer(connection).publish(
        message.body,
        routing_key=turns.queue_at(time.time()),
        content_type=known.get("content_type", "application/octet-stream"),
        content_encoding=known.get("content_encoding", "binary"),
        headers={name: value for name, value in (message.headers or {}).items() if name not in _DEATH_HEADERS},
        delivery_mode=2,
        mandatory=True,
        confirm_timeout=PATIENCE_SECONDS,
        timeout=PATIENCE_SECONDS,
        **{name: value for name, value in known.items() if name in ("correlation_id", "message_id")},
    )
    connection.default_channel.basic_ack(message.delivery_tag)


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


def _take_out(connection: Connection, most: int) -> Iterator[Message]:
    """Yield letters to be sent back, REPLAYED ahead of each."""
    say_again_at = 0.0
    letters = _take(connection.default_channel, most)
    while True:
        if time.monotonic() >= say_again_at:
            try:
                with transaction.atomic(durable=True):  # committed before a letter leaves the place where finality.py looks for it
                    stamps.stamp_ahead(REPLAYED, REPLAY_AHEAD)
            except (OperationalError, InterfaceError) as exc:
                raise UnreachableError("The database does not answer, and must know of a replay first. Try again.") from exc
            say_again_at = time.monotonic() + _SAID_AGAIN_SECONDS
        if (letter := next(letters, None)) is None:
            return
        yield letter


def _borrow(connection: Connection, most: int) -> list[Message]:
    """Return letters after having given them back."""
    if not most:
        return []
    with connection.channel() as channel:  # closing it gives back what was taken without an answer
        letters = list(_take(channel, most))
    # That takes the broker a moment, in which the next look would miss them.
    give_up_at = time.monotonic() + _GIVEN_BACK_SECONDS
    while _depth(connection) < len(letters) and time.monotonic() < give_up_at:
        time.sleep(0.005)
    return letters


@contextmanager
def _looking_alone() -> Iterator[None]:
    """Let nobody else look meanwhile: what one has taken, another would not see."""
    try:
        with transaction.atomic(), database.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_LOOKING])
            yield
    except (OperationalError, InterfaceError) as exc:
        raise UnreachableError("Somebody else is looking at the dead letters, or the database does not answer. Try again.") from exc


def _take(channel: Any, most: int) -> Iterator[Message]:
    channel.auto_decode = False  # the very bytes, also of a message that nobody can read
    for _ in range(most):
        with _told_if_missing(settings.DEAD_LETTER_QUEUE):
            message = channel.basic_get(settings.DEAD_LETTER_QUEUE)
        if message is None:
            return
        yield message


def _describe(message: Message, votes: list[AcceptedVote], unreadable: int | None, titles: Mapping[UUID, str]) -> DeadLetter:
    death = ((message.headers or {}).get("x-death") or [{}])[0]
    asked = {Receipt(vote.poll_id, vote.voter_key, vote.vote_id, from_microseconds(vote.accepted_at), vote.vote_id) for vote in votes}
    inside = Counter(vote.poll_id for vote in votes)
    return DeadLetter(
        message_id=str(message.properties.get("message_id", "")),
        reason=str(death.get("reason", "")),
        died_at=death.get("time"),
        size=len(message.body),
        votes=None if unreadable is None else len(votes),
        unreadable=unreadable,
        pending=sum(found.status == "pending" for found in receipts.find_statuses(list(asked)).values()),
        polls=[PollInside(poll_id, titles.get(poll_id), number) for poll_id, number in inside.most_common()],
        faults=_faults_of(message)[:MOST_FAULTS],
    )


def _faults_of(message: Message) -> list[Fault]:
    """Return why the message, or items of it, can't be counted, as far as that can be read off it."""
    faults = []
    if (message.headers or {}).get("task") != "votes.count":
        faults.append(Fault(None, "Its header `task` is not votes.count."))
    if message.properties.get("content_type") != "application/json":
        faults.append(Fault(None, "Its content type is not application/json."))
    try:
        bundle = msgspec.json.decode(message.body)[0][0]
    except (msgspec.DecodeError, LookupError, TypeError, UnicodeDecodeError):
        return [*faults, Fault(None, "It is no JSON of a task with a bundle.")]
    try:
        items = bundle if isinstance(bundle, list) else msgspec.msgpack.decode(base64.b64decode(bundle, validate=True))
    except (msgspec.DecodeError, TypeError, ValueError):
        return [*faults, Fault(None, "Its bundle is no base64 of MessagePack.")]
    if not isinstance(items, list):
        return [*faults, Fault(None, "Its bundle is no list.")]
    for number, item in enumerate(items):
        try:
            msgspec.convert(item, AcceptedVote)
        except msgspec.ValidationError as exc:
            faults.append(Fault(number, f"{exc}."))
    return faults


def _read(message: Message) -> tuple[list[AcceptedVote], int | None]:
    """Return the votes in a message, and how many of its items are none; None when it is no bundle at all."""
    try:
        return bundles.read(msgspec.json.decode(message.body)[0][0])
    except (msgspec.DecodeError, LookupError, TypeError, UnicodeDecodeError):
        return [], None
