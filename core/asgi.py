"""The door on the web port: liveness, then (with CORS where a browser asks) the hot routes, then Django for everything else."""

import os
import re
import warnings

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
# WhiteNoise answers with files, read in threads; they are small.
warnings.filterwarnings("ignore", message="StreamingHttpResponse must consume synchronous iterators")
django_application = get_asgi_application()  # also loads the settings and models that the hot routes share

from django.conf import settings  # noqa: E402 - all of these need Django to be set up
from starlette.middleware.cors import CORSMiddleware  # noqa: E402

from core import bodies, deprecations, exporting, health, noting  # noqa: E402
from core.protocol import Answer, Answering, Fields  # noqa: E402
from polls import problems  # noqa: E402
from polls.intake import Intake, refuse  # noqa: E402
from polls.problems import Refusal  # noqa: E402

intake = Intake(behind=bodies.bounded(django_application))  # type: ignore[arg-type] # dict and Mapping
served = deprecations.announced(intake, deprecations.DEPRECATED)
served_across_origins = CORSMiddleware(
    served,  # type: ignore[arg-type]
    allow_origins=settings.CORS_ALLOWED_ORIGINS,
    allow_credentials=True,
    allow_methods=["GET", "HEAD", "POST", "PATCH", "DELETE"],
    allow_headers=[
        "Authorization",
        "Content-Type",
        "Idempotency-Key",
        "If-Match",
        "If-None-Match",
        "Last-Event-ID",
        "Prefer",
        "Voter-Token",
        "Vote-Receipt",
        "X-Request-ID",
    ],
    expose_headers=["ETag", "Location", "Preference-Applied", "RateLimit", "RateLimit-Policy", "Retry-After", "X-Request-ID"],
)


readiness = health.Readiness()

# What nobody needs to escape: letters, digits, "-", ".", "_" and "~" (RFC 3986 2.3), and the slash.
_DISGUISED = re.compile(rb"%(?:2[def]|3[0-9]|[46][1-9a-f]|[57][0-9a]|5f|7e)", re.IGNORECASE).search


class Application:
    """The ASGI application that uvicorn runs, with a shorter way for what has arrived as a whole (core/protocol.py)."""

    async def __call__(self, scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["type"] == "lifespan":
            exporting.start()
            noting.start("web")
        if scope["type"] != "http":
            await served(scope, receive, send)
        elif b"%" in scope["raw_path"] and _DISGUISED(scope["raw_path"]):
            # A proxy in front that has a rule for the path may compare it as it was sent.
            await _send(send, self.refuse(problems.NOT_FOUND.says("Write the path without needless escapes."), scope["headers"]))
        elif scope["path"] == "/healthz":
            await health.say_alive(send)
        elif scope["path"] == "/readyz":
            await readiness.say(send)
        elif any(name == b"origin" for name, _ in scope["headers"]):
            await served_across_origins(scope, receive, send)
        else:
            await served(scope, receive, send)

    def refuse(self, refusal: Refusal, headers: Fields) -> Answer:
        return refuse(refusal, headers)

    def answer_whole(self, method: str, path: str, headers: Fields, fields: dict[bytes, bytes], body: bytes, peer: str) -> Answering | None:
        if deprecations.DEPRECATED or b"origin" in fields:
            return None
        return intake.answer_whole(method, path, headers, fields, body, peer)


async def _send(send, answer: Answer) -> None:  # type: ignore[no-untyped-def]
    status, headers, body = answer
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


application = Application()
