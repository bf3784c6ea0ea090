"""supervisord (supervisord.org): starts the programs, starts them again when they die, keeps and rotates their logs."""

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from http.client import HTTPException
from itertools import groupby
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import Faults, SupervisorTransport

from stack.folder import Folder, StackError, write_private
from stack.program import Program

# In the environment of all that a supervisor starts, and of nothing else: the processes of a stack can be found by it even
# when their supervisor was killed. A process id could be somebody else's by then.
MARK = "NEXUS_STACK"


class SupervisorGone(StackError):
    """supervisord does not answer; `orderly` when it was asked to end, else it was killed."""

    def __init__(self, orderly: bool):
        super().__init__("the supervisor was stopped" if orderly else "the supervisor was killed")
        self.orderly = orderly


class Supervisor:
    def __init__(self, folder: Folder):
        self.folder = folder
        self.conf = folder / "supervisord.conf"
        self.pid_file = folder / "supervisord.pid"
        self.socket = folder / "supervisord.sock"
        self._process: subprocess.Popen[bytes] | None = None
        # A unix socket's path has at most 107 bytes (103 on macOS), and supervisord binds "<path>.<pid>" first.
        if len(bytes(self.socket)) > 90:
            self.socket = Path("/tmp") / f"{folder.name}-{os.getuid()}" / "supervisord.sock"

    def start(self, programs: Iterable[Program], env: Mapping[str, str]) -> None:
        """Start supervisord with these programs, none of them running yet, where no Ctrl-C reaches it."""
        if self.socket.parent != self.folder.path:
            make_private_directory(self.socket.parent)
        self.socket.unlink(missing_ok=True)
        write_private(self.conf, self._conf(programs))
        log = self.folder.log("supervisord")
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "-c", str(self.conf)],
                env={**env, MARK: str(self.folder.path)},
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        give_up_at = time.monotonic() + 20
        while not self.is_alive():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise StackError("supervisord did not start.", log)
            time.sleep(0.05)

    def _conf(self, programs: Iterable[Program]) -> str:
        lines = [
            "[supervisord]",
            f"logfile={self._value(self.folder.log('supervisord'))}",
            f"pidfile={self._value(self.pid_file)}",
            "silent=true",
            "nocleanup=true",
            *(["user=root"] if os.getuid() == 0 else []),  # or it warns
            "[unix_http_server]",
            f"file={self._value(self.socket)}",
            "chmod=0700",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        ]
        for program in programs:
            environment = ",".join(f'{name}="{self._value(value)}"' for name, value in program.env.items())
            lines += [
                f"[program:{program.name}]",
                f"command={self._value(shlex.join(program.command))}",
                f"directory={self._value(program.directory)}",
                f"environment={environment}",
                f"priority={program.stage}",
                *([f"user={program.user}"] if program.user else []),
                "autostart=false",
                "autorestart=true",
                # Zero, because supervisord waits one second longer after each exit within startsecs. So what dies at once
                # is tried again about every second, for ever.
                "startsecs=0",
                f"stopsignal={program.stop_signal}",
                f"stopwaitsecs={program.stop_seconds}",
                "killasgroup=true",
                "redirect_stderr=true",
                f"stdout_logfile={self._value(self.folder.log(program.name))}",
                "stdout_logfile_maxbytes=10MB",
                "stdout_logfile_backups=3",
            ]
        return "\n".join(lines) + "\n"

    def _value(self, value: object) -> str:
        """A value that supervisord's parser gives back as it is."""
        text = str(value)
        if re.search(r"\n|\s[;#]", text):  # it would end there
            raise StackError(f'A path must not contain " ;" or " #": {text}')
        return text.replace("%", "%%")

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        try:
            with ServerProxy("http://localhost", transport=transport) as server:
                return getattr(server.supervisor, method)(*arguments)
        except Fault as fault:
            if fault.faultCode == Faults.SHUTDOWN_STATE:
                raise SupervisorGone(orderly=True) from fault
            raise
        except (OSError, HTTPException) as exc:
            raise SupervisorGone(orderly=not self.pid_file.exists()) from exc

    def is_alive(self) -> bool:
        try:
            return bool(self._call("getState")["statename"] == "RUNNING")
        except SupervisorGone:
            return False

    def processes(self) -> dict[str, dict[str, Any]]:
        """{"web": {"pid": 12, "statename": "RUNNING", "start": 1790000000, "now": 1790000001, ...}}; pid 0: not running."""
        return {process["name"]: process for process in self._call("getAllProcessInfo")}

    def start_program(self, name: str) -> None:
        try:
            self._call("startProcess", name, False)
        except Fault as fault:
            if fault.faultCode != Faults.ALREADY_STARTED:
                raise StackError(f"{name} could not be started: {fault.faultString}.", self.folder.log(name)) from fault

    def stop_programs(self, names: Iterable[str]) -> None:
        """Stop them together, and return when they have ended."""
        names = set(names)
        for name in names:
            try:
                self._call("stopProcess", name, False)
            except Fault as fault:
                if fault.faultCode != Faults.NOT_RUNNING:
                    raise StackError(f"{name} could not be stopped: {fault.faultString}.") from fault
        while any(process["pid"] for name, process in self.processes().items() if name in names):
            time.sleep(0.05)

    def shutdown(self) -> list[str]:
        """End the programs, stage by stage, and supervisord. Returns what was running, in the order in which it stopped."""
        running = [name for name, process in self.processes().items() if process["pid"]]
        stages = {program["name"]: program["process_prio"] for program in self._call("getAllConfigInfo")}
        running.sort(key=lambda name: -stages[name])
        for _, names in groupby(running, key=lambda name: stages[name]):
            self.stop_programs(names)
        pid = self._call("getPID")
        with suppress(SupervisorGone):  # it may end before it has answered
            self._call("shutdown")
        if self._process is not None:
            self._process.wait()
        while pid in leftovers(self.folder):
            time.sleep(0.05)
        return running


def end_leftovers(folder: Folder) -> int:
    """End what a killed supervisor left behind; returns how many processes that were."""
    ending_at = time.monotonic() + 1  # chosen: a supervisor that was asked to end needs a moment after its last answer
    while (pids := leftovers(folder)) and time.monotonic() < ending_at:
        time.sleep(0.05)
    found = pids
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        give_up_at = time.monotonic() + seconds
        while (pids := leftovers(folder)) and time.monotonic() < give_up_at:
            time.sleep(0.05)
    return len(found)


def leftovers(folder: Folder) -> list[int]:
    """The processes with this folder's mark in their environment."""
    mark = f"{MARK}={folder.path}".encode()
    if not Path("/proc/self/environ").exists():  # macOS
        listing = subprocess.run(["ps", "-axEww", "-o", "pid=,command="], capture_output=True, check=True).stdout
        return [int(line.split()[0]) for line in listing.splitlines() if mark + b" " in line + b" "]
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            continue
    return pids


def make_private_directory(path: Path) -> None:
    """A directory of ours alone in a place where anybody could have made one before us."""
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise StackError(f"{path} is not a directory of yours alone (mode 700): remove it.")
