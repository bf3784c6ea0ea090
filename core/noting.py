"""Noting: each program lets the installation know how wrong its clock is, for as long as it runs."""

import logging
import threading
import time

from django.db import DatabaseError, InterfaceError, connection

from polls import clocks

logger = logging.getLogger(__name__)

_next_at = 0.0


def start(program: str) -> None:
    """Note it every NOTE_SECONDS, in a thread. Not for who forks: a child would keep what this thread had locked just then."""
    threading.Thread(target=_go_on, args=[program], name="clock", daemon=True).start()


def _go_on(program: str) -> None:
    while True:
        _note(program)
        connection.close()
        time.sleep(clocks.NOTE_SECONDS)


def note_now_and_then(program: str) -> None:
    """Note it here and now, unless it was less than NOTE_SECONDS ago. For a worker's child, between two tasks."""
    global _next_at
    if time.monotonic() >= _next_at:
        _next_at = time.monotonic() + clocks.NOTE_SECONDS
        _note(program)


def _note(program: str) -> None:
    try:
        clocks.note(program)
    except (DatabaseError, InterfaceError) as exc:
        connection.close()  # the next task gets a new one
        logger.debug("the clock of %s can't be noted (%s)", program, type(exc).__name__)
