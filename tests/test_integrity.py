"""Integrity in the open: what became of every vote, the tallies beside a recount, and what is done when they differ."""

import io
import logging
import os
import subprocess
import sys
import threading
from datetime import timedelta
from uuid import uuid4

import msgspec
import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils.timezone import now

from polls import bundles, integrity, outbox, problems, results
from polls.counting import count_votes, keep_counting_out
from polls.journal import Act
from polls.models import JournalEntry, Poll, Tally, VoteAside
from tasks import periodic
from tests.conftest import (
    ROOT,
    Api,
    assert_tallies_equal_votes,
    database_url,
    free_port,
    option,
    tallies,
    vote_of,
    wait_until,
    withdrawal_of,
    worker,
)  # fmt: skip
from tests.test_intake import assert_refused

ACT = Act("otto", now(), "It looked wrong.")


def spoil(poll, votes, *texts, **columns):
    """Change a tally by hand."""
    selection = [option(poll, text) for text in texts]
    assert Tally.objects.filter(poll=poll, selection=selection).update(votes=votes, **columns) == 1


def recounts(poll):
    """Who recounted, why, and what was wrong, oldest first."""
    return list(JournalEntry.objects.filter(poll=poll, action="recounted").order_by("id").values_list("actor", "reason", "changes"))


@pytest.fixture
def approval_poll(make_poll):
    poll = make_poll(method="approval", max_choices=2)
    count_votes([vote_of(poll, "alice", "soup", "salad"), vote_of(poll, "bob", "soup")])
    assert tallies(poll) == {"ballots": 2, "soup": 2, "salad": 1}
    return poll


@pytest.fixture
def lunch(make_poll):
    """A poll with votes of every outcome: alice's stands, changed once; bob's withdrawn; one rejected; one quarantined."""
    poll = make_poll(allow_change=True, allow_withdrawal=True)
    count_votes([vote_of(poll, "alice"), vote_of(poll, "bob"), vote_of(poll, "carol")])
    count_votes([vote_of(poll, "alice", "salad", at=1), withdrawal_of(poll, "bob", at=1)])
    unknown = vote_of(poll, "dora")
    VoteAside.objects.create(
        poll_id=poll.pk, voter_key=uuid4(), vote_id=uuid4(), selection=[10**15], accepted_at=now(), decided_at=now(),
        outcome="quarantined", reason="under_review",
    )  # fmt: skip
    count_votes([msgspec.structs.replace(unknown, selection=(10**15,))])
    return poll


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_every_vote_is_accounted_for(lunch):
    report = integrity.read(lunch.pk)

    assert report.counted == 3  # alice's salad, carol's soup, bob's withdrawal
    assert report.aside == {
        "superseded": {"changed": 1, "withdrawn": 1},
        "rejected": {"option_unknown": 1},
        "quarantined": {"under_review": 1},
    }
    assert (report.pending, report.doubled, report.accepted) == (0, 0, 7)
    assert report.tallies == [(option(lunch, "soup"), 1, 1), (option(lunch, "salad"), 1, 1)]
    assert report.is_exact


def test_a_poll_without_votes_is_exact_and_no_poll_has_no_report(poll):
    report = integrity.read(poll.pk)
    assert (report.accepted, report.tallies, report.is_exact) == (0, [], True)
    assert integrity.read(uuid4()) is None


def test_the_ballots_of_an_approval_poll_are_compared_too(approval_poll):
    soup, salad = option(approval_poll, "soup"), option(approval_poll, "salad")
    report = integrity.read(approval_poll.pk)
    assert (report.counted, report.tallies, report.is_exact) == (2, [(None, 2, 2), (soup, 2, 2), (salad, 1, 1)], True)

    spoil(approval_poll, 3)  # the ballots
    report = integrity.read(approval_poll.pk)
    assert (report.tallies[0], report.is_exact) == ((None, 3, 2), False)


