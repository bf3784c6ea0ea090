"""Counting: every vote once, one vote per voter, tallies that always equal the votes."""

import itertools
import random
import threading
from collections import defaultdict
from uuid import UUID

import msgspec
import pytest
from django.db import connection, transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polls import bundles, counting, editing, problems, voters
from polls.bundles import AcceptedVote
from polls.counting import count_bundle, count_votes
from polls.models import Tally, Vote, VoteAside
from polls.problems import Refusal
from tests.conftest import assert_tallies_equal_votes, option, outcome_of, standing, tallies, vote_of


def as_on_the_wire(votes):
    return msgspec.json.decode(bundles.write(votes))


def test_votes_of_different_voters_all_count(poll):
    outcomes = count_votes([vote_of(poll, "alice", "soup"), vote_of(poll, "bob", "salad"), vote_of(poll, "carol", "soup")])

    assert outcomes == {"counted": 3}
    assert tallies(poll) == {"soup": 2, "salad": 1}


def test_a_redelivered_bundle_counts_once(poll):
    bundle = as_on_the_wire([vote_of(poll, "alice"), vote_of(poll, "bob")])

    count_bundle(bundle)
    outcomes = count_bundle(bundle)

    assert outcomes == {"repeat": 2}
    assert tallies(poll) == {"soup": 2}


def test_of_two_votes_of_one_voter_the_first_accepted_stands(poll):
    first, second = vote_of(poll, "alice", "soup", at=1), vote_of(poll, "alice", "salad", at=2)

    count_votes([second])
    count_votes([first])

    assert tallies(poll) == {"soup": 1}
    assert outcome_of(first) == ("counted", None)
    assert outcome_of(second) == ("rejected", "duplicate")


def test_where_a_voter_may_change_the_vote_the_last_accepted_stands(make_poll):
    poll = make_poll(allow_change=True)
    first, second = vote_of(poll, "alice", "soup", at=1), vote_of(poll, "alice", "salad", at=2)

    count_votes([second])
    count_votes([first])

    assert tallies(poll) == {"salad": 1}
    assert outcome_of(first) == ("superseded", "changed")
    assert outcome_of(second) == ("counted", None)


def test_a_late_repeat_of_a_changed_vote_changes_nothing(make_poll):
    """A, then B, then A again under its own id: the client repeats a request, it does not change its mind."""
    poll = make_poll(allow_change=True)
    soup, salad = vote_of(poll, "alice", "soup", at=1), vote_of(poll, "alice", "salad", at=2)
    count_votes([soup])
    count_votes([salad])

    count_votes([vote_of(poll, "alice", "soup", at=3, vote_id=soup.vote_id)])

    assert tallies(poll) == {"salad": 1}


def test_two_votes_accepted_in_the_same_microsecond_are_told_apart_by_id(poll):
    votes = [vote_of(poll, "alice", "soup", at=1, vote_id=UUID(int=1)), vote_of(poll, "alice", "salad", at=1, vote_id=UUID(int=2))]

    count_votes(reversed(votes))

    assert outcome_of(votes[0]) == ("counted", None)


@pytest.mark.parametrize("allow_change", [False, True])
def test_a_hundred_shuffles_of_two_votes_always_leave_the_same_one(make_poll, allow_change):
    for seed in range(100):
        poll = make_poll(allow_change=allow_change)
        votes = [vote_of(poll, "alice", "soup", at=1), vote_of(poll, "alice", "salad", at=2)]
        deliveries = votes * 2
        random.Random(seed).shuffle(deliveries)

        for delivered in deliveries:
            count_votes([delivered])

        assert tallies(poll) == ({"salad": 1} if allow_change else {"soup": 1})
        assert standing(poll) == {votes[0].voter_key: votes[allow_change].vote_id}


