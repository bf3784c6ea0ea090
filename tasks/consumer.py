"""How workers take messages: like Celery, but nothing is ever dropped."""

from typing import ClassVar

from celery.utils.log import get_task_logger
from celery.worker.consumer import Consumer
from kombu.message import Message

logger = get_task_logger(__name__)


class KeepingConsumer(Consumer):  # type: ignore[misc]
    """Send a message that can't be decoded to the dead letters. Celery 5.7 acknowledges it, which is to lose it."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        # No task here has an ETA, so the 28 queues that Celery would declare for delays are left out.
        default_steps: ClassVar = [step for step in Consumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")]

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        logger.error("a message of %d bytes can't be decoded (%s): sent to the dead letters", len(message.body), type(exc).__name__)
        message.reject(requeue=False)
