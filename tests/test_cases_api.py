"""Suspicious addresses through the API: what operators and auditors read, and what operators decide."""

import time
from datetime import timedelta
from secrets import token_bytes
from uuid import uuid4

import pytest
from django.utils.timezone import now

from polls import cases, fraud, networks, problems
from polls.counting import count_votes
from polls.models import Block, Decision, Hold, NetworkSecret, Poll, SuspiciousIP
from polls.moments import from_microseconds, iso
from tests.conftest import Api, make_user, option, signed_in, tallies, vote_of
from tests.test_intake import assert_refused

CASES, BLOCKS = "/api/v1/suspicious-ips", "/api/v1/blocks"
LUNCH = {"title": "Lunch", "options": [{"text": "soup"}, {"text": "salad"}], "voter_policy": "ip", "closes_at": "2099-12-31T12:00:00Z"}
WHY = {"reason": "All by one script."}


@pytest.fixture(scope="module")
def staff(pipeline):
    """{role: the running pipeline as somebody with this role, and no other, sees it}"""
    for role in ("operator", "auditor", "owner"):
        make_user(f"cases-{role}", role)
    return {role: signed_in(pipeline, f"cases-{role}") for role in ("operator", "auditor", "owner")}


@pytest.fixture
def operator(staff):
    return staff["operator"]


@pytest.fixture
def make_poll(make_poll):
    def make_own_poll(secret=None, **fields):
        """A poll in whose keys nobody else's votes are, unless `secret` is theirs."""
        poll = make_poll(**{"voter_policy": "session", **fields})
        poll.network_secret = secret or NetworkSecret.objects.create(secret=token_bytes(32), made_at=now() - timedelta(days=1))
        poll.network_secret_since = now() - timedelta(days=1)
        poll.save(update_fields=["network_secret", "network_secret_since"])
        return poll

    return make_own_poll


def make_case(poll, address="192.0.2.7", /, **fields):
    """A case about the address in the poll, as a rule would write it."""
    address_key, subnet_key = networks.cipher_for(poll).keys(address)
    given = {
        "poll": poll,
        "rule": "busy_address",
        "kind": "address",
        "network_key": address_key,
        "subnet_key": subnet_key,
        "network_secret": poll.network_secret,
        "evidence": {"votes": 3, "share": 0.75},
        "score": 3.5,
        "votes": 3,
        "first_seen": now() - timedelta(hours=1),
        "last_seen": now(),
        "found_at": now(),
    }
    if fields.get("kind") == "subnet":
        given["network_key"] = subnet_key
    return SuspiciousIP.objects.create(**{**given, **fields})


def cast(poll, *voters, text="soup", address="192.0.2.7", at=0):
    """Count a vote of each of the voters, a second apart."""
    votes = [vote_of(poll, voter, text, address=address, at=at + second) for second, voter in enumerate(voters)]
    count_votes(votes)
    return votes


@pytest.fixture
def lunch(make_poll):
    """Thirty votes for soup from one address, ten for soup from its neighbour, twenty for salad from elsewhere: ten a second."""
    poll = make_poll()
    for n in range(10):
        cast(poll, f"a {n}", f"b {n}", f"c {n}")
        cast(poll, f"alice {n}", address="192.0.2.8")
        cast(poll, f"bob {n}", f"carol {n}", text="salad", address="198.51.100.1")
    return poll


def path_of(case, *more):
    return "/".join([CASES, str(case.pk), *more])


# --- The list ---------------------------------------------------------------------------------------------------------


def test_cases_are_listed_newest_first_and_filtered(operator, make_poll):
    poll = make_poll()
    old = make_case(poll, found_at=now() - timedelta(days=1), state="cleared")
    new = make_case(poll, "192.0.2.9", kind="subnet", rule="busy_ipv4_subnet")
    make_case(make_poll())

    def ids(query):
        return [case["id"] for case in operator.get(f"{CASES}?poll={poll.pk}{query}").json["results"]]

    assert ids("") == [str(new.pk), str(old.pk)]
    assert ids("&state=cleared") == [str(old.pk)]
    assert ids("&kind=subnet") == [str(new.pk)]
    assert ids("&rule=busy_ipv4_subnet") == [str(new.pk)]
    assert ids("&page_size=1") == [str(new.pk)]
    following = operator.get(f"{CASES}?poll={poll.pk}&page_size=1").json["next"]
    assert [case["id"] for case in operator.get(following[following.index("/api") :]).json["results"]] == [str(old.pk)]


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("poll=x", "poll"),
        ("rule=none", "rule"),
        ("state=won", "state"),
        ("kind=city", "kind"),
        ("states=open", "states"),
        ("state=", "state"),
    ],
)
def test_a_wrong_filter_is_refused(operator, query, name):
    assert_refused(operator.get(f"{CASES}?{query}"), problems.INVALID, pointer=f"/{name}")


