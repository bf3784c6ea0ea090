"""Start docker-compose.yml from nothing, vote through the front while web processes are replaced, compare the results, remove all again.

`python3 deploy/try.py`, for CI or by hand; needs docker compose and openssl. With --base it only votes, at an installation that runs:
`python3 deploy/try.py --base https://127.0.0.1:8443 --ca tls.crt < seed.json` (what manage.py seed_demo reads).
"""

import argparse
import http.client
import json
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
CLIENTS, SECONDS = 8, 40


class Front:
    """The front, as a client meets it: one connection, which is opened again when it breaks."""

    def __init__(self, base: str, ca: str) -> None:
        self._address, self._tls = urlsplit(base), ssl.create_default_context(cafile=ca)
        self._connection: http.client.HTTPSConnection | None = None

    def send(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Return the status and the body; status 0 when there was no answer."""
        headers = {"Content-Type": "application/json"} | headers
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(self._address.hostname, self._address.port, timeout=20, context=self._tls)
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            self._connection = None
            return 0, {}


def vote(base: str, ca: str, seed: dict[str, str], meanwhile: list[list[str]]) -> None:
    """Vote for a while, run the commands meanwhile, then compare the results. Raises SystemExit on what is wrong."""
    front = Front(base, ca)
    for _ in range(120):
        if front.send("GET", "/api/v1/polls")[0] == 200:
            break
        time.sleep(1)
    _, tokens = front.send("POST", "/api/v1/auth/token", {"username": seed["admin_user"], "password": seed["admin_password"]})
    poll = {
        "title": "Try",
        "voter_policy": "client",
        "options": [{"text": "Soup"}, {"text": "Salad"}],
        "closes_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
    }
    status, poll = front.send("POST", "/api/v1/polls", poll, Authorization=f"Bearer {tokens['access']}")
    check(status == 201, f"no poll was made: {status} {poll}")
    accepted: set[str] = set()
    repeated = 0
    until, lock = time.monotonic() + SECONDS, threading.Lock()

    def client(number: int) -> None:
        nonlocal repeated
        front, count = Front(base, ca), 0
        while time.monotonic() < until:
            count += 1
            voter = f"{number}-{count}"
            ballot = {"option": poll["options"][0]["id"], "voter": voter}
            headers = {"Authorization": f"Api-Key {seed['client_key']}", "Idempotency-Key": voter}
            status, answer = front.send("POST", poll["links"]["votes"], ballot, **headers)
            first = status
            # As a client should: what has no answer, or a 5xx, is sent again with the same key.
            while status == 0 or status >= 500:
                check(time.monotonic() < until + 60, f"no answer for a minute: {status} {answer}")
                time.sleep(0.2)
                status, answer = front.send("POST", poll["links"]["votes"], ballot, **headers)
            check(status == 202, f"a vote was refused: {status} {answer}")
            with lock:
                accepted.add(voter)
                repeated += first != 202
            time.sleep(0.02)

    clients = [threading.Thread(target=client, args=[number]) for number in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for command in meanwhile:
        run(*command)
    for thread in clients:
        thread.join()
    for _ in range(120):
        _, results = front.send("GET", poll["links"]["results"])
        if results.get("total_votes", 0) >= len(accepted):
            break
        time.sleep(0.5)
    check(results.get("total_votes") == len(accepted), f"{len(accepted)} votes were accepted, and {results.get('total_votes')} counted")
    for path in ("/metrics", "/readyz"):
        check(front.send("GET", path)[0] in (0, 404), f"{path} can be read from outside")
    print(f"{len(accepted)} votes accepted, {repeated} of them after a repeat, all counted once.")


def check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        print(f"FAILED: {otherwise}", flush=True)
        os._exit(1) if threading.current_thread() is not threading.main_thread() else sys.exit(1)


def run(*command: str, **options: Any) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, cwd=ROOT, check=True, **options)


def start_and_vote() -> None:
    """The whole way, with docker compose, secrets and a certificate of this run."""
    key = f"nxs_{secrets.token_hex(4)}_{secrets.token_hex(16)}"
    seed = {"admin_user": "admin", "admin_password": secrets.token_urlsafe(16), "client_key": key}
    with tempfile.TemporaryDirectory() as folder:
        tls = Path(folder)
        options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        run(
            "openssl",
            "req",
            *options,
            "-addext",
            "subjectAltName=DNS:localhost",
            "-keyout",
            str(tls / "tls.key"),
            "-out",
            str(tls / "tls.crt"),
        )
        tls.chmod(0o755)
        (tls / "tls.key").chmod(0o644)  # nginx in the container is another user
        (tls / "secrets").mkdir()
        os.environ |= {
            "COMPOSE_PROJECT_NAME": "nexus-try",
            "TLS_FOLDER": folder,
            "SECRETS_FOLDER": f"{folder}/secrets",
            "HTTPS_PORT": "18443",
            "HTTP_PORT": "18080",
        }
        compose = ["docker", "compose", "-f", "docker-compose.yml", "-f", "deploy/compose.monitoring.yml"]
        run("docker", "build", "--tag", "nexus", ".")
        as_me = ["--user", f"{os.getuid()}:{os.getgid()}", "--env", "DEBUG=true", "--volume", f"{folder}/secrets:/secrets"]
        run("docker", "run", "--rm", *as_me, "nexus", "compose_secrets", "/secrets")
        try:
            run(*compose, "up", "--detach", "--scale", "web=3", "--scale", "worker=2")
            run(*compose, "run", "--rm", "-T", "setup", "seed_demo", input=json.dumps(seed), text=True)
            scale = [*compose, "up", "--detach", "--no-recreate", "--scale"]
            meanwhile = [[*compose, "restart", "web"], [*scale, "web=1"], [*compose, "kill", "worker"], [*scale, "web=2"]]
            vote("https://localhost:18443", str(tls / "tls.crt"), seed, meanwhile)
        except BaseException:
            subprocess.run([*compose, "ps", "--all"], cwd=ROOT, check=False)
            subprocess.run([*compose, "logs", "--tail", "50"], cwd=ROOT, check=False)
            raise
        finally:
            run(*compose, "down", "--volumes", "--timeout", "30")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the front of an installation that runs, such as https://localhost:8443")
    parser.add_argument("--ca", default=ssl.get_default_verify_paths().cafile, help="whose certificates to believe")
    arguments = parser.parse_args()
    if arguments.base:
        vote(arguments.base, arguments.ca, json.load(sys.stdin), [])
    else:
        start_and_vote()
