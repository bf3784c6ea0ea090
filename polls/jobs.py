"""Jobs: when each of the clock's jobs last began and succeeded, whichever process did it."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings

from polls import stamps

# A job that runs as seldom is sent again when its message was dropped (tasks/clock.py); the others soon come again by themselves.
SELDOM = timedelta(minutes=10)

_STAMP = "job {} succeeded"
_BEGUN = "job {} began"


def intervals() -> Mapping[str, timedelta]:
    """Return {job: how often it runs} of all that the clock starts."""
    schedule: Mapping[str, Any] = settings.CELERY_BEAT_SCHEDULE
    return {entry["task"]: entry["schedule"] for entry in schedule.values()}


def is_seldom(job: str) -> bool:
    return intervals().get(job, timedelta()) >= SELDOM


def note_beginning(job: str, at: datetime) -> None:
    """Remember that a worker has taken the job; only of those that run seldom."""
    if is_seldom(job):
        stamps.stamp(_BEGUN.format(job), at)


def begun(job: str) -> datetime | None:
    """Return a moment that is another one whenever the job has begun anew; None: it never has."""
    return stamps.noted_at(_BEGUN.format(job))


def note_success(job: str, at: datetime) -> None:
    """Remember that the job succeeded; of a task that the clock does not start, nothing."""
    if job in intervals():
        stamps.stamp(_STAMP.format(job), at)


def successes() -> Mapping[str, datetime | None]:
    """Return {job: when it last succeeded}, None for never."""
    known = stamps.read([_STAMP.format(job) for job in intervals()])
    return {job: known.get(_STAMP.format(job)) for job in intervals()}
