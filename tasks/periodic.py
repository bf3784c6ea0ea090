"""The jobs that the clock starts. Each works from the database's state, so a missed run is caught up by the next."""

from celery import shared_task
from django.utils.timezone import now

from polls import closing, outbox


@shared_task(name="polls.open_and_close", acks_late=False)
def open_and_close_polls() -> None:
    closing.open_due_polls(at=now())
    closing.close_expired_polls(at=now())


@shared_task(name="outbox.drain", acks_late=False)
def drain_outbox() -> None:
    outbox.drain()


@shared_task(name="outcomes.purge", acks_late=False)
def purge_outcomes() -> None:
    closing.purge_outcomes(at=now())
