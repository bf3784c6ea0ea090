"""Exporting: what Prometheus scrapes, on a port of its own (METRICS_PORT) that no front passes on.

Whichever process has the port answers for all processes of the machine with the same METRICS_PORT: the children of a worker, and
the siblings of a web process. Their figures are in files that outlive them, so a killed child takes none with it.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from django.conf import settings
from django.utils.timezone import now
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, start_http_server
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from polls import metrics, watching

logger = logging.getLogger(__name__)

# Between two looks at database, broker and cache. Chosen: as often as Prometheus asks, and a connection to the broker each time.
LOOK_SECONDS = 15
# Between two tries to get the port.
_TRY_SECONDS = 1
# The process whose file holds what the dead have counted.
_THE_DEAD = 0


def start(*, watches: bool = False) -> None:
    """Serve the figures, and in one process of the installation also what it watches. Does nothing without METRICS_PORT."""
    if not metrics.POOL:
        return
    pool = Pool(metrics.POOL)
    pool.begin()
    collectors: list[Collector] = [pool]
    if watches:
        watch = Watch()
        collectors.append(watch)
        threading.Thread(target=watch.go_on, name="watch", daemon=True).start()
    threading.Thread(target=_serve, args=[collectors], name="metrics", daemon=True).start()


def _serve(collectors: Iterable[Collector]) -> None:
    """Get the port, however long another process has it; the threads that answer live as long as the process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for collector in collectors:
        registry.register(collector)
    told = False
    while True:
        try:
            server, _ = start_http_server(settings.METRICS_PORT, settings.METRICS_HOST, registry)
            break
        except OSError as exc:
            if not told:
                logger.warning(
                    "METRICS_PORT %d: %s. If a sibling has it, that one answers for this process, too", settings.METRICS_PORT, exc.strerror
                )
                told = True
            time.sleep(_TRY_SECONDS)
    # Else a child would keep the port when its parent was killed.
    os.register_at_fork(after_in_child=server.socket.close)


class Pool(Collector):
    """The figures of all processes that share a folder, those that have ended included."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()  # two scrapes at once must not both take over what the dead have left

    def begin(self) -> None:
        """Forget what is left of an earlier run, unless a process of it still lives."""
        left = {path: _pid(path) for path in self._files() if _pid(path) != os.getpid()}
        if not any(pid != _THE_DEAD and _lives(pid) for pid in left.values()):
            for path in left:
                path.unlink(missing_ok=True)

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            self._take_over_from_the_dead()
            figures = MultiProcessCollector.merge([str(path) for path in self._files()])
        return [metric for metric in figures if metric.name.startswith(metrics.PREFIX)]

    def _take_over_from_the_dead(self) -> None:
        """Add what ended processes have counted to one file: else each that ever ran would make every scrape longer."""
        for path in self._files():
            if _lives(_pid(path)):
                continue
            kind = path.name.partition("_")[0]
            if kind != "gauge":
                kept = MmapedDict(str(self._folder / f"{kind}_{_THE_DEAD}.db"))
                for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path)):
                    kept.write_value(key, kept.read_value(key)[0] + value, 0.0)
                kept.close()
            path.unlink()

    def _files(self) -> list[Path]:
        return list(self._folder.glob("*.db"))


def _pid(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])  # counter_123.db, gauge_livesum_123.db


def _lives(pid: int) -> bool:
    if pid == _THE_DEAD:  # to the system it is the caller's group
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Watch(Collector):
    """What `watching.look` told last: a scrape never waits for a database."""

    def __init__(self) -> None:
        self._seen: list[Metric] = []

    def collect(self) -> Iterator[Metric]:
        yield from self._seen

    def go_on(self) -> None:
        while True:
            self._seen = watching.look(at=now())
            time.sleep(LOOK_SECONDS)
