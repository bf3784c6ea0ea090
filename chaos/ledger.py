"""The ledger: what clients sent and what they were told, a line of JSON for each, on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Vote(NamedTuple):
    """What one client wants counted. Two with one key are one vote, or a misuse of the key."""

    poll: str
    voter: str
    option: str
    key: str


class Ledger:
    """Written by one process. `sync` makes sure of everything before."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1 << 16)

    def sent(self, attempt: int, vote: Vote) -> None:
        self._write(["sent", attempt, time.time_ns() // 1000, *vote])

    def answered(
        self, attempt: int, status: int, id: str | None = None, accepted_at: str | None = None, problem: str | None = None
    ) -> None:
        """Note a definite or an unclear answer; `status` 0 is none at all."""
        self._write(["answered", attempt, time.time_ns() // 1000, status, id, accepted_at, problem])

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, line: list[Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def accepted(paths: Iterable[Path]) -> dict[str, Vote]:
    """Return the votes with a 202 by their id."""
    found = {}
    for path in paths:
        sent: dict[int, Vote] = {}
        for kind, attempt, _, *rest in read(path):
            if kind == "sent":
                sent[attempt] = Vote(*rest)
            elif rest[0] == 202:
                found[rest[1]] = sent[attempt]
    return found


def read(path: Path) -> Iterator[list[Any]]:
    """Yield the lines one by one; one that was cut off by the end of its writer is none."""
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
