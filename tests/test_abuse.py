"""A day of 50,000 honest votes and 5,000 of bots: found, reviewed, and the tally is the honest one. `-s` shows the figures."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

import pytest
from django.db import connection, connections
from django.utils.timezone import now

from polls import fraud, patience, results, review
from polls.bundles import AcceptedVote
from polls.counting import count_votes
from polls.holds import Selector
from polls.journal import Act
from polls.models import Decision, Poll, Ruling, SuspiciousIP, Tally
from polls.moments import from_microseconds
from polls.problems import Refusal
from tests import crowd
from tests.conftest import assert_tallies_equal_votes
from tests.crowd import Crowd

BUNDLE = 1000
# {rule: the part of the bots' votes that it finds at least}; each is made for another kind of bots.
LEAST_RECALL = {
    "busy_ipv6_subnet": 0.4,
    "one_sided": 0.8,
    "one_signature": 0.4,
    "regular": 0.4,
    "shared_signature": 0.2,
    "all": 1.0,
}
LEAST_PRECISION = 0.95


@pytest.fixture
def make_crowd(make_poll: Callable[..., Poll]) -> Iterator[Callable[..., tuple[Poll, Crowd]]]:
    made: list[Poll] = []

    def make_crowd(*, closes_in: float = 3600, bots_among_homes: bool = False, **fields: Any) -> tuple[Poll, Crowd]:
        """A poll, and the votes that were accepted for it through the last day; none of them is counted yet."""
        poll = make_poll(opens_in=-2 * crowd.DAY_SECONDS, closes_in=closes_in, **crowd.POLL, **fields)
        made.append(poll)
        return poll, crowd.gather(poll, crowd.day_before(now()), bots_among_homes=bots_among_homes)

    yield make_crowd

    # Tests leave their votes behind; so many of them would make every look at all votes slow, in each test that comes after.
    with connection.cursor() as cursor:
        for table in ("votes", "outcomes", "tallies"):
            cursor.execute(f"DELETE FROM {table} WHERE poll_id = ANY(%s)", [[poll.pk for poll in made]])
        cursor.execute("VACUUM votes, outcomes")


def shuffled(votes: Sequence[AcceptedVote]) -> list[AcceptedVote]:
    return Random(7).sample(votes, len(votes))


def count(votes: Sequence[AcceptedVote]) -> None:
    """Count them in whatever order."""
    votes = shuffled(votes)
    for begin in range(0, len(votes), BUNDLE):
        count_votes(votes[begin : begin + BUNDLE])


def tallied(poll: Poll) -> Counter[int]:
    """{option id: votes}"""
    return Counter({selection[0]: votes for selection, votes in Tally.objects.filter(poll=poll).values_list("selection", "votes")})


def find_cases(poll: Poll) -> list[SuspiciousIP]:
    fraud.find_suspicious(now())
    return list(SuspiciousIP.objects.filter(poll=poll, state="open"))


def innocent_of(cases: Iterable[SuspiciousIP], mixed: Crowd) -> list[SuspiciousIP]:
    """What a reviewer who knows everything clears: the cases that honest people's votes fit."""
    return [case for case in cases if any(mixed.origins[vote.vote_id] not in crowd.BOTS for vote in mixed.fitting([case]))]


def rule_on_all(poll: Poll, ruling: Ruling) -> list[Decision]:
    """Rule on all cases of the poll that are not cleared, rule by rule."""
    rules = SuspiciousIP.objects.filter(poll=poll).exclude(state="cleared").order_by("rule").values_list("rule", flat=True).distinct()
    return [review.rule_on_rule(poll.pk, rule, ruling, act()) for rule in rules]


def insist(poll: Poll, selectors: Sequence[Selector], ruling: Ruling) -> None:
    """Rule, and when the poll is busy once more, as people do."""
    try:
        review.rule(poll.pk, selectors, ruling, act())
    except Refusal:
        review.rule(poll.pk, selectors, ruling, act())


def act() -> Act:
    return Act("olga", now(), "I looked at them")


def in_review(poll: Poll) -> tuple[Counter[int], Counter[int]]:
    """What the results say of the poll with, and without, what is under review."""
    shown = results.read_results(poll.pk, now())
    assert shown is not None
    with_all, without_any = (
        Counter({int(option["id"]): option["votes"] for option in shown["review"][side]["options"]}) for side in ("with", "without")
    )
    return with_all, without_any


