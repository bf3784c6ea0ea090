"""Bodies on their way to Django: none is taken beyond what its address needs, and each has a length.

Django itself would keep any body on disk to its end first, and the REST framework takes one without a length for none.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings

from polls import problems

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# A list of 100,000 voter codes with long labels.
MAX_CODES_BYTES = 25_000_000


def bounded(application: Application) -> Application:
    """Return the application that answers 413 instead of reading on."""

    async def bounding(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await application(scope, receive, send)
        most = MAX_CODES_BYTES if scope["path"].rstrip("/").endswith("/codes") else settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 12 or int(length) > most):
            return await _refuse(send, most)
        if b"transfer-encoding" not in headers:
            return await application(scope, receive, send)

        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                return await _refuse(send, most)
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> dict[str, Any]:
            return whole.pop() if whole else await receive()

        given = [*scope["headers"], (b"content-length", b"%d" % len(body))]
        return await application({**scope, "headers": given}, receive_whole, send)

    return bounding


async def _refuse(send: Send, most: int) -> None:
    body = json.dumps(problems.TOO_LARGE.says(f"This takes at most {most} bytes.").body()).encode()
    headers = [(b"content-type", problems.CONTENT_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": problems.TOO_LARGE.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
