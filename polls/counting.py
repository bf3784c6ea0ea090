"""Counting: the one place that writes votes, outcomes and tallies, always together in one transaction."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from django.db import DataError, IntegrityError, connection, transaction
from django.db.backends.utils import CursorWrapper

from polls import bundles
from polls.bundles import AcceptedVote
from polls.models import Outcome, Reason
from polls.moments import from_microseconds, to_microseconds

Voter = tuple[UUID, UUID]  # poll id, voter key
Selection = tuple[int, ...]


class UncountableVotesError(Exception):
    """Some items of a bundle are no votes. The others are counted; the message belongs to the dead letters."""


def count_bundle(bundle: object) -> Counter[str]:
    """Count a bundle as it came from the wire; return how many votes got which outcome ("repeat": had one already).

    Raises UncountableVotesError after its readable votes are counted, so one bad vote never takes its neighbours with it.
    Repeatable, so the same message may be replayed from the dead letters.
    """
    votes, unreadable = bundles.read(bundle)
    counted, refused = _count_what_the_database_takes(votes)
    if unreadable + refused:
        raise UncountableVotesError(f"{unreadable + refused} of {len(votes) + unreadable} votes can't be read or stored")
    return counted


def _count_what_the_database_takes(votes: list[AcceptedVote]) -> tuple[Counter[str], int]:
    """Count the votes; halve the list around one that PostgreSQL refuses. Return the outcomes and how many were refused."""
    if not votes:
        return Counter(), 0
    try:
        return count_votes(votes), 0
    except (DataError, IntegrityError):
        if len(votes) == 1:
            return Counter(), 1
    middle = len(votes) // 2
    first, refused_first = _count_what_the_database_takes(votes[:middle])
    second, refused_second = _count_what_the_database_takes(votes[middle:])
    return first + second, refused_first + refused_second


def count_votes(votes: Iterable[AcceptedVote]) -> Counter[str]:
    """Write the votes, their outcomes and the tallies in one transaction; return how many votes got which outcome.

    Repeatable: a vote that already has an outcome changes nothing. Which of two votes of one voter stands is decided by
    (accepted_at, vote_id), never by the order of processing. Cost: 3 statements however many votes, and 2 to 5 more when a
    voter has more than one vote.

    Locks, always in this order and each sorted, so that two workers can't deadlock: polls (shared), votes, tallies.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        return _Count(cursor).run(votes)


@dataclass(frozen=True)
class _Rules:
    """What counting needs to know of a poll."""

    last_stands: bool
    options: frozenset[int]


@dataclass
class _KnownVote:
    """One of a voter's several votes, from whichever place it is known."""

    vote_id: UUID
    selection: Selection
    accepted_at: int
    # Why it was set aside; None when it stands or is new.
    reason: str | None = None
    is_new: bool = False

    @property
    def rank(self) -> tuple[int, UUID]:
        return self.accepted_at, self.vote_id

    @property
    def competes(self) -> bool:
        """Whether it lost, if it did, only to another vote of its voter."""
        return self.reason in (None, Reason.DUPLICATE, Reason.CHANGED)

    def absorb(self, copy: AcceptedVote) -> bool:
        """Take over the earlier of two copies of this vote; return whether that changed anything.

        A client that repeats a vote gets a new accepted_at for the same vote_id. The first one is the true one.
        """
        if (self.accepted_at, self.selection) <= (copy.accepted_at, copy.selection):
            return False
        self.accepted_at, self.selection = copy.accepted_at, copy.selection
        return True


