"""Messages come more than once, in another order, in an old form, or are none."""

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import amqp

from chaos import messages
from chaos.scenario import scenario
from chaos.stage import Stage

_FOUR = {"arguments": {"worker": ["--concurrency", "4"]}}


def _stop_worker(stage: Stage) -> None:
    stage.stack.stop("worker")


def _rearrange(stage: Stage, order: Callable[[list[amqp.Message]], Iterable[amqp.Message]]) -> None:
    stage.pause(8, 10)
    stage.did(messages.rearrange(stage.stack.broker_url, order))
    stage.stack.start("worker")
    stage.pause(2, 3)


@scenario("every message comes three times, shuffled, to four workers", before=_stop_worker, stage=_FOUR, crowd={"rate": 500})
def delivered_three_times(stage: Stage) -> None:
    def thrice(taken: list[amqp.Message]) -> list[amqp.Message]:
        return stage.dice.sample(taken * 3, 3 * len(taken))

    _rearrange(stage, thrice)


@scenario("the messages come in reverse: later votes before earlier ones", before=_stop_worker, stage=_FOUR, crowd={"rate": 500})
def delivered_in_reverse(stage: Stage) -> None:
    _rearrange(stage, reversed)


@scenario("messages as older versions sent them, votes of one voter in reverse", stage=_FOUR)
def old_formats(stage: Stage) -> None:
    for form in (messages.listed, messages.packed):
        votes = _votes(stage, voters=200, each=3)
        stage.note_by_hand(votes)
        later_first = sorted(votes, key=lambda vote: -vote[4])
        stage.did(messages.put(stage.stack.broker_url, (messages.bundle(later_first[n : n + 30], form) for n in range(0, 600, 30))))
        stage.pause(1, 2)


def _votes(stage: Stage, voters: int, each: int) -> list[list[Any]]:
    """Return votes as they travel."""
    start = time.time_ns() // 1000
    made = []
    for number in range(voters):
        poll, voter = stage.dice.choice(stage.polls), str(uuid.uuid4())
        for again in range(each):
            option = int(stage.dice.choice(poll["options"]))
            made.append([str(uuid.uuid4()), poll["id"], voter, [option], start + again * 1_000_000 + number])
    return made


# --- What is no bundle ----------------------------------------------------------------------------------------------------


def _poison(stage: Stage) -> list[amqp.Message]:
    """Return messages of every kind that nobody can count."""
    poll = stage.polls[0]

    def vote(**changed: Any) -> list[Any]:
        fields = {"id": str(uuid.uuid4()), "poll": poll["id"], "voter": str(uuid.uuid4()), "selection": [int(poll["options"][0])]}
        return list({**fields, "at": time.time_ns() // 1000, **changed}.values())

    bodies = [
        b"", b"{", b"[]", b"{}", b"null", b"12", b"[[]]", b"[[], {}]", b"\0" * 100, b"\xff\xfe\xfd", b"[" * 100_000,
        messages.task_body(None), messages.task_body(12), messages.task_body(""), messages.task_body("\0"), messages.task_body("=" * 9),
        messages.task_body({"votes": []}), messages.task_body([12, None, "vote"]), messages.task_body("x" * 10_000_000),
        messages.task_body([vote(id="no id")]), messages.task_body([vote(poll=None)]), messages.task_body([vote(voter="\0")]),
        messages.task_body([vote(selection="soup")]), messages.task_body([vote(selection=["soup"])]),
        messages.task_body([vote(at=-1)]), messages.task_body([vote(at=10**30)]), messages.task_body([vote(at="now")]),
        messages.task_body([vote(at=float("nan"))]), messages.task_body([vote()[:3]]),
        b'[["' + b"A" * 100 + b'"], {"bundle": "A", "bundle": "B"}, {}]',
    ]  # fmt: skip
    poison = [messages.message(body) for body in bodies]
    whole = messages.task_body(messages.packed([vote()]))
    return [
        *poison,
        messages.message(whole, task=None),
        messages.message(whole, task="votes.shred"),
        messages.message(whole, content_type="application/x-python-serialize", content_encoding="binary"),
        messages.message(whole, content_type="application/gzip"),
        amqp.Message(b"hello"),
    ]


_POISON = 35


def _worker_never_died(stage: Stage) -> None:
    if died := stage.lines("supervisord", "exited: worker"):
        stage.complaints.append(f"the worker died {died} times")


@scenario("messages of every kind that are no bundle", dead_letters=_POISON + 20, after=_worker_never_died)
def poison(stage: Stage) -> None:
    for number, message in enumerate(_poison(stage)):
        stage.pause(0.05, 0.2)
        stage.did(messages.put(stage.stack.broker_url, [message]))
        if number < 20:
            _put_among_neighbours(stage)


def _put_among_neighbours(stage: Stage) -> None:
    """Put a bundle of good votes with something in it that is none: they count, and the message goes to the dead letters."""
    votes = _votes(stage, voters=10, each=1)
    stage.note_by_hand(votes)
    spoilt: list[Any] = [*votes]
    spoilt.insert(stage.dice.randrange(10), stage.dice.choice([None, 12, "vote", [], {"a": 1}, [1, 2, 3, 4, 5]]))
    stage.did(messages.put(stage.stack.broker_url, [messages.bundle(spoilt, messages.listed)]))
