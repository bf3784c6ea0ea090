"""Rulings on a poll's votes: by a rule, a network or a time."""

from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiResponse, extend_schema, extend_schema_field
from rest_framework import generics, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response

from polls import cases, problems, review
from polls.api.authentication import actor
from polls.api.cases import CHANGES, DecisionSerializer, readable
from polls.api.operators import NOT_STORED, Operations, act_of
from polls.api.pages import NewestFirst
from polls.api.schema import refuses
from polls.api.serializers import NetworkField, StrictSerializer, checked
from polls.holds import Selector
from polls.models import Decision, Poll, Ruling


class RulingSerializer(StrictSerializer):
    """A ruling on all votes of a poll's cases by one rule, or on those from a network, within a time, or both."""

    ruling = serializers.ChoiceField(choices=[(ruling.value, ruling.label) for ruling in review.ON_VOTES])
    rule = serializers.CharField(required=False, max_length=30, help_text="The votes of all its cases that are open or confirmed.")
    address = NetworkField(required=False, help_text="One address.")
    subnet = NetworkField(required=False, help_text="A /24, of IPv6 a /64.")
    accepted_from = serializers.DateTimeField(required=False)
    accepted_until = serializers.DateTimeField(required=False, help_text="Not included.")
    reason = serializers.CharField(max_length=500, help_text="For the record, on which a dry run is, too.")
    dry_run = serializers.BooleanField(default=False, help_text="True: say what it would change, and change nothing.")

    def validate_address(self, network: str) -> str:
        address, _, length = network.partition("/")
        if length != ("128" if ":" in address else "32"):
            raise serializers.ValidationError("This is more than one address: send it as `subnet`.")
        return address

    def validate_subnet(self, network: str) -> str:
        address, _, length = network.partition("/")
        if length != ("64" if ":" in address else "24"):
            raise serializers.ValidationError("A subnet is a /24, of IPv6 a /64.")
        return address

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        of_network = attrs.keys() & {"address", "subnet"}
        of_time = attrs.keys() & {"accepted_from", "accepted_until"}
        if "rule" in attrs and (of_network or of_time):
            raise serializers.ValidationError("Send either a `rule`, or a network and times.")
        if not ("rule" in attrs or of_network or len(of_time) == 2):
            raise serializers.ValidationError("Say which votes: `rule`, `address`, `subnet`, or `accepted_from` and `accepted_until`.")
        if len(of_network) == 2:
            raise serializers.ValidationError("Send either `address` or `subnet`.")
        if len(of_time) == 2 and attrs["accepted_from"] >= attrs["accepted_until"]:
            raise serializers.ValidationError({"accepted_until": ["This is not after `accepted_from`."]})
        return attrs


class ImaginedSerializer(serializers.Serializer[Any]):
    """What a ruling would do."""

    votes = serializers.IntegerField(help_text="Votes that it is about, whatever became of them.")
    voters = serializers.IntegerField()
    changes = serializers.SerializerMethodField()

    @extend_schema_field(CHANGES)
    def get_changes(self, imagined: review.Imagined) -> dict[str, tuple[int, int]] | None:
        return None if imagined.changes is None else {str(option): change for option, change in imagined.changes.items()}


class DecisionPages(NewestFirst):
    ordering = ("-id",)  # type: ignore[assignment]
    page_size_query_description = f"Decisions on a page; {NewestFirst.page_size} if not said, {NewestFirst.max_page_size} at most."


class RulingsView(Operations, generics.ListAPIView[Decision]):
    serializer_class = DecisionSerializer
    pagination_class = DecisionPages
    queryset = Decision.objects.none()

    def get_serializer_context(self) -> dict[str, Any]:
        return {"reads_results": readable(self.request, now())}

    def get_queryset(self) -> QuerySet[Decision]:
        if getattr(self, "swagger_fake_view", False):
            return Decision.objects.none()
        return Decision.objects.filter(poll_id=_poll(self.kwargs["poll_id"]).pk)

    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND, problems.UNKNOWN_POLL)
    @extend_schema(
        operation_id="rulings_list",
        tags=["cases"],
        summary="Read what was decided about a poll's votes, and who looked, latest first",
        description="Who, when, why, and what it changed. Nobody can change or delete it.",
        responses=OpenApiResponse(DecisionSerializer(many=True), "A page of decisions."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        answer = super().get(request, *args, **kwargs)
        answer["Cache-Control"] = "no-store"
        return answer

    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.NOT_OFFERED,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="rulings_create",
        tags=["cases"],
        summary="Hold votes of a poll out of the tally, or put them back",
        description=(
            "By rule, address, subnet, time, or network and time together: all votes that fit, and those still to come. A network is known "
            "among the votes since the poll's keys were last changed. Repeatable. A dry run changes nothing, and is on record, too."
        ),
        request=RulingSerializer,
        examples=[
            OpenApiExample("rule", {"ruling": "void", "rule": "busy_ipv4_subnet", "reason": "All by one script."}, request_only=True),
            OpenApiExample(
                "subnet",
                {
                    "ruling": "quarantine",
                    "subnet": "192.0.2.0/24",
                    "accepted_from": "2099-12-31T11:00:00Z",
                    "dry_run": True,
                    "reason": "How much is it?",
                },
                request_only=True,
            ),
        ],
        responses={
            200: OpenApiResponse(ImaginedSerializer, "Of a dry run: what it would change."),
            201: OpenApiResponse(DecisionSerializer, "The decision, and what it changed."),
        },
    )
    def post(self, request: Request, poll_id: UUID) -> Response:
        wanted = checked(RulingSerializer, request.data)
        poll, ruling, at = _poll(poll_id), Ruling(wanted["ruling"]), now()
        act = act_of(request, at, wanted["reason"])
        if wanted["dry_run"]:
            about = list(cases.of_rule(poll.pk, wanted["rule"])) if "rule" in wanted else []
            selectors = [Selector.of_case(case) for case in about] if "rule" in wanted else _selectors(poll, wanted)
            reads_results = actor(request).reads_results(poll, at)
            imagined = review.look(poll.pk, selectors, ruling, act, [case.pk for case in about], reads_results=reads_results)
            return Response(ImaginedSerializer(imagined).data, headers=NOT_STORED)
        if "rule" in wanted:
            decision = review.rule_on_rule(poll.pk, wanted["rule"], ruling, act)
        else:
            decision = review.rule(poll.pk, _selectors(poll, wanted), ruling, act)
        context = {"reads_results": readable(request, at)}
        return Response(DecisionSerializer(decision, context=context).data, status.HTTP_201_CREATED, headers=NOT_STORED)


def _poll(poll_id: UUID) -> Poll:
    poll = Poll.objects.select_related("network_secret").filter(pk=poll_id).first()
    if poll is None:
        raise problems.UNKNOWN_POLL.says("No poll has this id.")
    return poll


def _selectors(poll: Poll, wanted: dict[str, Any]) -> list[Selector]:
    """Return which votes a network and times mean. Raises Refusal where no network can be told."""
    times = {name: wanted.get(name) for name in ("accepted_from", "accepted_until")}
    network = wanted.get("address") or wanted.get("subnet")
    if network is None:
        return [Selector(**times)]
    address_key, subnet_key = cases.keys_in(poll, network)
    return [Selector(address_key if "address" in wanted else None, subnet_key, **times)]