deliveries = st.lists(
    st.tuples(
        st.sampled_from(["alice", "bob"]),
        st.integers(1, 3),  # which of the voter's votes
        st.integers(1, 4),  # accepted at
        st.sampled_from(["soup", "salad"]),
        st.booleans(),  # whether a new bundle starts here
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("allow_change", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deliveries=deliveries)
def test_whatever_is_delivered_in_whatever_order_the_model_agrees(make_poll, allow_change, deliveries):
    """The model: a vote's first copy is the true one; of a voter's votes the first (or last) accepted stands."""
    poll = make_poll(allow_change=allow_change)
    votes = [
        vote_of(poll, voter, text, at=at, vote_id=UUID(int=number + 10 * (voter == "bob"))) for voter, number, at, text, _ in deliveries
    ]

    bundle = []
    for vote, (*_, starts_bundle) in zip(votes, deliveries, strict=True):
        if starts_bundle and bundle:
            count_votes(bundle)
            bundle = []
        bundle.append(vote)
    count_votes(bundle)

    true_copies: dict[UUID, dict[UUID, AcceptedVote]] = defaultdict(dict)
    for vote in sorted(votes, key=lambda vote: (vote.accepted_at, vote.selection)):
        true_copies[vote.voter_key].setdefault(vote.vote_id, vote)
    choose = max if allow_change else min
    winners = {voter: choose(copies.values(), key=lambda vote: (vote.accepted_at, vote.vote_id)) for voter, copies in true_copies.items()}
    assert standing(poll) == {voter: vote.vote_id for voter, vote in winners.items()}
    texts = [vote.selection[0] for vote in winners.values()]
    assert tallies(poll) == {text: count for text in ("soup", "salad") if (count := texts.count(option(poll, text)))}
    assert VoteAside.objects.filter(poll_id=poll.pk).count() == sum(map(len, true_copies.values())) - len(winners)


def test_a_bad_item_does_not_take_its_neighbours_with_it(poll):
    good = as_on_the_wire([vote_of(poll, "alice"), vote_of(poll, "bob")])
    bad = [None, 7, "vote", [], ["x"] * 5, {"a": 1}, [*good[0][:4], "soon"], [good[0][0], None, *good[0][2:]], [*good[0][:4], 2**62]]

    with pytest.raises(counting.UncountableVotesError, match="9 of 11"):
        count_bundle([*bad, *good])

    assert tallies(poll) == {"soup": 2}


@pytest.mark.parametrize("bundle", [None, 7, "votes", {"votes": []}])
def test_a_bundle_that_is_none_is_refused_and_kept(bundle):
    with pytest.raises(counting.UncountableVotesError):
        count_bundle(bundle)


def test_a_vote_that_postgresql_refuses_does_not_take_its_neighbours_with_it(poll):
    votes = [vote_of(poll, voter) for voter in ("alice", "bob", "carol", "dave", "eve")]
    refused = votes[3]
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE votes ADD CONSTRAINT not_dave CHECK (voter_key <> %s)", [refused.voter_key])
    try:
        with pytest.raises(counting.UncountableVotesError, match="1 of 5"):
            count_bundle(as_on_the_wire(votes))
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE votes DROP CONSTRAINT not_dave")

    assert tallies(poll) == {"soup": 4}
    assert outcome_of(refused) is None


def test_fields_that_a_later_version_adds_are_skipped(poll):
    count_bundle([[*vote, "new"] for vote in as_on_the_wire([vote_of(poll, "alice")])])

    assert tallies(poll) == {"soup": 1}


def test_a_vote_for_an_option_of_another_poll_is_rejected_and_its_neighbour_counts(make_poll):
    poll, other = make_poll(), make_poll()
    stray = msgspec.structs.replace(vote_of(poll, "alice"), selection=(option(other, "soup"),))
    good = vote_of(poll, "bob")

    outcomes = count_votes([stray, good])

    assert outcomes == {"counted": 1, "rejected": 1}
    assert outcome_of(stray) == ("rejected", "option_unknown")
    assert tallies(poll) == {"soup": 1} and tallies(other) == {}
    assert count_votes([stray]) == {"repeat": 1}


def test_a_rejected_vote_stays_rejected_and_the_voters_next_one_counts(poll):
    stray = msgspec.structs.replace(vote_of(poll, "alice"), selection=(0,))
    count_votes([stray])
    same_id_now_valid = vote_of(poll, "alice", at=1, vote_id=stray.vote_id)
    another = vote_of(poll, "alice", "salad", at=2)

    outcomes = count_votes([same_id_now_valid, another])

    assert outcomes == {"repeat": 1, "counted": 1}
    assert outcome_of(stray) == ("rejected", "option_unknown")
    assert tallies(poll) == {"salad": 1}


def test_a_vote_for_a_poll_that_was_deleted_has_an_outcome(make_poll):
    poll = make_poll(opens_in=1000)
    vote = vote_of(poll, "alice")
    editing.delete_poll(poll, at=poll.created_at)

    assert count_votes([vote]) == {"rejected": 1}
    assert outcome_of(vote) == ("rejected", "poll_unknown")


def test_a_vote_counts_however_late_it_is_processed(make_poll):
    """The API judged the deadline when it accepted the vote; nobody judges it again."""
    poll = make_poll(opens_in=-7200, closes_in=-3600)

    assert count_votes([vote_of(poll, "alice")]) == {"counted": 1}


def test_a_thousand_votes_take_as_many_statements_as_one(make_poll, django_assert_num_queries):
    poll = make_poll()
    votes = [vote_of(poll, "alice")] + [
        AcceptedVote(UUID(int=n), poll.pk, voters.voter_key(poll.pk, "client", str(n)), (option(poll, "soup"),), n) for n in range(1000)
    ]

    with django_assert_num_queries(5):  # BEGIN, polls, votes, tallies, COMMIT
        count_votes(votes)


def test_tallies_equal_votes_at_every_moment_while_workers_fight_over_the_same_voters(make_poll):
    """Six workers, the same 40 voters in different orders, votes that change: no deadlock, no drift, one vote a voter."""
    polls = [make_poll(allow_change=True), make_poll()]
    everything = [vote_of(poll, f"voter {n}", text, at=n % 7) for poll in polls for n in range(40) for text in ("soup", "salad")]
    failures = []
    done = threading.Event()

    def work(seed):
        mine = everything * 2
        random.Random(seed).shuffle(mine)
        try:
            for batch in (
                itertools.batched(mine, 25) if hasattr(itertools, "batched") else [mine[i : i + 25] for i in range(0, len(mine), 25)]
            ):
                count_votes(batch)
        except Exception as exc:
            failures.append(exc)
        finally:
            connection.close()

    def watch():
        try:
            while not done.is_set():
                assert_tallies_equal_votes()
        except BaseException as exc:
            failures.append(exc)
        finally:
            connection.close()

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=work, args=[seed]) for seed in range(6)]
    for thread in [watcher, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()

    assert failures == []
    for poll in polls:
        choose = max if poll.allow_change else min
        expected = {}
        for vote in everything:
            if vote.poll_id == poll.pk:
                expected.setdefault(vote.voter_key, []).append(vote)
        assert standing(poll) == {
            voter: choose(votes, key=lambda vote: (vote.accepted_at, vote.vote_id)).vote_id for voter, votes in expected.items()
        }
    assert_tallies_equal_votes()


def test_options_can_not_change_under_a_vote_that_is_being_counted(poll):
    refusals = []

    def replace_the_options():
        try:
            editing.change_poll(poll, {"options": [{"text": "noodles"}, {"text": "pizza"}]}, at=poll.created_at)
        except Refusal as refusal:
            refusals.append(refusal.problem)
        finally:
            connection.close()

    owner = threading.Thread(target=replace_the_options)
    with transaction.atomic():
        count_votes([vote_of(poll, "alice")])
        owner.start()
        owner.join(0.5)
        assert owner.is_alive()  # waits for the count
    owner.join()

    assert refusals == [problems.POLL_IN_USE]
    assert tallies(poll) == {"soup": 1}


def test_the_key_of_the_votes_table_is_the_rule():
    """One vote per voter per poll is kept by PostgreSQL, whatever the code does."""
    with connection.cursor() as cursor:
        columns = connection.introspection.get_primary_key_columns(cursor, Vote._meta.db_table)
    assert columns == ["poll_id", "voter_key"]


def test_every_change_of_a_tally_raises_the_revision(poll):
    count_votes([vote_of(poll, "alice")])
    count_votes([vote_of(poll, "alice")])  # a duplicate: nothing changes
    count_votes([vote_of(poll, "bob")])

    assert Tally.objects.get(poll=poll).revision == 2
