"""Fraud: what each rule flags and what it lets pass by a hair's breadth, and what becomes of the cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from ipaddress import ip_network
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from django.db import connection, connections
from django.utils.timezone import now
from msgspec.structs import replace

from polls import fraud, networks, review, voters
from polls.bundles import AcceptedVote
from polls.counting import count_votes
from polls.journal import CLOCK, Act
from polls.models import Attempts, Comparison, Decision, Hold, NetworkSecret, Poll, Ruling, SuspiciousIP
from polls.moments import to_microseconds
from polls.problems import Refusal
from tests.conftest import assert_tallies_equal_votes, option, tallies

AT = now()
ACT = Act("otto", AT, "to see")


def anybody(poll: Poll) -> bool:
    """Whoever asks reads every poll's results."""
    return True


MINUTE, HOUR, DAY = 60, 3600, 86_400


@pytest.fixture(autouse=True)
def _others_are_long_ago(_database: None) -> None:
    """Rules look at every poll with votes of the last day: not at those that other tests have left."""
    with connection.cursor() as cursor:
        for table, moment in (("votes", "accepted_at"), ("outcomes", "accepted_at"), ("attempts", "hour")):
            cursor.execute(f"UPDATE {table} SET {moment} = {moment} - interval '1 year' WHERE {moment} > %s", [AT - timedelta(days=9)])


@pytest.fixture
def poll(make_poll: Callable[..., Poll]) -> Poll:
    return open_poll(make_poll)


def open_poll(make_poll: Callable[..., Poll], **fields: Any) -> Poll:
    """A poll in which whoever has a token votes, open for two days now."""
    return make_poll(opens_in=-2 * DAY, **{"voter_policy": "session", **fields})


Addresses = str | Callable[[int], str]


def votes_from(
    poll: Poll,
    addresses: Addresses,
    votes: int,
    *,
    seconds: float = 30 * MINUTE,
    until: datetime = AT,
    texts: tuple[str, ...] = ("soup", "salad"),
    signatures: Iterable[int | None] = range(1, 40),
    every: float | None = None,
    voter: str | None = None,
) -> list[AcceptedVote]:
    """Votes at random moments of these seconds before `until`, or one `every` so many seconds.

    In turn for the texts and with the signatures. The same whenever it is asked; `voter`: all by this one.
    """
    random, keys = Random(7), networks.cipher_for(poll).keys
    options, browsers = [option(poll, text) for text in texts], list(signatures)
    made = []
    for n in range(votes):
        before = every * n if every is not None else random.uniform(0, seconds - 1)
        address = addresses if isinstance(addresses, str) else addresses(n)
        who = voters.VoterKeys(poll.pk, "session", poll.voter_salt).of(voter or f"{address} {n} {until}")
        address_key, subnet_key = keys(address)
        made.append(
            AcceptedVote(
                uuid4(), poll.pk, who, (options[n % len(options)],), to_microseconds(until) - int(before * 1e6),
                address_key=address_key, subnet_key=subnet_key, signature_key=browsers[n % len(browsers)],
            )
        )  # fmt: skip
    return made


def everybody(poll: Poll, votes: int = 400) -> list[AcceptedVote]:
    """Votes from as many homes of as many subnets through a day; four of five for soup and salad alike, with all kinds of browsers."""
    return votes_from(poll, lambda n: f"10.{n // 250}.{n % 250}.1", votes, seconds=DAY, signatures=range(100, 140))


def host(n: int) -> str:
    """The n-th address of a /24."""
    return f"192.0.2.{n % 250}"


def interface(n: int) -> str:
    """The n-th address of a /64."""
    return f"2001:db8::{n:x}:1"


def neighbour(n: int) -> str:
    """An address in the n-th of forty subnets, where people live."""
    return f"10.0.{n % 40}.77"


def flagged(poll: Poll, rule: str, **parameters: float) -> list[tuple[str | None, int | None]]:
    """The networks that the rule flags in the poll, readable, each with the browser signature if it is about that."""
    trial = fraud.try_rule(rule, ACT, anybody, poll_id=poll.pk, parameters=parameters)
    return sorted((shown(case), case.signature_key) for case in trial.cases)


def shown(case: SuspiciousIP) -> str | None:
    return networks.reveal(case.network_secret, case.kind, case.network_key)


def find(*, fast: bool = False) -> None:
    fraud.find_suspicious(AT, fast=fast)


def cases_of(poll: Poll) -> list[SuspiciousIP]:
    return list(SuspiciousIP.objects.filter(poll=poll).order_by("rule", "pk"))


