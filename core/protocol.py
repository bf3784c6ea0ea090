"""HTTP on one connection: uvicorn's protocol, with a shorter way for requests that have arrived as a whole.

ASGI costs a vote more than taking it: a task, messages both ways, a write each for head and body. An application may answer such a request
without: by `answer_whole(method, path, headers, body, peer)`, which returns None for what it wants by ASGI. Everything else stays with
uvicorn: parsing, the order of pipelined requests, bodies that come bit by bit, slow readers, keep-alive, WebSockets and the end.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

# A path, and perhaps a query: nothing escaped, no fragment, no "*", and no URL such as proxies are sent.
_PLAIN_URL = re.compile(rb"/[^%#]*").fullmatch
Fields = list[tuple[bytes, bytes]]
# Status, headers, body.
Answer = tuple[int, Fields, bytes]
Answering = Coroutine[Any, Any, Answer]
AnswerWhole = Callable[[str, str, Fields, bytes, str], Answering | None]


class Protocol(HttpToolsProtocol):
    """What `uvicorn --http core.protocol:Protocol` speaks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Of uvicorn's options, these matter to an answer; whoever uses them gets every request by ASGI.
        is_plain = not (self.root_path or self.limit_concurrency is not None or self.access_log)
        self._answer_whole: AnswerWhole | None = getattr(self.app, "answer_whole", None) if is_plain else None
        self._body: bytearray | None = None  # of a request that may turn out to be whole; uvicorn does not know of it yet

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._body is not None:  # there is more to come, or what came could not be read
            if self.transport.is_closing():
                self._body = None
            else:
                self._pass_on()

    def on_headers_complete(self) -> None:
        is_next = self.cycle is None or self.cycle.response_complete
        if (
            self._answer_whole is None
            or not is_next
            or self.flow.write_paused
            or self.transport.is_closing()
            or self.expect_100_continue
            or self.parser.should_upgrade()
            or not _PLAIN_URL(self.url)
        ):
            super().on_headers_complete()
        else:
            self._body = bytearray()

    def on_body(self, body: bytes) -> None:
        if self._body is None:
            super().on_body(body)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        if self._body is None:
            super().on_message_complete()
            return
        assert self._answer_whole is not None
        path, peer = self.url.partition(b"?")[0].decode("latin-1"), self.client[0] if self.client else ""
        answering = self._answer_whole(self.parser.get_method().decode(), path, self.headers, bytes(self._body), peer)
        if answering is None:
            self._pass_on()
            super().on_message_complete()
            return
        self._body = None
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        request = _Request(self, answering, keep_alive)
        self.cycle = request  # type: ignore[assignment]
        request.go_on()

    def _pass_on(self) -> None:
        """Let uvicorn have the request that has come so far."""
        body, self._body = self._body, None
        super().on_headers_complete()
        if body:
            super().on_body(bytes(body))

    def respond(self, answer: Answer, *, keep_alive: bool) -> None:
        status, headers, body = answer
        written = [STATUS_LINE[status]]
        for name, value in self.server_state.default_headers:
            written += (name, b": ", value, b"\r\n")
        for name, value in headers:
            written += (name, b": ", value, b"\r\n")
        if not keep_alive:
            written.append(b"connection: close\r\n")
        written += (b"\r\n", body)
        self.transport.write(b"".join(written))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()


class _Request:
    """A request that is answered as a whole, and what the protocol looks at in one of uvicorn's cycles.

    Goes on with its coroutine whenever the future that it awaits is settled, as a task would, without one: a task takes a tenth of a vote's
    time. So what it runs may await futures and tasks, and make no use of the current task: asyncio.timeout does.
    """

    __slots__ = ("_answering", "_protocol", "disconnected", "keep_alive", "response_complete")
    message_event = asyncio.Event()  # nobody waits for it

    def __init__(self, protocol: Protocol, answering: Answering, keep_alive: bool) -> None:
        self._protocol = protocol
        self._answering = answering
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False

    def go_on(self, _: object = None) -> None:
        try:
            awaited = self._answering.send(None)
        except StopIteration as done:
            self.response_complete = True
            if not self.disconnected:
                self._protocol.respond(done.value, keep_alive=self.keep_alive)
        except BaseException as exc:
            self.response_complete = True
            self._protocol.logger.error("Exception while a request was answered", exc_info=exc)
            self._protocol.transport.close()
        else:
            if awaited is None:  # it lets others go first
                self._protocol.loop.call_soon(self.go_on)
                return
            awaited._asyncio_future_blocking = False  # as a task tells a future that it has seen it
            awaited.add_done_callback(self.go_on)
