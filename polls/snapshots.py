"""What the hot routes know without asking PostgreSQL each time: polls and API clients, about a second old."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Generic, TypeVar
from uuid import UUID

from django.conf import settings
from django.utils.timezone import now

from polls import clients, metrics, networks, patience
from polls.models import LimitMode, Option, Poll, Scope
from polls.moments import to_microseconds
from polls.networks import NetworkCipher, cipher_of
from polls.voters import VoterKeys, is_in

logger = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
A = TypeVar("A")

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
    is_draft: bool
    voter_policy: str
    voter_keys: VoterKeys
    min_choices: int
    max_choices: int
    allow_withdrawal: bool
    has_hard_limits: bool
    allowed_networks: tuple[IPv4Network | IPv6Network, ...]  # also the installation's
    cipher: NetworkCipher
    results_visibility: str
    opens_at: int
    closes_at: int
    # {id as in the API: id as in the tables}
    options: dict[str, int]

    @staticmethod
    def read(poll_id: str) -> PollSnapshot | None:
        poll = Poll.objects.filter(id=poll_id).select_related("network_secret").first()
        if poll is None:
            return None
        options = Option.objects.filter(poll=poll).values_list("id", flat=True)
        has_limits = poll.address_limit is not None or poll.subnet_limit is not None
        return PollSnapshot(
            id=poll.id,
            owner_id=poll.owner_id,
            is_draft=poll.published_at is None,
            voter_policy=poll.voter_policy,
            voter_keys=VoterKeys(poll.id, poll.voter_policy, poll.voter_salt),
            min_choices=poll.min_choices,
            max_choices=poll.max_choices,
            allow_withdrawal=poll.allow_withdrawal,
            has_hard_limits=has_limits and poll.limit_mode == LimitMode.HARD,
            allowed_networks=(*settings.ALLOWED_NETWORKS, *(ip_network(network) for network in poll.allowed_networks)),
            cipher=cipher_of(networks.secret_of(poll)),
            results_visibility=poll.results_visibility,
            opens_at=to_microseconds(poll.opens_at),
            closes_at=to_microseconds(min(poll.closes_at, poll.archived_at or poll.closes_at)),
            options={str(option_id): option_id for option_id in options},
        )

    def network_keys(self, address: str) -> tuple[UUID, UUID] | None:
        """Return the keys of the address and of its subnet; None for an address of an allowed network, whose votes hold none."""
        if self.allowed_networks and is_in(address, self.allowed_networks):
            return None
        return self.cipher.keys(address)


@dataclass(frozen=True)
class ClientSnapshot:
    """What checking an API key needs to know of its client."""

    id: int
    owner_id: int
    # The only poll it may act in, if it was made for one.
    poll_id: UUID | None
    key_hash: bytes
    may_cast: bool

    @staticmethod
    def read(prefix: str) -> ClientSnapshot | None:
        at = now()
        found = clients.find_by_prefix(prefix, at)
        if found is None:
            return None
        client, key_hash = found
        clients.note_use(client.pk, at)
        return ClientSnapshot(client.pk, client.owner_id, client.poll_id, key_hash, Scope.VOTES_CAST in client.scopes)


class Snapshots(Generic[K, V]):
    """A cache in front of `read`, in one event loop: one query per key and `seconds`, however many ask at once.

    What is up to `seconds` old is given at once; up to twice as old too, but read anew meanwhile; older values are waited
    for, unless PostgreSQL is away. `read` runs in a thread with a database connection of its own.
    """

    def __init__(self, name: str, read: Callable[[K], V], seconds: float, threads: ThreadPoolExecutor) -> None:
        self._hits, self._told_hits, self._told_misses = 0, metrics.cache_hits[name], metrics.cache_misses[name]
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
        self._hits += 1
        return value

    async def get(self, key: K) -> V:
        """Return the value, waiting for it if need be. Raises NothingKnownError when it can't be read and never was."""
        entry = self._known.get(key)
        if entry and time.monotonic() < entry[0]:
            self._hits += 1
            return entry[1]
        self._told_misses.inc()
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
            # Told now and then: a hit, of which a vote has several, costs a fortieth of telling.
            self._told_hits.inc(self._hits)
            self._hits = 0
            reading = asyncio.get_running_loop().run_in_executor(self._threads, with_a_connection, self._read, key)
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


class SharedReads(Generic[K, V]):
    """Questions that only PostgreSQL can answer, in one event loop: all that come while one statement runs share the next.

    `read` gets the keys and returns what it found of them, in a thread with a database connection of its own.
    """

    def __init__(self, read: Callable[[list[K]], Mapping[K, V]], threads: ThreadPoolExecutor) -> None:
        self._read = read
        self._threads = threads
        self._waiting: list[tuple[K, asyncio.Future[V | None]]] = []
        self._reading: asyncio.Task[None] | None = None

    def get(self, key: K) -> asyncio.Future[V | None]:
        """Return what is known of the key now. Raises NothingKnownError when PostgreSQL does not answer in QUERY_SECONDS."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[V | None] = loop.create_future()
        self._waiting.append((key, answer))
        if self._reading is None:
            self._reading = loop.create_task(self._answer())
        return answer

    async def get_all(self, keys: Sequence[K]) -> list[V | None]:
        return list(await asyncio.gather(*map(self.get, keys)))

    async def _answer(self) -> None:
        """Answer those who wait, and those who come meanwhile, until nobody waits."""
        await asyncio.sleep(0)  # the other requests that this turn of the loop has read join
        while self._waiting:
            asked, self._waiting = self._waiting, []
            reading = asyncio.get_running_loop().run_in_executor(
                self._threads, with_a_connection, self._read, list(dict.fromkeys(key for key, _ in asked))
            )
            try:
                async with asyncio.timeout(QUERY_SECONDS):
                    found = await reading
            except Exception:
                # Also those who came meanwhile: they would wait as long again.
                for _, answer in [*asked, *self._waiting]:
                    if not answer.done():
                        answer.set_exception(NothingKnownError())
                self._waiting = []
            else:
                for key, answer in asked:
                    if not answer.done():  # its client may have gone
                        answer.set_result(found.get(key))
        self._reading = None


def with_a_connection(read: Callable[[A], V], key: A) -> V:
    """Ask PostgreSQL in a thread; where its connection turns out to be dead, once more on a fresh one."""
    try:
        return patience.once_more(lambda: read(key))
    except Exception as exc:
        logger.warning("PostgreSQL did not answer a hot route: %s", type(exc).__name__)
        raise
