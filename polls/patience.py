"""Waiting for PostgreSQL: what a worker does while the database is away, instead of losing or repeating a message."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from django.conf import settings
from django.db import InterfaceError, InternalError, NotSupportedError, OperationalError, connection

from polls import metrics

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 5.0


class DatabaseStaysAwayError(Exception):
    """PostgreSQL did not come back within DATABASE_PATIENCE_SECONDS."""


def once_more(work: Callable[[], T]) -> T:
    """Run `work`, which must be repeatable; if this thread's connection turns out to be dead, run it again on a fresh one.

    For those who can't wait: raises what the second run raises.
    """
    try:
        return work()
    except (OperationalError, InterfaceError):
        connection.close()
    try:
        return work()
    except Exception:
        connection.close()
        raise


def until_committed(work: Callable[[], T]) -> T:
    """Run `work` until its transaction commits; it must be repeatable, for a commit whose answer was lost runs again.

    Away, restarting, read-only, deadlocked, a lock or statement that took too long, a column whose type was changed under a
    prepared statement: wait (0.1 s, doubling to 5 s, with jitter) and try again on a fresh connection. Raises
    DatabaseStaysAwayError after DATABASE_PATIENCE_SECONDS.
    """
    started, wait = time.monotonic(), FIRST_WAIT_SECONDS
    while True:
        try:
            return work()
        except (OperationalError, InterfaceError, InternalError, NotSupportedError) as exc:
            connection.close()
            metrics.database_retries.inc()
            if time.monotonic() - started > settings.DATABASE_PATIENCE_SECONDS:
                raise DatabaseStaysAwayError from exc
            # The class only: PostgreSQL's own text may quote a row.
            logger.warning("PostgreSQL: %s; trying again in %.1f s", type(exc.__cause__ or exc).__name__, wait)
        except Exception:
            connection.close()  # a broken transaction must not reach the next bundle
            raise
        time.sleep(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        wait = min(wait * 2, LONGEST_WAIT_SECONDS)
