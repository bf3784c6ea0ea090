"""Blocks: networks that the API refuses for a time."""

from datetime import datetime, timedelta
from typing import Any

from django.db.models import QuerySet
from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse, extend_schema, extend_schema_field
from rest_framework import generics, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response

from polls import blocks, problems
from polls.api.authentication import actor
from polls.api.operators import NOT_STORED, Operations, act_of
from polls.api.pages import NewestFirst
from polls.api.schema import refuses
from polls.api.serializers import NetworkField, WhySerializer, checked
from polls.models import Block

MAX_HOURS = blocks.LONGEST // timedelta(hours=1)


class BlockSerializer(serializers.ModelSerializer[Block]):
    # Wants `actor` in its context.
    id = serializers.CharField()
    case = serializers.CharField(source="case_id", allow_null=True, help_text="The case that it was made for.")
    network = serializers.SerializerMethodField()

    class Meta:
        model = Block
        fields = ["id", "network", "until", "made_at", "actor", "reason", "case"]

    @extend_schema_field({"type": ["string", "null"], "description": "Such as `192.0.2.0/24`. Null for auditors."})
    def get_network(self, block: Block) -> str | None:
        return block.network if self.context["actor"].operates else None


class NewBlockSerializer(WhySerializer):
    """A block, until a moment or for some hours."""

    network = NetworkField(help_text="An address or a network such as `192.0.2.0/24`; at most a /16, of IPv6 a /32.")
    hours = serializers.IntegerField(required=False, min_value=1, max_value=MAX_HOURS)
    until = serializers.DateTimeField(required=False, help_text="At most 366 days from now.")

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if ("hours" in attrs) == ("until" in attrs):
            raise serializers.ValidationError("Send either `hours` or `until`.")
        return attrs


def ends_at(wanted: dict[str, Any], at: datetime) -> datetime:
    """Return the end of the block that NewBlockSerializer takes."""
    return wanted["until"] if "until" in wanted else at + timedelta(hours=wanted["hours"])


class BlockPages(NewestFirst):
    ordering = ("-made_at", "-id")
    page_size_query_description = f"Blocks on a page; {NewestFirst.page_size} if not said, {NewestFirst.max_page_size} at most."


class BlocksView(Operations, generics.ListAPIView[Block]):
    serializer_class = BlockSerializer
    pagination_class = BlockPages
    queryset = Block.objects.none()

    def get_queryset(self) -> QuerySet[Block]:
        return blocks.active(now())

    def get_serializer_context(self) -> dict[str, Any]:
        return {"actor": actor(self.request)}

    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="blocks_list",
        tags=["cases"],
        summary="List the blocked networks, newest first",
        responses=OpenApiResponse(BlockSerializer(many=True), "A page of the blocks that are in force."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        answer = super().get(request, *args, **kwargs)
        answer["Cache-Control"] = "no-store"
        return answer

    @refuses(problems.MALFORMED, problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_JSON)
    @extend_schema(
        operation_id="blocks_create",
        tags=["cases"],
        summary="Block a network for a time",
        description="Its requests that change something are refused (403), but for those of API clients. Blocking it again moves the end.",
        request=NewBlockSerializer,
        examples=[OpenApiExample("day", {"network": "192.0.2.0/24", "hours": 24, "reason": "Guesses codes."}, request_only=True)],
        responses={201: OpenApiResponse(BlockSerializer, "The block. In force in every web process within two seconds.")},
    )
    def post(self, request: Request) -> Response:
        at = now()
        wanted = checked(NewBlockSerializer, request.data)
        block = blocks.block(wanted["network"], ends_at(wanted, at), act_of(request, at, wanted["reason"]))
        return Response(BlockSerializer(block, context={"actor": actor(request)}).data, status.HTTP_201_CREATED, headers=NOT_STORED)


class BlockView(Operations):
    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND)
    @extend_schema(
        operation_id="blocks_lift",
        tags=["cases"],
        summary="Let a blocked network in again",
        parameters=[OpenApiParameter("reason", str, required=True, description="For the record; 500 characters at most.")],
        responses={204: OpenApiResponse(None, "It is let in again in every web process within two seconds.")},
    )
    def delete(self, request: Request, block_id: int) -> Response:
        reason = checked(WhySerializer, request.query_params.dict())["reason"]
        blocks.lift(block_id, act_of(request, now(), reason))
        return Response(status=status.HTTP_204_NO_CONTENT)
