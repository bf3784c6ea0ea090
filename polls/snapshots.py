"""What the hot routes know without asking PostgreSQL each time: polls and API clients, about a second old."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from polls import patience
from polls.models import ApiClient, Option, Poll
from polls.moments import to_microseconds

logger = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# How long a request waits for PostgreSQL when nothing is known, and when something older is (seconds). Casting a vote may
# wait for two of the latter, and then for broker and outbox, and has to answer within 4 s.
QUERY_SECONDS = 2.0
REFRESH_SECONDS = 0.25
# After PostgreSQL failed, it is left alone for this long (seconds); requests are served from what is known meanwhile.
PAUSE_SECONDS = 1.0
MAX_ENTRIES = 10_000


class NothingKnownError(Exception):
    """PostgreSQL does not answer, and nothing is known from before."""


@dataclass(frozen=True)
class PollSnapshot:
    """What accepting a vote needs to know of a poll. Moments in microseconds since 1970 UTC."""

    id: UUID
    owner_id: int
    voter_policy: str
    opens_at: int
    closes_at: int
    # {id as in the API: id as in the tables}
    options: dict[str, int]

    @staticmethod
    def read(poll_id: str) -> PollSnapshot | None:
        poll = Poll.objects.filter(id=poll_id).first()
        if poll is None:
            return None
        options = Option.objects.filter(poll=poll).values_list("id", flat=True)
        return PollSnapshot(
            poll.id,
            poll.owner_id,
            poll.voter_policy,
            to_microseconds(poll.opens_at),
            to_microseconds(poll.closes_at),
            {str(option_id): option_id for option_id in options},
        )


@dataclass(frozen=True)
class ClientSnapshot:
    """What checking an API key needs to know of its client."""

    id: int
    owner_id: int
    key_hash: bytes
    is_revoked: bool

    @staticmethod
    def read(prefix: str) -> ClientSnapshot | None:
        client = ApiClient.objects.filter(prefix=prefix).first()
        if client is None:
            return None
        return ClientSnapshot(client.pk, client.owner_id, bytes(client.key_hash), client.revoked_at is not None)


class Snapshots(Generic[K, V]):
    """A cache in front of `read`, in one event loop: one query per key and `seconds`, however many ask at once.

    What is up to `seconds` old is given at once; up to twice as old too, but read anew meanwhile; older values are waited
    for, unless PostgreSQL is away. `read` runs in a thread with a database connection of its own.
    """

    def __init__(self, read: Callable[[K], V], seconds: float, threads: ThreadPoolExecutor) -> None:
        self._read = read
        self._seconds = seconds
        self._threads = threads
        self._known: dict[K, tuple[float, V]] = {}  # key: (when it gets old, value)
        self._reading: dict[K, asyncio.Future[V]] = {}

    def known(self, key: K) -> V | None:
        """Return the value where that needs no waiting; None when `get` must be asked."""
        if (entry := self._known.get(key)) is None:
            return None
        old_at, value = entry
        if (late := time.monotonic() - old_at) > 0:
            if late > self._seconds:
                return None
            self._read_anew(key)
        return value

    async def get(self, key: K) -> V:
        """Return the value, waiting for it if need be. Raises NothingKnownError when it can't be read and never was."""
        entry = self._known.get(key)
        if entry and time.monotonic() < entry[0]:
            return entry[1]
        try:
            return await asyncio.wait_for(asyncio.shield(self._read_anew(key)), REFRESH_SECONDS if entry else QUERY_SECONDS)
        except Exception as exc:
            if entry is None:
                raise NothingKnownError from exc
            self._pause(key)
            return entry[1]

    def _read_anew(self, key: K) -> asyncio.Future[V]:
        """Have the value read in a thread, once for all that ask meanwhile."""
        if (reading := self._reading.get(key)) is None:
            reading = asyncio.get_running_loop().run_in_executor(self._threads, _with_a_connection, self._read, key)
            self._reading[key] = reading
            reading.add_done_callback(lambda done: self._finished(key, done))
        return reading

    def _finished(self, key: K, reading: asyncio.Future[V]) -> None:
        del self._reading[key]
        if reading.cancelled() or reading.exception():
            self._pause(key)
            return
        if len(self._known) >= MAX_ENTRIES:
            self._known.clear()  # rare and cheap: each entry is one query to read again
        self._known[key] = (time.monotonic() + self._seconds, reading.result())

    def _pause(self, key: K) -> None:
        """Leave PostgreSQL alone: what is known of the key counts as fresh for a while."""
        if entry := self._known.get(key):
            self._known[key] = (time.monotonic() + PAUSE_SECONDS, entry[1])


def _with_a_connection(read: Callable[[K], V], key: K) -> V:
    try:
        return patience.once_more(lambda: read(key))
    except Exception as exc:
        logger.warning("PostgreSQL did not answer a hot route: %s", type(exc).__name__)
        raise
