"""Counting: the one place that writes votes, outcomes and tallies, always together in one transaction."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self
from uuid import UUID

from django.db import DataError, IntegrityError, connection, transaction
from django.db.backends.utils import CursorWrapper

from polls import ballots, bundles, metrics, results, voters
from polls.ballots import Fate, Selection
from polls.bundles import AcceptedVote
from polls.holds import NO_HOLDS, VOIDED, Holds, Origin, holds_of
from polls.journal import CLOCK
from polls.literals import array
from polls.models import LimitMode, Outcome, Reason
from polls.moments import from_microseconds, microseconds_now, to_microseconds
from polls.prepared import Prepared, execute
from polls.voters import VoteIds

logger = logging.getLogger(__name__)

Voter = tuple[UUID, UUID]  # poll id, voter key
Pardon = Callable[[Origin], object]


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
        metrics.uncountable.inc()
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


def in_words(outcomes: Counter[str]) -> str:
    """Return "counted 35, rejected 2", as logs have it."""
    return ", ".join(f"{outcome} {votes}" for outcome, votes in sorted(outcomes.items())) or "no votes"


def count_votes(votes: Iterable[AcceptedVote]) -> Counter[str]:
    """Write the votes, their outcomes and the tallies in one transaction; return how many votes got which outcome.

    Repeatable: a vote that already has an outcome changes nothing. Which of two votes of one voter stands is decided by
    (accepted_at, vote_id), never by the order of processing. Cost: 3 statements however many votes, and 2 to 5 more when a
    voter has more than one vote.

    Locks, always in this order and each sorted, so that two workers can't deadlock: the counting of each poll (shared; see
    `keep_counting_out`), polls (shared), network counts, votes, outcomes, tallies, shown results.
    """
    started = time.monotonic()
    with transaction.atomic(), connection.cursor() as cursor:
        count = _Count(cursor).run(votes)
        count.renew_results()
        transaction.on_commit(lambda: _tell(count, started), robust=True)
    for poll_id, late in count.late.items():
        logger.error("%d votes came after poll %s was final; they are counted", late, poll_id)
    for vote, (outcome, reason) in count.set_aside:
        named = count.names_of(vote)
        logger.info("vote %s: %s, %s; request %s", named["vote_id"], outcome, reason, vote.request_id or "-", extra=named)
    if logger.isEnabledFor(logging.DEBUG):
        for vote in count.counted:
            named = count.names_of(vote)
            logger.debug("vote %s: counted; request %s", named["vote_id"], vote.request_id or "-", extra=named)
    outcomes = Counter[str](outcome for _, (outcome, _) in count.set_aside)
    outcomes.update({Outcome.COUNTED: len(count.counted), "repeat": count.repeats})
    return +outcomes


def _tell(count: _Count, started: float) -> None:
    """Keep the figures of what has been committed."""
    metrics.count_seconds.observe(time.monotonic() - started)
    votes = count.counted + [vote for vote, _ in count.set_aside]
    if votes:  # none of them a repeat, which would look like a vote that waited until now
        metrics.lag_seconds.observe(max(0, microseconds_now() - min(vote.accepted_at for vote in votes)) / 1_000_000)
    for (outcome, reason), number in Counter(fate for _, fate in count.set_aside).items():
        metrics.decided.labels(outcome, reason).inc(number)
    metrics.counted.inc(len(count.counted))
    metrics.repeated.inc(count.repeats)


def keep_counting_out(poll_id: UUID) -> None:
    """Wait until nobody counts votes of the poll, and let nobody begin until this transaction ends.

    Fair, unlike a lock of the poll's row: bundles that come meanwhile wait behind this one.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_lock_key(poll_id)])


class Move(NamedTuple):
    """One voter's part in a difference of tallies: which vote no longer stands, and which does. One of them may be none."""

    voter: UUID
    out: UUID | None
    into: UUID | None