def summary(poll: Poll) -> list[tuple[str, str]]:
    return [(case.rule, case.state) for case in cases_of(poll)]


def act(at: datetime = AT) -> Act:
    return Act("olga", at, "I looked at them")


# --- What must never be flagged, and what always must ------------------------------------------------------------------


def test_a_class_a_school_and_a_carrier_are_not_flagged(poll: Poll) -> None:
    same_machines = (7,)
    count_votes(everybody(poll))
    count_votes(votes_from(poll, "192.0.2.1", 30, seconds=2 * MINUTE, signatures=same_machines))
    count_votes(votes_from(poll, "198.51.100.1", 200, seconds=HOUR, signatures=same_machines, texts=("soup",) * 4 + ("salad",)))
    count_votes(votes_from(poll, "203.0.113.1", 2000, seconds=DAY, signatures=range(1, 200)))

    find()

    assert cases_of(poll) == []


@pytest.mark.parametrize(
    ("addresses", "votes", "seconds", "rule"),
    [("192.0.2.1", 500, 5 * MINUTE, "busy_address"), (interface, 500, 20 * HOUR, "busy_ipv6_subnet")],
    ids=["five hundred from one address in minutes", "five hundred from one /64 in a day"],
)
def test_who_votes_five_hundred_times_is_flagged(poll: Poll, addresses: Addresses, votes: int, seconds: float, rule: str) -> None:
    count_votes(everybody(poll) + votes_from(poll, addresses, votes, seconds=seconds))
    before = tallies(poll)

    find()

    case = SuspiciousIP.objects.get(poll=poll, rule=rule)
    assert (case.state, case.votes, case.found_at, case.reviewer) == ("open", 500, AT, "")
    assert case.score == pytest.approx(500 / 300)
    assert AT - timedelta(seconds=seconds) <= case.first_seen < case.last_seen <= AT
    assert tallies(poll) == before
    assert not Decision.objects.filter(poll_id=poll.pk).exists()


# --- Each rule, and the pair just below --------------------------------------------------------------------------------


def test_busy_address(poll: Poll) -> None:
    count_votes(votes_from(poll, "192.0.2.1", 300, seconds=59 * MINUTE))
    count_votes(votes_from(poll, "198.51.100.1", 299, seconds=59 * MINUTE))
    count_votes(votes_from(poll, "203.0.113.1", 300, seconds=5 * HOUR))

    assert flagged(poll, "busy_address") == [("192.0.2.1/32", None)]


@pytest.mark.parametrize(("votes", "seconds", "found"), [(80, HOUR, True), (79, HOUR, False), (80, 5 * HOUR, False)])
def test_busy_ipv4_subnet(poll: Poll, votes: int, seconds: float, found: bool) -> None:
    count_votes(votes_from(poll, host, votes, seconds=seconds))
    count_votes(votes_from(poll, interface, 100, seconds=HOUR))  # a /64 is no /24

    assert flagged(poll, "busy_ipv4_subnet", votes=80) == [("192.0.2.0/24", None)] * found


@pytest.mark.parametrize(("votes", "seconds", "found"), [(300, 20 * HOUR, True), (299, 20 * HOUR, False), (300, 47 * HOUR, False)])
def test_busy_ipv6_subnet(poll: Poll, votes: int, seconds: float, found: bool) -> None:
    count_votes(votes_from(poll, interface, votes, seconds=seconds))
    count_votes(votes_from(poll, host, 400, seconds=20 * HOUR))  # a /24 is no /64

    assert flagged(poll, "busy_ipv6_subnet") == [("2001:db8::/64", None)] * found


def test_a_subnet_that_is_one_address_is_one_case(poll: Poll) -> None:
    count_votes(everybody(poll))
    count_votes(votes_from(poll, "192.0.2.1", 190, texts=("soup",)) + votes_from(poll, host, 10, texts=("soup",)))

    assert flagged(poll, "one_sided") == [("192.0.2.1/32", None)]


