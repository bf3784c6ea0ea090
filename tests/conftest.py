"""The cast: alice votes for soup, bob is the other voter; the pipeline they meet runs for real.

Tests write to a real database without rolling back, as the processes they talk to do; each makes polls of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from celery import current_app
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.db import connection
from django.db.models import prefetch_related_objects
from django.test.utils import override_settings, setup_databases, teardown_databases
from django.utils.timezone import now
from kombu import Producer

from polls import bundles, clients, editing, networks, privileges, roles, voter_secrets, voters
from polls.bundles import AcceptedVote
from polls.models import Poll, Scope, Tally, Vote, VoteAside
from tasks import queues
from tests.settings import PASSWORD_HASHERS

ROOT = Path(__file__).parent.parent
# All tests come from one address (test_throttling.py sets limits of its own), and sign in once.
PROCESS_SETTINGS = {"ADDRESS_REQUESTS_PER_MINUTE": "0", "ATTEMPTS_PER_MINUTE": "0", "ACCESS_TOKEN_MINUTES": "600"}
PASSWORD = "correct horse battery staple"
# The longest files, in about the order of their lengths; those that mostly wait stand between those that compute. They begin first:
# one that began last would go on alone when all others have ended.
LONGEST = (
    *("test_faults.py", "test_security_house.py", "test_tour.py", "test_abuse.py", "test_backup.py", "test_health.py", "test_graphql.py"),
    *(
        "test_rights.py",
        "test_differential.py",
        "test_stack.py",
        "test_closing.py",
        "test_pipeline.py",
        "test_import.py",
        "test_throttling.py",
        "test_settings.py",
    ),
    *("test_schema.py", "test_review.py", "test_counting.py", "test_desk.py", "test_fraud.py", "test_accounts.py", "test_admin.py"),
)
# Web processes and workers log in with no more rights than `manage.py setup` gives them, in every test.
WEB_ROLE, WORKER_ROLE, ROLE_PASSWORD = f"test_web_{os.getpid()}", f"test_worker_{os.getpid()}", uuid4().hex


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def quick_verifier(password: str) -> str:
    """What PostgreSQL keeps of a password, hashed in a round and not in 4096: web processes log in at every request, 5 ms faster."""
    salt = os.urandom(16)
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 1)
    stored = hashlib.sha256(hmac.digest(key, b"Client Key", "sha256")).digest()
    kept = [b64encode(part).decode() for part in (salt, stored, hmac.digest(key, b"Server Key", "sha256"))]
    return "SCRAM-SHA-256$1:{}${}:{}".format(*kept)  # RFC 5803


@contextmanager
def database() -> Iterator[None]:
    """A database of this run's own, so that two runs can share a server; with the roles of its processes."""
    settings.DATABASES["default"].setdefault("TEST", {})["NAME"] = f"test_nexus_{os.getpid()}"
    made = setup_databases(verbosity=0, interactive=False)
    with connection.cursor() as cursor:  # no commit need wait for the disk: nothing kills this server
        cursor.execute(f"ALTER DATABASE {connection.settings_dict['NAME']} SET synchronous_commit = off")
    connection.close()  # in force from the next one on
    with connection.cursor() as cursor:
        for role in (WEB_ROLE, WORKER_ROLE):
            cursor.execute(f"DROP ROLE IF EXISTS {role}; CREATE ROLE {role} LOGIN PASSWORD '{quick_verifier(ROLE_PASSWORD)}'")
    voter_secrets.record(now())
    networks.current_secret(at=now())
    privileges.grant(WEB_ROLE, WORKER_ROLE)
    yield
    with connection.cursor() as cursor:  # of processes that have ended, a moment ago
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        cursor.execute(f"DROP OWNED BY {WEB_ROLE}, {WORKER_ROLE}; DROP ROLE {WEB_ROLE}, {WORKER_ROLE}")
    teardown_databases(made, verbosity=0)