def settle_voters(poll_id: UUID, voter_keys: Sequence[UUID], pardons: Pardon) -> tuple[list[Move], Counter[Selection]]:
    """Give these voters' votes the places that the poll's holds leave them; return what that changed, by which voters and by how much.

    Part of the caller's transaction. Repeatable. `pardons` says of votes that a soft limit holds up whether they may stand all the same.
    """
    with connection.cursor() as cursor:
        count = _Count(cursor)
        count.polls = count.lock_polls({poll_id})
        cursor.execute("SELECT voter_key FROM votes WHERE poll_id = %s AND voter_key = ANY(%s::uuid[])", [poll_id, array(voter_keys)])
        standing = {key for (key,) in cursor}
        # Insert before locking, in the order of counting.
        count.settle({(poll_id, key): [] for key in voter_keys if key not in standing}, pardons=pardons)
        count.settle({(poll_id, key): [] for key in standing}, pardons=pardons)
        count.write_outcomes()
        count.change_tallies()
    moves = [
        _move(decided.voter[1], decided.current, decided.winner)
        for decided in count.settled
        if _changes_tallies(decided.current, decided.winner)
    ]
    return moves, Counter({selection: votes for (_, selection), votes in count.changes.items()})


def imagine(
    poll_id: UUID, voter_keys: Sequence[UUID], worlds: Sequence[tuple[Holds, Pardon]]
) -> list[tuple[Counter[Selection], list[Move]]]:
    """Return how the tallies would change in each world, and by which voters, by what is stored of their votes now.

    Reads only, without locks. A world is what is held there, and what its rulings pardon (see `settle_voters`).
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT allow_change, method FROM polls WHERE id = %s", [poll_id])
        last_stands, method = cursor.fetchone()
        cursor.execute(
            """
            WITH asked AS (SELECT unnest(%s::uuid[]) AS voter_key)
            SELECT voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, NULL, NULL
            FROM votes JOIN asked USING (voter_key) WHERE poll_id = %s
            UNION ALL
            SELECT voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, outcome, reason
            FROM outcomes JOIN asked USING (voter_key) WHERE poll_id = %s
            """,
            [array(voter_keys), poll_id, poll_id],
        )
        known: dict[UUID, list[_KnownVote]] = defaultdict(list)
        for voter_key, vote_id, selection, accepted_at, address, subnet, signature, outcome, reason in cursor:
            place: Fate | Literal["standing"] = (Outcome(outcome), Reason(reason)) if outcome else "standing"
            known[voter_key].append(_KnownVote(vote_id, tuple(selection), to_microseconds(accepted_at), address, subnet, signature, place))
    changes = [(Counter[Selection](), list[Move]()) for _ in worlds]
    for voter_key, votes in known.items():
        current = next((vote for vote in votes if vote.place == "standing"), None)
        for (change, moves), (holds, pardons) in zip(changes, worlds, strict=True):
            winner, _ = _decide(votes, holds, pardons, last_stands=last_stands)
            if _changes_tallies(current, winner):
                moves.append(_move(voter_key, current, winner))
                for vote, difference in ((current, -1), (winner, 1)):
                    for tallied in ballots.tallied_as(vote.selection, method) if vote else []:
                        change[tallied] += difference
    return changes


@dataclass(frozen=True)
class _Rules:
    """What counting needs to know of a poll."""

    last_stands: bool
    method: str
    options: frozenset[int]
    address_limit: int | None
    subnet_limit: int | None
    beyond_limits: Outcome
    holds: Holds
    is_final: bool
    results_step: int
    vote_ids: VoteIds | None  # none: this process lacks the poll's VOTER_SECRET
    # {selection: whether it can be counted}; a poll has few, and a bundle many votes.
    seen: dict[Selection, bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls, poll_id: UUID, last_stands: bool, method: str, options: list[int],
        address_limit: int | None, subnet_limit: int | None, mode: str, holds_version: int, is_final: bool, results_step: int,
        voter_secret: memoryview | None, has_keyed_vote_ids: bool,
    ) -> Self:  # fmt: skip
        """Return them from a row of _LOCK_POLLS."""
        return cls(
            last_stands, method, frozenset(options), address_limit, subnet_limit,
            Outcome.QUARANTINED if mode == LimitMode.SOFT else Outcome.REJECTED,
            holds_of(poll_id, holds_version),
            is_final,
            results_step,
            voters.vote_ids_known(voter_secret and bytes(voter_secret), are_keyed=has_keyed_vote_ids),
        )  # fmt: skip

    @property
    def has_limits(self) -> bool:
        return self.address_limit is not None or self.subnet_limit is not None

    def takes(self, selection: Selection) -> bool:
        known = self.seen.get(selection)
        if known is None:
            known = self.seen[selection] = ballots.is_countable(selection, self.options)
        return known


def _changes_tallies(current: _KnownVote | None, winner: _KnownVote | None) -> bool:
    """Return whether what the voter adds to the tallies may be something else than before."""
    return winner is not current or (winner is not None and winner.is_changed)


def _move(voter_key: UUID, current: _KnownVote | None, winner: _KnownVote | None) -> Move:
    return Move(voter_key, current.vote_id if current else None, winner.vote_id if winner else None)


@dataclass
class _KnownVote:
    """One of a contested voter's votes, from whichever place it is known."""

    vote_id: UUID
    selection: Selection
    accepted_at: int
    address_key: UUID | None
    subnet_key: UUID | None
    signature_key: int | None
    # Where it is: "standing", aside with its fate, or nowhere yet.
    place: Fate | Literal["standing"] | None = None
    # Whether its row is not what is known now.
    is_changed: bool = False
    # Set where this bundle brought the vote.
    cast: AcceptedVote | None = None

    @property
    def competes(self) -> bool:
        """Whether nothing is against it but another vote of its voter, or a ruling."""
        return self.place in (None, "standing") or self.place[1] in _MAY_STAND

    @property
    def is_beyond_limits(self) -> bool:
        """Whether a soft limit holds it up, until somebody releases it."""
        return isinstance(self.place, tuple) and self.place[0] == Outcome.QUARANTINED and self.place[1] in _LIMITS

    def absorb(self, copy: AcceptedVote) -> None:
        """Take over the earlier of two copies of this vote.

        A client that repeats a vote gets a new accepted_at for the same vote_id. The first one is the true one.
        """
        if (self.accepted_at, self.selection) > (copy.accepted_at, copy.selection):
            self.accepted_at, self.selection, self.is_changed = copy.accepted_at, copy.selection, True
            self.address_key, self.subnet_key, self.signature_key = copy.address_key, copy.subnet_key, copy.signature_key


