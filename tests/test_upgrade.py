"""An installation of the version before goes on under this one: nothing that it left is lost, and nobody votes twice.

What it left is in tests/upgrade: its tables, the messages that waited in its queues, and what its voters hold (record.py made it there).
Knows nothing of the product's code: its commands, HTTP, the queues, and SQL.
"""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2
import pytest
from celery import current_app
from django.conf import settings
from kombu import Producer

from tests.conftest import (
    PROCESS_SETTINGS,
    ROOT,
    WEB_ROLE,
    WORKER_ROLE,
    Answer,
    Api,
    answers,
    database_url,
    free_port,
    process,
    queues_of_their_own,
    wait_until,
    web,
    worker,
)

BEFORE = Path(__file__).parent / "upgrade"
POLICIES = ("ip", "session", "account", "code", "client")
# Not its accounts and not its clients' keys: what the clock would delete in time must still be there when this is run.
SETTINGS = {
    "DEBUG": "false",
    "SECURE_SSL_REDIRECT": "false",
    "ALLOWED_HOSTS": "127.0.0.1",
    "TRUSTED_PROXIES": "1",
    "OUTCOMES_KEEP_DAYS": "36500",
    "NETWORK_SECRET_ROTATE_DAYS": "36000",
    "NETWORK_SECRET_KEEP_DAYS": "36500",
}


@dataclass
class Upgraded:
    """The installation after the upgrade, and what was left by the version before."""

    port: int
    url: str
    before: dict[str, Any]
    # {receipt of before: receipts of its repeats, with the same Idempotency-Key, after the upgrade}
    repeats: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    # Receipts of votes with a key of before for another choice.
    misused: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> list[str]:
        return [receipt for again in self.repeats.values() for receipt in again]

    @property
    def stranger(self) -> Api:
        return self.api()

    @property
    def owner(self) -> Api:
        return self.api(authorization=f"Bearer {self.before['owner']}")

    def api(self, **headers: str) -> Api:
        return Api(self.port, {"x-forwarded-for": "203.0.113.1", **headers})

    def path(self, poll: str) -> str:
        return f"/api/v1/polls/{self.before['polls'][poll]['id']}"

    def cast(self, voter: str, choice: str, key: str | None = None, **headers: str) -> Answer:
        """Cast a vote, or withdraw, as this voter of before does."""
        poll, who = voter.partition("/")[0], self.before["voters"][voter]
        body = {**({"option": self.before["polls"][poll]["options"][choice]} if choice else {}), **who["body"]}
        sent = {**who["headers"], "x-forwarded-for": who["address"], **({"idempotency-key": key} if key else {}), **headers}
        return self.stranger.post(f"{self.path(poll)}/votes{'' if choice else '/withdraw'}", body, **sent)

    def repeat(self, votes: list[dict[str, Any]]) -> None:
        """Send the votes again as clients do that got no answer: the last ones first, so that a first one comes last of all."""
        for vote in reversed(votes):
            if vote["key"]:
                answer = self.cast(vote["voter"], vote["choice"], vote["key"])
                assert answer.status == 202, (vote["voter"], answer.text)
                self.repeats[vote["receipt"]].append(answer.json["receipt"])

    def repeat_batches(self) -> None:
        for batch in self.before["batches"]:
            kiosk = self.api(authorization=f"Api-Key {self.before['api_key']}")
            answer = kiosk.post(f"{self.path(batch['poll'])}/votes/batch", batch["items"], idempotency_key=batch["key"])
            assert answer.json["accepted"] == len(batch["items"]), answer.text
            for receipt, shown in zip(batch["receipts"], answer.json["votes"], strict=True):
                self.repeats[receipt].append(shown["receipt"])

    def statuses(self, receipts: list[str]) -> list[tuple[str, str | None]]:
        answer = self.stranger.post("/api/v1/votes/status", {"receipts": receipts})
        return [(status["status"], status["reason"]) for status in answer.json["votes"]]

    def wait_for(self, receipts: list[str]) -> None:
        """Wait until these votes have an outcome, nothing waits in the queues and the outbox, and a second has changed nothing."""
        wait_until(lambda: "pending" not in dict(self.statuses(receipts)), seconds=60)
        wait_until(lambda: self.waiting() == 0, seconds=60)
        known: list[Any] = []

        def is_calm():  # a worker may still hold a bundle
            known.append(self.rows("SELECT revision, votes FROM tallies ORDER BY id"))
            return len(known) > 20 and known[-1] == known[-20]

        wait_until(is_calm)

    def waiting(self) -> int:
        """Bundles in the queues and in the outbox."""
        [(kept,)] = self.rows("SELECT count(*) FROM outbox")
        with current_app.connection_for_read() as connection:
            return kept + sum(connection.default_channel.queue_declare(name, passive=True).message_count for name in settings.VOTES_QUEUES)

    def tallies(self, poll: str) -> Counter[str]:
        """{option: votes}, as the owner sees them."""
        texts = {option: text for text, option in self.before["polls"][poll]["options"].items()}
        shown = self.owner.get(f"{self.path(poll)}/results").json["options"]
        return Counter({texts[option["id"]]: option["votes"] for option in shown if option["votes"]})

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return execute(self.url, query)


