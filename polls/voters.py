"""Who casts a vote: addresses, voter tokens, API keys, and the voter key that stands for one voter in one poll."""

import base64
import hashlib
import hmac
import secrets
import string
import time
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from random import getrandbits
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from django.conf import settings

from polls import keys


def _uuid(content: bytes) -> UUID:
    """Return `UUID(bytes=content)`, in a quarter of the time."""
    return msgspec.convert(content, UUID)


class VoterKeys:
    """The keyed hashes that stand for the voters of one poll; in another poll the same voter has another one.

    `salt` is the poll's `voter_salt`: once that is deleted, nobody finds out by trying whose key it is. Polls of before it have none.
    128 bits of BLAKE2b, in a uuid because PostgreSQL stores that in 16 bytes without a header.
    """

    def __init__(self, poll_id: UUID, policy: str, salt: bytes | memoryview | None, of: keys.Keys = keys.OWN) -> None:
        # Begun once: a copy of it takes a third of the time of a new one.
        self._begun = hashlib.blake2b(poll_id.bytes + f"{policy}:".encode(), key=of.voters, salt=salt or b"", digest_size=16)

    def of(self, voter: str) -> UUID:
        hashed = self._begun.copy()
        hashed.update(voter.encode())
        return _uuid(hashed.digest())


# The first bytes of a vote id name the request, the others what it chose.
_NAME_BYTES = 12


class VoteIds:
    """The ids of one poll's votes: with an Idempotency-Key the same for every repeat, in whichever process it arrives.

    The same key with another choice gives an id that differs in its last 4 bytes only, so that counting sees the misuse. Both parts
    are keyed hashes of voter and key, so an id tells neither the choice nor whether two voters chose the same, and nobody can try keys.
    """

    def __init__(self, of: keys.Keys = keys.OWN) -> None:
        self._begun = hashlib.blake2b(key=of.vote_ids, digest_size=_NAME_BYTES)

    def of(self, voter: UUID, idempotency_key: str | None, selection: tuple[int, ...]) -> UUID:
        """Return the vote's id. `voter` is a voter key, so ids of different polls never meet."""
        if idempotency_key is None:
            # Nobody gains by guessing it, for its receipt is signed. uuid4 asks the kernel for secrets, which takes three times as long.
            return _uuid(getrandbits(128).to_bytes(16))
        hashed = self._begun.copy()
        hashed.update(voter.bytes + idempotency_key.encode())
        name = hashed.digest()
        hashed.update(_chosen(selection))
        return _uuid(name + hashed.digest()[: 16 - _NAME_BYTES])

    def shown(self, vote_id: UUID) -> UUID:
        """Return the id as it is shown to anybody: in answers, receipts and logs."""
        return vote_id


class FormerVoteIds(VoteIds):
    """The ids in polls that took votes before ids were keyed: made as then, so that a repeat meets its first copy.

    Their last bytes are a plain hash of the choice. So they stay inside: what is shown is the id in one block of AES.
    """

    def __init__(self, of: keys.Keys = keys.OWN) -> None:
        super().__init__(of)
        self._cipher = Cipher(algorithms.AES(of.shown_ids), modes.ECB())  # noqa: S305 - one block

    def of(self, voter: UUID, idempotency_key: str | None, selection: tuple[int, ...]) -> UUID:
        if idempotency_key is None:
            return super().of(voter, None, selection)
        name = hashlib.blake2b(voter.bytes + idempotency_key.encode(), digest_size=_NAME_BYTES).digest()
        return _uuid(name + hashlib.blake2b(repr(selection).encode(), digest_size=16 - _NAME_BYTES).digest())

    def shown(self, vote_id: UUID) -> UUID:
        return _uuid(self._cipher.encryptor().update(vote_id.bytes))

    def hidden(self, shown_id: UUID) -> UUID:
        """Return the id that is shown so."""
        return _uuid(self._cipher.decryptor().update(shown_id.bytes))


def vote_ids_of(of: keys.Keys, *, are_keyed: bool) -> VoteIds:
    return VoteIds(of) if are_keyed else FormerVoteIds(of)


@lru_cache(maxsize=100)
def vote_ids_known(voter_secret: bytes | None, *, are_keyed: bool) -> VoteIds | None:
    """Return the ids of polls with this VOTER_SECRET, by its fingerprint; None where this process does not have it."""
    try:
        return vote_ids_of(keys.of(voter_secret), are_keyed=are_keyed)
    except keys.UnknownSecretError:
        return None


@lru_cache(maxsize=10_000)
def _chosen(selection: tuple[int, ...]) -> bytes:
    return b"\0" + repr(selection).encode()  # no Idempotency-Key has a zero


def request_name(vote_id: UUID) -> bytes:
    """Return the part of a vote id that all votes with one Idempotency-Key share."""
    return vote_id.bytes[:_NAME_BYTES]


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
    packed = pack(hops[-trusted_proxies])
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)  # one spelling for all


