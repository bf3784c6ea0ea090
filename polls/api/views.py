"""The API's doors: shape in, one call, answer."""

from typing import Any, cast

from django.contrib.auth.models import User
from django.utils.timezone import now
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import generics, pagination, permissions, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from polls import editing
from polls.api.schema import problem_answers
from polls.api.serializers import NewPollSerializer, PollSerializer
from polls.models import Poll


class NewestFirst(pagination.CursorPagination):
    """Pages that stay right while polls are added; no page number, no total (both cost a scan)."""

    ordering = ("-created_at", "-id")
    page_size = 50
    page_size_query_param = "page_size"
    max_page_size = 200


class OnlyItsOwnerChangesIt(permissions.BasePermission):
    """Everybody reads; a change needs the poll's owner or a superuser."""

    message = "Only the poll's owner may change it."

    def has_object_permission(self, request: Request, view: APIView, poll: Poll) -> bool:
        return request.method in permissions.SAFE_METHODS or request.user == poll.owner or request.user.is_superuser


@extend_schema_view(
    get=extend_schema(
        operation_id="polls_list", summary="List polls, newest first", responses={200: PollSerializer, **problem_answers(404, 406)}
    )
)
class PollsView(generics.ListCreateAPIView[Poll]):
    queryset = Poll.objects.prefetch_related("options")
    serializer_class = PollSerializer
    pagination_class = NewestFirst

    @extend_schema(
        operation_id="polls_create",
        summary="Create a poll",
        request=NewPollSerializer,
        responses={201: PollSerializer, **problem_answers(400, 401, 406, 415)},
    )
    def post(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        serializer = NewPollSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        poll = editing.create_poll(cast(User, request.user), serializer.validated_data, at=now())
        shown = PollSerializer(poll).data
        return Response(shown, status.HTTP_201_CREATED, headers={"Location": shown["links"]["self"]})


@extend_schema_view(
    get=extend_schema(operation_id="polls_read", summary="Read a poll", responses={200: PollSerializer, **problem_answers(404, 406)})
)
class PollView(generics.RetrieveAPIView[Poll]):
    queryset = Poll.objects.select_related("owner").prefetch_related("options")
    serializer_class = PollSerializer
    permission_classes = [permissions.IsAuthenticatedOrReadOnly, OnlyItsOwnerChangesIt]
    lookup_url_kwarg = "poll_id"

    @extend_schema(
        operation_id="polls_change",
        summary="Change a poll",
        request=PollSerializer,
        responses={200: PollSerializer, **problem_answers(400, 401, 403, 404, 406, 409, 415, 422)},
    )
    def patch(self, request: Request, poll_id: str) -> Response:
        poll = self.get_object()
        serializer = PollSerializer(poll, data=request.data, partial=True)
        serializer.is_valid(raise_exception=True)
        poll = editing.change_poll(poll, serializer.validated_data, at=now())
        return Response(PollSerializer(poll).data)

    @extend_schema(
        operation_id="polls_delete",
        summary="Delete a poll that has not opened yet",
        responses={204: None, **problem_answers(401, 403, 404, 406, 409)},
    )
    def delete(self, request: Request, poll_id: str) -> Response:
        editing.delete_poll(self.get_object(), at=now())
        return Response(status=status.HTTP_204_NO_CONTENT)
