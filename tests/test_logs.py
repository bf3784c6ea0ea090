"""The log and error tracking: all that was decided can be found there, and nobody's vote, address or secret."""

import gzip
import json
import logging
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from celery import current_app
from django.conf import settings
from django.db import connection
from kombu import Producer

from core import logs
from polls import roles, turns
from polls.models import Vote, VoteAside
from tests.conftest import (
    ROOT,
    Api,
    answers,
    free_port,
    make_key,
    make_user,
    process,
    queues_of_their_own,
    task_message,
    wait_until,
    web,
    worker,
)

ADDRESS = "198.51.100.177"


@dataclass
class Tracker:
    """What a server for error tracking was sent."""

    dsn: str = ""
    bodies: list[bytes] = field(default_factory=list)

    def events(self):
        """An envelope is a line of JSON about itself, and then two for each item: about it, and the item."""
        items = [json.loads(line) for body in self.bodies for line in body.split(b"\n") if line]
        return [item for item in items if "platform" in item]

    def was_told(self, exception, place):
        """Whether of this class of exception, from a frame in this file."""
        told = [raised for event in self.events() for raised in event.get("exception", {"values": []})["values"]]
        return any(raised["type"] == exception and place in str(raised["stacktrace"]) for raised in told)


@pytest.fixture(scope="module")
def tracker():
    known = Tracker()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            known.bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        known.dsn = f"http://{'a' * 32}@127.0.0.1:{server.server_port}/1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield known
        server.shutdown()


@dataclass
class Production:
    """A web process and a worker as in production, but at their most talkative."""

    port: int
    folder: Path

    def text(self, name="*"):
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}.log")))

    def lines(self, name):
        """The lines of its log; Celery shows some things of its own while it starts and ends."""
        said = self.text(name).splitlines()
        assert name == "worker" or all(line.startswith("{") for line in said)
        return [json.loads(line) for line in said if line.startswith("{")]


@pytest.fixture(scope="module")
def production(broker, tracker, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("production"), free_port()
    environment = {
        "DEBUG": "false",
        "SECRET_KEY": "canary-signing-key" * 3,
        "VOTER_SECRET": "canary-voter-secret" * 3,
        "VOTER_SECRET_FALLBACKS": settings.VOTER_SECRET,  # the database's
        "SECURE_SSL_REDIRECT": "false",
        "TRUSTED_PROXIES": "1",
        "ALLOWED_HOSTS": "127.0.0.1",
        "LOG_LEVEL": "DEBUG",
        "SENTRY_DSN": tracker.dsn,
    }
    with queues_of_their_own():
        queues = ",".join([*settings.VOTES_QUEUES, settings.PERIODIC_QUEUE])
        with web(port, folder / "web.log", **environment), worker(queues, folder / "worker.log", **environment):
            wait_until(lambda: answers(port))
            yield Production(port, folder)


@contextmanager
def failing(table):
    """A database that takes no row, and quotes it in an error that nobody foresees."""
    with connection.cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION quote_row() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'row %', NEW USING ERRCODE = 'undefined_table'; END $$"
        )
        cursor.execute(f"CREATE TRIGGER quoting BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION quote_row()")
        try:
            yield
        finally:
            cursor.execute("DROP FUNCTION quote_row CASCADE")


def from_address(production, **headers):
    return Api(production.port, {"x-forwarded-for": ADDRESS, **headers})


def put(headers, body):
    with current_app.connection_for_write() as connection:
        Producer(connection.default_channel).publish(
            body, routing_key=turns.queue_at(0), headers=headers, content_type="application/json", content_encoding="utf-8"
        )


