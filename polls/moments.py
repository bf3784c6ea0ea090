"""Moments as votes carry them: microseconds since 1970 UTC, because a number travels and compares faster than a date."""

import time
from datetime import UTC, datetime, timedelta
from functools import lru_cache

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_microseconds(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds_now() -> int:
    return time.time_ns() // 1000


def iso(moment: datetime) -> str:
    """Return the moment as the hot routes write it, `2026-11-20T09:00:00.000000Z`: always as long, so that texts compare like moments."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def iso_of(microseconds: int) -> str:
    """Return `iso(from_microseconds(microseconds))`, in a quarter of the time while moments lie close together."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{_iso_seconds(seconds)}.{rest:06d}Z"


@lru_cache(maxsize=100)
def _iso_seconds(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
