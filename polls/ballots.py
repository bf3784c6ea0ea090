"""Ballots: what a poll lets a voter choose, and which of a voter's votes stands."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar
from uuid import UUID

from polls import problems, voters
from polls.models import Outcome, Reason

Selection = tuple[int, ...]
Fate = tuple[Outcome, Reason]

# A withdrawal is a vote for nothing: it travels, competes and stands like any other.
WITHDRAWAL: Selection = ()


def select(chosen: Sequence[str], options: Mapping[str, int], min_choices: int, max_choices: int, *, pointer: str) -> Selection:
    """Return the selection that these option ids (as in the API) make; raises Refusal when the poll does not take it.

    `options`: {id as in the API: id as in the tables}; `pointer` names the field they came in.
    """
    if not min_choices <= len(chosen) <= max_choices:
        wanted = str(min_choices) if min_choices == max_choices else f"{min_choices} to {max_choices}"
        raise problems.WRONG_CHOICES.says(f"This poll takes {wanted} of its options, not {len(chosen)}.", pointer=pointer)
    try:
        selection: Selection = (options[chosen[0]],) if len(chosen) == 1 else tuple(sorted({options[option] for option in chosen}))
    except KeyError:
        raise problems.UNKNOWN_OPTION.says("Choose among the options that the poll lists, by their ids.", pointer=pointer) from None
    if len(selection) != len(chosen):
        raise problems.WRONG_CHOICES.says("The same option stands twice.", pointer=pointer)
    return selection


def is_countable(selection: Selection, options: Collection[int]) -> bool:
    """Return whether counting may add the selection up: options of the poll, each once, or a withdrawal."""
    return all(option in options for option in selection) and all(a < b for a, b in pairwise(selection))


def tallied_as(selection: Selection, method: str) -> Iterable[Selection]:
    """Return the tallies that a ballot adds one to."""
    if selection == WITHDRAWAL:
        return []
    if method == "single":
        return [selection]
    return [(), *((option,) for option in selection)]


class Ballot(Protocol):
    """What deciding needs to know of a vote."""

    vote_id: UUID
    selection: Selection
    accepted_at: int


B = TypeVar("B", bound=Ballot)


def decide(votes: Iterable[B], *, last_stands: bool) -> tuple[B, list[tuple[B, Fate]]]:
    """Return which of a voter's votes stands, and what becomes of each other one.

    A function of the set of votes alone: no order of arrival changes it. Of the votes with one Idempotency-Key the first
    competes. Of these the last stands, or the first; then a later withdrawal takes it back for good.
    """
    by_rank = sorted(votes, key=lambda vote: (vote.accepted_at, vote.vote_id))
    competing: dict[bytes, B] = {}
    reused: list[B] = []
    for vote in by_rank:
        name = voters.request_name(vote.vote_id)
        if name in competing:
            reused.append(vote)
        else:
            competing[name] = vote
    contest = list(competing.values())
    if last_stands:
        winner = contest[-1]
        fate: Fate = (Outcome.SUPERSEDED, Reason.WITHDRAWN if winner.selection == WITHDRAWAL else Reason.CHANGED)
        fates = [(vote, fate) for vote in contest if vote is not winner]
    else:
        first = next((vote for vote in contest if vote.selection != WITHDRAWAL), contest[0])
        later = contest[contest.index(first) + 1 :]
        winner = next((vote for vote in later if vote.selection == WITHDRAWAL != first.selection), first)
        fates = []
        for vote in contest:
            if vote is first and vote is not winner:
                fates.append((vote, (Outcome.SUPERSEDED, Reason.WITHDRAWN)))
            elif vote is not winner:
                taken_back_nothing = vote not in later
                fates.append((vote, (Outcome.SUPERSEDED, Reason.CHANGED) if taken_back_nothing else (Outcome.REJECTED, Reason.DUPLICATE)))
    return winner, fates + [(vote, (Outcome.REJECTED, Reason.KEY_REUSED)) for vote in reused]
