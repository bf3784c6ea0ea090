"""Making, changing and deleting polls: what is allowed when, so that no accepted vote loses its meaning."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.contrib.auth.models import User
from django.db import connection, transaction

from polls import journal, networks, problems, results
from polls.journal import Act
from polls.models import Option, Poll, PollStatus, Vote, VoterPolicy, VotingMethod
from polls.moments import iso

# A client that means "now" may have a slow clock or network.
CLOCK_TOLERANCE = timedelta(minutes=1)
# After this time every web process has read a change. So a poll that closes early still closes in the future, and no 202 comes
# after the end; and a poll that opens sooner is changed as if it were open, for it may be by the time the change is read.
SHORTEST_NOTICE = timedelta(seconds=2 * settings.POLL_SNAPSHOT_SECONDS + 1)

WORDS = {"title", "description"}
# What may only be loosened once the poll is open: whoever was refused may come again, but nobody who was let in is judged anew.
LIMITS = {"address_limit", "subnet_limit", "allowed_networks"}
# How suspicious votes are looked for. Another answer judges nothing by itself: it is for what rules find from then on.
VIGILANCE = {"auto_quarantine", "rule_parameters"}
# What may change until the first vote: votes say what they mean by the options, and whoever voted was told who will see the results.
UNTIL_THE_FIRST_VOTE = {"options", "results_visibility"}
# What may only grow then: who votes was told how many others they are shown with.
STEP = "results_step"
# Nothing else once the poll is open: it would say anew who is one voter, which vote of theirs stands, or what a ballot holds.
CHANGEABLE_WHILE_OPEN = WORDS | LIMITS | VIGILANCE | UNTIL_THE_FIRST_VOTE | {"closes_at", STEP}


def create_poll(
    owner: User, fields: Mapping[str, Any], at: datetime, *, by: str = "", reason: str = "", duplicate_of: UUID | None = None
) -> Poll:
    """Store a poll and its options, `fields` as NewPollSerializer validates them; raises Refusal when they contradict each other.

    It is published at once, but where `fields` says `draft`. `by` is who makes it, if not the owner.
    """
    options = fields["options"]
    wanted = {"opens_at": at, **_all_choices(fields.get("method", VotingMethod.SINGLE), len(options)), **fields}
    wanted["published_at"] = None if wanted.pop("draft", False) else at
    del wanted["options"]
    poll = Poll(owner=owner, created_at=at, network_secret=networks.current_secret(at), network_secret_since=at, **wanted)
    _check_start(poll.opens_at, at)
    _check_end(poll.opens_at, poll.closes_at, at)
    _check_settings(poll, len(options))
    if poll.status_at(at) == PollStatus.OPEN:
        poll.opened_at = at
    with transaction.atomic():
        poll.save(force_insert=True)
        _write_options(poll, options)
        changes = {"status": (None, poll.status_at(at))} | ({"duplicate_of": (None, duplicate_of)} if duplicate_of else {})
        journal.write(poll, Act(by or owner.get_username(), at, reason), "created", changes)
    return poll


def change_poll(poll_id: UUID, changes: Mapping[str, Any], act: Act) -> Poll:
    """Apply the changes, all or none, and return the poll as it is then; raises Refusal when the poll is too far on for one of them.

    What is so already is no change: without any, there is no new version and no entry in the journal.
    """
    with locked(poll_id, act, against_counting=bool(changes.keys() & UNTIL_THE_FIRST_VOTE)) as poll:
        fields = {name: value for name, value in changes.items() if name != "options" and getattr(poll, name) != value}
        before = _options_of(poll)
        options = _changed_options(before, changes.get("options", before))
        _check_stage(poll, fields if options is None else {**fields, "options": options}, act.at)
        fields = _follow(poll, fields, len(before), len(before if options is None else options))

        if "opens_at" in fields:
            _check_start(fields["opens_at"], act.at)
        if fields.keys() & {"opens_at", "closes_at"}:
            notice = timedelta() if poll.published_at is None else SHORTEST_NOTICE
            _check_end(fields.get("opens_at", poll.opens_at), fields.get("closes_at", poll.closes_at), act.at + notice)
        if STEP in fields and poll.status_at(act.at) == PollStatus.OPEN:  # what is shown now stays until so many more are in
            results.hold_back(poll.pk, results.tallies_now(poll.pk), fields[STEP], act.at)
        changed = _set(poll, fields)
        _check_settings(poll, len(before if options is None else options))
        if options is not None:
            _write_options(poll, options)
            changed["options"] = (before, _options_of(poll))
        if changed:
            save(poll, act, "changed", changed)
    return poll


def delete_poll(poll_id: UUID, act: Act) -> None:
    """Delete a draft, its journal with it; raises Refusal for any other poll, for its votes may be on their way."""
    with locked(poll_id, act) as poll:
        if (status := poll.status_at(act.at)) != PollStatus.DRAFT:
            raise problems.POLL_IN_USE.says(f"Only a draft can be deleted, and this poll is {status}. Archive it.")
        with connection.cursor() as cursor:
            cursor.execute("SELECT delete_draft(%s)", [poll.pk])


def tag(poll: Poll, at: datetime) -> str:
    """Return what names this version of the poll (its ETag): another one after each change, by whomever, that can be seen."""
    return f'"{poll.version}-{poll.status_at(at)}"'


@contextmanager
def locked(poll_id: UUID, act: Act, *, against_counting: bool = False) -> Iterator[Poll]:
    """Give the poll, which nobody else changes until the end of the block's transaction; raises Refusal when it is not as `act` wants it.

    `against_counting` waits for the votes that are being counted, and holds up others: they hold the poll's key.
    """
    with transaction.atomic():
        poll = Poll.objects.select_for_update(no_key=not against_counting).filter(pk=poll_id).first()
        if poll is None:
            raise problems.UNKNOWN_POLL.says("No poll has this id.")
        if act.only_if is not None and not act.only_if & {"*", tag(poll, act.at)}:
            raise problems.CHANGED_MEANWHILE.says(f"The poll's ETag is {tag(poll, act.at)} now. Read it again, and decide anew.")
        yield poll


def move(poll: Poll, act: Act, action: str, fields: Mapping[str, Any]) -> None:
    """Set fields of a locked poll, as a new version, with an entry in the journal."""
    before = poll.status_at(act.at)
    changed = _set(poll, fields)
    if (after := poll.status_at(act.at)) != before:
        changed["status"] = (before, after)
    save(poll, act, action, changed)


def save(poll: Poll, act: Act, action: str, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Write what was changed, as a new version, with an entry in the journal."""
    poll.version += 1
    poll.save(update_fields=["version", *(changed.keys() - {"options", "status"})])
    journal.write(poll, act, action, changed)


