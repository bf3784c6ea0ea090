"""Making, changing and deleting polls: what is allowed when, so that no accepted vote loses its meaning."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction

from polls import problems
from polls.models import Option, Poll, Vote
from polls.moments import iso

# A client that means "now" may have a slow clock or network.
CLOCK_TOLERANCE = timedelta(minutes=1)
# A poll that closes early still closes in the future: by then every web process has read the change, so no 202 comes after the end.
SHORTEST_NOTICE = timedelta(seconds=2 * settings.POLL_SNAPSHOT_SECONDS + 1)

# What may still change once the poll is open: nothing that says who is one voter or which vote of theirs stands.
CHANGEABLE_WHILE_OPEN = {"title", "description", "closes_at", "options"}
CHANGEABLE_WHEN_CLOSED = {"title", "description"}


def create_poll(owner: User, fields: Mapping[str, Any], at: datetime) -> Poll:
    """Store a poll and its options, `fields` as PollSerializer validates them; raises Refusal when its times are wrong."""
    fields = {"opens_at": at, **fields}
    if fields["opens_at"] < at - CLOCK_TOLERANCE:
        raise problems.INVALID.says(f"It is {iso(at)}: a poll can't open in the past.", pointer="/opens_at")
    _check_end(fields["opens_at"], fields["closes_at"], at)
    with transaction.atomic():
        poll = Poll.objects.create(owner=owner, **{name: value for name, value in fields.items() if name != "options"})
        _write_options(poll, fields["options"])
    return poll


def change_poll(poll: Poll, changes: Mapping[str, Any], at: datetime) -> Poll:
    """Apply the changes, all or none, and return the poll as it is then; raises Refusal when the poll is too far on for one of them."""
    with transaction.atomic():
        # Waits for the votes that are being counted: they hold the poll.
        poll = Poll.objects.select_for_update().get(pk=poll.pk)
        options = changes.get("options")
        fields = {name: value for name, value in changes.items() if name != "options" and getattr(poll, name) != value}
        status = poll.status_at(at)
        allowed = {"open": CHANGEABLE_WHILE_OPEN, "closed": CHANGEABLE_WHEN_CLOSED}.get(status)
        if allowed is not None and (refused := sorted({*fields, *(["options"] if options else [])} - allowed)):
            raise problems.POLL_IN_USE.says(f"`{refused[0]}` can't change any more: the poll is {status}.", pointer=f"/{refused[0]}")
        if "opens_at" in fields and fields["opens_at"] < at - CLOCK_TOLERANCE:
            raise problems.INVALID.says(f"It is {iso(at)}: a poll can't open in the past.", pointer="/opens_at")
        if "closes_at" in fields or "opens_at" in fields:
            notice = SHORTEST_NOTICE if status == "open" else timedelta()
            _check_end(fields.get("opens_at", poll.opens_at), fields.get("closes_at", poll.closes_at), at + notice)
        for name, value in fields.items():
            setattr(poll, name, value)
        poll.save(update_fields=list(fields))
        if options:
            if Vote.objects.filter(poll_id=poll.pk).exists():
                raise problems.POLL_IN_USE.says("Options can't change any more: the poll has votes.", pointer="/options")
            _write_options(poll, options)
    return poll


def delete_poll(poll: Poll, at: datetime) -> None:
    """Delete a poll that has never been open; raises Refusal otherwise, for its votes may be on their way."""
    with transaction.atomic():
        poll = Poll.objects.select_for_update().get(pk=poll.pk)
        if poll.status_at(at) != "scheduled":
            raise problems.POLL_IN_USE.says("Only a poll that has not opened yet can be deleted.")
        poll.delete()


def _check_end(opens_at: datetime, closes_at: datetime, earliest: datetime) -> None:
    if closes_at <= opens_at:
        raise problems.INVALID.says(f"A poll must close after it opens ({iso(opens_at)}).", pointer="/closes_at")
    if closes_at <= earliest:
        raise problems.INVALID.says(f"A poll must close in the future; the earliest moment is {iso(earliest)}.", pointer="/closes_at")


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
        option.text, option.position = wanted["text"], position
        written.append(option)
    Option.objects.filter(pk__in=[option.pk for option in existing.values()]).delete()
    for option in written:
        option.save()
