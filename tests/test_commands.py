"""manage.py setup, seed_demo, replay_dead_letters: repeatable, and wrong circumstances told in a sentence."""

import io
import json
import os
import subprocess
import sys
import time
from uuid import uuid4

import psycopg2
import pytest
from celery import current_app
from django.conf import settings as project
from django.contrib.auth import authenticate, get_user_model
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils.timezone import now
from kombu import Producer

from polls import deadletters, voters
from polls.models import ApiClient, Poll
from tests.conftest import PASSWORD, ROOT, bundle_of, database_url, free_port, tallies, vote_of, wait_until


def call(command, *arguments, monkeypatch=None, stdin=None):
    """Run it; return what it printed."""
    out = io.StringIO()
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin if isinstance(stdin, str) else json.dumps(stdin)))
    call_command(command, *arguments, stdout=out)
    return out.getvalue()


# --- setup ------------------------------------------------------------------------------------------------------------


def depths():
    with current_app.connection_for_write() as broker:
        names = (*project.VOTES_QUEUES, project.DEAD_LETTER_QUEUE, project.PERIODIC_QUEUE)
        return [broker.default_channel.queue_declare(name, passive=True).message_count for name in names]


def test_setup_declares_the_queues_and_a_second_time_changes_nothing(bury, poll):
    bury(*bundle_of(vote_of(poll, "alice")))

    for _ in range(2):
        assert call("setup").endswith("The database and the queues are ready.\n")

    assert depths() == [0, 0, 1, 0]
    assert Poll.objects.filter(pk=poll.pk).exists()


def test_setup_says_when_a_queue_is_there_with_other_arguments(broker, settings):
    settings.DEAD_LETTER_QUEUE = f"{project.QUEUE_PREFIX}other"
    with current_app.connection_for_write() as other:
        other.default_channel.queue_declare(settings.DEAD_LETTER_QUEUE, durable=True, auto_delete=False)
        try:
            with pytest.raises(CommandError, match="A queue is there already with other arguments; empty it, delete it, and try again"):
                call("setup")
        finally:
            other.default_channel.queue_delete(settings.DEAD_LETTER_QUEUE)


def test_setup_waits_for_no_table_for_long_and_says_so():
    """Whoever waits for a table makes all wait who come after, votes included."""
    with psycopg2.connect(database_url()) as other, other.cursor() as holding:
        holding.execute("LOCK TABLE django_migrations IN ACCESS EXCLUSIVE MODE")
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '200ms'")
        with pytest.raises(CommandError, match="What was begun is undone; try again"):
            call("setup")
        other.rollback()
    with connection.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("0",)  # while an index is built
    connection.close()


