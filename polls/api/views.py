"""The API's doors: shape in, one call, answer."""

from collections.abc import Callable
from typing import Any, cast

from django.contrib.auth.models import User
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiResponse, extend_schema
from rest_framework import generics, pagination, permissions, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework_simplejwt.serializers import TokenObtainPairSerializer, TokenRefreshSerializer
from rest_framework_simplejwt.views import TokenObtainPairView, TokenRefreshView

from polls import editing, problems
from polls.api.schema import refuses
from polls.api.serializers import NewPollSerializer, PollSerializer
from polls.models import Poll


class NewestFirst(pagination.CursorPagination):
    """Pages that stay right while polls are added; no page number, no total (both cost a scan)."""

    ordering = ("-created_at", "-id")
    page_size = 50
    page_size_query_param = "page_size"
    max_page_size = 200
    cursor_query_description = "Where the page begins: follow `next` and `previous` instead of making one up."
    page_size_query_description = f"Polls on a page; {page_size} if not said, {max_page_size} at most."

    def get_paginated_response_schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        address = {"type": ["string", "null"], "format": "uri"}
        return {
            "type": "object",
            "required": ["next", "previous", "results"],
            "properties": {"next": address, "previous": address, "results": schema},
        }


class OnlyItsOwnerChangesIt(permissions.BasePermission):
    """Everybody reads; a change needs the poll's owner or a superuser."""

    message = "Only the poll's owner may change it."

    def has_object_permission(self, request: Request, view: APIView, poll: Poll) -> bool:
        return request.method in permissions.SAFE_METHODS or request.user == poll.owner or request.user.is_superuser


LUNCH = {
    "title": "What shall we have for lunch?",
    "options": [{"text": "Soup"}, {"text": "Salad"}],
    "voter_policy": "ip",
    "closes_at": "2099-12-31T12:00:00Z",
}


class PollsView(generics.ListCreateAPIView[Poll]):
    queryset = Poll.objects.prefetch_related("options")
    serializer_class = PollSerializer
    pagination_class = NewestFirst

    @refuses(problems.UNAUTHENTICATED, problems.NOT_FOUND)
    @extend_schema(
        operation_id="polls_list",
        tags=["polls"],
        summary="List polls, newest first",
        responses=OpenApiResponse(PollSerializer(many=True), "A page of polls."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.NOT_JSON)
    @extend_schema(
        operation_id="polls_create",
        tags=["polls"],
        summary="Create a poll",
        request=NewPollSerializer,
        examples=[OpenApiExample("lunch", LUNCH, request_only=True)],
        responses={201: OpenApiResponse(PollSerializer, "The poll as it was created; `Location` names it.")},
    )
    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        serializer = NewPollSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        poll = editing.create_poll(cast(User, request.user), serializer.validated_data, at=now())
        shown = PollSerializer(poll).data
        return Response(shown, status.HTTP_201_CREATED, headers={"Location": shown["links"]["self"]})


class PollView(generics.RetrieveAPIView[Poll]):
    queryset = Poll.objects.select_related("owner").prefetch_related("options")
    serializer_class = PollSerializer
    permission_classes = [permissions.IsAuthenticatedOrReadOnly, OnlyItsOwnerChangesIt]
    lookup_url_kwarg = "poll_id"

    @refuses(problems.UNAUTHENTICATED, problems.NOT_FOUND)
    @extend_schema(operation_id="polls_read", tags=["polls"], summary="Read a poll", responses=OpenApiResponse(PollSerializer, "The poll."))
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.POLL_IN_USE,
        problems.NOT_JSON,
        problems.UNKNOWN_OPTION,
    )
    @extend_schema(
        operation_id="polls_change",
        tags=["polls"],
        summary="Change a poll",
        description=(
            "Before it opens everything can change. Once it is open: title, description, a later or earlier `closes_at`, and its "
            "options until the first vote."
        ),
        request=PollSerializer,
        responses=OpenApiResponse(PollSerializer, "The poll as it is now."),
    )
    def patch(self, request: Request, poll_id: str) -> Response:
        poll = self.get_object()
        serializer = PollSerializer(poll, data=request.data, partial=True)
        serializer.is_valid(raise_exception=True)
        poll = editing.change_poll(poll, serializer.validated_data, at=now())
        return Response(PollSerializer(poll).data)

    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND, problems.POLL_IN_USE)
    @extend_schema(
        operation_id="polls_delete",
        tags=["polls"],
        summary="Delete a poll that has not opened yet",
        responses={204: OpenApiResponse(None, "It is gone.")},
    )
    def delete(self, request: Request, poll_id: str) -> Response:
        editing.delete_poll(self.get_object(), at=now())
        return Response(status=status.HTTP_204_NO_CONTENT)


class SignInView(TokenObtainPairView):
    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.NOT_JSON)
    @extend_schema(
        operation_id="token_obtain",
        tags=["auth"],
        summary="Sign in",
        description="`access` is good for 15 minutes, `refresh` for 7 days.",
        responses=OpenApiResponse(TokenObtainPairSerializer, "Send `Authorization: Bearer <access>`."),
    )
    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().post(request, *args, **kwargs)


class RefreshView(TokenRefreshView):
    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.NOT_JSON)
    @extend_schema(
        operation_id="token_refresh",
        tags=["auth"],
        summary="Stay signed in",
        description="Gives another `access` token for a `refresh` token.",
        responses=OpenApiResponse(TokenRefreshSerializer, "Send `Authorization: Bearer <access>`."),
    )
    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().post(request, *args, **kwargs)


def from_this_host_only(page: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    """Keep a page from loading anything from elsewhere: ReDoc would fetch its maker's logo, Swagger UI a validator's badge."""

    def answer(request: HttpRequest) -> HttpResponseBase:
        response = page(request)
        response["Content-Security-Policy"] = (
            "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data:; worker-src blob:"
        )
        return response

    return answer
