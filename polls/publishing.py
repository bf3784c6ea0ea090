"""Publishing: accepted votes travel together, and none is answered before the broker or the outbox holds it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from aiormq import Connection
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelNotFoundEntity, DeliveryError, PublishError
from django.conf import settings
from pamqp.commands import Basic
from yarl import URL

from polls import bundles, metrics, outbox, turns
from polls.bundles import AcceptedVote
from tasks.votes import count_bundle

logger = logging.getLogger(__name__)

# Bundles on their way at once. Chosen: enough to fill the broker, few enough to hold them all for CONFIRM_SECONDS.
MAX_BUNDLES_UNDER_WAY = 32
RECONNECT_SECONDS = 0.5
# How long a bundle waits at most for the one on its way. Its own confirm and outbox come on top, and all has to fit into 4 s.
LONGEST_WAIT_SECONDS = 0.2
# With so many votes in a bundle, the next one leaves twice as long after it. Chosen: at half of the top rate, 99 % of the answers came
# in 13 ms instead of 24.
MANY_VOTES = 50
# Nobody has a queue of this name: a healthy broker returns what is sent there at once, a blocked one does not.
PROBE_ROUTING_KEY = "nexus.is-anybody-there"
HEARTBEAT_SECONDS = 20


class NobodyTookItError(Exception):
    """Neither broker nor outbox holds the vote for sure. It may still arrive: the client repeats it with the same id."""


class _Bundle:
    """Votes that travel together, and those who wait for them."""

    def __init__(self) -> None:
        self.votes: list[AcceptedVote] = []
        self._waiting: list[asyncio.Future[None]] = []

    def arrival(self) -> asyncio.Future[None]:
        """Return what settles once it is known whether the bundle can be lost: a future of one's own, that a client who goes may cancel."""
        arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(arrival)
        return arrival

    def arrive(self, exc: Exception | None = None) -> None:
        """Tell all who wait."""
        for arrival in self._waiting:
            if arrival.done():  # its client has gone
                continue
            if exc is None:
                arrival.set_result(None)
            else:
                arrival.set_exception(exc)
                arrival.exception()  # seen, also when its client goes now