def test_the_network_is_for_operators_while_its_secret_lives(staff, lunch):
    case = make_case(lunch)

    for path in (f"{CASES}?poll={lunch.pk}", path_of(case)):
        assert '"192.0.2.7/32"' in staff["operator"].get(path).text
        shown = staff["auditor"].get(path).text
        assert "192.0.2" not in shown and '"network":null' in shown
    Poll.objects.filter(pk=lunch.pk).update(network_secret=None)
    SuspiciousIP.objects.filter(pk=case.pk).update(network_secret=None)
    for path in (f"{CASES}?poll={lunch.pk}", path_of(case)):
        answer = staff["operator"].get(path)
        assert answer.status == 200 and "192.0.2" not in answer.text


# --- One --------------------------------------------------------------------------------------------------------------


def test_a_case_shows_what_helps_to_decide(operator, lunch):
    case = make_case(lunch)
    neighbour = make_case(lunch, "192.0.2.8")
    soup, salad = (str(option(lunch, text)) for text in ("soup", "salad"))

    shown = operator.get(path_of(case)).json

    assert (shown["id"], shown["poll"], shown["rule"], shown["state"]) == (str(case.pk), str(lunch.pk), "busy_address", "open")
    assert (shown["kind"], shown["network"], shown["one_signature"]) == ("address", "192.0.2.7/32", False)
    assert (shown["score"], shown["votes"], shown["evidence"]) == (3.5, 3, {"votes": 3, "share": 0.75})
    assert shown["outcomes"] == {"counted": 30}
    assert shown["over_time"]["step_seconds"] == 60
    assert [(bar["counted"], bar["votes"]) for bar in shown["over_time"]["bars"]] == [(30, 30)]
    as_of = {choice.pop("as_of") for choice in shown["choices"]}
    assert len(as_of) == 1
    assert shown["choices"] == [
        {
            "poll": str(lunch.pk),
            "option": soup,
            "text": "soup",
            "voters": 30,
            "share": 1.0,
            "others": 10,
            "others_share": 0.3333,
            "votes": 40,
        },
        {
            "poll": str(lunch.pk),
            "option": salad,
            "text": "salad",
            "voters": 0,
            "share": 0.0,
            "others": 20,
            "others_share": 0.6667,
            "votes": 20,
        },
    ]
    assert shown["subnet"]["addresses"] == 2
    assert shown["subnet"]["busiest"] == [
        {"is_subject": True, "votes": 30, "voters": 30},
        {"is_subject": False, "votes": 10, "voters": 10},
    ]
    assert [other["id"] for other in shown["subnet"]["cases"]] == [str(neighbour.pk)]
    assert (shown["holds"], shown["decisions"], shown["blocks"]) == ([], [], [])


def test_a_case_shows_no_voter_no_vote_and_no_key(operator, lunch):
    case = make_case(lunch)
    [vote, *_] = cast(lunch, "dora")

    shown = operator.get(path_of(case)).text

    for secret in (vote.voter_key, vote.vote_id, case.network_key, case.subnet_key):
        assert str(secret) not in shown and secret.hex not in shown


def test_votes_over_time_have_a_step_that_fits_and_no_gaps(lunch):
    cast(lunch, "late", at=2 * 3600)
    case = make_case(lunch)

    step, bars = cases.over_time(case)

    assert step == timedelta(minutes=5)
    assert [bar.votes for bar in bars] == [30, *[0] * 23, 1]
    assert bars[-1].begins_at - bars[0].begins_at == 24 * step
    assert bars[0].begins_at == from_microseconds(1_800_000_000_000_000)


def test_a_case_of_a_subnet_has_the_votes_of_all_its_addresses_and_a_signature_narrows_it(operator, lunch):
    subnet = operator.get(path_of(make_case(lunch, kind="subnet"))).json
    signature = operator.get(path_of(make_case(lunch, kind="subnet", signature_key=7))).json

    assert (subnet["network"], subnet["outcomes"]) == ("192.0.2.0/24", {"counted": 40})
    assert (signature["one_signature"], signature["outcomes"], signature["choices"]) == (True, {}, [])
    assert signature["over_time"]["bars"] == []


