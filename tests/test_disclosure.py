"""What is shown of other people's choices: never anything that differs from something else shown by fewer than ten voters."""

import threading
from fractions import Fraction
from functools import partial
from itertools import pairwise
from uuid import uuid4

import pytest
from django.db import DatabaseError, connection, transaction
from django.utils.timezone import now
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polls import clients, counting, disclosure, holds, problems, results, review, roles
from polls.disclosure import LEAST_VOTERS
from polls.holds import Selector
from polls.journal import Act
from polls.models import Comparison, Decision, JournalEntry, Look, LookedAt, LookKind, Poll, Ruling, Vote
from polls.moments import from_microseconds, iso
from tests.conftest import Api, make_user, option, signed_in, tallies, vote_of
from tests.test_intake import assert_refused
from tests.test_review import HOME, OFFICE, act, address, in_threads, make_case, moment_of, shown_in_review, subnet

WHY = {"reason": "It looks like one person."}


def cast(poll, name, number, text="soup", *, address=HOME, at=0):
    """Count a vote of each of so many voters, a second apart."""
    votes = [vote_of(poll, f"{name} {n}", text, address=address, at=at + n) for n in range(number)]
    counting.count_votes(votes)
    return votes


@pytest.fixture
def crowd(poll):
    """A poll in which twenty voted for salad from elsewhere."""
    cast(poll, "honest", 20, "salad", address=OFFICE)
    return poll


def look(poll, *selectors, ruling=Ruling.VOID, reads_results=True):
    return review.look(poll.pk, selectors, ruling, act("why not"), reads_results=reads_results)


def shown(poll):
    return {row["text"]: row["votes"] for row in results.read_results(poll.pk, now())["options"]}


# --- Dry runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("voters", [1, LEAST_VOTERS - 1, LEAST_VOTERS])
def test_a_dry_run_shows_changes_from_ten_voters_on(crowd, voters):
    cast(crowd, "bot", voters)

    imagined = look(crowd, address(crowd, HOME))

    assert (imagined.votes, imagined.voters) == (voters, voters)
    assert imagined.changes == ({option(crowd, "soup"): (10, 0)} if voters >= LEAST_VOTERS else None)


@pytest.mark.parametrize("others", [0, 1, LEAST_VOTERS - 1, LEAST_VOTERS])
def test_a_dry_run_shows_nothing_where_few_others_are_left_over(poll, others):
    """Their choices are what the results show beside it."""
    cast(poll, "bot", 10)
    cast(poll, "alice", others, "salad", address=OFFICE)

    assert (look(poll, address(poll, HOME)).changes is None) is (0 < others < LEAST_VOTERS)


def test_a_dry_run_looked_at_again_after_one_more_vote_shows_nothing(crowd):
    cast(crowd, "bot", 10)
    assert look(crowd, address(crowd, HOME)).changes
    assert look(crowd, address(crowd, HOME)).changes  # the same again

    cast(crowd, "alice", 1, "salad")
    assert look(crowd, address(crowd, HOME)).changes is None

    cast(crowd, "more", 9)
    assert look(crowd, address(crowd, HOME)).changes == {option(crowd, "soup"): (19, 0), option(crowd, "salad"): (21, 20)}


def test_dry_runs_that_overlap_in_few_voters_show_nothing(crowd):
    """Neither two of them, nor three that leave one voter over."""
    cast(crowd, "bot", 40)

    def between(first, last):
        return Selector(subnet_key=address(crowd, HOME).subnet_key, accepted_from=moment_of(first), accepted_until=moment_of(last))

    assert look(crowd, between(0, 20)).changes
    assert look(crowd, between(0, 21)).changes is None
    assert look(crowd, between(11, 31)).changes is None
    assert look(crowd, between(10, 30)).changes
    assert look(crowd, between(30, 40)).changes
    assert look(crowd, between(10, 20), between(30, 40)).changes
    assert look(crowd, between(5, 40)).changes is None  # with the first: five
    assert Look.objects.filter(poll_id=crowd.pk).count() == 4


