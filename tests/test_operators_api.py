"""What operators see and do through the API: queues, outbox, dead letters; never what somebody voted."""

import base64
import json
import socket
import time
from uuid import uuid4

import msgspec
import pytest
from django.conf import settings as project
from django.contrib.auth import get_user_model
from django.test import Client
from django.utils.timezone import now

from polls import counting, deadletters, editing, problems
from polls.bundles import AcceptedVote
from polls.journal import Act
from polls.models import OutboxBundle
from tests.conftest import PASSWORD, Api, bundle_of, make_user, signed_in, tallies, task_message, vote_of, wait_until
from tests.test_accounts import deaf_to
from tests.test_intake import assert_refused

QUEUES, LETTERS, REPLAY = "/api/v1/queues", "/api/v1/dead-letters", "/api/v1/dead-letters/replay"
DESK = "/admin/polls/deadletterdesk/"


def one(message_id):
    """Where the letter with this id is replayed."""
    return f"/api/v1/dead-letters/{message_id}/replay"


@pytest.fixture(scope="session")
def staff(pipeline):
    """{role: the running pipeline as somebody with this role, and no other, sees it}"""
    for role in ("owner", "admin", "auditor", "operator"):
        make_user(f"operators-{role}", role)
    return {role: signed_in(pipeline, f"operators-{role}") for role in ("owner", "admin", "auditor", "operator")}


@pytest.fixture
def operator(staff):
    return staff["operator"]


def test_queues_and_outbox_are_shown_as_they_are(operator, poll, bury):
    bury(*bundle_of(vote_of(poll, "alice")))
    outbox = OutboxBundle.objects.count()
    kept = OutboxBundle.objects.create(body=b"[]")

    # The worker may have started a moment ago.
    wait_until(lambda: [queue["consumers"] for queue in operator.get(QUEUES).json["queues"]][:2] == [1, 1])
    shown = operator.get(QUEUES)

    kept.delete()
    assert shown.status == 200, shown.text
    assert set(shown.json) == {"queues", "outbox"}
    queues = {queue.pop("name"): queue for queue in shown.json["queues"]}
    assert list(queues) == [*project.VOTES_QUEUES, project.DEAD_LETTER_QUEUE, project.PERIODIC_QUEUE]
    assert queues[project.DEAD_LETTER_QUEUE] == {"ready": 1, "consumers": 0}
    assert set(queues[project.PERIODIC_QUEUE]) == {"ready", "consumers"}
    assert shown.json["outbox"] == {"bundles": outbox + 1}


def test_dead_letters_are_told_without_voter_and_choice_and_stay(operator, poll, bury):
    vote = AcceptedVote(uuid4(), poll.pk, uuid4(), (9_876_543_210,), 1_800_000_000_000_000)
    headers, body = bundle_of(vote)
    bury(headers, body)
    bury({"id": "odd"}, b"{not json")

    shown = operator.get(LETTERS)

    assert shown.status == 200, shown.text
    one = {"reason": "delivery_limit", "died_at": None}
    polls = [{"id": str(poll.pk), "title": poll.title, "votes": 1}]
    why = ["Its header `task` is not votes.count.", "It is no JSON of a task with a bundle."]
    good = {"votes": 1, "unreadable": 0, "pending": 1, "polls": polls, "faults": []}
    odd = {"votes": None, "unreadable": None, "pending": 0, "polls": [], "faults": [{"item": None, "why": told} for told in why]}
    assert shown.json == {
        "total": 2,
        "letters": [{**one, "message_id": headers["id"], "size": len(body), **good}, {**one, "message_id": "odd", "size": 9, **odd}],
    }
    for secret in (vote.vote_id, vote.voter_key):
        assert str(secret) not in shown.text and secret.hex not in shown.text
    assert "9876543210" not in shown.text
    wait_until(lambda: deadletters.count() == 2)  # looking takes nothing


