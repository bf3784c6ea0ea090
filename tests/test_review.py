"""Rulings on votes: what is kept out of a tally, put back, and on record; exact, reversible, while counting goes on."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import msgspec
import pytest
from django.db import DatabaseError, connection, transaction
from django.utils.timezone import now
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polls import ballots, closing, counting, networks, problems, results, review
from polls.holds import Selector
from polls.journal import Act
from polls.models import (
    CaseState,
    Comparison,
    Decision,
    Hold,
    JournalEntry,
    NetworkKind,
    Poll,
    Ruling,
    SuspiciousIP,
    Tally,
    Vote,
    VoteAside,
)
from polls.problems import Refusal
from tests.conftest import assert_tallies_equal_votes, option, outcome_of, tallies, vote_of, withdrawal_of

COUNTED = ("counted", None)
HELD = ("quarantined", "under_review")
VOIDED = ("rejected", "voided")
HOME, OFFICE = "192.0.2.7", "198.51.100.7"


def act(reason="looks like one person"):
    return Act("otto", now(), reason)


def keys_of(poll, address):
    return networks.cipher_for(poll).keys(address)


def address(poll, text):
    return Selector(*keys_of(poll, text))


def subnet(poll, text):
    return Selector(subnet_key=keys_of(poll, text)[1])


def moment_of(second):
    """The moment that `vote_of(at=second)` stands for."""
    return datetime.fromtimestamp(1_800_000_000 + second, UTC)


def make_case(poll, where, *, rule="address_rate", kind=NetworkKind.ADDRESS, all_polls=False, **fields):
    address_key, subnet_key = keys_of(poll, where)
    return SuspiciousIP.objects.create(
        poll=None if all_polls else poll,
        rule=rule,
        kind=kind,
        network_key=address_key if kind == NetworkKind.ADDRESS else subnet_key,
        subnet_key=subnet_key,
        network_secret=poll.network_secret,
        evidence={},
        score=1,
        votes=1,
        first_seen=now(),
        last_seen=now(),
        found_at=now(),
        **fields,
    )


def shown_in_review(poll):
    """{"with": {option: votes}, "without": ...} of the results, None without."""
    texts = {str(pk): text for pk, text in poll.options.values_list("id", "text")}
    compared = results.read_results(poll.pk, now())["review"]
    return compared and {
        side: {texts[entry["id"]]: entry["votes"] for entry in compared[side]["options"]} | {"total": compared[side]["total_votes"]}
        for side in ("with", "without")
    }


# --- Out, and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ruling", "outcome"), [(Ruling.QUARANTINE, HELD), (Ruling.VOID, VOIDED)])
def test_votes_of_an_address_are_taken_out_and_put_back(poll, ruling, outcome):
    bots = [vote_of(poll, f"bot {n}", address=HOME) for n in range(10)]
    neighbour, honest = vote_of(poll, "bob", address="192.0.2.8"), vote_of(poll, "alice", "salad", address=OFFICE)
    others = [vote_of(poll, f"voter {n}", "salad", address=OFFICE) for n in range(8)]
    counting.count_votes([*bots, neighbour, honest, *others])

    decision = review.rule(poll.pk, [address(poll, HOME)], ruling, act())

    assert tallies(poll) == {"soup": 1, "salad": 9}
    assert {outcome_of(bot) for bot in bots} == {outcome}
    assert outcome_of(neighbour) == outcome_of(honest) == COUNTED
    assert (decision.votes, decision.changes, decision.actor) == (10, {str(option(poll, "soup")): [11, 1]}, "otto")
    assert_tallies_equal_votes()

    decision = review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act("it was a school"))

    assert tallies(poll) == {"soup": 11, "salad": 9}
    assert {outcome_of(bot) for bot in bots} == {COUNTED}
    assert (decision.votes, decision.reason) == (10, "it was a school")
    assert_tallies_equal_votes()


def test_votes_of_a_subnet_a_signature_and_a_time_are_taken_out(poll):
    votes = {
        "home": vote_of(poll, "a", address=HOME, at=1),
        "next door": vote_of(poll, "b", address="192.0.2.8", at=2),
        "other browser": msgspec.structs.replace(vote_of(poll, "c", address="192.0.2.9", at=3), signature_key=7),
        "later": vote_of(poll, "d", address=HOME, at=100),
        "elsewhere": vote_of(poll, "e", address=OFFICE, at=3),
        "nowhere": vote_of(poll, "f", at=3),
    }
    counting.count_votes(votes.values())

    def out():
        return {name for name, vote in votes.items() if outcome_of(vote) == HELD}

    for selector, expected in [
        (subnet(poll, HOME), {"home", "next door", "other browser", "later"}),
        (subnet(poll, HOME)._replace(signature_key=7), {"other browser"}),
        (subnet(poll, HOME)._replace(accepted_until=moment_of(3)), {"home", "next door"}),
        (address(poll, HOME)._replace(accepted_from=moment_of(2), accepted_until=moment_of(101)), {"later"}),
        (Selector(accepted_from=moment_of(2), accepted_until=moment_of(4)), {"next door", "other browser", "elsewhere", "nowhere"}),
    ]:
        review.rule(poll.pk, [selector], Ruling.QUARANTINE, act())
        assert out() == expected
        review.rule(poll.pk, [selector], Ruling.RELEASE, act())
        assert out() == set()
        assert tallies(poll) == {"soup": 6}
    assert_tallies_equal_votes()


def test_votes_that_come_later_are_judged_by_the_ruling_too(poll):
    counting.count_votes([vote_of(poll, "bot 1", address=HOME)])
    review.rule(poll.pk, [address(poll, HOME)], Ruling.QUARANTINE, act())
    late = [vote_of(poll, f"bot {n}", address=HOME) for n in range(2, 5)]

    counted = counting.count_votes([*late, vote_of(poll, "alice", address=OFFICE)])

    assert counted == {"quarantined": 3, "counted": 1}
    assert {outcome_of(vote) for vote in late} == {HELD}
    assert counting.count_votes(late) == {"repeat": 3}
    assert tallies(poll) == {"soup": 1}

    review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act())
    assert tallies(poll) == {"soup": 5}
    assert counting.count_votes(late) == {"repeat": 3}
    assert_tallies_equal_votes()


def test_a_voter_whose_vote_is_taken_out_keeps_the_one_from_elsewhere(make_poll):
    poll = make_poll(allow_change=True)
    own, stolen = vote_of(poll, "alice", "soup", at=1, address=OFFICE), vote_of(poll, "alice", "salad", at=2, address=HOME)
    counting.count_votes([own, stolen])
    assert tallies(poll) == {"salad": 1}

    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())

    assert (outcome_of(own), outcome_of(stolen)) == (COUNTED, VOIDED)
    assert tallies(poll) == {"soup": 1}
    later = vote_of(poll, "alice", "soup", at=3, address=HOME)
    counting.count_votes([later])
    assert (outcome_of(own), outcome_of(later)) == (COUNTED, VOIDED)

    review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act())

    assert (outcome_of(own), outcome_of(stolen), outcome_of(later)) == (("superseded", "changed"), ("superseded", "changed"), COUNTED)
    assert tallies(poll) == {"soup": 1}
    assert_tallies_equal_votes()


@pytest.mark.parametrize("first", [None, Ruling.QUARANTINE, Ruling.VOID])
def test_soft_limits_put_the_excess_where_a_release_lets_it_in(make_poll, first):
    poll = make_poll(voter_policy="session", address_limit=2, limit_mode="soft")
    votes = [vote_of(poll, f"pupil {n}", address=HOME, at=n) for n in range(5)]
    counting.count_votes([*votes, vote_of(poll, "alice", address=OFFICE), vote_of(poll, "bob", address=OFFICE)])
    beyond = [vote_of(poll, f"clerk {n}", address=OFFICE, at=n) for n in range(2)]
    counting.count_votes(beyond)
    assert tallies(poll) == {"soup": 4}
    assert outcome_of(votes[4]) == ("quarantined", "address_limit")

    if first:
        review.rule(poll.pk, [address(poll, HOME)], first, act())
        assert tallies(poll) == {"soup": 2}
        # A quarantine leaves alone what is in one already.
        assert outcome_of(votes[4]) == (VOIDED if first == Ruling.VOID else ("quarantined", "address_limit"))
    review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act())

    assert tallies(poll) == {"soup": 7}
    assert {outcome_of(vote) for vote in votes} == {COUNTED}
    assert {outcome_of(vote) for vote in beyond} == {("quarantined", "address_limit")}
    assert counting.count_votes(votes) == {"repeat": 5}
    assert_tallies_equal_votes()


def test_a_release_of_an_address_ends_what_was_ruled_on_its_subnet(poll):
    counting.count_votes([vote_of(poll, "a", address=HOME), vote_of(poll, "b", address="192.0.2.8")])
    review.rule(poll.pk, [subnet(poll, HOME)], Ruling.VOID, act())

    review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act())
    assert tallies(poll) == {"soup": 1}

    review.rule(poll.pk, [subnet(poll, HOME)], Ruling.QUARANTINE, act())
    assert tallies(poll) == {}
    assert_tallies_equal_votes()


def test_a_ruling_changes_no_other_poll(make_poll):
    poll, other = make_poll(), make_poll()
    counting.count_votes([vote_of(poll, "a", address=HOME), vote_of(other, "a", address=HOME)])

    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())

    assert (tallies(poll), tallies(other)) == ({}, {"soup": 1})


def test_approval_ballots_and_withdrawals_are_taken_out_and_put_back(make_poll):
    poll = make_poll(method="approval", allow_change=True, allow_withdrawal=True)
    counting.count_votes(
        [
            vote_of(poll, "a", "soup", "salad", address=HOME),
            vote_of(poll, "b", "soup", address=OFFICE, at=1),
            msgspec.structs.replace(withdrawal_of(poll, "b", at=2), address_key=keys_of(poll, HOME)[0], subnet_key=keys_of(poll, HOME)[1]),
        ]
    )
    assert tallies(poll) == {"soup": 1, "salad": 1, "ballots": 1}

    review.rule(poll.pk, [address(poll, HOME)], Ruling.QUARANTINE, act())
    assert tallies(poll) == {"soup": 1, "ballots": 1}  # b's withdrawal came from there, too

    review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act())
    assert tallies(poll) == {"soup": 1, "salad": 1, "ballots": 1}
    assert_tallies_equal_votes()


# --- A function of votes and rulings alone --------------------------------------------------------------------------------

ADDRESSES = [HOME, "192.0.2.8", OFFICE, None]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("vote"),
            st.integers(0, 1),  # voter
            st.sampled_from(["soup", "salad", ""]),
            st.integers(0, 5),  # when
            st.integers(0, 3),  # where from
            st.integers(0, 3),  # which vote: few ids, so that copies of one vote come from several places
        ),
        st.tuples(
            st.just("rule"),
            st.sampled_from([Ruling.QUARANTINE, Ruling.VOID, Ruling.RELEASE]),
            st.sampled_from(["home", "next door", "subnet", "time", "office"]),
            st.sampled_from([None, 0, 1]),  # case
        ),
    ),
    max_size=14,
)


def _fate(vote, rulings):
    """What the rulings make of a vote, written apart from holds.py: the last of each case and selection, in their order."""
    kept_out = None
    for ruling, fits, case in rulings:
        if not fits(vote):
            continue
        if case is None:
            kept_out = {Ruling.QUARANTINE: HELD, Ruling.VOID: VOIDED}.get(ruling)
        elif ruling != Ruling.RELEASE:
            kept_out = VOIDED if VOIDED in (kept_out, {Ruling.VOID: VOIDED}.get(ruling)) else HELD
    return kept_out


@pytest.mark.parametrize("last_stands", [True, False])
@given(steps=STEPS)
@example(steps=[("vote", 0, "soup", 3, 2, 0), ("rule", Ruling.VOID, "home", None), ("vote", 0, "soup", 1, 0, 0)])
@example(steps=[("vote", 0, "soup", 3, 0, 0), ("rule", Ruling.VOID, "home", None), ("vote", 0, "soup", 1, 2, 0)])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_stands_is_a_function_of_votes_and_rulings_whatever_came_first(make_poll, last_stands, steps):
    poll = make_poll(allow_change=last_stands, allow_withdrawal=True)
    cases = [make_case(poll, HOME, rule=f"rule {n}") for n in range(2)]
    selectors = {
        "home": address(poll, HOME),
        "next door": address(poll, "192.0.2.8"),
        "subnet": subnet(poll, HOME),
        "office": subnet(poll, OFFICE),
        "time": Selector(accepted_from=moment_of(2), accepted_until=moment_of(4)),
    }
    fits = {
        "home": lambda vote: vote[3] == 0,
        "next door": lambda vote: vote[3] == 1,
        "subnet": lambda vote: vote[3] in (0, 1),
        "office": lambda vote: vote[3] == 2,
        "time": lambda vote: 2 <= vote[2] < 4,
    }
    earliest, rulings = {}, {}
    for step in steps:
        if step[0] == "vote":
            _, voter, text, at, where, number = step
            made = vote_of(poll, f"voter {voter}", *([text] if text else ["soup"]), at=at, address=ADDRESSES[where])
            # A vote id says voter, request and choice, as voters.vote_id makes it.
            name = bytes([voter, number]) * 6
            made = msgspec.structs.replace(
                made, selection=made.selection if text else (), vote_id=UUID(bytes=name + (text or "none").encode()[:4].ljust(4))
            )
            counting.count_votes([made])
            copy = (made.accepted_at, made.selection, at, where)
            if (made.voter_key, made.vote_id) not in earliest or copy[:2] < earliest[made.voter_key, made.vote_id][:2]:
                earliest[made.voter_key, made.vote_id] = copy
        else:
            _, ruling, which, case = step
            review.rule(poll.pk, [selectors[which]], ruling, act(), [] if case is None else [cases[case].pk])
            rulings.pop((which, case), None)
            rulings[which, case] = (ruling, fits[which], case)

        expected = {}
        for voter_key in {voter for voter, _ in earliest}:
            free = [
                counting._KnownVote(vote_id, selection, accepted_at, None, None, None)
                for (voter, vote_id), (accepted_at, selection, at, where) in earliest.items()
                if voter == voter_key and not _fate((accepted_at, selection, at, where), rulings.values())
            ]
            if free:
                winner, _ = ballots.decide(free, last_stands=last_stands)
                expected[voter_key] = (winner.vote_id, winner.selection)
        stands = {vote.voter_key: (vote.vote_id, tuple(vote.selection)) for vote in Vote.objects.filter(poll_id=poll.pk)}
        assert stands == expected
        aside = {(vote.voter_key, vote.vote_id): (vote.outcome, vote.reason) for vote in VoteAside.objects.filter(poll_id=poll.pk)}
        for key, copy in earliest.items():
            fate = _fate(copy, rulings.values())
            assert (aside.get(key) == fate) if fate else (aside.get(key) not in (HELD, VOIDED))
    assert_tallies_equal_votes()


# --- While counting goes on -----------------------------------------------------------------------------------------------


def in_threads(*works):
    errors = []

    def run(work):
        try:
            work()
        except Exception as exc:
            errors.append(exc)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_votes_that_are_counted_while_a_ruling_runs_end_where_it_says(poll):
    bots = [vote_of(poll, f"bot {n}", address=HOME) for n in range(1500)]
    honest = [vote_of(poll, f"voter {n}", "salad", address=OFFICE) for n in range(1500)]

    def count(votes):
        for start in range(0, len(votes), 25):
            counting.count_votes(votes[start : start + 25])

    def rule():
        for ruling in (Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID) * 4:
            review.rule(poll.pk, [address(poll, HOME)], ruling, act())

    in_threads(lambda: count(bots), lambda: count(honest), rule)

    assert tallies(poll) == {"salad": 1500}
    assert VoteAside.objects.filter(poll_id=poll.pk, outcome=VOIDED[0], reason=VOIDED[1]).count() == 1500
    assert_tallies_equal_votes()


def test_tallies_equal_votes_at_every_moment_of_rulings_and_changes_of_votes(make_poll):
    poll = make_poll(allow_change=True)
    done = threading.Event()

    def count():
        try:
            for round in range(40):
                texts = ("soup", "salad") if round % 2 else ("salad", "soup")
                counting.count_votes(
                    [vote_of(poll, f"voter {n}", texts[n % 2], at=round, address=(HOME, OFFICE)[(n + round) % 2]) for n in range(30)]
                )
        finally:
            done.set()

    def rule():
        rulings = [Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID, Ruling.RELEASE]
        while not done.is_set():
            for ruling in rulings:
                review.rule(poll.pk, [address(poll, HOME)], ruling, act())

    def look():
        while not done.is_set():
            assert_tallies_equal_votes()

    in_threads(count, rule, look)

    assert_tallies_equal_votes()
    assert sum(tallies(poll).values()) == 30
    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())
    # The last vote from the office stands: that of the 40th round for odd voters, of the 39th for even ones.
    assert set(Vote.objects.filter(poll_id=poll.pk).values_list("address_key", flat=True)) == {keys_of(poll, OFFICE)[0]}
    assert sum(tallies(poll).values()) == 30


def test_a_ruling_waits_for_a_bundle_that_does_not_know_of_it(poll):
    """Without the lock of `keep_counting_out` the bot's vote would stand, for good."""
    begun, go_on = threading.Event(), threading.Event()
    write_outcomes = counting._Count.write_outcomes

    def slowly(count):
        begun.set()
        assert go_on.wait(20)
        write_outcomes(count)

    def count():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counting._Count, "write_outcomes", slowly)
            counting.count_votes([vote_of(poll, "bot", address=HOME)])

    def rule():
        assert begun.wait(20)
        threading.Timer(0.3, go_on.set).start()
        review._declare(poll.pk, [address(poll, HOME)], Ruling.VOID, act(), [])
        assert go_on.is_set(), "the ruling did not wait for the bundle"

    in_threads(count, rule)
    review.settle_unfinished(now() + timedelta(minutes=1))
    assert tallies(poll) == {}


