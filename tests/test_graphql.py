"""GraphQL, over real HTTP: the same polls, votes, rights and refusals as in REST, and a limit to what one document may ask for."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import connection
from django.test import Client, RequestFactory
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now
from rest_framework.request import Request

from core import logs
from polls import accounts, bundles, clients, codes, editing, problems, receipts, results, roles, voters
from polls.api.graphql import limits
from polls.api.graphql.schema import schema, sdl
from polls.api.graphql.shapes import Asked
from polls.api.graphql.view import MAX_BODY_BYTES
from polls.counting import count_votes
from polls.journal import Act
from polls.models import ApiClient, JournalEntry, OutboxBundle, Poll, Scope
from polls.snapshots import PollSnapshot
from tests.conftest import (
    PASSWORD,
    ROOT,
    Api,
    answers,
    database_url,
    free_port,
    make_user,
    option,
    standing,
    tallies,
    vote_of,
    wait_until,
    web,
)
from tests.test_intake import assert_refused
from tests.test_rights import _HEAD, _ROWS, LATER, Scene, a_poll
from tests.test_settings import PRODUCTION

CAST = """
    mutation cast($poll: ID!, $option: ID, $options: [ID!], $voter: String, $code: String, $key: String, $wait: Int! = 0) {
      castVote(pollId: $poll, option: $option, options: $options, voter: $voter, code: $code, idempotencyKey: $key, waitSeconds: $wait) {
        id receipt status reason acceptedAt countedAt
      }
    }
"""
CREATE = "mutation($input: NewPoll!) { createPoll(input: $input) { id title status options { text } } }"
LIST = """
    query($search: String, $status: [PollStatus!], $mine: Boolean, $policy: VoterPolicy, $method: VotingMethod, $first: Int! = 50,
          $after: String, $ordering: PollOrder! = CREATED_AT_DESC) {
      polls(search: $search, status: $status, mine: $mine, voterPolicy: $policy, method: $method, first: $first, after: $after,
            ordering: $ordering) {
        edges { cursor node { id title } }
        pageInfo { hasNextPage hasPreviousPage startCursor endCursor }
      }
    }
"""
EVERYTHING = """
    id title description status options { id text description position } method minChoices maxChoices voterPolicy allowChange
    allowWithdrawal resultsVisibility resultsStep opensAt closesAt
    createdAt etag addressLimit subnetLimit limitMode allowedNetworks autoQuarantine
    ruleParameters version errata
    results {
        status method totalVotes options { id text position votes share } revision asOf isFinal
        review { asOf openCases voters with { totalVotes options { id votes } } without { totalVotes options { id votes } } }
    }