def test_votes_in_the_outbox_are_pending_until_they_are_counted_and_never_twice(lunch, poll):
    counted, waiting = vote_of(lunch, "erin"), vote_of(lunch, "fred")
    count_votes([counted])  # its copy in the outbox changes nothing
    for votes in ([counted, waiting], [waiting, vote_of(poll, "alice")]):
        outbox.keep(bundles.write(votes))
    try:
        report = integrity.read(lunch.pk)
        assert (report.counted, report.pending, report.accepted) == (4, 1, 9)
    finally:
        outbox.drain()

    report = integrity.read(lunch.pk)
    assert (report.counted, report.pending, report.accepted) == (5, 0, 9)


def test_a_vote_with_two_outcomes_is_a_mismatch(lunch):
    stands = vote_of(lunch, "erin")
    count_votes([stands])
    VoteAside.objects.create(
        poll_id=lunch.pk, voter_key=stands.voter_key, vote_id=stands.vote_id, selection=list(stands.selection), accepted_at=now(),
        decided_at=now(), outcome="superseded", reason="changed",
    )  # fmt: skip

    report = integrity.read(lunch.pk)

    assert (report.doubled, report.is_exact, report.accepted) == (1, False, 8)


@pytest.mark.parametrize("wrong", [0, 2, -1])
def test_a_tally_that_is_not_what_the_votes_say_is_a_mismatch(lunch, wrong):
    spoil(lunch, wrong, "soup", counted=wrong)
    report = integrity.read(lunch.pk)
    assert (report.tallies[0], report.is_exact) == ((option(lunch, "soup"), wrong, 1), False)


def test_a_missing_tally_and_one_without_votes_are_mismatches(lunch):
    Tally.objects.filter(poll=lunch, selection=[option(lunch, "soup")]).delete()
    assert integrity.read(lunch.pk).tallies[0] == (option(lunch, "soup"), 0, 1)
    other = lunch.options.create(text="noodles", position=9)
    Tally.objects.create(poll=lunch, selection=[other.pk], votes=5, counted=5, revision=1)
    assert integrity.read(lunch.pk).tallies[-1] == (other.pk, 5, 0)


def test_a_report_is_of_one_moment_while_votes_are_counted(poll):
    """Votes and tallies that were read one after the other would differ."""
    stop = threading.Event()

    def keep_counting():
        try:
            n = 0
            while not stop.is_set():
                count_votes([vote_of(poll, f"voter {n}")])
                n += 1
        finally:
            connection.close()

    counting = threading.Thread(target=keep_counting)
    counting.start()
    try:
        wait_until(lambda: integrity.read(poll.pk).counted > 10)
        reports = [integrity.read(poll.pk) for _ in range(50)]
    finally:
        stop.set()
        counting.join()

    assert all(report.is_exact for report in reports)
    assert len({report.counted for report in reports}) > 10


# --- Recounting -------------------------------------------------------------------------------------------------------


def test_a_recount_makes_the_tallies_what_the_votes_say_and_tells_it(lunch):
    soup, salad = option(lunch, "soup"), option(lunch, "salad")
    revision = results.read_results(lunch.pk, now())["revision"]
    spoil(lunch, 99, "soup")
    Tally.objects.filter(poll=lunch, selection=[salad]).delete()

    assert integrity.recount(lunch.pk, ACT) == {str(soup): (99, 1), str(salad): (0, 1)}

    assert tallies(lunch) == {"soup": 1, "salad": 1}
    assert results.read_results(lunch.pk, now())["revision"] > revision
    assert recounts(lunch) == [("otto", "It looked wrong.", {str(soup): [99, 1], str(salad): [0, 1]})]
    assert not Tally.objects.filter(poll=lunch).exclude(counted=1)


def test_a_recount_of_what_is_right_changes_nothing(lunch, approval_poll):
    before = list(Tally.objects.order_by("id").values_list())
    assert integrity.recount(lunch.pk, ACT) == integrity.recount(approval_poll.pk, ACT) == {}
    assert list(Tally.objects.order_by("id").values_list()) == before
    assert recounts(lunch) == recounts(approval_poll) == []


