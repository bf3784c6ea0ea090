"""`python -m stack run`: a command with the servers, and nothing left of them afterwards."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from stack.stack import FolderInUse, Stack


def run(stack: Stack, command: Sequence[str]) -> int:
    """Run the command; returns its exit code. The last one who uses the servers of a folder stops them."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    while not provide_servers(stack):
        pass
    try:
        return call(command, stack.env)
    finally:
        if stack.folder.lock():  # nobody else has it
            stack.close()


def provide_servers(stack: Stack) -> bool:
    """Start the servers, or join those who use them already; False when these ended meanwhile."""
    try:
        stack.claim()
    except FolderInUse:
        print("Using the PostgreSQL and the RabbitMQ that somebody else started here, or is just starting.", file=sys.stderr)
        stack.folder.lock(shared=True)  # returns when they have started
        if not stack.supervisor.is_alive():
            return False
        stack.join()
        return True
    try:
        stack.prepare()
        for name, server in stack.servers.items():
            print(f"{name}: {server.chosen}", file=sys.stderr)
        stack.start_servers()
    except BaseException:
        stack.close()
        raise
    stack.folder.share_lock()
    return True


def call(command: Sequence[str], env: dict[str, str]) -> int:
    """Run it in the foreground; a signal that means us goes to it."""
    python = Path(sys.executable).parent  # so that `python` is this one
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the command from the terminal, like us.
        if process is not None and number != signal.SIGINT:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    try:
        process = subprocess.Popen(command, env=env | {"PATH": f"{python}{os.pathsep}{env.get('PATH', os.defpath)}"})
    except OSError as exc:
        print(f"{command[0]}: {exc.strerror}", file=sys.stderr)
        return 127
    code = process.wait()
    return code if code >= 0 else 128 - code
