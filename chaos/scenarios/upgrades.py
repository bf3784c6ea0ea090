"""Deploys: programs leave when they are asked to, and others of another version take their place, while votes are cast."""

from datetime import UTC, datetime, timedelta
from signal import SIGTERM

from chaos import ledger
from chaos.scenario import scenario
from chaos.stage import Edit, Stage

STOPS = 50

# What web processes sent before bundles were packed: a list in JSON.
_BEFORE = (
    Edit("polls/publishing.py", "b'[[\"' + bundle + b'\"],{},", "b'[[' + bundle + b'],{},"),
    Edit("polls/bundles.py", "return base64.b64encode(_encoder.encode(votes))", "return msgspec.json.encode(votes)"),
)
# What a later version may send: one more field, at the end.
_AFTER = (
    Edit(
        "polls/bundles.py",
        "    signature_key: int | None = None\n",
        '    signature_key: int | None = None\n    channel: str | None = "kiosk"\n',
    ),
)


def _nobody_was_left_without_an_answer(stage: Stage) -> None:
    """Complain of votes that were accepted by an attempt that got no answer: a stop must not cut off who was let in."""
    told: dict[str, datetime] = {}
    for path in stage.folder.glob("ledger*"):
        for kind, _, _, *rest in ledger.read(path):
            if kind == "answered" and rest[0] == 202:
                told[rest[1]] = min(datetime.fromisoformat(rest[2]), told.get(rest[1], datetime.max.replace(tzinfo=UTC)))
    stored = stage.query("SELECT vote_id::text, accepted_at FROM votes UNION ALL SELECT vote_id::text, accepted_at FROM outcomes")
    # A client that got no answer sends its vote again and is told the moment of that attempt.
    untold = sum(at + timedelta(milliseconds=1) < told.get(id, datetime.max.replace(tzinfo=UTC)) for id, at in stored)
    if untold:
        stage.complaints.append(f"{untold} votes were accepted, and who sent them got no answer")


@scenario(
    f"SIGTERM of the web process and of the worker under full load, {STOPS} times each",
    crowd={"rate": 100_000, "connections": 48},
    after=_nobody_was_left_without_an_answer,
)
def asked_to_stop(stage: Stage) -> None:
    for _ in range(STOPS):
        stage.pause(0.1, 0.8)
        pids = {name: stage.stack.kill(name, SIGTERM) for name in ("web", "worker")}
        stage.did(len(pids))
        for name, pid in pids.items():
            stage.stack.wait_until_back(name, pid)


@scenario("another version is rolled out and back under load: workers first on the way there, web first on the way back", edits=_BEFORE)
def rolled_out_and_back(stage: Stage) -> None:
    for changes, order in [
        ([_back(edit) for edit in _BEFORE], ("worker", "web")),
        (_AFTER, ("worker", "web")),
        ([_back(edit) for edit in _AFTER], ("web", "worker")),
    ]:
        stage.pause(2, 4)
        for change in changes:
            stage.edit(change)
        for program in order:
            stage.kill(program, SIGTERM)
            stage.pause(2, 4)


def _back(edit: Edit) -> Edit:
    return Edit(edit.file, edit.new, edit.old)
