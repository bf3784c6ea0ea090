"""Counting: every vote once, one vote per voter, tallies that always equal the votes."""

import base64
import itertools
import random
import threading
from collections import defaultdict
from uuid import UUID

import msgspec
import pytest
from django.db import connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polls import bundles, counting, editing, voters
from polls.bundles import AcceptedVote
from polls.counting import count_bundle, count_votes
from polls.journal import Act
from polls.models import Tally, Vote, VoteAside
from tests.conftest import assert_tallies_equal_votes, option, outcome_of, standing, tallies, vote_of, withdrawal_of


def as_on_the_wire(votes):
    """The bundle as a worker gets it."""
    return bundles.write(votes).decode()


def as_it_was_sent_before(votes):
    """The bundle as older web processes sent it: a queue may hold such ones still."""
    return msgspec.json.decode(msgspec.json.encode(votes))


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
    votes = [
        vote_of(poll, "alice", "soup", at=1, vote_id=UUID(int=1 << 64)),
        vote_of(poll, "alice", "salad", at=1, vote_id=UUID(int=2 << 64)),
    ]

    count_votes(reversed(votes))

    assert outcome_of(votes[0]) == ("counted", None)


@pytest.mark.parametrize("allow_change", [False, True])
def test_two_votes_that_come_twice_leave_the_same_one_in_every_order(make_poll, allow_change):
    orders = set(itertools.permutations([0, 1, 0, 1]))
    for deliveries in orders:
        poll = make_poll(allow_change=allow_change)
        votes = [vote_of(poll, "alice", "soup", at=1), vote_of(poll, "alice", "salad", at=2)]

        for delivered in deliveries:
            count_votes([votes[delivered]])

        assert tallies(poll) == ({"salad": 1} if allow_change else {"soup": 1})
        assert standing(poll) == {votes[0].voter_key: votes[allow_change].vote_id}


# What a request may choose; with two options only where the poll is one of approval. Nothing withdraws.
CHOICES = [("soup",), ("salad",), ("soup", "salad"), ()]
deliveries = st.lists(
    st.tuples(
        st.sampled_from(["alice", "bob"]),
        st.integers(1, 3),  # the Idempotency-Key
        st.integers(0, 3),  # which choice
        st.integers(1, 4),  # accepted at
        st.booleans(),  # whether a new bundle starts here
    ),
    min_size=1,
    max_size=12,
)


def votes_of(poll, deliveries):
    """The votes as web processes would make them: an id says the key, and in its last part the choice."""
    for voter, key, choice, at, _ in deliveries:
        texts = CHOICES[choice][: poll.max_choices]
        vote_id = UUID(int=(key + 10 * (voter == "bob") << 64) + len(texts) + 10 * ("soup" in texts))
        vote = vote_of(poll, voter, *texts, at=at, vote_id=vote_id)
        yield vote if texts else msgspec.structs.replace(vote, selection=())


def replayed(votes, allow_change):
    """The model: one voter's votes in the order of their acceptance. Return what stands, and the ids that misuse a key."""
    stands, has_voted, key_of, reused = None, False, {}, set()
    for vote in sorted(votes, key=lambda vote: (vote.accepted_at, vote.vote_id)):
        if key_of.setdefault(vote.vote_id.int >> 64, vote.vote_id) != vote.vote_id:
            reused.add(vote.vote_id)
        elif vote.vote_id in reused or (stands and vote.vote_id == stands.vote_id):
            continue
        elif allow_change or (vote.selection and not has_voted):
            stands, has_voted = vote, has_voted or bool(vote.selection)
        elif not vote.selection and (stands is None or (has_voted and stands.selection)):
            stands = vote
    return stands, reused


