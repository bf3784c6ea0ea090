"""HTTP on one connection: uvicorn's protocol, with a shorter way for what has arrived as a whole, and with one reading of each request.

ASGI costs a vote more than taking it: a task, messages both ways, a write each for head and body. An application may answer such a request
without: by `answer_whole(method, path, headers, fields, body, peer)`, which returns None for what it wants by ASGI. Parsing, the order of
pipelined requests, bodies that come bit by bit, slow readers, keep-alive and the end stay with uvicorn.

What a proxy in front may read differently is refused before either way begins, in the application's words: `refuse(refusal, headers)`.
No other protocol is offered, so a wish for one (`Upgrade`) is passed over; its connection ends with the answer.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from polls import problems
from polls.problems import Refusal

# A path, and perhaps a query: nothing escaped, and no URL such as proxies are sent.
_PLAIN_URL = re.compile(rb"/[^%#]*").fullmatch
_ABSOLUTE_URL = re.compile(rb"https?://([^/?#]*)[^#]*", re.IGNORECASE).fullmatch
# Requests of a connection that may wait for the answer before theirs. Chosen: clients that pipeline at all send a few.
MAX_WAITING = 100
# Bytes that are parsed at once. Chosen: a batch is few of them, and of the shortest requests 600 come on top of MAX_WAITING.
PIECE = 16_384
# Where two of them come, one reader takes the first and another the last.
_OF_THE_MESSAGE = b"host content-type content-length content-encoding transfer-encoding"
_SINGLE = frozenset([*_OF_THE_MESSAGE.split(), b"authorization", b"idempotency-key", b"voter-token", b"vote-receipt", b"origin"])
# What a wish for another protocol consists of (RFC 9110 7.8, RFC 7540 3.2).
_UPGRADE = frozenset([b"connection", b"upgrade", b"http2-settings"])
_UNREADABLE = "Invalid HTTP request received."
# Seconds between two lines in the log about what could not be read: a client may send thousands a second.
TELL_SECONDS = 60
Fields = list[tuple[bytes, bytes]]
# Status, headers, body.
Answer = tuple[int, Fields, bytes]
Answering = Coroutine[Any, Any, Answer]
AnswerWhole = Callable[[str, str, Fields, dict[bytes, bytes], bytes, str], Answering | None]


class _NothingMore(Exception):
    """What follows in the connection is not to be parsed."""


class Protocol(HttpToolsProtocol):
    """What `uvicorn --http core.protocol:Protocol` speaks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Of uvicorn's options, these matter to an answer; whoever uses them gets every request by ASGI.
        is_plain = not (self.root_path or self.limit_concurrency is not None or self.access_log)
        self._answer_whole: AnswerWhole | None = getattr(self.app, "answer_whole", None) if is_plain else None
        self._body: bytearray | None = None  # of a request that may turn out to be whole; uvicorn does not know of it yet
        self._unread = b""  # what came while MAX_WAITING requests waited
        self._running: Any = None  # the cycle that is being answered; `cycle` is the one that came last
        # Of the request that is being parsed.
        self._is_in_body = False
        self._is_upgrade = False
        self._keeps_alive = True
        self._fields: dict[bytes, bytes] = {}
        # The connection's last request has come, or what could not be read: nothing after it is looked at (RFC 9112 9.6).
        self._is_over = False

    # --- What comes -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport, lambda: self.loop.call_soon(self._read_on))

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._running
        super().connection_lost(exc)
        if running is not None and not running.response_complete:  # uvicorn tells the last one only
            running.disconnected = True
            running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._unread or self._is_over or len(data) > PIECE:
            self._unread += data
            self._read_on()
        else:
            self._unset_keepalive_if_required()
            self._parse(data)
            if self._body is not None or self.pipeline or self.timeout_keep_alive_task is not None:
                self._settle()

    def _read_on(self) -> None:
        """Parse what has come, while there is room for the requests in it."""
        if self.transport.is_closing() or self._is_over:
            self._unread = b""
            return
        data, start = self._unread, 0
        if data:
            self._unset_keepalive_if_required()
        while start < len(data) and not self._is_over and len(self.pipeline) < MAX_WAITING:
            self._parse(data[start : start + PIECE])
            start += PIECE
        self._unread = b"" if self._is_over else data[start:]
        self._settle()

    def _settle(self) -> None:
        """See to what was parsed last, and receive no more while too many requests wait."""
        if self._body is not None:  # there is more to come, or what came could not be read
            if self.transport.is_closing():
                self._body = None
            else:
                self._pass_on()
        if self.timeout_keep_alive_task is not None and not self.cycle.response_complete:  # one was answered, and another waits
            self._unset_keepalive_if_required()
        is_full = bool(self._unread) or len(self.pipeline) >= MAX_WAITING
        if is_full or self.flow.is_held:
            self.flow.hold(is_full)

    def _parse(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as exc:
            if not self._is_over:  # else it was CONNECT
                self._begin_anew(piece[exc.args[0] :])
        except httptools.HttpParserError:
            if not self._is_over:
                self._refuse_unreadable()

    def _begin_anew(self, rest: bytes) -> None:
        """Parse the request as if it had not asked for another protocol, and as the connection's last.

        The parser takes what follows its head for the other protocol, and uvicorn would take it for the next request: of one that has a
        body, the body, which its sender may have written like a request (request smuggling).
        """
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name not in _UPGRADE:
                head += (name, b": ", value, b"\r\n")
        head.append(b"connection: close\r\n\r\n")
        self._is_upgrade = False
        self.parser = httptools.HttpRequestParser(self)
        self._parse(b"".join(head))
        if rest and not self._is_over:
            self._parse(rest)

    def _should_upgrade(self) -> bool:
        return False

    # --- What the parser finds ------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_body:
            # A trailer: what the head says, and a proxy wrote into it, is not its to change (RFC 9110 6.5.1). The parser lets some change
            # what it makes of the rest (`Connection: close`), so there is none.
            self._keeps_alive = False
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        asks_for_other = self.parser.should_upgrade()
        if asks_for_other and self.parser.get_method() != b"CONNECT":
            self._is_upgrade = True
            return
        version = self.parser.get_http_version()
        self._keeps_alive = version == "1.1" and not asks_for_other and self.parser.should_keep_alive()
        fields = self._fields = dict(self.headers)
        is_plain = _PLAIN_URL(self.url) is not None
        if (
            b"host" not in fields
            or len(fields) < len(self.headers)
            or b"content-encoding" in fields
            or b"transfer-encoding" in fields
            or not is_plain
            or version != "1.1"
        ) and (fault := _find_fault(version, self.url, fields, self.headers)):
            self._refuse(*fault)
        elif (
            is_plain
            and self._answer_whole is not None
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and not self.transport.is_closing()
            and not self.expect_100_continue
        ):
            self._body = bytearray()
        else:
            self._give_to(_closing_unless_read(self.app) if self.expect_100_continue else self.app)
        self._is_in_body = True

    def on_body(self, body: bytes) -> None:
        if self._body is None:
            super().on_body(body)
        else:
            self._body += body

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        self._is_in_body = False
        self._is_over = not self._keeps_alive
        answering = None
        if self._body is not None and self._answer_whole is not None:
            path, peer = self.url.partition(b"?")[0].decode("latin-1"), self.client[0] if self.client else ""
            method = self.parser.get_method().decode()
            answering = self._answer_whole(method, path, self.headers, self._fields, bytes(self._body), peer)
            if answering is None:
                self._pass_on()
        if answering is None:
            super().on_message_complete()
        else:
            self._body = None
            request = _Request(self, answering, self._keeps_alive)
            self.cycle = self._running = request  # type: ignore[assignment]
            request.go_on()
        if self._is_over:
            if not self._keeps_alive:
                self._end_with_answer()
            raise _NothingMore

    def _pass_on(self) -> None:
        """Let uvicorn have the request that has come so far."""
        body, self._body = self._body, None
        self._give_to(self.app)
        if body:
            super().on_body(bytes(body))

    def _give_to(self, application: Any) -> None:
        """Have this application answer the request, by ASGI, when it is its turn."""
        ours, self.app = self.app, application
        try:
            super().on_headers_complete()
        finally:
            self.app = ours
        if not self._keeps_alive:
            self._end_with_answer()

    def _end_with_answer(self) -> None:
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self.transport.close()

    # --- What is refused ------------------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal, is_last: bool) -> None:
        """Have the refusal sent when it is its turn. `is_last`: nobody can say for certain where the request ends."""
        is_last = is_last or self.expect_100_continue  # perhaps its body comes, perhaps it does not
        answer = self._put(refusal)
        if is_last:
            answer[1].append((b"connection", b"close"))
        self._give_to(_answering(answer))
        if is_last:
            self._is_over = True
            raise _NothingMore

    def _put(self, refusal: Refusal) -> Answer:
        refuse = getattr(self.app, "refuse", None)
        if refuse is None:
            return refusal.problem.status, [(b"content-length", b"0")], b""
        answer: Answer = refuse(refusal, self.headers)
        return answer

    def _refuse_unreadable(self) -> None:
        """Say once that what came can't be read: after the answers to all requests before it, and not after one to the same request."""
        self._is_over = True
        _unreadable.count(self.logger)
        cycle: Any = self.cycle
        if self._body is not None:
            self._body = None
            self.send_400_response(_UNREADABLE)
        elif cycle is None or (cycle.response_complete and not self._is_in_body):
            self.send_400_response(_UNREADABLE)
        elif self._is_in_body and not self.pipeline:  # the request is being answered, and the rest of its body is none
            if cycle.response_started:
                self.transport.close()
            else:
                self.send_400_response(_UNREADABLE)
                cycle.disconnected = True
                cycle.message_event.set()
        else:
            if self._is_in_body:
                self.pipeline.popleft()
            self.cycle = _Request(self, _unreadable_answer(), keep_alive=False)  # type: ignore[assignment]
            self.pipeline.appendleft((self.cycle, self.app))

    # --- What is answered -----------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        if isinstance(cycle, _Request):
            cycle.go_on()
        else:
            super()._start_asgi_task(cycle, app)

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
            self.end()
        self.on_response_complete()

    def end(self) -> None:
        self._is_over = True
        self.transport.close()


class _Flow(FlowControl):
    """Receives nothing while it is held: uvicorn would go on with every answer, and whenever an application looks for more."""

    def __init__(self, transport: asyncio.Transport, wanted: Callable[[], Any]) -> None:
        super().__init__(transport)
        self.is_held = False
        self._wanted = wanted

    def hold(self, is_held: bool) -> None:
        self.is_held = is_held
        if is_held:
            self.pause_reading()
        else:
            self.resume_reading()

    def resume_reading(self) -> None:
        if self.read_paused:
            if self.is_held:
                self._wanted()
            else:
                super().resume_reading()


def _find_fault(version: str, url: bytes, fields: dict[bytes, bytes], lines: Fields) -> tuple[Refusal, bool] | None:
    """Return what is wrong with the head, and whether it leaves open where the request ends; None for a good one."""
    if version not in ("1.0", "1.1"):
        return problems.BAD_REQUEST.says("Use HTTP/1.1."), True
    if (coding := fields.get(b"transfer-encoding")) is not None:
        if version == "1.0":
            return problems.BAD_REQUEST.says("HTTP/1.0 has no Transfer-Encoding."), True
        if coding.lower() != b"chunked":
            return problems.UNKNOWN_TRANSFER.says("Use `Transfer-Encoding: chunked`, or Content-Length."), True
    if len(fields) < len(lines):
        names = [name for name, _ in lines]
        if doubled := next((name for name in fields if name in _SINGLE and names.count(name) > 1), None):
            return problems.BAD_REQUEST.says(f"Send the header {doubled.decode().title()} once."), False
    if b"host" not in fields and version == "1.1":
        return problems.BAD_REQUEST.says("Send the header Host."), False
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        return problems.ENCODED_BODY.says("Send the body as it is.", headers={"Accept-Encoding": "identity"}), False
    if b"#" in url:
        return problems.BAD_REQUEST.says("Send the address without its fragment."), False
    if not url.startswith(b"/") and url != b"*":
        named = _ABSOLUTE_URL(url)
        if named is None or named[1].lower() != fields.get(b"host", named[1]).lower():
            return problems.BAD_REQUEST.says("Send a path, or the URL of the host that Host names."), False
    return None


def _answering(answer: Answer) -> Any:
    status, headers, body = answer

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answering


def _closing_unless_read(application: Any) -> Any:
    """Return the application whose answer ends the connection if it does not ask for the body.

    A client that waits for "100 Continue" may then leave the body out, and what it sends next would be taken for it.
    """

    async def answering(scope: Any, receive: Any, send: Any) -> None:
        is_read = False

        async def receive_body() -> Any:
            nonlocal is_read
            is_read = True
            return await receive()

        async def send_answer(message: Any) -> None:
            if message["type"] == "http.response.start" and not is_read:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await application(scope, receive_body, send_answer)

    return answering


async def _unreadable_answer() -> Answer:
    text = _UNREADABLE.encode()
    return 400, [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(text))], text


class _Unreadable:
    """Tells the log how much could not be read, and not each by itself."""

    def __init__(self) -> None:
        self._untold = 0
        self._tell_at = 0.0

    def count(self, logger: Any) -> None:
        self._untold += 1
        if time.monotonic() >= self._tell_at:
            logger.warning("Invalid HTTP requests received since this was last said: %d", self._untold)
            self._untold, self._tell_at = 0, time.monotonic() + TELL_SECONDS


_unreadable = _Unreadable()


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
            self._protocol.end()
        else:
            if awaited is None:  # it lets others go first
                self._protocol.loop.call_soon(self.go_on)
                return
            awaited._asyncio_future_blocking = False  # as a task tells a future that it has seen it
            awaited.add_done_callback(self.go_on)
