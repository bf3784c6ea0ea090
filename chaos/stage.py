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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import amqp
import psutil
import psycopg2

from chaos import oracle
from chaos.clients import Clients, Crowd
from chaos.ledger import Ledger, Vote
from chaos.oracle import Tables, Verdict
from chaos.proxy import Proxy
from stack import product, rabbitmq
from stack.demo import make_poll
from stack.folder import ROOT
from stack.program import Program
from stack.stack import Stack
from stack.up import manage, seed_demo

PROGRAMS = ("web", "worker", "periodic", "beat")
# How long everything may take to be counted once the load has ended (seconds). Chosen: the long run leaves half a million votes.
PATIENCE = 600
# The broker is in use again when for so long no bundle went to the outbox (seconds).
_CALM_SECONDS = 1.5


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
    # Whether the web process reaches RabbitMQ through `proxy`.
    is_proxied: bool = False
    # How wrong the product's clocks may be (seconds).
    clock_error: int = 0
    # How much was done to it.
    injected: int = 0
    # What a scenario found that should not be so.
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.ledger = self.folder / "ledger"
        # When the poll ends that a scenario is about.
        self.closes_at = datetime.max.replace(tzinfo=UTC)
        self._by_hand = 0
        self._drift: list[Any] = []
        # Microseconds since 1970: when something was done, when a server was back, when a bundle went to the outbox.
        self._faults: list[int] = []
        self._returns: list[tuple[int, str]] = []
        self._to_outbox: list[int] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = self._copy()
        self.stack = Stack(self.folder / "stack", env=self.env, programs=self._programs, broker_nodes=self.nodes)
        with ExitStack() as leaving:
            self._entering = leaving
            leaving.enter_context(self.stack)
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
        if self.is_proxied:
            url = urlsplit(env["CELERY_BROKER_URL"])
            self.proxy = self._entering.enter_context(Proxy(url.port or 5672))
            proxied = urlunsplit(url._replace(netloc=url.netloc.replace(f":{url.port}", f":{self.proxy.port}")))
            programs = [replace(p, env={"CELERY_BROKER_URL": proxied}) if p.name == "web" else p for p in programs]
        return programs + [replace(program, name=f"{program.name}2") for program in programs if program.name in self.twins]

    def make_poll(self, **fields: Any) -> dict[str, Any]:
        poll = make_poll(self.dev, title="Chaos", options=[{"text": text} for text in ("soup", "salad", "noodles")], **fields)
        return {"id": poll["id"], "options": [option["id"] for option in poll["options"]], "last_stands": poll["allow_change"]}

    def _copy(self) -> Path:
        """Copy the product, which somebody may be editing, and make the edits there."""
        copy = self.folder / "product"
        for name in ("core", "polls", "tasks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "manage.py", copy)
        for edit in self.edits:
            path = copy / edit.file
            text = path.read_text()
            if text.count(edit.old) != 1:
                raise ValueError(f"{edit.file} does not hold this once: {edit.old}")
            path.write_text(text.replace(edit.old, edit.new))
        return copy

    # --- Load and judgement -----------------------------------------------------------------------------------------------

    @contextmanager
    def load(self, **crowd: Any) -> Iterator[None]:
        """Cast votes, and compare the tallies with the votes, while the block runs."""
        enough = threading.Event()
        watcher = threading.Thread(target=self._watch, args=[enough])
        watcher.start()
        try:
            with Clients(Crowd(int(self.stack.env["PORT"]), self.dev["client_key"], tuple(self.polls), self.ledger, self.seed, **crowd)):
                yield
        finally:
            enough.set()
            watcher.join()

    def _watch(self, enough: threading.Event) -> None:
        kept, pause = None, 0.3
        while not enough.wait(pause):
            began = time.monotonic()
            try:
                self._drift += self.query(_DRIFT)
                now_kept = self.query("SELECT last_value FROM outbox_id_seq")
            except psycopg2.Error:
                continue
            if kept not in (None, now_kept):
                self._to_outbox.append(_microseconds())
            kept = now_kept
            # Looking must not become the load itself.
            pause = max(0.3, 5 * (time.monotonic() - began))

    def judge(self) -> Verdict:
        """Have it judged what is in the tables."""
        self._drift += self.query(_DRIFT)
        outcomes = dict(
            self.query(
                "SELECT vote_id::text, count(*) FROM (SELECT vote_id FROM votes UNION ALL SELECT vote_id FROM outcomes) v GROUP BY 1"
            )
        )
        standing = frozenset(id for (id,) in self.query("SELECT vote_id::text FROM votes"))
        last_stands = {poll["id"]: poll["last_stands"] for poll in self.polls}
        notes = sorted(self.folder.glob("ledger*"))
        ends = [(at, min((fault for fault in self._faults if fault > at), default=_microseconds())) for at, _ in self._returns]
        verdict = oracle.judge(
            notes, Tables(outcomes, standing), last_stands, self._drift, returns=ends, clock_error=self.clock_error * 1_000_000
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
        """Return when nothing is on its way any more and nothing has been counted for a second; complain when that takes too long."""
        give_up_at, before, calm = time.monotonic() + PATIENCE, -1, 0
        while calm < 5:
            if time.monotonic() > give_up_at:
                self.complaints.append(f"not all was counted within {PATIENCE} s")
                return
            time.sleep(0.2)
            try:
                # Looked at only then: counting them all the time would keep the workers from it.
                stored = -1 if self.depth("votes") or self.query("SELECT count(*) FROM outbox")[0][0] else self.stored()
            except (psycopg2.Error, OSError, amqp.AMQPError):
                continue
            calm = calm + 1 if stored == before >= 0 else 0
            before = stored
        give_up_at = time.monotonic() + 20
        while held := self.depth("votes", of="messages"):
            if time.monotonic() > give_up_at:
                self.complaints.append(f"{held} messages are neither counted nor waiting")
                return

    def stored(self) -> int:
        """Return how many votes have an outcome."""
        return int(self.query("SELECT (SELECT count(*) FROM votes) + (SELECT count(*) FROM outcomes)")[0][0])

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with psycopg2.connect(self.stack.database_url, connect_timeout=3) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def execute(self, sql: str) -> None:
        with psycopg2.connect(self.stack.database_url, connect_timeout=3) as connection, connection.cursor() as cursor:
            cursor.execute(sql)

    def depth(self, queue: str, of: str = "ready") -> int:
        """Messages that wait in the queue; with `of` "messages", also those that a worker holds."""
        if of == "messages":
            queues = json.loads(self.rabbitmqctl("list_queues", "name", "messages", "--formatter", "json"))
            return int(next(row["messages"] for row in queues if row["name"] == queue))
        with rabbitmq.connect(self.stack.broker_url, 3) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).message_count)

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

    def rabbitmqctl(self, *command: str, node: str = "rabbitmq") -> str:
        program = self.stack.programs[node]
        done = subprocess.run(
            ["./rabbitmqctl", "-q", *command],
            cwd=program.directory,
            env={**os.environ, **program.env},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
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
