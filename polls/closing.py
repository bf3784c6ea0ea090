"""What the clock does to polls and their outcomes."""

import json
import logging
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection

from polls.journal import CLOCK
from polls.literals import array
from polls.models import Poll, PollStatus

logger = logging.getLogger(__name__)

_PURGED_AT_ONCE = 20_000  # rows; keeps each statement under a second

# One statement writes polls and journal, and each poll once, however many run it: who comes second finds the row locked or its moment set.
_BY_THE_CLOCK = """
    WITH due AS (
        SELECT id FROM polls WHERE published_at IS NOT NULL AND archived_at IS NULL AND {due} ORDER BY id {lock} SKIP LOCKED
    ), done AS (
        UPDATE polls SET {moment} = %(at)s FROM due WHERE polls.id = due.id RETURNING polls.id
    )
    INSERT INTO journal (poll_id, at, actor, action, reason, changes)
    SELECT id, %(at)s, %(actor)s, %(action)s, '', %(changes)s::jsonb FROM done
"""
_OPENING = _BY_THE_CLOCK.format(moment="opened_at", due="opened_at IS NULL AND opens_at <= %(at)s", lock="FOR NO KEY UPDATE")
_CLOSING = _BY_THE_CLOCK.format(moment="closed_at", due="closed_at IS NULL AND closes_at <= %(at)s", lock="FOR NO KEY UPDATE")
# The lock against counting: a poll whose votes are being counted this moment is passed over.
_FINALISING = _BY_THE_CLOCK.format(
    moment="finalised_at",
    due="finalised_at IS NULL AND closed_at IS NOT NULL AND closes_at <= %(ended_by)s AND id = ANY(%(polls)s::uuid[])",
    lock="FOR UPDATE",
)


def open_due_polls(at: datetime) -> int:
    """Mark the polls whose time has come as opened; return how many."""
    return _by_the_clock(_OPENING, "opened", PollStatus.SCHEDULED, PollStatus.OPEN, at)


def close_expired_polls(at: datetime) -> int:
    """Mark the polls past their end as closed; return how many. The API has refused votes since `closes_at`, whenever this runs."""
    return _by_the_clock(_CLOSING, "closed", PollStatus.OPEN, PollStatus.CLOSING, at)


def due_to_be_final(at: datetime) -> dict[UUID, datetime]:
    """Return the polls whose end is FINAL_AFTER_SECONDS ago, and which nobody has called final, with their ends."""
    due = Poll.objects.filter(finalised_at=None, archived_at=None, published_at__isnull=False, closed_at__isnull=False)
    return dict(due.filter(closes_at__lte=_ended_by(at)).values_list("id", "closes_at"))


def finalise_polls(at: datetime, polls: Collection[UUID]) -> int:
    """Mark those of these polls that are due as final; return how many. For who knows that all their votes are counted (finality.py)."""
    return _by_the_clock(_FINALISING, "finalised", PollStatus.CLOSING, PollStatus.FINAL, at, polls)


def _by_the_clock(statement: str, action: str, before: PollStatus, after: PollStatus, at: datetime, polls: Collection[UUID] = ()) -> int:
    changes = json.dumps({"status": [before, after]})
    values: dict[str, Any] = {
        "at": at,
        "ended_by": _ended_by(at),
        "polls": array(polls),
        "actor": CLOCK,
        "action": action,
        "changes": changes,
    }
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        done: int = cursor.rowcount
    if done:
        logger.info("%d polls %s", done, action)
    return done


def settled_at(closes_at: datetime) -> datetime:
    """Return from when on every vote of a poll with this end is in a queue or the outbox, or counted."""
    return closes_at + timedelta(seconds=settings.FINAL_AFTER_SECONDS)


def _ended_by(at: datetime) -> datetime:
    """Return when a poll must have ended to be due."""
    return at - timedelta(seconds=settings.FINAL_AFTER_SECONDS)


def purge_outcomes(at: datetime) -> int:
    """Delete the outcomes of polls that closed (or were deleted) OUTCOMES_KEEP_DAYS ago; return how many.

    Never those of a poll that may still get votes: a late repeat of a vote is recognised by them. Nor votes that a person has taken
    out, or may let in: rulings can be taken back.
    """
    before = at - timedelta(days=settings.OUTCOMES_KEEP_DAYS)
    purged = 0
    with connection.cursor() as cursor:
        while True:
            cursor.execute(
                """
                DELETE FROM outcomes WHERE ctid = ANY(ARRAY(
                    SELECT o.ctid FROM outcomes o LEFT JOIN polls p ON p.id = o.poll_id
                    WHERE o.decided_at < %(before)s AND (p.id IS NULL OR p.closed_at < %(before)s)
                      AND NOT (p.id IS NOT NULL AND (o.outcome = 'quarantined' OR o.reason = 'voided')) LIMIT %(most)s))
                """,
                {"before": before, "most": _PURGED_AT_ONCE},
            )
            deleted: int = cursor.rowcount
            purged += deleted
            if deleted < _PURGED_AT_ONCE:
                return purged