def test_a_case_over_all_polls_shows_each_of_them(operator, make_poll):
    polls = [first := make_poll(), make_poll(first.network_secret)]
    for n in range(10):
        cast(polls[0], f"a {n}")
        cast(polls[1], f"a {n}", f"b {n}", text="salad")

    shown = operator.get(path_of(make_case(polls[0], poll=None))).json

    assert shown["poll"] is None
    assert [(choice["poll"], choice["text"], choice["voters"]) for choice in shown["choices"]] == [
        (str(polls[1].pk), "soup", 0),
        (str(polls[1].pk), "salad", 20),
        (str(polls[0].pk), "soup", 10),
        (str(polls[0].pk), "salad", 0),
    ]


def test_an_approval_ballot_counts_for_each_of_its_options(operator, make_poll):
    poll = make_poll(method="approval")
    count_votes([vote_of(poll, f"a {n}", "soup", "salad", address="192.0.2.7") for n in range(10)])
    count_votes([vote_of(poll, f"alice {n}", "soup", address="198.51.100.1") for n in range(10)])

    choices = operator.get(path_of(make_case(poll))).json["choices"]

    assert [(choice["voters"], choice["share"], choice["others"], choice["others_share"]) for choice in choices] == [
        (10, 1.0, 10, 1.0),
        (10, 1.0, 0, 0.0),
    ]


def test_of_a_voters_votes_the_one_that_stands_says_what_they_chose(operator, make_poll):
    poll = make_poll()
    voters = [f"a {n}" for n in range(10)]
    cast(poll, *voters)
    cast(poll, *voters, text="salad", at=10)  # duplicates

    shown = operator.get(path_of(make_case(poll))).json

    assert shown["outcomes"] == {"counted": 10, "rejected": 10}
    assert [(choice["text"], choice["voters"]) for choice in shown["choices"]] == [("soup", 10), ("salad", 0)]


def test_votes_that_are_held_are_shown_as_what_they_were_for(operator, lunch):
    case = make_case(lunch)
    operator.post(path_of(case, "quarantine"), WHY)

    shown = operator.get(path_of(case)).json

    assert shown["outcomes"] == {"quarantined": 30}
    assert [(bar["counted"], bar["votes"]) for bar in shown["over_time"]["bars"]] == [(0, 30)]
    assert [(choice["voters"], choice["others"], choice["votes"]) for choice in shown["choices"]] == [(30, 10, 10), (0, 20, 20)]
    [hold] = shown["holds"]
    assert (hold["ruling"], hold["case"], hold["whole_subnet"], hold["reason"]) == ("quarantine", str(case.pk), False, WHY["reason"])


def test_large_evidence_is_shown_whole(operator, lunch):
    evidence = {f"number_{n}": n / 7 for n in range(1000)}
    assert operator.get(path_of(make_case(lunch, evidence=evidence))).json["evidence"] == evidence


def test_what_is_no_case_is_not_found(operator):
    for answer in (operator.get(f"{CASES}/999999999"), operator.post(f"{CASES}/999999999/void", WHY), operator.get(f"{CASES}/x")):
        assert_refused(answer, problems.NOT_FOUND)


# --- Rulings on cases -------------------------------------------------------------------------------------------------


def test_a_case_is_quarantined_released_voided_and_cleared(operator, lunch):
    case = make_case(lunch)
    soup = str(option(lunch, "soup"))
    everything, honest = {"soup": 40, "salad": 20}, {"soup": 10, "salad": 20}
    steps = [
        ("quarantine", "open", honest, 30, {soup: [40, 10]}),
        ("release", "open", everything, 30, {soup: [10, 40]}),
        ("void", "confirmed", honest, 30, {soup: [40, 10]}),
        ("void", "confirmed", honest, 0, {}),  # repeated
        ("clear", "cleared", everything, 30, {soup: [10, 40]}),
    ]
    for ruling, state, counted, votes, changes in steps:
        answer = operator.post(path_of(case, ruling), {"reason": f"{ruling}!"})

        assert answer.status == 200, answer.text
        assert tallies(lunch) == counted, ruling
        shown, [decision] = answer.json["case"], answer.json["decisions"]
        assert (shown["state"], shown["reviewer"], shown["note"]) == (state, "cases-operator", f"{ruling}!")
        assert (decision["ruling"], decision["actor"], decision["reason"]) == (ruling, "cases-operator", f"{ruling}!")
        assert (decision["poll"], decision["cases"], decision["votes"], decision["changes"]) == (
            str(lunch.pk),
            [str(case.pk)],
            votes,
            changes,
        )
    history = operator.get(path_of(case)).json["decisions"]
    assert [decision["ruling"] for decision in history] == [ruling for ruling, *_ in reversed(steps)]
    assert operator.get(f"/api/v1/polls/{lunch.pk}/rulings").json["results"] == history


