"""Nobody who watches learns what somebody chose: a thousand votes by known choice, and all that is seen of them from outside.

Knows nothing of the product's code: HTTP, log files, Flower's API, and the tables as a dump has them. The attacks are in secrecy.py.
"""

import json
import random
import re
from base64 import b64encode
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
from celery import current_app
from django.conf import settings
from django.db import connection
from kombu import Producer

from tests import secrecy
from tests.conftest import PASSWORD, Answer, Api, answers, free_port, make_user, process, queues_of_their_own, wait_until, web, worker
from tests.secrecy import Dump, Seen

POLICIES = ("ip", "session", "account", "code", "client")
VOTERS = 100  # of each policy; each votes in a poll of a single choice and in one of approval
# Which ballots there are in each of the polls, by the places of the options.
CHOICES = {"single": [(0,), (1,), (2,), (3,)], "approval": [(0,), (1, 2), (0, 2, 3), (4,)]}
OPTIONS = {"single": 4, "approval": 5}
# The fewest voters by whom two things that are shown may differ.
CROWD = 10
# Who an operator, or a rule, looks at by himself.
SINGLED_OUT = 10
AT_ONCE = 8


@dataclass
class Poll:
    id: str
    method: str
    policy: str
    options: list[int]
    title: str

    def selection(self, choice: int) -> tuple[int, ...]:
        return tuple(sorted(self.options[place] for place in CHOICES[self.method][choice]))

    @property
    def option_ids(self) -> set[str]:
        return {str(option) for option in self.options}

    @property
    def path(self) -> str:
        return f"/api/v1/polls/{self.id}"


@dataclass
class Ballot:
    """A vote as it was sent, and what came back."""

    poll: Poll
    voter: str
    address: str
    choice: int
    key: str
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, str] = field(default_factory=dict)
    label: str = ""
    code_id: str = ""
    secret: str = ""  # what only the voter knows: a code, a token
    answer: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""
    traits: dict[str, Any] = field(default_factory=dict)

    @property
    def selection(self) -> tuple[int, ...]:
        return self.poll.selection(self.choice)

    @property
    def options(self) -> dict[str, Any]:
        chosen = [str(option) for option in self.selection]
        return {"option": chosen[0]} if self.poll.method == "single" else {"options": chosen}

    @property
    def artefacts(self) -> dict[str, bytes]:
        named = {"id": self.answer["id"], "receipt": self.answer["receipt"], "request id": self.request_id}
        return {name: secrecy.bytes_of(text) for name, text in named.items() if text}

    @property
    def names(self) -> set[str]:
        """By what the vote is called in logs."""
        return {self.answer["id"], self.answer["id"].replace("-", ""), self.answer["receipt"]} | ({self.request_id} - {""})

    def seen(self) -> Seen:
        return Seen(self.poll.id, self.choice, self.selection, self.key, self.artefacts, self.traits)


@dataclass
class Installation:
    """Running processes, and the people who look at them."""

    port: int
    flower: Api
    logs: Any
    people: dict[str, Api] = field(default_factory=dict)

    def api(self, address: str, **headers: str) -> Api:
        return Api(self.port, {"x-forwarded-for": address, **headers})

    def sign_in(self, name: str) -> Api:
        tokens = self.api("203.0.113.1").post("/api/v1/auth/token", {"username": name, "password": PASSWORD})
        return self.api("203.0.113.1", authorization=f"Bearer {tokens.json['access']}")

    def make_poll(self, policy: str, method: str = "single", **fields: Any) -> Poll:
        title = f"Lunch {uuid4().hex[:8]}"
        wanted = {
            "title": title,
            "voter_policy": policy,
            "method": method,
            "options": [{"text": f"dish {place}"} for place in range(OPTIONS[method])],
            "closes_at": (datetime.now(UTC) + timedelta(days=1)).isoformat(),
            **({"max_choices": 3} if method == "approval" else {}),
            **fields,
        }
        made = self.people["owner"].post("/api/v1/polls", wanted)
        assert made.status == 201, made.text
        return Poll(made.json["id"], method, policy, [int(option["id"]) for option in made.json["options"]], title)

    def cast(self, ballot: Ballot, **headers: str) -> Answer:
        """Cast it, and keep what was answered."""
        sent = {**ballot.headers, "idempotency-key": ballot.key, **headers}
        answer = self.api(ballot.address).post(f"{ballot.poll.path}/votes", {**ballot.options, **ballot.body}, **sent)
        assert answer.status in (201, 202), answer.text
        ballot.answer, ballot.request_id = answer.json, answer.headers.get("x-request-id", "")
        # Headers that go by time or by number tell nothing of a choice, but would look new in each answer.
        shown = sorted(name.lower() for name in answer.headers)
        ballot.traits |= {"answer": (answer.status, len(answer.text), *shown), "request id's length": len(ballot.request_id)}
        return answer

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.logs.glob("*.log")))