def test_a_poll_that_is_held_up_by_a_stopped_worker_is_busy_and_nothing_is_ruled(poll, monkeypatch):
    monkeypatch.setattr(review, "_PATIENCE_SECONDS", 0.2)
    counting.count_votes([vote_of(poll, "bot", address=HOME)])
    stopped, go_on = threading.Event(), threading.Event()

    def count():
        with transaction.atomic(), connection.cursor() as cursor:
            counting._Count(cursor).lock_polls({poll.pk})
            stopped.set()
            assert go_on.wait(20)

    def rule():
        try:
            assert stopped.wait(20)
            with pytest.raises(Refusal) as refused:
                review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())
            assert refused.value.problem == problems.UNAVAILABLE
        finally:
            go_on.set()

    in_threads(count, rule)
    assert (tallies(poll), Hold.objects.filter(poll=poll).count()) == ({"soup": 1}, 0)


def test_a_ruling_that_a_crash_interrupted_is_finished(poll):
    counting.count_votes([vote_of(poll, "bot", address=HOME)])
    review._declare(poll.pk, [address(poll, HOME)], Ruling.VOID, act("one person"), [])  # and then the power goes

    assert review.settle_unfinished(now()) == 0  # perhaps it is still at it
    assert review.settle_unfinished(now() + timedelta(minutes=1)) == 1

    assert tallies(poll) == {}
    assert list(Decision.objects.filter(poll_id=poll.pk).values_list("ruling", "actor", "reason", "votes")) == [
        ("void", "otto", "one person", 1)
    ]
    assert review.settle_unfinished(now() + timedelta(minutes=1)) == 0