def test_two_looks_that_leave_few_others_over_show_one_of_them(poll):
    cast(poll, "bot", 10)
    cast(poll, "clerk", 10, address=OFFICE)
    cast(poll, "alice", 5, address="203.0.113.1")

    assert look(poll, address(poll, HOME)).changes
    assert look(poll, address(poll, OFFICE)).changes is None


def test_what_is_put_back_is_known_as_what_was_taken_out(crowd):
    """Ten of whom one was exchanged meanwhile: in the sum of both looks two voters are left."""
    bots = cast(crowd, "bot", 11)
    first_ten = Selector(subnet_key=bots[0].subnet_key, accepted_from=moment_of(0), accepted_until=moment_of(10))
    last_ten = first_ten._replace(accepted_from=moment_of(1), accepted_until=moment_of(11))
    assert look(crowd, first_ten).changes
    review.rule(crowd.pk, [last_ten], Ruling.VOID, act())

    assert look(crowd, last_ten, ruling=Ruling.RELEASE).changes is None


def test_a_voter_who_falls_back_on_another_vote_is_one_voter(make_poll):
    poll = make_poll(allow_change=True)
    cast(poll, "honest", 20, "salad", address=OFFICE)
    cast(poll, "bot", 1, "salad", address="203.0.113.1")
    cast(poll, "bot", 12, at=100)

    imagined = look(poll, address(poll, HOME))

    assert imagined.changes == {option(poll, "soup"): (12, 0), option(poll, "salad"): (20, 21)}


def test_only_so_many_dry_runs_of_a_poll_show_something(crowd, monkeypatch):
    monkeypatch.setattr(disclosure, "MOST_DRY_RUNS", 2)
    selectors = []
    for n in range(3):
        cast(crowd, f"bot {n}", 10, address=f"192.0.{n}.7")
        selectors.append(address(crowd, f"192.0.{n}.7"))

    assert [look(crowd, selector).changes is None for selector in selectors] == [False, False, True]
    assert look(crowd, selectors[0]).changes  # known already
    decision = review.rule(crowd.pk, [selectors[2]], Ruling.VOID, act())
    assert disclosure.changes_of(decision)  # rulings go on


def test_only_so_much_is_remembered(crowd, monkeypatch):
    monkeypatch.setattr(disclosure, "MOST_REMEMBERED", 15)
    for n in range(2):
        cast(crowd, f"bot {n}", 10, address=f"192.0.{n}.7")
    assert look(crowd, address(crowd, "192.0.0.7")).changes
    assert look(crowd, address(crowd, "192.0.1.7")).changes is None


def test_who_may_not_read_results_sees_no_change_and_leaves_nothing_behind(crowd):
    cast(crowd, "bot", 10)
    imagined = look(crowd, address(crowd, HOME), reads_results=False)
    assert (imagined.voters, imagined.changes) == (10, None)
    assert not Look.objects.filter(poll_id=crowd.pk).exists()


@pytest.mark.parametrize("voters", [1, 10])
def test_a_dry_run_is_on_record(crowd, voters):
    cast(crowd, "bot", voters)

    look(crowd, address(crowd, HOME))

    decision = Decision.objects.get(poll_id=crowd.pk)
    assert (decision.ruling, decision.actor, decision.reason, decision.votes) == ("look", "otto", "why not", voters)
    assert decision.hides_changes is (voters == 1)
    entry = JournalEntry.objects.get(poll=crowd, action="looked")
    assert (entry.actor, entry.reason, entry.changes) == ("otto", "why not", {"voters": [0, voters]})
    looks = Look.objects.filter(poll_id=crowd.pk)
    assert [(found.kind, found.actor, found.reason) for found in looks] == ([("dry_run", "otto", "why not")] if voters == 10 else [])
    assert all(
        found.selectors == [{"address_key": str(address(crowd, HOME).address_key), "subnet_key": str(address(crowd, HOME).subnet_key)}]
        for found in looks
    )


def test_a_dry_run_without_a_reason_is_none(crowd):
    with pytest.raises(problems.Refusal):
        review.look(crowd.pk, [address(crowd, HOME)], Ruling.VOID, act(" "), reads_results=True)
    assert not Decision.objects.filter(poll_id=crowd.pk).exists()