def _set(poll: Poll, fields: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Set the fields; return {field: (before, after)} of those that were different."""
    changed = {name: (getattr(poll, name), value) for name, value in fields.items() if getattr(poll, name) != value}
    for name, (_, value) in changed.items():
        setattr(poll, name, value)
    return changed


def _check_stage(poll: Poll, changes: Mapping[str, Any], at: datetime) -> None:
    """Refuse what can't change any more."""
    status = poll.status_at(at)
    if status == PollStatus.DRAFT or (status == PollStatus.SCHEDULED and poll.opens_at > at + SHORTEST_NOTICE):
        return
    stage = "about to open" if status == PollStatus.SCHEDULED else status
    in_use = status in (PollStatus.SCHEDULED, PollStatus.OPEN)
    if refused := sorted(changes.keys() - (CHANGEABLE_WHILE_OPEN if in_use else WORDS)):
        raise problems.POLL_IN_USE.says(f"`{refused[0]}` can't change any more: the poll is {stage}.", pointer=f"/{refused[0]}")
    for name in sorted(changes.keys() & LIMITS):
        if not _is_looser(getattr(poll, name), changes[name]):
            raise problems.POLL_IN_USE.says(f"`{name}` can only be loosened any more: the poll is {stage}.", pointer=f"/{name}")
    if changes.get(STEP, poll.results_step) < poll.results_step:
        raise problems.POLL_IN_USE.says(f"`{STEP}` can only grow any more: the poll is {stage}.", pointer=f"/{STEP}")
    if (refused := sorted(changes.keys() & UNTIL_THE_FIRST_VOTE)) and Vote.objects.filter(poll_id=poll.pk).exists():
        raise problems.POLL_IN_USE.says(f"`{refused[0]}` can't change any more: the poll has votes.", pointer=f"/{refused[0]}")


def _is_looser(before: Any, after: Any) -> bool:
    """Whether a limit lets in everybody whom it let in before."""
    if isinstance(before, list):
        return set(before) <= set(after)
    return after is None or (before is not None and after > before)


def _all_choices(method: str, options: int) -> dict[str, int]:
    """Return how many options a ballot holds where nobody says it."""
    return {"min_choices": 1, "max_choices": options if method == VotingMethod.APPROVAL else 1}


def _follow(poll: Poll, fields: Mapping[str, Any], options_before: int, options: int) -> dict[str, Any]:
    """Return the fields with what follows from them: another method has other choices, "all options" stays all; it will close again."""
    if "closes_at" in fields:
        fields = {**fields, "closed_at": None}
    if "method" in fields:
        return {**_all_choices(fields["method"], options), **fields}
    if poll.method == VotingMethod.APPROVAL and poll.max_choices == options_before != options:
        return {"max_choices": options, **fields}
    return dict(fields)


def _check_settings(poll: Poll, options: int) -> None:
    """Refuse settings that contradict each other."""
    if poll.method == VotingMethod.SINGLE:
        for name in ("min_choices", "max_choices"):
            if getattr(poll, name) != 1:
                raise problems.INVALID.says("With the method `single` a ballot holds one option.", pointer=f"/{name}")
    if poll.max_choices > options:
        raise problems.INVALID.says(f"A ballot can't hold {poll.max_choices} of {options} options.", pointer="/max_choices")
    if poll.min_choices > poll.max_choices:
        raise problems.INVALID.says("`min_choices` is more than `max_choices`.", pointer="/min_choices")
    for name in ("address_limit", "subnet_limit"):
        if getattr(poll, name) is not None and poll.voter_policy == VoterPolicy.CLIENT:
            raise problems.INVALID.says("With voter_policy `client` votes come from the client's address, no voter's.", pointer=f"/{name}")


def _check_start(opens_at: datetime, at: datetime) -> None:
    if opens_at < at - CLOCK_TOLERANCE:
        raise problems.INVALID.says(f"It is {iso(at)}: a poll can't open in the past.", pointer="/opens_at")


def _check_end(opens_at: datetime, closes_at: datetime, earliest: datetime) -> None:
    if closes_at <= opens_at:
        raise problems.INVALID.says(f"A poll must close after it opens ({iso(opens_at)}).", pointer="/closes_at")
    if closes_at <= earliest:
        raise problems.INVALID.says(f"A poll must close in the future; the earliest moment is {iso(earliest)}.", pointer="/closes_at")


def _options_of(poll: Poll) -> list[dict[str, str]]:
    """Return `[{"id", "text", "description"}]`, in order."""
    return [{"id": str(option.pk), "text": option.text, "description": option.description} for option in Option.objects.filter(poll=poll)]


def _changed_options(before: list[dict[str, str]], wanted: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """Return the options that are wanted, what is not said of a known one as it was; None when that is how they are."""
    known = {option["id"]: option for option in before}
    options = [{**known.get(option.get("id", ""), {}), **option} for option in wanted]
    return None if options == before else options


def _write_options(poll: Poll, options: list[dict[str, str]]) -> None:
    """Make these the poll's options, in this order. One with an `id` keeps it, one that is not listed goes."""
    existing = {str(option.pk): option for option in poll.options.all()}
    written = []
    for position, wanted in enumerate(options, start=1):
        if "id" in wanted and wanted["id"] not in existing:
            raise problems.UNKNOWN_OPTION.says(
                "The poll has no option with this id; leave `id` out for a new one.", pointer=f"/options/{position - 1}/id"
            )
        option = existing.pop(wanted["id"]) if "id" in wanted else Option(poll=poll)
        option.text, option.description, option.position = wanted["text"], wanted.get("description", ""), position
        written.append(option)
    Option.objects.filter(pk__in=[option.pk for option in existing.values()]).delete()
    for option in written:
        option.save()
