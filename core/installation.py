"""The installation that `make up` made in this checkout, for whoever starts a program or a command by hand."""

import json
import os
from pathlib import Path
from typing import Any

import environ

BASE_DIR = Path(__file__).resolve().parent.parent
# Where stack/ keeps what it chose for its programs.
STATE = BASE_DIR / ".local" / "state.json"

NOT_NAMED = (
    "No database is named, and `make up` has made none here. Start one with `make up`, or name one: "
    "DATABASE_URL=postgres://user:password@host:port/name, in the environment or in .env."
)


def find() -> None:
    """Complete the environment by what belongs to the installation of this checkout, unless it or .env names the database of another.

    Its secrets, too: a process with its database and other secrets would count people twice.
    """
    if (BASE_DIR / ".env").exists():
        environ.Env.read_env(BASE_DIR / ".env")  # what is in the environment already wins
    chosen = _chosen()
    named = os.environ.get("DATABASE_URL", "")
    if not chosen or os.environ.get("DATABASE_URL_FILE") or named not in ("", chosen["DATABASE_URL"]):
        return
    if os.environ.get("DEBUG", "").strip().lower() in ("false", "no", "off", "0"):
        return  # `make up` is for development
    for name, value in chosen.items():
        if not os.environ.get(name) and not os.environ.get(f"{name}_FILE"):
            os.environ[name] = value


def is_here() -> bool:
    """Return whether the environment names the database of this checkout's installation."""
    return os.environ.get("DATABASE_URL") == _chosen().get("DATABASE_URL", "")


def _chosen() -> dict[str, str]:
    """Return what `make up` chose: DATABASE_URL, CELERY_BROKER_URL, VOTER_SECRET, ...; nothing where it never ran, or for another user."""
    try:
        chosen: Any = json.loads(STATE.read_text())["environment"]
        return dict(chosen) if chosen["DATABASE_URL"] else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
