"""One log of many programs, and in it who died and was started again."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from stack.folder import Folder

COLOURS = [36, 32, 35, 33, 34]
EXITED = re.compile(r"(?P<at>\S+ \S+) \w+ exited: (?P<name>\S+) \((?P<why>.*); (?:not )?expected\)")
SPAWNED = re.compile(r"(?P<at>\S+ \S+) \w+ spawned: '(?P<name>\S+)' with pid (?P<pid>\d+)")


class Tail:
    """The lines that come to a file from now on, across its rotation."""

    def __init__(self, path: Path):
        self.path = path
        self._rest = b""
        self._file: BinaryIO | None = None
        if path.exists():
            self._file = path.open("rb")
            self._file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        if self._file is not None:
            yield from self._read(self._file)
        try:
            if self._file is not None and os.fstat(self._file.fileno()).st_ino == self.path.stat().st_ino:
                return
            file = self.path.open("rb")
        except FileNotFoundError:  # in the middle of a rotation: the next time
            return
        if self._file is not None:
            yield from self._read(self._file)  # what came between the last read and the rotation
            self._file.close()
        self._file = file
        yield from self._read(file)

    def _read(self, file: BinaryIO) -> Iterator[str]:
        *lines, self._rest = (self._rest + file.read()).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)


class MergedLog:
    def __init__(self, folder: Folder, names: Iterable[str], pids: dict[str, int], *, colours: bool):
        self._tails = {name: Tail(folder.log(name)) for name in names}
        self._supervisor = Tail(folder.log("supervisord"))
        self._pids = dict(pids)
        self._deaths: dict[str, tuple[datetime, str]] = {}  # of those not started again yet: when, and of what
        codes = dict(zip(self._tails, COLOURS, strict=True)) if colours else {}
        width = max(map(len, self._tails))
        self._prefixes = {name: f"\x1b[{codes[name]}m{name:{width}} |\x1b[0m " if colours else f"{name:{width}} | " for name in self._tails}

    def lines(self) -> Iterator[str]:
        for line in self._supervisor.lines():
            if said := self._restart(line):
                yield f"{time.strftime('%H:%M:%S')} {said}"
        for name, tail in self._tails.items():
            for line in tail.lines():
                yield self._prefixes[name] + line

    def _restart(self, line: str) -> str | None:
        if exited := EXITED.match(line):
            self._deaths[exited["name"]] = (datetime.fromisoformat(exited["at"]), exited["why"])
        elif spawned := SPAWNED.match(line):
            name, old_pid, pid = spawned["name"], self._pids.get(spawned["name"]), int(spawned["pid"])
            self._pids[name] = pid
            if name in self._deaths:
                died_at, why = self._deaths.pop(name)
                seconds = (datetime.fromisoformat(spawned["at"]) - died_at).total_seconds()
                return f"{name} died (pid {old_pid}, {why}); running again as pid {pid} after {seconds:.1f} s"
        return None
