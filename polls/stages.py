"""The stages of a poll's life, as people move it through them: each move from the right stage only, and in the journal.

A stage is no column: it follows from the poll's moments (`models.status`), so a move sets moments.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib.auth.models import User

from polls import editing, problems
from polls.editing import SHORTEST_NOTICE, locked, move
from polls.journal import Act
from polls.models import Poll, PollStatus
from polls.moments import iso

# What a duplicate takes over; its options and times come beside it.
_SETTINGS = (
    "title", "description", "method", "min_choices", "max_choices", "voter_policy", "allow_change", "allow_withdrawal",
    "address_limit", "subnet_limit", "limit_mode", "allowed_networks", "auto_quarantine", "rule_parameters",
    "results_visibility", "results_step",
)  # fmt: skip


def publish_poll(poll_id: UUID, act: Act) -> Poll:
    """Make a draft a poll that everybody sees; it opens at once where its `opens_at` has passed."""
    with locked(poll_id, act) as poll:
        _refuse_unless(poll, act, PollStatus.DRAFT)
        opens_at = max(poll.opens_at, act.at)
        _refuse_end_before(poll.closes_at, max(opens_at, act.at + SHORTEST_NOTICE))
        opened_at = act.at if opens_at == act.at else None
        move(poll, act, "published", {"published_at": act.at, "opens_at": opens_at, "opened_at": opened_at})
    return poll


def open_poll(poll_id: UUID, act: Act) -> Poll:
    """Open a scheduled poll now."""
    with locked(poll_id, act) as poll:
        _refuse_unless(poll, act, PollStatus.SCHEDULED)
        move(poll, act, "opened", {"opens_at": act.at, "opened_at": act.at})
    return poll


def close_poll(poll_id: UUID, act: Act, closes_at: datetime | None = None) -> Poll:
    """Close an open poll earlier than planned: at this moment, or as soon as every web process can know."""
    with locked(poll_id, act) as poll:
        _refuse_unless(poll, act, PollStatus.OPEN)
        soonest = act.at + SHORTEST_NOTICE
        closes_at = closes_at or soonest
        if closes_at < soonest:
            raise problems.INVALID.says(f"The earliest moment is {iso(soonest)}: votes may be on their way.", pointer="/closes_at")
        if closes_at >= poll.closes_at:
            raise problems.POLL_IN_USE.says(f"The poll closes at {iso(poll.closes_at)} anyway. To have it close later, extend it.")
        move(poll, act, "closed", {"closes_at": closes_at})
    return poll


def extend_poll(poll_id: UUID, act: Act, closes_at: datetime) -> Poll:
    """Have a poll close later than planned."""
    with locked(poll_id, act) as poll:
        _refuse_unless(poll, act, PollStatus.SCHEDULED, PollStatus.OPEN)
        if closes_at <= poll.closes_at:
            raise problems.INVALID.says(f"The poll closes at {iso(poll.closes_at)} already.", pointer="/closes_at")
        editing.check_still_sealed(poll, act.at)
        # The clock may have closed it since the caller asked.
        move(poll, act, "extended", {"closes_at": closes_at, "closed_at": None})
    return poll


def reopen_poll(poll_id: UUID, act: Act, closes_at: datetime) -> Poll:
    """Let a poll whose votes are still being counted take votes again. Its results, where they show after its end, are hidden again."""
    with locked(poll_id, act) as poll:
        _refuse_unless(poll, act, PollStatus.CLOSING)
        editing.check_still_sealed(poll, act.at)
        _refuse_end_before(closes_at, act.at + SHORTEST_NOTICE)
        move(poll, act, "reopened", {"closes_at": closes_at, "closed_at": None})
    return poll


def archive_poll(poll_id: UUID, act: Act) -> Poll:
    """Put a poll out of sight, for good: a final one, or a scheduled one that has not opened for anybody yet."""
    with locked(poll_id, act) as poll:
        _refuse_unless(poll, act, PollStatus.FINAL, PollStatus.SCHEDULED)
        if poll.finalised_at is None and poll.opens_at <= act.at + SHORTEST_NOTICE:
            raise problems.POLL_IN_USE.says("The poll is about to open: votes may be on their way.")
        move(poll, act, "archived", {"archived_at": act.at})
    return poll


def duplicate_poll(poll_id: UUID, owner: User, act: Act, opens_at: datetime | None = None, closes_at: datetime | None = None) -> Poll:
    """Make a draft of the owner's with everything of this poll but its times: those given, or from now on for as long."""
    with locked(poll_id, act) as poll:
        begins_at = opens_at or act.at
        fields: dict[str, Any] = {name: getattr(poll, name) for name in _SETTINGS}
        fields["options"] = list(poll.options.values("text", "description"))
        try:
            fields |= {"opens_at": begins_at, "closes_at": closes_at or begins_at + (poll.closes_at - poll.opens_at), "draft": True}
        except OverflowError:
            raise problems.INVALID.says("That would end after the year 9999: say when.", pointer="/closes_at") from None
        return editing.create_poll(owner, fields, act.at, by=act.actor, reason=act.reason, duplicate_of=poll.pk)


def _refuse_unless(poll: Poll, act: Act, *stages: PollStatus) -> None:
    if (status := poll.status_at(act.at)) not in stages:
        raise problems.POLL_IN_USE.says(f"The poll is {status}; this takes one that is {' or '.join(stages)}.")


def _refuse_end_before(closes_at: datetime, earliest: datetime) -> None:
    if closes_at <= earliest:
        raise problems.INVALID.says(f"The poll must close after {iso(earliest)}.", pointer="/closes_at")
