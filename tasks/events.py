"""What Flower hears of tasks: of each bundle while there are few, of some while there are many: all would cost a fifth of counting."""

import time
from typing import Any

from celery.app import events
from celery.events import dispatcher

from tasks.votes import count_bundle

# Bundles that a worker tells of in a second. Chosen: more than anybody reads; at full rate there are hundreds.
TOLD_PER_SECOND = 20


class Dispatcher(dispatcher.EventDispatcher):
    """Tells of a bundle that is counted all or nothing, of a task that fails or is another in any case."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._second, self._told = 0, 0
        self._untold: set[str] = set()

    def send(self, type: str, *args: Any, **fields: Any) -> None:
        task = fields.get("uuid", "")
        if type == "task-received" and fields["name"] == count_bundle.name and self._are_enough():
            self._untold.add(task)
        if task not in self._untold:
            super().send(type, *args, **fields)
        elif type not in ("task-received", "task-started"):  # it has ended
            self._untold.remove(task)
            if type != "task-succeeded":
                super().send(type, *args, **fields)

    def _are_enough(self) -> bool:
        """Count one more bundle; return whether as many were told of in this second as may be."""
        if (second := int(time.monotonic())) != self._second:
            self._second, self._told = second, 0
        self._told += 1
        return self._told > TOLD_PER_SECOND


class Events(events.Events):
    """Celery's events, with this dispatcher."""

    dispatcher_cls = "tasks.events:Dispatcher"
