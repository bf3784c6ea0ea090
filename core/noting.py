"""Noting: each program lets the installation know how wrong its clock is, for as long as it runs."""

import logging
import threading
import time

from django.db import DatabaseError, InterfaceError, connection

from polls import clocks

logger = logging.getLogger(__name__)


def start(program: str) -> None:
    threading.Thread(target=_go_on, args=[program], name="clock", daemon=True).start()


def _go_on(program: str) -> None:
    while True:
        try:
            clocks.note(program)
        except (DatabaseError, InterfaceError) as exc:
            logger.debug("the clock of %s can't be noted (%s)", program, type(exc).__name__)
        finally:
            connection.close()
        time.sleep(clocks.NOTE_SECONDS)
