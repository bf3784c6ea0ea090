"""Wrong clocks: libfaketime, which has one process believe in another time. Everything else of the machine goes on by the right one."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from stack.folder import ROOT, StackError
from stack.packages import unpack

# Not the one for several threads: it locks, and a worker's child that is forked meanwhile would wait for ever.
_LIBRARY = "faketime/libfaketime.so.1"
_INSTALLED = [Path("/usr/lib"), Path("/usr/local/lib"), Path("/usr/lib64"), *Path("/usr/lib").glob("*-linux-gnu")]


# libfaketime 0.9.10 refuses the call by which Python sleeps, a moment by the monotonic clock. This waits as long by another.
_SLEEP = """import select, time

time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


def environment(clock: Path) -> Mapping[str, str]:
    """Return what has a Python program take the time from `clock`, a file that says how far it is ahead; see `set_clock`."""
    started_first = clock.parent / "faketime"
    started_first.mkdir(exist_ok=True)
    (started_first / "sitecustomize.py").write_text(_SLEEP)
    return {
        "PYTHONPATH": str(started_first),
        "LD_PRELOAD": str(_library(ROOT / ".local" / "faketime")),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",  # in force within a second
        # As with a real clock that is set: how long something takes goes on being measured by one that is not.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def set_clock(clock: Path, seconds: int) -> None:
    """Have the programs of this clock be so far ahead of the true time."""
    part = clock.with_name(clock.name + ".part")
    part.write_text(f"{seconds:+d}\n")
    part.replace(clock)


def _library(unpacked: Path) -> Path:
    """Return the library: one that is installed, or else Debian's package, unpacked."""
    for place in _INSTALLED:
        if (place / _LIBRARY).exists():
            return place / _LIBRARY
    if found := list(unpacked.glob(f"usr/lib/*/{_LIBRARY}")):
        return found[0]
    part = unpacked.with_name(f"{unpacked.name}.{os.getpid()}")  # another scenario may be fetching it
    try:
        unpack(part, lambda _, __: ["libfaketime"])
    except StackError as exc:
        raise StackError(f"Wrong clocks need libfaketime; install it: apt install libfaketime. {exc}") from exc
    shutil.rmtree(unpacked, ignore_errors=True)
    part.rename(unpacked)
    [library] = unpacked.glob(f"usr/lib/*/{_LIBRARY}")
    return library
