"""What the clock does to polls and their outcomes."""

import logging
from datetime import datetime, timedelta

from django.conf import settings
from django.db import connection

from polls.models import Poll

logger = logging.getLogger(__name__)

_PURGED_AT_ONCE = 20_000  # rows; keeps each statement under a second


def open_due_polls(at: datetime) -> int:
    """Mark the polls whose time has come as opened; return how many. One statement: each poll once, whoever else runs it."""
    opened = Poll.objects.due(at).update(opened_at=at)
    if opened:
        logger.info("%d polls opened", opened)
    return opened


def close_expired_polls(at: datetime) -> int:
    """Mark the polls past their end as closed; return how many. The API has refused votes since `closes_at`, whenever this runs."""
    closed = Poll.objects.expired(at).update(closed_at=at)
    if closed:
        logger.info("%d polls closed", closed)
    return closed


def purge_outcomes(at: datetime) -> int:
    """Delete the outcomes of polls that closed (or were deleted) OUTCOMES_KEEP_DAYS ago; return how many.

    Never those of a poll that may still get votes: a late repeat of a vote is recognised by them.
    """
    before = at - timedelta(days=settings.OUTCOMES_KEEP_DAYS)
    purged = 0
    with connection.cursor() as cursor:
        while True:
            cursor.execute(
                """
                DELETE FROM outcomes WHERE ctid = ANY(ARRAY(
                    SELECT o.ctid FROM outcomes o LEFT JOIN polls p ON p.id = o.poll_id
                    WHERE o.decided_at < %(before)s AND (p.id IS NULL OR p.closed_at < %(before)s) LIMIT %(most)s))
                """,
                {"before": before, "most": _PURGED_AT_ONCE},
            )
            deleted: int = cursor.rowcount
            purged += deleted
            if deleted < _PURGED_AT_ONCE:
                return purged
