"""Nothing behind the server: what uvicorn can do at most, and what the load generator can.

`application` gives the answers that the product gave (their headers and bodies, from the file in NOOP_ANSWERS), to the same requests,
without looking at them; `whole` by the shorter way of core/protocol.py, too. `python -m bench.noop PORT` is no HTTP server at all: it
writes one constant answer for whatever it reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import typing
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

Message = dict[str, Any]
Headers = list[tuple[bytes, bytes]]

_answers: dict[str, tuple[int, Headers, bytes]] = {}


def keep_answers(path: Path, answers: dict[str, tuple[int, list[tuple[str, str]], bytes]]) -> None:
    """Write the answers to each method, as (status, headers, body)."""
    path.write_text(json.dumps({method: (status, headers, body.decode()) for method, (status, headers, body) in answers.items()}))


def _load_answers() -> None:
    for method, (status, headers, body) in json.loads(Path(os.environ["NOOP_ANSWERS"]).read_text()).items():
        _answers[method] = status, [(name.encode(), value.encode()) for name, value in headers], body.encode()


async def application(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
    """The ASGI application that uvicorn runs instead of the product's."""
    if scope["type"] == "lifespan":
        _load_answers()
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    method = scope["method"]
    if method == "POST":
        while (await receive()).get("more_body"):
            pass
    status, headers, body = _answers[method]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Whole:
    """The same for a protocol that asks it before ASGI."""

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        await application(scope, receive, send)

    async def answer_whole(
        self, method: str, path: str, headers: Headers, fields: dict[bytes, bytes], body: bytes, peer: str
    ) -> tuple[int, Headers, bytes]:
        return _answers[method]


whole = _Whole()


class _Constant(asyncio.Protocol):
    answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = typing.cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.answer)


async def _serve(port: int) -> None:
    _load_answers()
    status, headers, body = _answers["POST"]
    head = [b"HTTP/1.1 %d Accepted" % status, *(b"%s: %s" % header for header in headers), b"", b""]
    _Constant.answer = b"\r\n".join(head) + body
    server = await asyncio.get_running_loop().create_server(_Constant, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(int(sys.argv[1])))