@pytest.mark.parametrize("ruling", ["quarantine", "release", "void", "clear", "block"])
@pytest.mark.parametrize(
    ("body", "problem", "pointer"),
    [
        ({}, problems.INVALID, "/reason"),
        ({"reason": ""}, problems.INVALID, "/reason"),
        ({"reason": " "}, problems.INVALID, "/reason"),
        ({"reason": None}, problems.INVALID, "/reason"),
        ({"reason": 7}, problems.INVALID, "/reason"),
        ({"reason": "x" * 501}, problems.INVALID, "/reason"),
        ({"reason": "a\x00b"}, problems.INVALID, "/reason"),
        ({"reason": "x", "because": "y"}, problems.INVALID, "/because"),
        (b"{", problems.MALFORMED, None),
    ],
)
def test_a_ruling_without_a_good_reason_changes_nothing(operator, lunch, ruling, body, problem, pointer):
    case = make_case(lunch)
    if ruling == "block" and isinstance(body, dict) and body:
        body = {**body, "hours": 1}
    answer = operator.post(path_of(case, ruling), body)
    assert_refused(answer, problem, pointer=pointer)
    assert not Decision.objects.filter(cases__contains=[case.pk]).exists()
    assert not Hold.objects.filter(poll=lunch).exists()
    assert tallies(lunch) == {"soup": 40, "salad": 20}


# --- Rulings on a rule, a network, a time -------------------------------------------------------------------------------


def rulings_of(poll):
    return f"/api/v1/polls/{poll.pk}/rulings"


def in_time(seconds):
    """The moment of `cast(at=seconds)`."""
    return iso(from_microseconds(1_800_000_000_000_000 + seconds * 1_000_000))


@pytest.mark.parametrize(
    ("votes", "left"),
    [
        ({"rule": "busy_address"}, {"soup": 10, "salad": 20}),
        ({"address": "192.0.2.7"}, {"soup": 10, "salad": 20}),
        ({"address": "::ffff:192.0.2.7"}, {"soup": 10, "salad": 20}),
        ({"subnet": "192.0.2.0/24"}, {"salad": 20}),
        ({"subnet": "192.0.2.99/24"}, {"salad": 20}),
        ({"accepted_from": in_time(0), "accepted_until": in_time(1)}, {"soup": 20, "salad": 10}),
        ({"address": "192.0.2.7", "accepted_from": in_time(1)}, {"soup": 20, "salad": 20}),
        ({"subnet": "192.0.2.0/24", "accepted_until": in_time(2)}, {"soup": 10, "salad": 20}),
        ({"address": "198.18.113.1"}, {"soup": 40, "salad": 20}),
    ],
)
def test_votes_are_ruled_on_as_the_dry_run_said_and_put_back(operator, lunch, votes, left):
    make_case(lunch)
    before = {"soup": 40, "salad": 20}
    changes = {str(option(lunch, text)): [before[text], left.get(text, 0)] for text in before if before[text] != left.get(text, 0)}
    moved = sum(before.values()) - sum(left.values())

    said = operator.post(rulings_of(lunch), {"ruling": "void", **votes, "dry_run": True, **WHY})

    assert (said.status, said.json) == (200, {"votes": moved, "voters": moved, "changes": changes}), said.text
    assert tallies(lunch) == before
    [looked] = operator.get(rulings_of(lunch)).json["results"]
    assert (looked["ruling"], looked["actor"], looked["reason"]) == ("look", "cases-operator", WHY["reason"])
    assert (looked["votes"], looked["changes"]) == (moved, changes)

    done = operator.post(rulings_of(lunch), {"ruling": "void", **votes, **WHY})
    assert done.status == 201, done.text
    assert (done.json["ruling"], done.json["votes"], done.json["changes"]) == ("void", moved, changes)
    assert tallies(lunch) == left
    operator.post(rulings_of(lunch), {"ruling": "release", **votes, **WHY})
    assert tallies(lunch) == before
    assert [decision["ruling"] for decision in operator.get(rulings_of(lunch)).json["results"]] == ["release", "void", "look"]


