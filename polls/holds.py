"""Holds: which votes rulings keep out of a poll's tally, as counting and review look at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple, Protocol, Self
from uuid import UUID

from polls.ballots import Fate
from polls.models import Hold, Outcome, Reason, Ruling, SuspiciousIP
from polls.models import NetworkKind as Kind
from polls.moments import to_microseconds

HELD: Fate = (Outcome.QUARANTINED, Reason.UNDER_REVIEW)
VOIDED: Fate = (Outcome.REJECTED, Reason.VOIDED)
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


class Holds:
    """The rulings that are in force in one poll."""

    def __init__(self, rulings: Iterable[tuple[Selector, Fate]] = ()) -> None:
        # {subnet key, or None for a time alone: [(address, signature, from, until, fate)]}; moments in microseconds.
        self._by_subnet: dict[UUID | None, list[tuple[UUID | None, int | None, int, int, Fate]]] = defaultdict(list)
        for selector, fate in rulings:
            since = to_microseconds(selector.accepted_from) if selector.accepted_from else 0
            until = to_microseconds(selector.accepted_until) if selector.accepted_until else 2**63
            entry = (selector.address_key, selector.signature_key, since, until, fate)
            self._by_subnet[selector.subnet_key].append(entry)

    def __bool__(self) -> bool:
        return bool(self._by_subnet)

    def fate_of(self, vote: Origin) -> Fate | None:
        """Return what the rulings make of the vote, None where they leave it alone. Void beats quarantine."""
        found = None
        subnets = (None,) if vote.subnet_key is None else (None, vote.subnet_key)
        for subnet in subnets:
            for address, signature, since, until, fate in self._by_subnet.get(subnet, ()):
                if (
                    since <= vote.accepted_at < until
                    and (address is None or address == vote.address_key)
                    and (signature is None or signature == vote.signature_key)
                ):
                    if fate == VOIDED:
                        return fate
                    found = fate
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


def in_force(poll_id: UUID) -> list[tuple[Selector, Fate]]:
    """Return what is kept out of the poll's tally."""
    rows = Hold.objects.filter(poll_id=poll_id, ruling__in=_FATES).values_list(*Selector._fields, "ruling")
    return [(Selector(*row), _FATES[ruling]) for *row, ruling in rows]