def test_a_ruling_works_after_the_poll_is_final_and_raises_the_revision(poll):
    counting.count_votes([vote_of(poll, "bot", address=HOME), vote_of(poll, "alice", address=OFFICE)])
    Poll.objects.filter(pk=poll.pk).update(closes_at=now(), closed_at=now(), finalised_at=now())
    before = results.read_results(poll.pk, now())

    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())

    after = results.read_results(poll.pk, now())
    assert (before["total_votes"], after["total_votes"], after["is_final"]) == (2, 1, True)
    assert after["revision"] > before["revision"]


# --- Cases ----------------------------------------------------------------------------------------------------------------


def test_ruling_on_a_case_says_so_in_it(poll):
    counting.count_votes([vote_of(poll, "bot", address=HOME), vote_of(poll, "alice", address=OFFICE)])
    case = make_case(poll, HOME)

    for ruling, state, stand in [
        (Ruling.QUARANTINE, CaseState.OPEN, 1),
        (Ruling.VOID, CaseState.CONFIRMED, 1),
        (Ruling.RELEASE, CaseState.OPEN, 2),
        (Ruling.VOID, CaseState.CONFIRMED, 1),
        (Ruling.CLEAR, CaseState.CLEARED, 2),
    ]:
        (decision,) = review.rule_on_case(case.pk, ruling, act(f"because of {ruling}"))

        case.refresh_from_db()
        assert (case.state, case.reviewer, case.note) == (state, "otto", f"because of {ruling}")
        assert (decision.cases, decision.ruling) == ([case.pk], ruling)
        assert tallies(poll) == {"soup": stand}
    assert list(Decision.objects.filter(cases__contains=[case.pk]).order_by("id").values_list("ruling", flat=True)) == [
        "quarantine", "void", "release", "void", "clear",
    ]  # fmt: skip
    assert_tallies_equal_votes()


