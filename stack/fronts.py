"""nginx and HAProxy for the tests: those that are installed, else Debian's, unpacked."""

import fcntl
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from stack import packages
from stack.folder import ROOT

UNPACKED = ROOT / ".local" / "fronts"
# Debian keeps servers where only root's PATH leads.
PATHS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/opt/homebrew/bin"])


@dataclass(frozen=True)
class Front:
    """A program, and the environment in which it finds its libraries."""

    command: str
    env: dict[str, str]

    @property
    def version(self) -> tuple[int, ...]:
        """What `-v` says, such as (1, 22, 1)."""
        told = subprocess.run([self.command, "-v"], check=True, capture_output=True, text=True, env={**os.environ, **self.env})
        found = re.search(r"(\d+)\.(\d+)\.(\d+)", told.stdout + told.stderr)
        return tuple(int(number) for number in found.groups()) if found else ()


def provide(name: str) -> Front:
    """Return the front of this name (nginx, haproxy). Raises StackError where it is not installed and can't be fetched."""
    if command := shutil.which(name, path=PATHS):
        return Front(command, {})
    UNPACKED.parent.mkdir(mode=0o700, exist_ok=True)
    with (UNPACKED.parent / "fronts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not UNPACKED.exists():
            packages.unpack(UNPACKED, _find_missing)
    libraries = os.pathsep.join(str(path) for path in sorted((UNPACKED / "usr" / "lib").glob("*-linux-*")))
    return Front(str(UNPACKED / "usr" / "sbin" / name), {"LD_LIBRARY_PATH": libraries})


def _find_missing(part: Path, options: list[str]) -> list[str]:
    """Return nginx, HAProxy and those libraries of theirs that this machine lacks."""
    simulated = packages.run(part, "apt-get", *options, "--simulate", "--no-install-recommends", "install", "nginx", "haproxy")
    return re.findall(r"^Inst (\S+)", simulated, re.MULTILINE)
