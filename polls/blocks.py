"""Blocks: networks that the API refuses for a time. Who asks with an API key is not meant: its voters are elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network

from django.db import transaction
from django.db.models import QuerySet

from polls import journal, problems
from polls.journal import Act
from polls.models import Block, Decision, Ruling, SuspiciousIP
from polls.moments import to_microseconds
from polls.networks import WIDEST
from polls.voters import parse_address

LONGEST = timedelta(days=366)


class BlockedNetworks:
    """The blocks of one moment. A look-up costs a look for each prefix length in use, however many blocks there are."""

    def __init__(self, blocks: Iterable[tuple[str, datetime]]) -> None:
        # {(IP version, bits that don't matter): {the others, as a number: until when, in microseconds}}
        self._by_length: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        for network, until in blocks:
            version, bits, number = _place(network)
            self._by_length[version, bits][number] = to_microseconds(until)

    def __bool__(self) -> bool:
        return bool(self._by_length)

    def until(self, address: str, at: int) -> int | None:
        """Return until when the address is blocked at this moment, None where it is not; microseconds since 1970 UTC.

        Raises ValueError on what is no address.
        """
        parsed = parse_address(address)
        number, version = int(parsed), parsed.version
        found = (ends.get(number >> bits, 0) for (of, bits), ends in self._by_length.items() if of == version)
        latest = max(found, default=0)
        return latest if latest > at else None


@lru_cache(maxsize=20_000)
def _place(network: str) -> tuple[int, int, int]:
    """Return IP version, bits that don't matter, and the others as a number. Remembered: every process asks each second."""
    parsed = ip_network(network)
    bits = parsed.max_prefixlen - parsed.prefixlen
    return parsed.version, bits, int(parsed.network_address) >> bits


def active(at: datetime) -> QuerySet[Block]:
    """Return the blocks that are in force at this moment."""
    return Block.objects.filter(until__gt=at)


def in_force(at: datetime) -> BlockedNetworks:
    return BlockedNetworks(active(at).values_list("network", "until"))


def block(network: str, until: datetime, act: Act, case: SuspiciousIP | None = None) -> Block:
    """Have the API refuse an address or network until then; every web process does within two seconds. Again: until another moment.

    Raises Refusal where that can't be.
    """
    wanted = str(_blockable(network))
    if not act.at < until <= act.at + LONGEST:
        raise problems.INVALID.says(f"A block ends in the future, and at most {LONGEST.days} days from now.", pointer="/until")
    journal.require_reason(act)
    fields = {"until": until, "made_at": act.at, "actor": act.actor, "reason": act.reason}
    if case is not None:
        fields["case"] = case
    with transaction.atomic():
        made, _ = Block.objects.update_or_create(network=wanted, defaults=fields)
        _record(Ruling.BLOCK, made, act)
    return made


def lift(block_id: int, act: Act) -> None:
    """Let the network in again, before its time. Raises Refusal where no such block is in force."""
    journal.require_reason(act)
    with transaction.atomic():
        found = active(act.at).select_for_update().filter(pk=block_id).first()
        if found is None:
            raise problems.NOT_FOUND.says("No block has this id, or it has ended.")
        _record(Ruling.UNBLOCK, found, act)
        found.delete()


def purge(at: datetime) -> int:
    """Delete the blocks that have ended; return how many."""
    deleted, _ = Block.objects.filter(until__lte=at).delete()
    return deleted


def _record(ruling: Ruling, about: Block, act: Act) -> None:
    """Add the decision. It outlives the block, so it names no network."""
    cases = [] if about.case_id is None else [about.case_id]
    Decision.objects.create(at=act.at, actor=act.actor, ruling=ruling, reason=act.reason, cases=cases)


def _blockable(text: str) -> IPv4Network | IPv6Network:
    """Return the network; bits beyond its prefix count for nothing. Raises Refusal for none, and for one that is too wide."""
    try:
        if "%" in text:  # a zone, which means something on one machine only
            raise ValueError
        network = _as_ipv4(ip_network(text.strip(), strict=False))
    except ValueError:
        raise problems.INVALID.says(
            "This is no address and no network, such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/64.", pointer="/network"
        ) from None
    if network.prefixlen < (widest := WIDEST[network.version]):
        raise problems.INVALID.says(f"The widest network that can be blocked is a /{widest}.", pointer="/network")
    return network


def _as_ipv4(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    """Return an IPv4 network in IPv6's clothes as what it is: addresses are read so, too (voters.parse_address)."""
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and (address := network.network_address.ipv4_mapped):
        return IPv4Network((address, network.prefixlen - 96))
    return network