def test_looks_can_not_be_changed_or_deleted(crowd):
    cast(crowd, "bot", 10)
    look(crowd, address(crowd, HOME))
    looks, sets = Look.objects.filter(poll_id=crowd.pk), LookedAt.objects.filter(poll_id=crowd.pk)

    for change in (
        lambda: looks.update(actor="somebody"),
        lambda: sets.update(moves=b""),
        lambda: sets.delete(),
        lambda: connection.cursor().execute("DELETE FROM looks"),
        lambda: connection.cursor().execute("TRUNCATE looked_at_sets"),
    ):
        with pytest.raises(DatabaseError, match="never changed or deleted"), transaction.atomic():
            change()


# --- Rulings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("voters", [1, LEAST_VOTERS - 1, LEAST_VOTERS])
def test_a_ruling_tells_changes_from_ten_voters_on_and_takes_effect_always(crowd, voters):
    cast(crowd, "bot", voters)

    decision = review.rule(crowd.pk, [address(crowd, HOME)], Ruling.VOID, act())

    assert tallies(crowd) == {"salad": 20}
    soup, is_told = str(option(crowd, "soup")), voters >= LEAST_VOTERS
    assert (decision.votes, decision.hides_changes) == (voters, not is_told)
    assert disclosure.changes_of(decision) == ({soup: [10, 0]} if is_told else None)
    assert decision.changes == ({soup: [10, 0]} if is_told else {})
    [entry] = JournalEntry.objects.filter(poll=crowd, action="voided")
    assert entry.changes == {"voters": [0, voters], **({"results": [{soup: 10}, {soup: 0}]} if is_told else {})}


HIDDEN = ["sealed", "after_close", "owner", "after_vote"]


@pytest.mark.parametrize("visibility", HIDDEN)
def test_no_ruling_tells_later_what_the_tallies_were_while_they_were_hidden(operator, auditor, owners_api, make_poll, visibility):
    poll = make_poll(results_visibility=visibility)
    cast(poll, "honest", 20, "salad", address=OFFICE)
    cast(poll, "bot", 12)
    base = f"/api/v1/polls/{poll.pk}"
    for n, text in enumerate(("soup", "salad", "soup")):  # one voter's vote between two rulings
        for ruling in ("quarantine", "release"):
            assert operator.post(f"{base}/rulings", {"ruling": ruling, "address": HOME, **WHY}).json["changes"] is None
        look(poll, address(poll, HOME))
        cast(poll, f"one {n}", 1, text, address="203.0.113.1")

    Poll.objects.filter(pk=poll.pk).update(closes_at=now(), closed_at=now(), finalised_at=now())

    for caller in (operator, auditor, owners_api):
        rulings = caller.get(f"{base}/rulings")
        if rulings.status == 200:
            assert len(rulings.json["results"]) == 9
            assert {str(found["changes"]) for found in rulings.json["results"]} == {"None"}
    for caller in (auditor, owners_api):
        entries = caller.get(f"{base}/journal").json["results"]
        assert len([entry for entry in entries if entry["action"] in ("quarantined", "released")]) == 6
        assert not [entry for entry in entries if "results" in entry["changes"]]
    assert [decision.changes for decision in Decision.objects.filter(poll_id=poll.pk)] == [{}] * 9
    # What was hidden still counts, and what is ruled where everybody reads the results is told.
    assert tallies(poll) == {"soup": 14, "salad": 21}
    decision = review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())
    assert decision.hides_changes is (visibility == "owner")


def test_results_do_not_tell_a_ruling_on_few_by_their_difference(crowd):
    cast(crowd, "bot", 1)
    before = results.read_results(crowd.pk, now())

    review.rule(crowd.pk, [address(crowd, HOME)], Ruling.VOID, act())
    after = results.read_results(crowd.pk, now())
    assert {**after, "as_of": None, "review": None} == {**before, "as_of": None, "review": None}
    assert after["as_of"] >= before["as_of"]

    cast(crowd, "late", 9, address="203.0.113.1")
    assert shown(crowd) == {"soup": 1, "salad": 20}
    cast(crowd, "later", 1, address="203.0.113.1")
    assert shown(crowd) == {"soup": 10, "salad": 20}
    cast(crowd, "last", 1, address="203.0.113.1")
    assert shown(crowd) == {"soup": 11, "salad": 20}