@pytest.fixture(scope="module")
def installation(broker, tmp_path_factory):
    """Production at its most talkative, behind a proxy that says who calls."""
    logs, port, flower_port, login = tmp_path_factory.mktemp("secrecy"), free_port(), free_port(), f"flower:{uuid4()}"
    environment = {
        "DEBUG": "false",
        "SECRET_KEY": settings.SECRET_KEY,
        "VOTER_SECRET": settings.VOTER_SECRET,
        "ALLOWED_HOSTS": "127.0.0.1",
        "SECURE_SSL_REDIRECT": "false",
        "TRUSTED_PROXIES": "1",
        "LOG_LEVEL": "DEBUG",
        "RESULTS_CACHE_SECONDS": "0.01",  # who looks again sees each change
    }
    with connection.cursor() as cursor:  # so that an option's id is no number that occurs by itself
        cursor.execute("SELECT setval(pg_get_serial_sequence('options', 'id'), 719283645)")
    with queues_of_their_own(), ExitStack() as running:
        running.enter_context(web(port, logs / "web.log", **environment))
        running.enter_context(worker(",".join([*settings.VOTES_QUEUES, settings.PERIODIC_QUEUE]), logs / "worker.log", **environment))
        shows = f"celery -A core flower --conf=core/flower_config.py --address=127.0.0.1 --port={flower_port}"
        running.enter_context(process(*shows.split(), log=logs / "flower.log", **environment, FLOWER_BASIC_AUTH=login))
        flower = Api(flower_port, {"authorization": f"Basic {b64encode(login.encode()).decode()}"})
        wait_until(lambda: answers(port))
        wait_until(lambda: _sees_workers(flower))
        found = Installation(port, flower, logs)
        for role in ("owner", "operator", "auditor"):
            found.people[role] = found.sign_in(make_user(f"{role}-{uuid4().hex[:8]}", role).username)
        found.people["stranger"] = found.api("203.0.113.9")
        yield found


def _sees_workers(flower):
    try:
        return flower.get("/workers?json=1").json["data"]
    except OSError:
        return False


# --- A thousand votes -------------------------------------------------------------------------------------------------


@dataclass
class Collection:
    """All that was seen of a thousand votes, and the truth about them."""

    ballots: list[Ballot]
    # With a key that was used before, for another choice; and withdrawals.
    misused: list[Ballot]
    withdrawn: list[Ballot]
    log: str
    # {page: text}, while votes were cast and afterwards.
    flower: dict[str, str]
    # {(person, poll id): what their results said meanwhile}
    results: dict[tuple[str, str], list[Answer]]
    dump: Dump

    def of(self, policy: str, method: str = "single") -> list[Ballot]:
        return [ballot for ballot in self.ballots if (ballot.poll.policy, ballot.poll.method) == (policy, method)]


@pytest.fixture(scope="module")
def collection(installation):
    chance = random.Random(719)  # whoever repeats a run wants the same choices
    polls = {(policy, method): installation.make_poll(policy, method, **_shown_to(method)) for policy in POLICIES for method in CHOICES}
    ballots = _voters(installation, polls)
    for ballot in ballots:
        ballot.choice = chance.randrange(len(CHOICES[ballot.poll.method]))
    chance.shuffle(ballots)
    in_batches = [ballot for ballot in ballots if (ballot.poll.policy, ballot.poll.method) == ("client", "approval")]

    results: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    flower: dict[str, str] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        casting = [pool.submit(installation.cast, ballot) for ballot in ballots if ballot not in in_batches]
        while not all(vote.done() for vote in casting):
            for poll in polls.values():
                results["stranger", poll.id].append(installation.people["stranger"].get(f"{poll.path}/results"))
            flower |= {f"meanwhile {path}": text for path, text in _pages(installation.flower).items()}
        for vote in casting:
            vote.result()
    _cast_as_batch(installation, in_batches)
    misused, withdrawn = _cast_again(installation, chance)
    everybody = [*ballots, *misused, *withdrawn]
    _ask_what_became(installation, everybody)
    flower |= {f"afterwards {path}": text for path, text in _pages(installation.flower).items()}
    log = installation.log()
    _read_log(log, everybody)
    return Collection(ballots, misused, withdrawn, log, flower, results, _dump({ballot.poll.id for ballot in everybody}))


def _shown_to(method):
    return {"results_visibility": "owner" if method == "approval" else "after_close"}


