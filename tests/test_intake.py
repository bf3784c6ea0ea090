"""The hot routes over real HTTP: what is taken, what is refused, and how the refusal helps."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from django.utils.timezone import now

from polls import problems, roles, voters
from polls.counting import count_votes
from polls.models import ApiClient
from polls.moments import iso
from tests.conftest import Api, make_user, option, standing, tallies, vote_of, wait_until


def assert_refused(answer, problem, *, pointer=None):
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json
    assert (answer.status, body["status"], body["type"], body["title"]) == (problem.status, problem.status, problem.type, problem.title)
    assert len(body["detail"]) > 10
    assert [error["pointer"] for error in body.get("errors", [])] == ([f"#{pointer}"] if pointer else [])


def test_a_vote_is_accepted_counted_and_shown(api, poll):
    answer = api.cast(poll, "alice")

    assert answer.status == 202
    accepted = answer.json
    assert set(accepted) == {"id", "receipt", "status", "accepted_at", "links"}
    assert accepted["status"] == "pending"
    assert answer.headers["location"] == accepted["links"]["self"] == f"/api/v1/votes/{accepted['receipt']}"
    wait_until(lambda: api.get(accepted["links"]["self"]).json["status"] == "counted")
    status = api.get(accepted["links"]["self"]).json
    assert set(status) == {"id", "status", "reason", "accepted_at", "counted_at"}
    assert (status["id"], status["accepted_at"], status["reason"]) == (accepted["id"], accepted["accepted_at"], None)
    wait_until(lambda: api.get(accepted["links"]["results"]).json["total_votes"] == 1)
    results = api.get(accepted["links"]["results"]).json
    assert set(results) == {"poll", "status", "method", "total_votes", "options", "revision", "as_of", "is_final", "errata", "review"}
    assert [(o["text"], o["position"], o["votes"], o["share"]) for o in results["options"]] == [("soup", 1, 1, 1.0), ("salad", 2, 0, 0.0)]
    assert (results["poll"], results["status"], results["revision"]) == (str(poll.pk), "open", 1)
    assert results["review"] is None


def test_a_second_vote_is_accepted_and_then_rejected_as_a_duplicate(api, poll):
    first = api.cast(poll, "alice", "soup").json
    second = api.cast(poll, "alice", "salad").json

    wait_until(lambda: api.get(second["links"]["self"]).json["status"] == "rejected")
    assert api.get(second["links"]["self"]).json["reason"] == "duplicate"
    assert api.get(first["links"]["self"]).json["status"] == "counted"
    assert tallies(poll) == {"soup": 1}


def test_where_the_vote_may_change_the_second_supersedes_the_first(api, make_poll):
    poll = make_poll(allow_change=True)
    first = api.cast(poll, "alice", "soup").json
    api.cast(poll, "alice", "salad")

    wait_until(lambda: api.get(first["links"]["self"]).json["status"] == "superseded")
    assert tallies(poll) == {"salad": 1}


def test_fifty_repeats_with_one_idempotency_key_are_one_vote(api, poll):
    key = str(uuid4())
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: api.cast(poll, "alice", idempotency_key=key), range(50)))

    assert {answer.status for answer in answers} == {202}
    assert len({answer.json["id"] for answer in answers}) == 1
    wait_until(lambda: api.get(answers[-1].json["links"]["self"]).json["status"] == "counted")
    assert tallies(poll) == {"soup": 1}


def test_the_same_idempotency_key_of_another_voter_or_poll_is_another_vote(api, make_poll):
    poll, other = make_poll(), make_poll()
    casts = [(poll, "alice"), (poll, "bob"), (other, "alice")]

    assert len({api.cast(where, who, idempotency_key="1").json["id"] for where, who in casts}) == 3


def test_two_different_votes_at_once_leave_exactly_the_one_accepted_first(api, poll):
    with ThreadPoolExecutor(2) as pool:
        for voter in range(30):
            soup, salad = pool.map(lambda text, voter=voter: api.cast(poll, str(voter), text).json, ["soup", "salad"])
            first, second = sorted([soup, salad], key=lambda vote: vote["accepted_at"])
            wait_until(lambda second=second: api.get(second["links"]["self"]).json["status"] == "rejected")
            assert api.get(first["links"]["self"]).json["status"] == "counted"
    assert len(standing(poll)) == sum(tallies(poll).values()) == 30


def test_an_address_is_one_voter_in_an_ip_poll(api, make_poll):
    poll = make_poll(voter_policy="ip")
    anonymous = Api(api.port, {})
    first, second = anonymous.cast(poll, None).json, anonymous.cast(poll, None, x_forwarded_for="203.0.113.9").json

    wait_until(lambda: anonymous.get(second["links"]["self"]).json["reason"] == "duplicate")  # the forged header changed nothing
    assert anonymous.get(first["links"]["self"]).json["status"] == "counted"


def test_paths_work_with_and_without_a_trailing_slash(api, poll):
    path = f"/api/v1/polls/{poll.pk}"
    accepted = api.post(f"{path}/votes/", {"option": str(option(poll, "soup")), "voter": "alice"})
    assert accepted.status == 202
    for known in (path, f"{path}/results", accepted.json["links"]["self"], "/api/v1/polls"):
        assert (api.get(known, authorization=None).status, api.get(known + "/", authorization=None).status) == (200, 200)


# --- Refusals ---------------------------------------------------------------------------------------------------------


# The first is the same in every process: tests that run side by side are known by their names.
@pytest.mark.parametrize(
    "poll_id", ["7c0a5b0e-0000-4000-8000-000000000000", "1", "x" * 36, "980AB0BC-fc31-4d34-bbf9-614fdf152aa8", "%00", "%C3%A9"]
)
def test_an_unknown_poll(api, poll_id):
    path = f"/api/v1/polls/{poll_id}"
    assert_refused(api.post(f"{path}/votes", {"option": "1", "voter": "alice"}), problems.UNKNOWN_POLL)
    assert_refused(api.get(f"{path}/results"), problems.UNKNOWN_POLL)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"option": NaN}',
        b'{"option": "1"} x',
        b'\xff\xfe{"option"',
        b'{"option": "\xff"}',
        b'{"option": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_json(api, poll, body):
    assert_refused(api.post(f"/api/v1/polls/{poll.pk}/votes", body), problems.MALFORMED)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ([], None),
        ("soup", None),
        (None, None),
        ({}, "/option"),
        ({"voter": "alice"}, "/option"),
        ({"option": None}, "/option"),
        ({"option": 17, "voter": "alice"}, "/option"),
        ({"option": ["17"], "voter": "alice"}, "/option"),
        ({"option": "17", "voter": 5}, "/voter"),
        ({"option": "17", "voter": "alice", "weight": 100}, "/weight"),
    ],
)
def test_a_body_of_the_wrong_shape(api, poll, body, pointer):
    answer = api.post(f"/api/v1/polls/{poll.pk}/votes", json.dumps(body).encode())
    assert_refused(answer, problems.INVALID, pointer=pointer)


@pytest.mark.parametrize("body", [b"[" * 4000, b'{"option": ' + b"[" * 4000])
def test_a_body_nested_without_end(api, poll, body):
    assert api.post(f"/api/v1/polls/{poll.pk}/votes", body).status == 400


@pytest.mark.parametrize("voter", [None, "", "x" * 201])
def test_a_client_poll_needs_a_voter(api, poll, voter):
    answer = api.post(f"/api/v1/polls/{poll.pk}/votes", {"option": str(option(poll, "soup")), "voter": voter})
    assert_refused(answer, problems.INVALID, pointer="/voter")


@pytest.mark.parametrize("voter", ["\x00", "🍲" * 200, "' OR 1=1 --", " "])
def test_any_text_can_be_a_voter(api, poll, voter):
    assert api.cast(poll, voter).status == 202


def test_an_ip_poll_takes_no_voter(api, make_poll):
    assert_refused(api.cast(make_poll(voter_policy="ip"), "alice"), problems.INVALID, pointer="/voter")


@pytest.mark.parametrize(
    "chosen",
    [lambda other: str(option(other, "soup")), lambda _: "0", lambda _: "", lambda _: "soup", lambda _: "9" * 30, lambda _: "\uff11"],
)
def test_an_option_that_is_not_the_polls(api, make_poll, chosen):
    poll, other = make_poll(), make_poll()
    answer = api.post(f"/api/v1/polls/{poll.pk}/votes", {"option": chosen(other), "voter": "alice"})
    assert_refused(answer, problems.UNKNOWN_OPTION, pointer="/option")


def test_a_poll_that_is_not_open_yet_or_closed(api, make_poll):
    assert_refused(api.cast(make_poll(opens_in=60), "alice"), problems.POLL_NOT_OPEN)
    assert_refused(api.cast(make_poll(closes_in=-60), "alice"), problems.POLL_CLOSED)


def test_the_deadline_is_judged_by_the_clock_to_the_moment(api, make_poll):
    poll = make_poll(closes_in=1.5)
    last_accepted, first_refused = None, None
    while first_refused is None:
        before = now()
        answer = api.cast(poll, str(uuid4()))
        if answer.status == 202:
            last_accepted = answer.json["accepted_at"]
        else:
            first_refused = answer
    assert last_accepted < iso(poll.closes_at)
    assert_refused(first_refused, problems.POLL_CLOSED)
    assert now() >= poll.closes_at and (now() - before).total_seconds() < 5


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Api-Key", "Api-Key ", "Api-Key nonsense", "Bearer x", "Api-Key nxs_abcdefgh_" + "x" * 43, "Basic YTpi", "Api-Key \xe9"],
)
def test_a_key_that_is_none(api, poll, authorization):
    answer = api.cast(poll, "alice", authorization=authorization)
    assert_refused(answer, problems.UNAUTHENTICATED)
    assert answer.headers["www-authenticate"] == "Api-Key"


def test_the_right_prefix_with_another_secret_is_no_key(api, poll, client_key):
    assert_refused(
        api.cast(poll, "alice", authorization=f"Api-Key {client_key[:-1]}{'A' if client_key[-1] != 'A' else 'B'}"), problems.UNAUTHENTICATED
    )


def test_a_revoked_key_is_refused_within_two_seconds(api, poll, owner):
    key = voters.new_client_key()
    client = ApiClient.objects.create(
        owner=owner, name="lost", scopes=["votes:cast"], prefix=voters.key_prefix(key), key_hash=voters.key_hash(key)
    )
    assert api.cast(poll, "alice", authorization=f"Api-Key {key}").status == 202

    ApiClient.objects.filter(pk=client.pk).update(revoked_at=now())

    wait_until(lambda: api.cast(poll, "alice", authorization=f"Api-Key {key}").status == 401, seconds=2)


def test_somebody_elses_key(api, poll):
    stranger = make_user("stranger", roles.OWNER)
    key = voters.new_client_key()
    ApiClient.objects.create(
        owner=stranger, name="his", scopes=["votes:cast"], prefix=voters.key_prefix(key), key_hash=voters.key_hash(key)
    )

    assert_refused(api.cast(poll, "alice", authorization=f"Api-Key {key}"), problems.FORBIDDEN)


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_body_that_does_not_say_it_is_json(api, poll, content_type):
    assert_refused(api.cast(poll, "alice", content_type=content_type), problems.NOT_JSON)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_of_its_names(api, poll, content_type):
    assert api.cast(poll, "alice", content_type=content_type).status == 202


@pytest.mark.parametrize("size", [8193, 100_000])
def test_a_body_over_8_kib(api, poll, size):
    assert_refused(api.post(f"/api/v1/polls/{poll.pk}/votes", b" " * size), problems.TOO_LARGE)


def test_a_body_over_8_kib_in_chunks_that_never_end(api, poll):
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as client:
        headers = "Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(f"POST /api/v1/polls/{poll.pk}/votes HTTP/1.1\r\n{headers}".encode())
        for _ in range(9):
            client.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_other_methods_on_votes(api, poll, method):
    answer = api.send(method, f"/api/v1/polls/{poll.pk}/votes")
    assert_refused(answer, problems.WRONG_METHOD)
    assert answer.headers["allow"] == "POST"


def test_other_methods_on_results_and_receipts(api, poll):
    assert_refused(api.post(f"/api/v1/polls/{poll.pk}/results", {}), problems.WRONG_METHOD)
    assert_refused(api.send("DELETE", "/api/v1/votes/x"), problems.WRONG_METHOD)


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "two words", "\xe9"])
def test_an_idempotency_key_that_is_none(api, poll, key):
    assert_refused(api.cast(poll, "alice", idempotency_key=key), problems.INVALID)


@pytest.mark.parametrize("receipt", ["x", "A" * 91, "A" * 5000])
def test_a_receipt_that_is_none(api, receipt):
    assert_refused(api.get(f"/api/v1/votes/{receipt}"), problems.UNKNOWN_RECEIPT)


def test_the_type_of_a_problem_is_an_address_that_explains_it(api):
    for problem in problems.ALL:
        page = api.get(problem.type)
        assert page.status == 200 and problem.title.replace("'", "&#x27;") in page.text


# --- Results ----------------------------------------------------------------------------------------------------------


def test_results_that_did_not_change_are_not_sent_again(api, poll):
    path = f"/api/v1/polls/{poll.pk}/results"
    etag = api.get(path).headers["etag"]

    for header in (etag, f'"other", {etag}', "*"):
        unchanged = api.get(path, if_none_match=header)
        assert (unchanged.status, unchanged.text, unchanged.headers["etag"]) == (304, "", etag)
    assert api.get(path, if_none_match='"other"').status == 200

    count_votes([vote_of(poll, "alice")])
    wait_until(lambda: api.get(path, if_none_match=etag).status == 200, seconds=2)


def test_results_of_a_poll_without_votes_are_zeros(api, poll):
    results = api.get(f"/api/v1/polls/{poll.pk}/results").json
    assert (results["total_votes"], results["revision"], [o["share"] for o in results["options"]]) == (0, 0, [0, 0])


def test_results_show_what_happened_to_the_poll(api, make_poll):
    path = f"/api/v1/polls/{make_poll(closes_in=1).pk}/results"
    assert api.get(path).json["status"] == "open"
    time.sleep(1)
    wait_until(lambda: api.get(path).json["status"] == "closing", seconds=1)


def test_head_is_get_without_the_body(api, poll):
    answer = api.send("HEAD", f"/api/v1/polls/{poll.pk}/results")
    assert (answer.status, answer.text) == (200, "")
