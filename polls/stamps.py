"""Stamps: when something last happened or was last true, by name, for all processes and across restarts.

PostgreSQL's clock judges them all. A stamp counts at most for the moment at which it was written, so a clock that was ahead when it was
written, or that was put back since, can't make anything look newer than it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta

from django.db import connection

from polls.models import Moment


def clock() -> datetime:
    """Return the time by PostgreSQL's clock."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        at: datetime = cursor.fetchone()[0]
    return at


def stamp(name: str, at: datetime) -> None:
    """Remember the moment, unless a later one is known that counts: whoever comes late moves nothing back."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO moments (name, at, noted_at) VALUES (%s, least(%s, clock_timestamp()), clock_timestamp())
            ON CONFLICT (name) DO UPDATE SET noted_at = excluded.noted_at, at = CASE
                WHEN least(moments.at, moments.noted_at) > excluded.noted_at THEN excluded.at
                ELSE greatest(least(moments.at, moments.noted_at), excluded.at) END
            """,
            [name, at],
        )


def read(names: Collection[str]) -> Mapping[str, datetime]:
    """Return the moments of these names, without those that nobody has stamped and those in the future."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT name, least(at, noted_at) FROM moments WHERE name = ANY(%s) AND least(at, noted_at) <= clock_timestamp()",
            [list(names)],
        )
        return dict(cursor.fetchall())


def noted_at(name: str) -> datetime | None:
    """Return when the stamp was written last, by PostgreSQL's clock."""
    return Moment.objects.filter(name=name).values_list("noted_at", flat=True).first()


def forget_future(names: Collection[str]) -> None:
    """Forget those of these stamps that lie in the future: once the clock gets there, they would look like any other.

    They become as old as can be: nobody who stamps may delete.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE moments SET at = 'epoch' WHERE name = ANY(%s) AND least(at, noted_at) > clock_timestamp()",
            [list(names)],
        )


# --- Stamps that are set ahead ----------------------------------------------------------------------------------------


def stamp_ahead(name: str, ahead: timedelta) -> None:
    """Remember the moment that is so far ahead."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO moments (name, at, noted_at) VALUES (%s, clock_timestamp() + make_interval(secs => %s), clock_timestamp())
            ON CONFLICT (name) DO UPDATE SET at = excluded.at, noted_at = excluded.noted_at
            """,
            [name, ahead.total_seconds()],
        )


def read_ahead(name: str, ahead: timedelta) -> datetime | None:
    """Return the moment of this name; None when there is none.

    One that lies further ahead than `ahead` was set by a clock that was wrong. It is set anew: it may still be needed, for that long.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            UPDATE moments SET at = clock_timestamp() + make_interval(secs => %s)
            WHERE name = %s AND at > clock_timestamp() + make_interval(secs => %s)
            """,
            [ahead.total_seconds(), name, ahead.total_seconds()],
        )
        cursor.execute("SELECT at FROM moments WHERE name = %s", [name])
        row = cursor.fetchone()
    return row[0] if row else None