def execute(url, statement):
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture(scope="module")
def before():
    return json.loads((BEFORE / "before.json").read_text())


@pytest.fixture(scope="module")
def old_database():
    """A database with the tables of before: (name, {role: URL})."""
    name = f"upgraded_{os.getpid()}"
    execute(database_url(), f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    execute(database_url(), f"CREATE DATABASE {name}")
    urls = {role: urlunsplit(urlsplit(database_url(role))._replace(path=f"/{name}")) for role in (None, WEB_ROLE, WORKER_ROLE)}
    try:
        execute(urls[None], gzip.decompress((BEFORE / "before.sql.gz").read_bytes()).decode())
        yield urls
    finally:
        execute(database_url(), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def upgraded(broker, before, old_database, tmp_path_factory):
    """The upgrade as operations.md has it: `setup`, then the new processes; the queues and the outbox are as they were left.

    On the way, every vote of before is repeated twice: before its first copy has left queue and outbox, and afterwards.
    """
    logs, port, urls = tmp_path_factory.mktemp("upgrade"), free_port(), old_database
    environment = {**SETTINGS, **before["secrets"]}
    with queues_of_their_own(), ExitStack() as running:
        set_up(urls[None], environment)
        running.enter_context(web(port, logs / "web.log", **environment, DATABASE_URL=urls[WEB_ROLE]))
        counts = {**environment, "DATABASE_URL": urls[WORKER_ROLE]}
        running.enter_context(worker(",".join([*settings.VOTES_QUEUES, settings.PERIODIC_QUEUE]), logs / "worker.log", **counts))
        wait_until(lambda: answers(port))
        installation = Upgraded(port, urls[None], before)

        open_votes = [vote for vote in before["votes"] if not vote["voter"].startswith("closed/")]
        installation.repeat(open_votes)
        installation.repeat_batches()
        misused = [installation.cast(voter, "stew", key).json["receipt"] for voter, key in misuses(before)]
        wait_until(lambda: "pending" not in dict(installation.statuses(installation.repeated + misused)), seconds=60)

        put_back(before["messages"])
        running.enter_context(process("celery", "-A", "core", "beat", "--pidfile=", log=logs / "beat.log", **counts))
        installation.wait_for([vote["receipt"] for vote in before["votes"]] + batched(before))

        installation.repeat(open_votes)
        installation.repeat_batches()
        misused += [installation.cast(voter, "stew", key).json["receipt"] for voter, key in misuses(before)]
        installation.wait_for(installation.repeated + misused)
        installation.misused = misused
        yield installation


def set_up(url, environment):
    own = {"DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": url, "QUEUE_PREFIX": settings.QUEUE_PREFIX}
    roles = {"WEB_DATABASE_ROLE": WEB_ROLE, "WORKER_DATABASE_ROLE": WORKER_ROLE}
    env = {**os.environ, **own, **PROCESS_SETTINGS, **environment, **roles}
    ended = subprocess.run([sys.executable, "-m", "core", "setup"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-500:]


def batched(before):
    return [receipt for batch in before["batches"] for receipt in batch["receipts"]]


def misuses(before):
    """Voters whose vote of before is in the database, and in the queue; with its key they now choose something else."""
    return [(f"change-{policy}/{name}", f"{name}-1") for policy in POLICIES for name in ("misuser", "late-misuser")]


def put_back(messages):
    """Put the messages of before into the queues, as the version before left them there."""
    with current_app.connection_for_write(transport_options={"confirm_publish": True}) as connection:
        producer = Producer(connection.default_channel)
        for message in messages:
            queue = f"{settings.QUEUE_PREFIX}{message['queue']}"
            producer.publish(message["body"], routing_key=queue, headers=message["headers"], delivery_mode=2, **message["properties"])


# --- Nothing is lost --------------------------------------------------------------------------------------------------


def test_every_receipt_of_before_tells_what_became_of_its_vote(upgraded, before):
    votes = before["votes"]
    told = upgraded.statuses([vote["receipt"] for vote in votes])

    wrong = [
        (vote["voter"], vote["expected"], status) for vote, status in zip(votes, told, strict=True) if tuple(vote["expected"]) != status
    ]
    assert wrong == []
    assert {status for _, status in zip(votes, told, strict=True)} >= {
        ("counted", None),
        ("rejected", "duplicate"),
        ("superseded", "changed"),
    }
    assert set(upgraded.statuses(batched(before))) == {("counted", None)}
    one = upgraded.stranger.get(f"/api/v1/votes/{votes[0]['receipt']}")
    assert (one.status, one.json["status"]) == (200, "counted")


def standing(before, poll):
    """{option: votes}, by what was cast before and what is expected of it."""
    votes = [vote for vote in before["votes"] if vote["voter"].startswith(f"{poll}/")]
    return Counter(vote["choice"] for vote in votes if vote["expected"][0] == "counted" and vote["choice"])


def test_the_results_are_what_was_cast_before_whatever_was_repeated_since(upgraded, before):
    polls = [poll for poll in before["polls"] if poll != "batch"]
    assert {poll.rpartition("-")[2] for poll in polls} > set(POLICIES)

    assert {poll: upgraded.tallies(poll) for poll in polls} == {poll: standing(before, poll) for poll in polls}
    assert upgraded.tallies("batch") == {"soup": 3, "salad": 2, "stew": 5}


def test_the_tallies_equal_the_votes(upgraded, before):
    for poll, known in before["polls"].items():
        votes = [selection for (selection,) in upgraded.rows(f"SELECT selection FROM votes WHERE poll_id = '{known['id']}'")]
        counted = Counter(str(option) for selection in votes for option in selection)
        shown = upgraded.owner.get(f"{upgraded.path(poll)}/results").json
        assert {option["id"]: option["votes"] for option in shown["options"] if option["votes"]} == counted, poll
        assert upgraded.owner.get(f"{upgraded.path(poll)}/integrity").json["is_exact"], poll


def test_nothing_waits_any_more(upgraded):
    assert upgraded.rows("SELECT count(*) FROM outbox") == [(0,)]
    with current_app.connection_for_read() as connection:
        queues = [*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE]
        assert [connection.default_channel.queue_declare(queue, passive=True).message_count for queue in queues] == [0, 0, 0]


# --- Nobody votes twice -----------------------------------------------------------------------------------------------


def test_a_repeat_across_the_upgrade_meets_its_first_copy(upgraded, before):
    """Whether that was counted, or still in the queue or the outbox when the repeat came; and its receipt tells the same."""
    keyed = [vote for vote in before["votes"] if vote["key"] and vote["receipt"] in upgraded.repeats]
    assert len(keyed) > 50

    wrong = []
    for vote in keyed:
        assert len(upgraded.repeats[vote["receipt"]]) == 2
        for status, _ in upgraded.statuses(upgraded.repeats[vote["receipt"]]):
            if (status == "counted") != (vote["expected"][0] == "counted") and status != vote["expected"][0]:
                wrong.append((vote["voter"], vote["key"], vote["expected"], status))
    assert wrong == []
    assert {status for receipt in batched(before) for status in upgraded.statuses(upgraded.repeats[receipt])} == {("counted", None)}


def test_a_key_of_before_with_another_choice_changes_nothing(upgraded):
    """Neither after its first copy was counted nor before that has left the queue: all of them chose stew, as only dave had."""
    assert len(upgraded.misused) == 4 * len(POLICIES)
    assert {policy: upgraded.tallies(f"change-{policy}")["stew"] for policy in POLICIES} == dict.fromkeys(POLICIES, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_voter_of_before_is_the_same_voter(upgraded, policy):
    """By address, token, account, code and reference, whether the vote of before was counted, queued or in the outbox."""
    poll = f"first-{policy}"
    shown = upgraded.tallies(poll)

    for name in ("alice", "bob", "carol", "dave", "erin"):
        again = upgraded.cast(f"{poll}/{name}", "stew", f"{name}-again", prefer="wait=8")
        assert (again.status, again.json["type"]) == (409, "/problems/duplicate"), (name, again.text)

    assert upgraded.rows(f"SELECT count(*) FROM votes WHERE poll_id = '{upgraded.before['polls'][poll]['id']}'") == [(shown.total(),)]
    assert upgraded.tallies(poll) == shown


@pytest.mark.parametrize("policy", POLICIES)
def test_who_had_not_voted_before_still_may_and_who_may_change_does(upgraded, policy):
    first, change = f"first-{policy}", f"change-{policy}"
    before = {poll: upgraded.tallies(poll) for poll in (first, change)}

    assert upgraded.cast(f"{first}/unused", "stew", prefer="wait=8").json["status"] == "counted"
    assert upgraded.cast(f"{change}/unused", "stew", prefer="wait=8").json["status"] == "counted"
    assert upgraded.cast(f"{change}/erin", "stew", prefer="wait=8").json["status"] == "counted"  # her salad was in the queue
    assert upgraded.cast(f"{change}/misuser", "", prefer="wait=8").json["status"] == "counted"

    wait_until(lambda: upgraded.tallies(first) == before[first] + Counter(stew=1))
    wait_until(lambda: upgraded.tallies(change) == before[change] + Counter(stew=2) - Counter(salad=1) - Counter(soup=1))


# --- What else goes on ------------------------------------------------------------------------------------------------


def test_an_election_that_ended_before_has_ended(upgraded, before):
    late = upgraded.cast("closed/unused", "stew", prefer="wait=8")
    assert (late.status, late.json["type"]) == (409, "/problems/poll-closed")

    shown = upgraded.stranger.get(f"{upgraded.path('closed')}/results")
    assert (shown.status, shown.json["status"] in ("closing", "final")) == (200, True)
    assert upgraded.tallies("closed") == {"soup": 1, "salad": 2}
    codes = upgraded.owner.get(f"{upgraded.path('closed')}/codes")
    assert {code["label"] for code in codes.json["results"]} == {f"label of {name}" for name in ("alice", "bob", "carol", "unused")}
    assert upgraded.owner.get(f"{upgraded.path('closed')}/codes/counts").json["used"] == 3


def test_a_receipt_of_before_opens_the_results_that_are_for_voters(upgraded, before):
    for policy in POLICIES:
        [receipt] = [vote["receipt"] for vote in before["votes"] if (vote["voter"], vote["choice"]) == (f"change-{policy}/dave", "stew")]
        results = f"{upgraded.path(f'change-{policy}')}/results"
        assert upgraded.stranger.get(results).status == 403
        assert upgraded.stranger.get(results, vote_receipt=receipt).status == 200


def test_an_address_of_before_still_counts_against_its_limit(upgraded, before):
    token = upgraded.stranger.post("/api/v1/voters", {"poll": before["polls"]["limited"]["id"]}).json["token"]
    address = before["voters"]["limited/alice"]["address"]
    vote = {"option": before["polls"]["limited"]["options"]["stew"]}

    beyond = upgraded.stranger.post(f"{upgraded.path('limited')}/votes", vote, voter_token=token, x_forwarded_for=address)
    elsewhere = upgraded.stranger.post(f"{upgraded.path('limited')}/votes", vote, voter_token=token, prefer="wait=8")

    assert beyond.json["type"] == "/problems/limit-reached"
    assert elsewhere.json["status"] == "counted"


def test_a_ruling_of_before_is_in_force_and_can_be_taken_back(upgraded, before):
    operator = upgraded.stranger.post("/api/v1/auth/token", {"username": "oscar", "password": before["password"]})
    oscar = upgraded.api(authorization=f"Bearer {operator.json['access']}")
    held = next(vote["receipt"] for vote in before["votes"] if vote["voter"] == "reviewed/alice")
    assert upgraded.tallies("reviewed") == {"soup": 2}

    address = before["voters"]["reviewed/alice"]["address"]
    ruled = oscar.post(f"{upgraded.path('reviewed')}/rulings", {"ruling": "release", "address": address, "reason": "It was fine."})

    assert ruled.status == 201, ruled.text
    assert upgraded.statuses([held]) == [("counted", None)]
    # The results don't show it yet: the difference would be one voter's choice.
    assert upgraded.tallies("reviewed") == {"soup": 2}
    poll = before["polls"]["reviewed"]["id"]
    assert upgraded.rows(f"SELECT sum(votes) FROM tallies WHERE poll_id = '{poll}' AND selection <> '{{}}'") == [(3,)]


def test_keys_tokens_and_passwords_of_before_work(upgraded, before):
    key = upgraded.api(authorization=f"Api-Key {before['api_key']}")

    assert key.get(f"{upgraded.path('change-ip')}/results").status == 200
    assert upgraded.owner.get("/api/v1/auth/me").json["username"] == "olga"
    assert upgraded.stranger.post("/api/v1/auth/token", {"username": "olga", "password": before["password"]}).status == 200


def test_setting_up_again_changes_nothing(upgraded, before, old_database):
    """As after a rollback of the deployment and a second try."""
    count = "SELECT (SELECT count(*) FROM votes), (SELECT count(*) FROM outcomes), (SELECT sum(votes) FROM tallies)"
    counted = upgraded.rows(count)

    set_up(old_database[None], {**SETTINGS, **before["secrets"]})

    assert upgraded.rows(count) == counted
