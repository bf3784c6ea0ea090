"""Waiting for the count: `Prefer: wait`, many receipts at once, withdrawals, and keys that are used twice."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.utils.timezone import now

from polls import codes, outbox, problems
from polls.journal import Act
from tests.conftest import Api, answers, free_port, option, tallies, wait_until, web
from tests.test_intake import assert_refused


def withdraw(api, poll, voter, **headers):
    return api.post(f"/api/v1/polls/{poll.pk}/votes/withdraw", {"voter": voter}, **headers)


def test_who_waits_gets_the_outcome(api, poll):
    counted = api.cast(poll, "alice", prefer="wait=10")
    duplicate = api.cast(poll, "alice", "salad", prefer="respond-async, wait=10")

    assert (counted.status, counted.json["status"]) == (201, "counted")
    assert counted.headers["preference-applied"] == "wait=10"
    assert_refused(duplicate, problems.DUPLICATE)
    assert api.get(duplicate.headers["location"]).json["reason"] == "duplicate"


@pytest.mark.parametrize(
    ("prefer", "applied"), [("wait=99999", "wait=10"), ('wait="3"', "wait=3"), ("handling=lenient; wait = 2", "wait=2")]
)
def test_the_wait_has_an_end(api, poll, prefer, applied):
    assert api.cast(poll, "alice", prefer=prefer).headers["preference-applied"] == applied


@pytest.mark.parametrize("prefer", ["wait", "wait=soon", "wait=-1", "await=3", "", "wait=1e3"])
def test_a_preference_that_is_none_is_not_one(api, poll, prefer):
    answer = api.cast(poll, "alice", prefer=prefer)

    assert answer.status == 202 and answer.headers["preference-applied"] is None


def test_when_the_time_is_up_the_answer_is_202(poll, client_key, tmp_path):
    """The vote waits in the outbox: the broker is away, and nothing drains it here."""
    port = free_port()
    with web(port, tmp_path / "web.log", CELERY_BROKER_URL="amqp://nobody:wrong@127.0.0.1:1//"):
        api = Api(port, {"authorization": f"Api-Key {client_key}"})
        wait_until(lambda: answers(port))
        started = time.monotonic()
        answer = api.cast(poll, "alice", prefer="wait=1")

    assert outbox.drain() >= 1
    assert (answer.status, answer.json["status"]) == (202, "pending")
    assert 1 <= time.monotonic() - started < 4


def test_many_who_wait_look_together(api, poll):
    with ThreadPoolExecutor(50) as crowd:
        statuses = list(crowd.map(lambda n: api.cast(poll, f"voter {n}", prefer="wait=10").status, range(200)))

    assert statuses == [201] * 200
    assert tallies(poll) == {"soup": 200}


def test_the_same_key_with_another_choice_is_never_a_second_vote(api, make_poll):
    """Also where votes may change: the key says that it is the same request."""
    for poll in (make_poll(), make_poll(allow_change=True)):
        first = api.cast(poll, "alice", "soup", idempotency_key="k", prefer="wait=10")
        misuse = api.cast(poll, "alice", "salad", idempotency_key="k", prefer="wait=10")

        assert first.status == 201
        assert_refused(misuse, problems.KEY_REUSED)
        assert api.get(misuse.headers["location"]).json["reason"] == "key_reused"
        assert tallies(poll) == {"soup": 1}


def test_fifty_uses_of_one_key_with_two_choices_at_once_are_one_vote(api, make_poll):
    poll = make_poll(allow_change=True)

    def cast(n):
        return api.cast(poll, "alice", ("soup", "salad")[n % 2], idempotency_key="k", prefer="wait=10").status

    with ThreadPoolExecutor(50) as crowd:
        statuses = list(crowd.map(cast, range(50)))

    assert sum(tallies(poll).values()) == 1
    assert set(statuses) <= {201, 422}


def test_a_vote_is_withdrawn_where_the_poll_allows_it(api, make_poll):
    poll = make_poll(allow_withdrawal=True, allow_change=True)
    vote = api.cast(poll, "alice", prefer="wait=10")

    withdrawal = withdraw(api, poll, "alice", prefer="wait=10")

    assert (withdrawal.status, withdrawal.json["status"]) == (201, "counted")
    assert tallies(poll) == {}
    assert api.get(vote.json["links"]["self"]).json["reason"] == "withdrawn"
    assert api.get(f"/api/v1/polls/{poll.pk}/results").json["total_votes"] == 0
    assert api.cast(poll, "alice", "salad", prefer="wait=10").status == 201
    assert tallies(poll) == {"salad": 1}


def test_a_withdrawal_that_is_not_offered_or_chooses_something(api, make_poll):
    assert_refused(withdraw(api, make_poll(), "alice"), problems.NOT_OFFERED)
    poll = make_poll(allow_withdrawal=True)
    body = {"voter": "alice", "option": str(option(poll, "soup"))}
    assert_refused(api.post(f"/api/v1/polls/{poll.pk}/votes/withdraw", body), problems.INVALID, pointer="/option")
    assert_refused(withdraw(api, make_poll(allow_withdrawal=True, opens_in=-20, closes_in=-10), "alice"), problems.POLL_CLOSED)


def test_an_approval_ballot_names_several_options(api, make_poll):
    poll = make_poll(method="approval", min_choices=1, max_choices=2, options=[{"text": text} for text in ("soup", "salad", "noodles")])
    ids = {text: str(option(poll, text)) for text in ("soup", "salad", "noodles")}

    def cast(voter, *texts):
        body = {"options": [ids[text] for text in texts], "voter": voter}
        return api.post(f"/api/v1/polls/{poll.pk}/votes", body, prefer="wait=10")

    assert [cast("alice", "soup", "salad").status, cast("bob", "salad").status] == [201, 201]
    assert_refused(cast("carol"), problems.WRONG_CHOICES, pointer="/options")
    assert_refused(cast("carol", "soup", "salad", "noodles"), problems.WRONG_CHOICES, pointer="/options")
    assert_refused(cast("carol", "soup", "soup"), problems.WRONG_CHOICES, pointer="/options")
    wait_until(lambda: api.get(f"/api/v1/polls/{poll.pk}/results").json["total_votes"] == 2)
    results = api.get(f"/api/v1/polls/{poll.pk}/results").json
    assert [(shown["text"], shown["votes"], shown["share"]) for shown in results["options"]] == [
        ("soup", 1, 0.5),
        ("salad", 2, 1.0),
        ("noodles", 0, 0.0),
    ]


def test_many_receipts_at_once_keep_their_order_and_say_which_is_none(api, poll):
    receipts = [api.cast(poll, name, prefer="wait=10").json["receipt"] for name in ("alice", "bob", "alice2")]

    answer = api.post("/api/v1/votes/status", {"receipts": [receipts[0], "nonsense", receipts[1], receipts[0]]})

    assert answer.status == 200
    shown = answer.json["votes"]
    assert shown[1] is None and shown[0] == shown[3]
    assert [vote["status"] for vote in shown if vote] == ["counted"] * 3


@pytest.mark.parametrize("body", [{}, {"receipts": []}, {"receipts": "x"}, {"receipts": [7]}, {"receipts": ["x"] * 1001}, []])
def test_a_body_that_holds_no_receipts(api, body):
    answer = api.post("/api/v1/votes/status", body)

    assert answer.status == 400 and answer.json["type"] == problems.INVALID.type


def test_results_after_the_vote_are_for_who_shows_a_receipt_of_this_poll(api, make_poll):
    poll, other = make_poll(results_visibility="after_vote"), make_poll()
    anonymous, path = Api(api.port, {}), f"/api/v1/polls/{poll.pk}/results"
    receipt, stray = (api.cast(each, "alice", prefer="wait=10").json["receipt"] for each in (poll, other))

    assert_refused(anonymous.get(path), problems.RESULTS_HIDDEN)
    assert_refused(anonymous.get(path, vote_receipt=stray), problems.RESULTS_HIDDEN)
    shown = anonymous.get(path, vote_receipt=receipt)
    assert shown.status == 200 and "private" in shown.headers["cache-control"]


def test_results_after_the_vote_are_not_for_who_has_no_vote_that_counts(api, make_poll):
    """Neither by a withdrawal ahead of the vote, nor by a duplicate; nor once the vote was taken back."""
    poll = make_poll(results_visibility="after_vote", allow_withdrawal=True)
    anonymous, path = Api(api.port, {}), f"/api/v1/polls/{poll.pk}/results"

    def sees(answer):
        receipt = answer.json["receipt"] if "receipt" in answer.json else answer.headers["location"].rpartition("/")[2]
        answers = [anonymous.get(path, vote_receipt=receipt).status]
        document = f'query($r: String) {{ poll(id: "{poll.pk}") {{ results(receipt: $r) {{ totalVotes }} }} }}'
        shown = anonymous.post("/graphql", {"query": document, "variables": {"r": receipt}}).json["data"]["poll"]["results"]
        stream = socket.create_connection(("127.0.0.1", api.port))
        stream.sendall(f"GET {path}/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nVote-Receipt: {receipt}\r\n\r\n".encode())
        answers += [200 if shown else 403, int(stream.recv(100).split()[1])]
        stream.close()
        assert len(set(answers)) == 1, answers
        return answers[0] == 200

    early = withdraw(api, poll, "alice", prefer="wait=10")
    assert not sees(early)
    vote = api.cast(poll, "alice", prefer="wait=10")
    assert sees(vote) and not sees(early)
    duplicate = api.cast(poll, "alice", "salad", prefer="wait=10")
    assert duplicate.status == 409 and not sees(duplicate)
    late = withdraw(api, poll, "alice", prefer="wait=10")
    assert not sees(late) and not sees(vote)


def test_results_after_the_vote_are_for_who_has_changed_it(api, make_poll):
    poll = make_poll(results_visibility="after_vote", allow_change=True)
    first = api.cast(poll, "alice", prefer="wait=10").json["receipt"]
    api.cast(poll, "alice", "salad", prefer="wait=10")
    assert Api(api.port, {}).get(f"/api/v1/polls/{poll.pk}/results", vote_receipt=first).status == 200


@pytest.mark.parametrize(
    "key",
    [
        "vote",
        "alice-1",
        "a" * 40,
        "9" * 40,
        "the-key-of-everybody-at-lunch",
        "vote-2026-12-01-option-1",
        "poll:Lunch;user:Jane;n=12345",
        "poll",
    ],
)
def test_behind_one_address_nobody_learns_by_a_key_what_another_chose(pipeline, make_poll, key):
    """Of who votes second, whatever they choose: the voter has voted."""
    for text in ("soup", "salad"):
        poll = make_poll(voter_policy="ip")
        nobody, headers = Api(pipeline, {}), {"idempotency_key": str(poll.pk) if key == "poll" else key, "prefer": "wait=10"}
        assert nobody.cast(poll, None, "soup", **headers).status == 201
        second = nobody.cast(poll, None, text, **headers)
        assert_refused(second, problems.DUPLICATE)
        assert tallies(poll) == {"soup": 1}


def test_who_made_a_code_does_not_learn_by_a_key_what_its_holder_chose(pipeline, make_poll):
    for text in ("soup", "salad"):
        poll, nobody = make_poll(voter_policy="code"), Api(pipeline, {})
        [issued] = codes.generate(poll, 1, Act("olga", now()))
        body, headers = {"option": str(option(poll, "soup")), "code": issued.code}, {"idempotency_key": "1", "prefer": "wait=10"}
        assert nobody.post(f"/api/v1/polls/{poll.pk}/votes", body, **headers).status == 201
        second = nobody.post(f"/api/v1/polls/{poll.pk}/votes", {**body, "option": str(option(poll, text))}, **headers)
        assert_refused(second, problems.DUPLICATE)


@pytest.mark.parametrize(
    "key",
    ["13e2300a-99ac-4d41-95b6-35b93934e195", "867014c37d20467386ff30ea553c3972", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "m3Hk9qPz_2LwXr7TbVn4cA"],
)
def test_behind_one_address_who_repeats_a_request_by_a_random_key_learns_that_it_counts(pipeline, make_poll, key):
    poll, nobody = make_poll(voter_policy="ip"), Api(pipeline, {})
    answers = [nobody.cast(poll, None, "soup", idempotency_key=key, prefer="wait=10") for _ in range(2)]
    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].json["id"] == answers[1].json["id"]


@pytest.mark.parametrize(
    ("visibility", "open_status", "closed_status"), [("always", 200, 200), ("after_close", 403, 200), ("owner", 403, 403)]
)
def test_results_are_shown_when_the_poll_says(api, make_poll, owners_api, visibility, open_status, closed_status):
    anonymous = Api(api.port, {})
    open_poll, closed = make_poll(results_visibility=visibility), make_poll(results_visibility=visibility, opens_in=-20, closes_in=-10)

    assert anonymous.get(f"/api/v1/polls/{open_poll.pk}/results").status == open_status
    assert anonymous.get(f"/api/v1/polls/{closed.pk}/results").status == closed_status
    assert owners_api.get(f"/api/v1/polls/{open_poll.pk}/results").status == 200