_MAY_STAND = {Reason.DUPLICATE, Reason.CHANGED, Reason.WITHDRAWN, Reason.KEY_REUSED, Reason.UNDER_REVIEW, Reason.VOIDED}
_LIMITS = {Reason.ADDRESS_LIMIT, Reason.SUBNET_LIMIT}


def _decide(
    known: Iterable[_KnownVote], holds: Holds, pardons: Pardon, *, last_stands: bool
) -> tuple[_KnownVote | None, list[tuple[_KnownVote, Fate]]]:
    """Return which of a voter's votes stands, if any, and what becomes of those that could.

    `pardons` says of votes that a soft limit holds up whether they may stand all the same.
    """
    free, fates = [], []
    for vote in known:
        fate = holds.fate_of(vote)
        if vote.is_beyond_limits:
            if fate == VOIDED:
                fates.append((vote, VOIDED))
            elif not fate and pardons(vote):
                free.append(vote)
        elif vote.competes:
            if fate:
                fates.append((vote, fate))
            else:
                free.append(vote)
    if not free:
        return None, fates
    winner, losers = ballots.decide(free, last_stands=last_stands)
    return winner, fates + losers


class _Decided(NamedTuple):
    """What was decided for one voter."""

    voter: Voter
    current: _KnownVote | None
    # What the current vote was tallied as.
    stood: Selection
    winner: _KnownVote | None
    fates: list[tuple[_KnownVote, Fate]]
    # How many of the brought votes were known before.
    repeats: int


