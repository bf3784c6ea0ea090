"""Whether this web process lives, and whether it can accept votes."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from polls import clocks, problems, publishing, voter_secrets

Send = Callable[[dict[str, Any]], Awaitable[None]]

# How long each part may take to answer, and how long what was found is good (seconds).
PATIENCE_SECONDS = 1.0
GOOD_SECONDS = 1.0


async def say_alive(send: Send) -> None:
    """Answer `GET /healthz`. No I/O: a container must not be restarted because the database is away."""
    await _send(send, 200, b"text/plain", b"ok\n")


class Readiness:
    """Answers `GET /readyz`. One per web process, in its event loop."""

    def __init__(self) -> None:
        self._looking: asyncio.Task[dict[str, str]] | None = None
        self._good_until = 0.0
        self._reading: asyncio.Future[dict[str, str]] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="readiness")
        # Then the polls that it knows serve it while the database is away.
        self._was_ready = False

    async def say(self, send: Send) -> None:
        """The status says whether a balancer should send votes here; the body names every part that is wrong, also where it may."""
        if self._looking is None or (self._looking.done() and time.monotonic() > self._good_until):
            self._looking = asyncio.create_task(self._look())
        wrong = await asyncio.shield(self._looking)
        parts = {part: wrong.get(part, "ok") for part in ("database", "migrations", "broker", "queues")} | wrong
        if self._accepts(wrong):
            body: dict[str, Any] = {"status": "degraded" if wrong else "ready", "parts": parts}
            return await _send(send, 200, b"application/json", json.dumps(body).encode())
        refusal = problems.UNAVAILABLE.says(f"This process can't accept votes: see {' and '.join(wrong)}.")
        body = {**refusal.body(), "status": 503, "parts": parts}
        await _send(send, 503, problems.CONTENT_TYPE.encode(), json.dumps(body).encode())

    def _accepts(self, wrong: dict[str, str]) -> bool:
        """A vote needs a poll that is known, and a broker or an outbox that keeps it."""
        if "voter_secret" in wrong:  # it was away when the process started, or the secret was changed since
            return False
        is_broker_good = not wrong.keys() & {"broker", "queues"}
        if not wrong.keys() & {"database", "migrations"}:
            self._was_ready = True
            return True
        return "database" in wrong and self._was_ready and is_broker_good

    async def _look(self) -> dict[str, str]:
        """Return {part: what is wrong}, in PATIENCE_SECONDS."""
        database, broker = await asyncio.gather(self._look_at_database(), _look_at_broker())
        self._good_until = time.monotonic() + GOOD_SECONDS
        return {**database, **broker}

    async def _look_at_database(self) -> dict[str, str]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, _ask_database)
        try:
            return await asyncio.wait_for(asyncio.shield(self._reading), PATIENCE_SECONDS)
        except Exception:
            return {"database": "does not answer", "migrations": "not known"}


async def _look_at_broker() -> dict[str, str]:
    queues = (*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE, settings.PERIODIC_QUEUE)
    try:
        missing = await publishing.find_missing(queues, PATIENCE_SECONDS)
    except Exception:
        return {"broker": "takes no messages", "queues": "not known"}
    return {"queues": f"manage.py setup makes what is missing: {', '.join(missing)}"} if missing else {}


def _ask_database() -> dict[str, str]:
    """Return what the database lacks, and how wrong this process's clock is if it is, in words. In a thread."""
    wrong = {}
    try:
        if missing := _known_migrations() - MigrationRecorder(connection).applied_migrations().keys():
            wrong["migrations"] = f"manage.py setup applies what is missing: {len(missing)}"
        if abs(ahead := clocks.ahead_seconds()) > clocks.TOLERATED_SECONDS:
            wrong["clock"] = clocks.in_words(ahead)
        if not missing and (faults := voter_secrets.faults()):
            wrong["voter_secret"] = " ".join(faults)
    finally:
        connection.close()
    return wrong


@cache
def _known_migrations() -> frozenset[tuple[str, str]]:
    return frozenset(MigrationLoader(None).disk_migrations)


async def _send(send: Send, status: int, content_type: bytes, body: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
