"""Suspicious addresses: what rules found, for operators to decide on and for auditors to read."""

from collections.abc import Callable
from datetime import datetime
from functools import cache
from itertools import chain
from typing import Any
from uuid import UUID

from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiResponse, extend_schema, extend_schema_field
from rest_framework import generics, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from polls import blocks, cases, disclosure, fraud, problems, review
from polls.api.authentication import actor
from polls.api.blocks import BlockSerializer, NewBlockSerializer, ends_at
from polls.api.filters import CaseFilters, StrictFilters
from polls.api.operators import NOT_STORED, Operations, act_of
from polls.api.pages import NewestFirst
from polls.api.schema import refuses
from polls.api.serializers import NetworkField, WhySerializer, checked
from polls.disclosure import LEAST_VOTERS
from polls.journal import Act
from polls.models import Decision, Hold, Outcome, Poll, Ruling, SuspiciousIP

CHANGES = {
    "type": ["object", "null"],
    "additionalProperties": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    "description": "{option id: [votes before, votes after]}, of options that differ. Null where that would tell what fewer than "
    f"{LEAST_VOTERS} voters chose, by itself or beside what was shown before, for good where the poll hid its results when "
    "it was ruled, and for who may not read the poll's results.",
}


# --- Shapes -----------------------------------------------------------------------------------------------------------


class CaseSerializer(serializers.ModelSerializer[SuspiciousIP]):
    """A case, as the list shows it."""

    # Wants `actor` in its context.
    id = serializers.CharField()
    poll = serializers.UUIDField(source="poll_id", allow_null=True, help_text="None: over all polls.")
    network = serializers.SerializerMethodField()
    one_signature = serializers.SerializerMethodField()
    evidence = serializers.SerializerMethodField()

    class Meta:
        model = SuspiciousIP
        fields = [
            "id",
            "poll",
            "rule",
            "kind",
            "network",
            "one_signature",
            "state",
            "score",
            "votes",
            "evidence",
            "first_seen",
            "last_seen",
            "found_at",
            "reviewer",
            "reviewed_at",
            "note",
        ]
        extra_kwargs = {
            "score": {"help_text": "How far beyond the rule's threshold: 1 is just there."},
            "first_seen": {"help_text": "When the first of the votes was accepted that the rule saw."},
            "note": {"help_text": "The reason of the last decision."},
        }

    @extend_schema_field(
        {"type": ["string", "null"], "description": "Such as `192.0.2.7/32`. Null for auditors, and once nothing can read it any more."}
    )
    def get_network(self, case: SuspiciousIP) -> str | None:
        return cases.network_of(case) if self.context["actor"].operates else None

    @extend_schema_field({"type": "boolean", "description": "True: it is about the votes with one browser signature only."})
    def get_one_signature(self, case: SuspiciousIP) -> bool:
        return case.signature_key is not None

    @extend_schema_field({"type": "object", "additionalProperties": True, "description": "What the rule saw, in numbers."})
    def get_evidence(self, case: SuspiciousIP) -> dict[str, Any]:
        return fraud.without_choices(case.rule, case.evidence)


class DecisionSerializer(serializers.ModelSerializer[Decision]):
    """What somebody decided or looked at, and what it changed or would have. Never changed itself."""

    id = serializers.CharField()
    poll = serializers.UUIDField(source="poll_id", allow_null=True)
    cases = serializers.ListField(child=serializers.CharField(), help_text="The cases that it was about.")
    changes = serializers.SerializerMethodField()

    class Meta:
        model = Decision
        fields = ["id", "at", "actor", "ruling", "reason", "poll", "cases", "votes", "changes"]
        extra_kwargs = {"votes": {"help_text": "How many votes it took out of the tally, or put back; of a look, how many it was about."}}

    @extend_schema_field(CHANGES)
    def get_changes(self, decision: Decision) -> dict[str, list[int]] | None:
        # Wants `reads_results` in its context.
        return disclosure.changes_of(decision) if self.context["reads_results"](decision.poll_id) else None


class DecidedSerializer(serializers.Serializer[Any]):
    case = CaseSerializer()
    decisions = DecisionSerializer(many=True, help_text="One for each poll concerned.")


class HoldSerializer(serializers.ModelSerializer[Hold]):
    """A ruling that is in force on the case's votes, or on more."""

    poll = serializers.UUIDField(source="poll_id")
    case = serializers.CharField(source="case_id", allow_null=True, help_text="None: it was ruled on an address, a subnet or a time.")
    whole_subnet = serializers.SerializerMethodField()

    class Meta:
        model = Hold
        fields = ["poll", "case", "ruling", "whole_subnet", "accepted_from", "accepted_until", "ruled_at", "actor", "reason"]

    def get_whole_subnet(self, hold: Hold) -> bool:
        return hold.address_key is None


class BarSerializer(serializers.Serializer[Any]):
    begins_at = serializers.DateTimeField()
    counted = serializers.IntegerField()
    votes = serializers.IntegerField(help_text="With those that do not count.")