def address_voter(address: str) -> str:
    """Return what one voter is by address: the IPv4 address, or the /64 of an IPv6 one. Raises ValueError on anything else."""
    packed = pack(address)
    if len(packed) == 16:
        return packed[:8].hex() + "/64"
    return inet_ntop(AF_INET, packed) if ":" in address else address  # an IPv4 address has no other spelling of its own


def is_in(address: str, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    """Return whether one of the networks holds the address. Raises ValueError on what is no address."""
    parsed = parse_address(address)
    return any(parsed in network for network in networks)


IPV4_IN_IPV6 = bytes(10) + b"\xff\xff"


def pack(address: str) -> bytes:
    """Return the address in 4 or 16 bytes, without its zone; an IPv4 one in IPv6's clothes as IPv4. Raises ValueError on anything else.

    By the system's own function: each voter has another address, and to make an object of it would take ten times as long.
    """
    try:
        return inet_pton(AF_INET, address)
    except (OSError, ValueError):  # ValueError: not in ASCII, or a NUL
        pass
    try:
        packed = inet_pton(AF_INET6, address.partition("%")[0])
    except (OSError, ValueError):
        raise ValueError("this does not appear to be an IPv4 or IPv6 address") from None
    return packed[12:] if packed.startswith(IPV4_IN_IPV6) else packed


@lru_cache(maxsize=10_000)
def parse_address(address: str) -> IPv4Address | IPv6Address:
    """Return what `pack` does, as an object."""
    return ip_address(pack(address))


class _Claims(msgspec.Struct):
    """What an access token says, as far as it matters here."""

    token_type: str
    exp: int
    user_id: str


_claims = msgspec.json.Decoder(_Claims)
# Every token of ours begins like this. One that begins otherwise, such as with another algorithm, is none.
_JWT_HEADER = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode() + "."
# Tokens that were signed before SECRET_KEY was rotated are good to their end.
_JWT_KEYS = [key.encode() for key in (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)]


def account_of(access_token: str) -> str | None:
    """Return the id of the account that signed in for this access token; None for a token that is expired, wrong or none.

    By its signature alone: a changed password or a deactivated account ends it with its life (ACCESS_TOKEN_MINUTES). Not by
    PyJWT, which takes five to eight times as long (21 to 41 microseconds): a quarter of the votes a second.
    """
    signed, _, signature = access_token.rpartition(".")
    if not signed.startswith(_JWT_HEADER) or not signature.isascii():
        return None
    content, given = signed.encode("utf-8", "replace"), signature.encode()
    if not any(hmac.compare_digest(given, _jwt_signature(content, key)) for key in _JWT_KEYS):
        return None
    payload = signed[len(_JWT_HEADER) :]
    claims = _claims.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))  # ours, so well made
    return claims.user_id if claims.token_type == "access" and claims.exp > time.time() else None  # noqa: S105 - no password


def _jwt_signature(content: bytes, key: bytes) -> bytes:
    return base64.urlsafe_b64encode(hmac.digest(key, content, "sha256")).rstrip(b"=")


_TOKEN_BYTES, _TOKEN_MAC_BYTES = 16, 12


def new_voter_token(poll_id: UUID, of: keys.Keys = keys.OWN) -> str:
    """Return a fresh anonymous voter token for this poll, 38 URL-safe characters. Nothing is stored: its signature is its proof."""
    content = secrets.token_bytes(_TOKEN_BYTES)
    return base64.urlsafe_b64encode(content + _token_mac(poll_id, content, of)).rstrip(b"=").decode()


def is_voter_token(poll_id: UUID, token: str, of: keys.Keys = keys.OWN) -> bool:
    """Return whether this installation made the token, for this poll."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return False
    content, mac = raw[:_TOKEN_BYTES], raw[_TOKEN_BYTES:]
    # One spelling only: base64 lets the last character differ in bits that carry nothing, and a token is one voter.
    return (
        len(raw) == _TOKEN_BYTES + _TOKEN_MAC_BYTES
        and hmac.compare_digest(mac, _token_mac(poll_id, content, of))
        and base64.urlsafe_b64encode(raw).rstrip(b"=") == token.encode()
    )


def _token_mac(poll_id: UUID, content: bytes, of: keys.Keys) -> bytes:
    return hashlib.blake2b(poll_id.bytes + content, key=of.tokens, digest_size=_TOKEN_MAC_BYTES).digest()


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


# "Api-Key ", and a key; what is longer is none, and not worth remembering.
_LONGEST_AUTHORIZATION = 100


@lru_cache(maxsize=10_000)
def client_key_of(authorization: str) -> tuple[str, bytes] | None:
    """Return prefix and hash of the API key in this Authorization header; None when there is none."""
    scheme, _, client_key = authorization.partition(" ")
    client_key = client_key.strip()
    if len(authorization) > _LONGEST_AUTHORIZATION or scheme.lower() != "api-key" or not (prefix := key_prefix(client_key)):
        return None
    return prefix, key_hash(client_key)


def key_hash(client_key: str) -> bytes:
    return hashlib.sha256(client_key.encode()).digest()


def is_key(client_key: str, expected_hash: bytes) -> bool:
    return hmac.compare_digest(key_hash(client_key), expected_hash)
