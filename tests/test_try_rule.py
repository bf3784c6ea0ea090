"""manage.py try_rule and fraud.try_rule: what a rule would do, without doing it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from django.core.management import CommandError, call_command

from polls import fraud, review
from polls.counting import count_votes
from polls.models import Comparison, Decision, Hold, NetworkSecret, Poll, Ruling, SuspiciousIP
from polls.problems import Refusal
from tests.conftest import option, tallies
from tests.test_fraud import ACT, HOUR, act, anybody, everybody, host, interface, open_poll, votes_from


@pytest.fixture
def poll(make_poll: Callable[..., Poll]) -> Poll:
    poll = open_poll(make_poll)
    count_votes(everybody(poll, 100) + votes_from(poll, interface, 400, seconds=20 * HOUR, texts=("soup",)))
    count_votes(votes_from(poll, "192.0.2.1", 250, seconds=4 * HOUR))
    return poll


def call(*arguments: Any) -> str:
    out = io.StringIO()
    call_command("try_rule", *map(str, arguments), *(() if "--list" in arguments else ("--reason", "to see")), stdout=out)
    return out.getvalue()


def test_a_trial_says_whom_and_what_would_change_and_changes_nothing(poll: Poll) -> None:
    before = tallies(poll)

    trial = fraud.try_rule("busy_ipv6_subnet", ACT, anybody, poll_id=poll.pk)

    (case,) = trial.cases
    assert (case.pk, case.votes, trial.votes, trial.voters) == (None, 400, 400, 400)
    assert trial.changes == {option(poll, "soup"): (before["soup"], before["soup"] - 400)}
    assert (trial.reviewed.precision, trial.reviewed.recall) == (None, None)
    assert tallies(poll) == before
    for table in (SuspiciousIP, Hold, Comparison):
        assert not table.objects.filter(poll=poll).exists()
    assert list(Decision.objects.filter(poll_id=poll.pk).values_list("ruling", "actor", "reason", "votes")) == [
        ("look", "otto", "to see", 400)
    ]


def test_a_trial_tells_no_change_to_who_may_not_read_results(poll: Poll) -> None:
    trial = fraud.try_rule("busy_ipv6_subnet", ACT, lambda _: False, poll_id=poll.pk)
    assert (trial.voters, trial.changes) == (400, None)
    Poll.objects.filter(pk=poll.pk).update(results_visibility="owner")
    assert "is not shown" in (told := call("busy_ipv6_subnet", "--poll", poll.pk)) and "->" not in told


def test_the_command_is_on_record_and_wants_a_reason(poll: Poll) -> None:
    with pytest.raises(CommandError, match="Say why"):
        call_command("try_rule", "busy_ipv6_subnet", "--poll", str(poll.pk))
    call("busy_ipv6_subnet", "--poll", poll.pk)
    decision = Decision.objects.get(poll_id=poll.pk)
    assert decision.actor.endswith(" at the console") and decision.reason == "to see"


def test_the_command_shows_networks_by_their_keys_unless_it_is_asked_to_reveal_them(poll: Poll) -> None:
    told = call("busy_ipv6_subnet", "--poll", poll.pk)
    key = fraud.try_rule("busy_ipv6_subnet", ACT, anybody, poll_id=poll.pk).cases[0].network_key

    assert f"subnet {str(key)[:8]} " in told and "2001:db8" not in told
    assert "1 networks, 400 votes of 400 voters" in told
    assert f"soup: {tallies(poll)['soup']} -> {tallies(poll)['soup'] - 400}" in told
    assert "decided on 0: 0 voided, 0 cleared.\nOf the 0 cases" in told
    revealed = call("busy_ipv6_subnet", "--poll", poll.pk, "--reveal")
    assert "2001:db8::/64 " in revealed and str(key)[:8] not in revealed


def test_what_nobody_can_read_is_not_revealed(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll)
    count_votes(votes_from(poll, "192.0.2.1", 400))
    Poll.objects.filter(pk=poll.pk).update(network_secret=None)
    assert NetworkSecret.objects.exists()

    told = call("busy_address", "--poll", poll.pk, "--reveal")

    assert "address " in told and "192.0.2.1" not in told


def test_parameters_are_the_polls_unless_others_are_set(poll: Poll) -> None:
    Poll.objects.filter(pk=poll.pk).update(rule_parameters={"busy_address": {"votes": 240, "minutes": 480}})

    assert "1 networks, 250 votes" in call("busy_address", "--poll", poll.pk)
    assert "with votes=251, minutes=480" in (told := call("busy_address", "--poll", poll.pk, "--set", "votes=251"))
    assert "0 networks, 0 votes of 0 voters" in told


def test_only_the_most_suspicious_are_shown(make_poll: Callable[..., Poll]) -> None:
    poll = open_poll(make_poll)
    for n, votes in enumerate((20, 40, 30)):
        count_votes(votes_from(poll, f"192.0.{n}.1", votes))

    told = call("busy_address", "--poll", poll.pk, "--set", "votes=20", "--reveal", "--most", 2)

    assert told.index("192.0.1.1/32") < told.index("192.0.2.1/32") and "192.0.0.1/32" not in told
    assert "... and 1 more" in told and "3 networks, 90 votes" in told


def test_without_a_poll_all_that_took_votes_are_looked_at(poll: Poll) -> None:
    found = fraud.try_rule("busy_ipv6_subnet", ACT, anybody)

    assert poll.pk in {case.poll_id for case in found.cases}
    assert found.changes[option(poll, "soup")]


def test_precision_and_recall_are_by_what_people_decided_under_any_rule(make_poll: Callable[..., Poll]) -> None:
    """Four networks are found. People voided one, cleared one, and an address in one; the last nobody has seen. A fifth they voided."""
    poll = open_poll(make_poll)
    for subnet in ("192.0.2", "198.51.100", "203.0.113", "100.64.1"):
        count_votes(votes_from(poll, f"{subnet}.7", 60))
    count_votes(votes_from(poll, host, 45) + votes_from(poll, "100.64.2.7", 30))
    by_network = {}
    for case in fraud.try_rule("busy_address", ACT, anybody, poll_id=poll.pk, parameters={"votes": 30}).cases:
        case.rule = "regular"
        case.save()
        by_network[case.votes, case.subnet_key] = case
    cases = sorted(by_network.values(), key=lambda case: (case.votes, str(case.subnet_key)))
    least, others = cases[0], cases[1:]
    assert (least.votes, len(others)) == (30, 4)
    review.rule_on_case(least.pk, Ruling.VOID, act())
    review.rule_on_case(others[0].pk, Ruling.VOID, act())
    review.rule_on_case(others[1].pk, Ruling.CLEAR, act())
    # The subnet as a whole was voided, of which an address is found.
    SuspiciousIP.objects.filter(pk=others[2].pk).update(kind="subnet", network_key=others[2].subnet_key)
    review.rule_on_case(others[2].pk, Ruling.VOID, act())

    reviewed = fraud.try_rule("busy_address", ACT, anybody, poll_id=poll.pk, parameters={"votes": 50}).reviewed

    assert reviewed == (2, 1, 3, 2)
    assert (reviewed.precision, reviewed.recall) == (2 / 3, 2 / 3)
    told = call("busy_address", "--poll", poll.pk, "--set", "votes=50")
    assert "decided on 3: 2 voided, 1 cleared (precision 67%)" in told
    assert "Of the 3 cases that people voided, under whichever rule, it finds 2 (recall 67%)" in told


def test_the_list_has_all_rules_with_the_installations_parameters(settings: Any) -> None:
    settings.RULES = {"regular": {"off": True}, "refused": {"votes": 777}}

    told = call("--list").splitlines()

    assert [line.split()[0] for line in told] == list(fraud.RULES)
    assert next(line for line in told if line.startswith("regular ")).endswith("(off)")
    assert "votes=777, share=0.7" in next(line for line in told if line.startswith("refused "))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Say which rule: try_rule NAME, or try_rule --list"),
        (["busy"], "There is no such rule; the rules are busy_address, "),
        (["regular", "--poll", "x"], "--poll: invalid UUID value"),
        (["regular", "--poll", uuid4()], "No poll has this id"),
        (["regular", "--set", "votes"], "--set takes PARAMETER=NUMBER, not 'votes'"),
        (["regular", "--set", "votes="], "--set takes PARAMETER=NUMBER"),
        (["regular", "--set", "=7"], "--set takes PARAMETER=NUMBER"),
        (["regular", "--set", "votes=many"], "--set takes PARAMETER=NUMBER"),
        (["regular", "--set", "votes=nan"], "votes: It must be a number"),
        (["regular", "--set", "votes=9"], r"votes: It must be from 10 to 1e\+09"),
        (["regular", "--set", "minutes=9"], "minutes: The rule regular has votes, spread"),
        (["regular", "--set", "off=1"], "off: It must be true or false"),
        (["regular", "--most", "0"], "--most takes a number from 1"),
    ],
)
def test_a_trial_that_is_not_asked_for_rightly(arguments: list[Any], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        call(*arguments)


def test_a_trial_of_what_is_not_there() -> None:
    with pytest.raises(Refusal) as refused:
        fraud.try_rule("busy", ACT, anybody)
    assert refused.value.problem.status == 404
    with pytest.raises(Refusal) as refused:
        fraud.try_rule("regular", ACT, anybody, poll_id=uuid4())
    assert refused.value.problem.status == 404
    with pytest.raises(Refusal) as refused:
        fraud.try_rule("regular", ACT, anybody, parameters={"votes": 5})
    assert refused.value.errors[0]["pointer"] == "#/parameters/votes"


# --- Rules about choices ------------------------------------------------------------------------------------------------

ABOUT_CHOICES = sorted(rule.name for rule in fraud.RULES.values() if rule.is_about_choices)


@pytest.fixture
def one_sided(make_poll: Callable[..., Poll]) -> Poll:
    poll = open_poll(make_poll)
    count_votes(everybody(poll) + votes_from(poll, host, 150, texts=("soup",)))
    return poll


def test_which_rules_are_about_choices() -> None:
    """A rule whose SQL reads what was chosen must say so."""
    assert sorted(rule.name for rule in fraud.RULES.values() if "selection" in rule.sql) == ABOUT_CHOICES


@pytest.mark.parametrize("rule", ABOUT_CHOICES)
def test_a_rule_about_choices_takes_no_parameters(one_sided: Poll, rule: str) -> None:
    """With a share of one's own, and a few tries, it told the network's tally to the vote."""
    for parameter, value in fraud.RULES[rule].parameters.items():
        with pytest.raises(Refusal, match="parameters in force") as refused:
            fraud.try_rule(rule, ACT, anybody, poll_id=one_sided.pk, parameters={parameter: value})
        assert refused.value.errors[0]["pointer"] == "#/parameters"
        with pytest.raises(CommandError, match="parameters in force"):
            call(rule, "--poll", one_sided.pk, "--set", f"{parameter}={value}")
    assert not Decision.objects.filter(poll_id=one_sided.pk).exists()


def test_a_rule_about_choices_is_tried_as_it_is_in_force(one_sided: Poll, settings: Any) -> None:
    assert fraud.try_rule("one_sided", ACT, anybody, poll_id=one_sided.pk).cases
    settings.RULES = {"one_sided": {"votes": 200}}
    assert not fraud.try_rule("one_sided", ACT, anybody, poll_id=one_sided.pk).cases
    Poll.objects.filter(pk=one_sided.pk).update(rule_parameters={"one_sided": {"votes": 120}})
    assert fraud.try_rule("one_sided", ACT, anybody, poll_id=one_sided.pk).cases
    # In all polls, too, each has its own.
    assert one_sided.pk in {case.poll_id for case in fraud.try_rule("one_sided", ACT, anybody).cases}
    Poll.objects.filter(pk=one_sided.pk).update(rule_parameters={"one_sided": {"off": True}})
    with pytest.raises(Refusal, match="off in the poll"):
        fraud.try_rule("one_sided", ACT, anybody, poll_id=one_sided.pk)
    assert one_sided.pk not in {case.poll_id for case in fraud.try_rule("one_sided", ACT, anybody).cases}


@pytest.mark.parametrize("rule", ABOUT_CHOICES)
@pytest.mark.parametrize("visibility", ["owner", "sealed"])
def test_a_rule_about_choices_is_for_who_may_read_the_results(one_sided: Poll, rule: str, visibility: str) -> None:
    Poll.objects.filter(pk=one_sided.pk).update(results_visibility=visibility)
    with pytest.raises(Refusal, match="who may read the poll's results now") as refused:
        fraud.try_rule(rule, ACT, lambda _: False, poll_id=one_sided.pk)
    assert refused.value.problem.status == 403
    with pytest.raises(CommandError, match="who may read the poll's results now"):
        call(rule, "--poll", one_sided.pk)
    everywhere = fraud.try_rule(rule, ACT, lambda poll: poll.pk != one_sided.pk)
    assert one_sided.pk not in {case.poll_id for case in everywhere.cases}
    assert not Decision.objects.filter(poll_id=one_sided.pk).exists()


def test_no_role_tries_a_rule_about_choices_in_a_sealed_poll(one_sided: Poll) -> None:
    Poll.objects.filter(pk=one_sided.pk).update(results_visibility="sealed")
    with pytest.raises(Refusal):
        fraud.try_rule("one_sided", ACT, anybody, poll_id=one_sided.pk)
    Poll.objects.filter(pk=one_sided.pk).update(closes_at=ACT.at)
    assert fraud.try_rule("one_sided", ACT, anybody, poll_id=one_sided.pk).cases


@pytest.mark.parametrize("rule", ABOUT_CHOICES)
def test_a_try_of_a_rule_about_choices_is_on_record_though_it_finds_nothing(make_poll: Callable[..., Poll], rule: str) -> None:
    poll = open_poll(make_poll)
    count_votes(everybody(poll, 40))
    assert not fraud.try_rule(rule, ACT, anybody, poll_id=poll.pk).cases
    assert list(Decision.objects.filter(poll_id=poll.pk).values_list("ruling", "actor", "reason", "votes")) == [
        ("look", "otto", "to see", 0)
    ]
    assert list(poll.journal.filter(action="looked").values_list("actor", "changes")) == [("otto", {"voters": [0, 0]})]
    fraud.try_rule(rule, ACT, anybody)
    assert Decision.objects.filter(poll_id=poll.pk).count() == 2