class TimelineSerializer(serializers.Serializer[Any]):
    step_seconds = serializers.IntegerField()
    bars = BarSerializer(many=True)


class ChoiceSerializer(serializers.Serializer[Any]):
    poll = serializers.UUIDField(source="poll_id")
    option = serializers.CharField(source="option_id")
    text = serializers.CharField()
    voters = serializers.IntegerField(help_text="Voters of the case that chose it, whatever became of their votes.")
    share = serializers.FloatField(help_text="Of the case's ballots, from 0 to 1.")
    others = serializers.IntegerField(help_text="Votes of everybody else that count.")
    others_share = serializers.FloatField()
    votes = serializers.IntegerField(help_text="All that count for it.")
    as_of = serializers.DateTimeField(help_text="When it was so: later votes are shown once they are enough not to tell anybody's choice.")


class AddressVotesSerializer(serializers.Serializer[Any]):
    is_subject = serializers.BooleanField(help_text="True: the address that the case is about.")
    votes = serializers.IntegerField()
    voters = serializers.IntegerField()


class NeighbourhoodSerializer(serializers.Serializer[Any]):
    """Who else is in the subnet (/24, IPv6: /64)."""

    addresses = serializers.IntegerField(help_text="How many addresses of the subnet voted.")
    busiest = AddressVotesSerializer(many=True)
    cases = CaseSerializer(many=True, help_text="Other cases, in whatever poll.")


class CaseDetailSerializer(CaseSerializer):
    """A case with everything that helps to decide. Lists show their first twenty."""

    outcomes = serializers.SerializerMethodField()
    over_time = serializers.SerializerMethodField()
    choices = serializers.SerializerMethodField()
    subnet = serializers.SerializerMethodField()
    holds = serializers.SerializerMethodField()
    decisions = serializers.SerializerMethodField()
    blocks = serializers.SerializerMethodField()

    class Meta(CaseSerializer.Meta):
        fields = [*CaseSerializer.Meta.fields, "outcomes", "over_time", "choices", "subnet", "holds", "decisions", "blocks"]

    @extend_schema_field(
        {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "propertyNames": {"enum": Outcome.values},
            "description": "{outcome: votes} of all votes that fit the case now.",
        }
    )
    def get_outcomes(self, case: SuspiciousIP) -> dict[str, int]:
        return cases.fates(case)

    @extend_schema_field(TimelineSerializer)
    def get_over_time(self, case: SuspiciousIP) -> Any:
        step, bars = cases.over_time(case)
        return TimelineSerializer({"step_seconds": step.total_seconds(), "bars": bars}).data

    @extend_schema_field(
        ChoiceSerializer(
            many=True,
            allow_null=True,
            help_text=f"Of the polls where this tells of {LEAST_VOTERS} voters at least, alone and beside what was shown before, and whose "
            "results you may read. Null: of none.",
        )
    )
    def get_choices(self, case: SuspiciousIP) -> Any:
        who, at = self.context["actor"], self.context["at"]
        found = review.choices(case, Act(who.name, at), lambda poll: who.reads_results(poll, at))
        shown = [choices for _, choices in found if choices is not None]
        return ChoiceSerializer(chain(*shown), many=True).data if shown or not found else None

    @extend_schema_field(NeighbourhoodSerializer)
    def get_subnet(self, case: SuspiciousIP) -> Any:
        number, busiest = cases.addresses(case)
        found = {"addresses": number, "busiest": busiest, "cases": cases.neighbours(case)}
        return NeighbourhoodSerializer(found, context=self.context).data

    @extend_schema_field(HoldSerializer(many=True))
    def get_holds(self, case: SuspiciousIP) -> Any:
        return HoldSerializer(cases.holds(case), many=True).data

    @extend_schema_field(DecisionSerializer(many=True))
    def get_decisions(self, case: SuspiciousIP) -> Any:
        return DecisionSerializer(cases.decisions(case)[: cases.MAX_SHOWN], many=True, context=self.context).data

    @extend_schema_field(BlockSerializer(many=True))
    def get_blocks(self, case: SuspiciousIP) -> Any:
        found = case.blocks.filter(until__gt=self.context["at"])
        return BlockSerializer(found, many=True, context=self.context).data


class CaseBlockSerializer(NewBlockSerializer):
    """A block of a case's network, or of another one."""

    network = NetworkField(required=False, help_text="If it is not the case's own: a wider or narrower one.")


# --- Doors ------------------------------------------------------------------------------------------------------------


class CasePages(NewestFirst):
    ordering = ("-found_at", "-id")
    page_size_query_description = f"Cases on a page; {NewestFirst.page_size} if not said, {NewestFirst.max_page_size} at most."


