"""Clocks: how far each program's is from PostgreSQL's, by which all of them are judged."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

from django.db import connection

from polls import stamps

# Chosen: NTP keeps clocks within a tenth of a second; at 41 s, votes accepted in time could come after their poll was final.
TOLERATED_SECONDS = 5
# How often a program notes how wrong its clock is, and how long that counts.
NOTE_SECONDS = 15
_COUNTS_SECONDS = 120
# A look at PostgreSQL's clock that takes longer is repeated: it says less than is wanted.
_LONGEST_LOOK_SECONDS = 0.2
_TRIES = 3


class Clock(NamedTuple):
    """A program's clock on a host."""

    program: str
    host: str
    ahead_seconds: float  # less than 0: behind

    @property
    def is_wrong(self) -> bool:
        return abs(self.ahead_seconds) > TOLERATED_SECONDS


def ahead_seconds() -> float:
    """Return how far this process's clock is ahead of PostgreSQL's; to a tenth of a second, unless PostgreSQL is slow."""
    looks = []
    for _ in range(_TRIES):
        began, asked_at = time.monotonic(), time.time()
        theirs = stamps.clock().timestamp()
        took = time.monotonic() - began
        looks.append((took, asked_at + took / 2 - theirs))
        if took < _LONGEST_LOOK_SECONDS:
            break
    return min(looks)[1]


def note(program: str) -> None:
    """Let others know how wrong this process's clock is."""
    host = socket.gethostname()[:100]
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO clocks (place, program, host, ahead_seconds, noted_at) VALUES (%s, %s, %s, %s, clock_timestamp())
            ON CONFLICT (place) DO UPDATE SET ahead_seconds = excluded.ahead_seconds, noted_at = excluded.noted_at
            """,
            [f"{program}@{host}", program, host, ahead_seconds()],
        )


def known() -> list[Clock]:
    """Return the clocks of the programs that run, as of some seconds ago, the most wrong first."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT program, host, ahead_seconds FROM clocks
            WHERE noted_at BETWEEN clock_timestamp() - make_interval(secs => %s) AND clock_timestamp()
            ORDER BY abs(ahead_seconds) DESC, place
            """,
            [_COUNTS_SECONDS],
        )
        return [Clock(*row) for row in cursor.fetchall()]


def in_words(ahead: float) -> str:
    return f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} PostgreSQL's"


def purge() -> None:
    """Forget the clocks of hosts that are no more."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM clocks WHERE noted_at < clock_timestamp() - interval '1 day'")
