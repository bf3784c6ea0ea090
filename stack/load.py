"""A crowd of clients on one core: casts votes over keep-alive connections, and repeats what got no definite answer."""

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


@dataclass(slots=True)
class Cast:
    """A vote that a client casts until it knows what became of it."""

    request: bytes
    sent_at: float = 0.0
    # Of the definite answer: HTTP status, seconds from the last sending, body.
    status: int = 0
    seconds: float = 0.0
    body: bytes = b""
    # Answers that left it unknown, as (status, seconds): 0 for none at all, else a 5xx.
    unknown: list[tuple[int, float]] = field(default_factory=list)


def post(path: str, body: object, headers: dict[str, str]) -> bytes:
    """Return a POST request of JSON, ready to be sent to localhost."""
    content = json.dumps(body).encode()
    headers = {"host": "localhost", **headers, "content-type": "application/json", "content-length": str(len(content))}
    head = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(head).encode() + content


def cast_all(
    port: int, casts: Iterable[Cast], *, connections: int = 64, seconds: float = 120, on_answer: Callable[[Cast], None] | None = None
) -> None:
    """Send every cast, each connection one after the other, until each has a definite answer (2xx to 4xx).

    Raises TimeoutError after `seconds`. `on_answer` is called for each definite answer.
    """

    async def run() -> None:
        crowd = _Crowd(port, iter(casts), on_answer)
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(crowd.client() for _ in range(connections)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


class _Crowd:
    """What the clients share: the votes yet to cast, and those to cast again."""

    def __init__(self, port: int, casts: Iterator[Cast], on_answer: Callable[[Cast], None] | None) -> None:
        self.port = port
        self.casts = casts
        self.again: deque[Cast] = deque()
        self.under_way = 0
        self.on_answer = on_answer

    def next(self) -> Cast | None:
        cast = self.again.popleft() if self.again else next(self.casts, None)
        self.under_way += cast is not None
        return cast

    def answered(self, cast: Cast, status: int, body: bytes) -> None:
        self.under_way -= 1
        seconds = time.perf_counter() - cast.sent_at
        if 200 <= status < 500:
            cast.status, cast.seconds, cast.body = status, seconds, body
            if self.on_answer:
                self.on_answer(cast)
        else:
            cast.unknown.append((status, seconds))
            self.again.append(cast)

    async def client(self) -> None:
        """One client: connects, casts until nothing is left, connects again when cut off."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, connection = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
                await connection.ended
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
            if cast := self.next():
                # There is more: give it back, and serve it on the next connection.
                self.under_way -= 1
                self.again.appendleft(cast)
            elif self.under_way:
                await asyncio.sleep(RECONNECT_SECONDS)  # others may yet have something to cast again
            else:
                return


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request under way at a time."""

    def __init__(self, crowd: _Crowd) -> None:
        self.crowd = crowd
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.cast: Cast | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = typing.cast("asyncio.Transport", transport)
        self.send()

    def send(self) -> None:
        self.cast = self.crowd.next()
        if self.cast is None:
            self.transport.close()
            return
        self.parser, self.body = httptools.HttpResponseParser(self), b""
        self.cast.sent_at = time.perf_counter()
        self.transport.write(self.cast.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        assert self.cast is not None
        cast, self.cast = self.cast, None
        self.crowd.answered(cast, self.parser.get_status_code(), self.body)
        # A pause before repeating, as Retry-After asks for, is left out: it would only hide what the server does.
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.cast is not None:
            self.crowd.answered(self.cast, 0, b"")
        if not self.ended.done():
            self.ended.set_result(None)
