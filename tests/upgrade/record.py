"""Records what an installation leaves to the next version: tables, messages in its queues, and what its voters hold.

Run it at a checkout of the version before (so far: 02f7f21, the last without migration 0014), with this folder copied into its tests,
and commit what it writes:

    git worktree add ../before 02f7f21
    cp -r tests/upgrade ../before/tests/
    cd ../before && make lint       # makes .venv
    .venv/bin/python -m stack run -- .venv/bin/python -m tests.upgrade.record

It starts that version's own processes on a database and queues of its own, and talks to them by HTTP. It writes

    before.sql.gz   the tables as INSERT statements, without owners and rights
    before.json     secrets, polls, voters, votes with their receipts, messages as they were in the queues

test_upgrade.py puts both into a running installation of the version of now.
"""

import base64
import gzip
import hmac
import http.client
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
from kombu import Connection
from kombu.exceptions import ChannelError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# They sign and encrypt what is recorded. Nobody else has them, and nobody else should.
SECRETS = {"SECRET_KEY": "the signing key of the recorded installation, and of no other", "VOTER_SECRET": "the voter secret of it " * 3}
PASSWORD = "correct horse battery staple"
POLICIES = ("ip", "session", "account", "code", "client")
NEVER = "2099-12-31T00:00:00Z"
# What expires by settings shall not do so while this record is used.
SETTINGS = {
    "DJANGO_SETTINGS_MODULE": "tests.settings",
    "DEBUG": "false",
    "SECURE_SSL_REDIRECT": "false",
    "ALLOWED_HOSTS": "127.0.0.1",
    "TRUSTED_PROXIES": "1",
    "METRICS_PORT": "0",
    "ADDRESS_REQUESTS_PER_MINUTE": "0",
    "ATTEMPTS_PER_MINUTE": "0",
}