NETWORK = {"ruling": "void", "address": "192.0.2.7", **WHY}


@pytest.mark.parametrize(
    ("body", "problem", "pointer"),
    [
        ({**NETWORK, "ruling": "clear"}, problems.INVALID, "/ruling"),
        ({**NETWORK, "ruling": "block"}, problems.INVALID, "/ruling"),
        ({**NETWORK, "ruling": None}, problems.INVALID, "/ruling"),
        ({**NETWORK, "reason": " "}, problems.INVALID, "/reason"),
        ({"ruling": "void", "address": "192.0.2.7"}, problems.INVALID, "/reason"),
        ({"ruling": "void", "address": "192.0.2.7", "dry_run": True}, problems.INVALID, "/reason"),
        ({"ruling": "void", **WHY}, problems.INVALID, None),
        ({**NETWORK, "rule": "busy_address"}, problems.INVALID, None),
        ({**NETWORK, "subnet": "192.0.2.0/24"}, problems.INVALID, None),
        ({**NETWORK, "address": "192.0.2.0/24"}, problems.INVALID, "/address"),
        ({**NETWORK, "address": "2001:db8::/64"}, problems.INVALID, "/address"),
        ({**NETWORK, "address": "soup"}, problems.INVALID, "/address"),
        ({**NETWORK, "address": "fe80::1%eth0"}, problems.INVALID, "/address"),
        ({**NETWORK, "address": 7}, problems.INVALID, "/address"),
        ({"ruling": "void", "subnet": "192.0.2.7", **WHY}, problems.INVALID, "/subnet"),
        ({"ruling": "void", "subnet": "192.0.0.0/16", **WHY}, problems.INVALID, "/subnet"),
        ({"ruling": "void", "subnet": "2001:db8::/48", **WHY}, problems.INVALID, "/subnet"),
        ({"ruling": "void", "accepted_from": in_time(0), **WHY}, problems.INVALID, None),
        ({"ruling": "void", "accepted_until": in_time(0), **WHY}, problems.INVALID, None),
        ({**NETWORK, "accepted_from": in_time(1), "accepted_until": in_time(1)}, problems.INVALID, "/accepted_until"),
        ({**NETWORK, "accepted_from": "noon"}, problems.INVALID, "/accepted_from"),
        ({**NETWORK, "dry_run": "no"}, problems.INVALID, "/dry_run"),
        ({**NETWORK, "voter": "alice"}, problems.INVALID, "/voter"),
        ({"ruling": "void", "rule": "none_such", **WHY}, problems.NOT_FOUND, None),
        (b"[]", problems.INVALID, None),
        (b"{", problems.MALFORMED, None),
    ],
)
def test_a_wrong_ruling_changes_nothing(operator, lunch, body, problem, pointer):
    assert_refused(operator.post(rulings_of(lunch), body), problem, pointer=pointer)
    assert tallies(lunch) == {"soup": 40, "salad": 20}
    assert not Decision.objects.filter(poll_id=lunch.pk).exists()


def test_a_network_means_nothing_to_a_poll_without_a_secret(operator, lunch):
    Poll.objects.filter(pk=lunch.pk).update(network_secret=None)
    assert_refused(operator.post(rulings_of(lunch), NETWORK), problems.NOT_OFFERED)
    assert_refused(operator.post(rulings_of(lunch), {**NETWORK, "dry_run": True}), problems.NOT_OFFERED)


def test_an_unknown_poll_has_no_rulings(operator):
    path = f"/api/v1/polls/{uuid4()}/rulings"
    for answer in (operator.get(path), operator.post(path, NETWORK), operator.post(path, {**NETWORK, "dry_run": True})):
        assert_refused(answer, problems.UNKNOWN_POLL)


# --- Blocks -----------------------------------------------------------------------------------------------------------


