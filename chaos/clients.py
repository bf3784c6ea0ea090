"""A crowd of clients, in a process of its own: they cast votes until each has a definite answer, and note all they do."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from chaos.ledger import Ledger, Vote

# Longer than any answer may take (4 s), so that one that does is seen.
TIMEOUT_SECONDS = 10
BATCH = 100
# Where there are several web processes, a connection goes to the next after so many answers: each has to know the polls by now.
_ANSWERS_EACH = 50


@dataclass(frozen=True)
class Crowd:
    """How many clients, and what they do."""

    port: int
    client_key: str
    # [{"id", "options": [option id]}]
    polls: tuple[dict[str, Any], ...]
    ledger: Path
    seed: int
    connections: int = 24
    # Of them, how many send 100 votes at once.
    batching: int = 0
    # Votes a second at most: the machine has other things to do.
    rate: int = 900
    # Of more web processes: who gets no answer from one goes to the next.
    other_ports: tuple[int, ...] = ()
    # Cast these and no others, each until its answer is definite.
    votes: tuple[Vote, ...] | None = None


class Clients:
    """A crowd that casts votes while the block runs; then each client waits for its last answer."""

    def __init__(self, crowd: Crowd) -> None:
        context = get_context("spawn")
        self._enough = context.Event()
        self._process = context.Process(target=_cast, args=(crowd, self._enough), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def cast_all(self) -> None:
        """Return when all votes of a crowd that has its `votes` are cast."""
        self._process.join()

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc_type:  # nobody will look at what they noted
            self._process.kill()
            return
        self._enough.set()
        self._process.join(120)
        if self._process.exitcode != 0:
            self._process.kill()
            raise RuntimeError("the clients did not come to an end")


def votes_of(crowd: Crowd) -> Iterator[Vote]:
    """Yield votes without end: most voters vote once; some twice, some at once, some with a key that they have used before."""
    dice = random.Random(crowd.seed)
    number = 0
    while True:
        number += 1
        poll = dice.choice(crowd.polls)
        voter = f"{crowd.seed}-{number}"
        first, other = dice.sample(poll["options"], 2)
        vote = Vote(poll["id"], voter, first, f"{voter}.1")
        yield vote
        kind = dice.random()
        if kind < 0.15:  # thinks again
            yield vote._replace(option=other, key=f"{voter}.2")
        elif kind < 0.20:  # and again
            for n in range(2, 6):
                yield vote._replace(option=dice.choice(poll["options"]), key=f"{voter}.{n}")
        elif kind < 0.28:  # is not sure that it got through
            yield vote
        elif kind < 0.31:  # uses a key twice
            yield vote._replace(option=other)


def _cast(crowd: Crowd, enough: Any) -> None:
    asyncio.run(_Casting(crowd).run(enough))


class _Casting:
    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._votes = iter(crowd.votes) if crowd.votes is not None else votes_of(crowd)
        self._ledger = Ledger(crowd.ledger)
        self._attempts = 0
        self._allowed = 0.0
        self._is_over = False
        # By poll, the votes of the next batch.
        self._gathered: dict[str, list[Vote]] = defaultdict(list)
        # Votes whose batch got no answer: they are sent one by one.
        self._again: deque[Vote] = deque()

    async def run(self, enough: Any) -> None:
        clients = [self._client(batches=n < self._crowd.batching) for n in range(self._crowd.connections)]
        running = asyncio.gather(*clients)
        while not running.done():
            if enough.is_set():
                self._is_over = True
            else:
                self._allowed = min(self._allowed + self._crowd.rate * 0.02, max(self._crowd.rate, BATCH))
            await asyncio.sleep(0.02)
        await running
        self._ledger.sync()

    async def _client(self, *, batches: bool) -> None:
        connection = _Connection(self._crowd)
        while self._again or not self._is_over:
            if self._again:
                votes = [self._again.popleft()]
            elif batches and self._allowed >= BATCH:
                votes = self._batch()
            elif not batches and self._allowed >= 1:
                votes = list(islice(self._votes, 1))
                self._is_over = self._is_over or not votes
            else:
                await asyncio.sleep(0.005)
                continue
            self._allowed -= len(votes)
            while votes:
                votes = await (self._send_batch if len(votes) > 1 else self._send)(connection, votes)
        connection.close()

    def _batch(self) -> list[Vote]:
        """Return votes of one poll; those of others wait for theirs."""
        while True:
            vote = next(self._votes)
            gathered = self._gathered[vote.poll]
            gathered.append(vote)
            if len(gathered) == BATCH:
                return self._gathered.pop(vote.poll)

    async def _send(self, connection: _Connection, votes: list[Vote]) -> list[Vote]:
        """Send one vote; return it when it is to be sent again."""
        (vote,) = votes
        self._attempts = attempt = self._attempts + 1
        self._ledger.sent(attempt, vote)
        body = {"option": vote.option, "voter": vote.voter}
        status, answer = await connection.post(f"/api/v1/polls/{vote.poll}/votes", body, vote.key)
        self._ledger.answered(attempt, status, answer.get("id"), answer.get("accepted_at"), answer.get("type"))
        if _is_definite(status):
            return []
        await asyncio.sleep(0.05)
        return votes

    async def _send_batch(self, connection: _Connection, votes: list[Vote]) -> list[Vote]:
        attempts = range(self._attempts + 1, self._attempts + 1 + len(votes))
        self._attempts = attempts[-1]
        for attempt, vote in zip(attempts, votes, strict=True):
            self._ledger.sent(attempt, vote)
        body = [{"option": vote.option, "voter": vote.voter, "idempotency_key": vote.key} for vote in votes]
        status, answer = await connection.post(f"/api/v1/polls/{votes[0].poll}/votes/batch", body)
        shown = answer.get("votes") or [answer] * len(votes)
        for attempt, vote, item in zip(attempts, votes, shown, strict=True):
            problem = item.get("problem") or {}
            outcome = (202 if item.get("status") == "pending" else problem.get("status", status)) if status == 200 else status
            self._ledger.answered(attempt, outcome, item.get("id"), item.get("accepted_at"), problem.get("type"))
            if not _is_definite(outcome):
                self._again.append(vote)
        return []


def _is_definite(status: int) -> bool:
    return 200 <= status < 500 and status != 429


class _Connection:
    """Keep-alive HTTP to the web process, one request at a time."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._ports = deque([crowd.port, *crowd.other_ports])
        self._ports.rotate(random.randrange(len(self._ports)))
        self._answers = 0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: object, key: str | None = None) -> tuple[int, dict[str, Any]]:
        """Return status and body; (0, {}) when there was no answer."""
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await self._post(path, json.dumps(body).encode(), key)
        except (OSError, EOFError, ValueError, TimeoutError):
            self.close()
            self._ports.rotate(1)
            return 0, {}

    async def _post(self, path: str, body: bytes, key: str | None) -> tuple[int, dict[str, Any]]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._ports[0], limit=1 << 22)
        reader, writer = self._streams
        head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Api-Key {self._crowd.client_key}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        head += [f"Idempotency-Key: {key}"] if key else []
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        content = await reader.readexactly(int(headers["content-length"]))
        self._answers += 1
        is_turn = len(self._ports) > 1 and self._answers % _ANSWERS_EACH == 0
        if is_turn:
            self._ports.rotate(1)
        if is_turn or headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), json.loads(content) if content else {}

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None
