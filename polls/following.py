"""Following: a poll's results, and again whenever they change, for as many as want to watch (Server-Sent Events)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import msgspec
from django.conf import settings

from polls import metrics, problems
from polls.problems import Refusal

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# The poll's id as in the API, and whether whoever follows has voted in it.
Subject = tuple[str, bool]

# A stream ends after a time between these (seconds): a follower that vanished without a word takes no room for longer, and with a new
# web process the followers spread over all in this time.
LIFE_SECONDS = (300.0, 600.0)
# How long clients wait before they come back, drawn for each (milliseconds): else all of a process that ends would come at once.
RETRY_MILLISECONDS = (1000, 5000)
# A stream is silent for this long at most (seconds): half of what deploy/nginx waits.
PING_SECONDS = 15.0
# Between two looks at the tallies (seconds); the floor is for a RESULTS_CACHE_SECONDS of 0.
_LOOK_SECONDS = max(settings.RESULTS_CACHE_SECONDS, 0.05)
# After a look that took long, this many times as long is left to votes: followers get a quarter of a process at most.
_REST = 3
# Written to between two turns of the event loop. Chosen: about a millisecond, for which votes wait.
_AT_ONCE = 50
# How long a client that does not read may keep its stream from ending (seconds).
_END_SECONDS = 2.0
# One address has room for a tenth of what a process takes, so that no single one keeps the others out; a school has room in that.
_ADDRESS_SHARE = 10
_RETRY_AFTER_SECONDS = "30"

HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # an nginx that is not set up for streams passes this one on as it comes
]


def _part(text: bytes) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": True}


_PING, _NOTHING, _END = _part(b":\n\n"), _part(b""), {"type": "http.response.body"}


class _Results(msgspec.Struct):
    """What matters here of results."""

    is_final: bool


_results = msgspec.json.Decoder(_Results)


class Event:
    """A state of a poll's results, ready to be sent to everybody."""

    __slots__ = ("etag", "id", "is_final", "message")

    def __init__(self, etag: bytes, results: bytes) -> None:
        self.etag = etag
        self.id = etag.removeprefix(b"W/").strip(b'"')
        self.message = _part(b"event: results\nid: %s\ndata: %s\n\n" % (self.id, results))
        self.is_final = _results.decode(results).is_final


@dataclass(eq=False)
class Followed:
    """What is followed: the newest results, and who gets them."""

    newest: Event
    followers: set[Follower] = field(default_factory=set)
    told_at: float = field(default_factory=time.monotonic)

    async def tell(self, event: Event) -> None:
        """Send the event to all followers; who reads too slowly for it gets what is newest as soon as there is room."""
        self.newest = event
        metrics.events_sent.inc(len(self.followers))
        await self._to_each(lambda follower: follower.give(event))
        if event.is_final:
            self.end()

    async def ping(self) -> None:
        """Send what keeps proxies from taking the connections for dead ones."""
        await self._to_each(Follower.ping)

    async def _to_each(self, say: Callable[[Follower], None]) -> None:
        """Say it to each of the followers; between every few, whatever else the process has to do gets its turn."""
        self.told_at = time.monotonic()
        for number, follower in enumerate(list(self.followers), 1):
            if follower in self.followers:  # it may have gone meanwhile
                try:
                    say(follower)
                except Exception as exc:  # its connection's fault, and none of the others'
                    logger.warning("a follower could not be told (%s)", type(exc).__name__)
                    follower.end()
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)

    def end(self) -> None:
        for follower in self.followers:
            follower.end()


