"""Counting: the one place that writes votes, outcomes and tallies, always together in one transaction."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Self
from uuid import UUID

from django.db import DataError, IntegrityError, connection, transaction
from django.db.backends.utils import CursorWrapper

from polls import ballots, bundles
from polls.ballots import Fate, Selection
from polls.bundles import AcceptedVote
from polls.literals import array
from polls.models import LimitMode, Outcome, Reason
from polls.moments import from_microseconds, to_microseconds

logger = logging.getLogger(__name__)

Voter = tuple[UUID, UUID]  # poll id, voter key


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

    Locks, always in this order and each sorted, so that two workers can't deadlock: polls (shared), network counts, votes,
    tallies.
    """
    with transaction.atomic(), connection.cursor() as cursor:
        count = _Count(cursor).run(votes)
    for vote, (outcome, reason) in count.set_aside:
        logger.info("vote %s: %s, %s; request %s", vote.vote_id, outcome, reason, vote.request_id or vote.vote_id)
    if logger.isEnabledFor(logging.DEBUG):
        for vote in count.counted:
            logger.debug("vote %s: counted; request %s", vote.vote_id, vote.request_id or vote.vote_id)
    outcomes = Counter[str](outcome for _, (outcome, _) in count.set_aside)
    outcomes.update({Outcome.COUNTED: len(count.counted), "repeat": count.repeats})
    return +outcomes


@dataclass(frozen=True)
class _Rules:
    """What counting needs to know of a poll."""

    last_stands: bool
    method: str
    options: frozenset[int]
    address_limit: int | None
    subnet_limit: int | None
    beyond_limits: Outcome
    # {selection: whether it can be counted}; a poll has few, and a bundle many votes.
    seen: dict[Selection, bool] = field(default_factory=dict)

    @property
    def has_limits(self) -> bool:
        return self.address_limit is not None or self.subnet_limit is not None

    def takes(self, selection: Selection) -> bool:
        known = self.seen.get(selection)
        if known is None:
            known = self.seen[selection] = ballots.is_countable(selection, self.options)
        return known


@dataclass
class _KnownVote:
    """One of a contested voter's votes, from whichever place it is known."""

    vote_id: UUID
    selection: Selection
    accepted_at: int
    address_key: int | None
    subnet_key: int | None
    # Where it is: "standing", aside with its fate, or nowhere yet.
    place: Fate | Literal["standing"] | None = None
    # Whether its row is not what is known now.
    is_changed: bool = False
    # Set where this bundle brought the vote.
    cast: AcceptedVote | None = None

    @property
    def competes(self) -> bool:
        """Whether it lost, if it did, only to another vote of its voter."""
        return self.place in (None, "standing") or self.place[1] in _LOST_TO_ANOTHER

    def absorb(self, copy: AcceptedVote) -> None:
        """Take over the earlier of two copies of this vote.

        A client that repeats a vote gets a new accepted_at for the same vote_id. The first one is the true one.
        """
        if (self.accepted_at, self.selection) > (copy.accepted_at, copy.selection):
            self.accepted_at, self.selection, self.is_changed = copy.accepted_at, copy.selection, True


_LOST_TO_ANOTHER = {Reason.DUPLICATE, Reason.CHANGED, Reason.WITHDRAWN, Reason.KEY_REUSED}


