"""A stack: PostgreSQL, RabbitMQ and programs that use them, in one folder; any number of them runs side by side."""

import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from stack import postgres, product, rabbitmq
from stack.folder import Folder, StackError
from stack.program import Program, Server
from stack.supervisor import Supervisor, SupervisorGone, end_leftovers

# What belongs to one stack: it comes from its `env` or is chosen for it, never from the environment around it, where it
# would be another stack's.
OWN = (
    "DATABASE_URL",
    "CELERY_BROKER_URL",
    "HOST",
    "PORT",
    "FLOWER_PORT",
    "FLOWER_BASIC_AUTH",
    "BROKER_API_URL",
    "REPLICA_URL",
    "METRICS_PORT",
)


class FolderInUse(StackError):
    pass


class Stack:
    """Servers and programs in one folder. Nothing of the environment around it decides which servers those are.

        with Stack(folder) as stack:  # PostgreSQL and RabbitMQ answer
            stack.start("web", "worker")  # ... and so do these
            old_pid = stack.kill("worker")  # SIGKILL
            stack.wait_until_back("worker", old_pid)
        stack.destroy()  # all has ended; forget the data too

    `env` is added to the environment of every program. DATABASE_URL or CELERY_BROKER_URL in it: that server is used as given.
    PORT and FLOWER_PORT: if not in it, free ones. `programs`: which, for its environment; the product's. `say` hears of what takes long.
    `broker_nodes`: how many nodes the private RabbitMQ has. `standby`: whether the private PostgreSQL has one.
    """

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str] | None = None,
        programs: Callable[[Mapping[str, str]], Iterable[Program]] = product.programs,
        say: Callable[[str], None] = lambda _: None,
        broker_nodes: int = 1,
        standby: bool = False,
    ):
        self.folder = Folder(folder)
        self.supervisor = Supervisor(self.folder)
        self.env = {name: value for name, value in os.environ.items() if name not in OWN} | dict(env or {})
        self.servers: dict[str, Server] = {}
        self.programs: dict[str, Program] = {}
        self._programs = programs
        self._say = say
        self._broker_nodes = broker_nodes
        self._standby = standby

    def __enter__(self) -> Self:
        self.claim()
        try:
            self.prepare()
            self.start_servers()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def claim(self) -> None:
        """Become the one who starts and stops things in this folder. Raises FolderInUse when somebody else is."""
        self.folder.make()
        if not self.folder.lock():
            raise FolderInUse(f"{self.folder.path} is in use.")
        self.end_all()

    def prepare(self) -> None:
        """Resolve the servers and start the supervisor; no program runs yet."""
        with ThreadPoolExecutor() as pool:
            resolving = {
                "PostgreSQL": pool.submit(postgres.resolve, self.folder, self.env.get("DATABASE_URL"), self._say, standby=self._standby),
                "RabbitMQ": pool.submit(rabbitmq.resolve, self.folder, self.env.get("CELERY_BROKER_URL"), self._say, self._broker_nodes),
            }
        self.servers = {name: future.result() for name, future in resolving.items()}
        self.complete_env()
        programs = [program for server in self.servers.values() for program in server.programs]
        programs += self._programs(self.env)
        self.programs = {program.name: program for program in programs}
        self.supervisor.start(programs, self.env)

    def complete_env(self) -> None:
        """Choose what the environment does not say, and keep it for those who join (`python -m stack run`)."""
        chosen = {"DATABASE_URL": self.servers["PostgreSQL"].url, "CELERY_BROKER_URL": self.servers["RabbitMQ"].url}
        chosen |= {"DEBUG": "true", "HOST": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
        for name in ("SECRET_KEY", "VOTER_SECRET"):
            chosen[name] = self.folder.secret(name, lambda: secrets.token_urlsafe(48))
        for name in ("PORT", "FLOWER_PORT"):
            chosen[name] = self.env.get(name) or str(self.folder.port(name))
        chosen["FLOWER_BASIC_AUTH"] = f"flower:{self.folder.secret('flower_password')}"
        for server in self.servers.values():
            chosen |= server.env
        self.env = chosen | {name: value for name, value in self.env.items() if value}
        self.folder.environment = {name: self.env[name] for name in chosen}

    def end_all(self) -> list[str]:
        """End what runs in this folder, also what a killed `make up` or a killed supervisor left; returns the names."""
        try:
            stopped = self.supervisor.shutdown()
        except SupervisorGone:
            stopped = []
        left = end_leftovers(self.folder)
        (self.folder / "dev.json").unlink(missing_ok=True)
        return stopped + ([f"{left} processes of a supervisor that was killed"] if left else [])

    def start_servers(self, ready: Callable[[str], None] | None = None) -> None:
        """Start the private servers and return when they answer, epmd before RabbitMQ (which else starts its own)."""
        programs = [program for server in self.servers.values() for program in server.programs]
        for stage in sorted({program.stage for program in programs}):
            self.start(*(program.name for program in programs if program.stage == stage), ready=ready)

    def start(self, *names: str, seconds: float = 60, ready: Callable[[str], None] | None = None) -> None:
        """Start these programs together and return when they answer; see `wait`."""
        for name in names:
            if before := self.programs[name].before:
                before()
            self.supervisor.start_program(name)
        self.wait(*names, seconds=seconds, ready=ready)

    def wait(self, *names: str, seconds: float = 60, ready: Callable[[str], None] | None = None) -> None:
        """Return when they answer, calling ready(name) for each at that moment.

        Raises StackError when one does not in time, or ends again and again.
        """
        began = time.monotonic()
        pids: dict[str, set[int]] = {name: set() for name in names}
        while pids:
            for name, process in self.supervisor.processes().items():
                if name not in pids:
                    continue
                if process["pid"] and self._answers(name, process):
                    del pids[name]
                    if ready:
                        ready(name)
                    continue
                pids[name].add(process["pid"])
                # More than three: PostgreSQL may need a second start after a crash, while its orphans still end.
                if len(pids[name] - {0}) > 3 or process["statename"] in ("BACKOFF", "FATAL"):
                    raise StackError(f"{name} ends as soon as it is started.", self.folder.log(name))
            if pids and time.monotonic() - began > seconds:
                raise StackError(f"{' and '.join(pids)} did not answer within {seconds:.0f} s.", self.folder.log(min(pids)))
            time.sleep(0.05)

    def _answers(self, name: str, process: Mapping[str, int]) -> bool:
        answers = self.programs[name].answers
        return answers() if answers else process["now"] - process["start"] >= 2

    def stop(self, *names: str) -> None:
        """Stop these programs and return when they have ended."""
        self.supervisor.stop_programs(names)

    def restart(self, *names: str) -> None:
        self.stop(*names)
        self.start(*names)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send the signal to the program itself, not to its children; returns the pid that it had."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def wait_until_back(self, name: str, old_pid: int, seconds: float = 60) -> int:
        """Return the new pid once the program has been started again and answers."""
        give_up_at = time.monotonic() + seconds
        while self.pid(name) in (0, old_pid):
            if time.monotonic() > give_up_at:
                raise StackError(f"{name} was not started again within {seconds:.0f} s.", self.folder.log("supervisord"))
            time.sleep(0.05)
        self.wait(name, seconds=give_up_at - time.monotonic())
        return self.pid(name)

    def pid(self, name: str) -> int:
        """0 when it does not run. The master process's: a worker's children come and go."""
        return self.pids()[name]

    def pids(self) -> dict[str, int]:
        return {name: process["pid"] for name, process in self.supervisor.processes().items()}

    @property
    def database_url(self) -> str:
        return self.env["DATABASE_URL"]

    @property
    def broker_url(self) -> str:
        return self.env["CELERY_BROKER_URL"]

    @property
    def base_url(self) -> str:
        return f"http://{product.reachable(self.env['HOST'])}:{self.env['PORT']}"

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.env['FLOWER_PORT']}"

    def join(self) -> None:
        """Use the servers that somebody else started in this folder."""
        self.env = self.folder.environment | {name: value for name, value in self.env.items() if value}

    def close(self) -> list[str]:
        """End all that runs here; its data stays. Returns the names of what was running."""
        try:
            return self.end_all()
        finally:
            self.folder.unlock()

    def destroy(self) -> list[Path]:
        """Forget the data, the secrets and the logs of a closed stack; returns what was removed."""
        names = ["postgres", "rabbitmq", "log", "state.json", "dev.json"]
        paths = [self.folder / name for name in names]
        paths += self.folder.path.glob("supervisord.*")
        if (self.folder / "postgres").is_symlink():  # see postgres.make_home
            paths.append((self.folder / "postgres").readlink())
        removed = [path for path in paths if path.is_symlink() or path.exists()]
        for path in removed:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if self.supervisor.socket.parent.name.startswith("nexus-"):
            shutil.rmtree(self.supervisor.socket.parent, ignore_errors=True)
        return removed