def test_clearing_a_case_that_holds_nothing_leaves_others_rulings_alone(poll):
    counting.count_votes([vote_of(poll, "bot", address=HOME)])
    one, other = make_case(poll, HOME), make_case(poll, HOME, rule="regular")
    review.rule_on_case(one.pk, Ruling.VOID, act())

    review.rule_on_case(other.pk, Ruling.CLEAR, act())
    assert tallies(poll) == {}
    review.rule_on_case(other.pk, Ruling.QUARANTINE, act())
    review.rule_on_case(other.pk, Ruling.CLEAR, act())
    assert tallies(poll) == {}

    review.rule_on_case(one.pk, Ruling.RELEASE, act())
    assert tallies(poll) == {"soup": 1}


def test_a_case_over_all_polls_is_ruled_on_in_each(make_poll):
    first, second, untouched = make_poll(), make_poll(), make_poll()
    everywhere = "203.0.113.77"  # not so in other tests' polls
    counting.count_votes(
        [vote_of(first, "a", address=everywhere), vote_of(second, "a", address=everywhere), vote_of(untouched, "a", address=OFFICE)]
    )
    case = make_case(first, everywhere, all_polls=True)

    decisions = review.rule_on_case(case.pk, Ruling.VOID, act())

    assert {decision.poll_id for decision in decisions} == {first.pk, second.pk}
    assert [tallies(poll) for poll in (first, second, untouched)] == [{}, {}, {"soup": 1}]