def test_a_network_is_blocked_listed_and_let_in_again(staff, operator):
    made = operator.post(BLOCKS, {"network": "198.18.113.9/24", "hours": 2, **WHY})

    assert made.status == 201, made.text
    block = made.json
    assert (block["network"], block["actor"], block["reason"], block["case"]) == ("198.18.113.0/24", "cases-operator", WHY["reason"], None)
    assert timedelta(hours=1.9) < Block.objects.get(pk=block["id"]).until - now() <= timedelta(hours=2)
    assert block in operator.get(BLOCKS).json["results"]
    shown = staff["auditor"].get(BLOCKS)
    assert "198.18.113" not in shown.text and {**block, "network": None} in shown.json["results"]

    again = operator.post(BLOCKS, {"network": "198.18.113.0/24", "until": iso(now() + timedelta(days=1)), **WHY}).json
    assert again["id"] == block["id"] and again["until"] > block["until"]
    assert operator.send("DELETE", f"{BLOCKS}/{block['id']}?reason=It+was+a+school.").status == 204
    assert_refused(operator.send("DELETE", f"{BLOCKS}/{block['id']}?reason=Again"), problems.NOT_FOUND)
    assert block["id"] not in {shown["id"] for shown in operator.get(BLOCKS).json["results"]}
    assert [(d.ruling, d.reason) for d in Decision.objects.filter(poll_id=None).order_by("-id")[:2]] == [
        ("unblock", "It was a school."),
        ("block", WHY["reason"]),
    ]


def test_a_block_that_has_ended_is_not_listed(operator):
    made = operator.post(BLOCKS, {"network": "198.18.113.77", "hours": 1, **WHY}).json
    Block.objects.filter(pk=made["id"]).update(until=now())
    assert made["id"] not in {shown["id"] for shown in operator.get(BLOCKS).json["results"]}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"hours": 1, **WHY}, "/network"),
        ({"network": "soup", "hours": 1, **WHY}, "/network"),
        ({"network": "203.0.0.0/15", "hours": 1, **WHY}, "/network"),
        ({"network": "198.18.113.70", "hours": 1}, "/reason"),
        ({"network": "198.18.113.70", **WHY}, None),
        ({"network": "198.18.113.70", "hours": 1, "until": iso(now() + timedelta(days=1)), **WHY}, None),
        ({"network": "198.18.113.70", "hours": 0, **WHY}, "/hours"),
        ({"network": "198.18.113.70", "hours": 8785, **WHY}, "/hours"),
        ({"network": "198.18.113.70", "hours": 1.5, **WHY}, "/hours"),
        ({"network": "198.18.113.70", "until": iso(now()), **WHY}, "/until"),
        ({"network": "198.18.113.70", "until": iso(now() + timedelta(days=367)), **WHY}, "/until"),
    ],
)
def test_a_wrong_block_is_refused(operator, body, pointer):
    assert_refused(operator.post(BLOCKS, body), problems.INVALID, pointer=pointer)
    assert not Block.objects.filter(network="198.18.113.70/32").exists()


@pytest.mark.parametrize("query", ["", "?reason=", "?reason=%20", f"?reason={'x' * 501}", "?because=x"])
def test_a_block_is_not_lifted_without_a_reason(operator, query):
    made = operator.post(BLOCKS, {"network": "198.18.113.78", "hours": 1, **WHY}).json
    refused = operator.send("DELETE", f"{BLOCKS}/{made['id']}{query}")
    assert (refused.status, refused.json["type"]) == (400, problems.INVALID.type)
    assert Block.objects.filter(pk=made["id"]).exists()


def test_a_cases_network_is_blocked_or_a_wider_one(operator, lunch):
    case = make_case(lunch, "198.18.113.7")

    own = operator.post(path_of(case, "block"), {"hours": 1, **WHY})
    wider = operator.post(path_of(case, "block"), {"hours": 1, "network": "198.18.112.0/20", **WHY})

    assert (own.status, wider.status) == (201, 201)
    assert [(made.json["network"], made.json["case"]) for made in (own, wider)] == [
        ("198.18.113.7/32", str(case.pk)),
        ("198.18.112.0/20", str(case.pk)),
    ]
    shown = operator.get(path_of(case)).json
    assert [block["network"] for block in shown["blocks"]] == ["198.18.113.7/32", "198.18.112.0/20"]
    assert [decision["ruling"] for decision in shown["decisions"]] == ["block", "block"]
    assert shown["state"] == "open"


