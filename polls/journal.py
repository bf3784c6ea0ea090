"""The journal: every change of a poll, whoever made it, written in the transaction of the change and only ever added to."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from polls import problems
from polls.models import JournalEntry, Poll
from polls.moments import iso

CLOCK = "the clock"
LONGEST_REASON = 500  # characters


@dataclass(frozen=True)
class Act:
    """Somebody's wish to change a poll: who, when, why, and which versions of the poll alone they would change (`If-Match`)."""

    actor: str
    at: datetime
    reason: str = ""
    # Tags as `editing.tag` makes them, or "*"; none: whichever version there is.
    only_if: frozenset[str] | None = None


def require_reason(act: Act) -> None:
    """Raise Refusal when the act says nothing of why, or more than anybody reads."""
    if not act.reason.strip() or len(act.reason) > LONGEST_REASON:
        raise problems.INVALID.says(f"Say why, in at most {LONGEST_REASON} characters.", pointer="/reason")


def write(poll: Poll, act: Act, action: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Add an entry; `changes` is {field: (before, after)}."""
    shown = {field: [_shown(value) for value in change] for field, change in changes.items()}
    JournalEntry.objects.create(poll=poll, at=act.at, actor=act.actor, action=action, reason=act.reason, changes=shown)


def tells_tallies(entry: JournalEntry) -> bool:
    """Return whether the entry's changes are for those alone who may read the results: what a ruling or a recount did to tallies."""
    return entry.action == "recounted" or "results" in entry.changes


def _shown(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso(value)
    return str(value) if isinstance(value, UUID) else value
