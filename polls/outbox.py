"""The outbox: where bundles wait that the broker could not take."""

import logging
from functools import partial

from django.db import connection, transaction

from polls import bundles, counting, patience
from polls.models import OutboxBundle

logger = logging.getLogger(__name__)


def keep(bundle: bytes) -> None:
    """Commit a bundle (`bundles.write`). Raises django.db.OperationalError when PostgreSQL is away: then nothing is kept."""
    try:
        OutboxBundle.objects.create(body=bundle)
    except Exception:
        connection.close()
        raise


def drain() -> int:
    """Count every kept bundle, oldest first; return how many. Each is counted and deleted in one transaction.

    Straight into counting, not through the broker: no second copy, and no need for the broker to be back. Two drains at
    once share the work. A bundle that can't be counted stays, is logged as an error, and holds up no other.
    """
    drained = 0
    for bundle_id in OutboxBundle.objects.order_by("id").values_list("id", flat=True):
        try:
            drained += patience.until_committed(partial(_count_and_delete, bundle_id))
        except patience.DatabaseStaysAwayError:
            raise
        except Exception:
            logger.exception("bundle %d can't be counted and stays in the outbox", bundle_id)
    return drained


def _count_and_delete(bundle_id: int) -> bool:
    with transaction.atomic():
        kept = OutboxBundle.objects.select_for_update(skip_locked=True).filter(id=bundle_id).first()
        if kept is None:
            return False
        counting.count_votes(bundles.decode(bytes(kept.body)))
        kept.delete()
        return True
