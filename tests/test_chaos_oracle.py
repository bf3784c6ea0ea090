"""The oracle of `make chaos`: each judgement true once and false once, by what clients noted and what was found in the tables."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from chaos import controls
from chaos.ledger import Ledger, Vote, accepted, read
from chaos.oracle import Tables, Verdict, judge
from chaos.report import Run, markdown, write
from chaos.report import read as read_runs
from chaos.scenario import ALL
from chaos.stage import Stage
from stack.folder import ROOT

FIRST, LAST = "first stands", "last stands"
START = datetime(2026, 11, 20, 9, tzinfo=UTC)


def microseconds(seconds):
    return int((START + timedelta(seconds=seconds)).timestamp() * 1_000_000)


class Notes(Ledger):
    """A ledger, written with a clock of its own: seconds since START."""

    def __init__(self, path):
        super().__init__(path)
        self.path, self.attempt = path, 0

    def send(self, voter, option="soup", key=None, poll=FIRST, at=0.0):
        self.attempt += 1
        self._write(["sent", self.attempt, microseconds(at), *Vote(poll, voter, option, key or f"key of {voter}")])
        return self.attempt

    def answer(self, attempt, status, id=None, accepted_at=0.0, at=None):
        moment = (START + timedelta(seconds=accepted_at)).isoformat() if id else None
        self._write(["answered", attempt, microseconds(accepted_at if at is None else at), status, id, moment, None])

    def accept(self, voter, id, at=0.0, **vote):
        """Note a vote that was accepted at once."""
        self.answer(self.send(voter, at=at, **vote), 202, id, at)

    def judge(self, stored, standing=(), **rest):
        """`stored`: ids, one for each outcome; the last stands unless `standing` says which."""
        self.sync()
        outcomes = {id: list(stored).count(id) for id in stored}
        return judge([self.path], Tables(outcomes, frozenset(standing)), {FIRST: False, LAST: True}, rest.pop("drift", ()), **rest)


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path / "ledger")


def test_what_was_accepted_and_counted_once_is_no_fault(notes):
    notes.accept("alice", "a")
    notes.accept("bob", "b")

    verdict = notes.judge(["a", "b"], standing=["a", "b"])

    assert (verdict.accepted, verdict.attempts, verdict.faults) == (2, 2, 0)


def test_an_accepted_vote_without_an_outcome_is_lost(notes):
    notes.accept("alice", "a")
    notes.accept("bob", "b")

    verdict = notes.judge(["a"], standing=["a"])

    assert verdict.lost == 1
    assert "bob" in verdict.examples[0]


def test_a_vote_with_two_outcomes_is_doubled(notes):
    notes.accept("alice", "a")

    assert notes.judge(["a", "a"], standing=["a"]).doubled == 1


def test_a_vote_that_nobody_sent_is_unexpected(notes):
    notes.accept("alice", "a")

    assert notes.judge(["a", "from nowhere"], standing=["a"]).unexpected == 1


@pytest.mark.parametrize("status", [0, 503])
@pytest.mark.parametrize(("stored", "unexpected"), [([], 0), (["x"], 0), (["x", "y"], 1)])
def test_an_attempt_without_a_definite_answer_may_count_once_or_not_at_all(notes, status, stored, unexpected):
    notes.answer(notes.send("alice"), status)

    verdict = notes.judge(stored)

    assert (verdict.unclear, verdict.unexpected, verdict.lost) == (1, unexpected, 0)


def test_an_attempt_that_was_never_answered_is_unclear_too(notes):
    notes.send("alice")

    verdict = notes.judge(["x"])

    assert (verdict.unclear, verdict.unexpected) == (1, 0)


def test_a_refused_vote_must_not_be_stored(notes):
    notes.answer(notes.send("alice"), 409)

    assert notes.judge([]).faults == 0
    assert notes.judge(["x"]).unexpected == 1


@pytest.mark.parametrize(("poll", "right", "wrong"), [(FIRST, "a1", "a2"), (LAST, "a2", "a1")])
def test_of_two_votes_the_one_stands_that_the_poll_says(notes, poll, right, wrong):
    notes.accept("alice", "a2", at=2, option="salad", key="2", poll=poll)
    notes.accept("alice", "a1", at=1, option="soup", key="1", poll=poll)

    assert notes.judge(["a1", "a2"], standing=[right]).wrong == 0
    assert notes.judge(["a1", "a2"], standing=[wrong]).wrong == 1
    assert notes.judge(["a1", "a2"], standing=[right, wrong]).wrong == 1
    assert notes.judge(["a1", "a2"], standing=[]).wrong == 1


@pytest.mark.parametrize(("poll", "right", "wrong"), [(FIRST, "a", "b"), (LAST, "b", "a")])
def test_of_two_votes_of_one_moment_the_ids_decide(notes, poll, right, wrong):
    for id in ("a", "b"):
        notes.accept("alice", id, at=1, option=id, key=id, poll=poll)

    assert notes.judge(["a", "b"], standing=[right]).wrong == 0
    assert notes.judge(["a", "b"], standing=[wrong]).wrong == 1


def test_of_two_votes_with_one_key_the_first_stands_even_where_the_last_does(notes):
    notes.accept("alice", "a1", at=1, option="soup", key="same", poll=LAST)
    notes.accept("alice", "a2", at=2, option="salad", key="same", poll=LAST)

    assert notes.judge(["a1", "a2"], standing=["a1"]).wrong == 0
    assert notes.judge(["a1", "a2"], standing=["a2"]).wrong == 1


def test_a_repeated_vote_was_accepted_when_it_was_accepted_first(notes):
    notes.accept("alice", "a1", at=1, option="soup", key="1")
    notes.accept("alice", "a2", at=2, option="salad", key="2")
    notes.accept("alice", "a1", at=3, option="soup", key="1")

    verdict = notes.judge(["a1", "a2"], standing=["a1"])

    assert (verdict.accepted, verdict.wrong) == (2, 0)
    assert notes.judge(["a1", "a2"], standing=["a2"]).wrong == 1


@pytest.mark.parametrize("standing", [["a1"], ["a2"]])
def test_a_vote_with_an_unclear_attempt_may_have_been_accepted_at_once_or_later(notes, standing):
    notes.answer(notes.send("alice", "soup", key="1", at=1), 0)
    notes.accept("alice", "a2", at=2, option="salad", key="2")
    notes.accept("alice", "a1", at=3, option="soup", key="1")

    assert notes.judge(["a1", "a2"], standing=standing).wrong == 0


def test_an_unclear_attempt_after_a_certain_vote_can_not_come_before_it(notes):
    notes.accept("alice", "a1", at=1, option="soup", key="1")
    notes.answer(notes.send("alice", "salad", key="2", at=2), 0)

    assert notes.judge(["a1"], standing=["a1"]).wrong == 0
    assert notes.judge(["a1", "x"], standing=["x"]).wrong == 1


def test_clocks_that_are_wrong_by_so_much_may_have_it_the_other_way_round(notes):
    notes.accept("alice", "a1", at=1, option="soup", key="1")
    notes.answer(notes.send("alice", "salad", key="2", at=2), 0)

    assert notes.judge(["a1", "x"], standing=["x"], clock_error=2_000_000).wrong == 0


@pytest.mark.parametrize(("standing", "wrong"), [("a1", 1), ("a2", 0)])
def test_what_was_said_of_a_vote_that_was_lost_with_the_database_is_void(notes, standing, wrong):
    notes.accept("alice", "a1", at=1, option="soup", key="1")
    notes.accept("alice", "a2", at=2, option="salad", key="2")
    notes.accept("alice", "a1", at=9, option="soup", key="1")

    assert notes.judge(["a1", "a2"], standing=[standing], forgotten=({"a1"}, microseconds(5))).wrong == wrong
    assert notes.judge(["a1", "a2"], standing=[standing], forgotten=({"a1"}, microseconds(0))).wrong == 1 - wrong


def test_a_vote_that_was_lost_with_the_database_and_never_came_again_is_lost(notes):
    notes.accept("alice", "a", at=1)

    assert notes.judge([], forgotten=({"a"}, microseconds(5))).lost == 1


def test_accepted_votes_are_found_in_the_ledgers_by_their_ids(notes):
    notes.accept("alice", "a")
    notes.answer(notes.send("bob"), 503)
    notes.answer(notes.send("carol"), 409)
    notes.sync()

    assert {id: vote.voter for id, vote in accepted([notes.path]).items()} == {"a": "alice"}


def test_tallies_that_were_not_the_count_of_the_votes_are_drift(notes):
    notes.accept("alice", "a")

    assert notes.judge(["a"], standing=["a"], drift=[]).drifted == 0
    assert notes.judge(["a"], standing=["a"], drift=["poll", "poll"]).drifted == 2


def test_the_slowest_answer_and_the_longest_stall_are_found(notes):
    for voter, sent_at, answered_at in (("alice", 0, 0.5), ("bob", 3, 3.25), ("carol", 4, 6)):
        notes.answer(notes.send(voter, at=sent_at), 202, voter, at=answered_at)

    verdict = notes.judge(["alice", "bob", "carol"], standing=["alice", "bob", "carol"])

    assert (verdict.longest_answer, verdict.longest_stall) == (2, 2.75)


@pytest.mark.parametrize(("next_fault_at", "seconds"), [(20, 3), (6, 2)])
def test_a_return_is_as_long_as_the_next_accepted_vote_takes_or_until_the_next_fault(notes, next_fault_at, seconds):
    for id, at in (("a", 1), ("b", 7), ("c", 8)):
        notes.accept(id, id, at=at)

    verdict = notes.judge(["a", "b", "c"], standing=["a", "b", "c"], returns=[(microseconds(4), microseconds(next_fault_at))])

    assert verdict.longest_return == seconds


def test_several_ledgers_are_one(notes, tmp_path):
    other = Notes(tmp_path / "ledger.1")
    other.accept("bob", "b")
    other.sync()
    notes.accept("alice", "a")
    notes.sync()

    verdict = judge([notes.path, other.path], Tables({"a": 1}, frozenset("a")), {FIRST: False}, [])

    assert (verdict.accepted, verdict.lost) == (2, 1)


def test_a_line_that_was_cut_off_is_none(notes):
    notes.send("alice")
    notes.sync()
    with notes.path.open("a") as file:
        file.write('["sent", 2')

    assert len(list(read(notes.path))) == 1


@pytest.mark.parametrize("scenario", [each for each in [*ALL.values(), *controls.ALL.values()] if each.edits], ids=lambda each: each.name)
def test_what_is_to_be_broken_is_still_there(scenario):
    for edit in scenario.edits:
        assert (ROOT / edit.file).read_text().count(edit.old) == 1, f"{edit.file}: {edit.old}"


# --- When it is judged ------------------------------------------------------------------------------------------------


class Slow:
    """A stage whose clock is its own, and on which so many messages are left after so many seconds; one vote is counted with each."""

    def __init__(self, monkeypatch, left_after):
        self.seconds, self.complaints, self._left_after = 0.0, [], left_after
        monkeypatch.setattr("chaos.stage.time", SimpleNamespace(monotonic=lambda: self.seconds, sleep=self._sleep))

    def _sleep(self, seconds):
        self.seconds += seconds

    def _left(self, of):
        return self._left_after(self.seconds, of)


def test_it_is_not_judged_while_anything_moves_however_long_that_takes(monkeypatch):
    hours = Slow(monkeypatch, lambda seconds, of: (max(0, 60 - int(seconds / 100)), 0, 0))

    Stage.settle(hours)

    assert hours.complaints == []
    assert hours.seconds > 5_900


def test_what_a_worker_holds_is_waited_for(monkeypatch):
    held = Slow(monkeypatch, lambda seconds, of: (int(of == "messages" and seconds < 60), 0, 0))

    Stage.settle(held)

    assert (held.complaints, held.seconds >= 60) == ([], True)


@pytest.mark.parametrize(
    "left_after",
    [
        lambda seconds, of: (3, 0, 0),
        lambda seconds, of: (int(of == "messages"), 0, 0),
        lambda seconds, of: None,
    ],
    ids=["in a queue", "with a worker", "a server does not answer"],
)
def test_what_does_not_move_for_two_minutes_is_stuck(monkeypatch, left_after):
    stuck = Slow(monkeypatch, left_after)

    Stage.settle(stuck)

    assert len(stuck.complaints) == 1
    assert 120 < stuck.seconds < 130


# --- What is said of it -----------------------------------------------------------------------------------------------


def a_run(seed=1, **changes):
    return Run("web-killed", "kill -9", **{"seed": seed, "faults": 3, "verdict": Verdict(accepted=1000, longest_answer=seed), **changes})


def test_two_runs_of_a_scenario_are_one_row_of_the_docs_with_both_seeds(tmp_path):
    write(tmp_path / "runs.json", [a_run(1), a_run(2)])

    table = markdown(read_runs(tmp_path / "runs.json"))

    assert "| `web-killed`: kill -9 | 6 | 2,000 | 0 | 0 | 0 | 0 | 0 | 2.00 s | 0.0 s | 0.0 s | 1, 2 |" in table
    assert "2 of 2 runs as they should be" in table


def test_a_failure_is_not_left_out_of_the_docs():
    assert "**FAILED: lost 1**" in markdown([a_run(complaints=["lost 1"], verdict=Verdict(accepted=9, lost=1))])
    assert "**FAILED: lost 1**" in markdown([a_run(complaints=["lost 1"], is_long=True, verdict=Verdict(accepted=9, lost=1))])
    assert "**NOTHING**" in markdown([a_run(is_control=True)])


@pytest.mark.parametrize(
    ("is_control", "complaints", "lost", "as_it_should_be"),
    [
        (False, [], 0, True),
        (False, ["lost 1"], 1, False),
        (True, ["lost 1"], 1, True),
        (True, [], 0, False),
        (True, ["StackError: it did not start"], 0, False),  # proves nothing of the oracle
    ],
)
def test_a_control_is_good_when_the_oracle_itself_finds_it_out(is_control, complaints, lost, as_it_should_be):
    run = a_run(is_control=is_control, complaints=complaints, verdict=Verdict(lost=lost))

    assert run.is_as_it_should_be is as_it_should_be


def test_a_control_is_good_when_its_scenario_finds_what_it_should():
    assert a_run(is_control=True, complaints=["the poll was final"], is_found=True).is_as_it_should_be
    assert not a_run(is_control=False, complaints=["the poll was final"], is_found=True).is_as_it_should_be