def test_a_ruling_that_is_undone_leaves_no_trace_in_results(crowd):
    cast(crowd, "bot", 1)
    for ruling in (Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID, Ruling.RELEASE):
        review.rule(crowd.pk, [address(crowd, HOME)], ruling, act())
        assert shown(crowd) == {"soup": 1, "salad": 20}
    assert tallies(crowd) == {"soup": 1, "salad": 20}


def test_a_large_ruling_shows_at_once_unless_it_tells_few_voters_beside_a_look(crowd):
    cast(crowd, "bot", 12)
    first_eleven = address(crowd, HOME)._replace(accepted_from=moment_of(0), accepted_until=moment_of(11))
    assert look(crowd, address(crowd, HOME)).changes

    decision = review.rule(crowd.pk, [first_eleven], Ruling.VOID, act())
    assert (disclosure.changes_of(decision), shown(crowd)) == (None, {"soup": 12, "salad": 20})

    other = cast(crowd, "clerk", 12, address="203.0.113.1")
    assert shown(crowd) == {"soup": 13, "salad": 20}
    review.rule(crowd.pk, [Selector(other[0].address_key, other[0].subnet_key)], Ruling.VOID, act())
    assert shown(crowd) == {"soup": 1, "salad": 20}


def test_final_results_are_exact(crowd):
    cast(crowd, "bot", 1)
    review.rule(crowd.pk, [address(crowd, HOME)], Ruling.VOID, act())
    assert shown(crowd) == {"soup": 1, "salad": 20}
    Poll.objects.filter(pk=crowd.pk).update(closes_at=now(), closed_at=now(), finalised_at=now())
    assert shown(crowd) == {"soup": 0, "salad": 20}


def test_decisions_and_journals_of_before_tell_nothing_of_few_voters(crowd):
    soup = str(option(crowd, "soup"))
    fields = {"at": now(), "actor": "otto", "ruling": "void", "reason": "why", "poll_id": crowd.pk}
    assert disclosure.changes_of(Decision(**fields, votes=1, changes={soup: [10, 9]})) is None
    assert disclosure.changes_of(Decision(**fields, votes=10, changes={soup: [10, 0]})) == {soup: [10, 0]}
    assert disclosure.changes_of(Decision(**fields, votes=0, changes={})) == {}

    def told(after, **more):
        entry = JournalEntry(poll=crowd, action="voided", changes={"results": [{soup: 10}, {soup: after}], **more})
        return "results" in disclosure.journal_of(entry, reads_tallies=True)

    assert (told(9), told(0), told(5, voters=[0, 10]), told(5, voters=[0, 9])) == (False, True, True, False)


# --- Comparisons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("voters", [1, LEAST_VOTERS - 1, LEAST_VOTERS])
def test_results_show_with_and_without_from_ten_voters_on(crowd, voters):
    cast(crowd, "bot", voters)

    review.rule(crowd.pk, [address(crowd, HOME)], Ruling.QUARANTINE, act())

    compared = results.read_results(crowd.pk, now())["review"]
    assert compared["voters"] == voters
    if voters < LEAST_VOTERS:
        assert (compared["with"], compared["without"]) == (None, None)
        assert Comparison.objects.get(poll=crowd).with_votes == {}
    else:
        assert shown_in_review(crowd) == {
            "with": {"soup": 10, "salad": 20, "total": 30},
            "without": {"soup": 0, "salad": 20, "total": 20},
        }


def test_a_comparison_follows_in_steps_of_ten(crowd):
    cast(crowd, "bot", 10)
    make_case(crowd, HOME)
    review.compare(crowd.pk, now())
    without = {"soup": 0, "salad": 20, "total": 20}
    assert shown_in_review(crowd)["without"] == without

    for text, expected in (("soup", {"soup": 1}), ("salad", {"soup": 1, "salad": 21})):  # two more from there
        cast(crowd, f"late {text}", 1, text)
        review.compare(crowd.pk, now())
        assert shown_in_review(crowd)["without"] == {**without, **expected, "total": sum({**without, **expected, "total": 0}.values())}
        assert results.read_results(crowd.pk, now())["review"]["voters"] == 10

    cast(crowd, "more", 8)
    review.compare(crowd.pk, now())
    assert shown_in_review(crowd)["without"] == without


