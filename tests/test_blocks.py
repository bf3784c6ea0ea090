"""Blocks: a network that is refused for a time, by every web process within two seconds, and nobody else with it."""

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.utils.timezone import now

from polls import blocks, problems
from polls.blocks import BlockedNetworks
from polls.journal import Act
from polls.models import Block, Decision
from polls.moments import to_microseconds
from polls.problems import Refusal
from tests.conftest import PASSWORD, Api, answers, free_port, wait_until, web
from tests.test_intake import assert_refused
from tests.test_networks import at_once, case_of
from tests.test_policies import ballot, token_for_address, votes_path

# Long ago: what these tests block is over for every process that runs beside them.
NOON = datetime(2020, 1, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


@pytest.fixture(autouse=True)
def _no_blocks():
    yield
    Block.objects.all().delete()


def act(at=NOON, reason="five hundred votes"):
    return Act("olga", at, reason)


def block(network, *, at=NOON, until=NOON + timedelta(hours=1), reason="five hundred votes", case=None):
    return blocks.block(network, until, act(at, reason), case)


# --- Making and lifting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        (" 192.0.2.7/24 ", "192.0.2.0/24"),
        ("192.0.0.0/16", "192.0.0.0/16"),
        ("2001:DB8::0:1", "2001:db8::1/128"),
        ("2001:db8:1:2::1/64", "2001:db8:1:2::/64"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
    ],
)
def test_a_network_is_blocked_in_one_spelling_only(text, network):
    assert block(text).network == network
    assert block(network).network == network
    assert [*Block.objects.filter(until=NOON + timedelta(hours=1)).values_list("network", "until", "made_at", "actor", "reason")] == [
        (network, NOON + timedelta(hours=1), NOON, "olga", "five hundred votes")
    ]


@pytest.mark.parametrize(
    "text",
    ["", "everybody", "192.0.2", "192.0.2.7:80", "192.0.2.0/33", "192.0.0.0/15", "0.0.0.0/0", "2001:db8::/31", "::/0", "::ffff:0:0/96",
     "fe80::1%eth0", "192.0.2.1-192.0.2.9", "\x00", "1" * 5000],
)  # fmt: skip
def test_what_is_no_network_or_half_the_internet_is_not_blocked(text):
    with pytest.raises(Refusal) as refused:
        block(text)

    assert refused.value.problem is problems.INVALID
    assert refused.value.errors[0]["pointer"] == "#/network"
    assert not Block.objects.exists()


@pytest.mark.parametrize("after", [timedelta(), -timedelta(hours=1), blocks.LONGEST + MICROSECOND])
def test_a_block_ends_in_the_future_and_within_a_year(after):
    with pytest.raises(Refusal) as refused:
        block("192.0.2.7", until=NOON + after)

    assert refused.value.errors[0]["pointer"] == "#/until"
    assert block("192.0.2.7", until=NOON + blocks.LONGEST).pk and block("192.0.2.8", until=NOON + MICROSECOND).pk


@pytest.mark.parametrize("reason", ["", " \n", "x" * 501])
def test_nobody_is_blocked_or_let_in_without_a_reason(reason):
    made = block("192.0.2.7", reason="x" * 500)

    for attempt in (lambda: block("192.0.2.8", reason=reason), lambda: blocks.lift(made.pk, act(reason=reason))):
        with pytest.raises(Refusal) as refused:
            attempt()
        assert refused.value.errors[0]["pointer"] == "#/reason"
    assert Block.objects.get() == made


def test_blocking_again_moves_the_end_and_keeps_the_case(poll):
    case = case_of(poll, "192.0.2.7")
    first = block("192.0.2.7", case=case)

    second = block("192.0.2.7", until=NOON + timedelta(minutes=1), reason="they have apologised")

    assert second.pk == first.pk
    assert (second.until, second.reason, second.case_id) == (NOON + timedelta(minutes=1), "they have apologised", case.pk)


def test_whoever_blocks_and_lifts_is_on_record_without_the_network(poll):
    newest = max([0, *Decision.objects.values_list("pk", flat=True)])
    case = case_of(poll, "198.51.100.77")
    made = block("198.51.100.77", case=case)
    blocks.lift(made.pk, act(NOON + MICROSECOND, "it was the library"))

    decisions = Decision.objects.filter(pk__gt=newest).order_by("pk")
    assert [(each.ruling, each.actor, each.at, each.reason, each.cases) for each in decisions] == [
        ("block", "olga", NOON, "five hundred votes", [case.pk]),
        ("unblock", "olga", NOON + MICROSECOND, "it was the library", [case.pk]),
    ]
    with connection.cursor() as cursor:
        cursor.execute("SELECT string_agg(row_to_json(d)::text, '') FROM decisions d")
        assert "198.51.100" not in cursor.fetchone()[0]
    assert not Block.objects.exists()