def test_a_case_that_nothing_can_read_is_blocked_by_naming_the_network(operator, lunch):
    case = make_case(lunch, network_secret=None)
    assert_refused(operator.post(path_of(case, "block"), {"hours": 1, **WHY}), problems.NOT_OFFERED)
    assert operator.post(path_of(case, "block"), {"hours": 1, "network": "198.18.113.79", **WHY}).status == 201


# --- Who may ----------------------------------------------------------------------------------------------------------


def test_auditors_read_and_decide_nothing_and_others_see_nothing(staff, pipeline, api, lunch):
    case, block = make_case(lunch), {"network": "198.18.113.80", "hours": 1, **WHY}
    reads = [CASES, path_of(case), BLOCKS, rulings_of(lunch), "/api/v1/rules"]
    writes = [(path_of(case, ruling), WHY) for ruling in ("quarantine", "release", "void", "clear")]
    writes += [
        ("/api/v1/rules/burst/try", {}),
        (path_of(case, "block"), {"hours": 1, **WHY}),
        (BLOCKS, block),
        (rulings_of(lunch), {**NETWORK, "dry_run": True}),
    ]

    for caller, may_read, problem in [
        (staff["auditor"], True, problems.FORBIDDEN),
        (staff["owner"], False, problems.FORBIDDEN),
        (api, False, problems.FORBIDDEN),
        (Api(pipeline, {}), False, problems.UNAUTHENTICATED),
    ]:
        for path in reads:
            answer = caller.get(path)
            assert (answer.status == 200) == may_read, answer.text
        for path, body in writes:
            assert_refused(caller.post(path, body), problem)
    assert not Decision.objects.filter(cases__contains=[case.pk]).exists()
    assert tallies(lunch) == {"soup": 40, "salad": 20}


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_the_rules_are_listed_with_what_they_take(operator):
    listed = {rule["name"]: rule for rule in operator.get("/api/v1/rules").json["rules"]}

    assert set(listed) == set(fraud.RULES)
    busy = listed["busy_address"]
    assert (busy["is_on"], busy["is_fast"], busy["only_informs"]) == (True, True, False)
    assert [(parameter["name"], parameter["value"]) for parameter in busy["parameters"]] == list(
        fraud.RULES["busy_address"].parameters.items()
    )
    assert all(parameter["smallest"] <= parameter["value"] <= parameter["largest"] for parameter in busy["parameters"])


def test_a_rule_is_tried_and_changes_nothing(staff, operator, make_poll):
    poll = make_poll()
    lately = int(time.time()) - 600 - 1_800_000_000  # rules look at votes of the past, in true time
    cast(poll, *(f"bot {n}" for n in range(12)), at=lately)
    cast(poll, "alice", text="salad", address="198.51.100.1", at=lately)
    decided = make_case(poll, state="confirmed", rule="burst")
    cast(poll, *(f"honest {n}" for n in range(9)), text="salad", address="198.51.100.2", at=lately)
    wanted = {"poll": str(poll.pk), "parameters": {"votes": 10}, **WHY}

    tried = operator.post("/api/v1/rules/busy_address/try", wanted)

    assert tried.status == 200, tried.text
    trial = tried.json
    assert trial["parameters"] == {**fraud.RULES["busy_address"].parameters, "votes": 10}
    assert (trial["found"], trial["votes"], trial["voters"]) == (1, 12, 12)
    assert trial["changes"] == {str(option(poll, "soup")): [12, 0]}
    assert (trial["precision"], trial["recall"]) == (1, 1)
    [found] = trial["cases"]
    assert (found["poll"], found["kind"], found["network"], found["votes"]) == (str(poll.pk), "address", "192.0.2.7/32", 12)
    assert found["evidence"]["votes_in_window"] == 12
    assert set(SuspiciousIP.objects.filter(poll=poll)) == {decided} and tallies(poll) == {"soup": 12, "salad": 10}
    none = operator.post("/api/v1/rules/busy_address/try", {"poll": str(poll.pk), "parameters": {"votes": 13}, **WHY}).json
    assert (none["found"], none["cases"], none["changes"], none["precision"], none["recall"]) == (0, [], {}, None, 0)


