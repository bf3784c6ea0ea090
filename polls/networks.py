"""Networks: addresses and subnets as votes hold them: encrypted, so that they group, and are readable while their secret lives."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from uuid import UUID

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q

from polls import keys, voter_secrets
from polls.models import NetworkKind, NetworkSecret, Poll
from polls.voters import IPV4_IN_IPV6, pack

# The shortest prefix, by IP version, that is blocked, or allowed past the limits: a provider's network, and nobody means half the internet.
WIDEST = {4: 16, 6: 32}

# After this time every web process makes its keys with a poll's new secret.
_KNOWN_EVERYWHERE_AFTER = timedelta(seconds=2 * settings.POLL_SNAPSHOT_SECONDS + 1)


class NetworkCipher:
    """Encrypts addresses and subnets, each in one block of AES (as ipcrypt-deterministic does): equal ones look equal, no more is seen.

    Needs both the secret from the database and VOTER_SECRET, so a copy of one alone opens nothing. `keys` is not for several
    threads at once.
    """

    def __init__(self, secret: bytes, of: keys.Keys = keys.OWN) -> None:
        def derived(purpose: bytes, size: int) -> bytes:
            return hashlib.blake2b(secret, key=of.networks, person=purpose, digest_size=size).digest()

        self._signature_key = derived(b"signatures", 32)
        self._addresses = Cipher(algorithms.AES(derived(b"addresses", 16)), modes.ECB())  # noqa: S305 - one block each
        self._subnets = Cipher(algorithms.AES(derived(b"subnets", 16)), modes.ECB())  # noqa: S305
        self._encrypt_address = self._addresses.encryptor()
        self._encrypt_subnet = self._subnets.encryptor()
        self.keys = lru_cache(maxsize=10_000)(self._keys)
        self.signature = lru_cache(maxsize=1000)(self._signature)

    def _keys(self, address: str) -> tuple[UUID, UUID]:
        """Return the keys of the address and of its subnet (/24, IPv6: /64). Raises ValueError on what is no address."""
        packed = _packed(address)
        subnet = packed[:15] + b"\0" if _is_ipv4(packed) else packed[:8] + bytes(8)
        return UUID(bytes=self._encrypt_address.update(packed)), UUID(bytes=self._encrypt_subnet.update(subnet))

    def _signature(self, browser: bytes) -> int:
        """Return the keyed hash of what a browser says of itself, as a signed number of 64 bits."""
        return int.from_bytes(hashlib.blake2b(browser, key=self._signature_key, digest_size=8).digest(), signed=True)

    def address_of(self, address_key: UUID) -> IPv4Network | IPv6Network:
        """Return the address, as a network of one. One of another secret comes out as nonsense."""
        packed = self._addresses.decryptor().update(address_key.bytes)
        return ip_network(packed[12:] if _is_ipv4(packed) else packed)

    def subnet_of(self, subnet_key: UUID) -> IPv4Network | IPv6Network:
        """Return the subnet. Raises ValueError on one of another secret: that it were a subnet is a chance of one in 2 ** 64."""
        packed = self._subnets.decryptor().update(subnet_key.bytes)
        return ip_network((packed[12:], 24) if _is_ipv4(packed) else (packed, 64))


def _packed(address: str) -> bytes:
    packed = pack(address)
    return packed if len(packed) == 16 else IPV4_IN_IPV6 + packed


def _is_ipv4(packed: bytes) -> bool:
    return packed.startswith(IPV4_IN_IPV6)


@lru_cache(maxsize=100)
def cipher_of(secret: bytes, voter_secret: bytes | None = None) -> NetworkCipher:
    """Return the cipher of a NetworkSecret's `secret` and `voter_secret`."""
    return NetworkCipher(secret, keys.of(voter_secret))


def cipher_for(poll: Poll) -> NetworkCipher:
    """Return what the keys of the poll's next votes are made with. Raises LookupError when it has none."""
    if poll.network_secret is None:
        raise LookupError("the poll has no network secret")
    return _cipher(poll.network_secret)


def _cipher(secret: NetworkSecret) -> NetworkCipher:
    return cipher_of(bytes(secret.secret), secret.voter_secret and bytes(secret.voter_secret))


