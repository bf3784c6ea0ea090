"""python -m stack [--folder DIR] up | down | reset | run -- CMD"""

import argparse
import os
import sys
import time
from pathlib import Path

from environ import Env

from stack.folder import ROOT, StackError, last_lines
from stack.run import run
from stack.stack import Stack
from stack.up import say, up


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stack", description="The pipeline on one machine.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".local", help="where it keeps its data (default: .local of the checkout)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start everything and stay in the foreground")
    commands.add_parser("down", help="stop everything that runs for this checkout")
    commands.add_parser("reset", help="stop everything and forget data, secrets and logs")
    run_parser = commands.add_parser("run", help="run a command with the servers' URLs in its environment")
    run_parser.add_argument("cmd", nargs=argparse.REMAINDER, metavar="-- CMD")
    arguments = parser.parse_args()

    if (ROOT / ".env").exists():
        Env.read_env(ROOT / ".env")  # adds what the environment does not say
    env = dict(os.environ)
    folder = arguments.folder
    try:
        match arguments.command:
            case "up":
                return up(Stack(folder, {"HOST": "127.0.0.1", "PORT": "8000", "FLOWER_PORT": "5555"} | env, say=say))
            case "down":
                return down(Stack(folder))
            case "reset":
                return reset(Stack(folder))
            case _:
                command = arguments.cmd[1:] if arguments.cmd[:1] == ["--"] else arguments.cmd
                if not command:
                    run_parser.error("which command?")
                return run(Stack(folder, env), command)
    except StackError as exc:
        print(f"Failed: {exc}", file=sys.stderr)
        if exc.log:
            print(f"The last lines of {exc.log}:\n{last_lines(exc.log)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def down(stack: Stack) -> int:
    if not stack.folder.path.exists():
        print("Nothing was running.")
        return 0
    stack.folder.make()
    stopped = stack.end_all()
    print(f"Stopped {', '.join(stopped)}." if stopped else "Nothing was running.")
    # A `make up` in another terminal sees that and ends: then the next one may start.
    give_up_at = time.monotonic() + 10
    while not stack.folder.lock():
        if time.monotonic() > give_up_at:
            raise StackError(f"{stack.folder.path} is still in use: a `make up` is starting, or a command of `stack run` runs.")
        time.sleep(0.1)
    return 0


def reset(stack: Stack) -> int:
    code = down(stack)
    removed = stack.destroy()
    print("\n".join(f"Removed {path}" for path in removed) or "There was nothing to remove.")
    return code


if __name__ == "__main__":
    sys.exit(main())
