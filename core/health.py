"""Whether this process lives. No I/O: a container must not be restarted because the database is away."""

from collections.abc import Awaitable, Callable
from typing import Any


async def say_alive(send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Answer `GET /healthz`."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"3"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok\n"})
