"""The bundle: the votes that one message carries, and their form on the wire."""

import base64
import contextlib
from typing import Annotated
from uuid import UUID

import msgspec


class AcceptedVote(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A vote on its way from the API to the count, as an array. Web processes, workers, the queue and the outbox depend on it.

    New fields go to the end with a default: a reader skips what it does not know.
    """

    vote_id: UUID
    poll_id: UUID
    voter_key: UUID
    # Ids of the chosen options, sorted; none withdraws the voter's vote.
    selection: tuple[int, ...]
    # Microseconds since 1970 UTC, by the clock of the web process that answered 202.
    accepted_at: Annotated[int, msgspec.Meta(ge=0, lt=253_402_300_800_000_000)]  # to the end of 9999, as far as dates go
    # Two hashes of the address that web processes sent until networks.py; read by nobody.
    old_address_key: int | None = None
    old_subnet_key: int | None = None
    # What the client called its request, if it did; otherwise the vote id serves.
    request_id: str | None = None
    # Where it came from and by which browser, where that matters (networks.py).
    address_key: UUID | None = None
    subnet_key: UUID | None = None
    signature_key: int | None = None


_encoder = msgspec.msgpack.Encoder(uuid_format="bytes")
_decoder = msgspec.msgpack.Decoder(list[AcceptedVote])


def write(votes: list[AcceptedVote]) -> bytes:
    """Return the bundle as ASCII text: base64 of MessagePack, `[[vote_id, poll_id, voter_key, [option], accepted_at, ...], ...]`.

    A worker's parent process decodes every message as JSON before its child does; one long text takes it a tenth of the time.
    """
    return base64.b64encode(_encoder.encode(votes))


def read(bundle: object) -> tuple[list[AcceptedVote], int]:
    """Return the votes of a bundle and how many of its items are none. One bad item never hides its neighbours.

    `bundle`: what `write` returned, as a text; or, as older web processes sent it, the list itself, decoded from JSON.
    """
    items = bundle
    if isinstance(bundle, str):
        try:
            packed = base64.b64decode(bundle, validate=True)
            with contextlib.suppress(msgspec.ValidationError):
                return _decoder.decode(packed), 0
            items = msgspec.msgpack.decode(packed)
        except (ValueError, msgspec.DecodeError):
            return [], 1
    if not isinstance(items, list):
        return [], 1
    votes, unreadable = [], 0
    for item in items:
        try:
            votes.append(msgspec.convert(item, AcceptedVote))
        except msgspec.ValidationError:
            unreadable += 1
    return votes, unreadable


def decode(body: bytes | memoryview) -> list[AcceptedVote]:
    """Return the votes of what `write` returns or once returned. Raises ValueError on anything else."""
    body = bytes(body)
    votes, unreadable = read(msgspec.json.decode(body) if body.startswith(b"[") else body.decode())
    if unreadable:
        raise ValueError(f"{unreadable} items are no votes")
    return votes