def test_a_comparison_goes_when_few_are_left_under_review(crowd):
    cast(crowd, "bot", 10)
    cast(crowd, "one", 1, address="203.0.113.1")
    many, one = make_case(crowd, HOME), make_case(crowd, "203.0.113.1")
    review.compare(crowd.pk, now())
    assert shown_in_review(crowd)["without"] == {"soup": 0, "salad": 20, "total": 20}

    review.rule_on_case(many.pk, Ruling.CLEAR, act())
    assert results.read_results(crowd.pk, now())["review"]["with"] is None
    review.rule_on_case(one.pk, Ruling.CLEAR, act())
    assert results.read_results(crowd.pk, now())["review"] is None


def test_votes_that_come_to_a_held_network_are_told_by_no_comparison(crowd):
    cast(crowd, "bot", 10)
    review.rule(crowd.pk, [address(crowd, HOME)], Ruling.QUARANTINE, act())
    before = shown_in_review(crowd)
    cast(crowd, "alice", 1, "salad")

    review.compare(crowd.pk, now())

    assert shown_in_review(crowd) == before


def test_a_comparison_that_a_version_of_before_wrote_is_not_shown(crowd):
    cast(crowd, "bot", 10)
    review.rule(crowd.pk, [address(crowd, HOME)], Ruling.QUARANTINE, act())
    Comparison.objects.filter(poll=crowd).update(as_of=now(), voters=1, with_votes={str(option(crowd, "soup")): 1})
    assert results.read_results(crowd.pk, now())["review"]["with"] is None


# --- Cases ------------------------------------------------------------------------------------------------------------


def choices_of(case, reads=lambda _: True):
    return [
        choices and [(choice.text, choice.voters, choice.others, choice.without) for choice in choices]
        for _, choices in review.choices(case, act(""), reads)
    ]


def test_a_case_shows_choices_from_ten_voters_on_and_then_in_steps_of_ten(crowd):
    case = make_case(crowd, HOME)
    assert choices_of(case) == []
    cast(crowd, "bot", 9)
    assert choices_of(case) == [None]
    cast(crowd, "tenth", 1)
    ten = [[("soup", 10, 0, 0), ("salad", 0, 20, 20)]]
    assert choices_of(case) == ten
    assert choices_of(case, reads=lambda _: False) == [None]

    cast(crowd, "alice", 9, "salad")
    assert choices_of(case) == ten
    cast(crowd, "bob", 1, "salad")
    assert choices_of(case) == [[("soup", 10, 0, 0), ("salad", 10, 20, 20)]]
    assert Look.objects.filter(poll_id=crowd.pk, kind=LookKind.CASE, case_id=case.pk).count() == 2


def test_cases_that_overlap_in_few_voters_are_not_shown_both(crowd):
    cast(crowd, "bot", 10)
    cast(crowd, "next door", 1, address="192.0.2.8")
    house, street = make_case(crowd, HOME), make_case(crowd, HOME, kind="subnet", rule="busy_ipv4_subnet")
    assert choices_of(house) != [None]
    assert choices_of(street) == [None]
    assert look(crowd, subnet(crowd, HOME)).changes is None


# --- A least step -----------------------------------------------------------------------------------------------------


def finish(poll):
    Poll.objects.filter(pk=poll.pk).update(closes_at=now(), closed_at=now(), finalised_at=now())


@pytest.mark.parametrize("method", ["single", "approval"])
def test_results_change_by_so_many_ballots_and_are_exact_in_the_end(make_poll, method):
    poll = make_poll(results_step=10, method=method)
    seen = []
    for n in range(23):
        counting.count_votes([vote_of(poll, f"voter {n}")])
        seen.append(results.read_results(poll.pk, now())["total_votes"])
        assert shown(poll)["soup"] == seen[-1]
    assert seen == [0] * 9 + [10] * 10 + [20] * 4

    finish(poll)
    assert (shown(poll)["soup"], results.read_results(poll.pk, now())["total_votes"]) == (23, 23)


