"""Integrity: whether every accepted vote has one outcome, and the tallies are what the votes say; and what is done where not."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from django.db import OperationalError, connection, transaction
from django.db.backends.utils import CursorWrapper

from polls import counting, journal, metrics, outbox, problems
from polls.journal import CLOCK, Act
from polls.literals import array
from polls.models import Outcome, Poll

logger = logging.getLogger(__name__)

# Polls up to this size are counted anew by every run of `check_soon`, while they are open and for an hour after; and so many votes a run,
# of polls chosen at random. Chosen: a tenth of a second's work twice a minute.
SMALL_POLL = 20_000
VOTES_AT_ONCE = 100_000
# How long `check` goes on. Chosen: the outbox and the ends of polls wait for it, where one process does the clock's jobs.
CHECK_SECONDS = 20
# How long counting all votes of a poll may take: ten million take seconds.
_COUNTING_SECONDS = 600

# The begin of a statement about some polls: `compared` has each tally beside what the votes say, also where one of them is missing.
_COMPARED = """
    WITH standing AS MATERIALIZED (
        SELECT poll_id, selection, method, count(*) AS votes FROM votes JOIN polls ON polls.id = poll_id
        WHERE poll_id = ANY(%(polls)s::uuid[]) GROUP BY 1, 2, 3
    ), recounts AS (
        SELECT poll_id, selection, votes FROM standing WHERE method = 'single' AND selection <> '{}'
        UNION ALL
        SELECT poll_id, '{}', sum(votes) FROM standing WHERE method = 'approval' AND selection <> '{}' GROUP BY 1
        UNION ALL
        SELECT poll_id, ARRAY[option], sum(votes) FROM standing, unnest(selection) AS option WHERE method = 'approval' GROUP BY 1, 2
    ), compared AS (
        SELECT poll_id, selection, coalesce(tally.votes, 0) AS tally, coalesce(recounts.votes, 0)::bigint AS recount,
               coalesce(tally.counted, 0) AS counted
        FROM (SELECT * FROM tallies WHERE poll_id = ANY(%(polls)s::uuid[])) AS tally FULL JOIN recounts USING (poll_id, selection)
    )
"""


class Compared(NamedTuple):
    """A tally beside what the votes say; without an option the ballots of an approval poll."""

    option: int | None
    tally: int
    recount: int


@dataclass(frozen=True)
class Report:
    """What became of a poll's votes, as of one moment."""

    counted: int
    # {outcome: {reason: votes}}
    aside: Mapping[str, Mapping[str, int]]
    pending: int  # in the outbox; what the broker holds, nobody can tell by poll
    doubled: int  # votes with two outcomes, of which there must be none
    tallies: list[Compared]
    as_of: datetime

    @property
    def accepted(self) -> int:
        """Votes that are known, each once. All of them have their outcome, or wait for it."""
        return self.counted + sum(sum(reasons.values()) for reasons in self.aside.values()) + self.pending - self.doubled

    def total(self, outcome: Outcome) -> int:
        return sum(self.aside.get(outcome, {}).values())

    @property
    def is_exact(self) -> bool:
        """Whether every vote has one outcome, and every tally is what the votes say."""
        return not self.doubled and all(tally == recount for _, tally, recount in self.tallies)


def read(poll_id: UUID) -> Report | None:
    """Return what became of the poll's votes, from one snapshot of the database; None when there is no such poll.

    Counts every vote: seconds for ten million, without a lock that anybody waits for. Outcomes that were purged are not known any more.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        _take_time(cursor)
        cursor.execute("SELECT now() FROM polls WHERE id = %s", [poll_id])
        if (found := cursor.fetchone()) is None:
            return None
        pending = _count_pending(cursor, poll_id)
        cursor.execute(
            _COMPARED  # noqa: S608 - constants of ours, like those below
            + """
            SELECT 'tally', selection[1]::text, tally, recount FROM compared
            UNION ALL SELECT 'counted', NULL, coalesce(sum(votes), 0)::bigint, 0 FROM standing
            UNION ALL SELECT outcome, reason, count(*), count(v.vote_id)
            FROM outcomes o LEFT JOIN votes v USING (poll_id, voter_key, vote_id) WHERE o.poll_id = %(poll)s GROUP BY 1, 2
            ORDER BY 1, 2
            """,
            {"polls": array([poll_id]), "poll": poll_id},
        )
        counted = doubled = 0
        tallies: list[Compared] = []
        aside: dict[str, dict[str, int]] = defaultdict(dict)
        for kind, name, votes, other in cursor:
            if kind == "tally":
                tallies.append(Compared(name and int(name), votes, other))
            elif kind == "counted":
                counted = votes
            else:
                aside[kind][name] = votes
                doubled += other
    tallies.sort(key=lambda compared: compared.option or 0)
    return Report(counted, dict(aside), pending, doubled, tallies, found[0])


def _count_pending(cursor: CursorWrapper, poll_id: UUID) -> int:
    """Return how many of the poll's votes wait in the outbox and nowhere else."""
    waiting = {(vote.voter_key, vote.vote_id) for vote in outbox.votes_waiting() if vote.poll_id == poll_id}
    if not waiting:
        return 0
    cursor.execute(
        """
        SELECT count(*) FROM unnest(%(voters)s::uuid[], %(votes)s::uuid[]) AS w (voter_key, vote_id)
        WHERE NOT EXISTS (SELECT FROM votes v WHERE (v.poll_id, v.voter_key, v.vote_id) = (%(poll)s, w.voter_key, w.vote_id))
          AND NOT EXISTS (SELECT FROM outcomes o WHERE (o.poll_id, o.voter_key, o.vote_id) = (%(poll)s, w.voter_key, w.vote_id))
        """,
        {"poll": poll_id, "voters": array(voter for voter, _ in waiting), "votes": array(vote for _, vote in waiting)},
    )
    count: int = cursor.fetchone()[0]
    return count