def test_an_approval_poll_is_recounted_with_its_ballots(approval_poll):
    soup = option(approval_poll, "soup")
    spoil(approval_poll, 7)
    spoil(approval_poll, 0, "soup", counted=0)

    assert integrity.recount(approval_poll.pk, ACT) == {"ballots": (7, 2), str(soup): (0, 2)}
    assert tallies(approval_poll) == {"ballots": 2, "soup": 2, "salad": 1}


def test_a_tally_without_votes_becomes_nothing_and_other_polls_are_left_alone(poll, lunch):
    count_votes([vote_of(poll, "alice")])
    spoil(poll, 5, "soup")
    Tally.objects.create(poll=lunch, selection=[option(poll, "soup")], votes=5, counted=5, revision=1)

    integrity.recount(lunch.pk, ACT)

    assert Tally.objects.get(poll=lunch, selection=[option(poll, "soup")]).votes == 0
    assert tallies(poll) == {"soup": 5}
    integrity.recount(poll.pk, ACT)


def test_there_is_no_recount_of_no_poll():
    with pytest.raises(problems.Refusal, match="No poll has this id"):
        integrity.recount(uuid4(), ACT)


def test_recounts_while_votes_are_counted_lose_none_and_invent_none(poll):
    stop, seen = threading.Event(), []

    def keep_counting(name):
        try:
            n = 0
            while not stop.is_set():
                count_votes([vote_of(poll, f"{name} {n}", "soup"), vote_of(poll, f"{name} {n} too", "salad")])
                n += 1
            seen.append(n)
        finally:
            connection.close()

    counting = [threading.Thread(target=keep_counting, args=(name,)) for name in ("alice", "bob")]
    for thread in counting:
        thread.start()
    try:
        wait_until(lambda: tallies(poll).get("soup", 0) > 10)
        changes = [integrity.recount(poll.pk, ACT) for _ in range(30)]
    finally:
        stop.set()
        for thread in counting:
            thread.join()

    assert changes == [{}] * 30
    assert tallies(poll) == {"soup": sum(seen), "salad": sum(seen)}


def test_a_recount_waits_for_who_is_counting_and_counts_their_votes(poll):
    counted = []

    def recount():
        try:
            integrity.recount(poll.pk, ACT)
            counted.append(tallies(poll))
        finally:
            connection.close()

    with transaction.atomic():
        count_votes([vote_of(poll, "alice")])
        thread = threading.Thread(target=recount)
        thread.start()
        wait_until(lambda: _waiting_for_a_lock() > 0)
        assert counted == []
    thread.join()

    assert counted == [{"soup": 1}]


def _waiting_for_a_lock():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
            " WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted"
        )
        return cursor.fetchone()[0]


# --- The clock --------------------------------------------------------------------------------------------------------