class Publisher:
    """One web process's way to the broker: one connection, one task that keeps it, group commit.

    Votes that arrive while a bundle is on its way make the next one: one waiting client makes a bundle of one, 500 make
    some of BUNDLE_MAX_VOTES. Lives in one event loop.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Bundle] = deque()  # only the last one may have room
        self._under_way: set[asyncio.Task[None]] = set()
        self._unanswered = 0  # votes
        # Read once: asking Django for a setting takes as long as joining a bundle.
        self._max_votes, self._max_waiting = settings.BUNDLE_MAX_VOTES, settings.MAX_WAITING_VOTES
        self._least_pause = settings.BUNDLE_SECONDS
        self._left_at, self._last_votes = 0.0, 0  # when the last bundle left, by the loop's clock, and with how many
        self._channel: AbstractChannel | None = None
        self._ready = asyncio.Event()
        self._dropped: asyncio.Future[None] | None = None  # settles when the channel in use is given up
        self._keeper: asyncio.Task[None] | None = None
        self._closings: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="outbox")

    async def start(self) -> None:
        """Open the connection, or go on without one: then votes go to the outbox until the broker is there."""
        metrics.web_processes.set(1)
        self._keeper = asyncio.create_task(self._keep_a_channel())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.CONFIRM_SECONDS):
                await self._ready.wait()

    async def stop(self) -> None:
        """Finish what is on its way, then close the connection."""
        while self._under_way or self._waiting:
            self._send_off()
            if self._under_way:
                await asyncio.wait(self._under_way, timeout=self._pause())
            else:
                await asyncio.sleep(self._pause())
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, *self._closings, return_exceptions=True)
        self._threads.shutdown(wait=False)

    def take(self, vote: AcceptedVote) -> asyncio.Future[None]:
        """Return what settles once the vote is in a queue of the broker's or in the committed outbox: it can't be lost any more.

        Raises NobodyTookItError where too many wait; what it returns does so within LONGEST_WAIT_SECONDS + CONFIRM_SECONDS +
        OUTBOX_SECONDS, however broker and database fail.
        """
        if self._unanswered >= self._max_waiting:
            raise NobodyTookItError
        bundle = self._next_bundle()
        bundle.votes.append(vote)
        self._unanswered += 1
        return bundle.arrival()

    async def take_all(self, votes: Sequence[AcceptedVote]) -> set[UUID]:
        """Return once it is known of all votes whether they can be lost; the ids of those that can. In as much time as `take`."""
        carried: list[tuple[asyncio.Future[None], Sequence[AcceptedVote]]] = []
        taken = 0
        while taken < len(votes) and self._unanswered < self._max_waiting:
            bundle = self._next_bundle()
            room = min(self._max_votes - len(bundle.votes), self._max_waiting - self._unanswered)
            passengers = votes[taken : taken + room]
            bundle.votes += passengers
            taken += len(passengers)
            self._unanswered += len(passengers)
            carried.append((bundle.arrival(), passengers))
            if self._is_full(bundle):
                self._send_off()
        lost = {vote.vote_id for vote in votes[taken:]}
        for arrival, passengers in carried:
            try:
                await arrival
            except NobodyTookItError:
                lost.update(vote.vote_id for vote in passengers)
        return lost

    def _next_bundle(self) -> _Bundle:
        """Return the bundle that leaves next and has room."""
        if not self._waiting or self._is_full(self._waiting[-1]):
            loop = asyncio.get_running_loop()
            self._waiting.append(_Bundle())
            # After the other requests that this turn of the loop has read: they join the bundle.
            loop.call_soon(self._send_off)
        return self._waiting[-1]

    def _is_full(self, bundle: _Bundle) -> bool:
        return len(bundle.votes) >= self._max_votes

    def _send_off(self) -> None:
        """Send the waiting bundles; one that has room waits, the longer the more are on their way."""
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._under_way) < MAX_BUNDLES_UNDER_WAY:
            if not self._is_full(self._waiting[0]) and loop.time() < (leaves_at := self._left_at + self._pause()):
                loop.call_at(leaves_at, self._send_off)
                return
            bundle, self._left_at = self._waiting.popleft(), loop.time()
            self._last_votes = len(bundle.votes)
            task = asyncio.create_task(self._carry(bundle))
            self._under_way.add(task)
            task.add_done_callback(self._arrived)

    def _pause(self) -> float:
        """Return how long a bundle that has room stays behind the last one (seconds).

        Longer where others are on their way, or many votes come: a bundle by itself costs as much as a hundred votes. A client alone
        waits for no crowd.
        """
        if len(self._under_way) > 1:
            return LONGEST_WAIT_SECONDS
        pause = self._least_pause * min(2, 1 + self._last_votes / MANY_VOTES)
        return 2 * pause if self._under_way else pause

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        # The answers are written in this turn of the loop, and what those who got them send next is read in the one after it: it joins.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._send_off)

    async def _carry(self, bundle: _Bundle) -> None:
        """Settle the bundle: broker, else outbox, else nobody took it."""
        body, votes, task_id = bundles.write(bundle.votes), len(bundle.votes), str(uuid.uuid4())
        metrics.bundle_votes.observe(votes)
        metrics.votes_waiting.set(self._unanswered)
        try:
            if queue := await self._publish(body, votes, task_id):
                metrics.accepted["queue"].inc(votes)
                logger.info("bundle %s: %d votes in %s", task_id, votes, queue)
            else:
                kept = await self._keep_in_outbox(body)
                metrics.accepted["outbox"].inc(votes)
                logger.info("bundle %s: %d votes in the outbox as %d", task_id, votes, kept)
            bundle.arrive()
        except BaseException as exc:  # cancelled, too: nobody may wait for ever
            logger.error("bundle %s: %d votes were answered 503: %s", task_id, votes, type(exc).__name__)
            bundle.arrive(NobodyTookItError())
            if not isinstance(exc, Exception):
                raise
        finally:
            self._unanswered -= len(bundle.votes)
            metrics.votes_waiting.set(self._unanswered)

    async def _publish(self, bundle: bytes, votes: int, task_id: str) -> str | None:
        """Send a bundle as one task message; return the queue that holds it, once the broker has confirmed that."""
        channel = self._channel
        if channel is None:
            metrics.published["unsent"].inc()
            return None
        message, queue, sent_at = _message(votes, task_id), turns.queue_at(time.time()), time.monotonic()
        try:
            async with asyncio.timeout(settings.CONFIRM_SECONDS):
                await channel.basic_publish(
                    b'[["' + bundle + b'"],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":null}]',
                    routing_key=queue,
                    properties=message,
                    mandatory=True,  # without it a broker confirms what no queue took
                )
        except DeliveryError as exc:
            metrics.published["refused"].inc()
            logger.warning("the broker refused %d votes (%s): they go to the outbox", votes, type(exc).__name__)
            return None
        except Exception as exc:  # whatever else it was: there is no confirm
            metrics.published["unconfirmed"].inc()
            logger.warning("no confirm for %d votes (%s): they go to the outbox", votes, type(exc).__name__)
            if self._channel is channel:
                self._channel = None
                if self._dropped:
                    self._dropped.set_result(None)
            return None
        metrics.published["confirmed"].inc()
        metrics.confirm_seconds.observe(time.monotonic() - sent_at)
        return queue

    async def _keep_in_outbox(self, bundle: bytes) -> int:
        async with asyncio.timeout(settings.OUTBOX_SECONDS):
            return await asyncio.get_running_loop().run_in_executor(self._threads, outbox.keep, bundle)

    async def _keep_a_channel(self) -> None:
        """Have a channel whenever the broker takes messages, for as long as the process lives."""
        for url in itertools.cycle(settings.CELERY_BROKER_URL.split(";")):
            connection = Connection(URL(url).update_query(heartbeat=HEARTBEAT_SECONDS))
            try:
                async with asyncio.timeout(2 * settings.CONFIRM_SECONDS):
                    channel = await _open_channel(connection)
                self._channel, self._dropped = channel, asyncio.get_running_loop().create_future()
                self._ready.set()
                metrics.publisher_connections.inc()
                metrics.publishers_connected.set(1)
                logger.info("the broker takes votes")
                await asyncio.wait({connection.closing, channel.closing, self._dropped}, return_when=asyncio.FIRST_COMPLETED)
                logger.warning("the broker is away: votes go to the outbox")
            except Exception as exc:
                fault = getattr(exc.__cause__ or exc.__context__, "verify_message", "")  # of a certificate
                logger.warning("the broker takes no votes (%s)", f"its certificate: {fault}" if fault else type(exc).__name__)
            finally:
                self._channel = None
                metrics.publishers_connected.set(0)
                # In the background: a stuck broker may never answer the farewell.
                task = asyncio.create_task(_close(connection))
                self._closings.add(task)
                task.add_done_callback(self._closings.discard)
            await asyncio.sleep(RECONNECT_SECONDS)


async def _open_channel(connection: Connection) -> AbstractChannel:
    """Return a channel with confirms of a broker that does take messages. Raises whatever shows that it does not."""
    await connection.connect()
    channel = await connection.channel(publisher_confirms=True)
    # A broker with a memory or disk alarm lets clients connect and then just stops reading.
    with contextlib.suppress(PublishError):
        await channel.basic_publish(b"", routing_key=PROBE_ROUTING_KEY, mandatory=True)
    return channel


async def find_missing(queues: Sequence[str], seconds: float) -> list[str]:
    """Return those of the queues that are not there, as the first broker tells that takes messages.

    Takes so long at most; raises whatever shows that no broker does.
    """
    *others, last = settings.CELERY_BROKER_URL.split(";")
    share = seconds / (len(others) + 1)
    for url in others:
        with contextlib.suppress(Exception):
            return await _find_missing(url, queues, share)
    return await _find_missing(last, queues, share)


async def _find_missing(url: str, queues: Sequence[str], seconds: float) -> list[str]:
    connection = Connection(URL(url))
    try:
        async with asyncio.timeout(seconds):
            await _open_channel(connection)
            return [queue for queue in queues if not await _is_there(connection, queue)]
    finally:
        closing = asyncio.create_task(_close(connection))  # in the background, as above
        _closings.add(closing)
        closing.add_done_callback(_closings.discard)


_closings: set[asyncio.Task[None]] = set()


async def _is_there(connection: Connection, queue: str) -> bool:
    channel = await connection.channel()
    try:
        await channel.queue_declare(queue, passive=True)
    except ChannelNotFoundEntity:
        return False
    return True


async def _close(connection: Connection) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(settings.CONFIRM_SECONDS):
            await connection.close()


def _message(votes: int, task_id: str) -> Basic.Properties:
    """Return the headers of Celery's task message (protocol 2), persistent, naming no voter: Flower shows `<37 votes>`."""
    task = count_bundle.app.amqp.as_task_v2(task_id, count_bundle.name, argsrepr=f"<{votes} votes>", kwargsrepr="", ignore_result=True)
    return Basic.Properties(
        headers=task.headers,
        correlation_id=task_id,
        message_id=task_id,
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
    )
