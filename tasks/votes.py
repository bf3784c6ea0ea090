"""The task that a bundle of votes starts."""

from celery import Task, shared_task
from celery.exceptions import Reject
from celery.utils.log import get_task_logger

from polls import counting, patience

logger = get_task_logger(__name__)


@shared_task(name="votes.count", base=Task, bind=True, Request="tasks.consumer:QuietRequest")
def count_bundle(self: "Task[[str], None]", bundle: str) -> None:
    """Count the bundle. What it raises sends the message to the dead letters; its readable votes are counted all the same."""
    try:
        counted = patience.until_committed(lambda: counting.count_bundle(bundle))
    except patience.DatabaseStaysAwayError as exc:
        raise Reject(exc, requeue=True) from exc
    except counting.UncountableVotesError as exc:
        logger.error("bundle %s: %s", self.request.id, str(exc))
        raise
    logger.info("bundle %s: %s", self.request.id, counting.in_words(counted))