def errors(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_a_tally_changed_by_hand_is_found_and_repaired(lunch, caplog, monkeypatch):
    """In a poll of any size."""
    monkeypatch.setattr(integrity, "SMALL_POLL", -1)
    periodic.check_tallies_soon()
    caplog.clear()
    spoil(lunch, 1000, "soup")
    at = now()

    assert integrity.check_soon(at) == [lunch.pk]

    assert tallies(lunch) == {"soup": 1, "salad": 1}
    assert recounts(lunch) == [("the clock", "The tallies were not what the votes say.", {str(option(lunch, "soup")): [1000, 1]})]
    assert errors(caplog) == [f"1 tallies of poll {lunch.pk} were not what the votes say; they were recounted"]
    assert integrity.check_soon(at) == []


def test_a_small_poll_is_recounted_whatever_was_done_to_its_tallies(lunch, monkeypatch):
    def small(monkeypatch, votes):
        monkeypatch.setattr(integrity, "SMALL_POLL", votes)
        monkeypatch.setattr(integrity, "VOTES_AT_ONCE", 10**9)

    spoil(lunch, 3, "soup", counted=3)
    small(monkeypatch, 3)  # 4 by its tallies
    assert lunch.pk not in integrity.check_soon(now())
    small(monkeypatch, 4)
    assert lunch.pk in integrity.check_soon(now())
    Tally.objects.filter(poll=lunch).delete()
    assert lunch.pk in integrity.check_soon(now())
    assert tallies(lunch) == {"soup": 1, "salad": 1}


def test_a_run_counts_no_more_votes_than_it_may(make_poll, monkeypatch):
    polls = [make_poll() for _ in range(3)]
    for poll in polls:
        count_votes([vote_of(poll, name) for name in ("alice", "bob")])
    wrong = {poll.pk for poll in polls}
    Tally.objects.filter(poll__in=polls).update(votes=3, counted=3)
    monkeypatch.setattr(integrity, "VOTES_AT_ONCE", 2)
    assert integrity.check_soon(now()) == []  # three votes by the tallies of each

    monkeypatch.setattr(integrity, "VOTES_AT_ONCE", 10**9)
    assert wrong <= set(integrity.check_soon(now()))


def test_polls_that_have_long_been_final_are_left_to_the_hourly_check(lunch):
    at = now()
    Poll.objects.filter(pk=lunch.pk).update(finalised_at=at - timedelta(hours=1))
    spoil(lunch, 3, "soup", counted=3)

    assert lunch.pk not in integrity.check_soon(at)
    assert integrity.check(at) == [lunch.pk]
    assert tallies(lunch) == {"soup": 1, "salad": 1}


def test_the_hourly_check_sees_votes_that_were_changed(lunch, monkeypatch, caplog):
    monkeypatch.setattr(integrity, "SMALL_POLL", -1)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM votes WHERE poll_id = %s AND selection = ARRAY[%s::bigint]", [lunch.pk, option(lunch, "soup")])
    assert lunch.pk not in integrity.check_soon(now())

    periodic.check_tallies()

    assert tallies(lunch) == {"salad": 1}
    assert errors(caplog) == [f"1 tallies of poll {lunch.pk} were not what the votes say; they were recounted"]


def test_the_hourly_check_ends_in_time(make_poll, monkeypatch):
    polls = [make_poll() for _ in range(3)]
    for poll in polls:
        count_votes([vote_of(poll, "alice")])
    Tally.objects.filter(poll__in=polls).update(votes=3, counted=3)

    with monkeypatch.context() as patched:
        patched.setattr(integrity, "CHECK_SECONDS", -1)
        first = integrity.check(now())

    assert len(first) <= 1
    assert {*first, *integrity.check(now())} == {poll.pk for poll in polls}


def test_what_workers_of_before_counted_is_no_mistake(lunch, caplog):
    """They leave the second column alone."""
    Tally.objects.filter(poll=lunch).update(counted=0)

    assert integrity.check_soon(now()) == []

    assert (recounts(lunch), errors(caplog)) == ([], [])
    assert set(Tally.objects.filter(poll=lunch).values_list("votes", "counted")) == {(1, 1)}


def test_a_poll_that_can_not_be_locked_in_time_is_left_for_the_next_run(lunch, poll, caplog):
    count_votes([vote_of(poll, "alice")])
    spoil(lunch, 5, "soup")
    spoil(poll, 5, "soup")
    repaired = []

    def check():
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET lock_timeout = '200ms'")
            repaired.append(set(integrity.check_soon(now())))
        finally:
            connection.close()

    with transaction.atomic():
        keep_counting_out(lunch.pk)
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()

    assert repaired == [{poll.pk}]
    assert set(integrity.check_soon(now())) == {lunch.pk}


def test_the_clocks_job_repairs(lunch, broker, tmp_path):
    spoil(lunch, 1000, "soup")
    with worker(settings.PERIODIC_QUEUE, tmp_path / "periodic.log", concurrency=1):
        periodic.check_tallies_soon.delay()
        wait_until(lambda: tallies(lunch) == {"soup": 1, "salad": 1})
    assert_tallies_equal_votes()


# --- Commands ---------------------------------------------------------------------------------------------------------


def manage(*arguments):
    env = {**os.environ, "DATABASE_URL": database_url(), "BROKER_API_URL": f"http://127.0.0.1:{free_port()}/api/"}
    return subprocess.run([sys.executable, "manage.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_audit_ends_with_1_when_a_tally_is_wrong(lunch):
    right = manage("audit", "--poll", str(lunch.pk))
    spoil(lunch, 5, "soup")
    wrong = manage("audit", "--poll", str(lunch.pk))
    everything = manage("audit")
    integrity.recount(lunch.pk, ACT)

    numbers = f"{lunch.pk}  accepted 7, counted 3, superseded 2, rejected 1, quarantined 1, pending 0\n"
    broker = "bundles in the queue and with workers: unknown: the broker's management does not answer\n"
    assert (right.returncode, right.stdout) == (0, f"{numbers}1 polls, 0 with a mismatch; {broker}")
    mismatch = f"  option {option(lunch, 'soup')}: tally 5, votes 1\n"
    assert (wrong.returncode, wrong.stdout) == (1, f"{numbers}{mismatch}1 polls, 1 with a mismatch; {broker}")
    assert everything.returncode == 1 and numbers + mismatch in everything.stdout


def test_audit_of_no_poll_says_so():
    with pytest.raises(CommandError, match="No poll has this id"):
        call_command("audit", "--poll", str(uuid4()))


def test_the_recount_command_repairs_and_says_what(lunch):
    spoil(lunch, 5, "soup")
    for expected in (f"{option(lunch, 'soup')}: 5 -> 1\n1 tallies were wrong\n", "Every tally was what the votes say.\n"):
        out = io.StringIO()
        call_command("recount", str(lunch.pk), "--reason", "A slip.", stdout=out)
        assert out.getvalue() == expected
    assert [reason for _, reason, _ in recounts(lunch)] == ["A slip."]


@pytest.mark.parametrize("arguments", [[str(uuid4())], ["no-uuid"], [], [str(uuid4()), "--reason", "x" * 501]])
@pytest.mark.usefixtures("_database")
def test_the_recount_command_refuses_what_is_wrong(arguments):
    with pytest.raises(CommandError):
        call_command("recount", *arguments)


# --- The API ----------------------------------------------------------------------------------------------------------


def test_the_api_shows_what_became_of_the_votes(owners_api, lunch):
    soup, salad = str(option(lunch, "soup")), str(option(lunch, "salad"))

    answer = owners_api.get(f"/api/v1/polls/{lunch.pk}/integrity")

    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    shown = answer.json
    assert shown.pop("as_of") <= now().isoformat()
    assert shown.pop("bundles_waiting", "missing") != "missing"
    assert shown == {
        "accepted": 7,
        "counted": 3,
        "superseded": 2,
        "rejected": {"option_unknown": 1},
        "quarantined": 1,
        "pending": 0,
        "tallies": [{"option": soup, "tally": 1, "recount": 1}, {"option": salad, "tally": 1, "recount": 1}],
        "is_exact": True,
        "not_final_because": None,
    }


def test_the_api_shows_a_mismatch_and_the_ballots(owners_api, approval_poll):
    spoil(approval_poll, 5)
    shown = owners_api.get(f"/api/v1/polls/{approval_poll.pk}/integrity").json
    integrity.recount(approval_poll.pk, ACT)
    assert shown["tallies"][0] == {"option": None, "tally": 5, "recount": 2}
    assert shown["is_exact"] is False


def test_the_api_says_what_a_closed_poll_waits_for(owners_api, make_poll):
    poll = make_poll(closes_in=-1)
    shown = owners_api.get(f"/api/v1/polls/{poll.pk}/integrity").json
    assert shown["not_final_because"] == "Its end is not long enough ago for the broker's figures to speak of it."


@pytest.mark.parametrize("wrong", ["not-a-uuid", uuid4()])
def test_the_api_knows_no_integrity_of_no_poll(owners_api, wrong):
    answer = owners_api.get(f"/api/v1/polls/{wrong}/integrity")
    assert answer.status == 404


def test_the_api_tells_nobody_in_particular(pipeline, poll):
    assert_refused(Api(pipeline, {}).get(f"/api/v1/polls/{poll.pk}/integrity"), problems.UNAUTHENTICATED)