@dataclass
class _Count:
    """One transaction's work."""

    cursor: CursorWrapper
    # What became of the votes that this bundle brought; those that had an outcome before are only numbered.
    counted: list[AcceptedVote] = field(default_factory=list)
    set_aside: list[tuple[AcceptedVote, Fate]] = field(default_factory=list)
    repeats: int = 0
    refused: list[tuple[AcceptedVote, Fate]] = field(default_factory=list)
    # How many votes more (or fewer) a tally has.
    changes: Counter[tuple[UUID, Selection]] = field(default_factory=Counter)

    def run(self, votes: Iterable[AcceptedVote]) -> Self:
        votes = list(votes)
        self.polls = self._lock_polls({vote.poll_id for vote in votes})
        by_voter: dict[Voter, list[AcceptedVote]] = defaultdict(list)
        for vote in votes:
            rules = self.polls.get(vote.poll_id)
            if rules is None:
                self.refused.append((vote, (Outcome.REJECTED, Reason.POLL_UNKNOWN)))
            elif not rules.takes(vote.selection):
                self.refused.append((vote, (Outcome.REJECTED, Reason.OPTION_UNKNOWN)))
            else:
                by_voter[vote.poll_id, vote.voter_key].append(vote)

        self._apply_limits(by_voter)
        self._place(by_voter)
        self._write_refused()
        self._change_tallies()
        return self

    def _lock_polls(self, poll_ids: set[UUID]) -> dict[UUID, _Rules]:
        """Keep the polls from being deleted, and their options from being changed, until this transaction ends."""
        self.cursor.execute(
            """
            SELECT id, allow_change, method, ARRAY(SELECT o.id FROM options o WHERE o.poll_id = p.id),
                   address_limit, subnet_limit, limit_mode
            FROM polls p WHERE id = ANY(%s::uuid[]) ORDER BY id FOR KEY SHARE
            """,
            [array(poll_ids)],
        )
        return {
            poll_id: _Rules(
                last_stands, method, frozenset(options), address_limit, subnet_limit,
                Outcome.QUARANTINED if mode == LimitMode.SOFT else Outcome.REJECTED,
            )
            for poll_id, last_stands, method, options, address_limit, subnet_limit, mode in self.cursor
        }  # fmt: skip

    # --- Limits per address and per subnet ----------------------------------------------------------------------------

    def _apply_limits(self, by_voter: dict[Voter, list[AcceptedVote]]) -> None:
        """Take out the votes of new voters from where as many have voted as their poll allows.

        What counts is a voter's first vote: whoever was let in may change their mind, and a withdrawal makes no room.
        """
        if not any(rules.has_limits for rules in self.polls.values()):
            return
        limited = {voter: casts for voter, casts in by_voter.items() if self.polls[voter[0]].has_limits and any(map(_network_keys, casts))}
        if not limited:
            return
        counts = self._lock_network_counts(limited)
        let_in, held_up = self._read_who_was_let_in(limited)
        before = counts.copy()
        for voter, cast in sorted(
            ((voter, cast) for voter, casts in limited.items() for cast in casts), key=lambda item: (item[1].accepted_at, item[1].vote_id)
        ):
            if voter in let_in:
                continue
            if cast.vote_id in held_up:
                by_voter[voter].remove(cast)
                self.repeats += 1
            elif reason := self._limit_reached(cast, counts):
                by_voter[voter].remove(cast)
                self.refused.append((cast, (self.polls[cast.poll_id].beyond_limits, reason)))
            else:
                let_in.add(voter)
                for key in _network_keys(cast):
                    counts[cast.poll_id, key] += 1
        for voter in limited:
            if not by_voter[voter]:
                del by_voter[voter]
        self.cursor.executemany(
            "UPDATE network_counts SET voters = %s WHERE poll_id = %s AND network_key = %s",
            [(voters, *network) for network, voters in sorted(counts.items()) if voters != before[network]],
        )

    def _limit_reached(self, cast: AcceptedVote, counts: Counter[tuple[UUID, int]]) -> Reason | None:
        rules = self.polls[cast.poll_id]
        for key, limit, reason in (
            (cast.address_key, rules.address_limit, Reason.ADDRESS_LIMIT),
            (cast.subnet_key, rules.subnet_limit, Reason.SUBNET_LIMIT),
        ):
            if key is not None and limit is not None and counts[cast.poll_id, key] >= limit:
                return reason
        return None

    def _lock_network_counts(self, limited: dict[Voter, list[AcceptedVote]]) -> Counter[tuple[UUID, int]]:
        networks = sorted({(cast.poll_id, key) for casts in limited.values() for cast in casts for key in _network_keys(cast)})
        self.cursor.execute(
            """
            INSERT INTO network_counts (poll_id, network_key, voters)
            SELECT poll_id, network_key, 0 FROM unnest(%s::uuid[], %s::bigint[]) AS n (poll_id, network_key)
            ORDER BY poll_id, network_key
            ON CONFLICT (poll_id, network_key) DO UPDATE SET voters = network_counts.voters
            RETURNING poll_id, network_key, voters
            """,
            [array(poll_id for poll_id, _ in networks), array(key for _, key in networks)],
        )
        return Counter({(poll_id, key): voters for poll_id, key, voters in self.cursor})

    def _read_who_was_let_in(self, voters: Iterable[Voter]) -> tuple[set[Voter], set[UUID]]:
        """Return the voters with a vote that no limit held up, and the ids of the votes that one did."""
        self.cursor.execute(
            """
            WITH asked AS (SELECT * FROM unnest(%(polls)s::uuid[], %(voters)s::uuid[]) AS a (poll_id, voter_key))
            SELECT poll_id, voter_key, NULL::uuid FROM votes JOIN asked USING (poll_id, voter_key)
            UNION ALL
            SELECT poll_id, voter_key, CASE WHEN reason IN ('address_limit', 'subnet_limit') THEN vote_id END
            FROM outcomes JOIN asked USING (poll_id, voter_key) WHERE reason NOT IN ('poll_unknown', 'option_unknown')
            """,
            dict(zip(("polls", "voters"), _voters(voters), strict=True)),
        )
        rows = list(self.cursor)
        return {(poll_id, voter) for poll_id, voter, held_up in rows if not held_up}, {held_up for *_, held_up in rows if held_up}

    # --- Placing ------------------------------------------------------------------------------------------------------

    def _place(self, by_voter: dict[Voter, list[AcceptedVote]]) -> None:
        """Give every vote its place: standing or aside."""
        if not by_voter:
            return
        firsts = [casts[0] for casts in by_voter.values()]
        left_out = self._insert_standing(firsts)
        inserted = [vote for place, vote in enumerate(firsts) if place not in left_out] if left_out else firsts
        for (poll_id, selection), votes in Counter((vote.poll_id, vote.selection) for vote in inserted).items():
            self._tally(poll_id, selection, votes)
        contested = {voter: casts for place, (voter, casts) in enumerate(by_voter.items()) if len(casts) > 1 or place in left_out}
        if not contested:
            self.counted += inserted
            return
        self.counted += [vote for vote in inserted if (vote.poll_id, vote.voter_key) not in contested]
        self._place(self._settle(contested, {(vote.poll_id, vote.voter_key) for vote in inserted}))

    def _tally(self, poll_id: UUID, selection: Selection, votes: int) -> None:
        for tallied in ballots.tallied_as(selection, self.polls[poll_id].method):
            self.changes[poll_id, tallied] += votes

    def _insert_standing(self, votes: list[AcceptedVote]) -> set[int]:
        """Insert the votes whose voter has none standing and that have no outcome yet; return the places of the others in the list."""
        self.cursor.execute(
            """
            WITH v AS (
                SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[])
                WITH ORDINALITY AS v (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, place)
            ), inserted AS (
                INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, counted_at)
                SELECT poll_id, voter_key, vote_id, selection::bigint[],
                       timestamptz 'epoch' + accepted_at * interval '1 microsecond', address_key, subnet_key, clock_timestamp()
                FROM v
                WHERE NOT EXISTS (
                    SELECT FROM outcomes o WHERE (o.poll_id, o.voter_key, o.vote_id) = (v.poll_id, v.voter_key, v.vote_id)
                )
                ORDER BY poll_id, voter_key
                ON CONFLICT DO NOTHING
                RETURNING poll_id, voter_key
            )
            SELECT place - 1 FROM v WHERE NOT EXISTS (
                SELECT FROM inserted i WHERE (i.poll_id, i.voter_key) = (v.poll_id, v.voter_key)
            )
            """,
            [
                array(vote.poll_id for vote in votes),
                array(vote.voter_key for vote in votes),
                array(vote.vote_id for vote in votes),
                _selections(vote.selection for vote in votes),
                array(vote.accepted_at for vote in votes),
                array(vote.address_key for vote in votes),
                array(vote.subnet_key for vote in votes),
            ],
        )
        return {place for (place,) in self.cursor}

    def _settle(self, contested: dict[Voter, list[AcceptedVote]], inserted: set[Voter]) -> dict[Voter, list[AcceptedVote]]:
        """Decide which of a voter's votes stands, by all that is known of them, and write what that changes.

        Return the votes of the voters with nothing standing that still have no place: their first one had been refused
        before, so the next one is to be tried.
        """
        standing = self._lock_standing(contested)
        known_aside = self._read_aside(standing)
        moved: list[tuple[Voter, _KnownVote]] = []  # now stand instead of another, or with an earlier moment
        returned: list[tuple[Voter, _KnownVote]] = []  # were aside, stand now
        lost: list[tuple[Voter, _KnownVote, Fate]] = []
        for voter, current in standing.items():
            stood = current.selection
            known = {vote.vote_id: vote for vote in [current, *known_aside[voter]]}
            self._bring(contested[voter], known, current if voter in inserted else None)
            winner, losers = ballots.decide(
                [vote for vote in known.values() if vote.competes], last_stands=self.polls[voter[0]].last_stands
            )
            if winner is not current or winner.is_changed:
                moved.append((voter, winner))
                self._tally(voter[0], stood, -1)
                self._tally(voter[0], winner.selection, 1)
            if winner.place not in (None, "standing"):
                returned.append((voter, winner))
            lost += [(voter, vote, fate) for vote, fate in losers if vote.place != fate or vote.is_changed]
            fates = {vote.vote_id: fate for vote, fate in losers}
            for vote in known.values():
                if vote.cast and vote.vote_id in fates:
                    self.set_aside.append((vote.cast, fates[vote.vote_id]))
                elif vote.cast:
                    self.counted.append(vote.cast)

        self._let_stand(moved)
        self._return(returned)
        self._set_aside(lost)
        unplaced = {voter: casts for voter, casts in contested.items() if voter not in standing}
        self.repeats += len(unplaced)
        return {voter: casts[1:] for voter, casts in unplaced.items() if casts[1:]}

    def _bring(self, casts: list[AcceptedVote], known: dict[UUID, _KnownVote], just_inserted: _KnownVote | None) -> None:
        """Add what the bundle brings of a voter to what is known."""
        for cast in casts:
            if vote := known.get(cast.vote_id):
                vote.absorb(cast)
                if vote is just_inserted and vote.cast is None:
                    vote.cast = cast
                else:
                    self.repeats += 1
            else:
                known[cast.vote_id] = _KnownVote(
                    cast.vote_id, cast.selection, cast.accepted_at, cast.address_key, cast.subnet_key, cast=cast
                )

    def _lock_standing(self, voters: Iterable[Voter]) -> dict[Voter, _KnownVote]:
        self.cursor.execute(
            """
            SELECT poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key FROM votes
            WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            ORDER BY poll_id, voter_key FOR UPDATE
            """,
            _voters(voters),
        )
        return {
            (poll_id, voter_key): _KnownVote(vote_id, tuple(selection), to_microseconds(accepted_at), address, subnet, "standing")
            for poll_id, voter_key, vote_id, selection, accepted_at, address, subnet in self.cursor
        }

    def _read_aside(self, voters: Iterable[Voter]) -> dict[Voter, list[_KnownVote]]:
        self.cursor.execute(
            """
            SELECT poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, outcome, reason FROM outcomes
            WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            """,
            _voters(voters),
        )
        aside: dict[Voter, list[_KnownVote]] = defaultdict(list)
        for poll_id, voter_key, vote_id, selection, accepted_at, address, subnet, outcome, reason in self.cursor:
            place = (Outcome(outcome), Reason(reason))
            known = _KnownVote(vote_id, tuple(selection), to_microseconds(accepted_at), address, subnet, place)
            aside[poll_id, voter_key].append(known)
        return aside

    def _let_stand(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        self.cursor.executemany(
            """
            UPDATE votes SET vote_id = %s, selection = %s, accepted_at = %s, address_key = %s, subnet_key = %s,
                             counted_at = clock_timestamp()
            WHERE poll_id = %s AND voter_key = %s
            """,
            [(*_row(vote), *voter) for voter, vote in votes],
        )

    def _return(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        self.cursor.executemany(
            "DELETE FROM outcomes WHERE poll_id = %s AND voter_key = %s AND vote_id = %s",
            [(*voter, vote.vote_id) for voter, vote in votes],
        )

    def _set_aside(self, votes: list[tuple[Voter, _KnownVote, Fate]]) -> None:
        """Record the votes that lost to another one of their voter."""
        self.cursor.executemany(
            """
            INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key,
                                  outcome, reason, decided_at)
            VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, clock_timestamp())
            ON CONFLICT (poll_id, voter_key, vote_id)
            DO UPDATE SET selection = excluded.selection, accepted_at = excluded.accepted_at,
                          outcome = excluded.outcome, reason = excluded.reason
            """,
            [(*voter, *_row(vote), *fate) for voter, vote, fate in votes],
        )

    # --- Refusing -----------------------------------------------------------------------------------------------------

    def _write_refused(self) -> None:
        """Record the refused votes. One that has an outcome already keeps it."""
        for vote, fate in sorted(self.refused, key=lambda refusal: (refusal[0].poll_id, refusal[0].voter_key)):
            self.cursor.execute(
                """
                INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key,
                                      outcome, reason, decided_at)
                SELECT %s, %s, %s, %s::bigint[], %s, %s, %s, %s, %s, clock_timestamp()
                WHERE NOT EXISTS (SELECT FROM votes WHERE (poll_id, voter_key, vote_id) = (%s, %s, %s))
                ON CONFLICT DO NOTHING
                """,
                [vote.poll_id, vote.voter_key, *_row(vote), *fate, vote.poll_id, vote.voter_key, vote.vote_id],
            )
            if self.cursor.rowcount:
                self.set_aside.append((vote, fate))
            else:
                self.repeats += 1

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
                array(poll_id for poll_id, _, _ in changes),
                _selections(selection for _, selection, _ in changes),
                array(votes for _, _, votes in changes),
            ],
        )


def _voters(voters: Iterable[Voter]) -> tuple[str, str]:
    voters = list(voters)
    return array(poll_id for poll_id, _ in voters), array(voter_key for _, voter_key in voters)


def _network_keys(cast: AcceptedVote) -> list[int]:
    return [key for key in (cast.address_key, cast.subnet_key) if key is not None]


def _row(vote: AcceptedVote | _KnownVote) -> tuple[UUID, list[int], datetime, int | None, int | None]:
    return vote.vote_id, list(vote.selection), from_microseconds(vote.accepted_at), vote.address_key, vote.subnet_key


def _selections(selections: Iterable[Selection]) -> str:
    """Return the array literal of the selections' own array literals, as texts."""
    literals: dict[Selection, str] = {}
    texts = []
    for selection in selections:
        if selection not in literals:
            literals[selection] = '"' + array(selection) + '"'
        texts.append(literals[selection])
    return "{" + ",".join(texts) + "}"