def _voters(installation, polls):
    """A ballot for each voter in each of two polls; nobody has chosen yet."""
    stranger, owner = installation.people["stranger"], installation.people["owner"]
    made = owner.post("/api/v1/clients", {"name": f"kiosk {uuid4().hex[:6]}", "scopes": ["votes:cast"]})
    kiosk = {"authorization": f"Api-Key {made.json['key']}"}
    ballots = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        accounts = list(pool.map(lambda number: _account(installation, number), range(VOTERS)))
        for (policy, _), poll in polls.items():
            for number in range(VOTERS):
                name = f"alice-{poll.method}-{policy}-{number}"
                # Half of the keys can be guessed, as those of the documentation can.
                key = f"alice-{number}" if number % 2 else str(uuid4())
                ballots.append(Ballot(poll, name, f"198.51.{100 + POLICIES.index(policy)}.{number + 1}", -1, key))
            mine = ballots[-VOTERS:]
            if policy == "session":
                tokens = pool.map(lambda _, poll=poll: stranger.post("/api/v1/voters", {"poll": poll.id}).json["token"], mine)
                for ballot, token in zip(mine, tokens, strict=True):
                    ballot.headers, ballot.secret = {"voter-token": token}, token
            elif policy == "account":
                for ballot, (name, token) in zip(mine, accounts, strict=True):
                    ballot.headers, ballot.voter = {"authorization": f"Bearer {token}"}, name
            elif policy == "code":
                labels = [f"member no. {ballot.voter}" for ballot in mine]
                issued = owner.post(f"{poll.path}/codes", {"generate": VOTERS, "labels": labels}).json["codes"]
                for ballot, code in zip(mine, issued, strict=True):
                    ballot.body, ballot.secret, ballot.label = {"code": code["code"]}, code["code"], code["label"]
            elif policy == "client":
                for ballot in mine:
                    ballot.headers, ballot.body = kiosk, {"voter": ballot.voter}
    return ballots


def _account(installation, number):
    name, anybody = f"alice-{uuid4().hex[:8]}", installation.api(f"203.0.113.{number + 1}")
    assert anybody.post("/api/v1/auth/register", {"username": name, "email": f"{name}@example.org", "password": PASSWORD}).status == 201
    return name, anybody.post("/api/v1/auth/token", {"username": name, "password": PASSWORD}).json["access"]


def _cast_as_batch(installation, ballots):
    """Half with keys of their own, half with the batch's."""
    poll, kiosk = ballots[0].poll, installation.api("203.0.113.2", **ballots[0].headers)
    for mine, has_keys in ((ballots[::2], True), (ballots[1::2], False)):
        items = [{**ballot.options, **ballot.body, **({"idempotency_key": ballot.key} if has_keys else {})} for ballot in mine]
        answer = kiosk.post(f"{poll.path}/votes/batch", items, idempotency_key="batch-1")
        assert answer.json["accepted"] == len(mine), answer.text
        for ballot, shown in zip(mine, answer.json["votes"], strict=True):
            ballot.answer, ballot.key = shown, ballot.key if has_keys else ""


def _cast_again(installation, chance):
    """Votes with a key that was used for another choice, and withdrawals."""
    poll = installation.make_poll("session", allow_withdrawal=True, allow_change=True)
    misused, withdrawn = [], []
    for number in range(40):
        token = installation.people["stranger"].post("/api/v1/voters", {"poll": poll.id}).json["token"]
        first = chance.randrange(4)
        for choice in (first, (first + chance.randrange(1, 4)) % 4):
            ballot = Ballot(poll, f"bob-{number}", f"192.0.2.{number + 1}", choice, f"bob-{number}", {"voter-token": token})
            installation.cast(ballot)
        misused.append(ballot)
        if number % 2:
            ballot = Ballot(poll, f"bob-{number}", f"192.0.2.{number + 1}", -1, f"bob-{number}-back", {"voter-token": token})
            answer = installation.api(ballot.address).post(f"{poll.path}/votes/withdraw", {}, idempotency_key=ballot.key, **ballot.headers)
            ballot.answer, ballot.request_id = answer.json, answer.headers.get("x-request-id", "")
            withdrawn.append(ballot)
    return misused, withdrawn


def _ask_what_became(installation, ballots):
    """Wait until all are counted; keep what their receipts say then."""
    stranger, statuses = installation.people["stranger"], {}
    receipts = [ballot.answer["receipt"] for ballot in ballots]

    def decided():
        for start in range(0, len(receipts), 500):
            some = receipts[start : start + 500]
            statuses.update(zip(some, stranger.post("/api/v1/votes/status", {"receipts": some}).json["votes"], strict=True))
        return all(status["status"] != "pending" for status in statuses.values())

    wait_until(decided, seconds=60)
    for ballot in ballots:
        status = statuses[ballot.answer["receipt"]]
        ballot.traits["status"] = (status["status"], status["reason"], len(json.dumps(status)))
        ballot.answer["id"] = status["id"]


def _pages(flower):
    paths = ["/tasks", "/broker", "/metrics", "/api/tasks?limit=1000", "/api/task/types", "/api/workers"]
    return {path: flower.get(path).text for path in paths}


_TOKEN = re.compile(r"[0-9A-Za-z_-]{8,}|\d+")


def _read_log(log, ballots):
    """What lines about a vote look like, without their names and numbers."""
    by_name = {name: ballot for ballot in ballots for name in ballot.names}
    said = defaultdict(list)
    for line in log.splitlines():
        for ballot in {id(ballot): ballot for token in _TOKEN.findall(line) if (ballot := by_name.get(token))}.values():
            said[id(ballot)].append(_TOKEN.sub("#", line))
    for ballot in ballots:
        lines = said[id(ballot)]
        ballot.traits["log"] = (len(lines), *sorted(Counter(lines).items()))


