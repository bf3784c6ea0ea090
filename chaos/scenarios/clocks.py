"""Time: clocks are wrong, beat runs twice, a poll ends."""

import time
from datetime import UTC, datetime, timedelta

from chaos.scenario import scenario
from chaos.stage import Edit, Stage

_MINUTES = 5 * 60


def _set_clock(stage: Stage, seconds: int) -> None:
    part = stage.root / "clock.part"
    part.write_text(str(seconds * 1_000_000))
    part.replace(stage.root / "clock")


def _open_earlier(stage: Stage) -> None:
    """Open the polls long before any clock's now: past a trigger, which lets no open poll's opening move."""
    stage.execute("""
        ALTER TABLE polls DISABLE TRIGGER open_polls_keep_their_terms;
        UPDATE polls SET opens_at = opens_at - interval '1 hour';
        ALTER TABLE polls ENABLE TRIGGER open_polls_keep_their_terms
    """)
    _set_clock(stage, 0)
    stage.pause(2, 3)  # until the web process knows


@scenario(
    "the web process's clock jumps by five minutes, to and fro",
    edits=(
        Edit(
            "polls/moments.py",
            "    return time.time_ns() // 1000\n",
            "    from pathlib import Path\n\n"
            '    ahead = Path("clock")\n'
            "    return time.time_ns() // 1000 + (int(ahead.read_text()) if ahead.exists() else 0)\n",
        ),
    ),
    before=_open_earlier,
    stage={"clock_error": 2 * _MINUTES},
)
def clock_jumps(stage: Stage) -> None:
    for seconds in (_MINUTES, 0, -_MINUTES, 0, _MINUTES, -_MINUTES, 0):
        stage.pause(1.5, 2.5)
        _set_clock(stage, seconds)
        stage.did()
        if stage.dice.random() < 0.5:
            stage.kill("web")  # else the process goes on from the latest moment that it gave to a vote


# --- The end of a poll ----------------------------------------------------------------------------------------------------

_SHORT = {"env": {"FINAL_AFTER_SECONDS": "4"}}
# A poll is final so soon after its end, however busy the others are.
LONGEST_CLOSING = timedelta(minutes=3)


def _add_short_poll(stage: Stage, seconds: int = 10) -> None:
    stage.closes_at = datetime.now(UTC) + timedelta(seconds=seconds)
    stage.polls.append(stage.make_poll(closes_at=stage.closes_at.isoformat(), allow_change=True))


def _wait_until_closed(stage: Stage) -> None:
    time.sleep(max(0, (stage.closes_at - datetime.now(UTC)).total_seconds()))


def _is_final_once(stage: Stage) -> None:
    poll_id, end = stage.polls[-1]["id"], stage.closes_at.isoformat()
    if not _wait_until_final(stage):
        return
    for action in ("closed", "finalised"):
        times = stage.query(f"SELECT count(*) FROM journal WHERE poll_id = '{poll_id}' AND action = '{action}'")[0][0]
        if times != 1:
            stage.complaints.append(f"the poll was {action} {times} times")
    if late := stage.query(f"SELECT count(*) FROM votes WHERE poll_id = '{poll_id}' AND accepted_at >= '{end}'")[0][0]:
        stage.complaints.append(f"{late} votes were accepted after the end")


def _wait_until_final(stage: Stage) -> bool:
    """Return whether the poll is final within LONGEST_CLOSING after its end; complain otherwise."""
    while not _is_final(stage):
        if datetime.now(UTC) > stage.closes_at + LONGEST_CLOSING:
            stage.complaints.append(f"the poll did not become final within {LONGEST_CLOSING.total_seconds():.0f} s")
            return False
        time.sleep(0.5)
    return True


def _is_final(stage: Stage) -> bool:
    return bool(stage.query(f"SELECT finalised_at IS NOT NULL FROM polls WHERE id = '{stage.polls[-1]['id']}'")[0][0])


@scenario("a poll ends while its votes are on their way and the worker is away", before=_add_short_poll, after=_is_final_once, stage=_SHORT)
def closes_meanwhile(stage: Stage) -> None:
    stage.pause(3, 4)
    _end_with_votes_in_the_queue(stage)


