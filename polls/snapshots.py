"""What the hot routes know without asking PostgreSQL each time: polls and API clients, about a second old."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Generic, TypeVar
from uuid import UUID

from django.conf import settings
from django.utils.timezone import now

from polls import clients, keys, metrics, patience, problems, receipts
from polls.bundles import AcceptedVote
from polls.keys import UnknownSecretError
from polls.models import LimitMode, Option, Poll, Scope
from polls.moments import from_microseconds, to_microseconds
from polls.networks import NetworkCipher, cipher_of
from polls.voters import VoteIds, VoterKeys, is_in, vote_ids_of

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
# Chosen: 40 MB of polls.
MAX_ENTRIES = 20_000


class NothingKnownError(Exception):
    """PostgreSQL does not answer, and nothing is known from before."""


@dataclass(frozen=True)
class PollSnapshot:
    """What accepting a vote needs to know of a poll. Moments in microseconds since 1970 UTC."""

    id: UUID
    owner_id: int
    is_draft: bool
    voter_policy: str
    voter_salt: bytes | None
    # The fingerprint of its VOTER_SECRET.
    voter_secret: bytes | None
    has_keyed_vote_ids: bool
    min_choices: int
    max_choices: int
    allow_withdrawal: bool
    has_hard_limits: bool
    allowed_networks: tuple[IPv4Network | IPv6Network, ...]  # also the installation's
    # `secret` and `voter_secret` of its NetworkSecret.
    network_secret: tuple[bytes, bytes | None] | None
    results_visibility: str
    opens_at: int
    closes_at: int
    # {id as in the API: id as in the tables}
    options: dict[str, int]

    @staticmethod
    def read(poll_id: str) -> PollSnapshot | None:
        return PollSnapshot.read_all([poll_id]).get(poll_id)

    @staticmethod
    def read_all(poll_ids: Sequence[str]) -> dict[str, PollSnapshot]:
        """Return those of the polls that there are. Without models' instances: votes may come for thousands of polls a second."""
        polls = list(Poll.objects.filter(id__in=poll_ids).values(*_OF_A_POLL))
        # Afterwards: of a poll that is made meanwhile either nothing is seen, or all.
        options: dict[UUID, dict[str, int]] = defaultdict(dict)
        for poll_id, option_id in Option.objects.filter(poll_id__in=poll_ids).values_list("poll_id", "id"):
            options[poll_id][str(option_id)] = option_id
        return {
            str(poll["id"]): PollSnapshot(
                id=poll["id"],
                owner_id=poll["owner_id"],
                is_draft=poll["published_at"] is None,
                voter_policy=poll["voter_policy"],
                voter_salt=_bytes(poll["voter_salt"]),
                voter_secret=_bytes(poll["voter_secret"]),
                has_keyed_vote_ids=poll["has_keyed_vote_ids"],
                min_choices=poll["min_choices"],
                max_choices=poll["max_choices"],
                allow_withdrawal=poll["allow_withdrawal"],
                has_hard_limits=(poll["address_limit"], poll["subnet_limit"]) != (None, None) and poll["limit_mode"] == LimitMode.HARD,
                allowed_networks=(*settings.ALLOWED_NETWORKS, *map(ip_network, poll["allowed_networks"])),
                network_secret=(bytes(secret), _bytes(poll["network_secret__voter_secret"]))
                if (secret := poll["network_secret__secret"])
                else None,
                results_visibility=poll["results_visibility"],
                opens_at=to_microseconds(poll["opens_at"]),
                closes_at=to_microseconds(min(poll["closes_at"], poll["archived_at"] or poll["closes_at"])),
                options=options[poll["id"]],
            )
            for poll in polls
        }

    @cached_property
    def keys(self) -> keys.Keys:
        """What is derived from the poll's VOTER_SECRET; raises Refusal where this process does not have that one.

        Processes compare at their start (voter_secrets.py); one that is older than a rotation gets here.
        """
        try:
            return keys.of(self.voter_secret)
        except UnknownSecretError as exc:
            logger.error("poll %s takes no votes here: %s", self.id, exc)
            raise problems.UNAVAILABLE.says("This process does not know the poll's secret.", headers={"Retry-After": "2"}) from None

    @cached_property
    def voter_keys(self) -> VoterKeys:
        return VoterKeys(self.id, self.voter_policy, self.voter_salt, self.keys)

    @cached_property
    def vote_ids(self) -> VoteIds:
        return vote_ids_of(self.keys, are_keyed=self.has_keyed_vote_ids)

    @cached_property
    def show(self) -> receipts.Show:
        """Returns an accepted vote's id and receipt, as they are shown."""
        return receipts.writer(self.id, self.vote_ids, self.keys)

    def receipt_of(self, vote: AcceptedVote) -> receipts.Receipt:
        """Return the vote's receipt, as `receipts.read` returns it."""
        shown_id = self.vote_ids.shown(vote.vote_id)
        return receipts.Receipt(vote.poll_id, vote.voter_key, vote.vote_id, from_microseconds(vote.accepted_at), shown_id)

    @cached_property
    def cipher(self) -> NetworkCipher:
        """Raises LookupError where the poll has no secret: none is made without, and none loses it."""
        if not self.network_secret:
            raise LookupError("the poll has no network secret")
        return cipher_of(*self.network_secret)

    def network_keys(self, address: str) -> tuple[UUID, UUID] | None:
        """Return the keys of the address and of its subnet; None for an address of an allowed network, whose votes hold none."""
        if self.allowed_networks and is_in(address, self.allowed_networks):
            return None
        return self.cipher.keys(address)