@pytest.mark.parametrize(
    ("votes", "others", "found"),
    [(50, 10, True), (49, 10, False), (50, 40, False)],
    ids=["far above the others", "too few", "the others burst as well"],
)
def test_burst(poll: Poll, votes: int, others: int, found: bool) -> None:
    window = AT.replace(minute=AT.minute // 10 * 10, second=0, microsecond=0)
    count_votes(everybody(poll, 300))
    count_votes(votes_from(poll, "192.0.2.1", votes, seconds=5 * MINUTE, until=window))
    count_votes(votes_from(poll, lambda n: f"10.1.{n}.1", others, seconds=5 * MINUTE, until=window))

    assert flagged(poll, "burst", votes=50) == [("192.0.2.1/32", None)] * found


def test_a_burst_that_is_usual_in_the_poll_is_none(make_poll: Callable[..., Poll]) -> None:
    """Others do not vote in the same minutes, but as much on average."""
    poll = make_poll(opens_in=-HOUR, voter_policy="session")
    window = AT.replace(minute=AT.minute // 10 * 10, second=0, microsecond=0)
    count_votes(votes_from(poll, "192.0.2.1", 50, seconds=5 * MINUTE, until=window))
    assert flagged(poll, "burst", votes=50) != []

    count_votes(votes_from(poll, lambda n: f"10.{n // 250}.{n % 250}.1", 120, seconds=MINUTE, until=window - timedelta(minutes=30)))

    assert flagged(poll, "burst", votes=50) == []


@pytest.mark.parametrize(
    ("votes", "texts", "found"),
    [
        (100, ("soup",), True),
        (99, ("soup",), False),
        (100, ("soup",) * 24 + ("salad",), True),
        (100, ("soup",) * 18 + ("salad",), False),
        (1000, ("soup",) * 4 + ("salad",), False),
    ],
    ids=["all for one", "too few", "96 of 100", "94 of 100", "a school for its own candidate"],
)
def test_one_sided(poll: Poll, votes: int, texts: tuple[str, ...], found: bool) -> None:
    count_votes(everybody(poll))
    count_votes(votes_from(poll, host, votes, texts=texts))

    assert flagged(poll, "one_sided") == [("192.0.2.0/24", None)] * found


def test_a_case_about_choices_says_no_share_of_them(poll: Poll) -> None:
    """One more vote would be told by its change."""
    count_votes(everybody(poll))
    count_votes(votes_from(poll, host, 150, texts=("soup",)))
    [case] = [case for case in fraud.try_rule("one_sided", ACT, anybody, poll_id=poll.pk).cases if case.kind == "subnet"]
    assert set(case.evidence) == {"votes", "addresses"} and case.score == int(case.score)
    stored = {"votes": 100, "share": 0.97, "share_of_others": 0.5}
    assert fraud.without_choices("one_sided", stored) == {"votes": 100}
    assert fraud.without_choices("one_signature", stored) == stored  # of browsers, not of choices


def test_one_sided_is_who_is_unlike_everybody_else(poll: Poll) -> None:
    count_votes(votes_from(poll, lambda n: f"10.{n // 250}.{n % 250}.1", 400, texts=("soup",) * 19 + ("salad",)))
    count_votes(votes_from(poll, host, 200, texts=("soup",) * 39 + ("salad",)))

    assert flagged(poll, "one_sided") == []


def test_one_sided_ballots_of_several_options(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, method="approval", max_choices=2)
    soup, salad = option(poll, "soup"), option(poll, "salad")
    count_votes(everybody(poll))
    some = votes_from(poll, host, 120, texts=("soup",))
    count_votes([replace(vote, selection=(soup, salad) if n % 3 else (soup,)) for n, vote in enumerate(some)])

    assert flagged(poll, "one_sided") == [("192.0.2.0/24", None)]


@pytest.mark.parametrize(
    ("votes", "signatures", "found"),
    [(250, (7,), True), (249, (7,), False), (280, (7,) * 9 + (8,), True), (290, (7,) * 8 + (8,), False), (250, (101,), False)],
    ids=["one browser", "too few", "nine of ten", "fewer than nine of ten", "a browser that others have"],
)
def test_one_signature(poll: Poll, votes: int, signatures: tuple[int, ...], found: bool) -> None:
    count_votes(everybody(poll))
    count_votes(votes_from(poll, host, votes, signatures=signatures))

    assert flagged(poll, "one_signature") == [("192.0.2.0/24", 7)] * found


@pytest.mark.parametrize(
    ("votes", "addresses", "texts", "found"),
    [
        (100, neighbour, ("soup",), True),
        (99, neighbour, ("soup",), False),
        (100, neighbour, ("soup",) * 18 + ("salad",), False),
        (100, lambda n: f"10.0.{n % 29}.77", ("soup",), False),
    ],
    ids=["spread thin", "too few", "not one-sided enough", "too few subnets"],
)
def test_shared_signature(poll: Poll, votes: int, addresses: Addresses, texts: tuple[str, ...], found: bool) -> None:
    count_votes(everybody(poll))
    count_votes(votes_from(poll, neighbour, 80))  # honest people behind the same addresses
    count_votes(votes_from(poll, addresses, votes, texts=texts, signatures=(7,), seconds=DAY))

    assert flagged(poll, "shared_signature") == sorted((f"10.0.{n}.77/32", 7) for n in range(40)) * found


def test_a_signature_at_many_addresses_of_a_subnet_makes_one_case_of_the_subnet(poll: Poll) -> None:
    count_votes(everybody(poll))
    count_votes(votes_from(poll, neighbour, 100, texts=("soup",), signatures=(7,), seconds=DAY))
    count_votes(votes_from(poll, host, 100, texts=("soup",), signatures=(7,), seconds=DAY))

    found = flagged(poll, "shared_signature")

    assert len(found) == 41 and ("192.0.2.0/24", 7) in found


@pytest.mark.parametrize(("votes", "every", "found"), [(100, 20, True), (99, 20, False), (100, None, False)])
def test_regular(poll: Poll, votes: int, every: float | None, found: bool) -> None:
    count_votes(votes_from(poll, host, votes, every=every))

    assert flagged(poll, "regular") == [("192.0.2.0/24", None)] * found


@pytest.mark.parametrize(("votes", "again", "found"), [(60, 140, True), (61, 139, False), (59, 140, False)])
def test_refused(poll: Poll, votes: int, again: int, found: bool) -> None:
    count_votes(votes_from(poll, host, votes - 1))
    count_votes(votes_from(poll, host, again + 1, voter="alice"))

    assert flagged(poll, "refused") == [("192.0.2.0/24", None)] * found


def test_where_an_address_is_one_voter_its_duplicates_are_none_of_its_doing(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, voter_policy="ip")
    count_votes(votes_from(poll, "192.0.2.1", 300, voter="the school"))

    assert flagged(poll, "refused") == []


def note_attempts(poll: Poll, address: str, *, hours_ago: int = 0, **tries: int) -> None:
    keys = networks.cipher_for(poll).keys(address)
    hour = AT.replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours_ago)
    Attempts.objects.create(poll_id=poll.pk, address_key=keys[0], subnet_key=keys[1], hour=hour, **tries)


@pytest.mark.parametrize(
    ("rule", "tries", "enough", "times"), [("code_guessing", "wrong_codes", 50, 1), ("token_collecting", "tokens", 500, 10)]
)
def test_attempts(make_poll: Callable[..., Poll], rule: str, tries: str, enough: int, times: int) -> None:
    poll = open_poll(make_poll, voter_policy="code")
    for hour in (0, 23):
        note_attempts(poll, "192.0.2.1", hours_ago=hour, **{tries: enough // 2})
    note_attempts(poll, "198.51.100.1", **{tries: enough - 1})
    note_attempts(poll, "203.0.113.1", **{tries: enough // 2})
    note_attempts(poll, "203.0.113.1", hours_ago=24, **{tries: enough // 2})
    # As many of its people have voted as one expects of so many tries.
    note_attempts(poll, "10.9.9.9", **{tries: enough})
    count_votes(votes_from(poll, "10.9.9.9", enough // times + 1))

    assert flagged(poll, rule) == [("192.0.2.1/32", None)]


def test_who_guesses_codes_is_found_within_a_minute(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, voter_policy="code")
    note_attempts(poll, "192.0.2.1", wrong_codes=50)

    find(fast=True)

    assert summary(poll) == [("code_guessing", "open")]


def test_codes_guessed_from_many_addresses_of_a_subnet(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, voter_policy="code")
    for n in range(50):
        note_attempts(poll, interface(n), wrong_codes=1)

    assert flagged(poll, "code_guessing") == [("2001:db8::/64", None)]
    assert flagged(poll, "code_guessing", tries=51) == []


def test_soft_limit_says_which_networks_wait(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, address_limit=3, limit_mode="soft", auto_quarantine=True)
    count_votes(votes_from(poll, "192.0.2.1", 4) + votes_from(poll, "198.51.100.1", 3))

    find()

    (case,) = cases_of(poll)
    assert (case.rule, shown(case), case.votes, case.score < 1, case.state) == ("soft_limit", "192.0.2.1/32", 1, True, "open")
    assert not Hold.objects.filter(poll=poll).exists()  # it says nothing against those that were let in


def test_busy_over_polls(make_poll: Callable[..., Poll]) -> None:
    first, second = open_poll(make_poll), open_poll(make_poll)
    for poll in (first, second):
        count_votes(votes_from(poll, "100.64.9.1", 60) + votes_from(poll, "100.64.10.1", 49) + votes_from(poll, "100.64.11.1", 60))
    count_votes(votes_from(second, "100.64.11.1", 60, until=AT - timedelta(seconds=1)))  # a case of that poll alone

    trial = fraud.try_rule("busy_over_polls", ACT, anybody, parameters={"votes": 50, "all_votes": 120})

    found = {shown(case): case for case in trial.cases}
    case = found["100.64.9.1/32"]
    assert (case.poll_id, case.kind, case.votes, case.evidence["polls"]) == (None, "address", 120, 2)
    assert not found.keys() & {"100.64.10.1/32", "100.64.11.1/32"}


def test_a_sample_of_a_very_large_poll_finds_what_is_in_it_and_counts_it_exactly(poll: Poll, monkeypatch: pytest.MonkeyPatch) -> None:
    count_votes(everybody(poll, 1000) + votes_from(poll, interface, 400, seconds=20 * HOUR))
    count_votes(votes_from(poll, neighbour, 200, texts=("soup",), signatures=(7,), seconds=DAY))
    exactly = {rule: fraud.try_rule(rule, ACT, anybody, poll_id=poll.pk).cases for rule in ("busy_ipv6_subnet", "shared_signature")}
    monkeypatch.setattr(fraud, "MANY_VOTES", 1000)
    monkeypatch.setattr(fraud, "LARGE_POLL", 1000)

    for rule, cases in exactly.items():
        sampled = fraud.try_rule(rule, ACT, anybody, poll_id=poll.pk).cases
        assert len(cases) > 0
        assert [(case.network_key, case.votes, case.evidence) for case in sampled] == [
            (case.network_key, case.votes, case.evidence) for case in cases
        ]
    with fraud._gathered([poll.pk], None, dict.fromkeys(("least", "least_in_minutes"), 100.0), fraud._TABLES) as cursor:
        cursor.execute("SELECT count(*), max(one_in) FROM sampled")
        votes, one_in = cursor.fetchone()
    assert one_in == 8 and 100 < votes < 300  # of 1,600


# --- Whose votes are never looked at ------------------------------------------------------------------------------------


def test_votes_without_keys_match_no_rule(poll: Poll) -> None:
    count_votes(everybody(poll))
    bots = votes_from(poll, "192.0.2.1", 600, every=1, texts=("soup",), signatures=(7,))
    count_votes([replace(vote, address_key=None, subnet_key=None, signature_key=None) for vote in bots])

    find()

    assert cases_of(poll) == []


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_network_that_was_allowed_after_it_voted_is_left_alone(poll: Poll, settings: Any, everywhere: bool) -> None:
    count_votes(everybody(poll))
    count_votes(votes_from(poll, "192.0.2.1", 400) + votes_from(poll, "198.51.100.1", 400) + votes_from(poll, interface, 400))
    if everywhere:
        settings.ALLOWED_NETWORKS = (ip_network("192.0.2.0/28"), ip_network("2001:db8::/32"))
    else:
        Poll.objects.filter(pk=poll.pk).update(allowed_networks=["192.0.2.0/28", "2001:db8::/32"])

    find()

    assert {shown(case) for case in cases_of(poll)} == {"198.51.100.1/32"}


def test_a_poll_whose_secret_is_gone_has_cases_that_nobody_can_read(poll: Poll) -> None:
    count_votes(everybody(poll) + votes_from(poll, "192.0.2.1", 400))
    Poll.objects.filter(pk=poll.pk).update(network_secret=None)

    find()

    assert [(case.rule, case.network_secret_id) for case in cases_of(poll)] == [("busy_address", None)]


# --- Parameters ---------------------------------------------------------------------------------------------------------


def test_a_poll_and_the_installation_have_parameters_of_their_own(poll: Poll, make_poll: Callable[..., Poll], settings: Any) -> None:
    other = open_poll(make_poll)
    settings.RULES = {"busy_address": {"votes": 60}, "burst": {"off": True}, "regular": {"off": True}}
    Poll.objects.filter(pk=poll.pk).update(rule_parameters={"busy_address": {"votes": 40, "minutes": 30}})
    for one in (poll, other):
        count_votes(votes_from(one, "192.0.2.1", 59, seconds=20 * MINUTE))

    find()

    assert (summary(poll), summary(other)) == ([("busy_address", "open")], [])


def test_a_rule_can_be_switched_off_in_a_poll(poll: Poll) -> None:
    count_votes(votes_from(poll, interface, 400))
    Poll.objects.filter(pk=poll.pk).update(rule_parameters={"busy_ipv6_subnet": {"off": True}, "burst": {"off": True}})

    find()

    assert cases_of(poll) == []
    assert flagged(poll, "busy_ipv6_subnet") != []  # trying is no using


@pytest.mark.parametrize(
    ("parameters", "pointer", "said"),
    [
        ([], "", "must be an object"),
        ({"busy": {}}, "/busy", "There is no such rule"),
        ({"a/b~c": {}}, "/a~1b~0c", "There is no such rule"),
        ({"regular": []}, "/regular", "must be an object"),
        ({"regular": {"minutes": 5}}, "/regular/minutes", "has votes, spread, off"),
        ({"regular": {"votes": "5"}}, "/regular/votes", "must be a number"),
        ({"regular": {"votes": True}}, "/regular/votes", "must be a number"),
        ({"regular": {"votes": None}}, "/regular/votes", "must be a number"),
        ({"regular": {"votes": float("nan")}}, "/regular/votes", "must be a number"),
        ({"regular": {"votes": 9}}, "/regular/votes", "from 10 to 1e+09"),
        ({"regular": {"spread": 1.01}}, "/regular/spread", "from 0 to 1"),
        ({"one_sided": {"share": 0.4}}, "/one_sided/share", "from 0.5 to 1"),
        ({"regular": {"off": 1}}, "/regular/off", "true or false"),
    ],
)
def test_parameters_that_make_no_sense(parameters: object, pointer: str, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        fraud.check_parameters(parameters, "/rule_parameters")

    assert refused.value.errors[0]["pointer"] == f"#/rule_parameters{pointer}"
    assert said in refused.value.detail


def test_parameters_that_make_sense() -> None:
    fraud.check_parameters({}, "")
    fraud.check_parameters({name: {**rule.parameters, "off": False} for name, rule in fraud.RULES.items()}, "")


# --- The life of a case --------------------------------------------------------------------------------------------------


def test_finding_again_changes_nothing_and_more_votes_bring_a_case_up_to_date(poll: Poll) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR, until=AT - timedelta(hours=2)))
    find()
    (before,) = cases_of(poll)

    again = fraud.find_suspicious(AT)

    assert [case for case in again if case.poll_id == poll.pk] == []
    assert vars_of(cases_of(poll)[0]) == vars_of(before)
    count_votes(votes_from(poll, interface, 100, seconds=HOUR))
    changed = fraud.find_suspicious(AT + timedelta(minutes=1))
    (after,) = cases_of(poll)
    assert [case.pk for case in changed if case.poll_id == poll.pk] == [before.pk]
    assert (after.votes, after.evidence["addresses"], after.first_seen, after.found_at) == (500, 400, before.first_seen, AT)
    assert after.last_seen > before.last_seen and after.score > before.score


def vars_of(case: SuspiciousIP) -> dict[str, Any]:
    return {name: value for name, value in vars(case).items() if not name.startswith("_")}


def test_a_fast_run_sees_the_last_minutes_and_never_makes_a_case_smaller(poll: Poll) -> None:
    count_votes(votes_from(poll, "192.0.2.1", 350, seconds=8 * MINUTE))
    count_votes(votes_from(poll, "198.51.100.1", 350, seconds=8 * MINUTE, until=AT - timedelta(minutes=11)))

    find(fast=True)

    (case,) = cases_of(poll)
    assert (case.rule, shown(case), case.votes) == ("busy_address", "192.0.2.1/32", 350)
    SuspiciousIP.objects.filter(pk=case.pk).update(votes=1000, score=9.0, evidence={"votes_in_window": 2700})
    find(fast=True)
    case.refresh_from_db()
    assert (case.votes, case.score, case.evidence) == (1000, 9.0, {"votes_in_window": 2700})
    find()
    assert {shown(case) for case in cases_of(poll)} == {"192.0.2.1/32", "198.51.100.1/32"}


@pytest.mark.parametrize("ruling", [Ruling.CLEAR, Ruling.VOID])
def test_who_has_decided_is_not_asked_again(poll: Poll, ruling: Ruling) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))
    find()
    (case,) = cases_of(poll)
    review.rule_on_case(case.pk, ruling, act())
    case.refresh_from_db()
    count_votes(votes_from(poll, interface, 399, seconds=HOUR, until=AT - timedelta(seconds=1)))

    fraud.find_suspicious(AT + timedelta(hours=1))

    assert vars_of(cases_of(poll)[0]) == vars_of(case)


@pytest.mark.parametrize(("ruling", "state"), [(Ruling.CLEAR, "open"), (Ruling.VOID, "confirmed")])
def test_a_cleared_case_opens_again_when_its_votes_have_doubled(poll: Poll, ruling: Ruling, state: str) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))
    find()
    (case,) = cases_of(poll)
    review.rule_on_case(case.pk, ruling, act())
    count_votes(votes_from(poll, interface, 400, seconds=HOUR, until=AT - timedelta(seconds=1)))

    fraud.find_suspicious(AT + timedelta(hours=1))

    (again,) = cases_of(poll)
    assert (again.pk, again.state, again.reviewer, again.note) == (case.pk, state, "olga", "I looked at them")
    assert again.found_at == (AT + timedelta(hours=1) if state == "open" else AT)


def test_the_results_with_and_without_follow(poll: Poll) -> None:
    count_votes(everybody(poll, 100) + votes_from(poll, interface, 400, texts=("soup",), seconds=20 * HOUR))

    find()

    comparison = Comparison.objects.get(poll=poll)
    assert comparison.as_of == AT and comparison.voters == 400
    assert comparison.without_votes == {str(option(poll, "soup")): -400}


# --- Automatic quarantine -----------------------------------------------------------------------------------------------


def test_the_owner_may_have_suspicious_votes_held_at_once(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, auto_quarantine=True)
    count_votes(everybody(poll, 100) + votes_from(poll, "192.0.2.1", 400, texts=("soup",), seconds=8 * MINUTE))

    find(fast=True)
    find(fast=True)

    assert tallies(poll) == {"soup": 50, "salad": 50}
    decision = Decision.objects.get(poll_id=poll.pk)
    (case,) = cases_of(poll)
    assert (decision.actor, decision.ruling, decision.reason, decision.cases) == (CLOCK, "quarantine", "rule busy_address", [case.pk])
    assert (case.state, case.reviewer) == ("open", CLOCK)
    assert_tallies_equal_votes()


def test_what_a_person_has_released_is_not_held_again(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, auto_quarantine=True)
    count_votes(votes_from(poll, "192.0.2.1", 400, texts=("soup",), seconds=8 * MINUTE))
    find(fast=True)
    (case,) = cases_of(poll)
    assert tallies(poll) == {}

    review.rule_on_case(case.pk, Ruling.RELEASE, act())
    find(fast=True)

    assert tallies(poll) == {"soup": 400}


def test_a_case_that_a_crash_left_without_its_quarantine_gets_it(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll)
    count_votes(votes_from(poll, "192.0.2.1", 400, texts=("soup",), seconds=8 * MINUTE))
    find(fast=True)
    Poll.objects.filter(pk=poll.pk).update(auto_quarantine=True)

    find(fast=True)

    assert tallies(poll) == {}


def test_rules_about_choices_hold_nothing_by_themselves(make_poll: Callable[..., Poll]) -> None:
    """Everybody sees that votes are held: it would tell what they are for."""
    poll = open_poll(make_poll, auto_quarantine=True)
    count_votes(everybody(poll) + votes_from(poll, host, 150, texts=("soup",)))

    find()
    find()

    assert ("one_sided", "open") in summary(poll)
    assert not Decision.objects.filter(poll_id=poll.pk).exists() and not Hold.objects.filter(poll=poll).exists()
    assert all(rule.never_holds for rule in fraud.RULES.values() if rule.is_about_choices)


@pytest.mark.parametrize("votes", [10, 9])
def test_rules_about_choices_look_at_no_sealed_poll_before_its_end(make_poll: Callable[..., Poll], votes: int) -> None:
    """The owner's thresholds and an automatic quarantine told ten to nothing from nine to one."""
    strict = {"one_sided": {"votes": 10, "share": 0.95, "odds": 1}}
    poll = open_poll(make_poll, auto_quarantine=True, results_visibility="sealed", rule_parameters=strict)
    count_votes(everybody(poll, 50) + votes_from(poll, host, 10, texts=("soup",) * votes + ("salad",) * (10 - votes)))

    find()
    assert cases_of(poll) == [] and not Decision.objects.filter(poll_id=poll.pk).exists()

    Poll.objects.filter(pk=poll.pk).update(closes_at=AT)
    find()
    assert summary(poll) == [("one_sided", "open")] * (votes == 10)
    assert not Decision.objects.filter(poll_id=poll.pk).exists()


def test_a_sealed_poll_is_looked_at_after_its_end_whenever_its_votes_came(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll, results_visibility="sealed")
    before = AT - timedelta(days=3)
    count_votes(votes_from(poll, lambda n: f"10.0.{n}.1", 200, until=before) + votes_from(poll, host, 150, until=before, texts=("soup",)))
    find()
    assert "one_sided" not in {rule for rule, _ in summary(poll)}

    Poll.objects.filter(pk=poll.pk).update(closes_at=AT - timedelta(hours=1))
    find()
    assert "one_sided" in {rule for rule, _ in summary(poll)}


# --- Two at once, and expiry --------------------------------------------------------------------------------------------


def test_two_runs_at_once_are_one(poll: Poll) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))

    def run(_: int) -> int:
        try:
            return len([case for case in fraud.find_suspicious(AT) if case.poll_id == poll.pk])
        finally:
            connections.close_all()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))

    assert sum(found) == 1 and len(cases_of(poll)) == 1