@dataclass
class _Count:
    """One transaction's work."""

    cursor: CursorWrapper
    # What became of the votes that this bundle brought; those that had an outcome before are only numbered.
    counted: list[AcceptedVote] = field(default_factory=list)
    set_aside: list[tuple[AcceptedVote, Fate]] = field(default_factory=list)
    repeats: int = 0
    refused: list[tuple[AcceptedVote, Fate]] = field(default_factory=list)
    settled: list[_Decided] = field(default_factory=list)
    # How many votes more (or fewer) a tally has.
    changes: Counter[tuple[UUID, Selection]] = field(default_factory=Counter)
    # How many votes came to polls that were final.
    late: Counter[UUID] = field(default_factory=Counter)

    def run(self, votes: Iterable[AcceptedVote]) -> Self:
        votes = list(votes)
        self.polls = self.lock_polls({vote.poll_id for vote in votes})
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
        self.write_outcomes()
        self._write_refused()
        self._report_late()
        self.change_tallies()
        return self

    def lock_polls(self, poll_ids: set[UUID]) -> dict[UUID, _Rules]:
        """Keep the polls from being deleted, and their options and holds from being changed, until this transaction ends."""
        # Two statements: the second must not look at the tables before the first has its locks.
        execute(self.cursor, (_LOCK_COUNTING, [array(sorted(map(_lock_key, poll_ids)))]), (_LOCK_POLLS, [array(poll_ids)]))
        return {poll_id: _Rules.of(poll_id, *rest) for poll_id, *rest in self.cursor.fetchall()}

    def names_of(self, vote: AcceptedVote) -> dict[str, object]:
        """Return by what its line in the log can be found: its id as it is shown, and what the client called its request."""
        rules = self.polls.get(vote.poll_id)
        shown_id = rules.vote_ids.shown(vote.vote_id) if rules and rules.vote_ids else None
        return {"vote_id": shown_id, "request_id": vote.request_id}

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

    def _limit_reached(self, cast: AcceptedVote, counts: Counter[tuple[UUID, UUID]]) -> Reason | None:
        rules = self.polls[cast.poll_id]
        for key, limit, reason in (
            (cast.address_key, rules.address_limit, Reason.ADDRESS_LIMIT),
            (cast.subnet_key, rules.subnet_limit, Reason.SUBNET_LIMIT),
        ):
            if key is not None and limit is not None and counts[cast.poll_id, key] >= limit:
                return reason
        return None

    def _lock_network_counts(self, limited: dict[Voter, list[AcceptedVote]]) -> Counter[tuple[UUID, UUID]]:
        networks = sorted({(cast.poll_id, key) for casts in limited.values() for cast in casts for key in _network_keys(cast)})
        self.cursor.execute(
            """
            INSERT INTO network_counts (poll_id, network_key, voters)
            SELECT poll_id, network_key, 0 FROM unnest(%s::uuid[], %s::uuid[]) AS n (poll_id, network_key)
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
        kept_out = set[Voter]()
        if any(rules.holds for rules in self.polls.values()):
            kept_out = {voter for voter, casts in by_voter.items() if any(map(self.polls[voter[0]].holds.fate_of, casts))}
        firsts = [casts[0] for voter, casts in by_voter.items() if not kept_out or voter not in kept_out]
        left_out = self._insert_standing(firsts) if firsts else set()
        inserted = [vote for place, vote in enumerate(firsts) if place not in left_out] if left_out else firsts
        for (poll_id, selection), votes in Counter((vote.poll_id, vote.selection) for vote in inserted).items():
            self._tally(poll_id, selection, votes)
        if len(inserted) == sum(map(len, by_voter.values())):  # as nearly always: each voter has one vote, and had none
            self.counted += inserted
            return
        standing = {(vote.poll_id, vote.voter_key) for vote in inserted}
        contested = {voter: casts for voter, casts in by_voter.items() if len(casts) > 1 or voter not in standing}
        self.counted += [vote for vote in inserted if (vote.poll_id, vote.voter_key) not in contested] if contested else inserted
        self.settle(contested, standing)

    def _tally(self, poll_id: UUID, selection: Selection, votes: int) -> None:
        for tallied in ballots.tallied_as(selection, self.polls[poll_id].method):
            self.changes[poll_id, tallied] += votes

    def _insert_standing(self, votes: Sequence[AcceptedVote | _KnownVote], voters: Iterable[Voter] | None = None) -> set[int]:
        """Insert the votes whose voter has none standing and that have no outcome yet; return the places of the others in the list.

        With `voters`, whose they are, also those that have an outcome.
        """
        whose = [(vote.poll_id, vote.voter_key) for vote in votes] if voters is None else list(voters)  # type: ignore[union-attr]
        execute(self.cursor, (INSERT_STANDING, [*_columns(whose, votes), voters is not None]))
        return {place for (place,) in self.cursor}

    def settle(
        self, contested: Mapping[Voter, list[AcceptedVote]], inserted: Container[Voter] = (), pardons: Pardon = NO_HOLDS.fate_of
    ) -> None:
        """Decide which of a voter's votes stands, by all that is known of them and what a bundle brings, and write what that changes.

        `inserted` are those whose standing vote is the first that the bundle brings. What stands then is a function of the votes
        and the poll's holds alone.
        """
        if not contested:
            return
        standing = self._lock_standing(contested)
        aside = self._read_aside(contested)
        decisions = []
        for voter, casts in contested.items():
            current = standing.get(voter)
            known = {vote.vote_id: vote for vote in ([current] if current else []) + aside[voter]}
            stood = current.selection if current else ballots.WITHDRAWAL
            repeats = self._bring(casts, known, current if voter in inserted else None)
            rules = self.polls[voter[0]]
            winner, fates = _decide(known.values(), rules.holds, pardons, last_stands=rules.last_stands)
            decisions.append(_Decided(voter, current, stood, winner, fates, repeats))

        raised = [decided for decided in decisions if decided.current is None and decided.winner]
        left_out = self._insert_standing([d.winner for d in raised if d.winner], [d.voter for d in raised]) if raised else set()
        # Whose first vote another worker has just written.
        again = {raised[place].voter for place in left_out}
        settled = [decided for decided in decisions if decided.voter not in again] if again else decisions
        for decided in settled:
            self._note(decided)
        self._let_stand(
            [(d.voter, d.winner) for d in settled if d.current and d.winner and (d.winner is not d.current or d.winner.is_changed)]
        )
        self._take_down([d.voter for d in settled if d.current and not d.winner])
        self.settled += settled
        self.settle({voter: contested[voter] for voter in again}, pardons=pardons)

    def _note(self, decided: _Decided) -> None:
        """Remember what was decided, for the tallies and whoever asks."""
        winner, current = decided.winner, decided.current
        if _changes_tallies(current, winner):
            self._tally(decided.voter[0], decided.stood, -1)
            self._tally(decided.voter[0], winner.selection if winner else ballots.WITHDRAWAL, 1)
        self.repeats += decided.repeats
        if winner and winner.cast:
            self.counted.append(winner.cast)
        self.set_aside += [(vote.cast, fate) for vote, fate in decided.fates if vote.cast]

    def _bring(self, casts: list[AcceptedVote], known: dict[UUID, _KnownVote], just_inserted: _KnownVote | None) -> int:
        """Add what the bundle brings of a voter to what is known; return how many of them were known before."""
        repeats = 0
        for cast in casts:
            if vote := known.get(cast.vote_id):
                vote.absorb(cast)
                if vote is just_inserted and vote.cast is None:
                    vote.cast = cast
                else:
                    repeats += 1
            else:
                known[cast.vote_id] = _KnownVote(
                    cast.vote_id, cast.selection, cast.accepted_at, cast.address_key, cast.subnet_key, cast.signature_key, cast=cast
                )
        return repeats

    def _lock_standing(self, voters: Iterable[Voter]) -> dict[Voter, _KnownVote]:
        self.cursor.execute(
            """
            SELECT poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key FROM votes
            WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            ORDER BY poll_id, voter_key FOR UPDATE
            """,
            _voters(voters),
        )
        return {
            (poll_id, voter_key): _KnownVote(
                vote_id, tuple(selection), to_microseconds(accepted_at), address, subnet, signature, "standing"
            )
            for poll_id, voter_key, vote_id, selection, accepted_at, address, subnet, signature in self.cursor
        }

    def _read_aside(self, voters: Iterable[Voter]) -> dict[Voter, list[_KnownVote]]:
        self.cursor.execute(
            """
            SELECT poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, outcome, reason
            FROM outcomes WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[]))
            """,
            _voters(voters),
        )
        aside: dict[Voter, list[_KnownVote]] = defaultdict(list)
        for poll_id, voter_key, vote_id, selection, accepted_at, address, subnet, signature, outcome, reason in self.cursor:
            place = (Outcome(outcome), Reason(reason))
            known = _KnownVote(vote_id, tuple(selection), to_microseconds(accepted_at), address, subnet, signature, place)
            aside[poll_id, voter_key].append(known)
        return aside

    def _let_stand(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        """Put the votes in the place of those that stood."""
        if votes:
            self.cursor.execute(
                f"""
                UPDATE votes SET vote_id = v.vote_id, selection = v.selection::bigint[],
                                 accepted_at = timestamptz 'epoch' + v.accepted_at * interval '1 microsecond',
                                 address_key = v.address_key, subnet_key = v.subnet_key, signature_key = v.signature_key,
                                 counted_at = clock_timestamp()
                FROM unnest({_COLUMN_TYPES})
                     AS v (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key)
                WHERE (votes.poll_id, votes.voter_key) = (v.poll_id, v.voter_key)
                """,  # noqa: S608 - a constant of ours
                _columns([voter for voter, _ in votes], [vote for _, vote in votes]),
            )

    def _take_down(self, voters: list[Voter]) -> None:
        """Leave these voters without a vote that stands."""
        if voters:
            self.cursor.execute(
                "DELETE FROM votes USING unnest(%s::uuid[], %s::uuid[]) AS v (poll_id, voter_key)"
                " WHERE (votes.poll_id, votes.voter_key) = (v.poll_id, v.voter_key)",
                _voters(voters),
            )

    def write_outcomes(self) -> None:
        """Record what became of the votes that were decided about. After all work on votes: locks are taken in this order."""
        self._return([(d.voter, d.winner) for d in self.settled if d.winner and isinstance(d.winner.place, tuple)])
        self._set_aside([(d.voter, vote, fate) for d in self.settled for vote, fate in d.fates if vote.place != fate or vote.is_changed])

    def _return(self, votes: list[tuple[Voter, _KnownVote]]) -> None:
        """Forget the outcomes of votes that stand now."""
        if votes:
            self.cursor.execute(
                "DELETE FROM outcomes USING unnest(%s::uuid[], %s::uuid[], %s::uuid[]) AS v (poll_id, voter_key, vote_id)"
                " WHERE (outcomes.poll_id, outcomes.voter_key, outcomes.vote_id) = (v.poll_id, v.voter_key, v.vote_id)",
                [*_voters(voter for voter, _ in votes), array(vote.vote_id for _, vote in votes)],
            )

    def _set_aside(self, votes: list[tuple[Voter, _KnownVote, Fate]]) -> None:
        """Record the votes that do not stand."""
        if votes:
            self.cursor.execute(
                f"""
                INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key,
                                      outcome, reason, decided_at)
                SELECT poll_id, voter_key, vote_id, selection::bigint[],
                       timestamptz 'epoch' + accepted_at * interval '1 microsecond', address_key, subnet_key, signature_key,
                       outcome, reason, clock_timestamp()
                FROM unnest({_COLUMN_TYPES}, %s::text[], %s::text[])
                     AS v (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, outcome, reason)
                ORDER BY poll_id, voter_key, vote_id
                ON CONFLICT (poll_id, voter_key, vote_id)
                DO UPDATE SET selection = excluded.selection, accepted_at = excluded.accepted_at, address_key = excluded.address_key,
                              subnet_key = excluded.subnet_key, signature_key = excluded.signature_key,
                              outcome = excluded.outcome, reason = excluded.reason
                """,  # noqa: S608 - a constant of ours
                [
                    *_columns([voter for voter, _, _ in votes], [vote for _, vote, _ in votes]),
                    [str(outcome) for _, _, (outcome, _) in votes],
                    [str(reason) for _, _, (_, reason) in votes],
                ],
            )

    # --- Refusing -----------------------------------------------------------------------------------------------------

    def _write_refused(self) -> None:
        """Record the refused votes. One that has an outcome already keeps it."""
        for vote, fate in sorted(self.refused, key=lambda refusal: (refusal[0].poll_id, refusal[0].voter_key)):
            self.cursor.execute(
                """
                INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key,
                                      outcome, reason, decided_at)
                SELECT %s, %s, %s, %s::bigint[], %s, %s, %s, %s, %s, %s, clock_timestamp()
                WHERE NOT EXISTS (SELECT FROM votes WHERE (poll_id, voter_key, vote_id) = (%s, %s, %s))
                ON CONFLICT DO NOTHING
                """,
                [
                    vote.poll_id,
                    vote.voter_key,
                    vote.vote_id,
                    list(vote.selection),
                    from_microseconds(vote.accepted_at),
                    vote.address_key,
                    vote.subnet_key,
                    vote.signature_key,
                    *fate,
                    vote.poll_id,
                    vote.voter_key,
                    vote.vote_id,
                ],
            )
            if self.cursor.rowcount:
                self.set_aside.append((vote, fate))
            else:
                self.repeats += 1

    # --- Late votes ---------------------------------------------------------------------------------------------------

    def _report_late(self) -> None:
        """Write into the journal how many votes have only now come to a poll that was called final. They count all the same."""
        if not any(rules.is_final for rules in self.polls.values()):
            return
        brought = [*self.counted, *(vote for vote, _ in self.set_aside)]
        self.late = Counter(vote.poll_id for vote in brought if vote.poll_id in self.polls and self.polls[vote.poll_id].is_final)
        for poll_id, votes in sorted(self.late.items()):
            self.cursor.execute(
                "INSERT INTO journal (poll_id, at, actor, action, reason, changes)"
                " VALUES (%s, clock_timestamp(), %s, 'late', '', jsonb_build_object('late_votes', jsonb_build_array(0, %s::int)))",
                [poll_id, CLOCK, votes],
            )

    # --- Tallies ------------------------------------------------------------------------------------------------------

    def change_tallies(self) -> None:
        """Add the changes to the results table. Last in the transaction: everybody waits for these few rows."""
        changes = sorted((poll_id, selection, votes) for (poll_id, selection), votes in self.changes.items() if votes)
        if not changes:
            return
        arrays = [
            array(poll_id for poll_id, _, _ in changes),
            _selections(selection for _, selection, _ in changes),
            array(votes for _, _, votes in changes),
        ]
        execute(self.cursor, (CHANGE_TALLIES, arrays))

    def renew_results(self) -> None:
        """Show the tallies anew where a poll shows them only every so many ballots."""
        for poll_id in sorted(poll_id for poll_id, rules in self.polls.items() if rules.results_step > 1):
            results.renew(self.cursor, poll_id, self.polls[poll_id].results_step)


def _lock_key(poll_id: UUID) -> int:
    return int.from_bytes(poll_id.bytes[:8], signed=True)


def _voters(voters: Iterable[Voter]) -> tuple[str, str]:
    voters = list(voters)
    return array([poll_id for poll_id, _ in voters]), array([voter_key for _, voter_key in voters])


def _network_keys(cast: AcceptedVote) -> list[UUID]:
    return [key for key in (cast.address_key, cast.subnet_key) if key is not None]


# What `_columns` makes arrays of.
_COLUMN_TYPES = "%s::uuid[], %s::uuid[], %s::uuid[], %s::text[], %s::bigint[], %s::uuid[], %s::uuid[], %s::bigint[]"

# --- What every bundle runs -------------------------------------------------------------------------------------------

_LOCK_COUNTING = Prepared("lock_counting", "SELECT pg_advisory_xact_lock_shared(key) FROM unnest(%s::bigint[]) AS key")
_LOCK_POLLS = Prepared(
    "lock_polls",
    """
    SELECT id, allow_change, method, ARRAY(SELECT o.id FROM options o WHERE o.poll_id = p.id),
           address_limit, subnet_limit, limit_mode, holds_version, finalised_at IS NOT NULL, results_step,
           voter_secret, has_keyed_vote_ids
    FROM polls p WHERE id = ANY(%s::uuid[]) ORDER BY id FOR KEY SHARE
    """,
)
# Returns the places of those that it does not insert.
INSERT_STANDING = Prepared(
    "insert_standing",
    f"""
    WITH v AS (
        SELECT * FROM unnest({_COLUMN_TYPES})
        WITH ORDINALITY AS v (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, place)
    ), inserted AS (
        INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, counted_at)
        SELECT poll_id, voter_key, vote_id, selection::bigint[],
               timestamptz 'epoch' + accepted_at * interval '1 microsecond', address_key, subnet_key, signature_key,
               clock_timestamp()
        FROM v
        WHERE %s::boolean OR NOT EXISTS (
            SELECT FROM outcomes o WHERE (o.poll_id, o.voter_key, o.vote_id) = (v.poll_id, v.voter_key, v.vote_id)
        )
        ORDER BY poll_id, voter_key
        ON CONFLICT DO NOTHING
        RETURNING poll_id, voter_key
    )
    SELECT place - 1 FROM v WHERE NOT EXISTS (
        SELECT FROM inserted i WHERE (i.poll_id, i.voter_key) = (v.poll_id, v.voter_key)
    )
    """,  # noqa: S608 - a constant of ours
)
CHANGE_TALLIES = Prepared(
    "change_tallies",
    """
    INSERT INTO tallies (poll_id, selection, votes, counted, revision)
    SELECT poll_id, selection::bigint[], votes, votes, 1
    FROM unnest(%s::uuid[], %s::text[], %s::bigint[]) AS c (poll_id, selection, votes)
    ORDER BY poll_id, selection::bigint[]
    ON CONFLICT (poll_id, selection)
    DO UPDATE SET votes = tallies.votes + excluded.votes, counted = tallies.counted + excluded.counted,
                  revision = tallies.revision + 1
    """,
)


def _columns(voters: Iterable[Voter], votes: Sequence[AcceptedVote | _KnownVote]) -> list[str]:
    """Return the votes column by column, as array literals: poll, voter, vote, selection, moment, address, subnet, signature."""
    return [
        *_voters(voters),
        array([vote.vote_id for vote in votes]),
        _selections([vote.selection for vote in votes]),
        array([vote.accepted_at for vote in votes]),
        array([vote.address_key for vote in votes]),
        array([vote.subnet_key for vote in votes]),
        array([vote.signature_key for vote in votes]),
    ]


def _selections(selections: Iterable[Selection]) -> str:
    """Return the array literal of the selections' own array literals, as texts."""
    literals: dict[Selection, str] = {}
    texts = []
    for selection in selections:
        if selection not in literals:
            literals[selection] = '"' + array(selection) + '"'
        texts.append(literals[selection])
    return "{" + ",".join(texts) + "}"
