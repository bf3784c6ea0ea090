"""Three hosts, each a set of programs on ports of its own, and what keeps their PostgreSQL going."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import psutil
import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from chaos import ledger, messages
from chaos.stage import Stage
from stack.folder import StackError
from stack.program import Program

# What dies together. The servers' own names are the stack's.
HOSTS = {
    1: ("rabbitmq", "web", "worker", "postgres"),
    2: ("rabbitmq2", "web2", "worker2", "postgres2"),
    3: ("rabbitmq3", "periodic", "beat"),
}
# How long a server may be away before it is given up (seconds). Chosen, to see what comes after: Patroni's ttl is 20 at least.
GIVE_UP_SECONDS = 3.0
_LOOK_SECONDS = 0.2


class Keeper(threading.Thread):
    """Keeps a primary among two PostgreSQLs, by Patroni's rules of `synchronous_mode`.

    Commits wait for the standby while there is one. It is promoted only if every commit so far has waited for it.
    """

    def __init__(self, dsns: Mapping[str, str], *, awaits_standby: bool = True) -> None:
        super().__init__(name="keeper", daemon=True)
        self._dsns = dsns
        self._awaits_standby = awaits_standby
        self.primary, self.standby = dsns
        self.is_synchronous = False
        self._enough = threading.Event()
        self._looking = threading.Lock()
        self._primary_seen_at = self._standby_seen_at = time.monotonic()
        # The primary's position in its log when it began to wait for the standby.
        self._waits_since: str | None = None

    def end(self) -> None:
        self._enough.set()
        self.join()

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """It notices nothing while the block runs."""
        with self._looking:
            yield
            self._primary_seen_at = self._standby_seen_at = time.monotonic()

    def cut_off_standby(self) -> None:
        """Have the standby follow nobody any more."""
        with closing(self._connect(self.standby)) as connection, connection.cursor() as cursor:
            cursor.execute("ALTER SYSTEM SET primary_conninfo = ''")
            cursor.execute("SELECT pg_reload_conf()")

    def run(self) -> None:
        while not self._enough.wait(_LOOK_SECONDS):
            with self._looking:
                self._look()

    def _look(self) -> None:
        try:
            with closing(self._connect(self.primary)) as connection:
                self._primary_seen_at = time.monotonic()
                if self._look_after_standby(connection):
                    self._standby_seen_at = self._primary_seen_at
                elif self._waits_since and self._primary_seen_at - self._standby_seen_at > GIVE_UP_SECONDS:
                    self._wait_for_nobody(connection)
        except psycopg2.Error:
            if self.is_synchronous and time.monotonic() - self._primary_seen_at > GIVE_UP_SECONDS:
                with suppress(psycopg2.Error):
                    self._promote()

    def _connect(self, name: str) -> Any:
        connection = psycopg2.connect(self._dsns[name], connect_timeout=2)
        connection.autocommit = True
        return connection

    def _look_after_standby(self, connection: Any) -> bool:
        """Have commits wait for the standby as soon as it follows; return whether it does."""
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT sync_state, flush_lsn >= %s::pg_lsn FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'",
                [self._waits_since, self.standby],
            )
            found = cursor.fetchone()
            if not found:
                return False
            sync_state, has_all = found
            if not self._awaits_standby:
                self.is_synchronous = True  # it says so
            elif not self._waits_since:
                cursor.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{self.standby}'")
                cursor.execute("SELECT pg_reload_conf()")
                self._waits_since = "FFFFFFFF/FFFFFFFF"
            elif sync_state == "sync" and not self.is_synchronous:
                if has_all:
                    self.is_synchronous = True
                elif self._waits_since == "FFFFFFFF/FFFFFFFF":
                    cursor.execute("SELECT pg_current_wal_lsn()")
                    self._waits_since = cursor.fetchone()[0]
        return True

    def _wait_for_nobody(self, connection: Any) -> None:
        self.is_synchronous = False  # first: from now on the standby may lack something
        self._waits_since = None
        with connection.cursor() as cursor:
            cursor.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
            cursor.execute("SELECT pg_reload_conf()")

    def _promote(self) -> None:
        with closing(self._connect(self.standby)) as connection, connection.cursor() as cursor:
            cursor.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
            cursor.execute("SELECT pg_reload_conf()")
            cursor.execute("SELECT pg_promote(true, 30)")
        self.primary, self.standby = self.standby, self.primary
        self.is_synchronous, self._waits_since = False, None
        self._primary_seen_at = self._standby_seen_at = time.monotonic()


@dataclass
class Hosts(Stage):
    """The product on three hosts."""

    # Whether commits wait for PostgreSQL's standby.
    awaits_standby: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # Who died, and when (seconds since 1970).
        self.died: list[tuple[str, float]] = []

    def _programs(self, env: Mapping[str, str]) -> list[Program]:
        self.ports = [int(env["PORT"]), self.stack.folder.port("PORT2")]
        first = super()._programs(env)
        second = super()._programs({**env, "PORT": str(self.ports[1])})
        own = {1: [program for program in first if program.name in HOSTS[1]]}
        own[2] = [program for program in second if program.name in HOSTS[2]]
        own[3] = [program for program in first if program.name in HOSTS[3]]
        return [
            replace(
                program,
                command=[word.replace("worker@", f"{program.name}@") for word in program.command],
                # Each host asks its own broker first.
                env={**program.env, **{name: _turned(env[name], host - 1) for name in ("CELERY_BROKER_URL", "BROKER_API_URL")}},
            )
            for host, programs in own.items()
            for program in programs
        ]

    def _end(self) -> None:
        if hasattr(self, "keeper"):
            self.keeper.end()
        with suppress(StackError):
            self.stack.stop("postgres2")  # or its shared memory would stay
        super()._end()

    def keep_postgres(self) -> None:
        """Have somebody keep it from now on, and return when both have all."""
        given = parse_dsn(self.stack.database_url)
        del given["target_session_attrs"]
        ports = dict(zip(_PAIR, given["port"].split(","), strict=True))
        dsns = {name: make_dsn(**{**given, "host": "127.0.0.1", "port": port}) for name, port in ports.items()}
        self.keeper = Keeper(dsns, awaits_standby=self.awaits_standby)
        self.keeper.start()
        self.wait_until_whole()

    def wait_until_whole(self, seconds: float = 300) -> None:
        """Return when one host may die: the standby has all, and the queues are on three nodes."""
        give_up_at = time.monotonic() + seconds
        while not (self.keeper.is_synchronous and self._queues_are_whole()):
            if time.monotonic() > give_up_at:
                raise StackError(f"not whole after {seconds:.0f} s (PostgreSQL synchronous: {self.keeper.is_synchronous})")
            time.sleep(0.5)

    def _queues_are_whole(self) -> bool:
        try:
            rows = json.loads(self.rabbitmqctl("list_queues", "name", "online", "--formatter", "json"))
        except subprocess.SubprocessError:  # its node has only just begun to answer
            return False
        return all(len(row["online"]) == len(HOSTS) for row in rows if row["name"] in messages.QUEUES)

    def kill_host(self, host: int) -> float:
        """SIGKILL to all of it; nothing starts it again. Return when that was."""
        names = HOSTS[host]
        running = [self.processes(name)[0] for name in names]
        for process in running:
            process.suspend()  # all together: nobody sees the others die
        everything = [*running]
        for process in running:
            everything += process.children(recursive=True)
        stopping = threading.Thread(target=self.stack.stop, args=names)
        stopping.start()
        while any(self.stack.supervisor.processes()[name]["statename"] == "RUNNING" for name in names):
            time.sleep(0.02)
        self.did()
        self.kills[f"host {host}"] += 1
        died_at = time.time()
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        stopping.join()
        return died_at

    def start_host(self, host: int) -> None:
        """Start all of it again."""
        self.stack.start(*HOSTS[host], seconds=300)
        self.is_back(HOSTS[host][0])

    # --- What clients and readers see -----------------------------------------------------------------------------------

    @contextmanager
    def load(self, **crowd: Any) -> Iterator[None]:
        """Cast votes at both web processes, and look ten times a second at what is counted, and at the results."""
        self._counted: list[tuple[float, int]] = []
        self._shown: list[float] = []
        enough = threading.Event()
        watchers = [threading.Thread(target=look, args=[enough]) for look in (self._watch_counting, self._watch_results)]
        for watcher in watchers:
            watcher.start()
        try:
            with super().load(other_ports=tuple(self.ports[1:]), **crowd):
                yield
        finally:
            self.load_ended_at = time.time()
            enough.set()
            for watcher in watchers:
                watcher.join()

    def _watch_counting(self, enough: threading.Event) -> None:
        while not enough.wait(0.1):
            with suppress(psycopg2.Error):
                votes = int(self.query("SELECT coalesce(sum(counted), 0) FROM tallies")[0][0])
                if not self._counted or self._counted[-1][1] != votes:
                    self._counted.append((time.time(), votes))

    def _watch_results(self, enough: threading.Event) -> None:
        ports = list(self.ports)
        while not enough.wait(0.1):
            connection = http.client.HTTPConnection("127.0.0.1", ports[0], timeout=5)
            try:
                connection.request("GET", f"/api/v1/polls/{self.polls[0]['id']}/results")
                if connection.getresponse().status == 200:
                    self._shown.append(time.time())
            except (OSError, http.client.HTTPException):
                pass
            finally:
                connection.close()
                ports.reverse()

    def gaps(self, begin: float, end: float) -> dict[str, float]:
        """Return for how long between two moments no vote was accepted, none counted, and no results were shown (seconds)."""
        accepted = [
            at / 1e6 for path in self.ledgers() for kind, _, at, *rest in ledger.read(path) if kind == "answered" and rest[0] == 202
        ]
        moments = {"accepted": sorted(accepted), "counted": [at for at, _ in self._counted], "shown": self._shown}
        return {
            name: max((later - earlier for earlier, later in pairwise([begin, *(at for at in all_ if begin < at < end), end])), default=0.0)
            for name, all_ in moments.items()
        }


_PAIR = ("postgres", "postgres2")


def _turned(urls: str, places: int) -> str:
    """Return the URLs, parted by semicolons, with another one first."""
    several = urls.split(";")
    return ";".join([*several[places:], *several[:places]])
