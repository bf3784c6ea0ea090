"""The journal: every change of a poll, whoever made it, written in the transaction of the change and only ever added to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib.postgres.fields import ArrayField
from django.db.models import Case, F, Func, Q, QuerySet, TextField, When
from django.db.models.functions import Cast, Length

from polls import problems
from polls.models import JournalEntry, Poll
from polls.moments import iso

CLOCK = "the clock"
LONGEST_REASON = 500  # characters
# What a change of these was is shown to everybody: they see the fields themselves in the poll. Of others, that there was one.
PUBLIC_FIELDS = frozenset(
    (
        *("title", "description", "options", "method", "min_choices", "max_choices", "voter_policy", "allow_change", "allow_withdrawal"),
        *("results_visibility", "opens_at", "closes_at", "status", "erratum"),
    )
)
# Characters of an entry's changes, of which anybody gets a page. Chosen: ten options with a hundred characters each, four times over.
LONGEST_PUBLIC = 10_000


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


def history(poll: Poll) -> QuerySet[JournalEntry]:
    """Return what everybody may know of the poll's journal since it was published, each entry with `changed` and `public`.

    `changed`: the names of the fields. `public`: `{field: [before, after]}`, None where it is too long to be shown.
    """
    entries = JournalEntry.objects.filter(poll=poll)
    published = entries.filter(action="published").order_by("-id").first()
    if published is not None or poll.published_at is None:  # what happened to a draft is for the people behind it
        entries = entries.filter(Q(action="created") | (Q(pk__gte=published.pk) if published else Q()))
    is_short = Q(length__lte=LONGEST_PUBLIC)
    return entries.defer("changes", "actor", "reason").annotate(
        length=Length(Cast("changes", TextField())),
        changed=Func(F("changes"), template="ARRAY(SELECT jsonb_object_keys(%(expressions)s))", output_field=ArrayField(TextField())),
        public=Case(When(is_short, then=F("changes")), default=None),
    )


# The action that is about tallies alone, and the field that holds what any other did to them.
RECOUNTED, TALLIES = "recounted", "results"


def tells_tallies(action: str, changed: Iterable[str]) -> bool:
    """Return whether an entry's changes are for those alone who may read the results: what a ruling or a recount did to tallies."""
    return action == RECOUNTED or TALLIES in changed


def _shown(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso(value)
    return str(value) if isinstance(value, UUID) else value
