"""How each of the product's programs is started, in one place: `python -m core web|worker|periodic|beat|flower [options]`.

What follows the name goes to the program behind it, after our own options, and wins: `python -m core worker --concurrency 4`. Any
other name is one of manage.py's commands: `python -m core setup`. Where the environment names no database, it is the one of this checkout
(installation.py).
"""

import os
import runpy
import sys

import django
from django.conf import settings
from django.core.checks import run_checks
from django.core.management import execute_from_command_line
from django.db import OperationalError

from core import installation

# Longer than `Prefer: wait` holds a request (10 s), and than any vote waits for its answer (4 s); streams are ended at once.
STOP_SECONDS = 12
# Longer than a proxy keeps an idle connection (60 s in deploy/nginx): else it sends a vote into one that is just being closed.
KEEP_ALIVE_SECONDS = 75

COMMANDS = installation.BASE_DIR / "polls" / "management" / "commands"
# Those of them that need no installation.
NEED_NOTHING = ("broker_definitions", "compose_secrets", "write_api_docs")


def command(name: str) -> list[str] | None:
    """Return the module that this program is, and its options; None when no program of ours has this name."""
    if name == "web":
        waits = f"--timeout-graceful-shutdown {STOP_SECONDS} --timeout-keep-alive {KEEP_ALIVE_SECONDS}"
        speaks = "--loop uvloop --http core.protocol:Protocol --lifespan on"
        return f"uvicorn core.asgi:application {waits} {speaks} --no-access-log --no-server-header --no-proxy-headers".split()
    if name == "worker":
        return _worker(name, ",".join(settings.VOTES_QUEUES), concurrency=2)
    if name == "periodic":
        return _worker(name, settings.PERIODIC_QUEUE, concurrency=1)
    if name == "beat":
        return ["celery", "-A", "core", "beat", "--loglevel", "INFO", "--pidfile="]
    if name == "flower":
        return ["celery", "-A", "core", "flower", "--conf=core/flower_config.py"]
    return None


def _worker(name: str, queues: str, concurrency: int) -> list[str]:
    options = f"-n {name}@%h -Q {queues} --concurrency {concurrency} -P prefork -O fair --without-gossip --without-mingle"
    return f"celery -A core worker {options} --loglevel INFO".split()


def manage(arguments: list[str]) -> None:
    """Run a command of manage.py. That the database does not answer is told in a sentence."""
    installation.find()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
    name = arguments[1] if len(arguments) > 1 else "help"
    if name not in NEED_NOTHING and (COMMANDS / f"{name}.py").exists() and not _is_named():
        sys.exit(installation.NOT_NAMED)
    try:
        execute_from_command_line(arguments)
    except OperationalError as exc:
        if "--traceback" in arguments:
            raise
        sys.exit(_told(exc))


def _is_named() -> bool:
    return bool(settings.DATABASES["default"]["ENGINE"] != "core.nowhere")


def _told(exc: OperationalError) -> str:
    """Return a sentence on a database that does not answer, and on how to name another."""
    if str(exc) == installation.NOT_NAMED:
        return installation.NOT_NAMED
    at = settings.DATABASES["default"]
    where = f"{at['HOST'] or 'this machine'}:{at['PORT'] or 5432}"
    cure = "Is `make up` running?" if installation.is_here() else "DATABASE_URL names it."
    return f"PostgreSQL at {where} does not do as asked: {str(exc).strip()}\n{cure}"


def check_voter_secret() -> None:
    """End with a sentence where VOTER_SECRET is not the one that the database was filled with. While it is away, nothing can be said."""
    django.setup()
    if found := run_checks(tags=["voter_secret"]):
        sys.exit("\n".join(str(fault.msg) for fault in found))


def main(arguments: list[str]) -> None:
    """Become the program. It runs in this process, so signals reach it."""
    installation.find()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
    program = command(arguments[0]) if arguments else None
    if program is None:
        manage(["manage.py", *arguments])
        return
    if not _is_named():
        sys.exit(installation.NOT_NAMED)
    if arguments[0] != "flower":  # which knows no voter
        check_voter_secret()
    sys.argv = [*program, *arguments[1:]]
    runpy.run_module(program[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