def _dump(polls):
    """All rows of all tables, as `pg_dump` copies them; of those that belong to polls, ours."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'")
        tables = {}
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT * FROM "{table}" LIMIT 0')
            columns = [column.name for column in cursor.description]
            ours = "WHERE poll_id = ANY(%s::uuid[])" if "poll_id" in columns else ""
            cursor.execute(f'SELECT * FROM "{table}" {ours}', [list(polls)] if ours else None)
            tables[table] = [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]
    return Dump(tables)


def test_the_votes_are_counted_as_they_were_cast(collection, installation):
    """Else the attacks below would be on nothing."""
    assert len(collection.ballots) == 2 * len(POLICIES) * VOTERS == 1000
    assert {ballot.traits["status"][0] for ballot in collection.ballots} == {"counted"}
    assert "counted" not in {ballot.traits["status"][0] for ballot in collection.misused}
    for poll in {ballot.poll.id: ballot.poll for ballot in collection.ballots}.values():
        mine = Counter(option for ballot in collection.ballots if ballot.poll is poll for option in ballot.selection)
        shown = installation.people["owner"].get(f"{poll.path}/results").json["options"]
        assert {int(option["id"]): option["votes"] for option in shown if option["votes"]} == mine


# --- Ids, receipts, request ids, logs ---------------------------------------------------------------------------------


def _marks(poll):
    return {mark: chosen for chosen in secrecy.subsets(poll.options) for mark in secrecy.marks_of(chosen)}


def test_no_id_receipt_request_id_or_status_holds_an_unkeyed_hash_of_the_choice(collection):
    marks = {ballot.poll.id: _marks(ballot.poll) for ballot in [*collection.ballots, *collection.misused]}

    read = []
    for ballot in [*collection.ballots, *collection.misused, *collection.withdrawn]:
        truth = () if ballot.choice < 0 else ballot.selection
        read += [truth in secrecy.read_by_marks(ballot.artefacts.values(), marks[ballot.poll.id])]

    # Chance gives less than one: 2 ** 32 marks, some dozens of thousands of tries for a vote.
    assert sum(read) <= 2, f"{sum(read)} of {len(read)} choices were read"


def test_no_line_of_a_log_holds_one(collection):
    """At DEBUG, with the lines about votes that do not stand."""
    marks = _marks(collection.misused[0].poll)
    by_id = {ballot.answer["id"]: ballot for ballot in [*collection.misused, *collection.withdrawn]}

    lines = read = 0
    for line in collection.log.splitlines():
        named = [ballot for token in _TOKEN.findall(line) if (ballot := by_id.get(token))]
        if named:
            truth = () if named[0].choice < 0 else named[0].selection
            lines += 1
            read += truth in secrecy.read_by_marks(map(secrecy.bytes_of, set(_TOKEN.findall(line))), marks)

    assert lines >= len(by_id)
    assert read <= 2, f"{read} of {lines} lines tell a choice"


def test_no_line_of_a_log_names_a_choice_or_a_voter(collection):
    # Voters and keys, labels, addresses, options: each by how all of them begin.
    private = {"alice-", "bob-", "member no.", "198.51.", "192.0.2.", "719283"}
    private |= {text for ballot in collection.ballots for text in (ballot.secret, ballot.answer["receipt"]) if text}

    assert [text for text in private if text in collection.log] == []


@pytest.fixture(scope="module")
def learned(collection):
    return secrecy.learn(ballot.seen() for ballot in collection.ballots)


def test_a_classifier_guesses_no_better_than_by_the_shares(learned):
    guess = secrecy.classify(learned, share=1 / len(CHOICES["single"]))

    assert not guess.beats_luck, str(guess)


def test_votes_for_the_same_share_no_bytes_more_often_than_others(learned):
    found = secrecy.shared_more_often(learned)

    assert found == [], f"{len(found)} windows, such as {found[0]}"


def test_nobody_confirms_a_guess_of_an_idempotency_key(collection):
    guessable = [ballot for ballot in collection.ballots if ballot.key.startswith("alice-")][:60]

    confirmed = [ballot for ballot in guessable if secrecy.confirms(b"".join(ballot.artefacts.values()), ballot.key)]

    assert len(confirmed) == 0, f"{len(confirmed)} of {len(guessable)} guesses were confirmed"


# --- Flower, and results meanwhile ------------------------------------------------------------------------------------


def test_flower_names_no_vote_voter_or_choice(collection):
    private = {name for ballot in collection.ballots for name in ballot.names}
    private |= {text for ballot in collection.ballots for text in (ballot.voter, ballot.label, ballot.secret, *ballot.poll.option_ids)}
    private -= {""}

    assert any("votes>" in text for text in collection.flower.values())
    for page, text in collection.flower.items():
        assert private.isdisjoint(re.findall(r"[0-9A-Za-z_=.-]+", text)), page


def test_strangers_learn_nothing_from_results_that_are_not_for_them_yet(collection):
    """Also not while they change: neither by a number nor by an ETag."""
    shown = {(answer.status, answer.headers.get("etag")) for answers in collection.results.values() for answer in answers}

    assert sum(map(len, collection.results.values())) >= 20
    assert shown == {(403, None)}


# --- A dump without secrets -------------------------------------------------------------------------------------------


def test_in_a_dump_no_label_of_a_code_meets_a_choice(collection):
    labelled = [ballot for ballot in collection.ballots if ballot.label]

    met = [ballot for ballot in labelled if ballot.selection in collection.dump.selections_beside(ballot.label)]

    assert len(met) == 0, f"{len(met)} of {len(labelled)} labels meet the choice"


def test_in_a_dump_no_label_code_or_voter_token_can_be_read(collection):
    """A label that is read tells at least that its voter may vote; a code lets whoever reads it vote."""
    hidden = [text for ballot in collection.ballots for text in (ballot.label, ballot.secret, ballot.secret.replace("-", "")) if text]

    assert [text for text in hidden if collection.dump.rows_with(text)] == []


def test_in_a_dump_no_account_or_address_meets_a_choice(collection):
    known = [*collection.of("account"), *collection.of("account", "approval")]
    assert all(collection.dump.rows_with(ballot.voter) for ballot in known)

    assert [ballot for ballot in known if collection.dump.selections_beside(ballot.voter)] == []
    assert [ballot for ballot in collection.of("ip") if collection.dump.selections_beside(ballot.address)] == []


def test_in_a_dump_no_guess_of_an_idempotency_key_meets_a_choice(collection):
    guessable = {ballot.answer["id"]: ballot for ballot in collection.ballots if ballot.key.startswith("alice-")}
    rows = [row for rows in collection.dump.tables.values() for row in rows if row.get("selection")]
    parts = [(row, [secrecy.bytes_of(str(value)) for value in row.values() if len(str(value)) == 36]) for row in rows]

    of_ours = [(row, values) for row, values in parts if guessable.keys() & {str(value) for value in row.values()}][:60]
    met = [row for row, values in of_ours for key in _keys_in(row, guessable) if secrecy.confirms(b"".join(values), key, values)]

    assert len(of_ours) == 60
    assert len(met) == 0, f"{len(met)} of {len(of_ours)} votes confirm a guess"


def _keys_in(row, guessable):
    return [guessable[str(value)].key for value in row.values() if str(value) in guessable]


# --- Operators --------------------------------------------------------------------------------------------------------


def _look(installation, poll, **wanted):
    """What an operator's dry run says."""
    asked = {"ruling": "void", "dry_run": True, "reason": "A look.", **wanted}
    return installation.people["operator"].post(f"{poll.path}/rulings", asked)


