"""The door on the web port: liveness, then the hot routes, then Django for everything else."""

import os
import warnings

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
# WhiteNoise answers with files, read in threads; they are small.
warnings.filterwarnings("ignore", message="StreamingHttpResponse must consume synchronous iterators")
django_application = get_asgi_application()  # also loads the settings and models that the hot routes share

from core import health  # noqa: E402
from polls.intake import Intake  # noqa: E402 - needs Django to be set up

intake = Intake(behind=django_application)  # type: ignore[arg-type] # dict and Mapping


async def application(scope, receive, send):  # type: ignore[no-untyped-def]
    """The ASGI application that uvicorn runs."""
    if scope["type"] == "http" and scope["path"] == "/healthz":
        await health.say_alive(send)
    else:
        await intake(scope, receive, send)