"""


def ask(api, document, *, headers=None, **variables):
    answer = api.post("/graphql", {"query": document, "variables": variables}, **(headers or {}))
    assert answer.status == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer


def data_of(answer):
    assert "errors" not in answer.json, answer.text
    return answer.json["data"]


def assert_error(answer, problem, *, pointer=None, path=None):
    """The answer holds this one problem, as REST would say it."""
    [error] = answer.json["errors"]
    body = error["extensions"]
    assert (body["type"], body["status"], body["title"]) == (problem.type, problem.status, problem.title), answer.text
    assert len(error["message"]) > 10
    assert [each["pointer"] for each in body.get("errors", [])] == ([f"#{pointer}"] if pointer else []), answer.text
    if path:
        assert error["path"] == path.split(".")


@pytest.fixture
def anonymous(pipeline):
    return Api(pipeline, {})


@pytest.fixture(scope="session")
def production(pipeline, tmp_path_factory):
    """A web process without DEBUG."""
    port = free_port()
    own = {name: PRODUCTION[name] for name in ("DEBUG", "SECRET_KEY")}
    with web(port, tmp_path_factory.mktemp("production") / "web.log", SECURE_SSL_REDIRECT="false", ALLOWED_HOSTS="127.0.0.1", **own):
        wait_until(lambda: answers(port))
        yield Api(port, {})


# --- Votes ------------------------------------------------------------------------------------------------------------


def test_a_vote_is_counted_and_shows_in_the_results_of_rest(api, anonymous, poll):
    vote = data_of(ask(api, CAST, poll=str(poll.pk), option=str(option(poll, "soup")), voter="alice", wait=10))["castVote"]

    assert (vote["status"], vote["reason"]) == ("COUNTED", None)
    assert vote["acceptedAt"] <= vote["countedAt"]
    shown = anonymous.get(f"/api/v1/polls/{poll.pk}/results").json
    assert {each["text"]: each["votes"] for each in shown["options"]} == {"soup": 1, "salad": 0}
    assert anonymous.get(f"/api/v1/votes/{vote['receipt']}").json["id"] == vote["id"]


def test_who_does_not_wait_gets_a_receipt_that_tells_later(api, anonymous, poll):
    vote = data_of(ask(api, CAST, poll=str(poll.pk), option=str(option(poll, "soup")), voter="alice"))["castVote"]
    assert (vote["status"], vote["countedAt"]) == ("PENDING", None)

    def look():
        return data_of(ask(anonymous, "query($r: String!) { vote(receipt: $r) { id status } }", r=vote["receipt"]))["vote"]

    wait_until(lambda: look() == {"id": vote["id"], "status": "COUNTED"})


def test_an_approval_ballot_holds_options(api, make_poll):
    poll = make_poll(method="approval", options=[{"text": text} for text in ("soup", "salad", "noodles")])

    ask(api, CAST, poll=str(poll.pk), options=[str(option(poll, text)) for text in ("soup", "noodles")], voter="alice", wait=10)

    assert tallies(poll) == {"ballots": 1, "soup": 1, "noodles": 1}


def test_one_key_is_one_vote_in_rest_and_graphql(api, poll):
    by_rest = api.cast(poll, "alice", idempotency_key="k1", prefer="wait=10")
    soup = str(option(poll, "soup"))

    by_argument = data_of(ask(api, CAST, poll=str(poll.pk), option=soup, voter="alice", key="k1"))["castVote"]
    by_header = data_of(ask(api, CAST, poll=str(poll.pk), option=soup, voter="alice", headers={"idempotency_key": "k1"}))["castVote"]
    other = data_of(ask(api, CAST, poll=str(poll.pk), option=soup, voter="alice", key="k2", wait=10))["castVote"]

    assert by_rest.json["id"] == by_argument["id"] == by_header["id"] != other["id"]
    assert (other["status"], other["reason"]) == ("REJECTED", "DUPLICATE")
    assert tallies(poll) == {"soup": 1}


def test_a_refused_vote_does_not_take_its_neighbours_receipt_with_it(api, poll):
    soup = option(poll, "soup")
    document = f"""mutation {{
        alice: castVote(pollId: "{poll.pk}", option: "{soup}", voter: "alice", waitSeconds: 10) {{ status receipt }}
        bob: castVote(pollId: "{poll.pk}", option: "0", voter: "bob") {{ status receipt }}
        nobody: castVote(pollId: "{uuid4()}", option: "{soup}", voter: "bob") {{ status receipt }}
    }}"""

    answer = ask(api, document).json

    assert answer["data"]["alice"]["status"] == "COUNTED"
    assert receipts.read(answer["data"]["alice"]["receipt"]).poll_id == poll.pk
    assert (answer["data"]["bob"], answer["data"]["nobody"]) == (None, None)
    assert {error["path"][0]: error["extensions"]["type"] for error in answer["errors"]} == {
        "bob": problems.UNKNOWN_OPTION.type,
        "nobody": problems.UNKNOWN_POLL.type,
    }


def test_a_withdrawn_vote_counts_no_more(api, make_poll):
    poll = make_poll(allow_withdrawal=True)
    api.cast(poll, "alice", prefer="wait=10")

    document = 'mutation($poll: ID!) { withdrawVote(pollId: $poll, voter: "alice", waitSeconds: 10) { status } }'

    assert data_of(ask(api, document, poll=str(poll.pk)))["withdrawVote"]["status"] == "COUNTED"
    assert tallies(poll) == {}
    assert_error(ask(api, document, poll=str(make_poll().pk)), problems.NOT_OFFERED, path="withdrawVote")


def test_the_headers_tell_the_voter_as_in_rest(anonymous, owner, make_poll):
    for policy in ("ip", "session", "code"):
        poll = make_poll(voter_policy=policy)
        vote = {"poll": str(poll.pk), "option": str(option(poll, "soup")), "wait": 10}
        headers = {"voter_token": voters.new_voter_token(poll.pk)} if policy == "session" else {}
        if policy == "code":
            codes.upload(poll, [codes.Row("SOUP-4711", "alice", "Row 1")], Act("olga", now()))
            assert_error(ask(anonymous, CAST, **vote, code="SOUP-4712"), problems.UNKNOWN_CODE)
            vote["code"] = "soup 4711"
        if policy == "session":
            assert_error(ask(anonymous, CAST, **vote), problems.UNAUTHENTICATED)

        first = data_of(ask(anonymous, CAST, **vote, headers=headers))["castVote"]
        second = data_of(ask(anonymous, CAST, **vote, headers=headers))["castVote"]

        assert (first["status"], second["status"], second["reason"]) == ("COUNTED", "REJECTED", "DUPLICATE")
        assert len(standing(poll)) == 1


@pytest.mark.parametrize(
    ("wrong", "problem", "pointer"),
    [
        ({"option": None}, problems.INVALID, "/option"),
        ({"options": ["1", "2"]}, problems.INVALID, "/option"),
        ({"option": None, "options": []}, problems.WRONG_CHOICES, "/options"),
        ({"option": "x"}, problems.UNKNOWN_OPTION, "/option"),
        ({"poll": "x"}, problems.UNKNOWN_POLL, None),
        ({"poll": str(uuid4())}, problems.UNKNOWN_POLL, None),
        ({"voter": None}, problems.INVALID, "/voter"),
        ({"voter": "x" * 201}, problems.INVALID, "/voter"),
        ({"code": "SOUP"}, problems.INVALID, "/code"),
        ({"key": ""}, problems.INVALID, None),
        ({"key": "ä"}, problems.INVALID, None),
    ],
)
def test_a_bad_vote_is_told_what_is_wrong(api, poll, wrong, problem, pointer):
    vote = {"poll": str(poll.pk), "option": str(option(poll, "soup")), "voter": "alice", "wait": 1}

    assert_error(ask(api, CAST, **{**vote, **wrong}), problem, pointer=pointer, path="castVote")
    assert standing(poll) == {}


def test_closed_polls_take_no_votes(api, make_poll):
    poll, planned = make_poll(closes_in=-1, opens_in=-10), make_poll(opens_in=60)
    for each, problem in ((poll, problems.POLL_CLOSED), (planned, problems.POLL_NOT_OPEN)):
        assert_error(ask(api, CAST, poll=str(each.pk), option=str(option(each, "soup")), voter="alice"), problem)


def test_receipts_are_answered_in_their_order(anonymous, api, poll):
    mine = [api.cast(poll, voter, prefer="wait=10").json for voter in ("alice", "bob")]
    wanted = [mine[1]["receipt"], "none", mine[0]["receipt"], mine[1]["receipt"]]

    document = "query($r: [String!]!) { votes(receipts: $r) { id status } }"
    votes = data_of(ask(anonymous, document, r=wanted))["votes"]

    assert [vote and vote["id"] for vote in votes] == [mine[1]["id"], None, mine[0]["id"], mine[1]["id"]]
    assert len(data_of(ask(anonymous, document, r=[mine[0]["receipt"]] * 100))["votes"]) == 100
    for wrong in ([], [mine[0]["receipt"]] * 101):
        assert_error(ask(anonymous, document, r=wrong), problems.INVALID, pointer="/receipts")
    assert_error(ask(anonymous, 'query { vote(receipt: "none") { id } }'), problems.UNKNOWN_RECEIPT)


# --- Polls ------------------------------------------------------------------------------------------------------------


def test_a_poll_is_made_like_in_rest(owners_api, owner):
    options = [{"text": "soup", "description": "Leek and potato"}, {"text": "salad"}]
    wanted = {"title": "Lunch", "options": options, "voterPolicy": "ACCOUNT", "closesAt": LATER, "draft": True, "addressLimit": 3}

    made = data_of(ask(owners_api, CREATE, input=wanted))["createPoll"]

    poll = Poll.objects.get(pk=made["id"])
    assert (made["status"], made["options"]) == ("DRAFT", [{"text": "soup"}, {"text": "salad"}])
    assert (poll.owner, poll.voter_policy, poll.method, poll.address_limit) == (owner, "account", "single", 3)
    assert poll.options.get(text="soup").description == "Leek and potato"
    assert JournalEntry.objects.get(poll=poll).action == "created"


@pytest.mark.parametrize(
    ("wrong", "pointers"),
    [
        ({"title": ""}, ["/title"]),
        ({"title": "x" * 201, "description": None}, ["/title", "/description"]),
        ({"options": [{"text": "soup"}]}, ["/options"]),
        ({"options": [{"text": "soup"}, {"text": ""}]}, ["/options/1/text"]),
        ({"options": [{"text": "soup"}, {"text": "soup"}]}, ["/options"]),
        ({"closesAt": "tomorrow"}, ["/closesAt"]),
        ({"closesAt": "2001-01-01T00:00:00Z"}, ["/closesAt"]),
        ({"maxChoices": 2}, ["/maxChoices"]),
        ({"allowedNetworks": ["here"]}, ["/allowedNetworks/0"]),
        ({"addressLimit": 0}, ["/addressLimit"]),
    ],
)
def test_a_bad_poll_is_told_what_is_wrong(owners_api, wrong, pointers):
    poll = {"title": f"Bad {uuid4()}", "options": [{"text": "soup"}, {"text": "salad"}], "voterPolicy": "IP", "closesAt": LATER}

    answer = ask(owners_api, CREATE, input={**poll, **wrong})

    [error] = answer.json["errors"]
    assert (error["extensions"]["type"], error["path"]) == (problems.INVALID.type, ["createPoll"])
    assert [each["pointer"] for each in error["extensions"]["errors"]] == [f"#{pointer}" for pointer in pointers], answer.text
    assert not Poll.objects.filter(title=poll["title"]).exists()


@pytest.mark.parametrize("wrong", [{"title": None}, {"title": 7}, {"method": "BEST"}, {"closesAt": 7}, {"colour": "red"}])
def test_what_the_schema_does_not_know_is_refused_before_anything_is_done(owners_api, wrong):
    poll = {"title": f"Bad {uuid4()}", "options": [{"text": "soup"}, {"text": "salad"}], "voterPolicy": "IP", "closesAt": LATER}

    answer = ask(owners_api, CREATE, input={**poll, **wrong})

    assert_error(answer, problems.INVALID)
    assert "data" not in answer.json
    assert not Poll.objects.filter(title=poll["title"]).exists()


def test_a_poll_goes_through_its_stages(owners_api, make_poll):
    poll = make_poll(opens_in=600, draft=True)

    def move(action):
        return data_of(ask(owners_api, f"mutation {{ {action} {{ status closesAt version }} }}"))[action.partition("(")[0]]

    assert move(f'publishPoll(id: "{poll.pk}", reason: "ready")')["status"] == "SCHEDULED"
    assert JournalEntry.objects.filter(poll=poll).latest("id").reason == "ready"
    assert move(f'openPoll(id: "{poll.pk}")')["status"] == "OPEN"
    assert move(f'extendPoll(id: "{poll.pk}", closesAt: "2099-01-01T00:00:00Z")')["closesAt"] == "2099-01-01T00:00:00Z"
    assert move(f'closePoll(id: "{poll.pk}", closesAt: "2098-01-01T00:00:00Z")')["closesAt"] == "2098-01-01T00:00:00Z"
    assert move(f'closePoll(id: "{poll.pk}")')["status"] == "OPEN"  # for some seconds more
    Poll.objects.filter(pk=poll.pk).update(closes_at=now())
    assert move(f'reopenPoll(id: "{poll.pk}", closesAt: "2099-01-01T00:00:00Z")')["status"] == "OPEN"
    Poll.objects.filter(pk=poll.pk).update(closes_at=now(), finalised_at=now())
    assert move(f'archivePoll(id: "{poll.pk}")')["status"] == "ARCHIVED"

    assert_error(ask(owners_api, f'mutation {{ openPoll(id: "{poll.pk}") {{ id }} }}'), problems.POLL_IN_USE, path="openPoll")
    assert_error(ask(owners_api, 'mutation { openPoll(id: "x") { id } }'), problems.UNKNOWN_POLL)
    wrong = f'mutation {{ extendPoll(id: "{poll.pk}", closesAt: "soon") {{ id }} }}'
    assert_error(ask(owners_api, wrong), problems.INVALID, pointer="/closesAt")


def test_a_change_of_another_version_is_refused(owners_api, make_poll):
    poll = make_poll(opens_in=600)
    etag = data_of(ask(owners_api, f'{{ poll(id: "{poll.pk}") {{ etag }} }}'))["poll"]["etag"]
    document = f'mutation {{ openPoll(id: "{poll.pk}") {{ etag }} }}'

    assert_error(ask(owners_api, document, headers={"if_match": '"7-scheduled"'}), problems.CHANGED_MEANWHILE)
    assert data_of(ask(owners_api, document, headers={"if_match": etag}))["openPoll"]["etag"] != etag


def test_polls_are_filtered_sorted_and_paged(anonymous, make_poll):
    word = f"w{uuid4().hex}"
    made = [make_poll(title=f"{word} {number}", voter_policy=policy) for number, policy in enumerate(["ip", "client", "ip", "ip", "ip"])]
    make_poll(title=f"{word} later", opens_in=600, voter_policy="ip")
    make_poll(title=f"{word} several", method="approval")

    def page(**wanted):
        return data_of(ask(anonymous, LIST, search=word, **wanted))["polls"]

    assert len(page()["edges"]) == 7
    assert [edge["node"]["title"] for edge in page(status=["SCHEDULED"])["edges"]] == [f"{word} later"]
    assert len(page(status=["SCHEDULED", "OPEN"])["edges"]) == 7
    assert [edge["node"]["title"] for edge in page(method="APPROVAL")["edges"]] == [f"{word} several"]
    assert page(mine=True)["edges"] == []

    seen, after = [], None
    for size, more in ((2, True), (1, True), (2, False)):
        shown = page(status=["OPEN"], policy="IP", ordering="TITLE", first=size, after=after)
        assert shown["pageInfo"]["hasNextPage"] is (more or len(seen) + len(shown["edges"]) < 4)
        assert shown["pageInfo"]["hasPreviousPage"] is (after is not None)
        seen += [edge["node"]["id"] for edge in shown["edges"]]
        after = shown["pageInfo"]["endCursor"]
        assert after == (shown["edges"][-1]["cursor"])
    assert seen == [str(poll.pk) for poll in made if poll.voter_policy == "ip"]

    for wrong, pointer in (({"first": 0}, "/first"), ({"first": 101}, "/first"), ({"after": "x"}, "/after"), ({"after": after}, "/after")):
        assert_error(ask(anonymous, LIST, **wrong), problems.INVALID, pointer=pointer, path="polls")
    assert_error(ask(anonymous, LIST, search="a\0b"), problems.INVALID, pointer="/search")


def test_one_poll_or_twenty_take_as_many_queries(make_poll):
    word = f"w{uuid4().hex}"
    for number in range(20):
        count_votes([vote_of(make_poll(title=f"{word} {number}"), "alice")])
    document = f'query($first: Int!) {{ polls(search: "{word}", first: $first) {{ edges {{ node {{ {EVERYTHING} }} }} }} }}'

    def look(first):
        with CaptureQueriesContext(
            connection,
        ) as queries:
            answer = Client().post("/graphql", {"query": document, "variables": {"first": first}}, content_type="application/json")
        edges = answer.json()["data"]["polls"]["edges"]
        assert [edge["node"]["results"]["totalVotes"] for edge in edges] == [1] * first
        assert {option["text"] for edge in edges for option in edge["node"]["options"]} == {"soup", "salad"}
        return [query["sql"] for query in queries]

    assert len(look(1)) == len(look(20)) == 3  # polls, options, results


def test_everything_is_shown_as_in_rest(owners_api, make_poll):
    poll = make_poll(voter_policy="ip", address_limit=3, allowed_networks=["198.51.100.0/24"])
    count_votes([vote_of(poll, "alice")])

    shown = data_of(ask(owners_api, f'{{ poll(id: "{poll.pk}") {{ {EVERYTHING} }} }}'))["poll"]

    in_rest = owners_api.get(f"/api/v1/polls/{poll.pk}")
    tallied = owners_api.get(f"/api/v1/polls/{poll.pk}/results").json

    def as_in_rest(fields):
        names = fields.keys() - {"etag", "asOf", "results"}
        return {snake(name): fields[name].lower() if re.fullmatch("[A-Z_]+", str(fields[name])) else fields[name] for name in names}

    assert as_in_rest(shown) == {name: value for name, value in in_rest.json.items() if name != "links"}
    assert shown["etag"] == in_rest.headers["etag"]
    assert as_in_rest(shown["results"]) == {name: value for name, value in tallied.items() if name not in ("poll", "as_of", "errata")}


def snake(name):
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def test_strangers_see_neither_limits_nor_version(anonymous, make_poll):
    poll = make_poll(voter_policy="ip", address_limit=3, allowed_networks=["198.51.100.0/24"])

    document = f'{{ poll(id: "{poll.pk}") {{ addressLimit subnetLimit limitMode allowedNetworks version title }} }}'

    shown = data_of(ask(anonymous, document))["poll"]
    assert shown.pop("title") == poll.title
    assert set(shown.values()) == {None}


# --- Rights -----------------------------------------------------------------------------------------------------------

# As GraphQL asks for what has a row in the table of tests/test_rights.py: the same people, and the same answers.
OPERATIONS = {
    "polls_create": lambda scene: (
        CREATE,
        {"input": {"title": "Lunch", "options": [{"text": "soup"}, {"text": "salad"}], "voterPolicy": "IP", "closesAt": LATER}},
    ),
    "polls_read": lambda scene: (f'{{ poll(id: "{scene.poll.pk}") {{ id }} }}', {}),
    "results_read": lambda scene: (f'{{ poll(id: "{scene.poll.pk}") {{ results {{ totalVotes }} }} }}', {}),
    **{
        f"polls_{stage}": lambda scene, stage=stage: (f'mutation {{ {stage}Poll(id: "{scene.poll.pk}") {{ id }} }}', {})
        for stage in ("publish", "open", "close", "archive")
    },
    **{
        f"polls_{stage}": lambda scene, stage=stage: (
            f'mutation {{ {stage}Poll(id: "{scene.poll.pk}", closesAt: "{LATER}") {{ id }} }}',
            {},
        )
        for stage in ("extend", "reopen")
    },
    "votes_cast": lambda scene: (CAST, {"poll": str(scene.poll.pk), **scene.ballot}),
    "votes_withdraw": lambda scene: (f'mutation {{ withdrawVote(pollId: "{scene.poll.pk}", voter: "alice") {{ id }} }}', {}),
}
ROWS = [(operation, kind, dict(zip(_HEAD, map(int, statuses), strict=True))) for operation, kind, *statuses in _ROWS]


@pytest.fixture(scope="session")
def callers(pipeline, owner):
    """{name in the table: the API as they see it}"""
    named = {"member": (), "rival": (roles.OWNER,), "operator": (roles.OPERATOR,), "auditor": (roles.AUDITOR,), "admin": (roles.ADMIN,)}
    people = {"owner": owner, **{name: make_user(f"graph-{name}", *has) for name, has in named.items()}}
    lunch = {"title": "Lunch", "options": [{"text": "soup"}, {"text": "salad"}], "voter_policy": "ip"}
    another = editing.create_poll(owner, {**lunch, "closes_at": now() + timedelta(days=1)}, at=now())

    def key(whose, *scopes, poll_id=None):
        return clients.make_client(people[whose], {"name": "kiosk", "scopes": list(scopes), "poll_id": poll_id}, at=now())[1]

    keys = {
        "cast": key("owner", Scope.VOTES_CAST),
        "write": key("owner", Scope.POLLS_WRITE),
        "read": key("owner", Scope.RESULTS_READ),
        "rivals": key("rival", *Scope),
        "admins": key("admin", *Scope),
        "elsewhere": key("owner", *Scope, poll_id=another.pk),
        "revoked": key("owner", *Scope),
    }
    ApiClient.objects.filter(prefix=voters.key_prefix(keys["revoked"])).update(revoked_at=now())
    known = {name: f"Bearer {accounts.sign_in(user.username, PASSWORD).access}" for name, user in people.items()}
    known |= {name: f"Api-Key {value}" for name, value in keys.items()}
    return {"nobody": Api(pipeline, {}), **{name: Api(pipeline, {"authorization": value}) for name, value in known.items()}}


@pytest.mark.parametrize(
    ("operation", "kind", "in_rest"),
    [row for row in ROWS if row[0] in OPERATIONS],
    ids=[f"{operation} {kind}" for operation, kind, _ in ROWS if operation in OPERATIONS],
)
def test_who_may_is_the_same_as_in_rest(callers, owner, make_poll, operation, kind, in_rest):
    answered, scene = {}, None
    for name, api in callers.items():
        scene = scene or Scene(a_poll(make_poll, kind), clients.make_client(owner, {"name": "kiosk"}, at=now())[0])
        document, variables = OPERATIONS[operation](scene)
        headers = {"voter_token": voters.new_voter_token(scene.poll.pk)} if kind == "session" else {}
        before = scene.rows()

        answer = api.post("/graphql", {"query": document, "variables": variables}, **headers)

        if "errors" in answer.json:
            answered[name] = answer.json["errors"][0]["extensions"]["status"]
            assert scene.rows() == before, f"{name} was refused, and changed something"
        else:
            answered[name] = answer.status
            scene = None
    # A key that is revoked is refused at the door, also where REST would not ask for one.
    assert answered == {**{name: 200 if status < 300 else status for name, status in in_rest.items()}, "revoked": 401}


def test_me_is_who_is_signed_in(callers):
    document = "{ me { username email roles } }"

    assert data_of(ask(callers["nobody"], document)) == {"me": None}
    assert data_of(ask(callers["auditor"], document))["me"] == {
        "username": "graph-auditor",
        "email": "graph-auditor@example.org",
        "roles": ["auditor"],
    }
    assert_error(ask(callers["cast"], document), problems.FORBIDDEN)


def test_drafts_are_listed_for_the_people_behind_them_only(callers, make_poll):
    poll = a_poll(make_poll, "draft", title=f"Lunch {uuid4()}")

    seen = {name: ask(api, LIST, search=poll.title.split()[1]) for name, api in callers.items() if name != "revoked"}

    assert {name for name, answer in seen.items() if data_of(answer)["polls"]["edges"]} == {"owner", "auditor", "admin", "write"}


@pytest.mark.parametrize("visibility", ["after_vote", "after_close", "owner"])
def test_hidden_results_are_shown_for_a_receipt_where_they_are_for_voters(api, anonymous, make_poll, visibility):
    poll, other = make_poll(results_visibility=visibility), make_poll()
    mine, others = (api.cast(each, "alice", prefer="wait=10").json["receipt"] for each in (poll, other))
    document = f'query($r: String) {{ poll(id: "{poll.pk}") {{ title results(receipt: $r) {{ totalVotes }} }} }}'

    for receipt in (None, "", "none", others, *([] if visibility == "after_vote" else [mine])):
        answer = ask(anonymous, document, r=receipt)
        assert_error(answer, problems.RESULTS_HIDDEN, path="poll.results")
        assert answer.json["data"]["poll"] == {"title": poll.title, "results": None}
    if visibility == "after_vote":
        assert data_of(ask(anonymous, document, r=mine))["poll"]["results"] == {"totalVotes": 1}


@pytest.mark.parametrize("authorization", ["Bearer x.y.z", "Api-Key nxs_abcdefgh_x"])
def test_a_wrong_token_is_refused_at_the_door(anonymous, authorization):
    answer = anonymous.post("/graphql", {"query": "{ me { username } }"}, authorization=authorization)

    assert_refused(answer, problems.UNAUTHENTICATED)


# --- What is sent -----------------------------------------------------------------------------------------------------

HELLO = "{ __typename }"


@pytest.mark.parametrize(
    ("body", "problem", "pointer"),
    [
        (b"{", problems.MALFORMED, None),
        (b"\xff", problems.MALFORMED, None),
        (b"[" * 8000, problems.MALFORMED, None),
        ({}, problems.INVALID, "/query"),
        ({"query": None}, problems.INVALID, "/query"),
        ({"query": ""}, problems.INVALID, "/query"),
        ({"query": {}}, problems.INVALID, "/query"),
        ({"query": HELLO, "variables": "x"}, problems.INVALID, "/variables"),
        (b'{"query": "{ __typename }", "variables": {"x": "\\ud800"}}', problems.INVALID, "/variables"),
        ({"query": HELLO, "operationName": "other"}, problems.INVALID, "/operationName"),
        ({"query": "fragment f on Query { me { username } }"}, problems.INVALID, "/operationName"),
        ({"query": HELLO, "colour": "red"}, problems.INVALID, "/colour"),
        ([{"query": HELLO}], problems.INVALID, None),  # a batch
    ],
)
def test_a_body_that_is_no_request(anonymous, body, problem, pointer):
    assert_refused(anonymous.post("/graphql", body), problem, pointer=pointer)


def test_what_clients_send_beside_the_document_is_taken(anonymous):
    body = {"query": "query a { __typename } query b { me { username } }", "operationName": "a", "variables": None, "extensions": {}}

    assert anonymous.post("/graphql", body).json == {"data": {"__typename": "Query"}}
    assert anonymous.post("/graphql/", {"query": HELLO}).json == {"data": {"__typename": "Query"}}


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/graphql"]
)
def test_only_json_is_taken(anonymous, media_type):
    """What a form of another site can send is refused: so none of its pages votes in a visitor's name."""
    assert_refused(anonymous.post("/graphql", json.dumps({"query": HELLO}).encode(), content_type=media_type), problems.NOT_JSON)


