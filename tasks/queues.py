"""The broker's queues: their names, their arguments, their declaration."""

from celery import current_app
from django.conf import settings
from kombu import Exchange, Queue


def consumed() -> list[Queue]:
    """Return the queues that workers consume. The arguments can't change once a queue exists: RabbitMQ refuses that."""
    votes = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 100,  # a vote whose worker dies a hundred times in a row goes to the dead letters
        "x-max-length-bytes": 2_000_000_000,  # beyond: refused, and so kept in the outbox, before the broker's memory alarm
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": settings.DEAD_LETTER_QUEUE,
        "x-dead-letter-strategy": "at-least-once",  # needs reject-publish
    }
    periodic = _queue(settings.PERIODIC_QUEUE, {"x-queue-type": "quorum", "x-delivery-limit": 100})
    return [*(_queue(name, votes) for name in settings.VOTES_QUEUES), periodic]


def declare() -> None:
    """Declare every queue, dead letters included: a worker declares only what it consumes. Repeatable.

    Raises kombu.exceptions.OperationalError when the broker is away, amqp.PreconditionFailed when a queue exists with other arguments.
    """
    # Looking at dead letters takes and returns them; RabbitMQ 4 would drop them after 20 returns without a limit of our own.
    dead = _queue(settings.DEAD_LETTER_QUEUE, {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000})
    with current_app.connection_for_write(connect_timeout=5) as connection:
        connection.ensure_connection(max_retries=3, interval_start=1, interval_step=0)
        for queue in [dead, *consumed()]:
            queue.bind(connection.default_channel).declare()


def _queue(name: str, arguments: dict[str, object]) -> Queue:
    return Queue(name, Exchange(""), routing_key=name, queue_arguments=arguments)