@pytest.mark.parametrize("which", ["unknown", "lifted", "ended"])
def test_what_is_not_blocked_can_not_be_let_in(which):
    made = block("192.0.2.7")
    if which == "lifted":
        blocks.lift(made.pk, act())
    before = Decision.objects.count()

    with pytest.raises(Refusal) as refused:
        blocks.lift(made.pk + 1 if which == "unknown" else made.pk, act(made.until if which == "ended" else NOON))

    assert refused.value.problem is problems.NOT_FOUND
    assert Decision.objects.count() == before


def test_two_who_block_and_lift_at_once_make_and_end_one_block():
    made = {each.pk for each in at_once(lambda: block("192.0.2.7"))}
    before = Decision.objects.count()

    def lift():
        try:
            blocks.lift(*made, act())
        except Refusal:
            return 0
        return 1

    assert sum(at_once(lift)) == 1
    assert Decision.objects.count() == before + 1


def test_blocks_that_have_ended_are_deleted_and_no_others():
    ended, active = block("192.0.2.7"), block("192.0.2.8", until=NOON + timedelta(hours=1) + MICROSECOND)

    assert blocks.purge(ended.until - MICROSECOND) == 0
    assert [*blocks.active(ended.until)] == [active]
    assert (blocks.purge(ended.until), blocks.purge(ended.until)) == (1, 0)
    assert [*Block.objects.all()] == [active]


# --- Looking up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "hours"),
    [
        ("192.0.2.0", 1),
        ("192.0.2.255", 1),
        ("::ffff:192.0.2.1", 1),
        ("192.0.2.7", 3),  # the longer one of two
        ("192.0.3.0", None),
        ("192.0.1.255", None),
        ("2001:db8:0:1:ffff::", 2),
        ("2001:db8:0:1::9%eth0", 2),
        ("2001:db8:0:2::", None),
        ("::c000:207", None),  # the same number as 192.0.2.7
    ],
)
def test_an_address_is_blocked_by_the_networks_that_hold_it(address, hours):
    found = {"192.0.2.0/24": 1, "192.0.2.7/32": 3, "192.0.2.6/31": 2, "2001:db8:0:1::/64": 2}
    blocked = BlockedNetworks((network, NOON + timedelta(hours=ends)) for network, ends in found.items())

    assert blocked
    assert blocked.until(address, to_microseconds(NOON)) == (hours and to_microseconds(NOON + timedelta(hours=hours)))


def test_a_block_ends_by_itself_to_the_microsecond():
    blocked = BlockedNetworks([("192.0.2.7/32", NOON)])

    assert blocked.until("192.0.2.7", to_microseconds(NOON) - 1) == to_microseconds(NOON)
    assert blocked.until("192.0.2.7", to_microseconds(NOON)) is None


def test_without_blocks_there_is_nothing_to_look_up():
    assert not BlockedNetworks([])


# --- Over HTTP --------------------------------------------------------------------------------------------------------


# 198.18.7.0/24 is a network that no other test comes from: their processes know a block a second longer than it lasts.
@pytest.fixture(scope="module")
def two(broker, tmp_path_factory):
    """Two web processes behind one trusted proxy."""
    logs, ports = tmp_path_factory.mktemp("blocks"), (free_port(), free_port())
    with ExitStack() as running:
        for port in ports:
            running.enter_context(web(port, logs / f"{port}.log", TRUSTED_PROXIES="1"))
        for port in ports:
            wait_until(lambda port=port: answers(port))
        yield [Api(port, {}) for port in ports]


def statuses(two, poll, address):
    return [api.post(votes_path(poll), ballot(poll), x_forwarded_for=address).status for api in two]


