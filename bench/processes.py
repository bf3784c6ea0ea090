"""What processes use, read from /proc (Linux): each together with all below it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1_000_000


def _stats() -> dict[int, list[str]]:
    """{pid: what /proc/<pid>/stat says after the name}"""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
    return found


def _family(pid: int, stats: dict[int, list[str]]) -> list[int]:
    children: dict[int, list[int]] = {}
    for of, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(of)
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return [member for member in family if member in stats]


def processor_seconds(pid: int) -> float:
    """Return what the process and all below it have used so far; of those that have ended, what their parents know."""
    stats = _stats()
    return sum(int(ticks) for member in _family(pid, stats) for ticks in stats[member][11:15]) / _TICKS


def largest_rss_mb(pids: Iterable[int]) -> float:
    """Return the resident size (MB) of the largest among these and all below them."""
    stats = _stats()
    return max((int(stats[member][21]) for pid in pids for member in _family(pid, stats)), default=0) * _PAGE_MB
