"""What a supervised program and a server of the stack are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from stack.folder import ROOT


@dataclass(frozen=True)
class Program:
    """A process that is kept running.

    Programs stop in the reverse order of `stage`, those of one stage together: epmd 1, the servers 2, workers 3, the rest 4.
    """

    name: str
    command: list[str]
    # What is done each time before a stack starts it; supervisord alone starts it again without.
    before: Callable[[], None] | None = None
    # Whether it does its work now, asked from outside; None: it counts as working once it has run for two seconds.
    answers: Callable[[], bool] | None = None
    stage: int = 4
    env: dict[str, str] = field(default_factory=dict)  # on top of the stack's; lands in a file, so no secrets here
    directory: Path = ROOT
    user: str = ""  # only for a supervisor that runs as root
    stop_signal: str = "TERM"
    stop_seconds: int = 30  # after that: SIGKILL


@dataclass(frozen=True)
class Server:
    """PostgreSQL or RabbitMQ, as it was resolved: somebody else's, by its URL, or private programs of this stack."""

    url: str
    chosen: str  # for the screen: what was chosen, and why
    programs: tuple[Program, ...] = ()
    env: dict[str, str] = field(default_factory=dict)  # what else the stack's programs should know of it


def http_ok(host: str, port: int, path: str) -> bool:
    """Whether GET answers 200 within 2 s."""
    try:
        connection = HTTPConnection(host, port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        finally:
            connection.close()
    except (OSError, HTTPException):
        return False