def test_a_block_is_in_force_in_every_process_within_two_seconds_and_so_is_its_end(two, make_poll):
    poll = make_poll(voter_policy="ip")
    assert statuses(two, poll, "198.18.7.7") == statuses(two, poll, "198.51.100.7") == [202, 202]

    made = block("198.18.7.0/24", at=now(), until=now() + timedelta(hours=1))
    wait_until(lambda: statuses(two, poll, "198.18.7.7") == [403, 403], seconds=2)
    assert statuses(two, poll, "198.51.100.7") == [202, 202]

    blocks.lift(made.pk, act(now()))
    wait_until(lambda: statuses(two, poll, "198.18.7.7") == [202, 202], seconds=2)

    until = now() + timedelta(seconds=3)
    block("198.18.7.7", at=now(), until=until)
    wait_until(lambda: statuses(two, poll, "198.18.7.7") == [403, 403], seconds=2)
    assert now() < until
    wait_until(lambda: now() >= until)
    assert statuses(two, poll, "198.18.7.7") == [202, 202]


@pytest.fixture
def blocked_from(two):
    """198.18.7.7, in both processes."""
    block("198.18.7.7", at=now(), until=now() + timedelta(hours=1))
    body = {"poll": "00000000-0000-4000-8000-000000000000"}
    wait_until(lambda: [api.post("/api/v1/voters", body, x_forwarded_for="198.18.7.7").status for api in two] == [403, 403], seconds=2)
    return {"x_forwarded_for": "198.18.7.7"}


def test_whoever_is_blocked_changes_nothing_by_any_door(two, make_poll, blocked_from):
    api = two[0]
    by_ip = make_poll(voter_policy="ip", allow_withdrawal=True, allowed_networks=["198.18.7.0/24"])  # no exemption from a block
    by_session, by_code = make_poll(voter_policy="session"), make_poll(voter_policy="code")
    token = token_for_address(api, by_session, "198.51.100.7")
    casting = f'mutation {{ castVote(pollId: "{by_ip.pk}", option: "{ballot(by_ip)["option"]}") {{ receipt }} }}'

    refused = [
        api.post(votes_path(by_ip), ballot(by_ip), **blocked_from),
        api.post(f"{votes_path(by_ip)}/withdraw", {}, **blocked_from),
        api.post(votes_path(by_session), ballot(by_session), voter_token=token, **blocked_from),
        api.post(votes_path(by_code), ballot(by_code, code="7KXF-20PM-Q9RT"), **blocked_from),
        api.post("/api/v1/voters", {"poll": str(by_session.pk)}, **blocked_from),
        api.post("/graphql", {"query": casting}, **blocked_from),
        api.post("/api/v1/auth/register", {"username": "mallory", "password": PASSWORD}, **blocked_from),
        api.post("/api/v1/auth/token", {"username": "olga", "password": PASSWORD}, **blocked_from),
        api.post("/api/v1/auth/token/", {"username": "olga", "password": PASSWORD}, **blocked_from),
        api.patch(f"/api/v1/polls/{by_ip.pk}", {"title": "Mine"}, **blocked_from),
        # Anybody may write a key into a header.
        api.post("/api/v1/auth/token", {"username": "olga", "password": PASSWORD}, authorization="Api-Key nxs_abcdefgh_x", **blocked_from),
    ]

    for answer in refused:
        assert_refused(answer, problems.BLOCKED)
        assert 3500 < int(answer.headers["retry-after"]) <= 3600
        assert "198.18" not in answer.text


def test_whoever_is_blocked_may_read(two, make_poll, blocked_from):
    poll, api = make_poll(voter_policy="ip"), two[0]
    receipt = api.post(votes_path(poll), ballot(poll), x_forwarded_for="198.51.100.7").json["receipt"]

    for path in ("/api/v1/polls", f"/api/v1/polls/{poll.pk}", f"/api/v1/polls/{poll.pk}/results", f"/api/v1/votes/{receipt}"):
        assert api.get(path, **blocked_from).status == 200, path
    assert api.post("/api/v1/votes/status", {"receipts": [receipt]}, **blocked_from).status == 200


def test_an_api_client_is_never_blocked_for_its_voters_are_elsewhere(two, poll, client_key, blocked_from):
    client = {"authorization": f"Api-Key {client_key}", **blocked_from}
    new_poll = {"title": "Dinner", "voter_policy": "client", "closes_at": "2099-01-01T00:00:00Z", "options": [{"text": "a"}, {"text": "b"}]}

    assert two[0].cast(poll, "alice", **client).status == 202
    assert two[0].post(f"{votes_path(poll)}/batch", [ballot(poll, voter="bob")], **client).json["accepted"] == 1
    assert two[0].post("/api/v1/polls", new_poll, **client).status == 201
