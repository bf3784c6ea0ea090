"""VOTER_SECRET: a process with another VOTER_SECRET is noticed, and a VOTER_SECRET is changed while polls are open."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import transaction
from django.utils.timezone import now

from polls import accounts, codes, keys, networks, receipts, voter_secrets
from polls.bundles import AcceptedVote
from polls.journal import Act
from polls.keys import Keys
from polls.models import NetworkSecret, Poll, VoterCode, VoterSecret
from polls.problems import Refusal
from polls.snapshots import PollSnapshot
from polls.voters import account_of, is_voter_token, new_voter_token
from tests.conftest import ROOT, Api, database_url, free_port, make_user, process, wait_until, web, worker

NEW = "the secret after the one of the tests, of more than fifty characters"


@pytest.fixture
def undone() -> Iterator[None]:
    """What the test does to the database's secrets is undone: the other tests' processes live on it."""
    with transaction.atomic():
        yield
        transaction.set_rollback(True)
    networks.cipher_of.cache_clear()


def have(monkeypatch: pytest.MonkeyPatch, *secrets: str) -> None:
    """This process has these secrets, VOTER_SECRET first."""
    known = tuple(map(Keys, secrets))
    monkeypatch.setattr(keys, "KNOWN", known)
    monkeypatch.setattr(keys, "OWN", known[0])


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": database_url(), **environment}
    env["QUEUE_PREFIX"] = settings.QUEUE_PREFIX
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


# --- Another secret is noticed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["web", "worker", "periodic", "beat"])
def test_no_process_starts_with_another_secret(program, broker):
    ended = run("-m", "core", program, VOTER_SECRET=NEW)

    assert ended.returncode == 1
    assert f"VOTER_SECRET has the fingerprint {Keys(NEW).fingerprint.hex()}" in ended.stderr
    assert f"this database wants {keys.OWN.fingerprint.hex()}" in ended.stderr
    assert NEW not in ended.stderr and settings.VOTER_SECRET not in ended.stderr


@pytest.mark.parametrize("command", ["setup", "audit", f"import_votes x --poll {UUID(int=1)}", "rotate_voter_secret", "check"])
def test_no_command_works_with_another_secret(command):
    ended = run("manage.py", *command.split(), VOTER_SECRET=NEW)

    assert ended.returncode == 1
    assert "this database wants" in ended.stderr


def test_a_process_that_a_wrong_secret_got_past_takes_no_vote(monkeypatch, undone, make_poll):
    """Such as one that was started before the secret was changed."""
    poll = make_poll()
    have(monkeypatch, NEW)

    snapshot = PollSnapshot.read(str(poll.pk))

    with pytest.raises(Refusal) as refused:
        snapshot.voter_keys.of("alice")
    assert refused.value.problem.status == 503


def test_what_can_not_be_compared_stops_nobody(monkeypatch, undone):
    VoterSecret.objects.all().delete()

    assert voter_secrets.faults() == []
    assert run("manage.py", "check", DATABASE_URL=f"postgres://nobody@127.0.0.1:{free_port()}/none").returncode == 0


def test_a_database_of_before_is_not_taken_for_another_secrets(monkeypatch, undone, make_poll):
    """The first setup notes the secret, but not one that can't read the addresses that are there."""
    VoterSecret.objects.all().delete()
    assert networks.can_be_read()

    have(monkeypatch, NEW)
    networks.cipher_of.cache_clear()
    if not networks.can_be_read():
        with pytest.raises(CommandError, match="can't be read with this VOTER_SECRET"):
            call_command("setup")


def test_the_first_setup_refuses_a_secret_that_reads_no_address(monkeypatch, undone, make_poll):
    from polls.counting import count_votes
    from tests.conftest import vote_of

    poll = make_poll(voter_policy="ip")
    Poll.objects.filter(pk=poll.pk).update(network_secret_since=now() - timedelta(days=1))
    count_votes([vote_of(poll, "alice", address="192.0.2.7")])
    VoterSecret.objects.all().delete()
    NetworkSecret.objects.update(voter_secret=None)
    assert networks.can_be_read()

    have(monkeypatch, NEW)
    networks.cipher_of.cache_clear()

    assert not networks.can_be_read()


