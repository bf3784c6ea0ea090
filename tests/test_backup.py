"""Backup and restore, for real: what is lost with a database or with all, what comes back, and that nothing counts twice.

A stack of its own, because its database and its queues are destroyed.
"""

import hashlib
import json
import os
import stat
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psycopg2
import pytest
from kombu import Connection, Producer

from stack.backup import find_tools, load, main
from stack.demo import ask
from stack.folder import StackError
from stack.load import Cast, cast_all
from stack.stack import Stack
from stack.up import manage, seed_demo
from tests.conftest import free_port, wait_until
from tests.test_faults import _DRIFT, Scene, votes_in

# Seconds after which RabbitMQ tries again to bring a dead letter to its queue; 180 if nobody says so.
DEAD_LETTER_RETRY = 1


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    stack = Stack(tmp_path_factory.mktemp("keeper"))
    with ExitStack() as ending:
        ending.callback(stack.destroy)
        home = stack.folder / "rabbitmq"
        home.mkdir(mode=0o700, parents=True)
        retry = f"{{dead_letter_worker_publisher_confirm_timeout, {DEAD_LETTER_RETRY * 1000}}}"
        (home / "advanced.config").write_text(f"[{{rabbit, [{retry}]}}].\n")
        ending.enter_context(stack)
        manage(stack, "setup")
        dev = seed_demo(stack)
        stack.start("web", "worker")
        yield Scene(stack, dev)


