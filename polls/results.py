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
from polls.models import Poll, ResultsVisibility, ShownResults, VotingMethod, status
from polls.moments import iso

Moment = TypeVar("Moment", datetime, int)

# One statement, so one moment: the total always fits the options.
_RESULTS = """
    SELECT p.id, p.method, p.opens_at, p.closes_at, p.published_at, p.finalised_at, p.archived_at,
           CASE WHEN o.position = 1 AND p.errata <> '[]' THEN p.errata END,
           coalesce(b.votes, 0), c.as_of, c.cases, c.voters, c.with_votes, c.without_votes, c.shown_as_of,
           p.results_step, s.votes, s.revision, s.as_of, s.ballots, s.step,
           o.id, o.text, o.position, coalesce(t.votes, 0), coalesce(t.revision, 0)
    FROM polls p JOIN options o ON o.poll_id = p.id
    LEFT JOIN tallies t ON t.poll_id = p.id AND t.selection = ARRAY[o.id]
    LEFT JOIN tallies b ON b.poll_id = p.id AND b.selection = '{}'
    LEFT JOIN comparisons c ON c.poll_id = p.id
    LEFT JOIN shown_results s ON s.poll_id = p.id
    WHERE p.id = ANY(%s::uuid[]) ORDER BY p.id, o.position
"""
# A poll's tallies now, as ShownResults has them.
_NOW = """
    SELECT jsonb_object_agg(coalesce(t.selection[1]::text, ''), t.votes) AS votes,
           sum(t.revision) FILTER (WHERE t.selection <> '{}') AS revision,
           coalesce(sum(t.votes) FILTER (WHERE p.method = 'single' OR t.selection = '{}'), 0) AS ballots
    FROM tallies t JOIN polls p ON p.id = t.poll_id WHERE t.poll_id = %(poll)s
"""


def are_sealed(visibility: str, closes_at: Moment, at: Moment) -> bool:
    """Return whether nobody may learn a tally yet, whatever their role: every door that shows one asks this, or `are_public`."""
    return visibility == ResultsVisibility.SEALED and at < closes_at