# --- Repairing --------------------------------------------------------------------------------------------------------


def recount(poll_id: UUID, act: Act) -> dict[str, tuple[int, int]]:
    """Make the poll's tallies what its votes say; return {option id or "ballots": (votes before, votes after)} of those that were wrong.

    One transaction. Votes are accepted meanwhile, and counted once it has ended. Repeatable. What was wrong is in the journal. Raises
    Refusal where there is no such poll.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        _take_time(cursor)
        counting.keep_counting_out(poll_id)
        poll = Poll.objects.filter(pk=poll_id).first()
        if poll is None:
            raise problems.UNKNOWN_POLL.says("No poll has this id.")
        # Apart from the writing: PostgreSQL counts in parallel only for who writes nothing in the same statement.
        differ = "SELECT selection, tally, recount FROM compared WHERE tally <> recount OR counted <> recount ORDER BY selection"
        cursor.execute(_COMPARED + differ, {"polls": array([poll_id])})
        found = cursor.fetchall()
        cursor.executemany(
            """
            INSERT INTO tallies (poll_id, selection, votes, counted, revision) VALUES (%s, %s, %s, %s, 1)
            ON CONFLICT (poll_id, selection)
            DO UPDATE SET votes = excluded.votes, counted = excluded.counted, revision = tallies.revision + 1
            """,
            [(poll_id, selection, votes, votes) for selection, _, votes in found],
        )
        wrong = {str(selection[0]) if selection else "ballots": (before, votes) for selection, before, votes in found if before != votes}
        if wrong:
            journal.write(poll, act, "recounted", wrong)
    return wrong


def check_soon(at: datetime) -> list[UUID]:
    """Repair the tallies that differ from what counting last made of them, and those of small polls that differ from their votes.

    Return the polls that were repaired. Costs a look at every tally and at most VOTES_AT_ONCE votes. What it can't see in a large poll: a
    tally changed by who changed both of its columns, or deleted; votes that were changed or deleted. `check` sees them.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT poll_id FROM tallies WHERE votes <> counted")
        changed = [poll_id for (poll_id,) in cursor]
        cursor.execute(
            """
            WITH sizes AS (
                SELECT p.id, coalesce(sum(t.votes), 0) AS votes FROM polls p LEFT JOIN tallies t ON t.poll_id = p.id
                WHERE p.published_at <= %(at)s AND p.opens_at <= %(at)s AND (p.finalised_at IS NULL OR p.finalised_at > %(lately)s)
                GROUP BY p.id HAVING coalesce(sum(t.votes), 0) <= %(small)s
            )
            SELECT id FROM (SELECT id, sum(votes) OVER (ORDER BY random()) AS votes_so_far FROM sizes) s WHERE votes_so_far <= %(most)s
            """,
            {"at": at, "lately": at - timedelta(hours=1), "small": SMALL_POLL, "most": VOTES_AT_ONCE},
        )
        small = [poll_id for (poll_id,) in cursor]
    return _repair([*changed, *(poll_id for poll_id in _find_wrong(small) if poll_id not in changed)], at)


def check(at: datetime) -> list[UUID]:
    """Count all votes of all polls anew, and repair the tallies that differ; return the polls that were repaired.

    Poll by poll in random order, and after CHECK_SECONDS no further one: the next run finds others.
    """
    started, wrong = time.monotonic(), []
    for poll_id in Poll.objects.filter(published_at__isnull=False).order_by("?").values_list("id", flat=True):
        wrong += _find_wrong([poll_id])
        if time.monotonic() - started > CHECK_SECONDS:
            break
    return _repair(wrong, at)


def _find_wrong(poll_ids: Collection[UUID]) -> list[UUID]:
    with transaction.atomic(), connection.cursor() as cursor:
        _take_time(cursor)
        statement = _COMPARED + "SELECT DISTINCT poll_id FROM compared WHERE tally <> recount"  # noqa: S608
        cursor.execute(statement, {"polls": array(poll_ids)})
        return [poll_id for (poll_id,) in cursor]


def _repair(poll_ids: Collection[UUID], at: datetime) -> list[UUID]:
    repaired = []
    for poll_id in poll_ids:
        try:
            wrong = recount(poll_id, Act(CLOCK, at, "The tallies were not what the votes say."))
        except problems.Refusal:  # deleted a moment ago
            continue
        except OperationalError as exc:  # locked for too long by who counts; the next run tries again
            logger.warning("the tallies of poll %s could not be recounted (%s)", poll_id, type(exc).__name__)
            continue
        if wrong:
            metrics.mismatches.inc(len(wrong))
            logger.error("%d tallies of poll %s were not what the votes say; they were recounted", len(wrong), poll_id)
            repaired.append(poll_id)
    return repaired


def _take_time(cursor: CursorWrapper) -> None:
    cursor.execute(f"SET LOCAL statement_timeout = '{_COUNTING_SECONDS}s'")