@pytest.mark.parametrize("is_packed", [True, False])
def test_what_cant_be_read_in_a_letter_is_told_by_place_and_type(operator, poll, bury, is_packed):
    secret = "192.0.2.7 chose soup"
    good = vote_of(poll, "alice")
    items = [
        json.loads(msgspec.json.encode(good)),
        secret,
        [],
        [secret, str(poll.pk), str(good.voter_key), [1], 1_800_000_000_000_000],
        [str(uuid4()), str(poll.pk), str(good.voter_key), [secret], 1_800_000_000_000_000],
        [str(uuid4()), str(poll.pk), str(good.voter_key), [1], -1],
        [str(uuid4()), str(poll.pk), str(good.voter_key), [1], 1_800_000_000_000_000, None, None, {secret: secret}],
    ]
    bury(*task_message(base64.b64encode(msgspec.msgpack.encode(items)).decode() if is_packed else items))

    shown = operator.get(LETTERS)

    [letter] = shown.json["letters"]
    assert (letter["votes"], letter["unreadable"], letter["pending"]) == (1, 6, 1)
    assert letter["faults"] == [
        {"item": 1, "why": "Expected `array`, got `str`."},
        {"item": 2, "why": "Expected `array` of at least length 5, got 0."},
        {"item": 3, "why": "Invalid UUID - at `$[0]`."},
        {"item": 4, "why": "Expected `int`, got `str` - at `$[3][0]`."},
        {"item": 5, "why": "Expected `int` >= 0 - at `$[4]`."},
        {"item": 6, "why": "Expected `str | null`, got `object` - at `$[7]`."},
    ]
    for part in secret.split():
        assert part not in json.dumps(letter["faults"])


@pytest.mark.parametrize(
    ("bundle", "why"),
    [
        ("***", "Its bundle is no base64 of MessagePack."),
        ("", "Its bundle is no base64 of MessagePack."),
        (7, "Its bundle is no base64 of MessagePack."),
        (base64.b64encode(msgspec.msgpack.encode({"a": 1})).decode(), "Its bundle is no list."),
    ],
)
def test_a_bundle_that_is_none_is_told(operator, bury, bundle, why):
    bury(*task_message(bundle))
    [letter] = operator.get(LETTERS).json["letters"]
    assert (letter["votes"], letter["unreadable"], letter["faults"]) == (0, 1, [{"item": None, "why": why}])


def test_of_many_faults_the_first_are_told(operator, bury):
    bury(*task_message([[]] * 50))
    [letter] = operator.get(LETTERS).json["letters"]
    assert (letter["unreadable"], len(letter["faults"])) == (50, deadletters.MOST_FAULTS)


def test_a_letter_tells_its_polls_and_which_votes_are_still_without_an_outcome(operator, make_poll, bury):
    many, few, gone = make_poll(), make_poll(), make_poll(draft=True)
    votes = [vote_of(many, "alice"), vote_of(many, "bob"), vote_of(many, "carol"), vote_of(few, "alice"), vote_of(few, "bob")]
    lost = vote_of(gone, "alice")
    editing.delete_poll(gone.pk, Act("olga", now()))
    counting.count_votes(votes[:1])
    bury(*bundle_of(*votes, lost))

    [letter] = operator.get(LETTERS).json["letters"]

    assert (letter["votes"], letter["pending"]) == (6, 5)
    assert letter["polls"] == [
        {"id": str(many.pk), "title": many.title, "votes": 3},
        {"id": str(few.pk), "title": few.title, "votes": 2},
        {"id": str(lost.poll_id), "title": None, "votes": 1},
    ]


def test_of_many_dead_letters_the_oldest_hundred_are_shown(operator, bury):
    for _ in range(102):
        bury({}, b"{")
    shown = operator.get(LETTERS).json
    assert (shown["total"], len(shown["letters"])) == (102, 100)


def test_dead_letters_are_replayed_so_many_or_all_and_counted_once(operator, poll, bury):
    for voter in ("alice", "bob", "bob"):
        bury(*bundle_of(vote_of(poll, voter)))

    assert operator.post(REPLAY, {"most": 1}).json == {"replayed": 1}
    wait_until(lambda: tallies(poll) == {"soup": 1})
    assert deadletters.count() == 2
    assert operator.send("POST", REPLAY).json == {"replayed": 2}
    wait_until(lambda: tallies(poll) == {"soup": 2})
    wait_until(lambda: deadletters.count() == 0)
    assert operator.post(REPLAY, {}).json == {"replayed": 0}