class Installation:
    """That version's processes."""

    def __init__(self, name: str) -> None:
        self.name = name
        at = urlsplit(os.environ["DATABASE_URL"])
        self.admin_url = urlunsplit(at)
        self.url = urlunsplit(at._replace(path=f"/{name}"))
        self.prefix = f"{name}."
        self.env = {**os.environ, **SETTINGS, **SECRETS, "DATABASE_URL": self.url, "QUEUE_PREFIX": self.prefix}

    def manage(self, *command: str) -> None:
        subprocess.run([sys.executable, "-m", "core", *command], cwd=ROOT, env=self.env, check=True)

    @contextmanager
    def running(self, *command: str, **environment: str):
        process = subprocess.Popen([sys.executable, "-m", "core", *command], cwd=ROOT, env={**self.env, **environment})
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)

    def execute(self, statement: str, *values: Any, url: str | None = None) -> None:
        with closing(psycopg2.connect(url or self.url)) as connection:
            connection.autocommit = True
            connection.cursor().execute(statement, values or None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def send(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Return status, headers and JSON of the answer."""
    sent = {"content-type": "application/json", "x-forwarded-for": "203.0.113.1", **headers}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, answer.headers, json.loads(text) if text.startswith(("{", "[")) else text


def post(port: int, path: str, body: Any, **headers: str) -> Any:
    status, _, answer = send(port, "POST", path, body, **headers)
    assert status < 300, (path, status, answer)
    return answer


def wait_until(claim: Any) -> None:
    give_up_at = time.monotonic() + 30
    while not claim():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def answers(port: int) -> bool:
    try:
        return send(port, "GET", "/healthz")[0] == 200
    except OSError:
        return False


def never_expiring(access_token: str) -> str:
    """The same token with another end: a voter who was signed in at the upgrade still is, whenever this record is used."""
    header, payload, _ = access_token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    claims["exp"] = int(datetime.fromisoformat(NEVER).timestamp())
    signed = f"{header}.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}"
    signature = hmac.digest(SECRETS["SECRET_KEY"].encode(), signed.encode(), "sha256")
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


# --- Who votes --------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self, port: int) -> None:
        self.port = port
        self.polls: dict[str, Any] = {}
        self.voters: dict[str, Any] = {}
        self.votes: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.unused: list[str] = []
        self.owner = self.sign_up("olga")
        self.headers = {"authorization": f"Bearer {self.owner}"}
        scopes = ["votes:cast", "polls:write", "results:read"]
        self.api_key = post(port, "/api/v1/clients", {"name": "kiosk", "scopes": scopes}, **self.headers)["key"]

    def sign_up(self, name: str) -> str:
        post(self.port, "/api/v1/auth/register", {"username": name, "email": f"{name}@example.org", "password": PASSWORD})
        return never_expiring(post(self.port, "/api/v1/auth/token", {"username": name, "password": PASSWORD})["access"])

    def make_poll(self, name: str, policy: str, **fields: Any) -> None:
        wanted = {
            "title": name,
            "voter_policy": policy,
            "options": [{"text": text} for text in ("soup", "salad", "stew")],
            "closes_at": NEVER,
            **fields,
        }
        made = post(self.port, "/api/v1/polls", wanted, **self.headers)
        options = {option["text"]: option["id"] for option in made["options"]}
        self.polls[name] = {"id": made["id"], "policy": policy, "options": options, "closes_at": made["closes_at"]}

    def make_voter(self, poll: str, name: str) -> str:
        """Return what the voter is called in the record; how he votes stands there."""
        policy, number = self.polls[poll]["policy"], len(self.voters)
        voter: dict[str, Any] = {"address": f"198.51.{100 + number // 200}.{number % 200 + 1}", "headers": {}, "body": {}}
        if policy == "session":
            voter["headers"]["voter-token"] = post(self.port, "/api/v1/voters", {"poll": self.polls[poll]["id"]})["token"]
        elif policy == "account":
            voter["headers"]["authorization"] = f"Bearer {self.sign_up(f'{name}-{number}')}"
        elif policy == "client":
            voter["headers"]["authorization"], voter["body"]["voter"] = f"Api-Key {self.api_key}", name
        elif policy == "code":
            path = f"/api/v1/polls/{self.polls[poll]['id']}/codes"
            [code] = post(self.port, path, {"generate": 1, "labels": [f"label of {name}"]}, **self.headers)["codes"]
            voter["body"]["code"], voter["label"] = code["code"], code["label"]
        called = f"{poll}/{name}"
        self.voters[called] = voter
        return called

    def cast(self, voter: str, choice: str, key: str | None, expected: str, reason: str | None = None, *, port: int = 0) -> None:
        """Cast a vote; `choice` "" withdraws. `expected` and `reason` are what its receipt says when all has arrived."""
        poll, who = self.polls[voter.partition("/")[0]], self.voters[voter]
        path = f"/api/v1/polls/{poll['id']}/votes"
        body = {**({"option": poll["options"][choice]} if choice else {}), **who["body"]}
        headers = {**who["headers"], "x-forwarded-for": who["address"], **({"idempotency-key": key} if key else {})}
        status, _, answer = send(port or self.port, "POST", path if choice else f"{path}/withdraw", body, **headers)
        assert status == 202, (voter, status, answer)
        vote = {
            "voter": voter,
            "choice": choice,
            "key": key,
            "receipt": answer["receipt"],
            "id": answer["id"],
            "expected": [expected, reason],
        }
        self.votes.append(vote)

    def cast_batch(self, voters: list[str], choice: str, key: str) -> None:
        poll = self.polls[voters[0].partition("/")[0]]
        item = {"options": [poll["options"][choice], poll["options"]["stew"]]}
        items = [{**item, "voter": self.voters[voter]["body"]["voter"]} for voter in voters]
        items[0]["idempotency_key"] = f"{key}-own"
        headers = {"authorization": f"Api-Key {self.api_key}", "idempotency-key": key}
        answer = post(self.port, f"/api/v1/polls/{poll['id']}/votes/batch", items, **headers)
        assert answer["accepted"] == len(items)
        self.batches.append(
            {"poll": voters[0].partition("/")[0], "key": key, "items": items, "receipts": [vote["receipt"] for vote in answer["votes"]]}
        )

    def statuses(self) -> list[Any]:
        receipts = [vote["receipt"] for vote in self.votes]
        return list(post(self.port, "/api/v1/votes/status", {"receipts": receipts})["votes"])

    def settle(self) -> None:
        """Wait until all votes so far are counted; afterwards those of the same voter come later for sure."""
        wait_until(lambda: all(status["status"] != "pending" for status in self.statuses()))


# --- What they do -----------------------------------------------------------------------------------------------------


def cast_what_is_counted(record: Recorder) -> None:
    """First votes, repeats, duplicates, changes and withdrawals, all counted before the upgrade."""
    for policy in POLICIES:
        record.make_poll(f"first-{policy}", policy)
        record.make_poll(f"change-{policy}", policy, allow_change=True, allow_withdrawal=True, results_visibility="after_vote")
        first, change = f"first-{policy}", f"change-{policy}"

        record.cast(record.make_voter(first, "alice"), "soup", "alice-1", "counted")
        record.cast(record.make_voter(first, "bob"), "soup", None, "counted")
        carol = record.make_voter(first, "carol")
        record.cast(carol, "salad", "carol-1", "counted")
        record.settle()
        record.cast(carol, "soup", "carol-2", "rejected", "duplicate")

        changed = record.make_voter(change, "alice")
        record.cast(changed, "soup", "alice-1", "superseded", "changed")
        record.settle()
        record.cast(changed, "salad", "alice-2", "counted")
        record.cast(record.make_voter(change, "bob"), "soup", "bob-1", "superseded", "changed")  # his salad is in the queue
        record.cast(record.make_voter(change, "misuser"), "soup", "misuser-1", "counted")
        withdrawn = record.make_voter(change, "carol")
        record.cast(withdrawn, "soup", "carol-1", "superseded", "withdrawn")
        record.settle()
        record.cast(withdrawn, "", "carol-2", "counted")
        record.settle()
        record.unused += [record.make_voter(first, "unused"), record.make_voter(change, "unused")]


def cast_what_is_special(record: Recorder) -> None:
    """Limits per address, a vote that is held, an election that ends, batches."""
    record.make_poll("limited", "session", address_limit=1)
    record.cast(record.make_voter("limited", "alice"), "soup", "alice-1", "counted")

    record.make_poll("reviewed", "ip")
    for name in ("alice", "bob", "carol"):
        voter = record.make_voter("reviewed", name)
        held = name == "alice"
        record.cast(voter, "salad" if held else "soup", f"{name}-1", *(("quarantined", "under_review") if held else ("counted", None)))
    record.settle()
    ruling = {"ruling": "quarantine", "address": record.voters["reviewed/alice"]["address"], "reason": "Odd."}
    operator = {"authorization": f"Bearer {record.sign_up('oscar')}"}
    Installation(os.environ["RECORDED"]).execute(
        "INSERT INTO auth_user_groups (user_id, group_id) SELECT u.id, g.id FROM auth_user u, auth_group g"
        " WHERE u.username = 'oscar' AND g.name = 'operator'"
    )
    post(record.port, f"/api/v1/polls/{record.polls['reviewed']['id']}/rulings", ruling, **operator)

    record.make_poll("closed", "code", closes_at=(datetime.now(UTC) + timedelta(seconds=60)).isoformat(), results_visibility="after_close")
    for name in ("alice", "bob", "carol", "unused"):
        record.make_voter("closed", name)
    record.cast("closed/alice", "soup", "alice-1", "counted")
    record.cast("closed/bob", "salad", "bob-1", "counted")
    record.settle()

    record.make_poll("batch", "client", method="approval", max_choices=2)
    record.cast_batch([record.make_voter("batch", name) for name in ("alice", "bob", "carol")], "soup", "batch-1")


def cast_into_the_outbox(record: Recorder, port: int) -> None:
    for policy in POLICIES:
        record.cast(record.make_voter(f"first-{policy}", "dave"), "stew", "dave-1", "counted", port=port)
        # Of these two the first is in the outbox, the second in the queue.
        record.cast(record.make_voter(f"change-{policy}", "dave"), "soup", "dave-1", "superseded", "changed", port=port)


def cast_into_the_queue(record: Recorder) -> None:
    for policy in POLICIES:
        first, change = f"first-{policy}", f"change-{policy}"
        record.cast(record.make_voter(first, "erin"), "soup", "erin-1", "counted")
        record.cast(record.make_voter(change, "erin"), "salad", "erin-1", "counted")
        record.cast(f"{change}/bob", "salad", "bob-2", "counted")
        record.cast(f"{change}/dave", "stew", "dave-2", "counted")
        both = record.make_voter(change, "frank")
        record.cast(both, "soup", "frank-1", "superseded", "changed")
        record.cast(both, "salad", "frank-2", "counted")
        record.cast(record.make_voter(change, "late-misuser"), "soup", "late-misuser-1", "counted")
    record.cast("closed/carol", "salad", "carol-1", "counted")
    record.cast_batch([record.make_voter("batch", name) for name in ("dave", "erin")], "salad", "batch-2")


def take_messages(prefix: str) -> list[dict[str, Any]]:
    """All messages of the votes' queues, as they are in there."""
    found = []
    with Connection(os.environ["CELERY_BROKER_URL"].split(";")[0]) as connection:
        channel = connection.default_channel
        for queue in ("votes.even", "votes.odd"):
            while message := channel.basic_get(prefix + queue, no_ack=True):
                properties = {
                    name: message.properties[name] for name in ("content_type", "content_encoding", "correlation_id", "message_id")
                }
                headers = {name: value for name, value in message.headers.items() if not name.startswith("x-")}
                headers["origin"] = "gen1@before"  # the machine's name says nothing
                body = message.body.decode() if isinstance(message.body, bytes) else message.body
                found.append({"queue": queue, "headers": headers, "properties": properties, "body": body})
    return found


def delete_queues(prefix: str) -> None:
    with Connection(os.environ["CELERY_BROKER_URL"].split(";")[0]) as connection:
        for name in ("votes.even", "votes.odd", "votes.dead", "periodic"):
            try:
                connection.channel().queue_delete(prefix + name)
            except ChannelError:
                continue


def dump(url: str) -> bytes:
    """All tables as statements that any PostgreSQL takes, whichever version's pg_dump wrote them."""
    command = ["pg_dump", "--inserts", "--rows-per-insert=500", "--no-owner", "--no-privileges", "--no-comments", "--dbname", url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if line and not re.match(r"--|SET |SELECT pg_catalog.set_config|\\", line)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


def written(recorded: dict[str, Any]) -> str:
    """JSON with a line for each voter, vote and message."""
    parts = []
    for name, value in recorded.items():
        if isinstance(value, list):
            shown = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        elif isinstance(value, dict):
            shown = "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "\n }"
        else:
            shown = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {shown}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    installation = Installation(os.environ.setdefault("RECORDED", f"recorded_{secrets.token_hex(4)}"))
    installation.execute(f"CREATE DATABASE {installation.name}", url=installation.admin_url)
    try:
        installation.manage("setup")
        port, cut_off = free_port(), free_port()
        with installation.running("web", "--port", str(port)):
            wait_until(lambda: answers(port))
            with ExitStack() as counting:
                for program in ("worker", "periodic", "beat"):
                    counting.enter_context(installation.running(program, *(["-n", f"{program}@before"] if program != "beat" else [])))
                record = Recorder(port)
                cast_what_is_counted(record)
                cast_what_is_special(record)
                record.settle()
                time.sleep(3)  # the clock's jobs have run, and so has the batch
            nobody = urlunsplit(urlsplit(os.environ["CELERY_BROKER_URL"])._replace(netloc=f"127.0.0.1:{free_port()}"))
            with installation.running("web", "--port", str(cut_off), CELERY_BROKER_URL=nobody):
                wait_until(lambda: answers(cut_off))
                cast_into_the_outbox(record, cut_off)
            cast_into_the_queue(record)
            closes_at = datetime.fromisoformat(record.polls["closed"]["closes_at"])
            assert datetime.now(UTC) < closes_at, "It took so long that the election was over."
            time.sleep((closes_at - datetime.now(UTC)).total_seconds())
        messages = take_messages(installation.prefix)
        (HERE / "before.sql.gz").write_bytes(dump(installation.url))
    finally:
        delete_queues(installation.prefix)
        installation.execute(f"DROP DATABASE {installation.name} WITH (FORCE)", url=installation.admin_url)
    recorded = {
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "secrets": SECRETS,
        "password": PASSWORD,
        "owner": record.owner,
        "api_key": record.api_key,
        "polls": record.polls,
        "voters": record.voters,
        "unused": record.unused,
        "votes": record.votes,
        "batches": record.batches,
        "messages": messages,
    }
    (HERE / "before.json").write_text(written(recorded))
    sys.stdout.write(f"{len(record.votes)} votes, {len(messages)} messages\n")


if __name__ == "__main__":
    main()
