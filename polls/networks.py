"""Networks: addresses and subnets as votes hold them: encrypted, so that they group, and are readable while their secret lives."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from uuid import UUID

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from django.conf import settings

from polls.models import NetworkSecret, Poll
from polls.voters import parse_address

_SECRET = hashlib.blake2b(settings.VOTER_SECRET.encode(), person=b"networks").digest()


class NetworkCipher:
    """Encrypts addresses and subnets, each in one block of AES (as ipcrypt-deterministic does): equal ones look equal, no more is seen.

    Needs both the secret from the database and VOTER_SECRET, so a copy of one alone opens nothing. Not for several threads at once.
    """

    def __init__(self, secret: bytes) -> None:
        self._signature_key = _derived(secret, b"signatures", 32)
        self._addresses = Cipher(algorithms.AES(_derived(secret, b"addresses", 16)), modes.ECB())  # noqa: S305 - one block each
        self._subnets = Cipher(algorithms.AES(_derived(secret, b"subnets", 16)), modes.ECB())  # noqa: S305
        self._encrypt_address = self._addresses.encryptor()
        self._encrypt_subnet = self._subnets.encryptor()
        self.keys = lru_cache(maxsize=10_000)(self._keys)

    def _keys(self, address: str) -> tuple[UUID, UUID]:
        """Return the keys of the address and of its subnet (/24, IPv6: /64). Raises ValueError on what is no address."""
        packed = _packed(address)
        subnet = packed[:15] + b"\0" if _is_ipv4(packed) else packed[:8] + bytes(8)
        return UUID(bytes=self._encrypt_address.update(packed)), UUID(bytes=self._encrypt_subnet.update(subnet))

    def address_of(self, address_key: UUID) -> IPv4Network | IPv6Network:
        """Return the address, as a network of one. One of another secret comes out as nonsense."""
        packed = self._addresses.decryptor().update(address_key.bytes)
        return ip_network(packed[12:] if _is_ipv4(packed) else packed)

    def subnet_of(self, subnet_key: UUID) -> IPv4Network | IPv6Network:
        packed = self._subnets.decryptor().update(subnet_key.bytes)
        return ip_network((packed[12:], 24) if _is_ipv4(packed) else (packed, 64), strict=False)


_IPV4_IN_IPV6 = bytes(10) + b"\xff\xff"


def _packed(address: str) -> bytes:
    parsed = parse_address(address)
    return parsed.packed if isinstance(parsed, IPv6Address) else _IPV4_IN_IPV6 + parsed.packed


def _is_ipv4(packed: bytes) -> bool:
    return packed.startswith(_IPV4_IN_IPV6)


def _derived(secret: bytes, purpose: bytes, size: int) -> bytes:
    return hashlib.blake2b(secret, key=_SECRET, person=purpose, digest_size=size).digest()


@lru_cache(maxsize=100)
def cipher_of(secret: bytes) -> NetworkCipher:
    return NetworkCipher(secret)


def current_secret(at: datetime) -> NetworkSecret:
    """Return the secret that new polls get; makes the first one."""
    return NetworkSecret.objects.order_by("-id").first() or NetworkSecret.objects.create(secret=secrets.token_bytes(32), made_at=at)


def secret_of(poll: Poll) -> bytes:
    """Return what the keys of the poll's next votes are made with. Raises LookupError when it has none."""
    if poll.network_secret is None:
        raise LookupError("the poll has no network secret")
    return bytes(poll.network_secret.secret)
