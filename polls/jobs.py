"""Jobs: when each of the clock's jobs last succeeded, whichever process did it."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings

from polls import stamps

_STAMP = "job {} succeeded"


def intervals() -> Mapping[str, timedelta]:
    """Return {job: how often it runs} of all that the clock starts."""
    schedule: Mapping[str, Any] = settings.CELERY_BEAT_SCHEDULE
    return {entry["task"]: entry["schedule"] for entry in schedule.values()}


def note_success(job: str, at: datetime) -> None:
    """Remember that the job succeeded; of a task that the clock does not start, nothing."""
    if job in intervals():
        stamps.stamp(_STAMP.format(job), at)


def successes() -> Mapping[str, datetime | None]:
    """Return {job: when it last succeeded}, None for never."""
    known = stamps.read([_STAMP.format(job) for job in intervals()])
    return {job: known.get(_STAMP.format(job)) for job in intervals()}
