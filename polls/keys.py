"""Keys: what is derived from VOTER_SECRET, one key for each purpose, and which VOTER_SECRET is which."""

from __future__ import annotations

import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from django.conf import settings

# What is sealed is filled up to a multiple of this many bytes: its length tells no name.
_FILLED_TO = 64
_FINGERPRINT_BYTES, _NONCE_BYTES = 8, 12


class UnknownSecretError(LookupError):
    """Something was made with a VOTER_SECRET that this process does not have."""


class Keys:
    """The keys derived from one VOTER_SECRET. Each is for one purpose, so that what one of them signs means nothing to another."""

    def __init__(self, secret: str) -> None:
        def derived(purpose: bytes) -> bytes:
            return hashlib.blake2b(secret.encode(), person=purpose).digest()

        # Public: names the secret in the database, and tells nothing about it.
        self.fingerprint = hashlib.blake2b(secret.encode(), person=b"fingerprint", digest_size=_FINGERPRINT_BYTES).digest()
        self.voters = derived(b"")
        self.tokens = derived(b"voter tokens")
        self.receipts = derived(b"receipts")
        self.sealed_receipts = derived(b"sealed receipts")
        self.vote_ids = derived(b"vote ids")
        self.shown_ids = derived(b"shown vote ids")[:16]
        self.networks = derived(b"networks")
        self._texts = AESGCM(derived(b"sealed texts")[:32])

    def seal(self, text: str, about: bytes) -> bytes:
        """Return the text encrypted (AES-256-GCM), so that only `unseal` with the same `about` reads it."""
        content = text.encode()
        content += bytes(-len(content) % _FILLED_TO)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return self.fingerprint + nonce + self._texts.encrypt(nonce, content, about)

    def _unseal(self, sealed: bytes, about: bytes) -> str:
        return self._texts.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about).rstrip(b"\0").decode()


# VOTER_SECRET's first, then VOTER_SECRET_FALLBACKS', newest first.
KNOWN: tuple[Keys, ...] = tuple(map(Keys, [settings.VOTER_SECRET, *settings.VOTER_SECRET_FALLBACKS]))
OWN = KNOWN[0]


def of(fingerprint: bytes | memoryview | None) -> Keys:
    """Return the keys of the VOTER_SECRET with this fingerprint; with None, of the oldest one that this process has.

    None stands in rows that the version before fingerprints made. Raises UnknownSecretError.
    """
    if fingerprint is None:
        return KNOWN[-1]
    wanted = bytes(fingerprint)
    for keys in KNOWN:
        if keys.fingerprint == wanted:
            return keys
    raise UnknownSecretError(f"VOTER_SECRET and VOTER_SECRET_FALLBACKS hold none with the fingerprint {wanted.hex()}")


def unseal(sealed: bytes | memoryview, about: bytes) -> str | None:
    """Return the text that `Keys.seal` made this of; None where this process does not have the secret any more, or it was changed."""
    sealed = bytes(sealed)
    try:
        return of(sealed[:_FINGERPRINT_BYTES])._unseal(sealed[_FINGERPRINT_BYTES:], about)
    except (UnknownSecretError, InvalidTag):
        return None