def print_figures(title: str, cases: list[SuspiciousIP], mixed: Crowd) -> dict[str, tuple[float, float]]:
    """Print and return {rule: (precision, recall)}, with those of all rules together. Both are of votes."""
    lines = [
        title,
        "| rule | cases | votes | precision | recall | of the /24 | of the /64 | of the drip | honest votes |",
        "|---" * 9 + "|",
    ]
    found, all_origins = {}, Counter(mixed.origins.values())
    for rule in [*sorted({case.rule for case in cases}), "all"]:
        its_cases = [case for case in cases if rule in ("all", case.rule)]
        origins = Counter(mixed.origins[vote.vote_id] for vote in mixed.fitting(its_cases))
        bots = sum(origins[kind] for kind in crowd.BOTS)
        found[rule] = bots / origins.total() if origins else 1.0, bots / sum(all_origins[kind] for kind in crowd.BOTS)
        recalls = [origins[kind] / all_origins[kind] for kind in crowd.BOTS]
        honest = ", ".join(f"{votes} {origin}" for origin, votes in origins.items() if origin not in crowd.BOTS) or "none"
        figures = [rule, len(its_cases), origins.total(), *(f"{figure:.3f}" for figure in (*found[rule], *recalls)), honest]
        lines.append(f"| {' | '.join(map(str, figures))} |")
    print("\n" + "\n".join(lines))  # noqa: T201 - for docs/abuse.md
    return found


@pytest.mark.parametrize(
    ("bots_among_homes", "rulings"),
    [(False, [Ruling.VOID, Ruling.RELEASE, Ruling.QUARANTINE, Ruling.RELEASE]), (True, [Ruling.VOID, Ruling.RELEASE])],
    ids=["bots next door", "bots among homes"],
)
def test_after_detection_and_review_the_tally_is_the_honest_one_and_a_release_takes_that_back(
    make_crowd: Callable[..., tuple[Poll, Crowd]], bots_among_homes: bool, rulings: Sequence[Ruling]
) -> None:
    poll, mixed = make_crowd(bots_among_homes=bots_among_homes)
    honest, everything = crowd.tally(mixed.honest), crowd.tally(mixed.votes)
    assert (len(mixed.honest), len(mixed.bots)) == (50_000, 5_000)
    count(mixed.votes)
    assert tallied(poll) == everything
    assert everything.most_common(1)[0][0] != honest.most_common(1)[0][0]  # the bots would win

    cases = find_cases(poll)

    found = print_figures("Bots among homes" if bots_among_homes else "Bots next door", cases, mixed)
    assert min(precision for precision, _ in found.values()) >= LEAST_PRECISION
    assert {rule: found[rule][1] >= least for rule, least in LEAST_RECALL.items()} == dict.fromkeys(LEAST_RECALL, True)
    suspected = {vote.vote_id for vote in mixed.fitting(cases)}
    assert tallied(poll) == everything  # nobody has decided
    assert in_review(poll) == (everything, crowd.tally([vote for vote in mixed.votes if vote.vote_id not in suspected]))

    innocent = innocent_of(cases, mixed)
    assert {mixed.origins[vote.vote_id] for vote in mixed.fitting(innocent)} == {crowd.RALLY}
    for case in innocent:
        review.rule_on_case(case.pk, Ruling.CLEAR, act())
    assert tallied(poll) == everything
    assert in_review(poll) == (everything, honest)

    for ruling in rulings:
        decisions = rule_on_all(poll, ruling)

        before, after = (honest, everything) if ruling == Ruling.RELEASE else (everything, honest)
        assert tallied(poll) == after, ruling
        assert_tallies_equal_votes()
        # What changed is on record, all of it.
        on_record = sum(then - was for decision in decisions for was, then in decision.changes.values())
        assert on_record == after.total() - before.total()
        assert ruling == Ruling.VOID or in_review(poll) == (everything, honest)


