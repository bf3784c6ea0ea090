"""Liveness: workers and beat note that they go on, so that `manage.py alive` tells those that hang, even while they can't reach a thing."""

import logging
import os
import time
from pathlib import Path

from django.conf import settings

logger = logging.getLogger(__name__)

PROGRAMS = ("worker", "periodic", "beat")
NOTE_SECONDS = 2
# Chosen: what takes longest between two notes is trying to connect to a broker that does not answer, some 6 s.
HANGS_AFTER_SECONDS = 30


def note(program: str) -> None:
    """Remember that the program lives now. Never fails: a full disk is no reason to stop counting."""
    try:
        _make_folder(settings.LIVENESS_FOLDER)
        _file_of(program).touch(0o600)
    except OSError as exc:
        logger.warning("%s can't note in LIVENESS_FOLDER that it lives (%s)", program, type(exc).__name__)


def silence_of(program: str) -> float | None:
    """Return the seconds since the program's last note on this machine; None when there is none."""
    try:
        return max(0.0, time.time() - _file_of(program).stat().st_mtime)
    except FileNotFoundError:
        return None


def _make_folder(folder: Path) -> None:
    """Make the folder if it is this installation's own; one that an operator has named is there."""
    if not folder.name.endswith(settings.INSTALLATION):
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # it lies where everybody may write
        raise PermissionError


def _file_of(program: str) -> Path:
    folder: Path = settings.LIVENESS_FOLDER
    return folder / f"nexus-{settings.QUEUE_PREFIX}{program}.alive"
