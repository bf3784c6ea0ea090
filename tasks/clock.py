"""Beat's scheduler: django-celery-beat's, which notes that it lives."""

from functools import partial
from typing import Any

from django_celery_beat.schedulers import DatabaseScheduler
from kombu import Connection

from tasks import liveness

_note = partial(liveness.note, "beat")


class NotingScheduler(DatabaseScheduler):  # type: ignore[misc] # it has no types
    def tick(self, *args: Any, **kwargs: Any) -> Any:
        _note()
        return super().tick(*args, **kwargs)

    def _ensure_connected(self) -> Connection:
        """Connect as workers do (consumer.py), however long that takes."""
        again = self.connection.ensure_connection
        self.connection.ensure_connection = partial(again, interval_start=1, interval_step=1, interval_max=2, callback=_note)
        connection: Connection = super()._ensure_connected()
        return connection
