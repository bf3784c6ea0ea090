"""The task that a bundle of votes starts."""

from celery import Task, shared_task
from celery.exceptions import Reject

from polls import counting, patience


@shared_task(name="votes.count", base=Task, Request="tasks.consumer:QuietRequest")
def count_bundle(bundle: str) -> None:
    """Count the bundle. What it raises sends the message to the dead letters; its readable votes are counted all the same."""
    try:
        patience.until_committed(lambda: counting.count_bundle(bundle))
    except patience.DatabaseStaysAwayError as exc:
        raise Reject(exc, requeue=True) from exc
