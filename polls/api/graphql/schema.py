"""The GraphQL schema: what can be asked, and done. Each field is a door: shape in, one call, answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, cast
from uuid import UUID

import strawberry
from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth.models import User
from django.core.handlers.asgi import ASGIRequest
from django.db import close_old_connections
from graphql import GraphQLError
from rest_framework.exceptions import NotAuthenticated, ValidationError
from rest_framework.serializers import BaseSerializer
from strawberry import ID
from strawberry.extensions import DisableIntrospection, MaxTokensLimiter
from strawberry.schema.config import StrawberryConfig
from strawberry.types import ExecutionContext

from polls import accepting, editing, models, problems, receipts, stages
from polls.accepting import Accepted, Caller, Cast
from polls.api import accounts, views
from polls.api.authentication import actor
from polls.api.callers import DjangoCaller
from polls.api.filters import PollFilters
from polls.api.graphql import limits
from polls.api.graphql.limits import MAX_PAGE_SIZE, MAX_RECEIPTS, MAX_TOKENS, PAGE_SIZE
from polls.api.graphql.shapes import (
    MOMENT,
    Account,
    Asked,
    FrozenText,
    Info,
    Moment,
    NewPoll,
    Poll,
    PollConnection,
    PollEdge,
    PollOrder,
    Vote,
    given,
    show_polls,
)
from polls.api.pages import NewestFirst
from polls.api.serializers import ClosingSerializer, ExtensionSerializer, NewErratumSerializer, NewPollSerializer, ReasonSerializer, checked
from polls.models import PollStatus, VoterPolicy, VotingMethod

# Every field here may be null: one that is refused must not take the answers of its neighbours with it, least of all a vote's receipt.


@strawberry.type
class Query:
    @strawberry.field(description="The public polls, and your own, drafts and archived ones too.")
    def polls(
        self,
        info: Info,
        status: list[PollStatus] | None = None,
        voter_policy: VoterPolicy | None = None,
        method: VotingMethod | None = None,
        search: str | None = None,
        mine: bool | None = None,
        ordering: PollOrder = PollOrder.CREATED_AT_DESC,
        first: int = PAGE_SIZE,
        after: str | None = None,
    ) -> PollConnection | None:
        asked = info.context
        if not 1 <= first <= MAX_PAGE_SIZE:
            raise problems.INVALID.says(f"`first` is a number from 1 to {MAX_PAGE_SIZE}.", pointer="/first")
        wanted = {
            "status": ",".join(status or ()) or None,
            "voter_policy": voter_policy,
            "method": method,
            "search": search,
            "mine": None if mine is None else str(mine).lower(),
            "ordering": ordering.value,
        }
        visible = actor(asked.request).visible(models.Poll.objects.prefetch_related("options"), asked.at)
        filters = PollFilters({name: value for name, value in wanted.items() if value is not None}, visible, request=asked.request)
        if not filters.is_valid():
            raise ValidationError(filters.errors)
        pages = NewestFirst()
        rows = pages.cut(filters.qs, first, after, pointer="/after")
        edges = [PollEdge(cursor=pages.cursor(row), node=poll) for row, poll in zip(rows, show_polls(rows, asked), strict=True)]
        return PollConnection(
            edges=edges,
            page_info=strawberry.relay.PageInfo(
                has_next_page=pages.next_row is not None,
                has_previous_page=pages.previous_row is not None,
                start_cursor=edges[0].cursor if edges else None,
                end_cursor=edges[-1].cursor if edges else None,
            ),
        )

    @strawberry.field
    def poll(self, info: Info, id: ID) -> Poll | None:
        asked = info.context
        return show_polls([views.seen(asked.request, _poll_id(id), asked.at)], asked)[0]

    @strawberry.field(description="What became of a vote.")
    def vote(self, info: Info, receipt: str) -> Vote | None:
        [vote] = _find_votes([receipt])
        if vote is None:
            raise problems.UNKNOWN_RECEIPT.says("Use the receipt exactly as it was given.")
        return vote

    @strawberry.field(description=f"The same for up to {MAX_RECEIPTS} receipts, in their order; null for one that is none.")
    def votes(self, info: Info, receipts: list[str]) -> list[Vote | None] | None:
        if not 1 <= len(receipts) <= MAX_RECEIPTS:
            raise problems.INVALID.says(f"Send 1 to {MAX_RECEIPTS} receipts, not {len(receipts)}.", pointer="/receipts")
        return _find_votes(receipts)

    @strawberry.field(description="Who you are; null for nobody in particular.")
    def me(self, info: Info) -> Account | None:
        asks = actor(info.context.request)
        return Account(**accounts.shown(accounts.person(info.context.request), asks.roles)) if asks.user else None


@strawberry.type
class Mutation:
    @strawberry.mutation(
        description=(
            "Answered once the vote is safe. Who votes is told as in REST: by the headers `Authorization` and `Voter-Token`, by the "
            "address, by `voter` or `code`. `idempotencyKey` wins over the header `Idempotency-Key`. `waitSeconds`: how long to wait for "
            f"the outcome, {accepting.MAX_WAIT_SECONDS} at most for all votes of a request."
        )
    )
    def cast_vote(
        self,
        info: Info,
        poll_id: ID,
        option: ID | None = None,
        options: list[ID] | None = None,
        voter: str | None = None,
        code: str | None = None,
        idempotency_key: str | None = None,
        wait_seconds: int = 0,
    ) -> Vote | None:
        chosen = Cast(option, cast(list[str] | None, options), voter, code)
        return _take(info.context, _desk(info.context).accept, poll_id, chosen, idempotency_key, wait_seconds)

    @strawberry.mutation(description="Takes the voter's vote back, in polls that allow it.")
    def withdraw_vote(
        self,
        info: Info,
        poll_id: ID,
        voter: str | None = None,
        code: str | None = None,
        idempotency_key: str | None = None,
        wait_seconds: int = 0,
    ) -> Vote | None:
        nothing = Cast(voter=voter, code=code)
        return _take(info.context, _desk(info.context).withdraw, poll_id, nothing, idempotency_key, wait_seconds)

    @strawberry.mutation
    def create_poll(self, info: Info, input: NewPoll) -> Poll | None:
        asked = info.context
        _check_signed_in(asked)
        views.check_makes_polls(asked.request)
        fields = checked(NewPollSerializer, given(input))
        poll = editing.create_poll(cast(User, asked.request.user), fields, asked.at, by=actor(asked.request).name)
        return show_polls([poll], asked)[0]

    @strawberry.mutation(description="Publishes a draft. It opens at once if its `opensAt` has passed.")
    def publish_poll(self, info: Info, id: ID, reason: str = "") -> Poll | None:
        return _move(info.context, id, stages.publish_poll, ReasonSerializer, reason=reason)

    @strawberry.mutation(description="Opens a scheduled poll now.")
    def open_poll(self, info: Info, id: ID, reason: str = "") -> Poll | None:
        return _move(info.context, id, stages.open_poll, ReasonSerializer, reason=reason)

    @strawberry.mutation(description="Closes an open poll early: at `closesAt`, or as soon as every web process knows.")
    def close_poll(self, info: Info, id: ID, closes_at: Moment | None = None, reason: str = "") -> Poll | None:
        when = {} if closes_at is None else {"closes_at": closes_at}
        return _move(info.context, id, stages.close_poll, ClosingSerializer, reason=reason, **when)

    @strawberry.mutation(description="Has a scheduled or open poll close later.")
    def extend_poll(self, info: Info, id: ID, closes_at: Moment, reason: str = "") -> Poll | None:
        return _move(info.context, id, stages.extend_poll, ExtensionSerializer, reason=reason, closes_at=closes_at)

    @strawberry.mutation(description="Reopens a poll while its last votes are being counted.")
    def reopen_poll(self, info: Info, id: ID, closes_at: Moment, reason: str = "") -> Poll | None:
        return _move(info.context, id, stages.reopen_poll, ExtensionSerializer, reason=reason, closes_at=closes_at)

    @strawberry.mutation(description="Says what is wrong with a text that is frozen, of the poll or of an option. The text stays.")
    def add_erratum(self, info: Info, id: ID, field: FrozenText, text: str, reason: str, option: ID | None = None) -> Poll | None:
        asked = info.context
        _check_signed_in(asked)
        poll = views.to_change(asked.request, _poll_id(id), asked.at)
        wanted = {"field": field.value, "text": text, "reason": reason} | ({} if option is None else {"option": str(option)})
        erratum = checked(NewErratumSerializer, wanted)
        act = views.act_of(asked.request, asked.at, erratum.pop("reason"))
        return show_polls([editing.add_erratum(poll.pk, act, **erratum)], asked)[0]

    @strawberry.mutation(description="Archives a final poll, or a scheduled one, which then never opens.")
    def archive_poll(self, info: Info, id: ID, reason: str = "") -> Poll | None:
        return _move(info.context, id, stages.archive_poll, ReasonSerializer, reason=reason)


# --- Each door's steps ------------------------------------------------------------------------------------------------


def _poll_id(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise problems.UNKNOWN_POLL.says("No poll has this id.") from None


def _find_votes(asked: list[str]) -> list[Vote | None]:
    genuine = {text: receipt for text in asked if (receipt := receipts.read(text))}
    found = receipts.find_statuses(list(genuine.values()))
    return [Vote.of(text, found[genuine[text]]) if text in genuine else None for text in asked]


def _desk(asked: Asked) -> accepting.Desk:
    """Return the web process's desk, which lives in the server's event loop: `async_to_sync` runs its work there."""
    return cast(accepting.Desk, cast(ASGIRequest, asked.request._request).scope["desk"])


def _take(
    asked: Asked,
    accept: Callable[[str, Cast, Caller], Awaitable[Accepted]],
    poll_id: str,
    chosen: Cast,
    idempotency_key: str | None,
    wait_seconds: int,
) -> Vote:
    """Return the accepted vote, with its outcome where it is waited for and known in time."""
    caller = DjangoCaller(asked.request._request, idempotency_key)
    try:
        poll, vote = async_to_sync(accept)(poll_id, chosen, caller)
    finally:
        asked.request._request.rate = caller.rate or asked.request._request.rate  # type: ignore[attr-defined]
    receipt = poll.receipt_of(vote)
    status = receipt.pending()
    if (seconds := min(wait_seconds, asked.waits_until - time.monotonic())) > 0:
        close_old_connections()  # those who wait hold none: there are fewer of them than there may be people
        status = async_to_sync(_desk(asked).wait_for)(receipt, seconds)
    return Vote.of(poll.show(vote)[1], status)


def _move(asked: Asked, poll_id: str, move: Callable[..., models.Poll], takes: type[BaseSerializer[Any]], **wanted: Any) -> Poll:
    """Take a poll to another stage."""
    _check_signed_in(asked)
    poll = views.to_change(asked.request, _poll_id(poll_id), asked.at)
    fields = checked(takes, wanted)
    return show_polls([move(poll.pk, views.act_of(asked.request, asked.at, fields.pop("reason")), **fields)], asked)[0]


def _check_signed_in(asked: Asked) -> None:
    if actor(asked.request).user is None:
        raise NotAuthenticated


# --- The schema -------------------------------------------------------------------------------------------------------


class QuietSchema(strawberry.Schema):
    def process_errors(self, errors: list[GraphQLError], execution_context: ExecutionContext | None = None) -> None:
        """Leave the log to polls/api/graphql/view.py: an error's own text may hold what was sent."""


schema = QuietSchema(
    Query,
    Mutation,
    extensions=[
        limits.Limits,
        lambda: MaxTokensLimiter(max_token_count=MAX_TOKENS),
        *([] if settings.GRAPHQL_INTROSPECTION else [DisableIntrospection]),
    ],
    config=StrawberryConfig(scalar_map={Moment: MOMENT}, disable_field_suggestions=not settings.GRAPHQL_INTROSPECTION),
)


def sdl() -> str:
    """Return the schema in GraphQL's own language."""
    return schema.as_str() + "\n"