def test_nothing_is_answered_to_a_get(anonymous):
    assert_refused(anonymous.get(f"/graphql?query={HELLO.replace(' ', '')}", accept="text/html,*/*"), problems.WRONG_METHOD)


@pytest.mark.parametrize(
    "document", ["{", "{ nothing }", "{ me }", "{ me { username } ", "query($x: Int!) { me { username } }", "subscription { x }"]
)
def test_a_document_that_is_wrong(anonymous, document):
    answer = ask(anonymous, document)

    assert "data" not in answer.json
    assert {error["extensions"]["type"] for error in answer.json["errors"]} == {problems.INVALID.type}


def test_what_nobody_foresaw_is_told_to_nobody(monkeypatch, caplog, poll):
    def fail(*_):
        raise RuntimeError("the voter is alice")

    monkeypatch.setattr(results, "read_all_results", fail)
    document = f'{{ poll(id: "{poll.pk}") {{ title results {{ totalVotes }} }} }}'

    with caplog.at_level(logging.DEBUG):
        answer = Client().post("/graphql", {"query": document}, content_type="application/json").json()

    [error] = answer["errors"]
    assert (error["extensions"]["type"], error["path"]) == (problems.SERVER_ERROR.type, ["poll", "results"])
    assert answer["data"]["poll"] == {"title": poll.title, "results": None}
    written = "\n".join(map(logs.Json(texts=False).format, caplog.records))
    assert "GraphQL's field poll.results failed" in written
    assert "alice" not in json.dumps(answer) + written


