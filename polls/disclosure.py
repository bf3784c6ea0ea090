"""Disclosure: whether what some voters chose, added up, may be shown: never where anything shown differs from it by too few voters."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection

from polls import journal, results
from polls.counting import Move
from polls.holds import Selector
from polls.journal import Act
from polls.models import Decision, JournalEntry, Look, LookedAt, LookKind, Vote

# Whatever anybody is shown of choices, and every difference between two such things, is about at least so many voters. Chosen: one family,
# or one address, has fewer (the rules ask for as many, see fraud.PARAMETERS). What ten chose alike is known of each of them all the same.
LEAST_VOTERS = 10
# Dry runs of one poll that show choices: who tries sets of voters at will shall not go on until something is found.
MOST_DRY_RUNS = 20
# Voters that all looks of a poll together remember, 16 bytes each: a second's or two's work. Beyond it nothing new is shown.
MOST_REMEMBERED = 1_000_000


class Shown(NamedTuple):
    """What is to be shown, as the record has it."""

    kind: LookKind
    selectors: Sequence[Selector] = ()
    case_id: int | None = None
    content: Any = None


def show(poll_id: UUID, sets: Iterable[Iterable[Move]], act: Act, what: Shown) -> bool:
    """Return whether the sums over these sets of voters may all be shown; put them on record as shown if so.

    For the caller's transaction, which has locked the poll's row: one look after the other. Everything that was shown before divides
    the poll's voters into parts: those in the same sets. Sums and differences of what was shown are about whole parts only, so each
    part, and the rest of the voters that count, must hold LEAST_VOTERS or nobody. Pairs of sets would not be enough: two of them
    together may leave three voters over.
    """
    wanted = [packed for packed in map(_pack, sets) if packed]
    known = [bytes(moves) for moves in LookedAt.objects.filter(poll_id=poll_id).values_list("moves", flat=True)]
    new = [packed for packed in dict.fromkeys(wanted) if packed not in known]
    if new:
        if what.kind == LookKind.DRY_RUN and _dry_runs(poll_id) >= MOST_DRY_RUNS:
            return False
        if sum(map(len, [*known, *new])) > 16 * MOST_REMEMBERED or not _are_large_enough(poll_id, [*known, *new]):
            return False
    if new or what.kind == LookKind.DRY_RUN:
        look = Look.objects.create(
            poll_id=poll_id,
            at=act.at,
            actor=act.actor,
            reason=act.reason,
            kind=what.kind,
            selectors=[_describe(selector) for selector in what.selectors],
            case_id=what.case_id,
            shown=what.content,
        )
        LookedAt.objects.bulk_create(LookedAt(look=look, poll_id=poll_id, moves=packed) for packed in new)
    return True


def _dry_runs(poll_id: UUID) -> int:
    return Look.objects.filter(poll_id=poll_id, kind=LookKind.DRY_RUN, sets__isnull=False).distinct().count()


def _pack(moves: Iterable[Move]) -> bytes:
    """Return who and which votes, sorted: the same set is the same bytes. A vote that comes is the same as one that goes."""
    return b"".join(sorted(move.voter.bytes[:8] + _name(move) for move in moves))


def _name(move: Move) -> bytes:
    votes = sorted(vote.bytes for vote in (move.out, move.into) if vote)
    return blake2b(b"".join(votes), digest_size=8).digest()


def _are_large_enough(poll_id: UUID, sets: Sequence[bytes]) -> bool:
    """Return whether each part that the sets make of the poll's voters holds LEAST_VOTERS, or nobody."""
    within: dict[tuple[int, int], int] = {}
    for place, packed in enumerate(sets):
        numbers = memoryview(packed).cast("Q")
        for move in zip(numbers[::2], numbers[1::2], strict=True):
            within[move] = within.get(move, 0) | 1 << place
    if min(Counter(within.values()).values()) < LEAST_VOTERS:
        return False
    # One voter's votes may have come and gone in three ways, of which one is the difference of the others. Rare; nothing is shown then.
    by_voter = Counter(voter for voter, _ in within)
    if max(by_voter.values()) > 2:
        return False
    # Everybody is shown, too: by the results. Whoever counts beyond so many, or not at all, was in no set.
    ballots = results.count_ballots(poll_id)
    if ballots - len(by_voter) >= LEAST_VOTERS:
        return True
    standing = Vote.objects.filter(poll_id=poll_id).exclude(selection=[]).values_list("voter_key", flat=True)
    rest = sum(_number(voter) not in by_voter for voter in standing)
    return rest == 0 or rest >= LEAST_VOTERS


def _number(voter: UUID) -> int:
    return int.from_bytes(voter.bytes[:8], sys.byteorder)


def _describe(selector: Selector) -> dict[str, str]:
    return {name: str(value) for name, value in selector._asdict().items() if value is not None}


def latest(poll_id: UUID, case_id: int) -> Look | None:
    """Return what was last shown of the case."""
    return Look.objects.filter(poll_id=poll_id, kind=LookKind.CASE, case_id=case_id).order_by("-id").first()


# --- What is stored ---------------------------------------------------------------------------------------------------


def changes_of(decision: Decision) -> dict[str, list[int]] | None:
    """Return what a decision changed; None where that is not for anybody. Versions before this one stored it whatever it told."""
    if decision.hides_changes or 0 < decision.votes < LEAST_VOTERS:
        return None
    changes: dict[str, list[int]] = decision.changes
    return changes


def journal_of(entry: JournalEntry, *, reads_tallies: bool) -> dict[str, Any]:
    """Return the entry's changes without the tallies that its reader may not know, and those that tell the choices of too few."""
    changes: Mapping[str, Any] = entry.changes
    if not journal.tells_tallies(entry.action, changes):
        return dict(changes)
    if entry.action == journal.RECOUNTED:
        return dict(changes) if reads_tallies else {}
    if reads_tallies and _tells_enough(changes):
        return dict(changes)
    return {field: value for field, value in changes.items() if field != journal.TALLIES}


def _tells_enough(changes: Mapping[str, Any]) -> bool:
    """Return whether a ruling's entry is of LEAST_VOTERS at least. Of those by versions before, some option must say so by itself."""
    if voters := changes.get("voters"):
        return bool(voters[1] >= LEAST_VOTERS)
    before, after = changes[journal.TALLIES]
    return any(abs(votes - after[option]) >= LEAST_VOTERS for option, votes in before.items())


def lock(poll_id: UUID) -> bool:
    """Have looks at the poll wait for this transaction's end; return whether there is such a poll. Counting goes on."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT FROM polls WHERE id = %s FOR NO KEY UPDATE", [poll_id])
        return bool(cursor.rowcount)