def test_a_web_process_with_another_secret_takes_no_votes_and_says_so(broker, tmp_path, make_poll):
    """One that started while the database was away, or by another door than `python -m core`."""
    port = free_port()
    command = ("uvicorn", "core.asgi:application", "--port", str(port), "--http", "core.protocol:Protocol")
    with process(*command, log=tmp_path / "web.log", VOTER_SECRET=NEW):
        wait_until(lambda: _answers(port))
        ready = Api(port, {}).get("/readyz")
    assert ready.status == 503 and "this database wants" in ready.json["parts"]["voter_secret"]


def test_an_archived_poll_needs_no_secret(monkeypatch, undone, make_poll):
    make_poll()
    Poll.objects.update(archived_at=now())
    NetworkSecret.objects.all().update(voter_secret=Keys(NEW).fingerprint)
    VoterSecret.objects.create(fingerprint=Keys(NEW).fingerprint, since=now())

    have(monkeypatch, NEW)

    assert voter_secrets.faults() == []
    assert [use.open_polls for use in voter_secrets.uses()] == [0, 0]


# --- Going over to another one ----------------------------------------------------------------------------------------


def test_a_poll_keeps_the_secret_that_it_was_made_with(monkeypatch, undone, make_poll, owner):
    before = settings.VOTER_SECRET
    election = make_poll(voter_policy="code")
    [issued] = codes.generate(election, 1, Act("olga", now()), labels=["alice"])
    token, voter = new_voter_token(election.pk), PollSnapshot.read(str(election.pk)).voter_keys.of("alice")

    have(monkeypatch, NEW, before)
    assert voter_secrets.faults() == []
    assert bytes(make_poll().voter_secret) == Keys(before).fingerprint  # until somebody says so
    assert voter_secrets.rotate(now()) and not voter_secrets.rotate(now())
    networks.rotate(now())

    old, new = PollSnapshot.read(str(election.pk)), PollSnapshot.read(str(make_poll(voter_policy="ip").pk))
    assert old.voter_keys.of("alice") == voter and is_voter_token(old.id, token, old.keys)
    assert VoterCode.objects.get(pk=issued.id).label == "alice"
    assert (old.keys.fingerprint, new.keys.fingerprint) == (Keys(before).fingerprint, Keys(NEW).fingerprint)
    assert old.network_secret != new.network_secret and old.network_keys("192.0.2.7") != new.network_keys("192.0.2.7")
    for poll in (old, new):
        _, text = poll.show(AcceptedVote(uuid4(), poll.id, voter, (1,), 1))
        assert receipts.read(text).poll_id == poll.id

    have(monkeypatch, NEW)  # too early
    assert len(voter_secrets.faults()) == 1 and Keys(before).fingerprint.hex() in voter_secrets.faults()[0]


def test_a_draft_without_codes_goes_over_and_one_with_codes_does_not(monkeypatch, undone, make_poll):
    plain, with_codes = make_poll(draft=True), make_poll(draft=True, voter_policy="code")
    codes.generate(with_codes, 1, Act("olga", now()))

    have(monkeypatch, NEW, settings.VOTER_SECRET)
    voter_secrets.rotate(now())

    plain.refresh_from_db()
    with_codes.refresh_from_db()
    assert bytes(plain.voter_secret) == Keys(NEW).fingerprint != bytes(with_codes.voter_secret)


def test_an_older_version_s_polls_are_the_oldest_secret_s(monkeypatch, undone, make_poll):
    poll = make_poll()
    Poll.objects.filter(pk=poll.pk).update(voter_secret=None)
    have(monkeypatch, NEW, settings.VOTER_SECRET)

    assert PollSnapshot.read(str(poll.pk)).keys.fingerprint == Keys(settings.VOTER_SECRET).fingerprint
    voter_secrets.rotate(now())

    poll.refresh_from_db()
    assert bytes(poll.voter_secret) == Keys(settings.VOTER_SECRET).fingerprint


