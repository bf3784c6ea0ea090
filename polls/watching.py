"""Watching: what only database, broker and cache know of the pipeline, as metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from django.conf import settings
from django.core.cache import cache
from django.db import connection, transaction
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from polls import clocks, deadletters, jobs, throttling
from polls.metrics import PREFIX
from polls.models import Poll

logger = logging.getLogger(__name__)

# How long one statement may take (milliseconds).
_PATIENCE = 2000


def look(at: datetime) -> list[Metric]:
    """Return what can be told now.

    Takes seconds while one of them does not answer; then `nexus_reached` says so, and its figures are missing.
    """
    reached = _gauge("reached", "Whether it answered when it was looked at last.", "part")
    looked = _gauge("looked_timestamp_seconds", "When database, broker and cache were looked at last.")
    looked.add_metric([], at.timestamp())
    found: list[Metric] = [reached, looked]
    parts: dict[str, Callable[[datetime], Iterator[Metric]]] = {"database": _of_database, "broker": _of_broker}
    if throttling.is_shared():
        parts["cache"] = _of_cache
    for part, read in parts.items():
        try:
            found += list(read(at))
            reached.add_metric([part], 1)
        except Exception as exc:  # whatever it was: the others can still be told
            # The class only: the text may hold a password.
            logger.warning("no figures of the %s (%s)", part, type(exc).__name__)
            reached.add_metric([part], 0)
    return found


def keyspace() -> tuple[int, int]:
    """Return how often Redis found what it was asked for, and how often not, since it was started: all who use it, not only we.

    Raises LookupError when the cache is none that processes share.
    """
    if not throttling.is_shared():
        raise LookupError("The cache is in each process's own memory (CACHE_URL), and keeps no such figures.")
    client: Any = cache
    stats = client._cache.get_client().info("stats")  # Django offers no other way to its client
    return int(stats["keyspace_hits"]), int(stats["keyspace_misses"])


def _of_database(at: datetime) -> Iterator[Metric]:
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL statement_timeout = {_PATIENCE}")
            cursor.execute("SELECT count(*), coalesce(extract(epoch FROM %s - min(kept_at)), 0) FROM outbox", [at])
            bundles, oldest = cursor.fetchone()
            late = Poll.objects.filter(finalised_at=None, archived_at=None, published_at__isnull=False, closes_at__lte=at)
            ends = sorted((at - closes_at).total_seconds() for closes_at in late.values_list("closes_at", flat=True))
            successes = jobs.successes()
            cursor.execute("SELECT min(applied) FROM django_migrations")
            (installed_at,) = cursor.fetchone()
            # This process's own, too, however long ago it noted that.
            wrong = {clock.program: clock.ahead_seconds for clock in reversed(clocks.known())} | {"periodic": clocks.ahead_seconds()}
    finally:
        connection.close()  # a thread of its own, that looks now and then
    yield _one("outbox_bundles", "Bundles that wait in the outbox.", bundles)
    yield _one("outbox_oldest_age_seconds", "How long the oldest of them has waited.", max(0, oldest))
    yield _one("polls_closing", "Polls that have ended and are not final.", len(ends))
    delay = ends[-1] - settings.FINAL_AFTER_SECONDS if ends else 0
    yield _one("finalisation_delay_seconds", "How long a poll has been due to be final, and is not.", max(0, delay))
    success = _gauge("job_success_timestamp_seconds", "When the job last succeeded; if never: when all began.", "task")
    interval = _gauge("job_interval_seconds", "How often the clock starts the job.", "task")
    for job, every in jobs.intervals().items():
        success.add_metric([job], (successes[job] or installed_at).timestamp())
        interval.add_metric([job], every.total_seconds())
    yield success
    yield interval
    ahead = _gauge("clock_ahead_seconds", "How far the program's clock is ahead of PostgreSQL's, where it is most wrong.", "program")
    for program, seconds in sorted(wrong.items()):
        ahead.add_metric([program], seconds)
    yield ahead


def _of_broker(at: datetime) -> Iterator[Metric]:
    ready = _gauge("queue_ready", "Messages that no worker has taken.", "queue")
    consumers = _gauge("queue_consumers", "Workers that take from the queue.", "queue")
    for state in deadletters.survey():
        name = state.name.removeprefix(settings.QUEUE_PREFIX)
        ready.add_metric([name], state.ready)
        consumers.add_metric([name], state.consumers)
        if state.name == settings.DEAD_LETTER_QUEUE:
            yield _one("dead_letters", "Messages that could not be counted in full.", state.ready)
    yield ready
    yield consumers


def _of_cache(at: datetime) -> Iterator[Metric]:
    yield from redis_metrics(*keyspace())


def redis_metrics(hits: int, misses: int) -> Iterator[Metric]:
    yield CounterMetricFamily(PREFIX + "redis_keyspace_hits", "Keys that Redis found.", value=hits)
    yield CounterMetricFamily(PREFIX + "redis_keyspace_misses", "Keys that Redis did not find.", value=misses)


def _gauge(name: str, told: str, label: str | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, told, labels=[label] if label else [])


def _one(name: str, told: str, value: float) -> Metric:
    family = _gauge(name, told)
    family.add_metric([], float(value))
    return family