def ask_broker(stack: Stack, method: str, path: str, body: object = None) -> Any:
    """Ask the broker's management; rabbitmqctl takes ten times as long."""
    api = urlsplit(stack.env["BROKER_API_URL"])
    login = b64encode(f"{api.username}:{api.password}".encode()).decode()
    headers = {"content-type": "application/json", "authorization": f"Basic {login}"}
    content = None if body is None else json.dumps(body).encode()
    url = f"http://{api.hostname}:{api.port}{api.path}{path}"
    with urlopen(Request(url, content, headers, method=method), timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text else None


class Kept(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def keep(stack: Stack, *arguments: object, **environment: str) -> Kept:
    """Do what `python -m stack.backup` does, in this process (`make chaos` runs it by `make`). It names no password, whatever comes."""
    mask = os.umask(0o022)
    try:
        with (
            patch.dict(os.environ, {**stack.env, **environment}, clear=True),
            patch.object(sys, "argv", ["stack.backup", *map(str, arguments)]),
            redirect_stdout(StringIO()) as out,
            redirect_stderr(StringIO()) as err,
        ):
            done = Kept(main(), out.getvalue(), err.getvalue())
    finally:
        os.umask(mask)
    for url in (stack.database_url, stack.broker_url):
        assert str(urlsplit(url).password) not in done.stdout + done.stderr
    return done


def back_up(stack: Stack, to: Path, *arguments: object, **environment: str) -> tuple[Path, str]:
    """A backup that succeeds, and what was said of it."""
    done = keep(stack, "backup", "--to", to, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[0]), done.stdout


def manifest_of(backup: Path) -> dict[str, Any]:
    return json.loads((backup / "manifest.json").read_text())


def vote(scene: Scene, poll: dict[str, Any], *voters: str) -> dict[str, str]:
    """They vote for soup, each request with a key of its own; their receipts."""
    casts: dict[str, Cast] = {voter: scene.cast(poll, voter, 0, voter) for voter in voters}
    cast_all(scene.port, casts.values(), connections=8, seconds=20)
    assert {cast.status for cast in casts.values()} <= {200, 202}
    return {voter: json.loads(cast.body)["receipt"] for voter, cast in casts.items()}


def status_of(scene: Scene, receipt: str) -> str:
    return ask(f"{scene.stack.base_url}/api/v1/votes/{receipt}")["status"]


def crowd(name: str, size: int = 20) -> list[str]:
    return [f"{name}-{number}" for number in range(size)]


# --- What is lost, and what is not ------------------------------------------------------------------------------------


def test_when_the_database_is_lost_the_queue_brings_what_it_holds_and_nothing_counts_twice(scene: Scene, tmp_path: Path):
    stack, poll = scene.stack, scene.make_poll()
    before = vote(scene, poll, *crowd("before"))
    wait_until(lambda: votes_in(scene, poll) == 20)
    backup, _ = back_up(stack, tmp_path)
    after = vote(scene, poll, *crowd("counted-after"))
    wait_until(lambda: votes_in(scene, poll) == 40)
    stack.stop("worker")
    queued = vote(scene, poll, *crowd("queued"))
    stack.stop("web")

    lose_the_database(stack)
    done = keep(stack, "restore", backup)
    assert done.returncode == 0, done.stderr
    stack.start("web", "worker")

    wait_until(lambda: votes_in(scene, poll) == 40)
    assert {status_of(scene, receipt) for receipt in (*before.values(), *queued.values())} == {"counted"}
    assert {status_of(scene, receipt) for receipt in after.values()} == {"pending"}  # lost with the database, and not denied
    assert vote(scene, poll, *crowd("before"), *crowd("counted-after"), *crowd("queued")).keys() == {*before, *after, *queued}
    wait_until(lambda: votes_in(scene, poll) == 60)
    assert {status_of(scene, receipt) for receipt in after.values()} == {"counted"}
    wait_until(scene.is_settled)
    assert scene.query(_DRIFT) == []
    assert scene.query(f"SELECT count(*), count(DISTINCT voter_key) FROM votes WHERE poll_id = '{poll['id']}'") == [(60, 60)]


def lose_the_database(stack: Stack) -> None:
    on_the_server(stack, "DROP DATABASE nexus WITH (FORCE)", "CREATE DATABASE nexus")


def on_the_server(stack: Stack, *commands: str) -> None:
    with closing(psycopg2.connect(urlsplit(stack.database_url)._replace(path="/postgres").geturl())) as server, server.cursor() as cursor:
        server.autocommit = True
        for command in commands:
            cursor.execute(command)


def test_all_of_it_comes_back_at_another_place_with_its_secrets(scene: Scene, tmp_path: Path):
    poll = scene.make_poll()
    receipts = vote(scene, poll, *crowd("moved"))
    wait_until(lambda: votes_in(scene, poll) == 20)
    policy = {"pattern": "votes.(even|odd)$", "definition": {"max-length-bytes": 1_000_000_000}, "apply-to": "queues"}
    ask_broker(scene.stack, "PUT", "policies/%2F/roomy", policy)
    backup, _ = back_up(scene.stack, tmp_path, "--with-secrets")
    secrets = dict(line.split("=", 1) for line in (backup / "secrets.env").read_text().splitlines())

    # Another database and another virtual host: servers of its own would take ten seconds more, and show no more.
    on_the_server(scene.stack, "CREATE DATABASE other")
    ask_broker(scene.stack, "PUT", "vhosts/other")
    elsewhere = {
        "DATABASE_URL": urlsplit(scene.stack.database_url)._replace(path="/other").geturl(),
        "CELERY_BROKER_URL": urlsplit(scene.stack.broker_url)._replace(path="/other").geturl(),
        "BROKER_API_URL": scene.stack.env["BROKER_API_URL"],
    }
    other = Stack(tmp_path / "other", {**secrets, **elsewhere})
    with ExitStack() as ending:
        ending.callback(other.destroy)
        ending.enter_context(other)
        done = keep(other, "restore", backup)
        assert done.returncode == 0, done.stderr
        other.start("web", "worker")
        there = Scene(other, {**scene.dev, "base_url": other.base_url})

        assert votes_in(there, poll) == 20
        assert {status_of(there, receipt) for receipt in receipts.values()} == {"counted"}
        vote(there, poll, *crowd("moved"), "one-more")
        wait_until(lambda: votes_in(there, poll) == 21)
        assert there.depth("votes.dead") == 0
        assert [policy["name"] for policy in ask_broker(other, "GET", "policies/other")] == ["roomy"]


# --- What a backup is -------------------------------------------------------------------------------------------------


def test_a_backup_names_what_waits_in_the_queue_and_is_not_in_it(scene: Scene, tmp_path: Path):
    poll = scene.make_poll()
    scene.stack.stop("worker")
    vote(scene, poll, "alice")

    backup, said = back_up(scene.stack, tmp_path, "--wait", "0.2")

    scene.stack.start("worker")
    assert manifest_of(backup)["waiting_bundles"] == 1
    assert "Without the votes of 1 bundles that waited in the queue" in said
    wait_until(lambda: votes_in(scene, poll) == 1)


def test_a_backup_is_for_its_owners_eyes_and_has_no_secrets_unasked(scene: Scene, tmp_path: Path):
    backup, said = back_up(scene.stack, tmp_path)

    assert sorted(path.name for path in backup.iterdir()) == ["broker.json", "database.dump", "manifest.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in backup.iterdir()} == {0o600}
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700
    for path in backup.iterdir():
        content = path.read_bytes()
        assert all(scene.stack.env[name].encode() not in content for name in ("SECRET_KEY", "VOTER_SECRET"))
    prefix = scene.stack.env.get("QUEUE_PREFIX", "")
    names = {queue["name"] for queue in json.loads((backup / "broker.json").read_text())["queues"]}
    assert names == {f"{prefix}{queue}" for queue in ("votes.even", "votes.odd", "votes.dead", "periodic")}
    assert "Without VOTER_SECRET nobody is known to have voted" in said
    assert manifest_of(backup)["rows"]["votes"] == scene.query("SELECT count(*) FROM votes")[0][0]


def test_a_broker_without_management_is_backed_up_without_its_definitions(scene: Scene, tmp_path: Path):
    nowhere = f"http://guest:guest@127.0.0.1:{free_port()}/api/"
    backup, said = back_up(scene.stack, tmp_path, BROKER_API_URL=nowhere)
    assert not (backup / "broker.json").exists()
    assert "Without broker.json" in said


@pytest.mark.parametrize("name", ["DATABASE_URL", "CELERY_BROKER_URL"])
def test_without_a_server_both_fail_in_a_sentence_and_a_backup_leaves_nothing(scene: Scene, backup: Path, tmp_path: Path, name: str):
    nowhere = {name: f"{urlsplit(scene.stack.env[name]).scheme}://nexus:terces@127.0.0.1:{free_port()}/nexus"}
    for command in (["backup", "--to", tmp_path], ["restore", backup, "--replace"]):
        done = keep(scene.stack, *command, **nowhere)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("Failed: ") and "terces" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- What the broker keeps when it does not know where to -------------------------------------------------------------


def test_a_bundle_that_cant_be_counted_waits_in_the_broker_until_there_is_a_queue_for_dead_letters(scene: Scene):
    prefix = scene.stack.env.get("QUEUE_PREFIX", "")
    with Connection(scene.stack.broker_url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.default_channel
        channel.queue_delete(f"{prefix}votes.dead")
        poll = scene.make_poll()
        Producer(channel).publish(
            b"{", routing_key=f"{prefix}votes.even", content_type="application/json", content_encoding="utf-8", delivery_mode=2
        )
        vote(scene, poll, "alice")
        wait_until(lambda: votes_in(scene, poll) == 1)  # it holds up nobody
        assert scene.depth("votes.even") == 0

    manage(scene.stack, "setup")

    wait_until(lambda: scene.depth("votes.dead") == 1)


# --- Restores that are refused ----------------------------------------------------------------------------------------


def refused(stack: Stack, backup: object, because: str, *arguments: str, **environment: str) -> None:
    """The restore fails with this sentence, and the votes are what they were."""
    with closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT vote_id FROM votes ORDER BY 1")
        before = cursor.fetchall()
    done = keep(stack, "restore", backup, *arguments, **environment)
    assert (done.returncode, because in done.stderr) == (1, True), done.stderr
    with closing(psycopg2.connect(stack.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT vote_id FROM votes ORDER BY 1")
        assert cursor.fetchall() == before != []


@pytest.fixture(scope="module")
def backup(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    poll = scene.make_poll()
    vote(scene, poll, "alice")
    wait_until(lambda: votes_in(scene, poll) == 1)
    return back_up(scene.stack, tmp_path_factory.mktemp("backups"))[0]


@pytest.fixture
def copy(backup: Path, tmp_path: Path) -> Path:
    """The backup, for a test to damage."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in backup.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def write_manifest(backup: Path, **changes: Any) -> None:
    (backup / "manifest.json").write_text(json.dumps({**manifest_of(backup), **changes}))


def test_nothing_is_restored_while_nexus_runs(scene: Scene, backup: Path):
    refused(scene.stack, backup, "Workers take from the queues of votes: stop Nexus first", "--replace")
    scene.stack.stop("worker")
    refused(scene.stack, backup, "other connections to the database are open: stop Nexus first", "--replace")
    scene.stack.start("worker")


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"format": 2}, "The backup has format 2"),
        ({"migrations": ["0001_first_tables", "9999_later"]}, "9999_later is not known here"),
        ({"postgres": 99}, "The backup is of PostgreSQL 99"),
    ],
)
def test_a_backup_of_something_newer_is_refused(scene: Scene, copy: Path, changes: dict[str, Any], because: str):
    write_manifest(copy, **changes)
    refused(scene.stack, copy, because, "--replace")


# --- Restores, with Nexus stopped -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(scene: Scene, backup: Path) -> None:
    """From here to the end Nexus is stopped, its servers are not."""
    scene.stack.stop("web", "worker")


def test_a_damaged_backup_changes_nothing(scene: Scene, copy: Path, tmp_path: Path, stopped: None):
    dump = copy / "database.dump"
    content = dump.read_bytes()
    middle = len(content) // 2

    dump.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    refused(scene.stack, copy, "its checksum differs", "--replace")

    dump.write_bytes(content[:-5000])  # even when the checksum does not tell
    write_manifest(copy, files={"database.dump": hashlib.sha256(content[:-5000]).hexdigest()})
    refused(scene.stack, copy, "is as it was before", "--replace")

    dump.unlink()
    refused(scene.stack, copy, "holds no whole backup", "--replace")
    refused(scene.stack, tmp_path / "nowhere", "holds no whole backup", "--replace")
    (copy / "manifest.json").write_text("[]")
    refused(scene.stack, copy, "holds no whole backup", "--replace")


def test_a_pg_restore_that_is_killed_changes_nothing(scene: Scene, stopped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between two statements, where psql takes it for the end."""
    monkeypatch.setenv("DATABASE_URL", scene.stack.database_url)
    (tmp_path / "psql").symlink_to(find_tools(server_version=150_000) / "psql")
    (tmp_path / "pg_restore").write_text("#!/bin/sh\necho 'CREATE TABLE half (id int);'\nkill -9 $$\n")
    (tmp_path / "pg_restore").chmod(0o700)

    with pytest.raises(StackError, match="is as it was before"):
        load(tmp_path, tmp_path / "database.dump")

    assert scene.query("SELECT to_regclass('half'), count(*) > 0 FROM votes") == [(None, True)]


@pytest.fixture
def told_to_manage(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which commands of manage.py would have run: the first tests here run them, and each takes seconds."""
    commands: list[str] = []
    monkeypatch.setattr("stack.backup.manage", lambda *command: commands.append(" ".join(command)))
    return commands


def test_a_database_with_votes_is_replaced_only_when_that_is_said(scene: Scene, backup: Path, stopped: None, told_to_manage: list[str]):
    refused(scene.stack, backup, "ARGS=--replace forgets them.")

    for _ in range(2):  # what was restored can be restored again
        done = keep(scene.stack, "restore", backup, "--replace")
        assert done.returncode == 0, done.stderr
        assert scene.query("SELECT count(*) FROM votes")[0][0] == manifest_of(backup)["rows"]["votes"]
    assert told_to_manage == ["setup", "audit"] * 2


def test_while_the_voter_secret_is_changed_the_one_before_is_part_of_a_backup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from stack import backup

    old, new = "o" * 50, "n" * 50
    for name, value in (("VOTER_SECRET", new), ("VOTER_SECRET_FALLBACKS", f"{old},"), ("SECRET_KEY", "k" * 50)):
        monkeypatch.setenv(name, value)
    manifest = {
        "secrets": {name: backup.fingerprint(value) for name, value in (("VOTER_SECRET", new), ("SECRET_KEY", "k" * 50))},
        "voter_secret_fallbacks": [backup.fingerprint(old)],
    }
    backup.check_secrets(tmp_path, manifest, other_voter_secret=False)
    monkeypatch.setenv("VOTER_SECRET", old)
    monkeypatch.setenv("VOTER_SECRET_FALLBACKS", new)  # swapped, and all there
    backup.check_secrets(tmp_path, manifest, other_voter_secret=False)
    monkeypatch.setenv("VOTER_SECRET_FALLBACKS", "")
    with pytest.raises(StackError, match="is not the one of the backup"):
        backup.check_secrets(tmp_path, manifest, other_voter_secret=False)


def test_another_voter_secret_is_refused_unless_the_old_one_is_lost(scene: Scene, backup: Path, stopped: None, told_to_manage: list[str]):
    refused(scene.stack, backup, "VOTER_SECRET is not the one of the backup", "--replace", VOTER_SECRET="x" * 50)

    done = keep(scene.stack, "restore", backup, "--replace", "--other-voter-secret", VOTER_SECRET="x" * 50, SECRET_KEY="y" * 50)
    assert done.returncode == 0, done.stderr
    assert "SECRET_KEY is not the one of the backup: everybody has to sign in again" in done.stdout
    assert told_to_manage == ["migrate --skip-checks", "rotate_voter_secret --lost --skip-checks", "setup", "audit"]