def test_nobodys_vote_address_or_secret_is_told_whatever_happens(production, tracker, make_poll, owner):
    with connection.cursor() as cursor:  # so that an option's id is no number that occurs by itself
        cursor.execute("SELECT setval(pg_get_serial_sequence('options', 'id'), 918273645)")
    key, person = make_key(owner), make_user(f"canary-user-{uuid4().hex[:8]}", roles.OWNER)
    public, members = make_poll(voter_policy="ip"), make_poll()
    somebody = from_address(production)
    client = from_address(production, authorization=f"Api-Key {key}")

    # Votes: counted, repeated, refused by the web process, rejected by the worker, and unreadable ones.
    receipt = somebody.cast(public, None).json["receipt"]
    for voter in ("canary-alice", "canary-bob"):
        assert client.cast(members, voter, prefer="wait=10").status == 201
        assert client.cast(members, voter, "salad", prefer="wait=10").status == 409
    client.post(f"/api/v1/polls/{members.pk}/votes", {"option": "canary-option", "voter": "canary-voter"})
    client.post(f"/api/v1/polls/{members.pk}/votes", b'{"option": "canary-json')
    client.post(f"/api/v1/polls/{members.pk}/votes/batch", [{"option": "1", "voter": "canary-in-batch"}])
    somebody.get(f"/api/v1/votes/{receipt}")
    put(*task_message(["canary-item", [str(uuid4()), "canary-poll"]]))
    put({}, b'{"canary": "message"}')
    # People and what they know.
    login = {"username": person.username, "password": "canary-password"}
    somebody.post("/api/v1/auth/token", login)
    somebody.post("/api/v1/auth/register", {**login, "email": "canary@example.org"})
    somebody.get("/api/v1/canary-path?canary-query=1", authorization="Bearer canary-token", cookie="voter_token=canary-cookie")
    somebody.post("/graphql", {"query": 'query { poll(id: "canary-id") { canaryField } }', "variables": {"code": "canary-code"}})
    for host in ("canary.example.org", "canary host"):
        somebody.get("/api/v1/polls", host=host)
    # What nobody foresees, in the worker and in the web process: the exception's text quotes the row, and the request is at hand.
    with failing("votes"):
        client.cast(members, "canary-carol")
        wait_until(lambda: '"django.db.utils.ProgrammingError"' in production.text("worker"))
    with failing("auth_user"):
        newcomer = {"username": "canary-newcomer", "password": "canary-password-of-hers", "email": "canary@example.org"}
        assert somebody.post("/api/v1/auth/register", newcomer).status == 500
    wait_until(lambda: tracker.was_told("ProgrammingError", "polls/api/accounts.py"))
    wait_until(lambda: tracker.was_told("ProgrammingError", "counting.py"))
    wait_until(lambda: tracker.was_told("UncountableVotesError", "counting.py"))

    told = [event for event in tracker.events() if "counting.py" in str(event)]
    assert all("task_id" in event["tags"] and event["environment"] == "production" for event in told)

    rows = [*Vote.objects.filter(poll_id__in=[public.pk, members.pk]), *VoteAside.objects.filter(poll_id=members.pk)]
    assert len(rows) == 5
    private = ["canary", "row (", key, key.rpartition("_")[2], receipt, ADDRESS, "918273", person.username]
    private += [form for row in rows for form in (str(row.voter_key), row.voter_key.hex)]
    for told in (production.text("web"), production.text("worker"), b"".join(tracker.bodies).decode()):
        assert [line for line in told.splitlines() for text in private if text in line] == []


def test_a_vote_is_found_in_both_logs_by_its_id_its_request_and_its_bundle(production, make_poll, owner):
    poll, request = make_poll(), f"request-{uuid4()}"
    client = Api(production.port, {"authorization": f"Api-Key {make_key(owner)}", "x-forwarded-for": ADDRESS})
    client.cast(poll, "alice", prefer="wait=10")

    client.cast(poll, "alice", "salad", x_request_id=request, prefer="wait=10")
    (rejected,) = VoteAside.objects.filter(poll_id=poll.pk)

    wait_until(lambda: "rejected 1" in production.text("worker").partition(str(rejected.vote_id))[2])
    (accepted,) = [line for line in production.lines("web") if line.get("vote_id") == str(rejected.vote_id)]
    assert accepted["message"] == f"request {request}: vote {rejected.vote_id} accepted" and accepted["request_id"] == request
    (decided,) = [line for line in production.lines("worker") if line.get("vote_id") == str(rejected.vote_id)]
    bundle = decided["task_id"]
    assert any(line["message"].startswith(f"bundle {bundle}: ") for line in production.lines("web"))
    assert decided["message"] == f"vote {rejected.vote_id}: rejected, duplicate; request {request}"
    assert (decided["request_id"], decided["task_id"], decided["level"]) == (request, bundle, "INFO")
    (counted,) = [line for line in production.lines("worker") if line["message"].startswith(f"bundle {bundle}")]
    assert (counted["message"], counted["level"]) == (f"bundle {bundle}: rejected 1", "INFO")