@pytest.mark.parametrize("method", ["single", "approval"])
@pytest.mark.parametrize("allow_change", [False, True])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deliveries=deliveries)
def test_whatever_is_delivered_in_whatever_order_the_model_agrees(make_poll, allow_change, method, deliveries):
    poll = make_poll(allow_change=allow_change, method=method, max_choices=1 if method == "single" else 2)
    votes = list(votes_of(poll, deliveries))

    bundle = []
    for vote, (*_, starts_bundle) in zip(votes, deliveries, strict=True):
        if starts_bundle and bundle:
            count_votes(bundle)
            bundle = []
        bundle.append(vote)
    count_votes(bundle)

    first_copies: dict[UUID, dict[UUID, AcceptedVote]] = defaultdict(dict)
    for vote in sorted(votes, key=lambda vote: vote.accepted_at):
        first_copies[vote.voter_key].setdefault(vote.vote_id, vote)
    judged = {voter: replayed(copies.values(), allow_change) for voter, copies in first_copies.items()}
    assert standing(poll) == {voter: stands.vote_id for voter, (stands, _) in judged.items()}
    assert_tallies_equal_votes()
    assert tallies(poll).get("soup", 0) == sum(option(poll, "soup") in stands.selection for stands, _ in judged.values())
    assert VoteAside.objects.filter(poll_id=poll.pk).count() == sum(map(len, first_copies.values())) - len(judged)
    assert set(VoteAside.objects.filter(poll_id=poll.pk, reason="key_reused").values_list("vote_id", flat=True)) == set().union(
        *(reused for _, reused in judged.values())
    )


def test_a_withdrawn_vote_counts_no_more_and_the_voter_may_vote_again_where_votes_may_change(make_poll):
    poll = make_poll(allow_change=True, allow_withdrawal=True)
    vote, withdrawal, another = vote_of(poll, "alice", at=1), withdrawal_of(poll, "alice", at=2), vote_of(poll, "alice", "salad", at=3)

    count_votes([vote])
    count_votes([withdrawal])
    assert tallies(poll) == {}
    assert (outcome_of(vote), outcome_of(withdrawal)) == (("superseded", "withdrawn"), ("counted", None))

    count_votes([another])
    assert tallies(poll) == {"salad": 1}
    assert outcome_of(withdrawal) == ("superseded", "changed")


def test_where_the_first_vote_stands_a_withdrawal_is_for_good(make_poll):
    poll = make_poll(allow_withdrawal=True)
    vote, withdrawal, another = vote_of(poll, "alice", at=1), withdrawal_of(poll, "alice", at=2), vote_of(poll, "alice", "salad", at=3)

    for votes in itertools.permutations([vote, withdrawal, another]):
        for one in votes:
            count_votes([one])

    assert tallies(poll) == {}
    assert [outcome_of(one) for one in (vote, withdrawal, another)] == [
        ("superseded", "withdrawn"),
        ("counted", None),
        ("rejected", "duplicate"),
    ]


def test_an_approval_ballot_adds_one_to_each_of_its_options_and_to_the_ballots(make_poll):
    poll = make_poll(method="approval", max_choices=2, allow_change=True)

    count_votes([vote_of(poll, "alice", "soup", "salad", at=1), vote_of(poll, "bob", "salad", at=1)])
    assert tallies(poll) == {"soup": 1, "salad": 2, "ballots": 2}

    count_votes([vote_of(poll, "alice", "soup", at=2)])
    assert tallies(poll) == {"soup": 1, "salad": 1, "ballots": 2}


@pytest.mark.parametrize("selection", [("salad", "salad"), ("salad", "soup")])
def test_a_selection_that_is_not_in_order_or_says_an_option_twice_is_not_added_up(make_poll, selection):
    poll = make_poll(method="approval", max_choices=2)
    odd = msgspec.structs.replace(vote_of(poll, "alice"), selection=tuple(option(poll, text) for text in selection))

    assert count_votes([odd]) == {"rejected": 1}
    assert tallies(poll) == {}


@pytest.mark.parametrize(("mode", "fate"), [("hard", "rejected"), ("soft", "quarantined")])
def test_beyond_a_limit_per_address_votes_are_refused_or_held(make_poll, mode, fate):
    poll = make_poll(voter_policy="session", address_limit=2, limit_mode=mode)
    votes = [vote_of(poll, f"voter {n}", at=n, address="192.0.2.7") for n in range(4)]
    neighbour, campus = vote_of(poll, "bob", address="192.0.2.8"), vote_of(poll, "carol")

    outcomes = count_votes([*reversed(votes), neighbour, campus])

    assert outcomes == {"counted": 4, fate: 2}
    assert [outcome_of(vote) for vote in votes] == [("counted", None)] * 2 + [(fate, "address_limit")] * 2
    assert count_votes(votes) == {"repeat": 4}
    assert tallies(poll) == {"soup": 4}


def test_a_limit_per_subnet_holds_for_all_its_addresses(make_poll):
    poll = make_poll(voter_policy="session", address_limit=2, subnet_limit=3)

    outcomes = count_votes([vote_of(poll, f"{net}.{n}", at=n, address=f"{net}.{n}") for n in range(5) for net in ("192.0.2", "198.51.100")])

    assert outcomes == {"counted": 6, "rejected": 4}
    assert set(VoteAside.objects.filter(poll_id=poll.pk).values_list("reason", flat=True)) == {"subnet_limit"}