@pytest.fixture(scope="session", autouse=True)
def _database(django_test_environment: None, django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock(), override_settings(PASSWORD_HASHERS=PASSWORD_HASHERS), database():
        yield


@pytest.fixture(scope="session")
def broker(_database: None) -> Iterator[None]:
    """The real broker with this run's queues."""
    with _declared_queues():
        yield


@contextmanager
def _declared_queues() -> Iterator[None]:
    queues.declare()
    yield
    with current_app.connection_for_write() as connection:
        for name in (*settings.VOTES_QUEUES, settings.PERIODIC_QUEUE, settings.DEAD_LETTER_QUEUE):
            connection.default_channel.queue_delete(name)


@contextmanager
def queues_of_their_own() -> Iterator[None]:
    """Queues that only processes started in here use, so that none of `pipeline` takes a message from them."""
    prefix = f"{settings.QUEUE_PREFIX}{uuid4().hex[:8]}."
    names = {
        "QUEUE_PREFIX": prefix,
        "VOTES_QUEUES": tuple(prefix + name.removeprefix(settings.QUEUE_PREFIX) for name in settings.VOTES_QUEUES),
        "PERIODIC_QUEUE": prefix + settings.PERIODIC_QUEUE.removeprefix(settings.QUEUE_PREFIX),
        "DEAD_LETTER_QUEUE": prefix + settings.DEAD_LETTER_QUEUE.removeprefix(settings.QUEUE_PREFIX),
    }
    with override_settings(**names), _declared_queues():
        yield


# --- Who and what -----------------------------------------------------------------------------------------------------

_numbers = itertools.count()


def make_user(name: str, *roles: str) -> Any:
    """A user with these roles and PASSWORD."""
    user = get_user_model().objects.create_user(name, f"{name}@example.org", PASSWORD)
    user.groups.set(Group.objects.filter(name__in=roles))
    return user


@pytest.fixture(scope="session")
def owner(_database: None) -> Any:
    return make_user("olga", roles.OWNER)


def make_key(owner: Any) -> str:
    """The key of a new API client of this owner, with all scopes."""
    _, key = clients.make_client(owner, {"name": "kiosk", "scopes": list(Scope)}, at=now())
    return key


@pytest.fixture(scope="session")
def client_key(owner: Any) -> str:
    return make_key(owner)


@pytest.fixture
def make_poll(owner: Any) -> Callable[..., Poll]:
    def make_poll(*, opens_in: float = 0, closes_in: float = 3600, **fields: Any) -> Poll:
        """A poll about lunch; `opens_in` and `closes_in` are seconds from now, negative for the past."""
        at = now()
        opens_at, closes_at = at + timedelta(seconds=min(opens_in, closes_in - 1)), at + timedelta(seconds=closes_in)
        is_draft = fields.pop("draft", False)
        has_begun = opens_at < at
        wanted = {
            "title": f"Lunch {next(_numbers)}",
            "voter_policy": "client",
            "opens_at": at if has_begun else opens_at,
            "closes_at": at + timedelta(days=1) if has_begun else closes_at,
            "options": [{"text": "soup"}, {"text": "salad"}],
            "draft": is_draft or has_begun,
            **fields,
        }
        poll = editing.create_poll(owner, wanted, at=at)
        moments = {"opened_at": None}
        if has_begun:  # past the rules, which let no poll begin in the past; the database lets only one that has not opened
            moments |= {"opens_at": opens_at, "closes_at": closes_at, "published_at": None if is_draft else at}
        Poll.objects.filter(pk=poll.pk).update(**moments)
        poll.refresh_from_db()
        return poll

    return make_poll


@pytest.fixture
def poll(make_poll: Callable[..., Poll]) -> Poll:
    return make_poll()


def option(poll: Poll, text: str) -> int:
    """The id of the poll's option; a poll reads its options once."""
    prefetch_related_objects([poll], "options")
    return next(option.pk for option in poll.options.all() if option.text == text)


def vote_of(poll: Poll, voter: str, *texts: str, at: int = 0, vote_id: UUID | None = None, address: str | None = None) -> AcceptedVote:
    """An accepted vote, for soup if nothing is said; `at` is when, in seconds of this test's own time."""
    accepted_at = 1_800_000_000_000_000 + at * 1_000_000
    selection = tuple(sorted(option(poll, text) for text in texts or ("soup",)))
    address_key, subnet_key = networks.cipher_for(poll).keys(address) if address else (None, None)
    return AcceptedVote(
        vote_id or uuid4(),
        poll.pk,
        voters.VoterKeys(poll.pk, "client", poll.voter_salt).of(voter),
        selection,
        accepted_at,
        address_key=address_key,
        subnet_key=subnet_key,
    )


def withdrawal_of(poll: Poll, voter: str, *, at: int = 0) -> AcceptedVote:
    return msgspec.structs.replace(vote_of(poll, voter, at=at), selection=())


def standing(poll: Poll) -> dict[UUID, UUID]:
    """{voter key: id of the vote that stands}"""
    return dict(Vote.objects.filter(poll_id=poll.pk).values_list("voter_key", "vote_id"))


def tallies(poll: Poll) -> dict[str, int]:
    """{option text: votes}, without the options that have none; approval polls have "ballots", too."""
    texts = dict(poll.options.values_list("id", "text"))
    found = Tally.objects.filter(poll=poll).exclude(votes=0)
    return {texts[tally.selection[0]] if tally.selection else "ballots": tally.votes for tally in found}


def outcome_of(vote: AcceptedVote) -> tuple[str, str | None] | None:
    """The vote's outcome and reason; fails when it has two."""
    key = {"poll_id": vote.poll_id, "voter_key": vote.voter_key, "vote_id": vote.vote_id}
    found: list[tuple[str, str | None]] = [("counted", None)] * Vote.objects.filter(**key).count()
    found += VoteAside.objects.filter(**key).values_list("outcome", "reason")
    assert len(found) <= 1, found
    return found[0] if found else None


def assert_tallies_equal_votes() -> None:
    """The promise, over all polls, in one statement and so at one moment."""
    with connection.cursor() as cursor:
        cursor.execute("""
            WITH ballots AS (
                SELECT v.poll_id, v.selection, p.method FROM votes v JOIN polls p ON p.id = v.poll_id WHERE v.selection <> '{}'
            ), counted AS (
                SELECT poll_id, selection FROM ballots WHERE method = 'single'
                UNION ALL SELECT poll_id, '{}' FROM ballots WHERE method = 'approval'
                UNION ALL SELECT poll_id, ARRAY[option] FROM ballots, unnest(selection) AS option WHERE method = 'approval'
            )
            SELECT * FROM (SELECT poll_id, selection, votes FROM tallies WHERE votes <> 0) t
            FULL JOIN (SELECT poll_id, selection, count(*) AS votes FROM counted GROUP BY 1, 2) v USING (poll_id, selection)
            WHERE t.votes IS DISTINCT FROM v.votes
        """)
        assert cursor.fetchall() == []


def wait_until(claim: Callable[[], Any], *, seconds: float = 20) -> None:
    """Return once the claim holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.05)


# --- The broker -------------------------------------------------------------------------------------------------------


def task_message(bundle: Any) -> tuple[dict[str, Any], bytes]:
    """Headers and body of the message that starts `votes.count` on this bundle."""
    task = current_app.amqp.as_task_v2(str(uuid4()), "votes.count", argsrepr="", kwargsrepr="")
    return task.headers, json.dumps([[bundle], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()


def bundle_of(*votes: AcceptedVote) -> tuple[dict[str, Any], bytes]:
    return task_message(bundles.write(list(votes)).decode())


@pytest.fixture
def bury(broker: None) -> Iterator[Callable[[dict[str, Any], bytes], None]]:
    """Puts a message among the dead letters, as RabbitMQ would after a hundred crashes of its worker."""
    with current_app.connection_for_write(transport_options={"confirm_publish": True}) as connection:
        channel = connection.default_channel
        channel.queue_purge(settings.DEAD_LETTER_QUEUE)

        def depth() -> int:
            return channel.queue_declare(settings.DEAD_LETTER_QUEUE, passive=True).message_count

        def bury(headers: dict[str, Any], body: bytes) -> None:
            before = depth()
            Producer(channel).publish(
                body,
                routing_key=settings.DEAD_LETTER_QUEUE,
                headers={**headers, "x-death": [{"queue": settings.VOTES_QUEUES[0], "reason": "delivery_limit", "count": 1}]},
                content_type="application/json",
                content_encoding="utf-8",
                message_id=headers.get("id"),
                delivery_mode=2,
            )
            wait_until(lambda: depth() == before + 1)

        yield bury
        channel.queue_purge(settings.DEAD_LETTER_QUEUE)


@pytest.fixture
def broker_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where this process looks for the broker."""
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"amqp://guest:guest@127.0.0.1:{free_port()}//")