def test_a_line_for_machines_says_when_where_and_for_which_request(production):
    Api(production.port, {"x-forwarded-for": ADDRESS}).post("/api/v1/auth/token", {}, x_request_id="request-of-json")

    wait_until(lambda: "request-of-json" in production.text("web"))
    (line,) = [line for line in production.lines("web") if line.get("request_id") == "request-of-json"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time")) and line.pop("pid") > 1
    assert line == {
        "level": "INFO",
        "logger": "core.middleware",
        "message": "POST api/v1/auth/token: 400",
        "request_id": "request-of-json",
    }


@pytest.mark.parametrize("program", ["beat --pidfile=", "flower --conf=core/flower_config.py --address=127.0.0.1 --port={port}"])
def test_other_programs_write_such_lines_too(program, broker, tmp_path):
    log, command = tmp_path / "log", program.format(port=free_port())
    with process("celery", "-q", "-A", "core", *command.split(), log=log, LOG_FORMAT="json", FLOWER_BASIC_AUTH="a:b"):
        wait_until(lambda: "\n" in log.read_text())
        assert {"time", "level", "logger", "message", "pid"} <= set.intersection(*map(set, map(json.loads, log.read_text().splitlines())))


# --- One line ---------------------------------------------------------------------------------------------------------


def line_of(formatter, message, *args, exc=None, name="polls", **extra):
    record = logging.LogRecord(name, logging.ERROR, "", 1, message, args, exc and (type(exc), exc, exc.__traceback__))
    record.__dict__.update(extra)
    return formatter.format(record)


def raised():
    """An exception that quotes a row, behind another one that quotes it too."""
    try:
        try:
            raise KeyError("secret-row")
        except KeyError as exc:
            raise ValueError("Key (voter_key)=(secret-row) already exists") from exc
    except ValueError as exc:
        return exc


@pytest.mark.parametrize("form", ["Text", "Json"])
@pytest.mark.parametrize(
    ("name", "message", "by_args"),
    [
        ("polls", "it failed: %s", [raised()]),
        ("polls", "it failed: %r", [raised()]),
        ("polls", f"it failed: {raised()}", []),
        ("polls", f"it failed: {raised()!r}", []),
        ("asyncio", f"it failed: ValueError\nfuture: <Task result=secret-row {raised()!r}>", []),
        ("celery.app.trace", "it failed: %(exc)s", [{"exc": "ValueError('Key (voter_key)=(secr...')", "args": "secret-row"}]),
    ],
    ids=["text", "repr", "formatted text", "formatted repr", "asyncio", "celery"],
)
def test_an_exception_is_told_by_its_class_and_place(form, name, message, by_args):
    said = line_of(getattr(logs, form)(texts=False), message, *by_args, exc=raised(), name=name, data="secret-row")

    assert re.search("it failed: '?ValueError", said) and "KeyError" in said
    assert re.search(r"tests/test_logs\.py:\d+ raised", said)
    assert "secret-row" not in said and "voter_key" not in said


def test_in_development_an_exception_is_told_in_full():
    said = line_of(logs.Text(texts=True), "it failed", exc=raised())

    assert "Key (voter_key)=(secret-row) already exists" in said and "Traceback (most recent call last)" in said


def test_a_line_for_people_names_the_request():
    named = logs.request_id.set("request-one")
    try:
        said = line_of(logs.Text(texts=False), "done")
    finally:
        logs.request_id.reset(named)

    assert re.fullmatch(r"\d\d:\d\d:\d\d ERROR   polls: done \(request request-one\)", said)


def test_a_line_stays_one_line_whatever_is_in_it():
    said = line_of(logs.Json(texts=False), "%s", "one\ntwo\u2028\x00\ud800 %s")

    assert len(said.splitlines()) == 1
    assert json.loads(said)["message"].startswith("one\ntwo")


def test_exceptions_in_a_circle_come_to_an_end():
    first, second = ValueError("one"), KeyError("two")
    first.__cause__, second.__cause__ = second, first

    assert [kind for kind, _ in logs.chain_of(first)] == ["ValueError", "KeyError"]


def test_a_line_that_can_not_be_formatted_is_not_shown_in_production():
    program = "import django; django.setup(); import logging; logging.error('%d votes', 'secret-row'); print('done')"
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "core.settings", "DEBUG": "false", "SECRET_KEY": "x" * 50, "VOTER_SECRET": "x" * 50}

    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True)

    assert ended.stdout == "done\n" and "secret-row" not in ended.stderr
