"""Results: a poll's tallies as the API shows them."""

from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import connection

from polls.models import status
from polls.moments import iso

# One statement, so one moment: the total always equals the sum of the options.
_RESULTS = """
    SELECT p.opens_at, p.closes_at, o.id, o.text, o.position, coalesce(t.votes, 0), coalesce(t.revision, 0)
    FROM polls p JOIN options o ON o.poll_id = p.id LEFT JOIN tallies t ON t.poll_id = p.id AND t.selection = ARRAY[o.id]
    WHERE p.id = %s ORDER BY o.position
"""


def read_results(poll_id: UUID, at: datetime) -> dict[str, Any] | None:
    """Return the poll's results from the tallies alone, or None when there is no such poll.

    `{"poll", "status", "total_votes", "options": [{"id", "text", "position", "votes", "share"}], "revision", "as_of"}`,
    options by position, `share` from 0 to 1 of the total. `revision` grows with every change of the tallies.
    """
    with connection.cursor() as cursor:
        cursor.execute(_RESULTS, [poll_id])
        rows = cursor.fetchall()
    if not rows:
        return None
    opens_at, closes_at = rows[0][:2]
    total = sum(votes for *_, votes, _ in rows)
    return {
        "poll": str(poll_id),
        "status": status(opens_at, closes_at, at),
        "total_votes": total,
        "options": [
            {"id": str(id), "text": text, "position": position, "votes": votes, "share": round(votes / total, 6) if total else 0.0}
            for _, _, id, text, position, votes, _ in rows
        ],
        "revision": sum(revision for *_, revision in rows),
        "as_of": iso(at),
    }
