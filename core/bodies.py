"""Bodies on their way to Django: none is taken beyond what its address needs. Django itself would keep it on disk to the end first."""

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
        left, has_answered = most, False
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and (len(length) > 12 or int(length) > most):
            return await _refuse(send, most)

        async def receive_what_is_left() -> dict[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def note_and_send(message: dict[str, Any]) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        await application(scope, receive_what_is_left, note_and_send)
        if left < 0 and not has_answered:
            await _refuse(send, most)

    return bounding


async def _refuse(send: Send, most: int) -> None:
    body = json.dumps(problems.TOO_LARGE.says(f"This takes at most {most} bytes.").body()).encode()
    headers = [(b"content-type", problems.CONTENT_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": problems.TOO_LARGE.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
