"""The door on the web port: liveness, then (with CORS where a browser asks) the hot routes, then Django for everything else."""

import os
import warnings

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
# WhiteNoise answers with files, read in threads; they are small.
warnings.filterwarnings("ignore", message="StreamingHttpResponse must consume synchronous iterators")
django_application = get_asgi_application()  # also loads the settings and models that the hot routes share

from django.conf import settings  # noqa: E402 - all of these need Django to be set up
from starlette.middleware.cors import CORSMiddleware  # noqa: E402

from core import bodies, deprecations, exporting, health, noting  # noqa: E402
from core.protocol import Answering, Fields  # noqa: E402
from polls.intake import Intake  # noqa: E402

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


def _has_origin(headers: list[tuple[bytes, bytes]]) -> bool:
    for name, _ in headers:  # noqa: SIM110 - a generator would take three times as long, of each vote
        if name == b"origin":
            return True
    return False


class Application:
    """The ASGI application that uvicorn runs, with a shorter way for what has arrived as a whole (core/protocol.py)."""

    async def __call__(self, scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["type"] == "lifespan":
            exporting.start()
            noting.start("web")
        if scope["type"] != "http":
            await served(scope, receive, send)
        elif scope["path"] == "/healthz":
            await health.say_alive(send)
        elif scope["path"] == "/readyz":
            await readiness.say(send)
        elif _has_origin(scope["headers"]):
            await served_across_origins(scope, receive, send)
        else:
            await served(scope, receive, send)

    def answer_whole(self, method: str, path: str, headers: Fields, body: bytes, peer: str) -> Answering | None:
        if deprecations.DEPRECATED or _has_origin(headers):
            return None
        return intake.answer_whole(method, path, headers, body, peer)


application = Application()