def test_results_of_many_who_count_at_once_are_shown_by_so_many_ballots(make_poll):
    """Without the lock of the row, two that count at once show it by fewer."""
    poll = make_poll(results_step=10)

    def count(name):
        for n in range(40):
            counting.count_votes([vote_of(poll, f"{name} {n}", ("soup", "salad")[n % 2])])

    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(results.read_results(poll.pk, now())["total_votes"])

    watching = threading.Thread(target=lambda: (watch(), connection.close()))
    watching.start()
    try:
        in_threads(*(partial(count, name) for name in ("alice", "bob", "carol")))
    finally:
        done.set()
        watching.join()
    ordered = sorted(seen | {results.read_results(poll.pk, now())["total_votes"]})
    assert len(ordered) > 2 and all(later - sooner >= 10 for sooner, later in pairwise(ordered))


def test_large_rulings_show_in_results_with_a_step_and_small_ones_do_not(make_poll):
    poll = make_poll(results_step=10)
    cast(poll, "honest", 20, "salad", address=OFFICE)
    cast(poll, "bot", 10)
    assert shown(poll) == {"soup": 10, "salad": 20}
    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, act())
    assert shown(poll) == {"soup": 10, "salad": 20}
    cast(poll, "more", 10, address="203.0.113.1")
    assert shown(poll) == {"soup": 10, "salad": 20} == tallies(poll)
    cast(poll, "even more", 10, address="203.0.113.1")
    assert shown(poll) == {"soup": 20, "salad": 20}


def test_the_step_is_set_with_the_poll_and_only_grows_once_it_is_open(owners_api, make_poll):
    lunch = {
        "title": "Lunch",
        "options": [{"text": "soup"}, {"text": "salad"}],
        "voter_policy": "client",
        "closes_at": "2099-12-31T12:00:00Z",
    }
    made = owners_api.post("/api/v1/polls", lunch).json
    assert made["results_step"] == 1
    made = owners_api.post("/api/v1/polls", {**lunch, "results_step": 10}).json
    path = made["links"]["self"]
    assert owners_api.get(path).json["results_step"] == 10
    assert owners_api.patch(path, {"results_step": 20}).json["results_step"] == 20
    assert_refused(owners_api.patch(path, {"results_step": 10}), problems.POLL_IN_USE, pointer="/results_step")
    assert owners_api.post(f"{path}/duplicate", {}).json["results_step"] == 20
    for wrong in (0, -1, 2, 9, 10_001, "many", None, 1.5):
        assert_refused(owners_api.post("/api/v1/polls", {**lunch, "results_step": wrong}), problems.INVALID, pointer="/results_step")


def test_a_step_that_is_set_while_the_poll_is_open_shows_what_was_shown(owners_api, poll):
    cast(poll, "voter", 3)
    assert owners_api.patch(f"/api/v1/polls/{poll.pk}", {"results_step": 15}).status == 200
    assert shown(poll) == {"soup": 3, "salad": 0}
    cast(poll, "more", 14)
    assert shown(poll) == {"soup": 3, "salad": 0}
    cast(poll, "last", 1)
    assert shown(poll) == {"soup": 18, "salad": 0}


# --- An attacker ------------------------------------------------------------------------------------------------------

