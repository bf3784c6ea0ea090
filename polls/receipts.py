"""The receipt: what a client gets with its 202, and what tells it later what became of the vote."""

from __future__ import annotations

import base64
import hashlib
import hmac
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db import connection

from polls import keys
from polls.bundles import AcceptedVote
from polls.models import Outcome, Reason
from polls.moments import from_microseconds
from polls.voters import FormerVoteIds, VoteIds

_MAC_BYTES = 12
_URL_SAFE = bytes.maketrans(b"+/", b"-_")


@dataclass(frozen=True)
class Receipt:
    """A genuine receipt. It holds the vote's whole key, so the votes table needs no index by vote id."""

    poll_id: UUID
    voter_key: UUID
    vote_id: UUID
    accepted_at: datetime
    # The vote's id as its answer and the receipt's text show it (VoteIds.shown).
    shown_id: UUID

    def pending(self) -> VoteStatus:
        """What is known of the vote before it is counted."""
        return VoteStatus(self.shown_id, "pending", None, self.accepted_at, None)


@dataclass(frozen=True)
class VoteStatus:
    """What became of a vote; never what was chosen. `vote_id` as it is shown."""

    vote_id: UUID
    status: str
    reason: str | None
    accepted_at: datetime
    counted_at: datetime | None
    is_withdrawal: bool = False

    @property
    def has_counted(self) -> bool:
        """Whether it is a ballot that counts, or did until another one of its voter took its place."""
        stands = self.status == Outcome.COUNTED or (self.status == Outcome.SUPERSEDED and self.reason == Reason.CHANGED)
        return stands and not self.is_withdrawal


Show = Callable[[AcceptedVote], tuple[UUID, str]]


def writer(poll_id: UUID, vote_ids: VoteIds, of: keys.Keys = keys.OWN) -> Show:
    """Return what gives a vote's id as it is shown, and its receipt, 91 URL-safe characters. `vote_ids`: those of the poll."""
    poll, hides = poll_id.bytes, isinstance(vote_ids, FormerVoteIds)
    # Begun once: a copy of it takes a third of the time of a new one.
    begun = _begun_mac(of.sealed_receipts if hides else of.receipts)
    begun.update(poll)

    def show(vote: AcceptedVote) -> tuple[UUID, str]:
        shown_id = vote_ids.shown(vote.vote_id) if hides else vote.vote_id
        content = vote.voter_key.bytes + shown_id.bytes + vote.accepted_at.to_bytes(8)
        mac = begun.copy()
        mac.update(content)
        # As base64.urlsafe_b64encode does it, but in one step.
        return shown_id, b2a_base64(poll + content + mac.digest(), newline=False).translate(_URL_SAFE, b"=").decode()

    return show


def read(receipt: str) -> Receipt | None:
    """Return the receipt, or None when this installation never wrote it.

    One spelling only, as written: base64 lets the last character differ in bits that carry nothing.
    """
    try:
        raw = base64.b64decode(receipt + "=" * (-len(receipt) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
    if len(raw) != 56 + _MAC_BYTES or base64.urlsafe_b64encode(raw).rstrip(b"=") != receipt.encode():
        return None
    content, mac = raw[:56], raw[56:]
    poll_id, voter_key, shown_id = (UUID(bytes=content[start : start + 16]) for start in (0, 16, 32))
    for of in keys.KNOWN:
        if hmac.compare_digest(mac, _mac(of.receipts, content)):
            vote_id = shown_id
        elif hmac.compare_digest(mac, _mac(of.sealed_receipts, content)):
            vote_id = FormerVoteIds(of).hidden(shown_id)
        else:
            continue
        return Receipt(poll_id, voter_key, vote_id, from_microseconds(int.from_bytes(content[48:])), shown_id)
    return None


# One statement, so one moment: a vote that is being set aside is never found in neither table.
_STATUSES = """
    WITH asked AS (SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[]) AS a (poll_id, voter_key, vote_id))
    SELECT poll_id, voter_key, vote_id, 'counted', NULL, accepted_at, counted_at, selection = '{}'
    FROM votes JOIN asked USING (poll_id, voter_key, vote_id)
    UNION ALL
    SELECT poll_id, voter_key, vote_id, outcome, reason, accepted_at, NULL, selection = '{}'
    FROM outcomes JOIN asked USING (poll_id, voter_key, vote_id)
"""


def find_statuses(receipts: Sequence[Receipt]) -> dict[Receipt, VoteStatus]:
    """Return what became of the votes. In neither table one is pending: a genuine receipt means that it was accepted."""
    asked = [[getattr(receipt, name) for receipt in receipts] for name in ("poll_id", "voter_key", "vote_id")]
    with connection.cursor() as cursor:
        cursor.execute(_STATUSES, asked)
        found = {(poll_id, voter_key, vote_id): rest for poll_id, voter_key, vote_id, *rest in cursor}
    return {receipt: _status(receipt, found.get((receipt.poll_id, receipt.voter_key, receipt.vote_id))) for receipt in receipts}


def has_counted(receipt: str, poll_id: UUID) -> bool:
    """Return whether this is the receipt of a ballot in the poll that counts, or did (see VoteStatus). Costs a statement."""
    genuine = read(receipt)
    return genuine is not None and genuine.poll_id == poll_id and find_statuses([genuine])[genuine].has_counted


def _status(receipt: Receipt, found: Sequence[Any] | None) -> VoteStatus:
    return VoteStatus(receipt.shown_id, *found) if found else receipt.pending()


def _begun_mac(key: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(key=key, digest_size=_MAC_BYTES)


def _mac(key: bytes, content: bytes) -> bytes:
    mac = _begun_mac(key)
    mac.update(content)
    return mac.digest()
