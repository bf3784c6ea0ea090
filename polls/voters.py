"""Who casts a vote: the client's address, the API client's key, and the voter key that stands for one voter in one poll."""

import hashlib
import hmac
import secrets
import string
from ipaddress import IPv6Address, ip_address
from uuid import UUID, uuid5

from django.conf import settings

# Any fixed value; it only keeps our ids apart from other users of uuid5.
_VOTE_IDS = UUID("5d0a6f3e-52f7-4a0c-9f5e-3e1f6d0c7a11")
_SECRET = hashlib.blake2b(settings.VOTER_SECRET.encode()).digest()


def voter_key(poll_id: UUID, policy: str, voter: str) -> UUID:
    """Return the keyed hash that stands for this voter in this poll; in another poll the same voter has another one.

    128 bits of BLAKE2b, in a uuid because PostgreSQL stores that in 16 bytes without a header.
    """
    return UUID(bytes=hashlib.blake2b(poll_id.bytes + f"{policy}:{voter}".encode(), key=_SECRET, digest_size=16).digest())


def repeated_vote_id(poll_id: UUID, voter: UUID, idempotency_key: str) -> UUID:
    """Return the vote id that every repeat with this key gets, in whichever process it arrives."""
    return uuid5(_VOTE_IDS, f"{poll_id.hex}{voter.hex}{idempotency_key}")


def client_address(peer: str, forwarded_for: str, trusted_proxies: int) -> str:
    """Return the address that the outermost trusted proxy saw, or the peer's own.

    `forwarded_for` is the X-Forwarded-For header, all its lines joined by commas. Counted from the right: what stands
    further left was written by the client and may be forged. Raises ValueError when the header is too short or no address
    stands there, so that a proxy that was set up wrongly is seen instead of making all its users one voter.
    """
    if trusted_proxies == 0:
        return peer
    hops = [hop.strip() for hop in forwarded_for.split(",") if hop.strip()]
    if len(hops) < trusted_proxies:
        raise ValueError("X-Forwarded-For has fewer entries than TRUSTED_PROXIES")
    return str(ip_address(hops[-trusted_proxies]))


def address_voter(address: str) -> str:
    """Return what one voter is by address: the IPv4 address, or the /64 of an IPv6 one. Raises ValueError on anything else."""
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is None:
            return parsed.packed[:8].hex() + "/64"
        parsed = parsed.ipv4_mapped
    return str(parsed)


_ALPHABET = string.ascii_lowercase + string.digits
_LETTERS = string.ascii_letters + string.digits


def new_client_key() -> str:
    """Return a fresh API key, `nxs_<8 characters to know it by>_<43 secret ones>` (256 bits)."""
    prefix = "".join(secrets.choice(_ALPHABET) for _ in range(8))
    return f"nxs_{prefix}_{''.join(secrets.choice(_LETTERS) for _ in range(43))}"


def key_prefix(client_key: str) -> str | None:
    """Return the public part of an API key, or None when it does not look like one."""
    parts = client_key.split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "nxs" and parts[1] and parts[2] else None


def key_hash(client_key: str) -> bytes:
    return hashlib.sha256(client_key.encode()).digest()


def is_key(client_key: str, expected_hash: bytes) -> bool:
    return hmac.compare_digest(key_hash(client_key), expected_hash)
