"""How workers take messages: like Celery, but none is dropped, none ends the worker, and none is written to the log."""

from collections.abc import Callable
from typing import Any, ClassVar

from celery.utils.log import get_task_logger
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from django.conf import settings
from kombu import Connection
from kombu.message import Message

from tasks import liveness

logger = get_task_logger(__name__)


class QuietRequest(Request):
    """A task on its way through a worker that shows `<37 votes>` to whoever asks (Flower, `celery inspect`), never the votes."""

    def info(self, safe: bool = False) -> Any:
        return super().info(safe=True)


class KeepingConsumer(Consumer):
    """Send every message that is no task to the dead letters.

    Celery 5.7 acknowledges one that can't be decoded, which is to lose it; writes the body of others to the log, which is
    to tell votes; and ends, to meet it again after the restart, on a body like `[]`.
    """

    connection_errors: tuple[type[Exception], ...]

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc, valid-type]
        # No task here has an ETA, so the 28 queues that Celery would declare for delays are left out.
        default_steps: ClassVar = [step for step in Consumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")]

    def ensure_connected(self, conn: Connection) -> Connection:
        """Connect, trying every second or two: Celery's own pauses grow to 30 s, during which votes wait for nothing."""
        again: Callable[..., Connection] = conn.ensure_connection

        def patiently(*args: Any, callback: Callable[[], None], **kwargs: Any) -> Connection:
            def on_waiting() -> None:
                self._note()
                callback()

            return again(*args, interval_start=1, interval_step=1, interval_max=2, callback=on_waiting, **kwargs)

        conn.ensure_connection = patiently  # type: ignore[method-assign, assignment]
        return super().ensure_connected(conn)

    def register_with_event_loop(self, hub: Any) -> None:
        """Note that this worker lives, for as long as its loop turns."""
        super().register_with_event_loop(hub)
        hub.timer.call_repeatedly(liveness.NOTE_SECONDS, self._note)

    def _note(self) -> None:
        liveness.note("periodic" if settings.PERIODIC_QUEUE in self.app.amqp.queues.consume_from else "worker")

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], None]:
        handle = super().create_task_handler(*args, **kwargs)

        def handle_or_keep(message: Message) -> None:
            try:
                handle(message)
            except self.connection_errors:
                raise
            except Exception as exc:
                self._keep(message, exc)

        return handle_or_keep

    def on_unknown_message(self, body: object, message: Message) -> None:
        self._keep(message, ValueError())

    def on_unknown_task(self, body: object, message: Message, exc: Exception) -> None:
        self._keep(message, exc)

    def on_invalid_task(self, body: object, message: Message, exc: Exception) -> None:
        self._keep(message, exc)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        self._keep(message, exc)

    def _keep(self, message: Message, exc: Exception) -> None:
        logger.error("a message of %d bytes is no task (%s): sent to the dead letters", len(message.body or ""), type(exc).__name__)
        message.reject_log_error(logger, self.connection_errors)
