"""A crowd of clients on one core: casts votes over keep-alive connections, and repeats what got no definite answer.

It shares its machine with what it measures, so it does little: one write and one look at the answer for each request.
"""

from __future__ import annotations

import asyncio
import json
import time
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import httptools
import uvloop

RECONNECT_SECONDS = 0.05
# How long the clock sleeps between two looks at what is due, where there is a rate; the event loop knows nothing shorter.
TICK_SECONDS = 0.001
# Status lines of answers that have a body as long as their Content-Length says: not 1xx, 204 and 304.
_STATUSES = {b"HTTP/1.1 %d" % status: status for status in range(200, 600) if status not in (204, 304)}
_LENGTH, _LENGTH_IN_CAPITALS = b"\r\ncontent-length: ", b"\r\nContent-Length: "
# Status, body, whether the connection takes another request.
Answer = tuple[int, bytes, bool]


@dataclass(slots=True)
class Cast:
    """A vote that a client casts until it knows what became of it."""

    request: bytes
    # When it was to be sent (perf_counter): as soon as a connection was free, or when the rate said so.
    due_at: float = 0.0
    # Of the definite answer: HTTP status, seconds from due_at, body.
    status: int = 0
    seconds: float = 0.0
    body: bytes = b""
    # Answers that left it unknown, as (status, seconds): 0 for none at all, else a 5xx.
    unknown: list[tuple[int, float]] = field(default_factory=list)


def post(path: str, body: object, headers: dict[str, str]) -> bytes:
    """Return a POST request of JSON, ready to be sent to localhost."""
    content = json.dumps(body).encode()
    return get(path, {**headers, "content-type": "application/json", "content-length": str(len(content))}, "POST") + content


def get(path: str, headers: dict[str, str], method: str = "GET") -> bytes:
    """Return a request without a body."""
    head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {"host": "localhost", **headers}.items()), "", ""]
    return "\r\n".join(head).encode()


def cast_all(
    port: int,
    casts: Iterable[Cast],
    *,
    connections: int = 64,
    seconds: float = 120,
    per_second: float | None = None,
    on_answer: Callable[[Cast], None] | None = None,
) -> None:
    """Send every cast, each connection one after the other, until each has a definite answer (2xx to 4xx).

    Raises TimeoutError after `seconds`. `per_second`: so many, evenly, whatever the answers do; one that finds no connection free
    waits for it, and its time counts from when it was due. `on_answer` is called for each definite answer.
    """

    async def run() -> None:
        crowd = _Crowd(port, iter(casts), per_second, on_answer)
        async with asyncio.timeout(seconds):
            await crowd.run(connections)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