def test_a_run_beside_another_returns_at_once_and_leaves_everything_to_it(poll: Poll) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))

    def run() -> list[SuspiciousIP]:
        try:
            return fraud.find_suspicious(AT)
        finally:
            connections.close_all()

    with fraud._alone() as is_alone, ThreadPoolExecutor(1) as pool:
        assert is_alone
        assert pool.submit(run).result() == []
    assert cases_of(poll) == []
    find()
    assert len(cases_of(poll)) == 1


def test_a_rule_that_takes_too_long_keeps_no_other_from_its_work(poll: Poll, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    count_votes(votes_from(poll, "192.0.2.7", 500, seconds=10 * MINUTE))
    monkeypatch.setitem(fraud.RULES, "burst", dataclasses.replace(fraud.RULES["burst"], sql="SELECT pg_sleep(10)"))
    monkeypatch.setitem(fraud._MANNERS, "statement_timeout", "1s")

    find()

    assert "busy_address" in dict(summary(poll))
    assert "the rule burst took too long" in caplog.text


def test_a_run_leaves_its_connection_as_it_was(poll: Poll) -> None:
    def state() -> Any:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT current_setting('statement_timeout'), current_setting('work_mem'), current_setting('jit'),"
                " current_setting('max_parallel_workers_per_gather'), (SELECT count(*) FROM pg_class WHERE pg_table_is_visible(oid)"
                " AND relpersistence = 't'), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"
            )
            return cursor.fetchone()

    before = state()
    find()
    assert state() == before
    with (
        pytest.raises(ZeroDivisionError),
        fraud._gathered([poll.pk], None, dict.fromkeys(("least", "least_in_minutes"), 100.0), fraud._TABLES),
    ):
        raise ZeroDivisionError
    assert state() == before