class CasesView(Operations, generics.ListAPIView[SuspiciousIP]):
    serializer_class = CaseSerializer
    pagination_class = CasePages
    filter_backends = [StrictFilters]
    filterset_class = CaseFilters
    queryset = SuspiciousIP.objects.select_related("network_secret")

    def get_serializer_context(self) -> dict[str, Any]:
        return {"actor": actor(self.request)}

    @refuses(problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="cases_list",
        tags=["cases"],
        summary="List suspicious addresses, newest first",
        description="What rules found. By itself a case changes no result, unless the poll says `auto_quarantine`.",
        responses=OpenApiResponse(CaseSerializer(many=True), "A page of cases."),
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        answer = super().get(request, *args, **kwargs)
        answer["Cache-Control"] = "no-store"
        return answer


class CaseView(Operations):
    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND)
    @extend_schema(
        operation_id="cases_read",
        tags=["cases"],
        summary="Look at a suspicious address",
        description="Its votes over time, what they are for beside everybody else's, who else is in the subnet, what was decided.",
        responses=OpenApiResponse(CaseDetailSerializer, "The case."),
    )
    def get(self, request: Request, case_id: int) -> Response:
        at = now()
        context = {"actor": actor(request), "at": at, "reads_results": readable(request, at)}
        return Response(CaseDetailSerializer(found(case_id), context=context).data, headers=NOT_STORED)


def _ruling(ruling: Ruling, summary: str, description: str) -> type[APIView]:
    """Make the door to a ruling on a case."""

    class RulingView(Operations):
        @refuses(
            problems.MALFORMED,
            problems.INVALID,
            problems.UNAUTHENTICATED,
            problems.FORBIDDEN,
            problems.NOT_FOUND,
            problems.UNKNOWN_POLL,
            problems.NOT_JSON,
        )
        @extend_schema(
            operation_id=f"cases_{ruling}",
            tags=["cases"],
            summary=summary,
            description=f"{description} Repeatable.",
            request=WhySerializer,
            examples=[OpenApiExample("why", {"reason": "Five hundred votes a minute."}, request_only=True)],
            responses=OpenApiResponse(DecidedSerializer, "The case as it is now, and what was changed."),
        )
        def post(self, request: Request, case_id: int) -> Response:
            reason, at = checked(WhySerializer, request.data)["reason"], now()
            decisions = review.rule_on_case(case_id, ruling, act_of(request, at, reason))
            shown = {"case": found(case_id), "decisions": decisions}
            context = {"actor": actor(request), "reads_results": readable(request, at)}
            return Response(DecidedSerializer(shown, context=context).data, headers=NOT_STORED)

    return RulingView


QuarantineView = _ruling(
    Ruling.QUARANTINE,
    "Hold a case's votes out of the tally",
    "All votes that fit the case, in each of its polls, and those still to come, until it is ruled on anew.",
)
ReleaseView = _ruling(
    Ruling.RELEASE, "Put a case's votes back into the tally", "The case stays open. What a soft limit held is let in, too."
)
VoidView = _ruling(
    Ruling.VOID, "Leave a case's votes out for good", "They are `rejected`, and the case is confirmed. They can be released all the same."
)
ClearView = _ruling(Ruling.CLEAR, "Say that nothing is wrong", "What the case keeps out is put back, and the case is cleared.")


class CaseBlockView(Operations):
    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.NOT_OFFERED,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="cases_block",
        tags=["cases"],
        summary="Block a case's network for a time",
        description="Or another one, if `network` is sent: a wider or a narrower one. It changes nothing about votes that are there.",
        request=CaseBlockSerializer,
        examples=[OpenApiExample("day", {"hours": 24, "reason": "Five hundred votes a minute."}, request_only=True)],
        responses={201: OpenApiResponse(BlockSerializer, "The block. In force in every web process within two seconds.")},
    )
    def post(self, request: Request, case_id: int) -> Response:
        at = now()
        case = found(case_id)
        wanted = checked(CaseBlockSerializer, request.data)
        network = wanted.get("network") or cases.network_of(case)
        if network is None:
            raise problems.NOT_OFFERED.says("Nothing can read this case's network any more. Say which one as `network`.")
        block = blocks.block(network, ends_at(wanted, at), act_of(request, at, wanted["reason"]), case)
        return Response(BlockSerializer(block, context={"actor": actor(request)}).data, status.HTTP_201_CREATED, headers=NOT_STORED)


def readable(request: Request, at: datetime) -> Callable[[UUID | None], bool]:
    """Return what tells, by a poll's id, whether who asks may read its results."""

    @cache
    def reads_results(poll_id: UUID | None) -> bool:
        poll = Poll.objects.filter(pk=poll_id).first() if poll_id else None
        return poll is not None and actor(request).reads_results(poll, at)

    return reads_results


def found(case_id: int) -> SuspiciousIP:
    """Return the case. Raises Refusal when there is none."""
    case = SuspiciousIP.objects.select_related("network_secret").filter(pk=case_id).first()
    if case is None:
        raise problems.NOT_FOUND.says("No case has this id.")
    return case
