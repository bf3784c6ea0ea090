"""The API's doors to polls: shape in, one call, answer."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, cast

from django.contrib.auth.models import User
from django.db.models import QuerySet
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import generics, status
from rest_framework.exceptions import NotAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer
from rest_framework.views import APIView

from polls import editing, journal, problems, results, stages
from polls.api.authentication import actor
from polls.api.filters import PollFilters, StrictFilters
from polls.api.pages import NewestFirst
from polls.api.schema import refuses
from polls.api.serializers import (
    ClosingSerializer,
    DuplicateSerializer,
    ExtensionSerializer,
    HistoryEntrySerializer,
    JournalEntrySerializer,
    NewErratumSerializer,
    NewPollSerializer,
    PollChangeSerializer,
    PollSerializer,
    ReasonSerializer,
    checked,
)
from polls.journal import Act
from polls.models import JournalEntry, Poll, PollStatus

LUNCH = {
    "title": "What shall we have for lunch?",
    "options": [{"text": "Soup"}, {"text": "Salad"}],
    "voter_policy": "ip",
    "closes_at": "2099-12-31T12:00:00Z",
}
DINNER = {
    "title": "What may be on the menu?",
    "options": [{"text": "Soup", "description": "Leek and potato"}, {"text": "Salad"}, {"text": "Noodles"}],
    "method": "approval",
    "voter_policy": "account",
    "allow_change": True,
    "results_visibility": "after_close",
    "closes_at": "2099-12-31T12:00:00Z",
    "draft": True,
}
ETAG = OpenApiParameter("ETag", str, OpenApiParameter.HEADER, response=[200, 201], description="Names this version of the poll.")
IF_MATCH = OpenApiParameter(
    "If-Match", str, OpenApiParameter.HEADER, description="ETags of the poll as you have read it: if it is another by now, nothing changes."
)
IF_NONE_MATCH = OpenApiParameter("If-None-Match", str, OpenApiParameter.HEADER, description="The ETag of what you have.")
# How long anybody may keep a page of a poll's history (seconds). Chosen: a stranger's reload costs nothing, and news is soon there.
HISTORY_SECONDS = 5
LOCATION = OpenApiParameter("Location", str, OpenApiParameter.HEADER, response=[201], description="Where the poll is.")


class PollsView(generics.ListCreateAPIView[Poll]):
    serializer_class = PollSerializer
    pagination_class = NewestFirst
    filter_backends = [StrictFilters]
    filterset_class = PollFilters

    def get_queryset(self) -> QuerySet[Poll]:
        polls = Poll.objects.prefetch_related("options")
        return polls if getattr(self, "swagger_fake_view", False) else actor(self.request).visible(polls, at=now())

    def get_serializer_context(self) -> dict[str, Any]:
        return {"actor": actor(self.request), "at": now()}

    @refuses(problems.INVALID, problems.UNAUTHENTICATED)
    @extend_schema(
        operation_id="polls_list",
        tags=["polls"],
        summary="List polls",
        description="The public ones, and your own, drafts and archived ones too. A parameter that does not exist is refused.",
        responses=OpenApiResponse(PollSerializer(many=True), "A page of polls."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        answer = super().get(request, *args, **kwargs)
        answer["Vary"] = "Authorization"
        return answer

    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_JSON)
    @extend_schema(
        operation_id="polls_create",
        tags=["polls"],
        summary="Create a poll",
        parameters=[ETAG, LOCATION],
        request=NewPollSerializer,
        examples=[OpenApiExample("lunch", LUNCH, request_only=True), OpenApiExample("dinner", DINNER, request_only=True)],
        responses={201: OpenApiResponse(PollSerializer, "The poll as it was created.")},
    )
    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        check_makes_polls(request)
        fields, at = checked(NewPollSerializer, request.data), now()
        poll = editing.create_poll(cast(User, request.user), fields, at, by=actor(request).name)
        return _show(request, poll, at, status.HTTP_201_CREATED)


class PollView(APIView):
    @refuses(problems.UNAUTHENTICATED, problems.NOT_FOUND, problems.UNKNOWN_POLL)
    @extend_schema(
        operation_id="polls_read",
        tags=["polls"],
        summary="Read a poll",
        description="Limits and version are shown to the people behind the poll only.",
        parameters=[IF_NONE_MATCH, ETAG],
        responses={200: OpenApiResponse(PollSerializer, "The poll."), 304: OpenApiResponse(None, "You have it already.")},
    )
    def get(self, request: Request, poll_id: str) -> Response:
        at = now()
        return _show(request, seen(request, poll_id, at), at)

    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.POLL_IN_USE,
        problems.CHANGED_MEANWHILE,
        problems.NOT_JSON,
        problems.UNKNOWN_OPTION,
    )
    @extend_schema(
        operation_id="polls_change",
        tags=["polls"],
        summary="Change a poll",
        description=(
            "Until shortly before it opens everything can change; `results_visibility` by an API client with the scopes `polls:write` and "
            "`results:read` only. Once it is open: `closes_at`; limits and allowed networks, but only to let in more; `auto_quarantine` "
            "off, and `rule_parameters` without those of a rule, which then has the installation's. Once it is closed: nothing. What is "
            "wrong with a text then is said in an erratum. Options are listed in their order; one with its `id` stays the same option."
        ),
        parameters=[IF_MATCH, ETAG],
        request=PollChangeSerializer,
        responses=OpenApiResponse(PollSerializer, "The poll as it is now."),
    )
    def patch(self, request: Request, poll_id: str) -> Response:
        at = now()
        poll = to_change(request, poll_id, at)
        changes = checked(PollChangeSerializer, request.data, partial=True)
        act = act_of(request, at, changes.pop("reason", ""))
        if changes.get("results_visibility", poll.results_visibility) != poll.results_visibility:
            check_chooses_readers(request, poll)
        return _show(request, editing.change_poll(poll.pk, changes, act), at)

    @refuses(
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.POLL_IN_USE,
        problems.CHANGED_MEANWHILE,
    )
    @extend_schema(
        operation_id="polls_delete",
        tags=["polls"],
        summary="Delete a draft",
        description="Any other poll can be archived instead.",
        parameters=[IF_MATCH],
        responses={204: OpenApiResponse(None, "It is gone.")},
    )
    def delete(self, request: Request, poll_id: str) -> Response:
        at = now()
        editing.delete_poll(to_change(request, poll_id, at).pk, act_of(request, at))
        return Response(status=status.HTTP_204_NO_CONTENT)


# --- Stages -----------------------------------------------------------------------------------------------------------


def _stage(
    name: str, summary: str, description: str, move: Callable[..., Poll], takes: type[BaseSerializer[Any]] = ReasonSerializer
) -> type[APIView]:
    """Make the door to a move to another stage."""

    class StageView(APIView):
        @refuses(
            problems.MALFORMED,
            problems.INVALID,
            problems.UNAUTHENTICATED,
            problems.FORBIDDEN,
            problems.NOT_FOUND,
            problems.UNKNOWN_POLL,
            problems.POLL_IN_USE,
            problems.CHANGED_MEANWHILE,
            problems.NOT_JSON,
        )
        @extend_schema(
            operation_id=f"polls_{name}",
            tags=["polls"],
            summary=summary,
            description=description,
            parameters=[IF_MATCH, ETAG],
            request=takes,
            responses=OpenApiResponse(PollSerializer, "The poll as it is now."),
        )
        def post(self, request: Request, poll_id: str) -> Response:
            at = now()
            poll = to_change(request, poll_id, at)
            wanted = checked(takes, request.data)
            return _show(request, move(poll.pk, act_of(request, at, wanted.pop("reason")), **wanted), at)

    return StageView


PublishView = _stage(
    "publish", "Publish a draft", "From then on everybody sees it. It opens at once if its `opens_at` has passed.", stages.publish_poll
)
OpenView = _stage("open", "Open a scheduled poll now", "It takes votes within two seconds.", stages.open_poll)
CloseView = _stage(
    "close",
    "Close an open poll early",
    "Not at once, but as soon as every web process knows, so that no accepted vote comes after the end.",
    stages.close_poll,
    ClosingSerializer,
)
ExtendView = _stage("extend", "Have a poll close later", "For scheduled and open polls.", stages.extend_poll, ExtensionSerializer)
ReopenView = _stage(
    "reopen",
    "Reopen a poll that has just closed",
    "While its last votes are being counted; never once it is final.",
    stages.reopen_poll,
    ExtensionSerializer,
)
ArchiveView = _stage(
    "archive",
    "Archive a poll",
    "For final polls, and for scheduled ones, which then never open. It leaves the lists; its results stay.",
    stages.archive_poll,
)


class DuplicateView(APIView):
    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.CHANGED_MEANWHILE,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="polls_duplicate",
        tags=["polls"],
        summary="Duplicate a poll",
        description="A new draft of your own with all its settings and options, but without its votes and voter codes.",
        parameters=[IF_MATCH, ETAG, LOCATION],
        request=DuplicateSerializer,
        responses={201: OpenApiResponse(PollSerializer, "The draft.")},
    )
    def post(self, request: Request, poll_id: str) -> Response:
        at = now()
        poll = _seen_inside(request, poll_id, at)
        check_makes_polls(request)
        wanted = checked(DuplicateSerializer, request.data)
        act = act_of(request, at, wanted.pop("reason"))
        return _show(request, stages.duplicate_poll(poll.pk, cast(User, request.user), act, **wanted), at, status.HTTP_201_CREATED)


class ErrataView(APIView):
    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.POLL_IN_USE,
        problems.CHANGED_MEANWHILE,
        problems.NOT_JSON,
        problems.UNKNOWN_OPTION,
    )
    @extend_schema(
        operation_id="errata_add",
        tags=["polls"],
        summary="Say what is wrong with a text of an open poll",
        description=(
            "Texts are frozen once the poll opens. The old one stays; the erratum is shown beside it, with its time, in poll, results and "
            f"stream. At most {editing.MAX_ERRATA} of a poll, which can't be changed or taken back. Repeatable."
        ),
        parameters=[IF_MATCH, ETAG, LOCATION],
        request=NewErratumSerializer,
        examples=[
            OpenApiExample("title", {"field": "title", "text": "What shall we have for dinner?", "reason": "A slip."}, request_only=True)
        ],
        responses={201: OpenApiResponse(PollSerializer, "The poll as it is now.")},
    )
    def post(self, request: Request, poll_id: str) -> Response:
        at = now()
        poll = to_change(request, poll_id, at)
        erratum = checked(NewErratumSerializer, request.data)
        act = act_of(request, at, erratum.pop("reason"))
        return _show(request, editing.add_erratum(poll.pk, act, **erratum), at, status.HTTP_201_CREATED)


# --- What happened, and what came of it -------------------------------------------------------------------------------


class LatestFirst(NewestFirst):
    ordering = ("-id",)
    page_size_query_description = f"Entries on a page; {NewestFirst.page_size} if not said, {NewestFirst.max_page_size} at most."


class JournalView(generics.ListAPIView[JournalEntry]):
    serializer_class = JournalEntrySerializer
    pagination_class = LatestFirst
    queryset = JournalEntry.objects.none()

    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND, problems.UNKNOWN_POLL)
    @extend_schema(
        operation_id="journal_list",
        tags=["polls"],
        summary="Read a poll's journal, latest first",
        description="Every change: who, when, why, and what it was before. For the people behind the poll, and auditors.",
        responses=OpenApiResponse(JournalEntrySerializer(many=True), "A page of the journal."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        answer = super().get(request, *args, **kwargs)
        answer["Cache-Control"] = "no-store"
        return answer

    def get_queryset(self) -> QuerySet[JournalEntry]:
        if getattr(self, "swagger_fake_view", False):
            return JournalEntry.objects.none()
        at = now()
        poll = _seen_inside(self.request, self.kwargs["poll_id"], at)
        self.reads_tallies = actor(self.request).reads_results(poll, at) and not results.are_held_back(poll.pk)
        return JournalEntry.objects.filter(poll=poll)

    def get_serializer_context(self) -> dict[str, Any]:
        return {"reads_tallies": self.reads_tallies}


class HistoryPages(LatestFirst):
    max_page_size = LatestFirst.page_size
    page_size_query_description = f"Entries on a page; {max_page_size} at most, and if not said."


class HistoryView(generics.ListAPIView[JournalEntry]):
    serializer_class = HistoryEntrySerializer
    pagination_class = HistoryPages
    queryset = JournalEntry.objects.none()

    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.NOT_FOUND, problems.UNKNOWN_POLL)
    @extend_schema(
        operation_id="history_list",
        tags=["polls"],
        summary="Read what happened to a poll, latest first",
        description=(
            "For everybody who sees the poll: when it was made, published, opened, closed, extended, what of it changed, what errata there "
            "are, and that votes were held, put back or voided. Without names and reasons, and of fields that only the people behind the "
            "poll see, without their values. What happened to a draft stays with them."
        ),
        responses=OpenApiResponse(HistoryEntrySerializer(many=True), "A page of the history."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        answer = super().get(request, *args, **kwargs)
        answer["Cache-Control"] = "no-store" if self.poll.status_at(self.at) == PollStatus.DRAFT else f"public, max-age={HISTORY_SECONDS}"
        answer["Vary"] = "Authorization"
        return answer

    def get_queryset(self) -> QuerySet[JournalEntry]:
        if getattr(self, "swagger_fake_view", False):
            return JournalEntry.objects.none()
        self.at = now()
        self.poll = seen(self.request, self.kwargs["poll_id"], self.at)
        return journal.history(self.poll)


@extend_schema(exclude=True)  # polls/api/schema.py describes the address, which polls/intake.py answers where the results are public
class ResultsView(APIView):
    """Results for those who may see them before everybody does."""

    def get(self, request: Request, poll_id: str) -> Response:
        at = now()
        poll = seen(request, poll_id, at)
        check_reads_results(request, poll, at)
        read = results.read_results(poll.pk, at)
        if read is None:
            raise problems.UNKNOWN_POLL.says("No poll has this id.")
        return Response(read, headers={"Cache-Control": "no-store"})


# --- Each door's steps ------------------------------------------------------------------------------------------------


def seen(request: Request, poll_id: str, at: datetime) -> Poll:
    """Return the poll, if the caller sees that it is there."""
    poll = Poll.objects.prefetch_related("options").filter(pk=poll_id).first()
    if poll is None or not actor(request).sees(poll, at):
        raise problems.UNKNOWN_POLL.says("No poll has this id.")
    return poll


def to_change(request: Request, poll_id: str, at: datetime) -> Poll:
    poll = seen(request, poll_id, at)
    if not actor(request).changes(poll):
        raise problems.FORBIDDEN.says("Only the poll's owner may change it.")
    return poll


def check_makes_polls(request: Request) -> None:
    if not actor(request).makes_polls:
        raise problems.FORBIDDEN.says("Making polls takes the role `owner`, and an API client the scope `polls:write`.")


def check_chooses_readers(request: Request, poll: Poll) -> None:
    if not actor(request).chooses_readers(poll):
        raise problems.FORBIDDEN.says("Changing who reads the results takes the scopes `polls:write` and `results:read`.")


def check_reads_results(request: Request, poll: Poll, at: datetime, *, has_voted: bool = False) -> None:
    if not actor(request).reads_results(poll, at, has_voted=has_voted):
        raise problems.RESULTS_HIDDEN.says(f"The results of this poll are for: {poll.get_results_visibility_display()}.")


def _seen_inside(request: Request, poll_id: str, at: datetime) -> Poll:
    poll = seen(request, poll_id, at)
    if actor(request).user is None:
        raise NotAuthenticated
    if not actor(request).reads_journal(poll):
        raise problems.FORBIDDEN.says("This is for the people behind the poll only.")
    return poll


_TAG = r'(?:W/)?"[\x21\x23-\x7e]*"'
_TAGS = re.compile(rf"\s*{_TAG}(?:\s*,\s*{_TAG})*\s*")


def act_of(request: Request, at: datetime, reason: str = "") -> Act:
    """Return what the caller wishes: with `If-Match`, only while the poll is as they have read it."""
    wanted = request.headers.get("If-Match")
    if wanted is None:
        return Act(actor(request).name, at, reason)
    if wanted.strip() == "*":
        return Act(actor(request).name, at, reason, frozenset("*"))
    if not _TAGS.fullmatch(wanted):
        raise problems.INVALID.says('`If-Match` takes `*`, or ETags as they were sent, such as "3-open".')
    return Act(actor(request).name, at, reason, frozenset(re.findall(_TAG, wanted)))


def _show(request: Request, poll: Poll, at: datetime, code: int = status.HTTP_200_OK) -> Response:
    tag = editing.tag(poll, at)
    headers = {"ETag": tag, "Vary": "Authorization", "Cache-Control": "no-cache"}
    if request.method in ("GET", "HEAD") and _is_known(tag, request.headers.get("If-None-Match", "")):
        return Response(status=status.HTTP_304_NOT_MODIFIED, headers=headers)
    if code == status.HTTP_201_CREATED:
        headers["Location"] = f"/api/v1/polls/{poll.pk}"
    return Response(PollSerializer(poll, context={"actor": actor(request), "at": at}).data, code, headers=headers)


def _is_known(tag: str, wanted: str) -> bool:
    return wanted.strip() == "*" or tag in re.findall(r'"[^"]*"', wanted)  # weak or not: RFC 9110, 13.1.2


def styled_by_scripts(page: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Let a page's scripts write styles, and search in a thread of their own. No script may stand inside the page all the same."""

    def answer(request: HttpRequest) -> HttpResponseBase:
        response = page(request)
        sources = {"style-src": ["'self'", "'unsafe-inline'"], "worker-src": ["blob:"]}
        response.more_sources = sources  # type: ignore[attr-defined] # for core/middleware.py
        return response

    return answer