def test_what_still_needs_a_secret_is_told(monkeypatch, undone, make_poll, capsys):
    make_poll()
    have(monkeypatch, NEW, settings.VOTER_SECRET)
    call_command("rotate_voter_secret")

    new, old = capsys.readouterr().out.splitlines()[-2:]
    assert new.startswith(Keys(NEW).fingerprint.hex()) and ", current: " in new
    assert old.startswith(Keys(settings.VOTER_SECRET).fingerprint.hex()) and ": 0 polls" not in old


def test_a_lost_secret_is_given_up_by_saying_so(monkeypatch, undone, make_poll, capsys):
    poll = make_poll()
    have(monkeypatch, NEW)
    with pytest.raises(CommandError, match="this database wants"):
        call_command("rotate_voter_secret")

    call_command("rotate_voter_secret", lost=True)

    assert voter_secrets.faults() == []
    with pytest.raises(Refusal):
        PollSnapshot.read(str(poll.pk)).voter_keys.of("alice")
    assert PollSnapshot.read(str(make_poll().pk)).voter_keys.of("alice")


def test_what_needs_a_secret_is_told_to_a_process_that_has_another():
    """The command would otherwise be kept from telling, and from giving the lost one up, by the check that every other one runs."""
    told = run("manage.py", "rotate_voter_secret", "--status", VOTER_SECRET=NEW)

    assert told.returncode == 0 and "not in this process's settings" in told.stdout


# --- SECRET_KEY -------------------------------------------------------------------------------------------------------


def test_who_is_signed_in_stays_so_while_the_secret_key_is_changed(pipeline, tmp_path, owner):
    person = make_user(f"rosa-{uuid4().hex[:6]}")
    tokens = accounts._issue_tokens(person)
    port = free_port()

    with web(
        port,
        tmp_path / "web.log",
        SECRET_KEY="another key, of more than fifty characters, for tests",
        SECRET_KEY_FALLBACKS=settings.SECRET_KEY,
    ):
        wait_until(lambda: _answers(port))
        api = Api(port, {})
        assert api.get("/api/v1/auth/me", authorization=f"Bearer {tokens.access}").status == 200
        renewed = api.post("/api/v1/auth/token/refresh", {"refresh": tokens.refresh})
        assert renewed.status == 200, renewed.text
        # What the new key signs is no token where it is not known yet, and nobody else's key is.
        assert account_of(tokens.access) == str(person.pk)
        assert account_of(renewed.json["access"]) is None
        forged = tokens.access[:-3] + "abc"
        assert api.get("/api/v1/auth/me", authorization=f"Bearer {forged}").status == 401


def _answers(port: int) -> bool:
    try:
        return Api(port, {}).get("/healthz").status == 200
    except OSError:
        return False


def test_a_living_service_goes_over_to_another_secret(broker, tmp_path, make_poll, client_key):
    """Real processes with both secrets: a voter of an open poll is the same voter, with the old and the new."""
    poll = make_poll()
    both: dict[str, Any] = {"VOTER_SECRET": NEW, "VOTER_SECRET_FALLBACKS": settings.VOTER_SECRET}
    first, second = free_port(), free_port()
    with (
        web(first, tmp_path / "old.log"),
        web(second, tmp_path / "new.log", **both),
        worker(",".join(settings.VOTES_QUEUES), tmp_path / "worker.log", **both),
    ):
        wait_until(lambda: _answers(first) and _answers(second))
        old, new = (Api(port, {"authorization": f"Api-Key {client_key}"}) for port in (first, second))

        cast = old.cast(poll, "alice", idempotency_key="alice-1", prefer="wait=10")
        again = new.cast(poll, "alice", idempotency_key="alice-1", prefer="wait=10")
        other = new.cast(poll, "alice", "salad", prefer="wait=10")

        assert (cast.status, again.status, other.status) == (201, 201, 409), again.text
        assert cast.json["id"] == again.json["id"]
        assert new.get(cast.json["links"]["self"]).json["status"] == "counted"
        assert old.get(again.json["links"]["self"]).json["status"] == "counted"
