"""Metrics: every figure that the processes keep of themselves, for Prometheus (core/exporting.py). Those who know something count it here.

No figure names a poll, a voter, a choice or an address: labels are words of ours, and few.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from django.conf import settings
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values

from polls import problems

PREFIX = "nexus_"


def _pool() -> Path:
    """Return where the processes of this machine that share a METRICS_PORT keep their figures: in memory where the system offers that."""
    folder = Path("/dev/shm")  # noqa: S108 - checked by whoever opens the pool
    where = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    return where / f"{PREFIX}metrics_{os.getuid()}_{settings.INSTALLATION}_{settings.METRICS_HOST}_{settings.METRICS_PORT}"


POOL = _pool() if settings.METRICS_PORT else None
if POOL:
    POOL.mkdir(mode=0o700, exist_ok=True)
    if POOL.stat().st_uid != os.getuid():
        raise PermissionError(f"{POOL} belongs to somebody else.")
    # How prometheus_client keeps figures in files that processes share. It looks for the name when it is imported, which Celery does
    # before us, in search of Flower.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(POOL)
    values.ValueClass = values.MultiProcessValue()

# Of our own: Flower counts in the library's.
registry = CollectorRegistry()


def _counter(name: str, told: str) -> Counter:
    return Counter(PREFIX + name, told, registry=registry)


def _counters(name: str, told: str, label: str, kinds: Iterable[str]) -> Mapping[str, Counter]:
    """Return a counter for each value of the label, all of which begin at 0: Prometheus sees no increase in what was not there before."""
    counter = Counter(PREFIX + name, told, [label], registry=registry)
    return {kind: counter.labels(kind) for kind in kinds}


def _seconds(name: str, told: str, buckets: Iterable[float]) -> Histogram:
    return Histogram(PREFIX + name, told, buckets=tuple(buckets), registry=registry)


def _live(name: str, told: str) -> Gauge:
    """Return a gauge that is the sum over the processes that live."""
    return Gauge(PREFIX + name, told, registry=registry, multiprocess_mode="livesum")


# --- Web processes ----------------------------------------------------------------------------------------------------

accepted = _counters("votes_accepted", "Votes answered 202, by what holds them.", "way", ["queue", "outbox"])
refused = _counters("refusals", "Requests, and votes of a batch, that were refused.", "cause", [problem.slug for problem in problems.ALL])
published = _counters(
    "bundles_published",
    "Bundles on their way to the broker: confirmed, refused by it, without a confirm in time, not sent for want of a connection.",
    "result",
    ["confirmed", "refused", "unconfirmed", "unsent"],
)
confirm_seconds = _seconds(
    "confirm_seconds", "From sending a bundle to the broker's confirm.", [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4]
)
bundle_votes = Histogram(
    PREFIX + "bundle_votes", "Votes in a bundle.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000), registry=registry
)
votes_waiting = _live("votes_waiting", "Votes that web processes hold unanswered.")
web_processes = _live("web_processes", "Web processes that take votes.")
publishers_connected = _live("publishers_connected", "Web processes whose broker takes votes.")
publisher_connections = _counter("publisher_connections", "Connections that web processes made to the broker.")
followers = _live("followers", "Clients that follow results, on open streams.")
events_sent = _counter("events_sent", "Results sent to followers, by each one's copy.")
CACHES = ("polls", "clients", "blocks", "results")
cache_hits = _counters("cache_hits", "Lookups that a web process answered from memory.", "cache", CACHES)
cache_misses = _counters("cache_misses", "Lookups that waited for PostgreSQL.", "cache", CACHES)

# --- Workers ----------------------------------------------------------------------------------------------------------

decided = Counter(
    PREFIX + "votes_decided",
    'What became of votes. outcome="repeat": the vote had its outcome before.',
    ["outcome", "reason"],
    registry=registry,
)
counted = decided.labels("counted", "")
repeated = decided.labels("repeat", "")
# Up to hours: a backlog shall not look like its first bucket.
_LAG = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600]
lag_seconds = _seconds("accept_to_count_seconds", "From the acceptance of a bundle's oldest vote to the commit that counts it.", _LAG)
count_seconds = _seconds(
    "count_seconds", "One transaction that counts votes, commit included.", [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15]
)
database_retries = _counter("database_retries", "Times that a worker's transaction had to be tried again.")
uncountable = _counter("bundles_uncountable", "Bundles of which some item is no vote: they go to the dead letters.")
mismatches = _counter("integrity_mismatches", "Tallies that were not what the votes say; they were recounted.")