_OF_A_POLL = (
    "id", "owner_id", "published_at", "voter_policy", "voter_salt", "voter_secret", "has_keyed_vote_ids",
    "min_choices", "max_choices", "allow_withdrawal",
    "address_limit", "subnet_limit", "limit_mode", "allowed_networks", "network_secret__secret", "network_secret__voter_secret",
    "results_visibility", "opens_at", "closes_at", "archived_at",
)  # fmt: skip


def _bytes(found: memoryview | bytes | None) -> bytes | None:
    return None if found is None else bytes(found)


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

    @staticmethod
    def read_all(prefixes: Sequence[str]) -> dict[str, ClientSnapshot | None]:
        return {prefix: ClientSnapshot.read(prefix) for prefix in prefixes}


class Snapshots(Generic[K, V]):
    """A cache in front of `read`, in one event loop: one look per key and `seconds`, however many ask at once.

    What is up to `seconds` old is given at once; up to twice as old too, but read anew meanwhile; older values are waited
    for, unless PostgreSQL is away. `read` gets keys and returns what it found of them; it runs in a thread with a database connection of
    its own, and all keys that are wanted while it runs share the next.
    """

    def __init__(self, name: str, read: Callable[[Sequence[K]], Mapping[K, V]], seconds: float, threads: ThreadPoolExecutor) -> None:
        self._hits, self._told_hits, self._told_misses = 0, metrics.cache_hits[name], metrics.cache_misses[name]
        self._read = read
        self._seconds = seconds
        self._threads = threads
        self._known: dict[K, tuple[float, V | None]] = {}  # key: (when it gets old, value)
        self._reading: dict[K, asyncio.Future[V | None]] = {}
        self._wanted: list[K] = []  # of them, those for which nobody has asked yet
        self._asking: asyncio.Future[Mapping[K, V]] | None = None

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

    async def get(self, key: K) -> V | None:
        """Return the value, waiting for it if need be. Raises NothingKnownError when it can't be read and never was."""
        entry = self._known.get(key)
        if entry and time.monotonic() < entry[0]:
            self._hits += 1
            return entry[1]
        self._told_misses.inc()
        try:
            # Neither asyncio.timeout nor wait_for, which need a task: a request may be answered without one.
            done, _ = await asyncio.wait([self._read_anew(key)], timeout=REFRESH_SECONDS if entry else QUERY_SECONDS)
            if not done:
                raise TimeoutError
            return done.pop().result()
        except Exception as exc:
            if entry is None:
                raise NothingKnownError from exc
            self._pause(key)
            return entry[1]

    def _read_anew(self, key: K) -> asyncio.Future[V | None]:
        """Have the value read in a thread, once for all that ask meanwhile."""
        if (reading := self._reading.get(key)) is None:
            loop = asyncio.get_running_loop()
            reading = self._reading[key] = loop.create_future()
            self._wanted.append(key)
            if len(self._wanted) == 1:
                loop.call_soon(self._ask)  # after the other requests that this turn of the loop has read
        return reading

    def _ask(self) -> None:
        """Read what is wanted, unless something else is being read: then once that is done, or takes too long."""
        if self._asking or not self._wanted:
            return
        # Told now and then: a hit, of which a vote has several, costs a fortieth of telling.
        self._told_hits.inc(self._hits)
        self._hits = 0
        loop, keys = asyncio.get_running_loop(), self._wanted
        self._wanted = []
        self._asking = asking = loop.run_in_executor(self._threads, with_a_connection, self._read, keys)
        asking.add_done_callback(lambda _: self._finished(keys, asking))
        # One that hangs holds up nobody but those who wait for it.
        loop.call_later(REFRESH_SECONDS, self._go_on, asking)

    def _go_on(self, asking: asyncio.Future[Mapping[K, V]]) -> None:
        if self._asking is asking:
            self._asking = None
            self._ask()

    def _finished(self, keys: Sequence[K], asking: asyncio.Future[Mapping[K, V]]) -> None:
        exc = NothingKnownError() if asking.cancelled() else asking.exception()
        old_at = time.monotonic() + self._seconds
        for key in keys:
            reading = self._reading.pop(key)
            if exc:
                self._pause(key)
                reading.set_exception(exc)
                reading.exception()  # seen, also where nobody waits for it
                continue
            value = asking.result().get(key)
            if len(self._known) >= MAX_ENTRIES and key not in self._known:
                self._known.clear()  # rare and cheap: the entries are read again together
            self._known[key] = (old_at, value)
            reading.set_result(value)
        self._go_on(asking)

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
