"""Finality: whether a vote that was accepted in time can still be uncounted, as far as anybody can know."""

from __future__ import annotations

import base64
import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.client import HTTPException
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import ProxyHandler, Request, build_opener
from uuid import UUID

import msgspec
from django.conf import settings

from polls import closing, deadletters, outbox
from polls.models import Poll, PollStatus

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 2
# How old the broker's figures can be: quorum queues tell theirs every 5 s, and its management collects them every 5 s. 5 s to spare.
FIGURES_AGE = timedelta(seconds=15)


@dataclass(frozen=True)
class Outstanding:
    """What may not be counted yet, wherever it waits."""

    # Messages of all polls in the queue of votes, those that workers hold included; None: the broker does not tell.
    bundles: int | None
    # The polls whose votes are among the dead letters, and in the outbox; None: that can't be told, so it may be any poll.
    dead: Collection[UUID] | None
    kept: Collection[UUID] | None

    def of(self, poll_id: UUID) -> str | None:
        """Return what the poll waits for before it can be final, in a sentence; None: for nothing."""
        if self.bundles is None:
            return "The broker does not tell what waits in its queue and with its workers."
        if self.bundles:
            return "Bundles of votes wait in the queue or with the workers."
        if self.dead is None:
            return "Nobody can tell whose votes are among the dead letters."
        if poll_id in self.dead:
            return "Votes of the poll are among the dead letters, to be replayed by an operator."
        if self.kept is None:
            return "Nobody can tell whose votes wait in the outbox: a bundle there can't be read."
        if poll_id in self.kept:
            return "Votes of the poll wait in the outbox."
        return None


def look() -> Outstanding:
    """Return what may not be counted yet. Takes seconds when the broker does not answer.

    In the order in which a vote moves, so that none slips by from a place not yet seen to one seen before.
    """
    bundles = count_bundles()
    dead = _polls_of_dead_letters() if bundles == 0 else None
    return Outstanding(bundles, dead, outbox.polls_waiting())


def finalise_polls(at: datetime) -> int:
    """Mark the polls as final none of whose votes can be outstanding any more; return how many. Logs why others can't, when that changes.

    A vote that was accepted in time is in the queue or the outbox FINAL_AFTER_SECONDS after the poll's end; figures that were
    taken later, and say that queue and workers hold none, speak for it.
    """
    due = closing.due_to_be_final(at - FIGURES_AGE)
    found = look() if due else None
    reasons = {poll_id: found.of(poll_id) for poll_id in due} if found else {}
    _tell({reason for reason in reasons.values() if reason})
    return closing.finalise_polls(at, [poll_id for poll_id, reason in reasons.items() if reason is None])


def why_not(poll: Poll, found: Outstanding, at: datetime) -> str | None:
    """Return why a poll that has closed is not final, in a sentence; None where it is, or has not closed."""
    if poll.status_at(at) != PollStatus.CLOSING:
        return None
    if poll.closed_at is None or poll.closes_at > closing.ended_by(at - FIGURES_AGE):
        return "Its end is not long enough ago for the broker's figures to speak of it."
    return found.of(poll.pk)


_told: set[str] = set()


def _tell(reasons: set[str]) -> None:
    """Log what polls wait for and did not when this process looked last."""
    for reason in sorted(reasons - _told):
        logger.warning("polls can't become final: %s", reason)
    _told.clear()
    _told.update(reasons)


def _polls_of_dead_letters() -> set[UUID] | None:
    try:
        return deadletters.polls_inside()
    except deadletters.UnreachableError:
        return None


# --- The broker's figures ---------------------------------------------------------------------------------------------


class _Figures(msgspec.Struct):
    messages_ready: int
    messages_unacknowledged: int
    # With those on their way to the dead letters, which stay there when `votes.dead` is missing.
    messages: int


def count_bundles() -> int | None:
    """Return how many messages the queue of votes held up to FIGURES_AGE ago, until the workers acknowledged them.

    None when nobody tells. AMQP itself knows only of those that no worker has taken, so this asks RabbitMQ's management.
    """
    virtual_host = unquote(urlsplit(settings.CELERY_BROKER_URL.split(";")[0]).path[1:]) or "/"
    path = f"queues/{quote(virtual_host, safe='')}/{quote(settings.VOTES_QUEUE, safe='')}"
    for url in settings.BROKER_API_URL.split(";"):
        try:
            figures = msgspec.json.decode(_get(f"{url.rstrip('/')}/{path}"), type=_Figures)
            return max(figures.messages, figures.messages_ready + figures.messages_unacknowledged)
        except (OSError, HTTPException, ValueError, msgspec.DecodeError) as exc:
            # The class only: the text may hold the password.
            logger.info("the broker's management gives no figures (%s)", type(exc).__name__)
    return None


def _get(url: str) -> bytes:
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)))  # noqa: S310 - the setting takes http and https only
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(unquote(login).encode()).decode()}")
    # No proxy, whatever the environment says: the broker is ours.
    with build_opener(ProxyHandler({})).open(request, timeout=PATIENCE_SECONDS) as answer:
        body: bytes = answer.read(1_000_000)
    return body
