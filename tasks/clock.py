"""Beat's scheduler: django-celery-beat's, for which a clock may be wrong, and which notes that it lives.

A run that nobody takes is dropped by the broker, after a time that the broker measures: beat's clock and the workers' may differ.
"""

import time
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from celery.beat import ScheduleEntry
from celery.utils.log import get_task_logger
from django.conf import settings
from django.db import DatabaseError, InterfaceError
from django_celery_beat.schedulers import DatabaseScheduler, ModelEntry
from kombu import Connection

from polls import jobs
from tasks import liveness

logger = get_task_logger(__name__)

_note = partial(liveness.note, "beat")
# How long a job that runs seldom may have been sent and not begun, until it is sent again (seconds): its message was dropped.
SENT_AGAIN_SECONDS = 60


class Entry(ModelEntry):  # type: ignore[misc] # it has no types
    """A job and when it ran last. One that ran in the future, by a clock that was ahead, is due."""

    def __init__(self, model: Any, app: Any = None) -> None:
        super().__init__(model, app=app)
        # As `expires`, it would be a moment by beat's clock, which workers compare with their own.
        self.options.pop("expires", None)
        self.options["expiration"] = min(model.expire_seconds or settings.JOB_WAITS_SECONDS, settings.JOB_WAITS_SECONDS)

    def is_due(self) -> Any:
        at = self._default_now()
        self.last_run_at: datetime
        if self.model.enabled and self.last_run_at > at:
            self.last_run_at = at - self.interval
        return super().is_due()

    @property
    def interval(self) -> timedelta:
        """How often the job runs; nothing for what runs at moments that an operator has chosen."""
        interval: timedelta = getattr(self.schedule, "run_every", timedelta())
        return interval


class NotingScheduler(DatabaseScheduler):  # type: ignore[misc] # it has no types
    Entry = Entry

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # {job that runs seldom and was sent: (its entry, when it had begun last, when it was sent)}
        self._sent: dict[str, tuple[ScheduleEntry, Any, float]] = {}
        super().__init__(*args, **kwargs)

    def tick(self, *args: Any, **kwargs: Any) -> Any:
        _note()
        if self._is_put_back():
            self._heap = None  # made anew from when the jobs ran
        self._send_again()
        return super().tick(*args, **kwargs)

    def _is_put_back(self) -> bool:
        """Return whether the clock was put back: the next job is due later than after its interval."""
        if not self._heap:
            return False
        when, _, entry = self._heap[0]
        return bool(entry.interval) and when - self._when(entry, 0) > entry.interval.total_seconds() + 1

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:
        task = str(entry.task)
        if jobs.is_seldom(task):
            self._sent[task] = (entry, self._begun(task), time.monotonic())
        super().apply_entry(entry, producer=producer)

    def _send_again(self) -> None:
        """Send anew what runs seldom and was dropped before a worker took it: else it would not run for an hour, or a day."""
        for task, (entry, begun, sent_at) in list(self._sent.items()):
            if time.monotonic() - sent_at < SENT_AGAIN_SECONDS:
                continue
            del self._sent[task]
            if self._begun(task) == begun:
                self.apply_entry(entry, producer=self.producer)

    def _begun(self, task: str) -> Any:
        try:
            return jobs.begun(task)
        except (DatabaseError, InterfaceError) as exc:
            logger.warning("nobody knows when %s began (%s)", task, type(exc).__name__)
            return None

    def _ensure_connected(self) -> Connection:
        """Connect as workers do (consumer.py), however long that takes."""
        again = self.connection.ensure_connection
        self.connection.ensure_connection = partial(again, interval_start=1, interval_step=1, interval_max=2, callback=_note)
        connection: Connection = super()._ensure_connected()
        return connection