def test_a_refused_document_is_not_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        body = {"query": "query($x: Int!) { __typename @skip(if: $x) }", "variables": {"x": "alice"}}
        answer = Client().post("/graphql", body, content_type="application/json").json()

    assert answer["errors"][0]["extensions"]["type"] == problems.INVALID.type
    assert "alice" not in caplog.text


def test_the_request_has_the_id_that_it_came_with(anonymous):
    assert anonymous.post("/graphql", {"query": HELLO}, x_request_id="lunch-1").headers["x-request-id"] == "lunch-1"
    assert anonymous.post("/graphql", {"query": HELLO}).headers["x-request-id"]


# --- Limits -----------------------------------------------------------------------------------------------------------


def refused_for(answer):
    """What the document has too much of, or None."""
    messages = [error["message"] for error in answer.json.get("errors", [])]
    return next((message.split("'s ")[1].split(" is ")[0] for message in messages if " is over " in message), None)


def test_depth(anonymous):
    deep = "{ a " * limits.MAX_DEPTH + "}" * limits.MAX_DEPTH

    assert refused_for(ask(anonymous, deep)) is None  # there is no such field; but deep it may be
    assert refused_for(ask(anonymous, f"{{ a {deep} }}")) == "depth"
    hidden = f"{{ ...f }} fragment f on Query {{ a {{ ... on Poll {deep} }} }}"
    assert refused_for(ask(anonymous, hidden)) == "depth"


