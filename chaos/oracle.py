"""The oracle: judges what is in the tables by what the clients noted. It shares no code with the product."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from sys import intern
from typing import Any

from chaos import ledger
from chaos.ledger import Vote

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Verdict:
    """What the oracle found; nothing may be in `faults`."""

    attempts: int = 0
    accepted: int = 0  # votes with a 202, each once
    unclear: int = 0  # attempts without a definite answer
    lost: int = 0  # 202, and no outcome
    doubled: int = 0  # more than one outcome
    unexpected: int = 0  # stored, and nobody can have sent it
    wrong: int = 0  # voters with another vote standing than the rule says
    drifted: int = 0  # tallies that were not the count of the votes, whenever somebody looked
    longest_answer: float = 0.0  # seconds
    longest_stall: float = 0.0  # seconds between two 202s, the end of the run left out
    longest_return: float = 0.0  # seconds until votes were accepted again after a server had come back
    # {type of problem: attempts}
    refused: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return self.lost + self.doubled + self.unexpected + self.wrong + self.drifted


@dataclass(slots=True)
class _Known:
    """What is known of one vote: of all attempts with its key and choice."""

    vote: Vote
    id: str | None = None
    # The earliest moment in which it was certainly accepted, and the first in which it may have been (microseconds).
    accepted_at: int | None = None
    maybe_at: int | None = None
    attempts: int = 0


@dataclass(frozen=True)
class Tables:
    """What was found in the database at the end."""

    # {vote id: how many outcomes it has}
    outcomes: Mapping[str, int]
    # Ids of the votes that stand.
    standing: frozenset[str]


def judge(
    notes: Iterable[Path],
    tables: Tables,
    last_stands: Mapping[str, bool],
    drift: Iterable[Any],
    *,
    returns: Sequence[tuple[int, int]] = (),
    clock_error: int = 0,
    forgotten: tuple[Collection[str], int] = ((), 0),
) -> Verdict:
    """Return the verdict.

    `last_stands`: {poll id: whether a voter's last vote stands, else the first}. `returns`: when a server was back, and when the next
    fault came. `clock_error`: how far the product's clocks may be from the clients'. `forgotten`: ids of votes that were lost with the
    database, by a moment; what was said of them before is void. All in microseconds (since 1970).
    """
    verdict = Verdict(drifted=len(list(drift)))
    votes = _read(notes, verdict, returns, clock_error, forgotten)
    by_id = {vote.id: vote for vote in votes if vote.id}
    verdict.accepted = len(by_id)

    for id in by_id.keys() - tables.outcomes.keys():
        verdict.lost += 1
        _show(verdict, f"lost: {id} {by_id[id].vote}")
    for id, times in tables.outcomes.items():
        if times > 1:
            verdict.doubled += 1
            _show(verdict, f"{times} outcomes: {id}")
    # Votes that nobody was told about may be there, but not more than were sent without an answer.
    untold = len(tables.outcomes.keys() - by_id.keys())
    never_answered = sum(vote.id is None and vote.maybe_at is not None for vote in votes)
    verdict.unexpected = max(0, untold - never_answered)
    if verdict.unexpected:
        _show(verdict, f"{untold} votes stored without a 202, {never_answered} sent without an answer")

    by_voter: dict[tuple[str, str], list[_Known]] = defaultdict(list)
    for vote in votes:
        by_voter[vote.vote.poll, vote.vote.voter].append(vote)
    for (poll, voter), theirs in by_voter.items():
        stands = {vote.id for vote in theirs if vote.id in tables.standing}
        possible = _possible_winners(theirs, last_stands=last_stands[poll])
        if len(stands) > 1 or not (stands <= possible if stands else (None in possible or not possible)):
            verdict.wrong += 1
            _show(verdict, f"wrong: {voter} in {poll}: {stands} stands, {possible} may; {theirs}")
    return verdict


def _possible_winners(votes: list[_Known], *, last_stands: bool) -> set[str | None]:
    """Return the ids that may stand, None for a vote whose id nobody was told.

    The first, or last, by (accepted_at, id). A vote with an unclear attempt may have been accepted any time from then until
    its 202, or ever after; of two with one key only the first counts.
    """
    # Each vote as (earliest, latest) moment of acceptance; without unclear attempts both are one.
    spans = []
    for vote in votes:
        if vote.accepted_at is None and vote.maybe_at is None:
            continue  # refused
        latest = vote.accepted_at if vote.accepted_at is not None else 2**62
        earliest = latest if vote.maybe_at is None else min(latest, vote.maybe_at)
        spans.append((vote, earliest, latest))
    # A misused key: only the first of its votes competes; where moments are unclear, any of them may.
    by_key: dict[str, list[tuple[_Known, int, int]]] = defaultdict(list)
    for span in spans:
        by_key[span[0].vote.key].append(span)
    competing = [
        (vote, earliest, latest)
        for same in by_key.values()
        for vote, earliest, latest in same
        if not any(other is not vote and (end, other.id or "") < (earliest, vote.id or "") for other, _, end in same)
    ]
    # What is certain to compete beats a vote that lies wholly after it, or before.
    certain = [span for span in competing if span[0].accepted_at is not None and len(by_key[span[0].vote.key]) == 1]
    possible: set[str | None] = set()
    for vote, earliest, latest in competing:
        if last_stands:
            beaten = any((begin, o.id or "") > (latest, vote.id or "") for o, begin, _ in certain if o is not vote)
        else:
            beaten = any((end, o.id or "") < (earliest, vote.id or "") for o, _, end in certain if o is not vote)
        if not beaten:
            possible.add(vote.id)
    return possible


def _read(
    notes: Iterable[Path],
    verdict: Verdict,
    returns: Sequence[tuple[int, int]],
    clock_error: int,
    forgotten: tuple[Collection[str], int],
) -> list[_Known]:
    """Read the ledgers; fill in what the verdict says of the answers."""
    known: dict[Vote, _Known] = {}
    accepted_moments: list[int] = []
    void_ids, void_until = forgotten
    for path in notes:
        under_way: dict[int, tuple[_Known, int]] = {}
        for kind, attempt, at, *rest in ledger.read(path):
            if kind == "sent":
                vote = Vote(intern(rest[0]), rest[1], intern(rest[2]), rest[3])
                under_way[attempt] = (known.setdefault(vote, _Known(vote)), at)
                verdict.attempts += 1
                continue
            status, id, accepted_at, problem = rest
            entry, sent_at = under_way.pop(attempt)
            verdict.longest_answer = max(verdict.longest_answer, (at - sent_at) / 1e6)
            if status == 202:
                moment = _microseconds(accepted_at)
                entry.id = id
                if at > void_until or id not in void_ids:
                    entry.accepted_at = moment if entry.accepted_at is None else min(entry.accepted_at, moment)
                accepted_moments.append(at)
            elif status == 0 or status >= 500:
                _note_unclear(verdict, entry, sent_at - clock_error)
            else:
                named = problem or str(status)
                verdict.refused[named] = verdict.refused.get(named, 0) + 1
        for entry, sent_at in under_way.values():
            _note_unclear(verdict, entry, sent_at - clock_error)
    accepted_moments.sort()
    verdict.longest_stall = max((later - earlier for earlier, later in pairwise(accepted_moments)), default=0) / 1e6
    for back_at, next_fault_at in returns:
        following = accepted_moments[bisect_right(accepted_moments, back_at) :][:1]
        verdict.longest_return = max(verdict.longest_return, (min([*following, next_fault_at]) - back_at) / 1e6)
    return list(known.values())


def _note_unclear(verdict: Verdict, entry: _Known, earliest: int) -> None:
    verdict.unclear += 1
    entry.maybe_at = earliest if entry.maybe_at is None else min(entry.maybe_at, earliest)


def _microseconds(moment: str) -> int:
    return (datetime.fromisoformat(moment) - _EPOCH) // timedelta(microseconds=1)


def _show(verdict: Verdict, text: str) -> None:
    if len(verdict.examples) < 20:
        verdict.examples.append(text)
