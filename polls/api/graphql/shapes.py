"""The shapes of what GraphQL takes and shows: those of REST, which fill and check them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import Any, NewType
from uuid import UUID

import strawberry
from rest_framework.request import Request
from strawberry import ID, UNSET
from strawberry.scalars import JSON

from polls import editing, models, receipts, results
from polls.api import views
from polls.api.authentication import actor
from polls.api.serializers import PollSerializer
from polls.models import LimitMode, PollStatus, Reason, ResultsVisibility, VoterPolicy, VotingMethod
from polls.moments import iso


@dataclass
class Asked:
    """One request, as its fields see it. All of them see one moment."""

    request: Request
    at: datetime
    # Until when its votes may be waited for, all together (time.monotonic).
    waits_until: float


Info = strawberry.Info[Asked, None]

for _choices in (LimitMode, PollStatus, Reason, ResultsVisibility, VoterPolicy, VotingMethod):
    strawberry.enum(_choices, description="\n".join(f"- {choice.name}: {choice.label}" for choice in _choices))


def _moment(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("A moment reads like 2099-12-31T12:00:00Z.")  # noqa: TRY004 - what GraphQL takes for a bad value
    return value


# As text, both ways: the REST framework's fields read and write it.
Moment = NewType("Moment", str)
MOMENT = strawberry.scalar(
    name="DateTime", description="A moment as ISO 8601 writes it, such as 2099-12-31T12:00:00Z.", serialize=str, parse_value=_moment
)


# --- Shown ------------------------------------------------------------------------------------------------------------


@strawberry.type(description="A choice of a poll.")
class Option:
    id: ID
    text: str
    description: str
    position: int


@strawberry.enum
class FrozenText(Enum):
    TITLE = "title"
    DESCRIPTION = "description"
    TEXT = "text"


@strawberry.type
class OptionResult:
    id: ID
    text: str
    position: int
    votes: int
    share: float = strawberry.field(description="From 0 to 1 of the ballots: of an approval poll they can add up to more.")


@strawberry.type
class OptionVotes:
    id: ID
    votes: int


@strawberry.type
class ComparedResults:
    total_votes: int
    options: list[OptionVotes]


@strawberry.type(description="How the results would be with all votes that are under review, and without any; null for too few voters.")
class Review:
    as_of: Moment
    open_cases: int
    voters: int
    with_: ComparedResults | None = strawberry.field(name="with")
    without: ComparedResults | None


@strawberry.type(description="The tallies of the votes counted so far.")
class Results:
    status: PollStatus
    method: VotingMethod
    total_votes: int = strawberry.field(description="Ballots, not choices.")
    options: list[OptionResult]
    revision: int = strawberry.field(description="Grows with every change.")
    as_of: Moment
    is_final: bool = strawberry.field(description="All votes are counted; only a review still changes anything.")
    review: Review | None = strawberry.field(description="Null when no votes are under review.")


class Page:
    """Polls that are shown together: whatever it takes to show all their results, it takes once."""

    def __init__(self, polls: Sequence[models.Poll], at: datetime) -> None:
        self._polls = polls
        self._at = at

    @cached_property
    def results(self) -> Mapping[UUID, dict[str, Any]]:
        return results.read_all_results([poll.pk for poll in self._polls], self._at)


@strawberry.type(description="A question with options. Limits and version are for the people behind the poll, and null to all others.")
class Poll:
    row: strawberry.Private[models.Poll]
    page: strawberry.Private[Page]

    id: ID
    title: str
    description: str
    status: PollStatus
    options: list[Option]
    method: VotingMethod
    min_choices: int
    max_choices: int
    voter_policy: VoterPolicy
    allow_change: bool
    allow_withdrawal: bool
    results_visibility: ResultsVisibility
    results_step: int
    opens_at: Moment
    closes_at: Moment
    created_at: Moment
    errata: JSON = strawberry.field(description="What was said about its texts since they are frozen, as REST shows it; oldest first.")
    etag: str = strawberry.field(description="Names this version. As `If-Match` in a request's header: nothing changes but that version.")
    address_limit: int | None = None
    subnet_limit: int | None = None
    limit_mode: LimitMode | None = None
    allowed_networks: list[str] | None = None
    auto_quarantine: bool | None = None
    rule_parameters: JSON | None = None
    version: int | None = None

    @strawberry.field(description="Null, with an error, while they are hidden; the receipt of a vote that counted shows those for voters.")
    def results(self, info: Info, receipt: str | None = None) -> Results | None:
        has_voted = receipts.has_counted(receipt, self.row.pk) if receipt else False
        views.check_reads_results(info.context.request, self.row, info.context.at, has_voted=has_voted)
        shown = dict(self.page.results[self.row.pk])
        del shown["poll"], shown["errata"]  # the poll has them
        shown["options"] = [OptionResult(**option) for option in shown["options"]]
        return Results(**{**shown, "review": _show_review(shown["review"])})


def _show_review(shown: dict[str, Any] | None) -> Review | None:
    if shown is None:
        return None
    compared = {
        name: side and ComparedResults(total_votes=side["total_votes"], options=[OptionVotes(**option) for option in side["options"]])
        for name, side in (("with_", shown["with"]), ("without", shown["without"]))
    }
    return Review(as_of=shown["as_of"], open_cases=shown["open_cases"], voters=shown["voters"], **compared)


def show_polls(polls: Sequence[models.Poll], asked: Asked) -> list[Poll]:
    """Return the polls as REST shows them to whoever asks."""
    page = Page(polls, asked.at)
    context = {"actor": actor(asked.request), "at": asked.at}
    shown = []
    for poll in polls:
        fields = PollSerializer(poll, context=context).data
        del fields["links"]
        fields["options"] = [Option(**option) for option in fields["options"]]
        shown.append(Poll(row=poll, page=page, etag=editing.tag(poll, asked.at), **fields))
    return shown


@strawberry.type
class PollEdge:
    cursor: str
    node: Poll


@strawberry.type(description="A page of polls.")
class PollConnection:
    edges: list[PollEdge]
    page_info: strawberry.relay.PageInfo


@strawberry.enum
class VoteStatus(Enum):
    PENDING = "pending"
    COUNTED = "counted"
    SUPERSEDED = "superseded"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


@strawberry.type(description="What is known of a vote; never what was chosen.")
class Vote:
    id: ID
    receipt: str = strawberry.field(description="Tells later what became of the vote.")
    status: VoteStatus = strawberry.field(description="Until it is counted: PENDING. It can't be lost any more.")
    reason: Reason | None = strawberry.field(description="Why it does not stand.")
    accepted_at: Moment
    counted_at: Moment | None

    @staticmethod
    def of(receipt: str, status: receipts.VoteStatus) -> Vote:
        return Vote(
            id=ID(str(status.vote_id)),
            receipt=receipt,
            status=VoteStatus(status.status),
            reason=Reason(status.reason) if status.reason else None,
            accepted_at=Moment(iso(status.accepted_at)),
            counted_at=Moment(iso(status.counted_at)) if status.counted_at else None,
        )


@strawberry.type(description="A signed-in user.")
class Account:
    username: str
    email: str
    roles: list[str]


# --- Taken ------------------------------------------------------------------------------------------------------------


@strawberry.input
class NewOption:
    text: str
    description: str | None = UNSET


@strawberry.input(description="What is left out has the default that it has in REST; null is none.")
class NewPoll:
    title: str
    options: list[NewOption]
    voter_policy: VoterPolicy
    closes_at: Moment
    description: str | None = UNSET
    method: VotingMethod | None = UNSET
    min_choices: int | None = UNSET
    max_choices: int | None = UNSET
    allow_change: bool | None = UNSET
    allow_withdrawal: bool | None = UNSET
    address_limit: int | None = UNSET
    subnet_limit: int | None = UNSET
    limit_mode: LimitMode | None = UNSET
    allowed_networks: list[str] | None = UNSET
    auto_quarantine: bool | None = UNSET
    rule_parameters: JSON | None = UNSET
    results_visibility: ResultsVisibility | None = UNSET
    results_step: int | None = UNSET
    opens_at: Moment | None = UNSET
    draft: bool | None = UNSET


def given(taken: object) -> dict[str, Any]:
    """Return what of an input was given, as the REST framework reads it."""
    fields = {name: value for name, value in vars(taken).items() if value is not UNSET}
    return {name: [given(item) for item in value] if name == "options" else value for name, value in fields.items()}


@strawberry.enum
class PollOrder(Enum):
    CREATED_AT = "created_at"
    CREATED_AT_DESC = "-created_at"
    OPENS_AT = "opens_at"
    OPENS_AT_DESC = "-opens_at"
    CLOSES_AT = "closes_at"
    CLOSES_AT_DESC = "-closes_at"
    TITLE = "title"
    TITLE_DESC = "-title"
