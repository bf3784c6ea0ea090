"""The replica: a standby of PostgreSQL's, asked for what everybody may see while it answers and is hardly behind."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

from django.db import Error, connection, connections
from django.db.backends.utils import CursorWrapper

logger = logging.getLogger(__name__)
T = TypeVar("T")

ALIAS = "replica"
# How far behind it may be, and how long it may take to answer (seconds). Chosen: results are a quarter of a second old anyway.
MAX_LAG_SECONDS = 2.0
ANSWER_SECONDS = 0.5
# After it failed it is left alone for this long (seconds); then one reader tries it again.
PAUSE_SECONDS = 5.0

# Seconds since it had all that the primary had. Where the primary writes nothing, the last transaction is old and nothing is missing: so
# only while something received is not replayed yet, or while nobody receives. One that was promoted is a primary.
_LAG = """
    SELECT CASE
        WHEN NOT pg_is_in_recovery() THEN 0
        WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE pid IS NOT NULL) THEN 0
        ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())::float
    END
"""

# Threads of its own, so that one that hangs holds up nobody but itself.
_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix=ALIAS)
_asked_again_at = 0.0


def read(work: Callable[[CursorWrapper], T]) -> tuple[T, timedelta]:
    """Run `work`, which only reads, on the replica; on the primary where there is none, or it can't be used now.

    Return what it returned, and how old that may be at most beyond the moment of asking.
    """
    global _asked_again_at
    if ALIAS in connections.databases and time.monotonic() >= _asked_again_at:
        tried_before = _asked_again_at > 0
        if tried_before:
            _asked_again_at = time.monotonic() + PAUSE_SECONDS  # for all others, until this one knows more
        try:
            found = _threads.submit(_read, work).result(ANSWER_SECONDS)
        except (Error, TimeoutError) as exc:
            _asked_again_at = time.monotonic() + PAUSE_SECONDS
            logger.warning("the replica is left alone for %d s: %s", PAUSE_SECONDS, type(exc).__name__)
        else:
            if tried_before:
                logger.info("the replica answers again")
            _asked_again_at = 0.0
            return found
    with connection.cursor() as cursor:
        return work(cursor), timedelta()


def _read(work: Callable[[CursorWrapper], T]) -> tuple[T, timedelta]:
    replica = connections[ALIAS]
    try:
        with replica.cursor() as cursor:
            cursor.execute(_LAG)
            (lag,) = cursor.fetchone()
            if lag is None or lag > MAX_LAG_SECONDS:
                raise LagError
            return work(cursor), timedelta(seconds=lag)
    except LagError:
        raise
    except Error:
        replica.close()
        raise


class LagError(Error):
    """The replica is further behind than MAX_LAG_SECONDS."""
