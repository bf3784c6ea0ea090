"""Mass casting: many votes in one request, each with an outcome of its own."""

import asyncio
import json

import pytest
from django.db import OperationalError

from polls import codes, outbox, problems, voters
from polls.models import VoterCode
from polls.publishing import Publisher
from tests.conftest import Api, option, standing, tallies, vote_of, wait_until
from tests.test_intake import assert_refused


def path(poll):
    return f"/api/v1/polls/{poll.pk}/votes/batch"


def items(poll, *names, text="soup"):
    return [{"option": str(option(poll, text)), "voter": name} for name in names]


def ndjson(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_thousand_votes_in_one_request_all_count(api, poll):
    answer = api.post(path(poll), items(poll, *(f"voter {n}" for n in range(1000))))

    assert answer.status == 200, answer.text[:300]
    body = answer.json
    assert (body["accepted"], body["refused"]) == (1000, 0)
    assert [vote["index"] for vote in body["votes"]] == list(range(1000))
    assert set(body["votes"][0]) == {"index", "id", "receipt", "status", "accepted_at"}
    wait_until(lambda: tallies(poll) == {"soup": 1000})
    statuses = api.post("/api/v1/votes/status", {"receipts": [vote["receipt"] for vote in body["votes"]]}).json["votes"]
    assert [status["id"] for status in statuses] == [vote["id"] for vote in body["votes"]]
    assert {status["status"] for status in statuses} == {"counted"}


def test_a_bad_item_says_what_is_wrong_and_its_neighbours_count(api, poll, make_poll):
    stray = str(option(make_poll(), "soup"))
    good = items(poll, "alice", "bob")
    bad = [
        (None, problems.INVALID),
        ([], problems.INVALID),
        ({}, problems.INVALID),
        ({"option": stray, "voter": "carol"}, problems.UNKNOWN_OPTION),
        ({"option": good[0]["option"]}, problems.INVALID),
        ({"option": 7, "voter": "carol"}, problems.INVALID),
        ({**good[0], "voter": "x" * 201}, problems.INVALID),
        ({**good[0], "idempotency_key": "two words"}, problems.INVALID),
        ({**good[0], "colour": "red"}, problems.INVALID),
        ({**good[0], "code": "7KXF-20PM-Q9RT"}, problems.INVALID),
        ({"options": [good[0]["option"]] * 2, "voter": "carol"}, problems.WRONG_CHOICES),
    ]

    answer = api.post(path(poll), [good[0], *(item for item, _ in bad), good[1]]).json

    assert (answer["accepted"], answer["refused"]) == (2, len(bad))
    assert [vote["problem"]["type"] for vote in answer["votes"][1:-1]] == [problem.type for _, problem in bad]
    assert all(vote["status"] == "refused" for vote in answer["votes"][1:-1])
    wait_until(lambda: tallies(poll) == {"soup": 2})


def test_ndjson_is_taken_line_by_line(api, poll):
    body = ndjson(items(poll, "alice")) + b"\n{broken\n" + ndjson(items(poll, "bob"))

    answer = api.post(path(poll), body, content_type="application/x-ndjson").json

    assert [vote.get("problem", {}).get("type") for vote in answer["votes"]] == [None, problems.MALFORMED.type, None]
    wait_until(lambda: tallies(poll) == {"soup": 2})


def test_a_repeated_batch_is_the_same_votes_as_a_whole_and_by_item(api, make_poll):
    poll = make_poll(allow_change=True)
    rows = items(poll, "alice", "bob")

    first = api.post(path(poll), rows, idempotency_key="batch 1".replace(" ", "-")).json["votes"]
    again = api.post(path(poll), rows, idempotency_key="batch-1").json["votes"]
    own_keys = [{**row, "idempotency_key": f"item-{n}"} for n, row in enumerate(rows)]
    by_item = api.post(path(poll), own_keys).json["votes"]
    by_item_again = api.post(path(poll), list(reversed(own_keys)), idempotency_key="batch-2").json["votes"]

    assert [vote["id"] for vote in again] == [vote["id"] for vote in first]
    assert [vote["id"] for vote in by_item_again] == [vote["id"] for vote in reversed(by_item)]
    wait_until(lambda: set(standing(poll).values()) == {voters.UUID(vote["id"]) for vote in by_item})
    assert tallies(poll) == {"soup": 2}


def test_one_voter_twice_in_a_batch_is_one_vote(api, poll):
    answer = api.post(path(poll), items(poll, "alice", "alice", "alice")).json

    assert answer["accepted"] == 3
    wait_until(lambda: tallies(poll) == {"soup": 1})
    receipts = {"receipts": [vote["receipt"] for vote in answer["votes"]]}
    statuses = [status["status"] for status in api.post("/api/v1/votes/status", receipts).json["votes"]]
    assert statuses == ["counted", "rejected", "rejected"]


def test_a_kiosk_sends_the_codes_that_it_has_collected(api, make_poll):
    poll, other = make_poll(voter_policy="code"), make_poll(voter_policy="code")
    for of, code in ((poll, "7KXF-20PM-Q9RT"), (poll, "8KXF-20PM-Q9RT"), (other, "9KXF-20PM-Q9RT")):
        VoterCode.objects.create(poll=of, voter_key=voters.VoterKeys(of.pk, "code", of.voter_salt).of(codes.normalise(code)))
    sent = ["7KXF-20PM-Q9RT", "9KXF-20PM-Q9RT", "nonsense", "8kxf20pmq9rt"]

    answer = api.post(path(poll), [{"option": str(option(poll, "soup")), "code": code} for code in sent]).json

    assert [vote.get("problem", {}).get("type") for vote in answer["votes"]] == [
        None,
        problems.UNKNOWN_CODE.type,
        problems.UNKNOWN_CODE.type,
        None,
    ]
    wait_until(lambda: tallies(poll) == {"soup": 2})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"[", problems.MALFORMED),
        (b'{"option": "1"}', problems.MALFORMED),
        (b"[]", problems.INVALID),
        (json.dumps([{}] * 1001).encode(), problems.INVALID),
        (b"[" + b" " * 1_000_000 + b"]", problems.TOO_LARGE),
        (b"[" * 100_000, problems.MALFORMED),
        (b"\xff\xfe", problems.MALFORMED),
    ],
)
def test_a_body_that_is_no_batch(api, poll, body, problem):
    assert_refused(api.post(path(poll), body), problem)


def test_batches_are_for_api_clients_and_their_polls(api, poll, make_poll):
    rows = items(poll, "alice")

    assert_refused(Api(api.port, {}).post(path(poll), rows), problems.UNAUTHENTICATED)
    for policy in ("ip", "session", "account"):
        assert_refused(api.post(path(make_poll(voter_policy=policy)), rows), problems.NOT_OFFERED)
    assert_refused(api.post(path(poll), rows, content_type="text/csv"), problems.NOT_JSON)
    closed = make_poll(opens_in=-20, closes_in=-10)
    answer = api.post(path(closed), items(closed, "alice")).json
    assert answer["votes"][0]["problem"]["type"] == problems.POLL_CLOSED.type


def test_of_a_batch_that_nobody_takes_every_vote_is_told_to_be_lost(poll, monkeypatch):
    """The publisher has no broker yet, and its outbox no database."""

    def away(bundle):
        raise OperationalError

    monkeypatch.setattr(outbox, "keep", away)
    votes = [vote_of(poll, f"voter {n}") for n in range(3)]

    assert asyncio.run(Publisher().take_all(votes)) == {vote.vote_id for vote in votes}