def test_all_cases_of_a_rule_are_ruled_on_at_once(poll):
    counting.count_votes([vote_of(poll, f"bot {n}", address=f"192.0.{n}.7") for n in range(5)])
    cases = [make_case(poll, f"192.0.{n}.7", rule="drip") for n in range(4)]
    SuspiciousIP.objects.filter(pk=cases[0].pk).update(state=CaseState.CLEARED)

    decision = review.rule_on_rule(poll.pk, "drip", Ruling.VOID, act())

    assert (decision.votes, decision.cases) == (3, [case.pk for case in cases[1:]])
    assert tallies(poll) == {"soup": 2}
    assert review.rule_on_rule(poll.pk, "drip", Ruling.RELEASE, act()).votes == 3
    with pytest.raises(Refusal) as refused:
        review.rule_on_rule(poll.pk, "no such rule", Ruling.VOID, act())
    assert refused.value.problem == problems.NOT_FOUND


def test_three_hundred_cases_are_declared_in_a_few_statements(poll, django_assert_max_num_queries):
    for n in range(300):
        make_case(poll, f"192.0.{n % 256}.{n // 256}", rule="drip")

    with django_assert_max_num_queries(40):
        review.rule_on_rule(poll.pk, "drip", Ruling.QUARANTINE, act())

    assert Hold.objects.filter(poll=poll).count() == 300