def _moment(ballot, microseconds=0):
    return (datetime.fromisoformat(ballot.answer["accepted_at"]) + timedelta(microseconds=microseconds)).isoformat()


def test_no_dry_run_on_one_address_tells_a_choice(collection, installation):
    for method in CHOICES:
        for ballot in collection.of("ip", method)[:SINGLED_OUT]:
            looked = _look(installation, ballot.poll, address=ballot.address)

            assert secrecy.counted_in(looked.json, ballot.poll.option_ids) == set(), looked.text


@pytest.mark.parametrize("policy", POLICIES)
def test_no_dry_run_on_a_moment_tells_a_choice(collection, installation, policy):
    for ballot in collection.of(policy)[:SINGLED_OUT]:
        looked = _look(installation, ballot.poll, accepted_from=_moment(ballot), accepted_until=_moment(ballot, 1))

        assert secrecy.counted_in(looked.json, ballot.poll.option_ids) == set(), looked.text


def _changes(looked):
    """{option id: by how many votes it would change}, of a look that tells it."""
    told = looked.json.get("changes") if looked.status == 200 else None
    return Counter({option: change[1] - change[0] for option, change in (told or {}).items() if change})


def _difference(one, other):
    """By how many votes two looks differ."""
    return sum(abs(one[option] - other[option]) for option in one.keys() | other.keys())


def test_no_two_dry_runs_differ_by_a_few_voters(collection, installation):
    """Of time until just before a vote, and until just after it."""
    votes = sorted(collection.of("session"), key=_moment)
    begin = _moment(votes[0])

    looks = [_look(installation, ballot.poll, accepted_from=begin, accepted_until=_moment(ballot)) for ballot in votes[40:60]]
    told = [_changes(look) for look in looks if _changes(look)]

    few = [step for one, other in pairwise(told) if 0 < (step := _difference(one, other)) < CROWD]
    assert few == [], f"{len(few)} of {len(told) - 1} steps tell the vote between them"


def test_no_dry_runs_leave_a_few_voters_out_of_all(collection, installation):
    """Of time before a vote and after it: together they are all but one."""
    votes = sorted(collection.of("account"), key=_moment)
    poll, begin, end = votes[0].poll, _moment(votes[0]), _moment(votes[-1], 1)

    whole, read = _changes(_look(installation, poll, accepted_from=begin, accepted_until=end)), 0
    for ballot in votes[40 : 40 + SINGLED_OUT]:
        before = _changes(_look(installation, poll, accepted_from=begin, accepted_until=_moment(ballot)))
        after = _changes(_look(installation, poll, accepted_from=_moment(ballot, 1), accepted_until=end))
        if before and after:
            read += 0 < _difference(whole, Counter(_sum(before, after))) < CROWD

    assert read == 0, f"{read} of {SINGLED_OUT} votes were read"


