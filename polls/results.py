"""Results: a poll's tallies as the API shows them, and who may see them when."""

from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from django.db import connection
from django.db.backends.utils import CursorWrapper

from polls import replica
from polls.models import ResultsVisibility, VotingMethod, status
from polls.moments import iso

Moment = TypeVar("Moment", datetime, int)

# One statement, so one moment: the total always fits the options.
_RESULTS = """
    SELECT p.id, p.method, p.opens_at, p.closes_at, p.published_at, p.finalised_at, p.archived_at,
           CASE WHEN o.position = 1 AND p.errata <> '[]' THEN p.errata END,
           coalesce(b.votes, 0), c.as_of, c.cases, c.voters, c.with_votes, c.without_votes,
           o.id, o.text, o.position, coalesce(t.votes, 0), coalesce(t.revision, 0)
    FROM polls p JOIN options o ON o.poll_id = p.id
    LEFT JOIN tallies t ON t.poll_id = p.id AND t.selection = ARRAY[o.id]
    LEFT JOIN tallies b ON b.poll_id = p.id AND b.selection = '{}'
    LEFT JOIN comparisons c ON c.poll_id = p.id
    WHERE p.id = ANY(%s::uuid[]) ORDER BY p.id, o.position
"""


def are_sealed(visibility: str, closes_at: Moment, at: Moment) -> bool:
    """Return whether nobody may learn a tally yet, whatever their role: every door that shows one asks this, or `are_public`."""
    return visibility == ResultsVisibility.SEALED and at < closes_at


def are_public(visibility: str, closes_at: Moment, at: Moment, *, has_voted: bool = False) -> bool:
    """Return whether everybody reads the results of a published poll; with `has_voted`, whether whoever has a receipt of it does.

    Both moments are of one kind: the hot routes have numbers. A poll that is reopened hides its results again; one with sealed
    results is never reopened (stages.py).
    """
    if visibility == ResultsVisibility.ALWAYS or (visibility == ResultsVisibility.AFTER_VOTE and has_voted):
        return True
    return visibility != ResultsVisibility.OWNER and closes_at <= at


def read_results(poll_id: UUID, at: datetime) -> dict[str, Any] | None:
    """Return the poll's results from the tallies alone, or None when there is no such poll.

    `{"poll", "status", "method", "total_votes", "options": [{"id", "text", "position", "votes", "share"}], "revision", "as_of",
    "is_final"}`, options by position. `total_votes` counts ballots, `share` is from 0 to 1 of them: those of an approval poll can
    add up to more. `revision` grows with every change of the tallies. `is_final`: all votes are counted, and only a review changes
    anything any more. `errata`: `[{"field", "option", "text", "at"}]`, what was said about frozen texts. `review`: null, or while
    votes are under review `{"as_of", "open_cases", "voters", "with": {"total_votes", "options": [{"id", "votes"}]}, "without":
    {...}}`: what the results would be with all of them, and without any.
    """
    return read_all_results([poll_id], at).get(poll_id)


def read_public_results(poll_ids: Sequence[UUID], at: datetime) -> dict[UUID, dict[str, Any]]:
    """Return the same of those of the polls that there are, from the replica where there is one.

    Then `as_of` is by so much earlier as that may be behind.
    """
    rows, behind = replica.read(lambda cursor: _rows(cursor, poll_ids))
    found = _by_poll(rows, at, as_of=at - behind)
    too_new = [poll_id for poll_id in poll_ids if poll_id not in found]  # for the replica, or there are none
    return found | read_all_results(too_new, at) if too_new else found


def read_all_results(poll_ids: Sequence[UUID], at: datetime) -> dict[UUID, dict[str, Any]]:
    """Return the results of those of the polls that there are, as `read_results` does. One statement for all."""
    with connection.cursor() as cursor:
        return _by_poll(_rows(cursor, poll_ids), at, as_of=at)


def _by_poll(rows: list[tuple[Any, ...]], at: datetime, *, as_of: datetime) -> dict[UUID, dict[str, Any]]:
    return {poll_id: _sum_up(poll_id, list(its), at, as_of=as_of) for poll_id, its in groupby(rows, key=itemgetter(0))}


def _rows(cursor: CursorWrapper, poll_ids: Sequence[UUID]) -> list[tuple[Any, ...]]:
    cursor.execute(_RESULTS, [list(poll_ids)])
    return list(cursor.fetchall())


def _sum_up(poll_id: UUID, rows: list[tuple[Any, ...]], at: datetime, *, as_of: datetime) -> dict[str, Any]:
    _, method, opens_at, closes_at, published_at, finalised_at, archived_at, errata, ballots, *comparison = rows[0][:14]
    options = [row[14:] for row in rows]
    total = sum(votes for *_, votes, _ in options) if method == VotingMethod.SINGLE else ballots
    now_is = status(
        at, opens_at=opens_at, closes_at=closes_at, published_at=published_at, finalised_at=finalised_at, archived_at=archived_at
    )
    return {
        "poll": str(poll_id),
        "status": str(now_is),
        "method": method,
        "total_votes": total,
        "options": [
            {"id": str(id), "text": text, "position": position, "votes": votes, "share": round(votes / total, 6) if total else 0.0}
            for id, text, position, votes, _ in options
        ],
        "revision": sum(revision for *_, revision in options),
        "as_of": iso(as_of),
        "is_final": finalised_at is not None,
        "errata": msgspec.json.decode(errata) if errata else [],
        "review": _compare(*comparison, total=total, method=method, options=options) if comparison[0] else None,
    }


def _compare(
    as_of: datetime,
    cases: int,
    voters: int,
    with_votes: str,
    without_votes: str,
    *,
    total: int,
    method: str,
    options: list[tuple[Any, ...]],
) -> dict[str, Any]:
    """Return the results with everything that is under review, and without any of it, as changes to what they are now."""
    compared: dict[str, Any] = {"as_of": iso(as_of), "open_cases": cases, "voters": voters}
    for name, stored in (("with", with_votes), ("without", without_votes)):
        change = msgspec.json.decode(stored, type=dict[str, int])
        ballots = sum(change.values()) if method == VotingMethod.SINGLE else change.get("", 0)
        shown = [{"id": str(id), "votes": votes + change.get(str(id), 0)} for id, _, _, votes, _ in options]
        compared[name] = {"total_votes": total + ballots, "options": shown}
    return compared
