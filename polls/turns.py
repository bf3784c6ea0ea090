"""Turns: two queues take the votes, minute by minute, so that each runs empty every other minute, however many come (finality.py)."""

from django.conf import settings

TURN_SECONDS = 60


def queue_at(seconds: float) -> str:
    """Return the queue whose turn it is to take votes, so many seconds after 1970."""
    queue: str = settings.VOTES_QUEUES[int(seconds // TURN_SECONDS) % 2]
    return queue