# --- On record ------------------------------------------------------------------------------------------------------------


def test_decisions_can_not_be_changed_or_deleted(poll):
    decision = review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())

    for change in (
        lambda: Decision.objects.filter(pk=decision.pk).update(reason="another"),
        lambda: Decision.objects.filter(pk=decision.pk).delete(),
        decision.delete,
        lambda: connection.cursor().execute("TRUNCATE decisions"),
    ):
        with pytest.raises(DatabaseError, match="never changed or deleted"), transaction.atomic():
            change()


def test_the_polls_journal_tells_how_the_results_changed(poll):
    counting.count_votes([vote_of(poll, f"bot {n}", address=HOME) for n in range(10)])

    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act("one person"))
    review.rule(poll.pk, [address(poll, OFFICE)], Ruling.VOID, act("nothing there"))

    entries = JournalEntry.objects.filter(poll=poll, action="voided").values_list("actor", "reason", "changes")
    soup = str(option(poll, "soup"))
    assert list(entries) == [("otto", "one person", {"voters": [0, 10], "results": [{soup: 10}, {soup: 0}]})]


@pytest.mark.parametrize(
    ("selector", "ruling", "reason", "pointer"),
    [
        (Selector(uuid4(), uuid4()), Ruling.VOID, "  ", "#/reason"),
        (Selector(uuid4(), uuid4()), Ruling.BLOCK, "because", "#/ruling"),
        (Selector(uuid4(), uuid4()), Ruling.CLEAR, "because", "#/ruling"),
        (Selector(), Ruling.VOID, "because", "#/accepted_from"),
        (Selector(accepted_from=moment_of(1)), Ruling.VOID, "because", "#/accepted_from"),
        (Selector(accepted_from=moment_of(1), accepted_until=moment_of(1)), Ruling.VOID, "because", "#/accepted_until"),
    ],
    ids=["no reason", "no ruling on votes", "only on cases", "everything", "half a window", "empty window"],
)
def test_what_is_no_ruling_is_refused_and_changes_nothing(poll, selector, ruling, reason, pointer):
    counting.count_votes([vote_of(poll, "alice", address=HOME)])

    with pytest.raises(Refusal) as refused:
        review.rule(poll.pk, [selector], ruling, act(reason))

    assert (refused.value.problem, refused.value.errors[0]["pointer"]) == (problems.INVALID, pointer)
    assert (tallies(poll), Hold.objects.filter(poll=poll).count()) == ({"soup": 1}, 0)


