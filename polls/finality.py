"""Finality: whether a vote that was accepted in time can still be uncounted, as far as anybody can know."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.client import HTTPException
from threading import Thread
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import ProxyHandler, Request, build_opener
from uuid import UUID

import msgspec
from django.conf import settings
from django.db import connections

from polls import closing, deadletters, jobs, outbox, stamps
from polls.models import Poll, PollStatus

logger = logging.getLogger(__name__)

# How long a look takes at most, broker and network stuck included; and the broker's figures, of all its nodes together.
LOOK_SECONDS = 3.5
PATIENCE_SECONDS = 2
# How old the broker's figures can be: quorum queues tell theirs every 5 s, and its management collects them every 5 s. 5 s to spare.
FIGURES_AGE = timedelta(seconds=15)
# What polls wait for is a matter for the log when they wait for longer. Chosen: two turns, and a minute.
PATIENCE_WITH_POLLS = timedelta(minutes=3)
# The job that makes polls final runs every 5 s. When it has not for so long, that is what a poll waits for.
PATIENCE_WITH_JOB = timedelta(minutes=1)
_JOB = "polls.finalise"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Outstanding:
    """What may not be counted yet, wherever it waits."""

    # Messages of all polls in the queues of votes, those that workers hold included; None: the broker does not tell.
    bundles: int | None
    # {queue of votes: a moment at which it was empty, the latest that is known}; without those that never were
    emptied: Mapping[str, datetime]
    # Until when dead letters may have been put back into a queue; None: there was no replay.
    replayed: datetime | None
    # The polls whose votes are among the dead letters, and in the outbox; None: that can't be told, so it may be any poll.
    dead: Collection[UUID] | None
    kept: Collection[UUID] | None
    # When the job that makes polls final last succeeded; None: never.
    job_ran_at: datetime | None

    def of(self, poll_id: UUID, closes_at: datetime) -> str | None:
        """Return what the poll waits for before it can be final, in a sentence; None: for nothing."""
        settled_at = closing.settled_at(closes_at)
        for queue in settings.VOTES_QUEUES:
            emptied = self.emptied.get(queue)
            if emptied is not None and emptied >= settled_at:
                if self.replayed is None or emptied > self.replayed:
                    continue
                return f"{queue} has not been seen empty since dead letters were replayed."
            if self.bundles is None:
                return "The broker does not tell what waits in its queues and with its workers."
            return f"{queue} has not been seen empty since the poll's end."
        if self.dead is None:
            return "Nobody can tell whose votes are among the dead letters."
        if poll_id in self.dead:
            return "Votes of the poll are among the dead letters, to be replayed by an operator."
        if self.kept is None:
            return "Nobody can tell whose votes wait in the outbox: a bundle there can't be read."
        if poll_id in self.kept:
            return "Votes of the poll wait in the outbox."
        return None


def look(at: datetime) -> Outstanding:
    """Return what may not be counted yet. Asks the broker, for LOOK_SECONDS at most.

    In the order in which a vote moves, so that none slips by from a place not yet seen to one seen before; and asks last whether dead
    letters have left theirs. What is seen was so FIGURES_AGE before `at`, or before PostgreSQL's now if `at` is later: a clock that is
    ahead proves nothing.
    """
    seen_at = min(at, stamps.clock()) - FIGURES_AGE
    give_up_at = time.monotonic() + LOOK_SECONDS
    figures = _within(PATIENCE_SECONDS, _ask_management) or {}
    held = {queue: figures[queue].held for queue in settings.VOTES_QUEUES if queue in figures}
    letters = figures.get(settings.DEAD_LETTER_QUEUE)
    dead = _within(give_up_at - time.monotonic(), lambda: _polls_of_dead_letters(letters.held)) if letters else None
    known = stamps.read([*map(_emptied, settings.VOTES_QUEUES)])
    emptied = {queue: known[_emptied(queue)] for queue in settings.VOTES_QUEUES if _emptied(queue) in known}
    for queue in held:
        if not held[queue]:
            emptied[queue] = max(seen_at, emptied.get(queue, seen_at))
    return Outstanding(
        bundles=sum(held.values()) if held else None,
        emptied=emptied,
        replayed=stamps.read_ahead(deadletters.REPLAYED, deadletters.REPLAY_AHEAD),
        dead=dead,
        kept=outbox.polls_waiting(),
        job_ran_at=jobs.successes().get(_JOB),
    )


def finalise_polls(at: datetime) -> int:
    """Mark the polls as final none of whose votes can be outstanding any more; return how many. Logs why others can't, when that changes.

    A vote that was accepted in time is in a queue or the outbox FINAL_AFTER_SECONDS after the poll's end. Each queue was empty at some
    moment after that, not all at the same: each rests every other minute (turns.py). What is seen is remembered for later runs.
    """
    stamps.forget_future([*map(_emptied, settings.VOTES_QUEUES)])
    due = closing.due_to_be_final(at - FIGURES_AGE)
    if not due:
        _tell(set())
        return 0
    found = look(at)
    for queue, emptied in found.emptied.items():
        stamps.stamp(_emptied(queue), emptied)
    reasons = {poll_id: found.of(poll_id, closes_at) for poll_id, closes_at in due.items()}
    _tell({reason for poll_id, reason in reasons.items() if reason and closing.settled_at(due[poll_id]) <= at - PATIENCE_WITH_POLLS})
    return closing.finalise_polls(at, [poll_id for poll_id, reason in reasons.items() if reason is None])


def why_not(poll: Poll, found: Outstanding, at: datetime) -> str | None:
    """Return why a poll that has closed is not final, in a sentence; None where it is, or has not closed."""
    if poll.status_at(at) != PollStatus.CLOSING:
        return None
    due_at = closing.settled_at(poll.closes_at) + FIGURES_AGE
    if due_at > at:
        return "Its end is not long enough ago for the broker's figures to speak of it."
    if poll.closed_at is None:
        return "The clock's job that closes polls has not run since its end: does beat run, and the worker of the clock's jobs?"
    outstanding = found.of(poll.pk, poll.closes_at)
    if outstanding is None and found.job_ran_at is not None and at - found.job_ran_at > PATIENCE_WITH_JOB:
        return "Nothing: the clock's job that makes polls final has not run lately. Does beat run, and the worker of the clock's jobs?"
    return outstanding


def _emptied(queue: str) -> str:
    """Return by which name it is stamped when the queue was empty."""
    return f"{queue} was empty"


def _within(seconds: float, ask: Callable[[], _T]) -> _T | None:
    """Return what `ask` returns; None after so many seconds. Then it ends by itself, whenever the network lets it."""
    answers: list[_T] = []

    def answer() -> None:
        try:
            answers.append(ask())
        finally:
            connections.close_all()  # this thread's

    thread = Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


_told: set[str] = set()


def _tell(reasons: set[str]) -> None:
    """Log what polls wait for and did not when this process looked last."""
    for reason in sorted(reasons - _told):
        logger.warning("polls can't become final: %s", reason)
    _told.clear()
    _told.update(reasons)


def _polls_of_dead_letters(at_least: int) -> set[UUID] | None:
    try:
        return deadletters.polls_inside(at_least)
    except deadletters.UnreachableError:
        return None


# --- The broker's figures ---------------------------------------------------------------------------------------------


class _Figures(msgspec.Struct):
    messages_ready: int
    messages_unacknowledged: int
    # With those on their way to the dead letters, which stay there when `votes.dead` is missing.
    messages: int

    @property
    def held(self) -> int:
        return max(self.messages, self.messages_ready + self.messages_unacknowledged)


def count_bundles() -> int | None:
    """Return how many messages the queues of votes held up to FIGURES_AGE ago, until the workers acknowledged them; None: nobody tells."""
    figures = _within(PATIENCE_SECONDS, _ask_management)
    return sum(figures[queue].held for queue in settings.VOTES_QUEUES) if figures else None


def _ask_management() -> dict[str, _Figures]:
    """Return what RabbitMQ's management says of each queue of votes and of the dead letters; nothing when no node does.

    AMQP itself knows only of messages that nobody has taken.
    """
    virtual_host = unquote(urlsplit(settings.CELERY_BROKER_URL.split(";")[0]).path[1:]) or "/"
    queues = [*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE]
    nodes = settings.BROKER_API_URL.split(";")
    for node in nodes:
        place = f"{node.rstrip('/')}/queues/{quote(virtual_host, safe='')}"
        try:
            answers = [_get(f"{place}/{quote(queue, safe='')}", PATIENCE_SECONDS / len(nodes)) for queue in queues]
            return dict(zip(queues, [msgspec.json.decode(answer, type=_Figures) for answer in answers], strict=True))
        except (OSError, HTTPException, ValueError, msgspec.DecodeError) as exc:
            # The class only: the text may hold the password.
            logger.info("the broker's management gives no figures (%s)", type(exc).__name__)
    return {}


def _get(url: str, seconds: float) -> bytes:
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)))  # noqa: S310 - the setting takes http and https only
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(unquote(login).encode()).decode()}")
    # No proxy, whatever the environment says: the broker is ours.
    with build_opener(ProxyHandler({})).open(request, timeout=seconds) as answer:
        body: bytes = answer.read(1_000_000)
    return body