class _Crowd:
    """What the clients share: the votes yet to cast, and those to cast again."""

    def __init__(self, port: int, casts: Iterator[Cast], per_second: float | None, on_answer: Callable[[Cast], None] | None) -> None:
        self.port = port
        self.on_answer = on_answer
        self.per_second = per_second
        self.casts: Iterator[Cast] = iter(()) if per_second else casts
        self.to_come: Iterator[Cast] | None = casts if per_second else None
        # Due by the rate, or to be cast again.
        self.due: deque[Cast] = deque()
        self.idle: list[_Connection] = []
        self.under_way = 0
        self.done = asyncio.Event()

    async def run(self, connections: int) -> None:
        tasks: list[asyncio.Task[object]] = [asyncio.create_task(self.client()) for _ in range(connections)]
        tasks.append(asyncio.create_task(self.done.wait()))
        try:
            if self.to_come and self.per_second:
                while len(self.idle) < connections:  # noqa: ASYNC110 - the first to come would else wait for their connection
                    await asyncio.sleep(TICK_SECONDS)
                await self.keep_pace(self.to_come, self.per_second)
            for task in (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]:
                task.result()  # a client ends only by what it raises
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def keep_pace(self, casts: Iterator[Cast], per_second: float) -> None:
        """Have each sent when it is due."""
        started = time.perf_counter()
        for number, cast in enumerate(casts):
            cast.due_at = started + number / per_second
            while time.perf_counter() < cast.due_at:  # noqa: ASYNC110 - nobody says when it is time
                await asyncio.sleep(TICK_SECONDS)
            self.add(cast)
        self.to_come = None
        self.look_whether_done()

    async def client(self) -> None:
        """One client: connects, casts, connects again when cut off."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
            except OSError:
                self.look_whether_done()  # whoever has nothing left to cast needs no server
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                await connection.ended
            finally:
                connection.end()

    def add(self, cast: Cast) -> None:
        """Have it cast as soon as a connection is free."""
        if self.idle:
            self.under_way += 1
            self.idle.pop().send(cast)
        else:
            self.due.append(cast)

    def serve(self, connection: _Connection, at: float) -> None:
        """Give the connection what it casts next, or let it wait."""
        cast = self.due.popleft() if self.due else next(self.casts, None)
        if cast is None:
            self.idle.append(connection)
            self.look_whether_done()
            return
        self.under_way += 1
        if self.per_second is None:
            cast.due_at = at
        connection.send(cast)

    def look_whether_done(self) -> None:
        if not self.under_way and not self.due and self.to_come is None:
            if cast := next(self.casts, None):
                self.due.append(cast)
            else:
                self.done.set()

    def answered(self, cast: Cast, status: int, body: bytes, at: float) -> None:
        self.under_way -= 1
        if 200 <= status < 500:
            cast.status, cast.seconds, cast.body = status, at - cast.due_at, body
            if self.on_answer:
                self.on_answer(cast)
        else:
            # A pause before repeating, as Retry-After asks for, is left out: it would only hide what the server does.
            cast.unknown.append((status, at - cast.due_at))
            self.add(cast)


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request under way at a time."""

    def __init__(self, crowd: _Crowd) -> None:
        self.crowd = crowd
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cast: Cast | None = None
        # What has come of an answer that is not complete.
        self.begun = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = typing.cast("asyncio.Transport", transport)
        self.crowd.serve(self, time.perf_counter())

    def send(self, cast: Cast) -> None:
        self.cast = cast
        self.transport.write(cast.request)

    def data_received(self, data: bytes) -> None:
        at = time.perf_counter()
        if self.begun:
            data = self.begun + data
        answer = read_answer(data)
        if answer is None:
            self.begun = data
            return
        cast, self.cast, self.begun = self.cast, None, b""
        if cast is None:  # nobody asked for it
            self.transport.close()
            return
        status, body, stays = answer
        self.crowd.answered(cast, status, body, at)
        if stays:
            self.crowd.serve(self, at)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.crowd.idle:
            self.crowd.idle.remove(self)
        cast, self.cast = self.cast, None
        if cast is not None:
            self.crowd.answered(cast, 0, b"", time.perf_counter())
        if not self.ended.done():
            self.ended.set_result(None)

    def end(self) -> None:
        """Hang up; what is under way gets no answer, and was not refused one."""
        self.cast = None
        self.transport.close()


def read_answer(data: bytes) -> Answer | None:
    """Return the answer that is in what has come since the request was sent; None while a part of it is missing."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return None
    status = _STATUSES.get(data[:12])
    # From the right: that is three times as fast here.
    at = data.rfind(_LENGTH, 12, head)
    if at < 0:
        at = data.rfind(_LENGTH_IN_CAPITALS, 12, head)
    if at < 0 or status is None:
        return _parse(data)
    start = head + 4
    end = start + int(data[at + 18 : data.find(b"\r", at + 18)])
    if len(data) < end:
        return None
    # "Connection: close", however it is written; and more than one answer to one request means that we are out of step.
    return status, data[start:end], data.rfind(b": close\r", 12, start) < 0 and len(data) == end


def _parse(data: bytes) -> Answer | None:
    """The same for any answer, at twenty times the cost."""
    answer = _Parsed()
    parser = httptools.HttpResponseParser(answer)
    answer.parser = parser
    try:
        parser.feed_data(data)
    except httptools.HttpParserError:
        if answer.stays is None:
            raise
        answer.stays = False  # it is what follows the answer that can't be read
    return None if answer.stays is None else (answer.status, b"".join(answer.parts), answer.stays)


class _Parsed:
    """What httptools finds: the first answer that is not a 1xx."""

    parser: httptools.HttpResponseParser

    def __init__(self) -> None:
        self.status = 0
        self.parts: list[bytes] = []
        self.stays: bool | None = None

    def on_body(self, body: bytes) -> None:
        if self.stays is None:
            self.parts.append(body)

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        if self.stays is None and status >= 200:
            self.status, self.stays = status, self.parser.should_keep_alive()
        elif self.stays is not None:
            self.stays = False  # more than one answer