def test_aliases(anonymous):
    def aliases(count):
        return " ".join(f"a{number}: __typename" for number in range(count))

    assert len(data_of(ask(anonymous, f"{{ {aliases(limits.MAX_ALIASES)} }}"))) == limits.MAX_ALIASES
    assert refused_for(ask(anonymous, f"{{ {aliases(limits.MAX_ALIASES + 1)} }}")) == "number of aliases"
    spread = f"{{ a: me {{ ...f }} b: me {{ ...f }} }} fragment f on Account {{ {aliases(7)} }}"
    assert refused_for(ask(anonymous, spread)) == "number of aliases"


@pytest.mark.parametrize("first", ["100", "$first", "$given", "$absent"])
def test_cost(anonymous, first):
    head = "query($first: Int! = 100, $given: Int! = 1, $absent: Int!)"

    def page(fields):
        document = f"{head} {{ polls(first: {first}) {{ edges {{ node {{ {'id ' * fields} }} }} }} }}"
        return anonymous.post("/graphql", {"query": document, "variables": {"given": 100}})

    most = (limits.MAX_COST - 1) // 100 - limits.POLL_COST - len(["edges", "node"])
    assert refused_for(page(most)) is None
    assert refused_for(page(most + 1)) == "cost"


def test_the_longest_page_with_everything_on_it_is_within_the_limits(anonymous):
    assert refused_for(ask(anonymous, f"{{ polls(first: 100) {{ edges {{ cursor node {{ {EVERYTHING} }} }} }} }}")) is None