def are_public(visibility: str, closes_at: Moment, at: Moment, *, has_voted: bool = False) -> bool:
    """Return whether everybody reads the results of a published poll; with `has_voted`, whether whoever had a vote counted in it does.

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
    {...}}`: what the results would be with all of them, and without any; both null where that would tell what fewer than
    LEAST_VOTERS chose (disclosure.py). Results that are held back are of an earlier moment, `as_of`.
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
    _, method, opens_at, closes_at, published_at, finalised_at, archived_at, errata, ballots, *comparison = rows[0][:15]
    step, *shown = rows[0][15:21]
    options = [row[21:] for row in rows]
    total = sum(votes for *_, votes, _ in options) if method == VotingMethod.SINGLE else ballots
    revision = sum(revision for *_, revision in options)
    if finalised_at is None and _are_held_back(total, step, shown):
        held, revision, since = _held_back(shown)
        options = [(id, text, position, held.get(str(id), 0), 0) for id, text, position, *_ in options]
        total = sum(votes for *_, votes, _ in options) if method == VotingMethod.SINGLE else held.get("", 0)
        as_of = since or as_of
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
        "revision": revision,
        "as_of": iso(as_of),
        "is_final": finalised_at is not None,
        "errata": msgspec.json.decode(errata) if errata else [],
        "review": _compare(*comparison, total=total, method=method, options=options) if comparison[0] else None,
    }


def _are_held_back(ballots: int, step: int, shown: Sequence[Any]) -> bool:
    """Return whether what was shown before is still shown: the tallies differ from it by too few voters.

    `shown`: a row of ShownResults, of nothing but nulls where there is none. With a step of its own a poll shows what counting has
    renewed, and nothing before that.
    """
    *_, shown_ballots, least = shown
    return step > 1 or (shown_ballots is not None and abs(ballots - shown_ballots) < least)


def _held_back(shown: Sequence[Any]) -> tuple[dict[str, int], int, datetime | None]:
    """Return {option id or "": votes}, revision and moment of what is shown."""
    votes, revision, as_of, *_ = shown
    return (msgspec.json.decode(votes, type=dict[str, int]), revision, as_of) if votes else ({}, 0, None)


def _compare(
    as_of: datetime,
    cases: int,
    voters: int,
    with_votes: str,
    without_votes: str,
    shown_as_of: datetime | None,
    *,
    total: int,
    method: str,
    options: list[tuple[Any, ...]],
) -> dict[str, Any]:
    """Return the results with everything that is under review, and without any of it, as changes to what they are now.

    Neither where that would tell what too few voters chose; a version that does not know of this leaves `shown_as_of` as it was.
    """
    compared: dict[str, Any] = {"as_of": iso(as_of), "open_cases": cases, "voters": voters, "with": None, "without": None}
    if shown_as_of != as_of:
        return compared
    for name, stored in (("with", with_votes), ("without", without_votes)):
        change = msgspec.json.decode(stored, type=dict[str, int])
        ballots = sum(change.values()) if method == VotingMethod.SINGLE else change.get("", 0)
        shown = [{"id": str(id), "votes": votes + change.get(str(id), 0)} for id, _, _, votes, _ in options]
        compared[name] = {"total_votes": total + ballots, "options": shown}
    return compared


# --- Held back --------------------------------------------------------------------------------------------------------


def count_ballots(poll_id: UUID) -> int:
    """Return how many ballots count, by the tallies."""
    return _now(poll_id)[2]


def hold_back(poll_id: UUID, before: tuple[dict[str, int], int, int], least: int, at: datetime) -> None:
    """Go on showing what was shown, and not what the tallies are since `before`, until `least` ballots more (or fewer) are in.

    Until then a ruling on few voters would be told by the difference. For the transaction that changed the tallies; `before` is what
    `tallies_now` returned ahead of that.
    """
    poll = Poll.objects.get(pk=poll_id)
    votes, revision, ballots = before
    row = ShownResults.objects.select_for_update().filter(poll=poll).first()
    shown = (row.ballots, row.step) if row else (None, None)
    if row is None or not _are_held_back(ballots, poll.results_step, shown):
        own = {} if poll.results_step > 1 else {"votes": votes, "revision": revision, "as_of": at}
        row = row or ShownResults(poll=poll, as_of=at)
        for name, value in own.items():
            setattr(row, name, value)
    row.ballots, row.step = count_ballots(poll_id), max(least, poll.results_step)
    row.save()


def show_again(poll_id: UUID) -> None:
    """Let nothing that was held back once come back because the tallies do."""
    ShownResults.objects.filter(poll_id=poll_id, poll__results_step=1).update(step=0)


def are_held_back(poll_id: UUID) -> bool:
    """Return whether the results that are shown are not what the tallies are."""
    poll = Poll.objects.filter(pk=poll_id).first()
    if poll is None or poll.finalised_at:
        return False
    row = ShownResults.objects.filter(poll=poll).values_list("ballots", "step").first()
    return _are_held_back(count_ballots(poll_id), poll.results_step, row or (None, None))


def tallies_now(poll_id: UUID) -> tuple[dict[str, int], int, int]:
    """Return {option id or "": votes}, revision and number of ballots, as counted."""
    return _now(poll_id)


def _now(poll_id: UUID) -> tuple[dict[str, int], int, int]:
    with connection.cursor() as cursor:
        cursor.execute(_NOW, {"poll": poll_id})
        votes, revision, ballots = cursor.fetchone()
    return (msgspec.json.decode(votes, type=dict[str, int]) if votes else {}), int(revision or 0), int(ballots)


def renew(cursor: CursorWrapper, poll_id: UUID, step: int) -> None:
    """Show the poll's tallies anew if so many ballots more (or fewer) are in than when they were last shown.

    For the transaction that counts, after its tallies. Locks the row first: who waits for it must look at the tallies afterwards.
    """
    cursor.execute(
        """
        INSERT INTO shown_results (poll_id, votes, revision, as_of, ballots, step)
        VALUES (%(poll)s, '{}', 0, clock_timestamp(), 0, %(step)s)
        ON CONFLICT (poll_id) DO UPDATE SET step = greatest(shown_results.step, excluded.step)
        """,
        {"poll": poll_id, "step": step},
    )
    cursor.execute(
        f"""
        UPDATE shown_results s
        SET votes = now.votes, revision = now.revision, ballots = now.ballots, as_of = clock_timestamp(), step = %(step)s
        FROM ({_NOW}) AS now WHERE s.poll_id = %(poll)s AND abs(now.ballots - s.ballots) >= s.step
        """,  # noqa: S608 - a constant of ours
        {"poll": poll_id, "step": step},
    )
