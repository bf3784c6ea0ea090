"""The folder of a stack: its secrets, ports, logs and lock."""

import fcntl
import hashlib
import json
import os
import random
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Ports are chosen here because Linux (32768 and up) and macOS (49152 and up) give no outgoing connection a port of this range:
# while a server is down, a client that keeps trying to reach it can then never occupy the server's port.
PORTS = range(20000, 32768)


class StackError(Exception):
    """Something the person at the keyboard has to know or to change; the text says what, in a sentence."""

    def __init__(self, message: str, log: Path | None = None):
        super().__init__(message)
        self.log = log


class Folder:
    """What a stack keeps between two starts. `state.json` (mode 600): {"secrets": {}, "ports": {}, "environment": {}}."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.name = "nexus-" + hashlib.sha256(bytes(self.path)).hexdigest()[:8]
        self._state_lock = threading.Lock()
        self._lock_file: int | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def log(self, program: str) -> Path:
        return self.path / "log" / f"{program}.log"

    def make(self) -> None:
        try:
            for path in (self.path, self.path / "log"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._read()
        except PermissionError as exc:
            message = f"{exc.filename} belongs to another user: start as that user, or let that user `make reset`."
            raise StackError(message) from exc

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The secret of that name, made when first asked for."""
        with self._state_lock:
            state = self._read()
            if name not in state["secrets"]:
                state["secrets"][name] = make()
                self._write(state)
            value: str = state["secrets"][name]
            return value

    def port(self, name: str) -> int:
        """A free port: the one that name had the last time, if nobody took it meanwhile."""
        with self._state_lock:
            state = self._read()
            if not is_free(state["ports"].get(name)):
                candidates = (random.choice(PORTS) for _ in iter(int, 1))
                state["ports"][name] = next(p for p in candidates if p not in state["ports"].values() and is_free(p))
                self._write(state)
            port: int = state["ports"][name]
            return port

    @property
    def environment(self) -> dict[str, str]:
        """What the stack that runs here chose for its programs: DATABASE_URL, CELERY_BROKER_URL, PORT, SECRET_KEY, ..."""
        environment: dict[str, str] = self._read()["environment"]
        return environment

    @environment.setter
    def environment(self, environment: dict[str, str]) -> None:
        with self._state_lock:
            self._write(self._read() | {"environment": environment})

    def lock(self, *, shared: bool = False) -> bool:
        """Become the one who starts and stops things here (False: somebody else is), or, shared, wait to be one who uses them.

        The kernel gives the lock back when its holder dies, however that happens.
        """
        self.unlock()
        self._lock_file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            return False
        return True

    def share_lock(self) -> None:
        """From the one who starts to one of those who use: nothing may be started or stopped by one alone any more."""
        assert self._lock_file is not None
        fcntl.flock(self._lock_file, fcntl.LOCK_SH)

    def unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"secrets": {}, "ports": {}, "environment": {}}
        path = self.path / "state.json"
        return empty | json.loads(path.read_text()) if path.exists() else empty

    def _write(self, state: dict[str, Any]) -> None:
        write_private(self.path / "state.json", json.dumps(state, indent=1))


def write_private(path: Path, text: str) -> None:
    """Replace the file in one step; only its owner can read it."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.replace(path)


def is_free(port: int | None, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there."""
    if port is None:
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def last_lines(path: Path, lines: int = 15) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
