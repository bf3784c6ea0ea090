"""`make up`: everything, step by step, then in the foreground with one log."""

import json
import os
import secrets
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from stack.folder import ROOT, StackError, is_free, last_lines, write_private
from stack.merged_log import MergedLog
from stack.stack import FolderInUse, Stack
from stack.supervisor import SupervisorGone

PRODUCT = ("web", "worker", "periodic", "beat", "flower")
# The servers' programs as the screen calls them.
SERVERS = {"postgres": "PostgreSQL", "rabbitmq": "RabbitMQ"}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP."""


def up(stack: Stack) -> int:
    """Run everything until something ends it; returns the exit code."""
    dev_file = stack.folder / "dev.json"
    on_terminal = sys.stdout.isatty()
    try:
        stack.claim()
    except FolderInUse:
        say(f"{who_runs(dev_file)} `make down` stops it.")
        return 1
    code = 1
    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, raise_stopped)
        check_ports(stack.env)
        dev = start(stack)
        follow(stack, dev, dev_file, on_terminal=on_terminal)
    except Stopped:
        say("\nStopping ...")
        code = 0
    except SupervisorGone as gone:
        say("Stopped by `make down`." if gone.orderly else "The supervisor was killed; ending what it left.")
        code = 0 if gone.orderly else 1
    except StackError as exc:
        say(f"Failed: {exc}")
        if exc.log:
            say(f"The last lines of {exc.log}:\n{last_lines(exc.log)}")
    finally:
        ignore_stop_signals()
        stopped = stack.close()
        if stopped:
            say(f"Stopped {', '.join(stopped)}.")
    return code


def ignore_stop_signals() -> None:
    """Nothing interrupts the stopping."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def raise_stopped(number: int, frame: FrameType | None) -> NoReturn:
    ignore_stop_signals()
    raise Stopped


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError:  # the terminal is gone, or `| head` has seen enough: go on without
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def who_runs(dev_file: Path) -> str:
    try:
        return f"Nexus runs already: {json.loads(dev_file.read_text())['base_url']}"
    except FileNotFoundError:
        return "Nexus is starting, or `python -m stack run` (`make test`) uses this checkout's servers."


def check_ports(env: dict[str, str]) -> None:
    for name, host in (("PORT", env["HOST"]), ("FLOWER_PORT", "127.0.0.1")):
        port = env[name]
        if not port.isdecimal() or int(port) > 65535:
            raise StackError(f"{name} is {port!r}, and should be the number of a port.")
        if not is_free(int(port), host):
            raise StackError(f"Port {port} is taken by another program. Choose another one: `make up {name}={int(port) + 1}`.")


def start(stack: Stack) -> dict[str, Any]:
    """Start everything; returns what dev.json says."""
    began = time.monotonic()

    def done(text: str) -> None:
        say(f"{time.monotonic() - began:6.1f} s  {text}")

    say("Nexus starts; Ctrl-C stops it.")
    stack.prepare()
    for name, server in stack.servers.items():
        done(f"{name}: {server.chosen}")
    stack.start_servers(ready=lambda name: done(f"{SERVERS[name]} answers") if name in SERVERS else None)
    manage(stack, "setup")
    done("database and queues are set up")
    dev = seed_demo(stack)
    done(f"poll {dev['demo_poll']} is there for a try")
    stack.start(*PRODUCT, ready=lambda name: done(f"{name} answers"))
    base_url, flower_url = dev["base_url"], dev["flower_url"]
    say(
        f"\n  API docs       {base_url}/api/docs\n"
        f"  Demo results   {base_url}/api/v1/polls/{dev['demo_poll']}/results\n"
        f"  Admin          {base_url}/admin/ as {dev['admin_user']}\n"
        f"  Flower         {flower_url} as {dev['flower_user']}\n"
        f"  Passwords and the client key of the API are in {os.path.relpath(stack.folder / 'dev.json')}\n"
    )
    return dev


def manage(stack: Stack, command: str, stdin: str = "") -> str:
    """Run `manage.py COMMAND`; returns what it prints."""
    log = stack.folder.log("manage")
    with log.open("w") as errors:
        done = subprocess.run(
            [sys.executable, "manage.py", command],
            cwd=ROOT,
            env=stack.env,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    if done.returncode != 0:
        raise StackError(f"`manage.py {command}` failed. If the data is of no use any more: `make reset`.", log)
    return done.stdout


def seed_demo(stack: Stack) -> dict[str, Any]:
    """Make the demo poll and those who may use it; their secrets stay the same from start to start."""
    demo = {
        "admin_user": "admin",
        "admin_password": stack.folder.secret("admin_password", lambda: secrets.token_urlsafe(12)),
        "client_key": stack.folder.secret("client_key", make_client_key),
    }
    poll = json.loads(manage(stack, "seed_demo", stdin=json.dumps(demo)).splitlines()[-1])["poll_id"]
    flower_user, _, flower_password = stack.env["FLOWER_BASIC_AUTH"].partition(":")
    return {
        "base_url": stack.base_url,
        "flower_url": stack.flower_url,
        "flower_user": flower_user,
        "flower_password": flower_password,
        **demo,
        "database_url": stack.database_url,
        "broker_url": stack.broker_url,
        "demo_poll": poll,
    }


def make_client_key() -> str:
    """nxs_<prefix>_<secret>: exactly two underscores, so that it can be split."""
    prefix = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    return f"nxs_{prefix}_{secrets.token_urlsafe(32).replace('_', 'x').replace('-', 'y')}"


def follow(stack: Stack, dev: dict[str, Any], dev_file: Path, *, on_terminal: bool) -> None:
    """Show the merged log and keep the pids in dev.json true, until an exception ends it."""
    pids = stack.pids()
    log = MergedLog(stack.folder, PRODUCT, pids, colours=on_terminal and "NO_COLOR" not in os.environ)
    stack.folder.share_lock()
    while True:
        running = {name: pids[name] for name in PRODUCT}
        # 0: it has just died, and the next round knows its new pid.
        if running != dev.get("pids") and all(running.values()):
            dev["pids"] = running
            write_private(dev_file, json.dumps(dev, indent=1) + "\n")
        for line in log.lines():
            say(line)
        if on_terminal and not sys.stdout.isatty():
            raise Stopped  # the window was closed; make, between it and us, gets the SIGHUP and keeps it
        time.sleep(0.2)
        # supervisord looks after its programs once a second, and whenever it is asked: so asking speeds up a restart.
        pids = stack.pids()