def reveal(network_secret: NetworkSecret | None, kind: str, network_key: UUID, subnet_key: UUID | None = None) -> str | None:
    """Return the network that a key stands for, such as "192.0.2.7/32" or "2001:db8::/64"; None once its secret is gone.

    None, too, for a key of another secret: told for subnets, and for addresses whose subnet key is given.
    """
    if network_secret is None:
        return None
    try:
        cipher = _cipher(network_secret)
        if kind == NetworkKind.SUBNET:
            return str(cipher.subnet_of(network_key))
        address = cipher.address_of(network_key)
        subnet = None if subnet_key is None else cipher.subnet_of(subnet_key)
    except (ValueError, keys.UnknownSecretError):
        return None
    return str(address) if subnet is None or address.network_address in subnet else None


def can_be_read() -> bool:
    """Return False when the newest polls' votes hold subnets that VOTER_SECRET does not open; True also when there are none."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT s.secret, v.subnet_key
            FROM (SELECT * FROM polls WHERE voter_policy IN ('ip', 'session', 'account') ORDER BY created_at DESC LIMIT 20) p
            JOIN network_secrets s ON s.id = p.network_secret_id
            CROSS JOIN LATERAL (
                SELECT subnet_key FROM votes
                WHERE poll_id = p.id AND subnet_key IS NOT NULL AND accepted_at > p.network_secret_since LIMIT 1
            ) v
            """
        )
        found = [(bytes(secret), subnet_key) for secret, subnet_key in cursor]
    for secret, subnet_key in found:
        try:
            cipher_of(secret).subnet_of(subnet_key)
        except ValueError:
            return False
    return True


# --- The life of secrets ----------------------------------------------------------------------------------------------


def current_secret(at: datetime) -> NetworkSecret:
    """Return the secret that new polls get; makes the first one."""
    return _newest() or rotate(at)


def rotate(at: datetime) -> NetworkSecret:
    """Return the secret that new polls get: another one after NETWORK_SECRET_ROTATE_DAYS, which polls that have not opened get, too.

    And another one once VOTER_SECRET was changed (voter_secrets.rotate).

    An open poll keeps its own, so that its limits per network stay exact. Repeatable; two at once make one.
    """
    with transaction.atomic():
        _lock()
        newest, voter_secret = _newest(), voter_secrets.current()
        is_current = newest and (voter_secret is None or newest.voter_secret is None or bytes(newest.voter_secret) == voter_secret)
        if newest and is_current and at < newest.made_at + timedelta(days=settings.NETWORK_SECRET_ROTATE_DAYS):
            return newest
        newest = NetworkSecret.objects.create(secret=secrets.token_bytes(32), voter_secret=voter_secret, made_at=at)
        not_open = Q(published_at=None) | Q(opens_at__gt=at + _KNOWN_EVERYWHERE_AFTER)
        Poll.objects.filter(not_open).update(network_secret=newest, network_secret_since=at)
    return newest


def purge(at: datetime) -> int:
    """Delete the secrets made NETWORK_SECRET_KEEP_DAYS ago, and voter salts that long after their poll's end; return how many secrets.

    From then on nobody reads the addresses that were encrypted with them. Polls that still used one go over to the newest: in one
    that is open, limits per network begin anew. Repeatable; two at once do it once.
    """
    before = at - timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS)
    with transaction.atomic():
        newest = rotate(at)
        expired = NetworkSecret.objects.filter(made_at__lt=before)
        Poll.objects.filter(network_secret__in=expired).update(network_secret=newest, network_secret_since=at + _KNOWN_EVERYWHERE_AFTER)
        deleted = expired.count()
        expired.delete()
        # Final ones only: any other may take votes again, and then needs its voters' keys to be the same.
        Poll.objects.filter(finalised_at__isnull=False, closes_at__lt=before, voter_salt__isnull=False).update(voter_salt=None)
    return deleted


def _newest() -> NetworkSecret | None:
    return NetworkSecret.objects.order_by("-made_at", "-id").first()


def _lock() -> None:
    """Let nobody else make or delete secrets until the end of the transaction, which may take its time; reading goes on."""
    with connection.cursor() as cursor:
        # All polls that there ever were may have to go over to another one: 100,000 of them take 7 s.
        cursor.execute("SET LOCAL statement_timeout = '10min'")
        cursor.execute("LOCK TABLE network_secrets IN SHARE ROW EXCLUSIVE MODE")