def test_the_cost_of_pages_and_receipts_adds_up(anonymous):
    def pages(count, ids=1):
        return " ".join(f"p{number}: polls(first: 100) {{ edges {{ node {{ {'id ' * ids} }} }} }}" for number in range(count))

    assert refused_for(ask(anonymous, f"{{ {pages(8)} }}")) is None
    assert refused_for(ask(anonymous, f"{{ {pages(8, 2)} }}")) == "cost"
    votes = f"query($r: [String!]!) {{ votes(receipts: $r) {{ {'id ' * 64} }} }}"
    assert refused_for(ask(anonymous, votes, r=["none"] * 100)) is None
    assert refused_for(ask(anonymous, votes.replace("id", "id id", 1), r=["none"] * 100)) == "cost"


def test_tokens(anonymous):
    def document(tokens):
        return "{ votes(receipts: [" + '"" ' * (tokens - 12) + "]) { id } }"

    # So many receipts are too many, but the document with them may be as long.
    assert_error(ask(anonymous, document(limits.MAX_TOKENS)), problems.INVALID, pointer="/receipts")
    answer = ask(anonymous, document(limits.MAX_TOKENS + 1))
    assert_error(answer, problems.INVALID)
    assert f"{limits.MAX_TOKENS} tokens" in answer.json["errors"][0]["message"]