@pytest.mark.parametrize(("days", "expires"), [(30, False), (30.001, True)])
def test_a_case_that_nobody_decides_on_expires(poll: Poll, days: float, expires: bool) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))
    find()

    fraud.expire_cases(AT + timedelta(days=days))

    assert summary(poll) == [("busy_ipv6_subnet", "expired" if expires else "open")]
    assert Comparison.objects.filter(poll=poll).exists() != expires
    find()  # is no news
    assert summary(poll) == [("busy_ipv6_subnet", "expired" if expires else "open")]


def test_a_case_that_keeps_votes_out_does_not_expire(poll: Poll) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))
    find()
    (case,) = cases_of(poll)
    review.rule_on_case(case.pk, Ruling.QUARANTINE, act())

    fraud.expire_cases(AT + timedelta(days=31))

    assert summary(poll) == [("busy_ipv6_subnet", "open")]
    review.rule_on_case(case.pk, Ruling.RELEASE, act())
    fraud.expire_cases(AT + timedelta(days=31))
    assert summary(poll) == [("busy_ipv6_subnet", "expired")]


def test_a_case_whose_network_nobody_can_read_any_more_expires(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll)
    own = NetworkSecret.objects.create(secret=bytes(32), made_at=AT)
    Poll.objects.filter(pk=poll.pk).update(network_secret=own)
    poll.refresh_from_db()
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))
    find()

    fraud.expire_cases(AT)
    assert summary(poll) == [("busy_ipv6_subnet", "open")]
    own.delete()
    fraud.expire_cases(AT)

    assert summary(poll) == [("busy_ipv6_subnet", "expired")]


def test_the_log_says_how_many_and_of_which_rule_and_no_more(poll: Poll, caplog: pytest.LogCaptureFixture) -> None:
    count_votes(votes_from(poll, interface, 400, seconds=20 * HOUR))
    caplog.clear()

    with caplog.at_level("INFO", logger="polls.fraud"):
        find()

    (line,) = [record.getMessage() for record in caplog.records if record.name == "polls.fraud"]
    assert "busy_ipv6_subnet" in line
    (case,) = cases_of(poll)
    for secret in (poll.title, str(poll.pk), str(case.network_key), "2001:db8"):
        assert secret not in line
