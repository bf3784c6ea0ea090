"""The stage: the product, running in a folder of its own, and what is done to it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGKILL, SIGQUIT, Signals
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import amqp
import psutil
import psycopg2

from chaos import faketime, messages, oracle
from chaos.clients import Clients, Crowd
from chaos.ledger import Ledger, Vote
from chaos.oracle import Tables, Verdict
from chaos.proxy import Proxy
from stack import product, rabbitmq
from stack.demo import make_poll
from stack.folder import ROOT
from stack.program import Program
from stack.stack import Stack
from stack.supervisor import SupervisorGone, leftovers
from stack.up import manage, seed_demo

PROGRAMS = ("web", "worker", "periodic", "beat")
# How long nothing at all may move before something is stuck (seconds). No limit to how long it moves: machines are slow or busy.
PATIENCE = 120
# The broker is in use again when for so long no bundle went to the outbox (seconds).
_CALM_SECONDS = 1.5


class PatientStack(Stack):
    """Waits longer for programs that start: how fast this machine starts them is not what is tried."""

    def wait(self, *names: str, seconds: float = PATIENCE, ready: Callable[[str], None] | None = None) -> None:
        super().wait(*names, seconds=max(seconds, PATIENCE), ready=ready)


@dataclass(frozen=True)
class Edit:
    """A line of the product, changed in a copy of it."""

    file: str
    old: str
    new: str


@dataclass
class Stage:
    """One running product: a copy of this checkout, with `edits`."""

    folder: Path
    seed: int
    edits: tuple[Edit, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    # {program: what to add to its command}
    arguments: Mapping[str, list[str]] = field(default_factory=dict)
    # Programs that run twice; the second one's name ends in 2.
    twins: tuple[str, ...] = ()
    # Nodes of RabbitMQ.
    nodes: int = 1
    # Whether PostgreSQL has a standby.
    standby: bool = False
    # Whether the web process reaches RabbitMQ through `proxy`.
    is_proxied: bool = False
    # {program whose clock can be set: how far it is ahead at the start (seconds)}; see `set_clocks`.
    clocks: Mapping[str, int] = field(default_factory=dict)
    # How wrong the product's clocks may be (seconds).
    clock_error: int = 0
    # How much was done to it.
    injected: int = 0
    # What a scenario found that should not be so.
    complaints: list[str] = field(default_factory=list)
    # What it measured, in sentences.
    notes: list[str] = field(default_factory=list)
    # {program: how often it was killed}
    kills: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        # When the poll ends that a scenario is about.
        self.closes_at = datetime.max.replace(tzinfo=UTC)
        self._by_hand = 0
        self._drift: list[Any] = []
        self._looking = threading.Lock()
        # What was lost with a database, as a scenario may: see oracle.judge.
        self.forgotten: tuple[frozenset[str], int] = (frozenset(), 0)
        # Microseconds since 1970: when something was done, when a server was back, when a bundle went to the outbox.
        self._faults: list[int] = []
        self._returns: list[tuple[int, str]] = []
        self._to_outbox: list[int] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = self._copy()
        for edit in self.edits:
            self.edit(edit)
        self.stack: Stack = PatientStack(
            self.folder / "stack", env=self.env, programs=self._programs, broker_nodes=self.nodes, standby=self.standby
        )
        self._hasten_figures()
        with ExitStack() as leaving:
            self._entering = leaving
            leaving.enter_context(self.stack)
            leaving.callback(self._end)
            manage(self.stack, "setup")
            self.dev = seed_demo(self.stack)
            self.stack.start(*PROGRAMS, *(f"{name}2" for name in self.twins))
            self.polls = [self.make_poll(allow_change=last_stands) for last_stands in (False, True)]
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leaving.close()

    def _programs(self, env: Mapping[str, str]) -> list[Program]:
        programs = [
            replace(program, directory=self.root, command=[*program.command, *self.arguments.get(program.name, [])])
            for program in product.programs(env)
            if program.name in PROGRAMS
        ]
        for name, seconds in self.clocks.items():
            faketime.set_clock(self._clock(name), seconds)
        programs = [
            replace(p, env={**p.env, **faketime.environment(self._clock(p.name))}) if p.name in self.clocks else p for p in programs
        ]
        if self.is_proxied:
            url = urlsplit(env["CELERY_BROKER_URL"])
            self.proxy = self._entering.enter_context(Proxy(url.port or 5672))
            proxied = urlunsplit(url._replace(netloc=url.netloc.replace(f":{url.port}", f":{self.proxy.port}")))
            programs = [replace(p, env={**p.env, "CELERY_BROKER_URL": proxied}) if p.name == "web" else p for p in programs]
        return programs + [replace(program, name=f"{program.name}2") for program in programs if program.name in self.twins]

    def make_poll(self, **fields: Any) -> dict[str, Any]:
        poll = make_poll(self.dev, title="Chaos", options=[{"text": text} for text in ("soup", "salad", "noodles")], **fields)
        return {"id": poll["id"], "options": [option["id"] for option in poll["options"]], "last_stands": poll["allow_change"]}

    def _copy(self) -> Path:
        """Copy the product, which somebody may be editing."""
        copy = self.folder / "product"
        for name in ("core", "polls", "tasks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "manage.py", copy)
        return copy

    def _hasten_figures(self) -> None:
        """Have RabbitMQ tell every second, and not every five, what a queue holds: `settle` waits for that."""
        home = self.stack.folder / "rabbitmq"
        for place in [home, *(home / f"rabbitmq{number}" for number in range(2, self.nodes + 1))]:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            (place / "advanced.config").write_text("[{rabbit, [{quorum_tick_interval, 1000}]}].\n")

    def _end(self) -> None:
        """End all at once: nobody needs what is left. Only PostgreSQL is let go by itself, or its shared memory would stay."""
        try:
            postgres = self.stack.pid("postgres")
        except SupervisorGone:
            return  # the stack looks for leftovers
        for pid in leftovers(self.stack.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, SIGQUIT if pid == postgres else SIGKILL)

    def edit(self, edit: Edit) -> None:
        """Change the copy of the product; programs that are started later have the change."""
        path = self.root / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file} does not hold this once: {edit.old}")
        path.write_text(text.replace(edit.old, edit.new))

    # --- Load and judgement -----------------------------------------------------------------------------------------------

    @contextmanager
    def load(self, **crowd: Any) -> Iterator[None]:
        """Cast votes, and compare the tallies with the votes, while the block runs."""
        enough = threading.Event()
        watcher = threading.Thread(target=self._watch, args=[enough])
        watcher.start()
        try:
            with Clients(self.crowd("load", **crowd)):
                yield
        finally:
            enough.set()
            watcher.join()

    def crowd(self, name: str, **crowd: Any) -> Crowd:
        """Return a crowd for this stage, with a ledger of its own."""
        notes = self.folder / f"ledger.{name}"
        return Crowd(int(self.stack.env["PORT"]), self.dev["client_key"], tuple(self.polls), notes, self.seed, **crowd)

    def _watch(self, enough: threading.Event) -> None:
        kept, pause = None, 0.3
        while not enough.wait(pause):
            began = time.monotonic()
            try:
                with self._looking:
                    self._drift += self.drift()
                    now_kept = self.query("SELECT last_value FROM outbox_id_seq")
            except psycopg2.Error:
                continue
            if kept not in (None, now_kept):
                self._to_outbox.append(_microseconds())
            kept = now_kept
            # Looking must not become the load itself.
            pause = max(0.3, 5 * (time.monotonic() - began))

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Nobody compares tallies with votes while the block runs."""
        with self._looking:
            yield

    def drift(self) -> list[tuple[Any, ...]]:
        """Return the tallies that are not the count of the votes."""
        return self.query(_DRIFT)

    def judge(self) -> Verdict:
        """Have it judged what is in the tables."""
        self._drift += self.drift()
        outcomes = dict(
            self.query(
                "SELECT vote_id::text, count(*) FROM (SELECT vote_id FROM votes UNION ALL SELECT vote_id FROM outcomes) v GROUP BY 1"
            )
        )
        standing = frozenset(id for (id,) in self.query("SELECT vote_id::text FROM votes"))
        last_stands = {poll["id"]: poll["last_stands"] for poll in self.polls}
        ends = [(at, min((fault for fault in self._faults if fault > at), default=_microseconds())) for at, _ in self._returns]
        verdict = oracle.judge(
            self.ledgers(),
            Tables(outcomes, standing),
            last_stands,
            self._drift,
            returns=ends,
            clock_error=self.clock_error * 1_000_000,
            forgotten=self.forgotten,
        )
        verdict.longest_return = max([verdict.longest_return, *map(self._seconds_until_queued, self._returns, ends)])
        return verdict

    def _seconds_until_queued(self, back: tuple[int, str], span: tuple[int, int]) -> float:
        """Return how long votes still went to the outbox after the broker was back."""
        began, ended = span
        if not back[1].startswith("rabbitmq"):
            return 0
        last = began
        for moment in self._to_outbox:
            if last < moment < min(ended, last + _CALM_SECONDS * 1_000_000):
                last = moment
        return (last - began) / 1_000_000

    def settle(self) -> None:
        """Return when nothing is on its way any more and nothing has been counted for a second; complain when it gets stuck before."""
        seen: dict[str, object] = {}
        moved_at, calm = time.monotonic(), 0
        while True:
            time.sleep(0.2)
            # What workers hold is asked for last: that costs a second.
            of = "messages" if calm >= 5 else "ready"
            left = self._left(of)
            is_done = left is not None and not any(left[:2])
            if is_done and of == "messages":
                return
            if left != seen.get(of):
                seen[of], moved_at = left, time.monotonic()
                calm = 0 if of == "ready" else calm
            elif time.monotonic() - moved_at > PATIENCE:
                self.complaints.append(f"nothing moved for {PATIENCE} s; left of messages ({of}), outbox, stored: {left}")
                return
            elif is_done:
                calm += 1

    def _left(self, of: str) -> tuple[int, int, int] | None:
        """Return how many messages and bundles in the outbox are not counted, and, when none, how many votes are stored.

        None while a server does not answer. Counting the votes all the time would keep the workers from it.
        """
        try:
            messages_left = self.depth(*messages.QUEUES, of=of)
            kept = self.query("SELECT count(*) FROM outbox")[0][0]
            return messages_left, kept, 0 if messages_left or kept else self.stored()
        except (psycopg2.Error, OSError, amqp.AMQPError, subprocess.SubprocessError):
            return None

    def stored(self) -> int:
        """Return how many votes have an outcome."""
        return int(self.query("SELECT (SELECT count(*) FROM votes) + (SELECT count(*) FROM outcomes)")[0][0])

    def ids(self) -> set[str]:
        """Return the ids of all votes that have an outcome."""
        return {id for (id,) in self.query("SELECT vote_id::text FROM votes UNION SELECT vote_id::text FROM outcomes")}

    def ledgers(self) -> list[Path]:
        return sorted(self.folder.glob("ledger*"))

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg2.connect(self.stack.database_url, connect_timeout=3) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def execute(self, sql: str) -> None:
        with psycopg2.connect(self.stack.database_url, connect_timeout=3) as connection, connection.cursor() as cursor:
            cursor.execute(sql)

    def depth(self, *queues: str, of: str = "ready") -> int:
        """Messages that wait in the queues; with `of` "messages", also those that a worker holds."""
        if of == "messages":
            rows = json.loads(self.rabbitmqctl("list_queues", "name", "messages", "--formatter", "json"))
            return sum(int(row["messages"]) for row in rows if row["name"] in queues)
        with rabbitmq.connect(self.stack.broker_url, 3) as connection:
            channel = connection.channel()
            return sum(int(channel.queue_declare(queue, passive=True).message_count) for queue in queues)

    def versions(self) -> str:
        with rabbitmq.connect(self.stack.broker_url, 3) as connection:
            broker = connection.server_properties["version"]
        return f"RabbitMQ {broker}, PostgreSQL {self.query('SHOW server_version')[0][0]}"

    def lines(self, program: str, text: str) -> int:
        """Return how many lines of the program's log have the text in them."""
        log = self.stack.folder.log(program)
        return sum(text in line for path in log.parent.glob(f"{log.name}*") for line in path.read_text(errors="replace").splitlines())

    def manage(self, *command: str) -> str:
        """Run `manage.py`; return what it prints."""
        done = subprocess.run(
            [sys.executable, "manage.py", *command], cwd=self.root, env=self.stack.env, check=True, capture_output=True, text=True
        )
        return done.stdout

    # --- What is done to it -----------------------------------------------------------------------------------------------

    def pause(self, low: float, high: float) -> None:
        time.sleep(self.dice.uniform(low, high))

    def did(self, times: int = 1) -> None:
        """Note that something was done."""
        self.injected += times
        self._faults.append(_microseconds())

    def is_back(self, server: str) -> None:
        """Note that a server answers again: votes have to be accepted soon."""
        self._returns.append((_microseconds(), server))

    def kill(self, name: str, number: Signals = SIGKILL) -> None:
        """Send the signal to the program's own process, and wait until it is back."""
        self.did()
        self.kills[name] += 1
        self.stack.wait_until_back(name, self.stack.kill(name, number))
        if name not in PROGRAMS:
            self.is_back(name)

    def kill_child(self, name: str) -> None:
        """SIGKILL to one of the program's children."""
        try:
            children = psutil.Process(self.stack.pid(name)).children()
            self.dice.choice(children).kill()
        except (psutil.NoSuchProcess, IndexError):
            return
        self.did()
        self.kills[f"{name} child"] += 1

    @contextmanager
    def away(self, server: str) -> Iterator[None]:
        """The server is stopped while the block runs."""
        self.did()
        self.stack.stop(server)
        yield
        self.stack.start(server)
        self.is_back(server)

    def processes(self, name: str) -> list[psutil.Process]:
        process = psutil.Process(self.stack.pid(name))
        return [process, *process.children(recursive=True)]

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """SIGSTOP to all processes of the program while the block runs."""
        processes = self.processes(name)
        self.did()
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()
        if name not in PROGRAMS:
            self.is_back(name)

    def set_clocks(self, **seconds: int) -> None:
        """Set the clocks of these programs so far ahead of the true time, while they run."""
        for name, ahead in seconds.items():
            faketime.set_clock(self._clock(name), ahead)
        self.did()

    def _clock(self, name: str) -> Path:
        return self.folder / f"clock.{name}"

    def rabbitmqctl(self, *command: str, node: str = "rabbitmq") -> str:
        program = self.stack.programs[node]
        done = subprocess.run(
            ["./rabbitmqctl", "-q", *command],
            cwd=program.directory,
            env={**os.environ, **program.env},
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return done.stdout

    def note_by_hand(self, votes: list[list[Any]]) -> None:
        """Note votes that are put on the queue by hand as accepted: [vote id, poll id, voter key, [option], microseconds]."""
        self._by_hand += 1
        notes = Ledger(self.folder / f"ledger.{self._by_hand}")
        for number, (id, poll, voter, (option,), at) in enumerate(votes):
            notes.sent(number, Vote(poll, voter, str(option), id))
            notes.answered(number, 202, id, datetime.fromtimestamp(at / 1e6, UTC).isoformat())
        notes.sync()


def _microseconds() -> int:
    return time.time_ns() // 1000


_DRIFT = """
    SELECT * FROM (SELECT poll_id, selection, votes FROM tallies WHERE votes <> 0) t
    FULL JOIN (SELECT poll_id, selection, count(*) AS votes FROM votes GROUP BY 1, 2) v USING (poll_id, selection)
    WHERE t.votes IS DISTINCT FROM v.votes
"""