def test_the_length_of_a_document_and_of_a_body(anonymous):
    longest = HELLO + " " * (limits.MAX_DOCUMENT_LENGTH - len(HELLO))
    assert data_of(ask(anonymous, longest)) == {"__typename": "Query"}
    assert_refused(anonymous.post("/graphql", {"query": longest + " "}), problems.INVALID, pointer="/query")

    body = json.dumps({"query": HELLO, "variables": {"x": ""}}).encode()
    padding = MAX_BODY_BYTES - len(body)
    assert anonymous.post("/graphql", body.replace(b'""', b'"%s"' % (b"x" * padding))).status == 200
    assert_refused(anonymous.post("/graphql", body.replace(b'""', b'"%s"' % (b"x" * (padding + 1)))), problems.TOO_LARGE)


@pytest.mark.parametrize(
    "document",
    [
        # Each fragment spreads the next twice: 2^40 fields for who counts them one by one.
        "{ ...f0 } "
        + " ".join(f"fragment f{n} on Query {{ ...f{n + 1} ...f{n + 1} }}" for n in range(40))
        + " fragment f40 on Query { __typename }",
        "{ ...f0 } " + " ".join(f"fragment f{n} on Query {{ a{n}: me {{ username }} ...f{n + 1} ...f{n + 1} }}" for n in range(40)),
        "{ ...f } fragment f on Query { ...f me { username } }",
        "{ ...nothing }",
        "{ me " * 490 + "}" * 490,
        "{ a(b: " + "[" * 900 + ") }",
        "{ " + "me { username } " * 249 + "}",
    ],
    ids=["doubling", "doubling aliases", "circle", "unknown fragment", "deep", "deep list", "many"],
)
def test_no_document_keeps_the_server_busy(anonymous, document):
    started = time.monotonic()

    answer = ask(anonymous, document)

    assert time.monotonic() - started < 3
    assert answer.json