def test_what_is_not_there_is_refused(poll):
    for work in (
        lambda: review.rule(uuid4(), [Selector(uuid4(), uuid4())], Ruling.VOID, act()),
        lambda: review.look(uuid4(), [Selector(uuid4(), uuid4())], Ruling.VOID, act(), reads_results=True),
    ):
        with pytest.raises(Refusal) as refused:
            work()
        assert refused.value.problem == problems.UNKNOWN_POLL
    with pytest.raises(Refusal) as refused:
        review.rule_on_case(0, Ruling.VOID, act())
    assert refused.value.problem == problems.NOT_FOUND


# --- What would be --------------------------------------------------------------------------------------------------------


def imagine(poll, selectors, ruling, cases=()):
    """What it would do, whether or not that may be shown: `changes` as differences."""
    imagined, _ = review.imagine(poll.pk, selectors, ruling, cases, now())
    return replace(imagined, changes={option: then - was for option, (was, then) in imagined.changes.items()})


def test_what_a_ruling_would_do_is_what_it_does(make_poll):
    poll = make_poll(allow_change=True)
    counting.count_votes(
        [
            vote_of(poll, "a", "soup", address=HOME),
            vote_of(poll, "b", "soup", address=OFFICE, at=1),
            vote_of(poll, "b", "salad", address=HOME, at=2),
            vote_of(poll, "c", "salad", address=OFFICE),
        ]
    )
    soup, salad = option(poll, "soup"), option(poll, "salad")
    selectors = [address(poll, HOME)]

    imagined = imagine(poll, selectors, Ruling.VOID)
    assert (imagined.votes, imagined.voters) == (2, 2)
    assert imagined.changes == {salad: -1}  # a's soup goes, b's comes back
    assert tallies(poll) == {"soup": 1, "salad": 2}

    review.rule(poll.pk, selectors, Ruling.VOID, act())
    assert tallies(poll) == {"soup": 1, "salad": 1}
    assert imagine(poll, selectors, Ruling.VOID).changes == {}
    assert imagine(poll, selectors, Ruling.RELEASE).changes == {salad: 1}
    assert soup not in imagined.changes


