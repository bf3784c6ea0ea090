"""What operators look at, and what they do to queues: have dead letters counted after all."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework import permissions, serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from polls import deadletters, problems
from polls.api.authentication import actor
from polls.api.schema import refuses
from polls.api.serializers import StrictSerializer, checked
from polls.journal import Act
from polls.models import OutboxBundle

NOT_STORED = {"Cache-Control": "no-store"}
# Dead letters that one request replays at most: a few seconds' work.
MAX_REPLAYED = 1000


class QueueSerializer(serializers.Serializer[Any]):
    name = serializers.CharField(help_text="With the installation's QUEUE_PREFIX.")
    ready = serializers.IntegerField(help_text="Messages that no worker has taken yet.")
    consumers = serializers.IntegerField(help_text="Workers that take from it; nobody takes from votes.dead.")


class OutboxSerializer(serializers.Serializer[Any]):
    bundles = serializers.IntegerField(help_text="Bundles of votes that wait in the database, because the broker could not take them.")


class QueuesSerializer(serializers.Serializer[Any]):
    queues = QueueSerializer(many=True)
    outbox = OutboxSerializer()


class PollInsideSerializer(serializers.Serializer[Any]):
    id = serializers.UUIDField()
    title = serializers.CharField(allow_null=True, help_text="Null when the poll was deleted.")
    votes = serializers.IntegerField()


class FaultSerializer(serializers.Serializer[Any]):
    item = serializers.IntegerField(allow_null=True, help_text="Its place in the bundle, from 0; null for the whole message.")
    why = serializers.CharField()


class DeadLetterSerializer(serializers.Serializer[Any]):
    """Never its contents: no voter, no choice, no address."""

    message_id = serializers.CharField()
    reason = serializers.CharField(help_text="`rejected`: not all of it could be counted. `delivery_limit`: its worker died too often.")
    died_at = serializers.DateTimeField(allow_null=True)
    size = serializers.IntegerField(help_text="Bytes.")
    votes = serializers.IntegerField(allow_null=True, help_text="Votes that can be read in it; null where it is no bundle at all.")
    unreadable = serializers.IntegerField(allow_null=True, help_text="Items in it that can't be read.")
    pending = serializers.IntegerField(help_text="Votes that can be read and have no outcome yet: a replay is for them.")
    polls = PollInsideSerializer(many=True, help_text="Whose votes they are, most votes first.")
    faults = FaultSerializer(many=True, help_text=f"What can't be read, and why; the first {deadletters.MOST_FAULTS}.")


class DeadLettersSerializer(serializers.Serializer[Any]):
    total = serializers.IntegerField()
    letters = DeadLetterSerializer(many=True, help_text="The oldest hundred.")


class ReplaySerializer(StrictSerializer):
    most = serializers.IntegerField(
        required=False, min_value=1, max_value=MAX_REPLAYED, default=MAX_REPLAYED, help_text="The oldest so many."
    )


class NothingSerializer(StrictSerializer):
    """No field, in a body or without one."""


class ReplayedSerializer(serializers.Serializer[Any]):
    replayed = serializers.IntegerField()


class Operations(APIView):
    permission_classes = [permissions.IsAuthenticated]

    def check_permissions(self, request: Request) -> None:
        super().check_permissions(request)
        asks = actor(request)
        if not (asks.operates or (asks.audits and request.method in permissions.SAFE_METHODS)):
            raise problems.FORBIDDEN.says("This is for operators.")


def act_of(request: Request, at: datetime, reason: str) -> Act:
    return Act(actor(request).name, at, reason)


class QueuesView(Operations):
    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="queues_read",
        tags=["operations"],
        summary="Read what waits in the queues and in the outbox",
        responses=OpenApiResponse(QueuesSerializer, "The queues as the broker tells of them."),
    )
    def get(self, request: Request) -> Response:
        with broker_asked():
            queues = deadletters.survey()
        return Response(QueuesSerializer({"queues": queues, "outbox": {"bundles": OutboxBundle.objects.count()}}).data)


class DeadLettersView(Operations):
    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="dead_letters_list",
        tags=["operations"],
        summary="Look at the dead letters",
        description="They stay where they are. Never what is in them.",
        responses=OpenApiResponse(DeadLettersSerializer, "How many there are, and the oldest of them."),
    )
    def get(self, request: Request) -> Response:
        with broker_asked():
            found = {"total": deadletters.count(), "letters": deadletters.peek()}
        return Response(DeadLettersSerializer(found).data)


class ReplayView(Operations):
    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_JSON)
    @extend_schema(
        operation_id="dead_letters_replay",
        tags=["operations"],
        summary="Have dead letters counted after all",
        description=(
            f"Sends them back to the queue of votes, oldest first, at most {MAX_REPLAYED} a request. Safe to repeat: no vote counts "
            "twice. What still can't be counted comes back. After a 503 some may have been replayed, and none is lost."
        ),
        request=ReplaySerializer,
        responses=OpenApiResponse(ReplayedSerializer, "How many were sent."),
    )
    def post(self, request: Request) -> Response:
        wanted = checked(ReplaySerializer, request.data)
        with broker_asked():
            replayed = deadletters.replay(wanted["most"])
        return Response(ReplayedSerializer({"replayed": replayed}).data)


class ReplayOneView(Operations):
    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="dead_letters_replay_one",
        tags=["operations"],
        summary="Have one dead letter counted after all",
        description=(
            f"By its `message_id`, among the oldest {deadletters.MOST_LOOKED_THROUGH:,}. Safe to repeat: no vote counts twice; once it was "
            "sent, the answer is 404 until it comes back because it still can't be counted. Letters without an id are replayed with all."
        ),
        request=NothingSerializer,
        responses=OpenApiResponse(ReplayedSerializer, "How many were sent: after a replay that broke off a letter may be there twice."),
    )
    def post(self, request: Request, message_id: str) -> Response:
        checked(NothingSerializer, request.data)
        with broker_asked():
            replayed = deadletters.replay_one(message_id)
        if not replayed:
            raise problems.NOT_FOUND.says("No dead letter has this id; it may have been replayed.")
        return Response(ReplayedSerializer({"replayed": replayed}).data)


@contextmanager
def broker_asked() -> Iterator[None]:
    """Answer 503 where the broker does not answer in time."""
    try:
        yield
    except deadletters.UnreachableError as exc:
        raise problems.UNAVAILABLE.says(str(exc), headers={"Retry-After": "5"}) from exc