def _sum(one, other):
    return {option: one[option] + other[option] for option in one.keys() | other.keys()}


@dataclass
class Held:
    """A poll in which an operator held one voter after the other, and what was shown of it."""

    poll: Poll
    ruled: list[Answer]
    # {door: what the results said was under review, after each ruling}
    compared: dict[str, list[Counter[str]]]


@pytest.fixture(scope="module")
def held(installation):
    poll, people = installation.make_poll("ip"), installation.people
    ballots = _cast_from_addresses(installation, poll, 3 * CROWD)
    before = people["stranger"].get(f"{poll.path}/results").json
    assert before["total_votes"] == len(ballots) and before["review"] is None
    found = Held(poll, [], {"REST": [Counter()], "GraphQL": [Counter()]})
    for ballot in ballots[: CROWD + 4]:
        ruling = {"ruling": "quarantine", "address": ballot.address, "reason": "Odd."}
        found.ruled.append(people["operator"].post(f"{poll.path}/rulings", ruling))
        assert found.ruled[-1].status == 201, found.ruled[-1].text
        reviews = {
            "REST": people["stranger"].get(f"{poll.path}/results").json["review"],
            "GraphQL": _review_by_graphql(people["stranger"], poll),
        }
        for door, review in reviews.items():
            found.compared[door].append(_compared(review) or found.compared[door][-1])
    return found


def test_no_ruling_on_one_voter_tells_a_choice_to_who_rules_or_to_the_record(held, installation):
    poll, people = held.poll, installation.people

    told = {"the answer": set().union(*(secrecy.counted_in(answer.json, poll.option_ids) for answer in held.ruled))}
    for person in ("operator", "auditor"):
        told[f"rulings, to the {person}"] = secrecy.counted_in(people[person].get(f"{poll.path}/rulings").json, poll.option_ids)
    for person in ("owner", "auditor"):
        entries = people[person].get(f"{poll.path}/journal").json["results"]
        entries = [entry for entry in entries if entry["action"] != "created"]
        told[f"the journal, to the {person}"] = secrecy.counted_in(entries, poll.option_ids)

    assert [where for where, options in told.items() if options] == []


def test_no_comparison_in_the_results_differs_from_the_last_one_by_a_few_voters(held):
    """Everybody reads them; a ruling on one voter would publish his choice."""
    few = {door: sum(0 < _difference(*two) < CROWD for two in pairwise(shown)) for door, shown in held.compared.items()}

    assert few == {"REST": 0, "GraphQL": 0}, f"so many of {len(held.ruled)} tell the choice of the voter who was held last: {few}"


def test_no_line_of_a_log_tells_of_looks_and_rulings_what_they_changed(held, installation):
    assert [option for option in held.poll.option_ids if option in installation.log()] == []


def _cast_from_addresses(installation, poll, voters, **fields):
    """Count so many votes, each from another network."""
    chance = random.Random(voters)
    ballots = []
    for number in range(voters):
        ballot = Ballot(poll, "", f"198.18.{number}.7", chance.randrange(4), f"carol-{number}", **fields)
        installation.cast(ballot)
        ballots.append(ballot)
    _ask_what_became(installation, ballots)
    wait_until(lambda: installation.people["owner"].get(f"{poll.path}/results").json["total_votes"] == voters)
    return ballots


def _review_by_graphql(person, poll):
    side = "{ options { id votes } }"
    answer = person.post("/graphql", {"query": f'{{ poll(id: "{poll.id}") {{ results {{ review {{ with {side} without {side} }} }} }} }}'})
    results = ((answer.json.get("data") or {}).get("poll") or {}).get("results") or {}
    return results.get("review")


def _compared(review):
    """{option id: votes under review}, where the comparison tells it."""
    if not review or not review.get("with") or not review.get("without"):
        return None
    with_all, without_any = ({option["id"]: option["votes"] or 0 for option in review[side]["options"]} for side in ("with", "without"))
    return Counter({option: with_all[option] - without_any[option] for option in with_all})


@pytest.fixture(scope="module")
def found(installation):
    """A poll with three cases of two voters each, made by a soft limit; nobody has ruled on them. (poll, ids of the cases)"""
    people = installation.people
    poll = installation.make_poll("session", address_limit=1, limit_mode="soft", results_visibility="owner")
    for number in range(2 * CROWD):
        for _ in range(2 if number < 3 else 1):
            token = people["stranger"].post("/api/v1/voters", {"poll": poll.id}).json["token"]
            ballot = Ballot(poll, "", f"198.18.{number}.9", number % 4, str(uuid4()), {"voter-token": token})
            installation.cast(ballot, prefer="wait=8")
    assert people["owner"].get(f"{poll.path}/results").json["total_votes"] == 2 * CROWD
    cases: list[str] = []

    def are_found():
        cases[:] = [case["id"] for case in people["operator"].get(f"/api/v1/suspicious-ips?poll={poll.id}").json["results"]]
        return len(cases) == 3

    _start("fraud.find")
    wait_until(are_found)
    wait_until(lambda: people["owner"].get(f"{poll.path}/results").json["review"])
    return poll, cases