def test_what_a_ruling_on_a_case_would_do_leaves_other_cases_rulings_alone(poll):
    counting.count_votes([vote_of(poll, "bot", address=HOME)])
    one, other = make_case(poll, HOME), make_case(poll, HOME, rule="regular")
    for case in (one, other):
        review.rule_on_case(case.pk, Ruling.VOID, act())
    selectors = [Selector.of_case(one)]

    assert imagine(poll, selectors, Ruling.RELEASE, [one.pk]).changes == {}
    assert imagine(poll, selectors, Ruling.RELEASE).changes == {option(poll, "soup"): 1}
    review.rule_on_case(one.pk, Ruling.RELEASE, act())
    assert tallies(poll) == {}


def test_results_show_both_while_a_case_is_open(poll):
    counting.count_votes(
        [
            *(vote_of(poll, f"bot {n}", "soup", address=HOME) for n in range(30)),
            *(vote_of(poll, f"voter {n}", "salad", address=OFFICE) for n in range(10)),
        ]
    )
    assert shown_in_review(poll) is None
    case = make_case(poll, HOME)
    review.compare(poll.pk, now())
    both = {"with": {"soup": 30, "salad": 10, "total": 40}, "without": {"soup": 0, "salad": 10, "total": 10}}
    assert shown_in_review(poll) == both

    review.rule_on_case(case.pk, Ruling.QUARANTINE, act())
    assert tallies(poll) == {"salad": 10}
    assert shown_in_review(poll) == both

    counting.count_votes([vote_of(poll, "bob", "salad", address=OFFICE)])
    both = {"with": {"soup": 30, "salad": 11, "total": 41}, "without": {"soup": 0, "salad": 11, "total": 11}}
    assert shown_in_review(poll) == both

    review.rule_on_case(case.pk, Ruling.VOID, act())
    assert shown_in_review(poll) is None
    review.rule_on_case(case.pk, Ruling.RELEASE, act())
    assert shown_in_review(poll) == both
    review.rule_on_case(case.pk, Ruling.CLEAR, act())
    assert shown_in_review(poll) is None
    assert tallies(poll) == {"soup": 30, "salad": 11}


def test_results_show_what_soft_limits_hold_up(make_poll):
    poll = make_poll(method="approval", voter_policy="session", address_limit=1, limit_mode="soft")
    counting.count_votes([vote_of(poll, f"pupil {n}", "soup", "salad", address=HOME, at=n) for n in range(11)])
    counting.count_votes([vote_of(poll, f"clerk {n}", "soup", address=f"198.51.100.{n}") for n in range(9)])

    make_case(poll, HOME, rule="soft_limit")

    review.compare(poll.pk, now())

    assert shown_in_review(poll) == {
        "with": {"soup": 20, "salad": 11, "total": 20},
        "without": {"soup": 10, "salad": 1, "total": 10},
    }
    assert Comparison.objects.get(poll=poll).voters == 10


def test_outcomes_of_rulings_are_not_purged(make_poll):
    poll = make_poll()
    out, lost = vote_of(poll, "bot", address=HOME), vote_of(poll, "alice", at=1)
    counting.count_votes([out, vote_of(poll, "alice"), lost])
    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())
    Poll.objects.filter(pk=poll.pk).update(closed_at=now() - timedelta(days=4000))

    closing.purge_outcomes(now() + timedelta(days=4000))

    assert (outcome_of(out), outcome_of(lost)) == (VOIDED, None)
    review.rule(poll.pk, [address(poll, HOME)], Ruling.RELEASE, act())
    assert Tally.objects.get(poll=poll).votes == 2
