"""Addresses that will go: their answers say so (RFC 9745, RFC 8594), whether a hot route or Django gives them."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from typing import Any

Scope = dict[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Any, Send], Awaitable[None]]


@dataclass(frozen=True)
class Deprecation:
    """`since` is when it was said, `until` when the address goes (both UTC), `see` the page that tells what to use instead."""

    since: datetime
    until: datetime
    see: str

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"deprecation", b"@%d" % self.since.timestamp()),
            (b"sunset", format_datetime(self.until, usegmt=True).encode()),
            (b"link", f'<{self.see}>; rel="deprecation"'.encode()),
        ]


# {beginning of a path: its deprecation}. Nothing is deprecated now.
DEPRECATED: Mapping[str, Deprecation] = {}


def announced(application: Application, deprecated: Mapping[str, Deprecation]) -> Application:
    """Return the application with its deprecated addresses saying so; itself while there are none, which costs nothing."""
    if not deprecated:
        return application

    async def announcing(scope: Scope, receive: Any, send: Send) -> None:
        found = next((known for path, known in deprecated.items() if scope.get("path", "").startswith(path)), None)

        async def send_announced(message: dict[str, Any]) -> None:
            if found and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *found.headers]}
            await send(message)

        await application(scope, receive, send_announced)

    return announcing