@pytest.mark.parametrize("person", ["operator", "auditor"])
def test_no_case_of_a_few_voters_tells_what_they_chose(found, installation, person):
    poll, cases = found

    for case in cases:
        shown = installation.people[person].get(f"/api/v1/suspicious-ips/{case}").json
        if person == "auditor":  # who reads all results, and so may know what an option has in all
            shown["choices"] = [{name: choice[name] for name in choice if name != "votes"} for choice in shown["choices"] or []]

        assert secrecy.counted_in(shown, poll.option_ids) == set()


def test_no_comparison_of_a_few_voters_is_made_for_a_case(found, installation):
    poll, _ = found

    review = installation.people["owner"].get(f"{poll.path}/results").json["review"]

    assert not 0 < _difference(_compared(review) or Counter(), Counter()) < CROWD, review


def _start(job):
    """Start one of the clock's jobs now."""
    task = current_app.amqp.as_task_v2(str(uuid4()), job, argsrepr="", kwargsrepr="")
    body = [[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    with current_app.connection_for_write() as broker:
        Producer(broker.default_channel).publish(
            json.dumps(body),
            routing_key=settings.PERIODIC_QUEUE,
            headers=task.headers,
            content_type="application/json",
            content_encoding="utf-8",
        )


@pytest.mark.parametrize("door", ["integrity", "a dry run", "the journal"])
@pytest.mark.parametrize("person", ["operator", "editor"])
def test_who_may_not_read_results_learns_no_tally(collection, installation, person, door):
    poll = collection.of("client", "approval")[0].poll
    made = installation.people["owner"].post("/api/v1/clients", {"name": "editor", "scopes": ["polls:write"]})
    editor = installation.api("203.0.113.3", authorization=f"Api-Key {made.json['key']}")
    asks = {"operator": installation.people["operator"], "editor": editor}[person]
    assert asks.get(f"{poll.path}/results").status == 403

    whole = {"accepted_from": "2000-01-01T00:00:00Z", "accepted_until": "2100-01-01T00:00:00Z"}
    if door == "a dry run":
        answer = asks.post(f"{poll.path}/rulings", {"ruling": "void", "dry_run": True, "reason": "A look.", **whole})
    else:
        answer = asks.get(f"{poll.path}/{door.rpartition(' ')[2]}")

    assert secrecy.counted_in(answer.json, poll.option_ids) == set()


# --- Owners -----------------------------------------------------------------------------------------------------------


def _election(installation, voters):
    poll = installation.make_poll("code", results_visibility="after_close")
    labels = [f"dora {uuid4().hex[:8]}" for _ in range(voters)]
    issued = installation.people["owner"].post(f"{poll.path}/codes", {"generate": voters, "labels": labels}).json["codes"]
    chance = random.Random(voters)
    return [
        Ballot(
            poll, "", "192.0.2.99", chance.randrange(4), str(uuid4()), body={"code": code["code"]}, label=code["label"], code_id=code["id"]
        )
        for code in issued
    ]


def _lines_about(installation, poll, labels):
    """{(who, where, label): what stands there of it} in all that lists the poll's codes, to all who may read that."""
    found = {}
    for who in ("owner", "auditor"):
        for where in ("?state=used", "?state=unused", "?page_size=200"):
            listed = _listed(installation.people[who].get(f"{poll.path}/codes{where}"))
            found |= {(who, where, code.get("label")): json.dumps(code) for code in listed}
        table = installation.people[who].get(f"{poll.path}/codes", accept="text/csv").text
        found |= {(who, "CSV", label): line for line in table.splitlines() for label in labels if label in line}
    return found


def _listed(answer):
    found = answer.json
    return found.get("results", []) if isinstance(found, dict) and answer.status == 200 else []


def test_an_owner_who_keeps_looking_does_not_see_whose_code_was_used(installation):
    """Else the step in the results beside it is that voter's choice."""
    ballots = _election(installation, SINGLED_OUT)
    labels = {ballot.label for ballot in ballots}
    told, before = 0, _lines_about(installation, ballots[0].poll, labels)
    for ballot in ballots:
        installation.cast(ballot, prefer="wait=8")
        after = _lines_about(installation, ballot.poll, labels)
        told += ballot.label in {place[-1] for place in before.keys() | after.keys() if before.get(place) != after.get(place)}
        before = after

    assert told == 0, f"{told} of {len(ballots)} voters were seen to vote"


def test_an_owner_who_tries_to_revoke_codes_does_not_see_which_were_used(installation):
    """All at once, which a used one among them makes fail: nobody loses a code by the question."""
    ballots = _election(installation, SINGLED_OUT)
    poll, used = ballots[0].poll, ballots[::2]
    for ballot in used:
        installation.cast(ballot, prefer="wait=8")

    asked = installation.people["owner"].post(f"{poll.path}/codes/revoke", {"ids": [ballot.code_id for ballot in ballots]})

    pointed_at = {int(place) for place in re.findall(r"/ids/(\d+)", asked.text)}
    assert pointed_at != {index for index, ballot in enumerate(ballots) if ballot in used}, asked.text


def test_nobody_sees_sealed_results_before_the_end(installation):
    """Owner and operators included, by any door."""
    poll = installation.make_poll("ip", results_visibility="sealed")
    people = dict(installation.people)
    ballots = []
    for number in range(CROWD + 2):
        ballots.append(Ballot(poll, "", f"198.18.{number}.8", number % 4, f"erin-{number}"))
        installation.cast(ballots[-1], prefer="wait=8")
    scopes = ["votes:cast", "polls:write", "results:read"]
    made = people["owner"].post("/api/v1/clients", {"name": "everything", "scopes": scopes})
    people["client"] = installation.api("203.0.113.4", authorization=f"Api-Key {made.json['key']}")
    people["voter"] = installation.api("203.0.113.5", vote_receipt=ballots[0].answer["receipt"])
    whole = {"accepted_from": _moment(ballots[0]), "accepted_until": _moment(ballots[-1], 1)}
    pages = [f"/admin/polls/poll/{poll.id}/change/", f"/admin/polls/tally/?q={poll.id}"]
    browsers = {role: _browser(installation, role) for role in ("auditor", "admin")}
    query = f'{{ poll(id: "{poll.id}") {{ results {{ totalVotes options {{ id votes }} }} }} }}'

    told = {(role, page) for role, browser in browsers.items() for page in pages if _rows_about_dishes(browser.get(page).text)}
    for name, person in people.items():
        shown = {
            "results": person.get(f"{poll.path}/results"),
            "stream": person.get(f"{poll.path}/results/stream"),
            "integrity": person.get(f"{poll.path}/integrity"),
            "dry run": person.post(f"{poll.path}/rulings", {"ruling": "void", "dry_run": True, "reason": "A look.", **whole}),
            "graphql": person.post("/graphql", {"query": query}),
        }
        told |= {(name, where) for where, answer in shown.items() if secrecy.counted_in(_json(answer), poll.option_ids)}

    assert told == set()


def _browser(installation, role):
    """Somebody of this role, signed in to the admin."""
    user = make_user(f"{role}-{uuid4().hex[:8]}", role)
    user.is_staff, user.is_superuser = True, role == "admin"
    user.save()
    page = installation.api("203.0.113.6").get("/admin/login/")
    cookie = page.headers["set-cookie"].partition(";")[0]
    form = {"username": user.username, "password": PASSWORD, "csrfmiddlewaretoken": cookie.partition("=")[2], "next": "/admin/"}
    signed_in = installation.api("203.0.113.6").send(
        "POST", "/admin/login/", urlencode(form).encode(), content_type="application/x-www-form-urlencoded", cookie=cookie
    )
    assert signed_in.status == 302, signed_in.text
    cookies = [line.partition(";")[0] for line in signed_in.headers.get_all("set-cookie")]
    return installation.api("203.0.113.6", cookie="; ".join(cookies))


def _rows_about_dishes(page):
    """The rows of a page's tables that have an option and a number of votes: another one than its place and its id."""
    rows = [re.sub(r"<[^>]*>", "|", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    cells = [[cell.strip() for cell in row.split("|") if cell.strip()] for row in rows]
    about = [row for row in cells if any(cell.startswith("dish ") for cell in row)]
    return [row for row in about if sum(cell.isdecimal() and len(cell) < 4 for cell in row) > 1 or any("%" in cell for cell in row)]


def _json(answer):
    """What the answer says; of a stream each event."""
    if answer.headers.get_content_type() == "text/event-stream":
        return [json.loads(line.removeprefix("data:")) for line in answer.text.splitlines() if line.startswith("data:")]
    return answer.json


# --- Voters behind one address ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["the answer", "the receipt"])
def test_a_stranger_behind_the_same_address_does_not_learn_whether_another_chose_the_same(installation, door):
    """With a key that he guesses, as applications choose fixed ones; the two are one voter to the poll."""
    poll = installation.make_poll("ip")
    ballots = _cast_from_addresses(installation, poll, 8)

    told: dict[bool, set[Any]] = {True: set(), False: set()}
    for number, ballot in enumerate(ballots):
        is_same = number % 2 == 0
        tried = {"option": str(poll.options[ballot.choice if is_same else (ballot.choice + 1) % 4])}
        told[is_same].add(_said(installation.api(ballot.address), poll, tried, ballot.key, door))

    assert told[True] == told[False]


def _said(stranger, poll, tried, key, door):
    if door == "the answer":
        answer = stranger.post(f"{poll.path}/votes", tried, idempotency_key=key, prefer="wait=8")
        return answer.status, *(answer.json.get(name) for name in ("type", "title", "status", "reason", "detail"))
    receipt = stranger.post(f"{poll.path}/votes", tried, idempotency_key=key).json.get("receipt")
    found: list[Any] = [None]

    def is_decided():
        found[:] = stranger.post("/api/v1/votes/status", {"receipts": [receipt]}).json["votes"]
        return found[0]["status"] != "pending"

    if receipt:
        wait_until(is_decided)
    return found[0] and (found[0]["status"], found[0]["reason"])