# --- HTTP -------------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Api:
    """Plain HTTP to a running web process."""

    port: int
    headers: dict[str, str]

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """`body` as it is when bytes, else as JSON; header names with _ for -, None leaves a default out."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given = {"content-type": "application/json", **given}
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {name: value for name, value in {**self.headers, **given}.items() if value is not None}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, raw, sent)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read().decode())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.send("POST", path, body, **headers)

    def patch(self, path: str, body: Any, **headers: str) -> Answer:
        return self.send("PATCH", path, body, **headers)

    def cast(self, poll: Poll, voter: str | None, text: str = "soup", **headers: str) -> Answer:
        body = {"option": str(option(poll, text))}
        return self.post(f"/api/v1/polls/{poll.pk}/votes", {**body, "voter": voter} if voter else body, **headers)


# --- Processes --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def database_url(role: str | None = None) -> str:
    """The test database's URL, for its owner or a role: the processes are told it by their environment."""
    at = connection.settings_dict
    user, password = (role, ROLE_PASSWORD) if role else (at["USER"], at["PASSWORD"])
    return f"postgres://{user}:{password}@{at['HOST']}:{at['PORT'] or 5432}/{at['NAME']}"


@contextmanager
def process(*command: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the product on the test database; asked to end, and made to, at the end."""
    own = {"DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": database_url(WORKER_ROLE), "QUEUE_PREFIX": settings.QUEUE_PREFIX}
    env = {**os.environ, **own, **PROCESS_SETTINGS, **environment}
    with log.open("ab") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield running
        finally:
            if running.poll() is None:
                running.terminate()
                try:
                    running.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(running.pid, signal.SIGKILL)
                    running.wait()
    assert "permission denied" not in log.read_text(errors="replace"), log


def web(port: int, log: Path, **environment: str) -> Any:
    return process("core", "web", "--port", str(port), log=log, **{"DATABASE_URL": database_url(WEB_ROLE), **environment})


def worker(queues: str, log: Path, *, concurrency: int = 2, **environment: str) -> Any:
    command = (
        f"celery -A core worker -Q {queues} -c {concurrency} -P prefork -O fair --without-gossip --without-mingle -n {uuid4().hex}@test"
    )
    return process(*command.split(), log=log, **environment)


def answers(port: int) -> bool:
    try:
        return Api(port, {}).get("/healthz").status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def pipeline(broker: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A web process and a worker of votes on the real broker and database; the web port."""
    logs, port = tmp_path_factory.mktemp("pipeline"), free_port()
    with web(port, logs / "web.log"), worker(",".join(settings.VOTES_QUEUES), logs / "worker.log"):
        wait_until(lambda: answers(port))
        yield port


@pytest.fixture
def api(pipeline: int, client_key: str) -> Api:
    """The running pipeline as the owner's API client sees it."""
    return Api(pipeline, {"authorization": f"Api-Key {client_key}"})


def signed_in(port: int, username: str) -> Api:
    """The running pipeline as this user sees it."""
    tokens = Api(port, {}).post("/api/v1/auth/token", {"username": username, "password": PASSWORD})
    return Api(port, {"authorization": f"Bearer {tokens.json['access']}"})


@pytest.fixture(scope="session")
def owners_api(pipeline: int, owner: Any) -> Api:
    """The running pipeline as the signed-in owner sees it."""
    return signed_in(pipeline, owner.username)