PLACES = [HOME, "192.0.2.8", OFFICE, "203.0.113.1"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("votes"), st.integers(1, 12), st.integers(0, 3)),
        st.tuples(
            st.sampled_from(["look", "rule", "case", "compare"]),
            st.sampled_from([Ruling.QUARANTINE, Ruling.VOID, Ruling.RELEASE]),
            st.integers(0, 6),  # which
            st.integers(0, 40),
        ),
    ),
    min_size=8,
    max_size=30,
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_who_solves_equations_over_all_that_is_shown_isolates_fewer_than_ten(make_poll, steps):
    """The equations are the sets of votes that were summed; what they span is looked through for sums over few voters.

    Looked for are all that one or two equations, and reduced ones, can make: the shortest ways to one voter.
    """
    poll = make_poll(allow_change=True)
    cast(poll, "honest", 12, "salad", address="198.18.5.5", at=1000)
    cases = [make_case(poll, place, rule=f"rule {n}") for n, place in enumerate(PLACES)]
    voters_of, number, equations, people = {}, 0, [], 0
    selectors = [address(poll, place) for place in PLACES] + [subnet(poll, HOME)]

    def standing():
        return {vote.voter_key: vote.vote_id for vote in Vote.objects.filter(poll_id=poll.pk)}

    def told(out, into):
        """What was shown: votes that go count -1, those that come 1."""
        equation = {vote: -1 for voter, vote in out.items() if into.get(voter) != vote}
        equation.update({vote: 1 for voter, vote in into.items() if out.get(voter) != vote})
        equations.append(equation)

    for step in steps:
        if step[0] == "votes":
            for _ in range(step[1]):
                # Some come back from elsewhere, and take another vote's place.
                vote = vote_of(poll, f"voter {people if number % 5 else people // 2}", at=number, address=PLACES[step[2]])
                voters_of[vote.vote_id] = vote.voter_key
                counting.count_votes([vote])
                number, people = number + 1, people + 1
            continue
        what, ruling, which, moment = step
        chosen = (
            selectors[which]
            if which < 5
            else Selector(accepted_from=moment_of(moment), accepted_until=moment_of(moment + 15 * (which - 4)))
        )
        before = standing()
        if what == "compare":
            review.compare(poll.pk, now())
            continue
        if what == "case":
            review.choices(cases[which % 4], act(""), lambda _: True)
            continue
        if what == "look":
            shows = look(poll, chosen, ruling=ruling).changes is not None
            with transaction.atomic():  # what it would be, by doing it
                review.rule(poll.pk, [chosen], ruling, act())
                after = standing()
                transaction.set_rollback(True)
            holds._known.clear()  # a version that was rolled back is given again
        else:
            shows = not review.rule(poll.pk, [chosen], ruling, act()).hides_changes
            after = standing()
        if shows:
            told(before, after)
    voters_of.update({vote.vote_id: vote.voter_key for vote in Vote.objects.filter(poll_id=poll.pk)})
    rows = [equation for equation in equations if equation]
    rows += _reduced(rows)
    for equation in rows + [_sum(a, b, sign) for n, a in enumerate(rows) for b in rows[:n] for sign in (1, -1)]:
        voters = {voters_of[vote] for vote, weight in equation.items() if weight}
        assert not 0 < len(voters) < LEAST_VOTERS


def _sum(one, other, factor):
    found = {vote: one.get(vote, 0) + factor * other.get(vote, 0) for vote in one | other}
    return {vote: weight for vote, weight in found.items() if weight}


def _reduced(rows):
    """The equations, solved as far as they can be (Gauss and Jordan)."""
    solved = []
    for row in rows:
        left = {vote: Fraction(weight) for vote, weight in row.items()}
        for pivot, other in solved:
            if pivot in left:
                left = _sum(left, other, -left[pivot])
        if left:
            pivot = min(left, key=str)
            left = {vote: weight / left[pivot] for vote, weight in left.items()}
            solved = [(known, _sum(other, left, -other.get(pivot, 0))) for known, other in solved] + [(pivot, left)]
    return [row for _, row in solved]


# --- The doors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operator(pipeline):
    make_user("disclosure-operator", roles.OPERATOR)
    return signed_in(pipeline, "disclosure-operator")


@pytest.fixture(scope="module")
def auditor(pipeline):
    make_user("disclosure-auditor", roles.AUDITOR)
    return signed_in(pipeline, "disclosure-auditor")


def test_an_operator_learns_no_single_choice_by_dry_runs(operator, crowd):
    """By address and by microsecond, as a receipt tells it."""
    [vote] = cast(crowd, "victim", 1)
    path = f"/api/v1/polls/{crowd.pk}/rulings"
    until = from_microseconds(vote.accepted_at + 1)
    for wanted in ({"address": HOME}, {"address": HOME, "accepted_until": iso(until)}):
        assert_refused(operator.post(path, {"ruling": "void", **wanted, "dry_run": True}), problems.INVALID, pointer="/reason")
        answer = operator.post(path, {"ruling": "void", **wanted, "dry_run": True, **WHY})
        assert (answer.status, answer.json) == (200, {"votes": 1, "voters": 1, "changes": None})
    assert [(found["ruling"], found["changes"]) for found in operator.get(path).json["results"]] == [("look", None)] * 2


