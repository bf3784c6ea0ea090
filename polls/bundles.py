"""The bundle: the votes that one message carries, and their form on the wire."""

from typing import Annotated
from uuid import UUID

import msgspec


class AcceptedVote(msgspec.Struct, array_like=True, frozen=True):
    """A vote on its way from the API to the count, as an array. Web processes, workers, the queue and the outbox depend on it.

    New fields go to the end with a default: a reader skips what it does not know.
    """

    vote_id: UUID
    poll_id: UUID
    voter_key: UUID
    # Ids of the chosen options.
    selection: tuple[int, ...]
    # Microseconds since 1970 UTC, by the clock of the web process that answered 202.
    accepted_at: Annotated[int, msgspec.Meta(ge=0, lt=253_402_300_800_000_000)]  # to the end of 9999, as far as dates go


def write(votes: list[AcceptedVote]) -> bytes:
    """Return the bundle as JSON, `[[vote_id, poll_id, voter_key, [option], accepted_at], ...]`."""
    return msgspec.json.encode(votes)


def read(bundle: object) -> tuple[list[AcceptedVote], int]:
    """Return the votes of a decoded bundle and how many of its items are none. One bad item never hides its neighbours."""
    if not isinstance(bundle, list):
        return [], 1
    votes, unreadable = [], 0
    for item in bundle:
        try:
            votes.append(msgspec.convert(item, AcceptedVote))
        except msgspec.ValidationError:
            unreadable += 1
    return votes, unreadable


def decode(body: bytes) -> list[AcceptedVote]:
    """Return the votes of what `write` returned. Raises msgspec.DecodeError on anything else."""
    return msgspec.json.decode(body, type=list[AcceptedVote])