@pytest.mark.parametrize(
    ("body", "problem", "pointer"),
    [
        ({"most": 0}, problems.INVALID, "/most"),
        ({"most": -1}, problems.INVALID, "/most"),
        ({"most": 1001}, problems.INVALID, "/most"),
        ({"most": "all"}, problems.INVALID, "/most"),
        ({"most": None}, problems.INVALID, "/most"),
        ({"limit": 1}, problems.INVALID, "/limit"),
        (b"{", problems.MALFORMED, None),
        (b"[1]", problems.INVALID, None),
    ],
)
def test_a_wrong_request_replays_nothing(operator, poll, bury, body, problem, pointer):
    bury(*bundle_of(vote_of(poll, "alice")))
    assert_refused(operator.post(REPLAY, body), problem, pointer=pointer)
    assert deadletters.count() == 1


def test_one_dead_letter_is_replayed_once_and_the_others_stay(operator, make_poll, bury):
    left, wanted = make_poll(), make_poll()
    for poll in (left, wanted):
        headers, body = bundle_of(vote_of(poll, "alice"))
        bury(headers, body)

    assert operator.post(one(headers["id"]), {}).json == {"replayed": 1}

    wait_until(lambda: tallies(wanted) == {"soup": 1})
    assert_refused(operator.send("POST", one(headers["id"])), problems.NOT_FOUND)  # it is gone
    wait_until(lambda: deadletters.count() == 1)
    assert tallies(left) == {}


def test_a_letter_that_is_there_twice_counts_once_and_leaves_twice(operator, poll, bury):
    """As after a replay whose connection ended between the broker's confirm and the letter's end."""
    headers, body = bundle_of(vote_of(poll, "alice"))
    bury(headers, body)
    bury(headers, body)

    assert operator.post(one(headers["id"]), {}).json == {"replayed": 2}

    wait_until(lambda: tallies(poll) == {"soup": 1})
    wait_until(lambda: deadletters.count() == 0)


def test_a_letter_that_still_cant_be_counted_comes_back_and_is_replayed_again(operator, bury):
    headers, body = task_message([[]])
    bury(headers, body)
    for _ in range(2):
        assert operator.post(one(headers["id"]), {}).json == {"replayed": 1}
        wait_until(lambda: [letter.message_id for letter in deadletters.peek()] == [headers["id"]])


@pytest.mark.parametrize(
    "message_id", ["unknown", "051d4c87-c447-4961-ae95-889539c81fd5", "%20", "%00", "%0A", "%FF", "'--", "a" * 300, "%F0%9F%8D%B2"]
)
def test_an_id_that_no_letter_has_replays_nothing(operator, bury, message_id):
    bury({}, b"{")  # has no id at all
    assert_refused(operator.send("POST", one(message_id)), problems.NOT_FOUND)
    wait_until(lambda: deadletters.count() == 1)


@pytest.mark.parametrize(
    ("body", "problem", "pointer"),
    [({"most": 1}, problems.INVALID, "/most"), (b"{", problems.MALFORMED, None), (b"[1]", problems.INVALID, None)],
)
def test_a_wrong_request_for_one_letter_replays_nothing(operator, bury, body, problem, pointer):
    bury({"id": "a"}, b"{")
    assert_refused(operator.post(one("a"), body), problem, pointer=pointer)
    assert deadletters.count() == 1


def test_one_letter_is_looked_for_among_the_oldest_only(inside, bury, monkeypatch):
    monkeypatch.setattr(deadletters, "MOST_LOOKED_THROUGH", 2)
    for name in ("a", "b", "c"):
        bury({"id": name}, b"{")
    assert deadletters.replay_one("c") == 0
    wait_until(lambda: deadletters.count() == 3)


@pytest.mark.parametrize(
    ("role", "looks", "replays"), [("operator", 200, 200), ("admin", 200, 200), ("auditor", 200, 403), ("owner", 403, 403)]
)
def test_who_looks_and_who_replays(staff, bury, role, looks, replays):
    bury({}, b"{")
    answers = [staff[role].get(QUEUES), staff[role].get(LETTERS), staff[role].post(REPLAY, {})]
    assert [answer.status for answer in answers] == [looks, looks, replays]
    if replays == 403:
        assert_refused(answers[2], problems.FORBIDDEN)
        assert deadletters.count() == 1


