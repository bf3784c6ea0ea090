"""Attempts: how often an address tried to become a voter of a poll, for who guesses codes or collects tokens (fraud.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from django.conf import settings
from django.db import connection

from polls.literals import array
from polls.models import Attempts
from polls.moments import from_microseconds

# Of one process between two writes. Beyond it new places are not noted: numbers for a suspicion may be too small, memory may not run out.
MAX_PLACES = 20_000

_HOUR = 3_600_000_000  # microseconds

# Poll id, address key, subnet key, hour.
Place = tuple[UUID, UUID, UUID, datetime]


@dataclass(slots=True)
class Tries:
    """How many there were."""

    wrong_codes: int = 0
    tokens: int = 0


class Notes:
    """What one web process has seen and not written down yet. In one event loop."""

    def __init__(self) -> None:
        self._seen: dict[Place, Tries] = {}

    def add(self, poll_id: UUID, keys: tuple[UUID, UUID], at: int, *, wrong_codes: int = 0, tokens: int = 0) -> None:
        """Note attempts in the hour of this moment (microseconds since 1970 UTC)."""
        self._add((poll_id, *keys, from_microseconds(at - at % _HOUR)), Tries(wrong_codes, tokens))

    def take(self) -> dict[Place, Tries]:
        """Return all, and forget them."""
        taken, self._seen = self._seen, {}
        return taken

    def put_back(self, taken: Mapping[Place, Tries]) -> None:
        """Note again what could not be written down."""
        for place, tries in taken.items():
            self._add(place, tries)

    def _add(self, place: Place, more: Tries) -> None:
        tries = self._seen.get(place)
        if tries is None:
            if len(self._seen) >= MAX_PLACES:
                return
            tries = self._seen[place] = Tries()
        tries.wrong_codes += more.wrong_codes
        tries.tokens += more.tokens


def write(seen: Mapping[Place, Tries]) -> None:
    """Add the numbers to those of all processes, in one statement.

    Not repeatable: where the answer to a commit is lost, some count twice. Accepted: nothing is decided by them alone.
    """
    poll_ids, address_keys, subnet_keys, hours = zip(*seen, strict=True)
    with connection.cursor() as cursor:
        # In one order: two processes can then not deadlock.
        cursor.execute(
            """
            INSERT INTO attempts AS known (poll_id, address_key, subnet_key, hour, wrong_codes, tokens)
            SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::timestamptz[], %s::int[], %s::int[])
                AS new (poll_id, address_key, subnet_key, hour, wrong_codes, tokens)
            ORDER BY poll_id, address_key, hour
            ON CONFLICT (poll_id, address_key, hour) DO UPDATE
            SET wrong_codes = known.wrong_codes + EXCLUDED.wrong_codes, tokens = known.tokens + EXCLUDED.tokens
            """,
            [
                array(poll_ids),
                array(address_keys),
                array(subnet_keys),
                list(hours),
                array(tries.wrong_codes for tries in seen.values()),
                array(tries.tokens for tries in seen.values()),
            ],
        )


def purge(at: datetime) -> int:
    """Delete what is as old as addresses may be readable (NETWORK_SECRET_KEEP_DAYS); return how many rows."""
    deleted, _ = Attempts.objects.filter(hour__lt=at - timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS)).delete()
    return deleted
