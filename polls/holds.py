"""Holds: which votes rulings keep out of a poll's tally, as counting and review look at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from operator import itemgetter
from typing import NamedTuple, Protocol, Self
from uuid import UUID

from polls.ballots import Fate
from polls.models import Hold, Outcome, Reason, Ruling, SuspiciousIP
from polls.models import NetworkKind as Kind
from polls.moments import to_microseconds

HELD: Fate = (Outcome.QUARANTINED, Reason.UNDER_REVIEW)
VOIDED: Fate = (Outcome.REJECTED, Reason.VOIDED)
# What the other rulings make of a vote is nothing.
_FATES = {Ruling.QUARANTINE.value: HELD, Ruling.VOID.value: VOIDED}


class Origin(Protocol):
    """What a hold looks at in a vote."""

    @property
    def accepted_at(self) -> int: ...  # microseconds since 1970 UTC

    @property
    def address_key(self) -> UUID | None: ...

    @property
    def subnet_key(self) -> UUID | None: ...

    @property
    def signature_key(self) -> int | None: ...


class Selector(NamedTuple):
    """Votes of one poll, by where they came from and when: those that fit all that is said, which is a subnet or two moments at least."""

    address_key: UUID | None = None
    subnet_key: UUID | None = None  # also beside an address
    signature_key: int | None = None
    accepted_from: datetime | None = None
    accepted_until: datetime | None = None  # not included

    @classmethod
    def of_case(cls, case: SuspiciousIP) -> Self:
        return cls(case.network_key if case.kind == Kind.ADDRESS else None, case.subnet_key, case.signature_key)


class Rule(NamedTuple):
    """One ruling: on which votes, what it makes of them (None: nothing any more), and whose case's it is, if one's."""

    selector: Selector
    fate: Fate | None
    case: int | None = None


class Holds:
    """The rulings on one poll's votes, in their order.

    A case's ruling stands until the case has another. One without a case also ends all that fit the vote and came before it.
    """

    def __init__(self, rulings: Iterable[Rule] = ()) -> None:
        # {subnet key, or None for a time alone: [(order, rule, moments in microseconds)]}
        self._by_subnet: dict[UUID | None, list[tuple[int, Rule, int, int]]] = defaultdict(list)
        for order, rule in enumerate(rulings):
            since = to_microseconds(rule.selector.accepted_from) if rule.selector.accepted_from else 0
            until = to_microseconds(rule.selector.accepted_until) if rule.selector.accepted_until else 2**63
            self._by_subnet[rule.selector.subnet_key].append((order, rule, since, until))

    def __bool__(self) -> bool:
        return bool(self._by_subnet)

    def fate_of(self, vote: Origin) -> Fate | None:
        """Return what the rulings make of the vote, None where they leave it alone. Void beats quarantine."""
        fitting = self._by_subnet.get(None, [])
        if vote.subnet_key is not None and (of_subnet := self._by_subnet.get(vote.subnet_key)):
            fitting = sorted(fitting + of_subnet, key=itemgetter(0)) if fitting else of_subnet
        found = None
        for _, (selector, fate, case), since, until in fitting:
            if (
                since <= vote.accepted_at < until
                and selector.address_key in (None, vote.address_key)
                and selector.signature_key in (None, vote.signature_key)
            ):
                found = VOIDED if case and found == VOIDED else fate
        return found


NO_HOLDS = Holds()
_known: dict[UUID, tuple[int, Holds]] = {}


def holds_of(poll_id: UUID, version: int) -> Holds:
    """Return the poll's holds; `version` is its `holds_version`, read in this transaction. Remembered until that changes."""
    if version == 0:
        return NO_HOLDS
    known = _known.get(poll_id)
    if known is None or known[0] != version:
        if len(_known) >= 1000:
            _known.clear()  # rare and cheap: each is one query to read again
        known = _known[poll_id] = (version, Holds(in_force(poll_id)))
    return known[1]


def in_force(poll_id: UUID) -> list[Rule]:
    """Return the rulings that matter in the poll, in their order."""
    rows = Hold.objects.filter(poll_id=poll_id).order_by("version", "id").values_list(*Selector._fields, "ruling", "case_id")
    rules = [Rule(Selector(*row), _FATES.get(ruling), case_id) for *row, ruling, case_id in rows]
    return [rule for rule in rules if rule.fate or not rule.case]