@pytest.mark.parametrize(("name", "scheme", "server"), [("DATABASE_URL", "postgres", "database"), ("CELERY_BROKER_URL", "amqp", "broker")])
def test_setup_without_a_server_ends_with_one_line_and_no_password(name, scheme, server):
    nowhere = {name: f"{scheme}://nexus:terces@127.0.0.1:{free_port()}/nexus"}
    env = {**os.environ, "DATABASE_URL": database_url(), **nowhere}
    started = time.monotonic()

    ended = subprocess.run([sys.executable, "manage.py", "setup"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)

    assert ended.returncode == 1
    assert ended.stderr.startswith(f"CommandError: The {server} of {name} does not let us in: ")
    assert "Traceback" not in ended.stderr and "terces" not in ended.stderr
    assert time.monotonic() - started < 10


# --- seed_demo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wanted(_database):
    name = f"demo-{uuid4().hex[:8]}"
    yield {"admin_user": name, "admin_password": PASSWORD, "client_key": voters.new_client_key()}
    # An open `ip` poll with a title of everyday: other tests need not meet it.
    Poll.objects.filter(owner__username=name).update(archived_at=now())


def test_the_demo_is_made_once_and_kept(wanted, monkeypatch):
    first = json.loads(call("seed_demo", monkeypatch=monkeypatch, stdin=wanted))
    again = json.loads(call("seed_demo", monkeypatch=monkeypatch, stdin=wanted))

    assert again == first
    admin = authenticate(username=wanted["admin_user"], password=PASSWORD)
    assert admin.is_staff and admin.is_superuser
    client = ApiClient.objects.get(owner=admin)
    assert voters.is_key(wanted["client_key"], bytes(client.key_hash)) and client.revoked_at is None
    poll = Poll.objects.get(owner=admin)
    assert (str(poll.pk), poll.status, poll.voter_policy) == (first["poll_id"], "open", "ip")
    assert [option.text for option in poll.options.all()] == ["Soup", "Salad", "Noodles"]


def test_other_secrets_replace_the_old_ones_and_a_closed_demo_is_followed_by_another(wanted, monkeypatch):
    first = json.loads(call("seed_demo", monkeypatch=monkeypatch, stdin=wanted))
    Poll.objects.filter(pk=first["poll_id"]).update(closes_at=now())

    changed = {**wanted, "admin_password": "another one", "client_key": wanted["client_key"][:-1] + "0"}
    second = json.loads(call("seed_demo", monkeypatch=monkeypatch, stdin=changed))

    assert second != first
    assert authenticate(username=wanted["admin_user"], password=PASSWORD) is None
    assert authenticate(username=wanted["admin_user"], password="another one")
    client = ApiClient.objects.get(owner__username=wanted["admin_user"])
    assert voters.is_key(changed["client_key"], bytes(client.key_hash))


@pytest.mark.parametrize(
    ("stdin", "sentence"),
    [
        ("", "Standard input is no JSON."),
        ("{", "Standard input is no JSON."),
        ("[]", "must be a JSON object with the texts admin_user, admin_password, client_key"),
        ("null", "must be a JSON object"),
        (lambda wanted: {**wanted, "admin_password": None}, "must be a JSON object"),
        (lambda wanted: {**wanted, "admin_user": ""}, "must be a JSON object"),
        (lambda wanted: {**wanted, "client_key": 7}, "must be a JSON object"),
        (lambda wanted: {"admin_user": wanted["admin_user"]}, "must be a JSON object"),
        (lambda wanted: {**wanted, "client_key": "terces"}, "client_key must read nxs_"),
        (lambda wanted: {**wanted, "client_key": "nxs_terces_a_b"}, "client_key must read nxs_"),
        (lambda wanted: {**wanted, "client_key": f"nxs_{'x' * 17}_terces"}, "client_key must read nxs_"),
    ],
)
def test_a_demo_that_is_not_asked_for_rightly_is_not_made(wanted, monkeypatch, stdin, sentence):
    users = get_user_model().objects.count()

    with pytest.raises(CommandError, match=sentence) as refused:
        call("seed_demo", monkeypatch=monkeypatch, stdin=stdin(wanted) if callable(stdin) else stdin)

    assert "terces" not in str(refused.value) and PASSWORD not in str(refused.value)
    assert get_user_model().objects.count() == users


# --- replay_dead_letters ----------------------------------------------------------------------------------------------


def test_without_dead_letters_there_is_nothing_to_replay(bury):
    assert call("replay_dead_letters", "--dry-run") == "0 dead letters\n"
    assert call("replay_dead_letters") == "0 dead letters replayed\n"


def test_a_dry_run_tells_each_letter_and_takes_none(bury, poll):
    headers, body = bundle_of(vote_of(poll, "alice"), vote_of(poll, "bob"))
    bury(headers, body)
    bury({}, b"{")

    said = call("replay_dead_letters", "--dry-run").splitlines()

    assert [" ".join(line.split()) for line in said] == [
        f"{headers['id']} delivery_limit {len(body)} bytes 2 votes (2 pending), 0 unreadable",
        f"poll {poll.pk}: 2 votes",
        "(no id) delivery_limit 1 bytes no bundle",
        "message: Its header `task` is not votes.count.",
        "message: It is no JSON of a task with a bundle.",
        "2 dead letters",
    ]
    assert call("replay_dead_letters", "--dry-run", "--most", "1").endswith("1 dead letters\n")
    wait_until(lambda: deadletters.count() == 2)


def test_the_oldest_are_replayed_first(pipeline, bury, make_poll):
    older, newer = make_poll(), make_poll()
    for poll in (older, newer):
        bury(*bundle_of(vote_of(poll, "alice")))

    assert call("replay_dead_letters", "--most", "1") == "1 dead letters replayed\n"

    wait_until(lambda: tallies(older) == {"soup": 1})
    assert (tallies(newer), deadletters.count()) == ({}, 1)


def test_one_letter_is_replayed_by_its_id(pipeline, bury, make_poll):
    left, wanted = make_poll(), make_poll()
    for poll in (left, wanted):
        headers, body = bundle_of(vote_of(poll, "alice"))
        bury(headers, body)

    assert call("replay_dead_letters", "--id", headers["id"]) == "1 dead letters replayed\n"
    wait_until(lambda: tallies(wanted) == {"soup": 1})
    assert call("replay_dead_letters", "--id", headers["id"]) == "0 dead letters replayed\n"
    wait_until(lambda: deadletters.count() == 1)
    assert tallies(left) == {}


@pytest.mark.parametrize("other", ["--dry-run", "--most=1"])
def test_one_letter_is_not_many(bury, other):
    bury({"id": "a"}, b"{")
    with pytest.raises(CommandError, match="--id goes with neither"):
        call("replay_dead_letters", "--id=a", other)
    wait_until(lambda: deadletters.count() == 1)


@pytest.mark.parametrize("most", ["0", "-1", "x", "1.5"])
def test_a_number_of_letters_that_is_none(bury, most):
    bury({}, b"{")
    with pytest.raises(CommandError, match="--most"):
        call("replay_dead_letters", f"--most={most}")
    assert deadletters.count() == 1


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_replay_without_the_broker_ends_with_a_sentence(broker_away, arguments):
    with pytest.raises(CommandError, match=r"^The broker does not answer\. It keeps the dead letters; try again\.$"):
        call("replay_dead_letters", *arguments)


def test_a_replay_that_is_interrupted_loses_nothing(bury, poll, monkeypatch):
    """The connection ends after the copy was confirmed, before the letter was taken away: it is there twice, and counts once."""
    bury(*bundle_of(vote_of(poll, "alice")))
    published = Producer.publish

    def publish_and_die(self, *args, **kwargs):
        published(self, *args, **kwargs)
        raise ConnectionResetError

    monkeypatch.setattr(Producer, "publish", publish_and_die)
    with pytest.raises(CommandError, match="The broker does not answer"):
        call("replay_dead_letters")
    monkeypatch.undo()

    wait_until(lambda: deadletters.count() == 1)