INTROSPECTION = "{ __schema { types { name } } }"


def test_the_schema_is_told_in_development_only(anonymous, production):
    assert "Poll" in {each["name"] for each in data_of(ask(anonymous, INTROSPECTION))["__schema"]["types"]}

    for document in (INTROSPECTION, '{ __type(name: "Poll") { name } }'):
        answer = ask(production, document)
        assert {error["extensions"]["type"] for error in answer.json["errors"]} == {problems.INVALID.type}
        assert "data" not in answer.json
    assert data_of(ask(production, HELLO)) == {"__typename": "Query"}
    assert "Did you mean" not in ask(production, "{ polz { edges { cursor } } }").text
    assert "Did you mean" in ask(anonymous, "{ polz { edges { cursor } } }").text


@pytest.mark.parametrize(("debug", "introspection", "told"), [("false", "true", True), ("true", "false", False)])
def test_the_setting_decides_who_is_told_the_schema(debug, introspection, told):
    command = (
        "import django; django.setup(); from polls.api.graphql.schema import schema; "
        f"print(schema.execute_sync({INTROSPECTION!r}).errors is None)"
    )
    own = {**PRODUCTION, "DEBUG": debug, "GRAPHQL_INTROSPECTION": introspection, "DJANGO_SETTINGS_MODULE": "core.settings"}

    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == str(told)


def test_the_schema_in_its_own_language_names_every_field():
    text = sdl()

    for words in ("castVote(pollId: ID!", "type PollConnection", "enum PollStatus", "scalar DateTime", "input NewPoll"):
        assert words in text
    assert text.endswith("}\n")


def test_requests_count_together_with_those_of_rest(pipeline, tmp_path, make_poll):
    port = free_port()
    poll = make_poll(voter_policy="ip")
    with web(port, tmp_path / "web.log", ADDRESS_REQUESTS_PER_MINUTE="6"):
        wait_until(lambda: answers(port))
        wait_until(lambda: time.time() % 60 < 50)  # all of it in one minute
        limited = Api(port, {})

        def left(answer):
            return int(answer.headers["ratelimit"].split("r=")[1].split(";")[0])

        assert left(limited.get(f"/api/v1/polls/{poll.pk}")) == 5
        assert left(ask(limited, HELLO)) == 4
        assert left(ask(limited, CAST, poll=str(poll.pk), option=str(option(poll, "soup")))) == 2  # the request and the vote
        assert left(limited.get(f"/api/v1/polls/{poll.pk}")) == 1
        # The last request passes; its vote would be one too many.
        assert_error(ask(limited, CAST, poll=str(poll.pk), option=str(option(poll, "soup"))), problems.TOO_MANY_REQUESTS)
        assert_refused(limited.post("/graphql", {"query": HELLO}), problems.TOO_MANY_REQUESTS)
        assert_refused(limited.get(f"/api/v1/polls/{poll.pk}"), problems.TOO_MANY_REQUESTS)


# --- Waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time_left", "waited"), [(10, [10]), (3, [3]), (-1, [])])
def test_all_votes_of_a_request_share_the_time_that_they_are_waited_for(poll, time_left, waited):
    vote, asked_for, snapshot = vote_of(poll, "alice"), [], PollSnapshot.read(str(poll.pk))

    class Desk:
        async def accept(self, *_):
            return snapshot, vote

        async def wait_for(self, receipt, seconds):
            asked_for.append(round(seconds))
            return receipt.pending()

    request = RequestFactory().post("/graphql")
    request.scope, request.rate = {"desk": Desk()}, None
    asked = Asked(Request(request), now(), time.monotonic() + time_left)

    result = schema.execute_sync(CAST, {"poll": str(poll.pk), "option": "1", "wait": 60}, context_value=asked)

    assert result.data["castVote"]["status"] == "PENDING"
    assert asked_for == waited


def test_who_waits_holds_no_database_connection(pipeline, tmp_path, client_key, make_poll):
    """PostgreSQL has a hundred, and there may be a thousand who wait."""
    port, poll = free_port(), make_poll()
    # Nobody counts what goes to this queue.
    with web(port, tmp_path / "web.log", QUEUE_PREFIX=f"nobody-{uuid4()}-", DATABASE_URL=f"{database_url()}?application_name=waiting"):
        wait_until(lambda: answers(port))
        api = Api(port, {"authorization": f"Api-Key {client_key}"})
        vote = {"poll": str(poll.pk), "option": str(option(poll, "soup")), "wait": 4}
        with ThreadPoolExecutor(30) as threads:
            waiting = [threads.submit(ask, api, CAST, **vote, voter=f"voter {number}") for number in range(30)]
            wait_until(lambda: len(kept_for(poll)) == 30)
            wait_until(lambda: connections_of("waiting") < 15, seconds=2)  # the desk's own threads have some
            assert not any(each.done() for each in waiting)
        assert {data_of(each.result())["castVote"]["status"] for each in waiting} == {"PENDING"}
    OutboxBundle.objects.all().delete()


def kept_for(poll):
    kept = [vote for bundle in OutboxBundle.objects.all() for vote in bundles.decode(bytes(bundle.body))]
    return [vote for vote in kept if vote.poll_id == poll.pk]


def connections_of(name):
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", [name])
        return cursor.fetchone()[0]