def _end_with_votes_in_the_queue(stage: Stage) -> None:
    stage.stack.stop("worker")
    stage.did()
    _wait_until_closed(stage)
    # FINAL_AFTER_SECONDS (4 here) and the age that the broker's figures may have (15) are over.
    stage.pause(27, 28)
    if _is_final(stage):
        stage.complaints.append("the poll was final with votes in the queue")
    stage.stack.start("worker")
    stage.pause(2, 3)


@scenario("two beats, and one dies", before=_add_short_poll, after=_is_final_once, stage={**_SHORT, "twins": ("beat",)})
def two_beats(stage: Stage) -> None:
    for _ in range(3):
        stage.pause(1, 2)
        stage.kill("beat2")
    _wait_until_closed(stage)
    stage.kill("beat")
    stage.pause(2, 3)


@scenario(
    "a poll ends while others go on, so that never all is counted", before=_add_short_poll, after=_is_final_once, crowd={"rate": 1200}
)
def closes_under_load(stage: Stage) -> None:
    _wait_until_closed(stage)
    stage.did()
    if not _wait_until_final(stage):
        return
    votes = _votes_of_the_poll(stage)
    stage.notes.append(f"Final {(datetime.now(UTC) - stage.closes_at).total_seconds():.0f} s after its end, while the others went on.")
    stage.pause(8, 10)
    if (more := _votes_of_the_poll(stage) - votes) != 0:
        stage.complaints.append(f"{more} votes were counted in the poll after it was final")


def _votes_of_the_poll(stage: Stage) -> int:
    return int(stage.query(f"SELECT count(*) FROM votes WHERE poll_id = '{stage.polls[-1]['id']}'")[0][0])


# --- The end of a poll, by clocks that are wrong --------------------------------------------------------------------------


def _add_polls_that_end_in_turn(stage: Stage) -> None:
    """At the end of the first, the clock's jobs look at the queues; the second ends while what they saw then could count."""
    _add_short_poll(stage, 8)
    _add_short_poll(stage, 35)


def _is_final_once_and_was_not_before(stage: Stage) -> None:
    _is_final_once(stage)
    if late := stage.query("SELECT coalesce(sum((changes->'late_votes'->>1)::int), 0) FROM journal WHERE action = 'late'")[0][0]:
        stage.complaints.append(f"{late} votes came after their poll was final")
    if early := stage.query("SELECT count(*) FROM polls WHERE finalised_at < closes_at OR closed_at < closes_at")[0][0]:
        stage.complaints.append(f"{early} polls were closed or final before their end")


_AFTER = {"after": _is_final_once_and_was_not_before}


@scenario(
    "the clocks of beat and of the jobs are a minute ahead, then right; a poll ends with its votes in the queue",
    before=_add_polls_that_end_in_turn,
    stage={**_SHORT, "clocks": {"beat": 60, "periodic": 60}},
    **_AFTER,
)
def clock_ahead_then_right(stage: Stage) -> None:
    # Until the job has seen the queues empty after the first poll's end.
    stage.pause(26, 27)
    stage.set_clocks(beat=0, periodic=0)
    _end_with_votes_in_the_queue(stage)


@scenario(
    "the clocks of beat and of both workers are put back by two hours; a poll ends with its votes in the queue",
    before=_add_short_poll,
    stage={**_SHORT, "clocks": {"beat": 7200, "periodic": 7200, "worker": 7200}},
    **_AFTER,
)
def clock_put_back(stage: Stage) -> None:
    stage.pause(3, 4)
    stage.set_clocks(beat=0, periodic=0, worker=0)
    _end_with_votes_in_the_queue(stage)


@scenario(
    "beat's clock is 15 s behind and the workers' 15 s ahead; a poll ends with its votes in the queue",
    before=_add_short_poll,
    stage={**_SHORT, "clocks": {"beat": -15, "periodic": 15, "worker": 15}},
    **_AFTER,
)
def clocks_apart(stage: Stage) -> None:
    stage.pause(3, 4)
    _end_with_votes_in_the_queue(stage)
    told = {program: round(ahead) for program, ahead in stage.query("SELECT program, ahead_seconds FROM clocks")}
    wanted = {"web": 0, "beat": -15, "periodic": 15, "worker": 15}
    if told != wanted:
        stage.complaints.append(f"the clocks are told as {told}")