def test_an_operator_learns_no_single_choice_by_ruling(operator, auditor, crowd):
    cast(crowd, "victim", 1)
    path, public = f"/api/v1/polls/{crowd.pk}/rulings", f"/api/v1/polls/{crowd.pk}/results"
    before = operator.get(public).json["options"]

    done = operator.post(path, {"ruling": "quarantine", "address": HOME, **WHY})

    assert (done.status, done.json["votes"], done.json["changes"]) == (201, 1, None)
    after = operator.get(public).json
    assert after["options"] == before
    for caller in (operator, auditor):
        assert [found["changes"] for found in caller.get(path).json["results"]] == [None]
    [entry, *_] = auditor.get(f"/api/v1/polls/{crowd.pk}/journal").json["results"]
    assert (entry["action"], entry["changes"]) == ("quarantined", {"voters": [0, 1]})


@pytest.mark.parametrize("visibility", ["owner", "after_close"])
def test_who_may_not_read_results_learns_no_tally(operator, auditor, owners_api, make_poll, visibility):
    poll = make_poll(results_visibility=visibility)
    cast(poll, "honest", 20, "salad", address=OFFICE)
    cast(poll, "bot", 12)
    case = make_case(poll, HOME)
    base = f"/api/v1/polls/{poll.pk}"
    assert_refused(operator.get(f"{base}/results"), problems.RESULTS_HIDDEN)

    integrity = operator.get(f"{base}/integrity").json
    assert (integrity["tallies"], integrity["is_exact"]) == (None, True)
    assert operator.post(f"{base}/rulings", {"ruling": "void", "address": HOME, "dry_run": True, **WHY}).json["changes"] is None
    assert operator.get(f"/api/v1/suspicious-ips/{case.pk}").json["choices"] is None
    assert operator.post(f"/api/v1/suspicious-ips/{case.pk}/void", WHY).json["decisions"][0]["changes"] is None
    assert {found["changes"] is None for found in operator.get(f"{base}/rulings").json["results"]} == {True}

    # Auditors and the owner may read tallies, but no ruling's that was made while they were hidden.
    assert auditor.get(f"{base}/rulings").json["results"][0]["changes"] is None
    assert [row["tally"] for row in auditor.get(f"{base}/integrity").json["tallies"]] == [0, 20]
    assert owners_api.get(f"{base}/integrity").json["tallies"] is not None
    assert owners_api.get(f"{base}/journal").json["results"][0]["changes"] == {"voters": [0, 12]}


def test_a_key_without_the_scope_reads_no_tally_by_integrity_or_journal(pipeline, owner, make_poll):
    _, key = clients.make_client(owner, {"name": "desk", "scopes": ["polls:write"]}, at=now())
    desk = Api(pipeline, {"authorization": f"Api-Key {key}"})
    poll = make_poll(results_visibility="owner")
    cast(poll, "honest", 20, "salad", address=OFFICE)
    cast(poll, "bot", 12)
    review.rule(poll.pk, [address(poll, HOME)], Ruling.VOID, Act("otto", now(), "why"))

    assert desk.get(f"/api/v1/polls/{poll.pk}/integrity").json["tallies"] is None
    [entry, *_] = desk.get(f"/api/v1/polls/{poll.pk}/journal").json["results"]
    assert entry["changes"] == {"voters": [0, 12]}


def test_integrity_shows_no_tally_that_results_hold_back(owners_api, crowd):
    cast(crowd, "bot", 1)
    path = f"/api/v1/polls/{crowd.pk}/integrity"
    assert owners_api.get(path).json["tallies"] is not None
    review.rule(crowd.pk, [address(crowd, HOME)], Ruling.VOID, act())
    assert (owners_api.get(path).json["tallies"], owners_api.get(path).json["is_exact"]) == (None, True)


def test_there_is_no_look_at_no_poll():
    with pytest.raises(problems.Refusal) as refused:
        review.look(uuid4(), [Selector(uuid4(), uuid4())], Ruling.VOID, act(), reads_results=True)
    assert refused.value.problem == problems.UNKNOWN_POLL