@dataclass
class _Count:
    """One transaction's work."""

    cursor: CursorWrapper
    outcomes: Counter[str] = field(default_factory=Counter)
    # How many votes more (or fewer) stand for a selection.
    changes: Counter[tuple[UUID, Selection]] = field(default_factory=Counter)

    def run(self, votes: Iterable[AcceptedVote]) -> Counter[str]:
        votes = list(votes)
        self.polls = self._lock_polls({vote.poll_id for vote in votes})
        by_voter: dict[Voter, list[AcceptedVote]] = defaultdict(list)
        refused: list[tuple[AcceptedVote, Reason]] = []
        for vote in votes:
            if (rules := self.polls.get(vote.poll_id)) is None:
                refused.append((vote, Reason.POLL_UNKNOWN))
            elif len(vote.selection) != 1 or vote.selection[0] not in rules.options:
                refused.append((vote, Reason.OPTION_UNKNOWN))
            else:
                by_voter[vote.poll_id, vote.voter_key].append(vote)

        self._place(by_voter)
        self._refuse(refused)
        self._change_tallies()
        return +self.outcomes

    def _lock_polls(self, poll_ids: set[UUID]) -> dict[UUID, _Rules]:
        """Keep the polls from being deleted, and their options from being changed, until this transaction ends."""
        self.cursor.execute(
            """
            SELECT id, allow_change, ARRAY(SELECT o.id FROM options o WHERE o.poll_id = p.id)
            FROM polls p WHERE id = ANY(%s::uuid[]) ORDER BY id FOR KEY SHARE
            """,
            [_array(poll_ids)],
        )
        return {poll_id: _Rules(allow_change, frozenset(options)) for poll_id, allow_change, options in self.cursor}

    def _place(self, by_voter: dict[Voter, list[AcceptedVote]]) -> None:
        """Give every vote its place: standing or aside."""
        if not by_voter:
            return
        inserted = self._insert_standing([casts[0] for casts in by_voter.values()])
        for poll_id, voter_key in inserted:
            self.changes[poll_id, by_voter[poll_id, voter_key][0].selection] += 1
        contested = {voter: casts for voter, casts in by_voter.items() if len(casts) > 1 or voter not in inserted}
        self.outcomes[Outcome.COUNTED] += len(inserted - contested.keys())
        if contested:
            unplaced = self._settle(contested, inserted)
            self._place(unplaced)

    def _insert_standing(self, votes: list[AcceptedVote]) -> set[Voter]:
        """Insert the votes whose voter has none standing and that have no outcome yet; return their voters."""
        self.cursor.execute(
            """
            INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, counted_at)
            SELECT poll_id, voter_key, vote_id, ARRAY[option_id],
                   timestamptz 'epoch' + accepted_at * interval '1 microsecond', clock_timestamp()
            FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::bigint[], %s::bigint[])
                 AS v (poll_id, voter_key, vote_id, option_id, accepted_at)
            WHERE NOT EXISTS (
                SELECT FROM outcomes o WHERE (o.poll_id, o.voter_key, o.vote_id) = (v.poll_id, v.voter_key, v.vote_id)
            )
            ORDER BY poll_id, voter_key
            ON CONFLICT DO NOTHING
            RETURNING poll_id, voter_key
            """,
            [
                _array(vote.poll_id for vote in votes),
                _array(vote.voter_key for vote in votes),
                _array(vote.vote_id for vote in votes),
                _array(vote.selection[0] for vote in votes),
                _array(vote.accepted_at for vote in votes),
            ],
        )
        return set(self.cursor)

    def _settle(self, contested: dict[Voter, list[AcceptedVote]], inserted: set[Voter]) -> dict[Voter, list[AcceptedVote]]:
        """Decide which of a voter's votes stands, by all that is known of them, and write what that changes.

        Return the votes of the voters with nothing standing that still have no place: their first one had been refused
        before, so the next one is to be tried.
        """
        standing = self._lock_standing(contested)
        aside = self._read_aside(standing)
        moved: list[tuple[Voter, _KnownVote]] = []  # now stand instead of another
        lost: list[tuple[Voter, _KnownVote]] = []
        returned: list[tuple[Voter, _KnownVote]] = []  # were aside, stand now
        for voter, current in standing.items():
            known = {vote.vote_id: vote for vote in [current, *aside[voter]]}
            current.is_new = voter in inserted
            selected_before, changed = current.selection, set()
            for cast in contested[voter]:
                if vote := known.get(cast.vote_id):
                    if vote.absorb(cast):
                        changed.add(vote.vote_id)
                else:
                    known[cast.vote_id] = _KnownVote(cast.vote_id, cast.selection, cast.accepted_at, is_new=True)
                    changed.add(cast.vote_id)

            last_stands = self.polls[voter[0]].last_stands
            competing = sorted((vote for vote in known.values() if vote.competes), key=lambda vote: vote.rank, reverse=last_stands)
            winner, losers = competing[0], competing[1:]
            if winner is not current or winner.vote_id in changed:
                moved.append((voter, winner))
                self.changes[voter[0], selected_before] -= 1
                self.changes[voter[0], winner.selection] += 1
            if winner.reason:
                returned.append((voter, winner))
            lost += [(voter, vote) for vote in losers if vote is current or vote.vote_id in changed]

            new = [vote for vote in known.values() if vote.is_new]
            self.outcomes[Outcome.COUNTED] += winner.is_new
            self.outcomes[Outcome.SUPERSEDED if last_stands else Outcome.REJECTED] += len(new) - winner.is_new
            self.outcomes["repeat"] += len(contested[voter]) - len(new)

        self._let_stand(moved)
        self._return(returned)
        self._set_aside(lost)
        unplaced = {voter: casts for voter, casts in contested.items() if voter not in standing}
        self.outcomes["repeat"] += len(unplaced)
        return {voter: casts[1:] for voter, casts in unplaced.items() if casts[1:]}

    def _lock_standing(self, voters: Iterable[Voter]) -> dict[Voter, _KnownVote]:
        self.cursor.execute(
            """
            SELECT poll_id, voter_key, vote_id, selection, accepted_at FROM votes
            WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            ORDER BY poll_id, voter_key FOR UPDATE
            """,
            _voters(voters),
        )
        return {
            (poll_id, voter_key): _KnownVote(vote_id, tuple(selection), to_microseconds(accepted_at))
            for poll_id, voter_key, vote_id, selection, accepted_at in self.cursor
        }

    def _read_aside(self, voters: Iterable[Voter]) -> dict[Voter, list[_KnownVote]]:
        self.cursor.execute(
            """
            SELECT poll_id, voter_key, vote_id, selection, accepted_at, reason FROM outcomes
            WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            """,
            _voters(voters),
        )
        aside: dict[Voter, list[_KnownVote]] = defaultdict(list)
        for poll_id, voter_key, vote_id, selection, accepted_at, reason in self.cursor:
            aside[poll_id, voter_key].append(_KnownVote(vote_id, tuple(selection), to_microseconds(accepted_at), reason))
        return aside

    def _let_stand(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        self.cursor.executemany(
            """
            UPDATE votes SET vote_id = %s, selection = %s, accepted_at = %s, counted_at = clock_timestamp()
            WHERE poll_id = %s AND voter_key = %s
            """,
            [(vote.vote_id, list(vote.selection), from_microseconds(vote.accepted_at), *voter) for voter, vote in votes],
        )

    def _return(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        self.cursor.executemany(
            "DELETE FROM outcomes WHERE poll_id = %s AND voter_key = %s AND vote_id = %s",
            [(*voter, vote.vote_id) for voter, vote in votes],
        )

    def _set_aside(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        """Record the votes that lost to another one of their voter."""
        rows = []
        for voter, vote in votes:
            changed = self.polls[voter[0]].last_stands
            outcome, reason = (Outcome.SUPERSEDED, Reason.CHANGED) if changed else (Outcome.REJECTED, Reason.DUPLICATE)
            rows.append((*voter, vote.vote_id, list(vote.selection), from_microseconds(vote.accepted_at), outcome, reason))
        self.cursor.executemany(
            """
            INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, outcome, reason, decided_at)
            VALUES (%s, %s, %s, %s, %s, %s, %s, clock_timestamp())
            ON CONFLICT (poll_id, voter_key, vote_id)
            DO UPDATE SET selection = excluded.selection, accepted_at = excluded.accepted_at
            """,
            rows,
        )

    def _refuse(self, votes: list[tuple[AcceptedVote, Reason]]) -> None:
        """Record the votes that can't stand in any case. One that has an outcome already keeps it."""
        for vote, reason in sorted(votes, key=lambda refusal: (refusal[0].poll_id, refusal[0].voter_key)):
            self.cursor.execute(
                """
                INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, outcome, reason, decided_at)
                SELECT %(poll)s, %(voter)s, %(vote)s, %(selection)s::bigint[], %(accepted_at)s, 'rejected', %(reason)s, clock_timestamp()
                WHERE NOT EXISTS (SELECT FROM votes WHERE (poll_id, voter_key, vote_id) = (%(poll)s, %(voter)s, %(vote)s))
                ON CONFLICT DO NOTHING
                """,
                {
                    "poll": vote.poll_id,
                    "voter": vote.voter_key,
                    "vote": vote.vote_id,
                    "selection": list(vote.selection),
                    "accepted_at": from_microseconds(vote.accepted_at),
                    "reason": reason,
                },
            )
            self.outcomes[Outcome.REJECTED if self.cursor.rowcount else "repeat"] += 1

    def _change_tallies(self) -> None:
        """Add the changes to the results table. Last in the transaction: everybody waits for these few rows."""
        changes = sorted((poll_id, selection, votes) for (poll_id, selection), votes in self.changes.items() if votes)
        if not changes:
            return
        self.cursor.execute(
            """
            INSERT INTO tallies (poll_id, selection, votes, revision)
            SELECT poll_id, selection::bigint[], votes, 1
            FROM unnest(%s::uuid[], %s::text[], %s::bigint[]) AS c (poll_id, selection, votes)
            ORDER BY poll_id, selection::bigint[]
            ON CONFLICT (poll_id, selection)
            DO UPDATE SET votes = tallies.votes + excluded.votes, revision = tallies.revision + 1
            """,
            [
                _array(poll_id for poll_id, _, _ in changes),
                [_array(selection) for _, selection, _ in changes],
                _array(votes for _, _, votes in changes),
            ],
        )


def _voters(voters: Iterable[Voter]) -> tuple[str, str]:
    voters = list(voters)
    return _array(poll_id for poll_id, _ in voters), _array(voter_key for _, voter_key in voters)


def _array(values: Iterable[object]) -> str:
    """Return a PostgreSQL array literal of numbers or uuids; a tenth of the cost of adapting a Python list."""
    return "{" + ",".join(map(str, values)) + "}"