def test_neither_strangers_nor_api_keys_look_or_replay(pipeline, api, bury):
    bury({}, b"{")
    anonymous = Api(pipeline, {})
    for caller, problem in [(anonymous, problems.UNAUTHENTICATED), (api, problems.FORBIDDEN)]:
        assert_refused(caller.get(QUEUES), problem)
        assert_refused(caller.get(LETTERS), problem)
        assert_refused(caller.post(REPLAY, {}), problem)
    assert deadletters.count() == 1


# --- Without a broker -------------------------------------------------------------------------------------------------


class Inside:
    """The API within this process, whose broker a test can take away."""

    def __init__(self):
        username = f"operators-{uuid4()}"
        make_user(username, "operator")
        self.browser = Client(raise_request_exception=False)
        body = json.dumps({"username": username, "password": PASSWORD})
        tokens = self.browser.post("/api/v1/auth/token", body, content_type="application/json").json()
        self.headers = {"Authorization": f"Bearer {tokens['access']}"}

    def answers(self):
        """What each of the four doors says."""
        got = [self.browser.get(path, headers=self.headers) for path in (QUEUES, LETTERS)]
        for path in (REPLAY, one("a")):
            got.append(self.browser.post(path, "{}", content_type="application/json", headers=self.headers))
        for answer in got:
            answer.status, answer.text, answer.json = answer.status_code, answer.content.decode(), json.loads(answer.content)
        return got


@pytest.fixture
def inside(_database):
    return Inside()


def test_a_broker_that_is_away_is_told_soon(inside, broker_away):
    started = time.monotonic()
    for answer in inside.answers():
        assert_refused(answer, problems.UNAVAILABLE)
        assert answer.headers["retry-after"] == "5"
    assert time.monotonic() - started < 3


def test_a_broker_that_hangs_is_waited_for_only_so_long(inside, monkeypatch):
    monkeypatch.setattr(deadletters, "PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//")
        started = time.monotonic()
        for answer in inside.answers():
            assert_refused(answer, problems.UNAVAILABLE)
    assert time.monotonic() - started < 4


def test_a_broker_that_confirms_nothing_keeps_the_letters_and_nobody_waiting(inside, poll, bury, monkeypatch):
    """As with a memory alarm: it lets us in, and then reads no more."""
    bury(*bundle_of(vote_of(poll, "alice")))
    monkeypatch.setattr(deadletters, "PATIENCE_SECONDS", 0.5)

    with monkeypatch.context() as patch, deaf_to(b"votes.count") as broker_url:
        patch.setenv("CELERY_BROKER_WRITE_URL", broker_url)
        started = time.monotonic()
        assert_refused(inside.answers()[2], problems.UNAVAILABLE)
        assert time.monotonic() - started < 1.5

    wait_until(lambda: deadletters.count() == 1)


@pytest.mark.parametrize("setting", ["VOTES_QUEUES", "PERIODIC_QUEUE", "DEAD_LETTER_QUEUE"])
def test_a_queue_that_was_never_declared_is_told_with_its_cure(inside, broker, settings, setting):
    missing = f"{project.QUEUE_PREFIX}none"
    setattr(settings, setting, (project.VOTES_QUEUES[0], missing) if setting == "VOTES_QUEUES" else missing)
    told = f"The broker has no queue {missing}; `manage.py setup` makes it."
    everywhere = setting == "DEAD_LETTER_QUEUE"
    assert [answer.json.get("detail") == told for answer in inside.answers()] == [True, everywhere, everywhere, everywhere]


# --- The button in the admin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "may"), [("operator", True), ("admin", True), ("auditor", False)])
def test_who_has_the_button(role, may, bury):
    user = make_user(f"desk-{uuid4()}", role)
    get_user_model().objects.filter(pk=user.pk).update(is_staff=True)
    browser = Client(raise_request_exception=False)
    browser.force_login(user)
    bury({}, b"{")

    page = browser.get(DESK)

    assert page.status_code == 200
    assert ("Replay all" in page.content.decode()) == may
    assert browser.post(f"{DESK}replay").status_code == (302 if may else 403)