def test_whoever_was_let_in_may_change_the_vote_and_nobody_gets_in_by_withdrawing_first(make_poll):
    poll = make_poll(voter_policy="session", address_limit=1, allow_change=True, allow_withdrawal=True)
    count_votes([vote_of(poll, "alice", at=1, address="192.0.2.7")])
    blank = msgspec.structs.replace(vote_of(poll, "bob", at=2, address="192.0.2.7"), selection=())

    outcomes = count_votes(
        [blank, vote_of(poll, "bob", at=3, address="192.0.2.7"), vote_of(poll, "alice", "salad", at=4, address="192.0.2.7")]
    )

    assert outcomes == {"counted": 1, "rejected": 2}
    assert tallies(poll) == {"salad": 1}


def test_a_voters_two_votes_in_one_bundle_take_one_place_of_the_limit(make_poll):
    poll = make_poll(voter_policy="session", address_limit=2, allow_change=True)
    votes = [vote_of(poll, voter, at=at, address="192.0.2.7") for at, voter in enumerate(["alice", "alice", "bob", "carol"])]

    assert count_votes(votes) == {"counted": 2, "superseded": 1, "rejected": 1}
    assert outcome_of(votes[3]) == ("rejected", "address_limit")


def test_workers_that_count_for_one_address_at_once_let_in_no_more_than_its_limit(make_poll):
    poll = make_poll(voter_policy="session", address_limit=10)
    votes = [vote_of(poll, f"voter {n}", address="192.0.2.7") for n in range(40)]

    def work(share):
        try:
            for vote in share:
                count_votes([vote])
        finally:
            connection.close()

    threads = [threading.Thread(target=work, args=(votes[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert tallies(poll) == {"soup": 10}


def test_a_bad_item_does_not_take_its_neighbours_with_it(poll):
    good = as_it_was_sent_before([vote_of(poll, "alice"), vote_of(poll, "bob")])
    bad = [None, 7, "vote", [], ["x"] * 5, {"a": 1}, [*good[0][:4], "soon"], [good[0][0], None, *good[0][2:]], [*good[0][:4], 2**62]]

    with pytest.raises(counting.UncountableVotesError, match="9 of 11"):
        count_bundle([*bad, *good])

    assert tallies(poll) == {"soup": 2}


def test_a_bundle_counts_in_the_form_of_before_too(poll):
    assert count_bundle(as_it_was_sent_before([vote_of(poll, "alice")])) == {"counted": 1}


def packed(value):
    return base64.b64encode(msgspec.msgpack.encode(value)).decode()


def test_a_bad_item_in_a_packed_bundle_does_not_take_its_neighbour_with_it(poll):
    [good] = msgspec.msgpack.decode(base64.b64decode(bundles.write([vote_of(poll, "alice")])))

    with pytest.raises(counting.UncountableVotesError, match="3 of 4"):
        count_bundle(packed([None, good, [b"x"] * 5, good[:4]]))

    assert tallies(poll) == {"soup": 1}


@pytest.mark.parametrize("bundle", [None, 7, "votes", "é", "", "AAAA", packed({"votes": []}), packed(7)[:-2], {"votes": []}])
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
    count_bundle([[*vote, "new"] for vote in as_it_was_sent_before([vote_of(poll, "alice")])])

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
    poll = make_poll(draft=True)
    vote = vote_of(poll, "alice")
    editing.delete_poll(poll.pk, Act("olga", poll.created_at))

    assert count_votes([vote]) == {"rejected": 1}
    assert outcome_of(vote) == ("rejected", "poll_unknown")


def test_a_vote_counts_however_late_it_is_processed(make_poll):
    """The API judged the deadline when it accepted the vote; nobody judges it again."""
    poll = make_poll(opens_in=-7200, closes_in=-3600)

    assert count_votes([vote_of(poll, "alice")]) == {"counted": 1}


def test_a_thousand_votes_take_as_many_statements_as_one(make_poll, django_assert_num_queries):
    poll = make_poll()
    voter_keys = voters.VoterKeys(poll.pk, "client", poll.voter_salt)
    votes = [vote_of(poll, "alice")] + [
        AcceptedVote(UUID(int=n << 64), poll.pk, voter_keys.of(str(n)), (option(poll, "soup"),), n) for n in range(1000)
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