def test_schools_offices_and_carriers_are_counted_and_not_suspected(make_crowd: Callable[..., tuple[Poll, Crowd]]) -> None:
    poll, mixed = make_crowd()
    places = (crowd.CLASSROOM, crowd.BIG_SCHOOL, crowd.BIG_CARRIER)
    assert [len({vote.voter_key for vote in mixed.of(place)}) for place in places] == [30, 200, 2000]
    count(mixed.honest)

    cases = find_cases(poll)

    print_figures("Honest people alone", cases, mixed)
    suspected = {mixed.origins[vote.vote_id] for vote in mixed.fitting(cases)}
    assert suspected == {crowd.RALLY}  # for a person to clear
    assert tallied(poll) == crowd.tally(mixed.honest)


def test_votes_that_are_counted_while_a_ruling_is_made_end_where_it_puts_them(make_crowd: Callable[..., tuple[Poll, Crowd]]) -> None:
    poll, mixed = make_crowd(bots_among_homes=True)
    votes, selectors = shuffled(mixed.votes), selectors_of(mixed)
    bots = {vote.vote_id for vote in mixed.bots}
    rulings = [Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID, Ruling.RELEASE, Ruling.VOID]
    for round_, ruling in enumerate(rulings):
        arriving = votes[round_ :: len(rulings)]
        with ThreadPoolExecutor(max_workers=2) as workers:
            has_begun = threading.Event()
            counting = [workers.submit(count_elsewhere, arriving[half::2], has_begun) for half in (0, 1)]
            has_begun.wait(10)
            insist(poll, selectors, ruling)
        for part in counting:
            part.result()  # raises what went wrong there

        arrived = [vote for before in range(round_ + 1) for vote in votes[before :: len(rulings)]]
        kept = arrived if ruling == Ruling.RELEASE else [vote for vote in arrived if vote.vote_id not in bots]
        assert tallied(poll) == crowd.tally(kept), (round_, ruling)
        assert_tallies_equal_votes()


def count_elsewhere(votes: Sequence[AcceptedVote], has_begun: threading.Event) -> None:
    """Count the votes in this thread; say when some of them are."""
    try:
        for begin in range(0, len(votes), 500):
            patience.until_committed(partial(count_votes, votes[begin : begin + 500]))  # as workers do
            has_begun.set()
    finally:
        connections.close_all()


def selectors_of(mixed: Crowd) -> list[Selector]:
    """What fits all bots, and nobody else."""
    subnets = {vote.subnet_key for vote in mixed.of(crowd.BOTS_SUBNET, crowd.BOTS_PREFIX)}
    drips = {(vote.address_key, vote.subnet_key, vote.signature_key) for vote in mixed.of(crowd.BOTS_DRIP)}
    return [*(Selector(subnet_key=subnet) for subnet in subnets), *(Selector(*drip) for drip in drips)]


def test_a_final_poll_is_counted_again_and_an_hour_of_it_can_be_held(make_crowd: Callable[..., tuple[Poll, Crowd]]) -> None:
    poll, mixed = make_crowd(closes_in=-600)
    count(mixed.votes)
    Poll.objects.filter(pk=poll.pk).update(closed_at=now(), finalised_at=now())
    before = results.read_results(poll.pk, now())
    begin = from_microseconds(mixed.votes[0].accepted_at) + timedelta(hours=19)
    hour = Selector(accepted_from=begin, accepted_until=begin + timedelta(hours=1))
    inside, outside = [], []
    for vote in mixed.votes:
        (inside if begin <= from_microseconds(vote.accepted_at) < begin + timedelta(hours=1) else outside).append(vote)
    assert {vote.voter_key for vote in inside} & {vote.voter_key for vote in outside}  # whose other vote stands meanwhile

    for selectors, ruling, counting in [
        (selectors_of(mixed), Ruling.VOID, mixed.honest),
        (selectors_of(mixed), Ruling.RELEASE, mixed.votes),
        ([hour], Ruling.QUARANTINE, outside),
        ([hour], Ruling.RELEASE, mixed.votes),
    ]:
        review.rule(poll.pk, selectors, ruling, act())
        assert tallied(poll) == crowd.tally(counting), ruling
    assert_tallies_equal_votes()
    after = results.read_results(poll.pk, now())
    assert before
    assert after
    assert (before["is_final"], after["is_final"]) == (True, True)
    assert after["revision"] > before["revision"]
