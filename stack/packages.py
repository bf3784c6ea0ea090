"""Debian's packages, unpacked into a folder: needs no root, for nothing is installed."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from stack.folder import StackError

# What to download, asked of apt-cache or apt-get with these options.
Find = Callable[[Path, list[str]], list[str]]


def unpack(place: Path, find: Find, finish: Callable[[Path], None] | None = None) -> None:
    """Unpack there what `find` names, complete and finished or not at all. Raises StackError where that can't be had."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise StackError("This is no Debian: there is no apt-get or no dpkg-deb.")
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "debs").mkdir(parents=True)
    # The machine's package lists; if it has none (as in most container images), lists of our own.
    own = {"Dir::State": f"{part}/apt/state", "Dir::State::status": "/var/lib/dpkg/status", "Dir::Cache": f"{part}/apt/cache"}
    own_lists = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
    try:
        try:
            download(part, find, [])
        except subprocess.CalledProcessError:
            for path in ("state/lists/partial", "cache/archives/partial"):
                (part / "apt" / path).mkdir(parents=True)
            run(part, "apt-get", *own_lists, "update")
            download(part, find, own_lists)
        for deb in part.glob("debs/*.deb"):
            run(part, "dpkg-deb", "-x", deb, part)
    except subprocess.CalledProcessError as exc:
        raise StackError(f"The packages could not be fetched:\n{exc.stderr.strip()[-1000:]}") from exc
    shutil.rmtree(part / "debs")
    shutil.rmtree(part / "apt", ignore_errors=True)
    if finish:
        finish(part)
    part.rename(place)


def download(part: Path, find: Find, options: list[str]) -> None:
    run(part / "debs", "apt-get", *options, "download", *sorted(find(part, options)))


def run(directory: Path, *command: object) -> str:
    return subprocess.run([str(word) for word in command], cwd=directory, check=True, capture_output=True, text=True).stdout
