"""The outbox: where bundles wait that the broker could not take."""

import contextlib
import logging
from collections.abc import Iterator
from uuid import UUID

from django.db import transaction

from polls import bundles, counting, patience
from polls.bundles import AcceptedVote
from polls.models import OutboxBundle

logger = logging.getLogger(__name__)

# Bundles that are counted in one transaction. Chosen: while the broker is away they are small, and a transaction costs as much as 50 votes.
AT_ONCE = 50


def keep(bundle: bytes) -> int:
    """Commit a bundle (`bundles.write`); return its number.

    Raises django.db.OperationalError when PostgreSQL is away: then nothing is kept.
    """
    return patience.once_more(lambda: OutboxBundle.objects.create(body=bundle)).pk


def votes_waiting() -> Iterator[AcceptedVote]:
    """Yield the votes that wait, without those of bundles that can't be read."""
    for bundle in OutboxBundle.objects.iterator():
        with contextlib.suppress(ValueError):
            yield from bundles.decode(bundle.body)


def polls_waiting() -> set[UUID] | None:
    """Return the polls of which a vote waits; None when a bundle can't be read."""
    try:
        return {vote.poll_id for bundle in OutboxBundle.objects.iterator() for vote in bundles.decode(bundle.body)}
    except ValueError:
        return None


def drain() -> int:
    """Count every kept bundle, oldest first; return how many. Bundles are counted and deleted in one transaction.

    Straight into counting, not through the broker: no second copy, and no need for the broker to be back. Two drains at
    once share the work. A bundle that can't be counted stays, is logged as an error, and holds up no other.
    """
    waiting = list(OutboxBundle.objects.order_by("id").values_list("id", flat=True))
    return sum(_drain(waiting[start : start + AT_ONCE]) for start in range(0, len(waiting), AT_ONCE))


def _drain(bundle_ids: list[int]) -> int:
    try:
        return patience.until_committed(lambda: _count_and_delete(bundle_ids))
    except patience.DatabaseStaysAwayError:
        raise
    except Exception:
        if len(bundle_ids) == 1:
            logger.exception("bundle %d can't be counted and stays in the outbox", bundle_ids[0])
            return 0
    return sum(_drain([bundle_id]) for bundle_id in bundle_ids)


def _count_and_delete(bundle_ids: list[int]) -> int:
    with transaction.atomic():
        kept = list(OutboxBundle.objects.select_for_update(skip_locked=True).filter(id__in=bundle_ids).order_by("id"))
        if kept:
            counted = counting.count_votes([vote for bundle in kept for vote in bundles.decode(bundle.body)])
            OutboxBundle.objects.filter(id__in=[bundle.pk for bundle in kept]).delete()
    if kept:
        logger.info("outbox %s: %s", ", ".join(str(bundle.pk) for bundle in kept), counting.in_words(counted))
    return len(kept)