class Following:
    """Looks at the results that somebody follows, once for all who do. One per web process, in its event loop.

    `read` returns ETag and body of a subject's results; it raises Refusal when they are not to be read, or not any more.
    """

    def __init__(self, read: Callable[[Subject], Awaitable[tuple[bytes, bytes]]]) -> None:
        self._read = read
        self._followed: dict[Subject, Followed] = {}
        self._most = settings.FOLLOWERS_MAX
        self._count = 0
        # {address: how many of them}
        self._addresses: Counter[str] = Counter()
        self._looking: asyncio.Task[None] | None = None
        self._is_ending = False

    def start(self) -> None:
        """Make room for the followers, and have their streams end as soon as the process is told to stop."""
        self._most = min(self._most, _allow_files(2 * self._most) // 2)
        if self._most < settings.FOLLOWERS_MAX:
            logger.warning("FOLLOWERS_MAX is %d; the files that may be open (ulimit -n) suffice for %d", settings.FOLLOWERS_MAX, self._most)
        _call_when_told_to_stop(self.end)

    def end(self) -> None:
        """End all streams; their clients come back, to another process."""
        self._is_ending = True
        for followed in self._followed.values():
            followed.end()

    def admit(self, subject: Subject, event: Event, last_id: bytes, address: str) -> Follower:
        """Return who follows from this event on, unless `last_id` says that it has it. Raises Refusal when there is no room."""
        instead, later = "Read the results now and then instead.", {"Retry-After": _RETRY_AFTER_SECONDS}
        if self._is_ending or self._count >= self._most:
            raise problems.UNAVAILABLE.says(f"As many follow as there is room for. {instead}", headers=later)
        if self._addresses[address] >= max(1, self._most // _ADDRESS_SHARE):
            raise problems.TOO_MANY_REQUESTS.says(f"Too many follow from your address. {instead}", headers=later)
        return Follower(self, subject, event, last_id, address)

    def enter(self, follower: Follower) -> Followed:
        """Have the follower told of what changes from now on."""
        self._count += 1
        self._addresses[follower.address] += 1
        metrics.followers.inc()
        followed = self._followed.setdefault(follower.subject, Followed(follower.event))
        followed.followers.add(follower)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_while_followed())
        if self._is_ending or followed.newest.is_final:  # since it was admitted
            follower.end()
        return followed

    def leave(self, follower: Follower, followed: Followed) -> None:
        self._count -= 1
        self._addresses[follower.address] -= 1
        if not self._addresses[follower.address]:
            del self._addresses[follower.address]
        metrics.followers.dec()
        followed.followers.discard(follower)
        if not followed.followers:
            del self._followed[follower.subject]

    async def _look_while_followed(self) -> None:
        """Tell followers what is new until there are none. One look after the other: many polls can't ask much of PostgreSQL."""
        while self._followed:
            began = time.monotonic()
            for subject, followed in list(self._followed.items()):
                try:
                    await self._look(subject, followed)
                except Exception:
                    logger.exception("the followers of a poll could not be told")
                    followed.end()
            took = time.monotonic() - began
            await asyncio.sleep(max(_LOOK_SECONDS - took, _REST * took))

    async def _look(self, subject: Subject, followed: Followed) -> None:
        try:
            etag, body = await self._read(subject)
            if etag != followed.newest.etag:
                await followed.tell(Event(etag, body))
        except Refusal as refusal:
            # While the database is away they keep what they have. Else they learn why when they come back.
            if refusal.problem is not problems.UNAVAILABLE:
                followed.end()
        if time.monotonic() - followed.told_at >= PING_SECONDS:
            await followed.ping()


class Follower:
    """One stream: a client that gets the results as they change."""

    __slots__ = ("_catching_up", "_followed", "_following", "_last_id", "_life", "_send", "address", "event", "subject")

    def __init__(self, following: Following, subject: Subject, event: Event, last_id: bytes, address: str) -> None:
        self.subject, self.event, self.address = subject, event, address
        self._following = following
        self._last_id = last_id
        self._catching_up: asyncio.Task[None] | None = None

    async def follow(self, method: str, headers: list[tuple[bytes, bytes]], receive: Receive, send: Send) -> None:
        """Answer with the results as they change, until the client goes, `end` is called, or the stream's time is over."""
        self._send = send
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if method == "HEAD":
            return await send(_END)
        await send(_part(b"retry: %d\n\n" % random.randint(*RETRY_MILLISECONDS)))  # noqa: S311 - spread, not a secret
        self._life = asyncio.timeout(random.uniform(*LIFE_SECONDS))  # noqa: S311
        with contextlib.suppress(TimeoutError):
            async with self._life:
                await self._watch(receive)
        with contextlib.suppress(TimeoutError):  # one that does not read is hung up on
            async with asyncio.timeout(_END_SECONDS):
                if self._catching_up:
                    await self._catching_up
                await send(_END)

    async def _watch(self, receive: Receive) -> None:
        self._followed = self._following.enter(self)
        try:
            newest = self._followed.newest  # the others have it or are being told it; what was read for this one may be older
            if newest.id != self._last_id:
                metrics.events_sent.inc()
                self.give(newest)
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._following.leave(self, self._followed)

    def give(self, event: Event) -> None:
        """Send the event, or have what is newest sent once there is room."""
        if self._catching_up is None and not self._write(event.message):
            self._catching_up = asyncio.create_task(self._catch_up())

    def ping(self) -> None:
        if self._catching_up is None:
            self._write(_PING)

    def end(self) -> None:
        """End the stream, once what is newest is sent."""
        if not self._life.expired():
            self._life.reschedule(0)

    def _write(self, message: Message) -> bool:
        """Send it without waiting; return False, with nothing sent, where the client has not read what was sent before.

        A step by hand: a task for each follower and event would cost as much as the sending. Uvicorn waits for room before it
        writes, and never after it.
        """
        sending = self._send(message).__await__()
        try:
            next(sending)
        except StopIteration:
            return True
        sending.close()
        return False

    async def _catch_up(self) -> None:
        event = None
        while event is not self._followed.newest:
            await self._send(_NOTHING)  # waits for room
            event = self._followed.newest
            await self._send(event.message)
        self._catching_up = None


def _allow_files(wanted: int) -> int:
    """Let this process open as many files, if the system's hard limit does; return how many it may open."""
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < min(wanted, hard):
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return soft


def _call_when_told_to_stop(call: Callable[[], None]) -> None:
    """Call it in this event loop when the process gets a signal to stop, before the server's own handler.

    Uvicorn tells its application last of all (lifespan), and before that waits for all answers to end: streams would hold it up.
    """
    loop = asyncio.get_running_loop()

    def chained(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], Any]:
        def handle(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(call)
            handler(number, frame)

        return handle

    for number in (signal.SIGTERM, signal.SIGINT):
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, chained(handler))