@pytest.mark.parametrize(
    ("name", "body", "problem", "pointer"),
    [
        ("none_such", WHY, problems.NOT_FOUND, None),
        ("busy_address", {"poll": "lunch", **WHY}, problems.INVALID, "/poll"),
        ("busy_address", {"poll": str(uuid4()), **WHY}, problems.UNKNOWN_POLL, None),
        ("busy_address", {"parameters": {"soups": 3}, **WHY}, problems.INVALID, "/parameters/soups"),
        ("busy_address", {"parameters": {"votes": "many"}, **WHY}, problems.INVALID, "/parameters/votes"),
        ("busy_address", {"parameters": {"votes": -1}, **WHY}, problems.INVALID, "/parameters/votes"),
        ("busy_address", {"parameters": {"votes": None}, **WHY}, problems.INVALID, "/parameters/votes"),
        ("busy_address", {"parameters": [10], **WHY}, problems.INVALID, "/parameters"),
        ("busy_address", b'{"parameters": {"votes": 1e999}, "reason": "why"}', problems.INVALID, "/parameters/votes"),
        ("busy_address", {"rule": "burst", **WHY}, problems.INVALID, "/rule"),
        ("busy_address", {}, problems.INVALID, "/reason"),
        ("busy_address", {"reason": " "}, problems.INVALID, "/reason"),
        ("busy_address", b"{", problems.MALFORMED, None),
    ],
)
def test_a_wrong_trial_is_refused(operator, name, body, problem, pointer):
    assert_refused(operator.post(f"/api/v1/rules/{name}/try", body), problem, pointer=pointer)


# --- What a poll's owner says of rules --------------------------------------------------------------------------------

VIGILANT = {"auto_quarantine": True, "rule_parameters": {"busy_address": {"votes": 50}, "burst": {"off": True}}}


def test_an_owner_says_how_suspicious_votes_are_looked_for_until_the_end(owners_api, make_poll):
    made = owners_api.post("/api/v1/polls", {**LUNCH, **VIGILANT}).json
    path = made["links"]["self"]
    assert {name: made[name] for name in VIGILANT} == VIGILANT
    assert {name: owners_api.get(path).json[name] for name in VIGILANT} == VIGILANT
    changed = owners_api.patch(path, {"auto_quarantine": False, "rule_parameters": {}}).json
    assert (changed["auto_quarantine"], changed["rule_parameters"], changed["version"]) == (False, {}, 2)

    over = make_poll(closes_in=-1)
    for name, value in VIGILANT.items():
        assert_refused(owners_api.patch(f"/api/v1/polls/{over.pk}", {name: value}), problems.POLL_IN_USE, pointer=f"/{name}")


def test_a_duplicate_is_as_vigilant(owners_api):
    made = owners_api.post("/api/v1/polls", {**LUNCH, **VIGILANT}).json
    copy = owners_api.post(f"{made['links']['self']}/duplicate", {}).json
    assert {name: copy[name] for name in VIGILANT} == VIGILANT


def test_how_suspicious_votes_are_looked_for_is_shown_to_the_people_behind_the_poll_only(staff, owners_api, lunch):
    path = f"/api/v1/polls/{lunch.pk}"
    assert VIGILANT.keys() <= owners_api.get(path).json.keys()
    assert VIGILANT.keys() <= staff["auditor"].get(path).json.keys()
    for caller in (staff["owner"], Api(owners_api.port, {})):
        assert not VIGILANT.keys() & caller.get(path).json.keys()


@pytest.mark.parametrize(
    ("field", "value", "pointer"),
    [
        ("auto_quarantine", "yes", ""),
        ("auto_quarantine", None, ""),
        ("rule_parameters", None, ""),
        ("rule_parameters", [], ""),
        ("rule_parameters", {"none_such": {}}, "/none_such"),
        ("rule_parameters", {"burst": 7}, "/burst"),
        ("rule_parameters", {"burst": {"soups": 7}}, "/burst/soups"),
        ("rule_parameters", {"burst": {"votes": True}}, "/burst/votes"),
        ("rule_parameters", {"burst": {"off": "yes"}}, "/burst/off"),
    ],
)
def test_a_wrong_way_to_look_for_suspicious_votes_is_refused(owners_api, lunch, field, value, pointer):
    refused = owners_api.patch(f"/api/v1/polls/{lunch.pk}", {field: value})
    assert_refused(refused, problems.INVALID, pointer=f"/{field}{pointer}")
    assert_refused(owners_api.post("/api/v1/polls", {**LUNCH, field: value}), problems.INVALID, pointer=f"/{field}{pointer}")
