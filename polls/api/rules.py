"""The rules that find suspicious networks: what there is, and what one would find."""

from typing import Any

from django.utils.timezone import now
from drf_spectacular.utils import OpenApiExample, OpenApiResponse, extend_schema, extend_schema_field
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from polls import fraud, problems
from polls.api.authentication import actor
from polls.api.cases import CHANGES, CaseSerializer
from polls.api.operators import NOT_STORED, Operations, act_of
from polls.api.schema import refuses
from polls.api.serializers import StrictSerializer, checked

# Of what a rule finds, the most suspicious; their number is beside them.
MAX_SHOWN = 100


class ParameterSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    value = serializers.FloatField(help_text="The installation's; `rule_parameters` of a poll may say another.")
    smallest = serializers.FloatField()
    largest = serializers.FloatField()
    meaning = serializers.CharField()


class RuleSerializer(serializers.Serializer[Any]):
    name = serializers.CharField()
    description = serializers.CharField()
    is_on = serializers.BooleanField(help_text="False: the installation does not use it.")
    is_fast = serializers.BooleanField(help_text="True: looks at the latest votes every minute, beside at all of them every hour.")
    only_informs = serializers.BooleanField(help_text="True: its cases are never quarantined automatically.")
    is_about_choices = serializers.BooleanField(
        help_text="True: it looks at what was chosen: at no sealed results, and it is tried as it is in force only, by who may read them."
    )
    parameters = ParameterSerializer(many=True)


class RulesSerializer(serializers.Serializer[Any]):
    rules = RuleSerializer(many=True)


class TrySerializer(StrictSerializer):
    poll = serializers.UUIDField(required=False, help_text="In this poll; if not said, in all that took votes lately.")
    parameters = serializers.DictField(
        default=dict, help_text="`{parameter: value}` where they are not the installation's or the poll's; none for rules about choices."
    )
    reason = serializers.CharField(max_length=500, help_text="For the record: a try tells how results would change.")


class FindingSerializer(CaseSerializer):
    """What would be a case."""

    id = None  # type: ignore[assignment]

    class Meta(CaseSerializer.Meta):
        fields = ["poll", "kind", "network", "one_signature", "score", "votes", "evidence", "first_seen", "last_seen"]


class TrialSerializer(serializers.Serializer[Any]):
    parameters = serializers.DictField(child=serializers.FloatField())
    found = serializers.IntegerField(help_text="How many networks the rule would flag.")
    cases = FindingSerializer(many=True, help_text=f"The most suspicious {MAX_SHOWN} of them.")
    votes = serializers.IntegerField(help_text="Their votes, whatever became of them.")
    voters = serializers.IntegerField()
    changes = serializers.SerializerMethodField()
    precision = serializers.FloatField(
        allow_null=True, help_text="Of what it finds and people have decided on: the part that they voided. Null: they decided on none."
    )
    recall = serializers.FloatField(allow_null=True, help_text="Of what people voided: the part that it finds. Null: they voided none.")

    @extend_schema_field(CHANGES)
    def get_changes(self, shown: dict[str, Any]) -> dict[str, tuple[int, int]] | None:
        changes = shown["changes"]
        return None if changes is None else {str(option): change for option, change in changes.items()}


class RulesView(Operations):
    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN)
    @extend_schema(
        operation_id="rules_list",
        tags=["cases"],
        summary="List the rules that find suspicious networks",
        responses=OpenApiResponse(RulesSerializer, "All rules, with the installation's parameters."),
    )
    def get(self, request: Request) -> Response:
        return Response(RulesSerializer({"rules": [_described(rule) for rule in fraud.RULES.values()]}).data)


class TryView(Operations):
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
        operation_id="rules_try",
        tags=["cases"],
        summary="Try a rule on the stored votes",
        description="Whom it would flag, how the results would change without these votes, and how that agrees with past decisions. "
        "Changes nothing, and is on record in each poll where it finds something. A rule about choices is tried as it is in force only, "
        "in polls whose results you may read now, and is on record in all of them.",
        request=TrySerializer,
        examples=[OpenApiExample("fewer", {"parameters": {"votes": 100}, "reason": "Are there smaller ones?"}, request_only=True)],
        responses=OpenApiResponse(TrialSerializer, "What the rule finds."),
    )
    def post(self, request: Request, name: str) -> Response:
        wanted = checked(TrySerializer, request.data)
        who, at = actor(request), now()
        trial = fraud.try_rule(
            name,
            act_of(request, at, wanted["reason"]),
            lambda poll: who.reads_results(poll, at),
            poll_id=wanted.get("poll"),
            parameters=wanted["parameters"],
        )
        shown = {
            "parameters": trial.parameters,
            "found": len(trial.cases),
            "cases": trial.cases[:MAX_SHOWN],
            "votes": trial.votes,
            "voters": trial.voters,
            "changes": trial.changes,
            "precision": trial.reviewed.precision,
            "recall": trial.reviewed.recall,
        }
        return Response(TrialSerializer(shown, context={"actor": actor(request)}).data, headers=NOT_STORED)


def _described(rule: fraud.Rule) -> dict[str, Any]:
    in_use = fraud.parameters_of(rule)
    return {
        "name": rule.name,
        "description": rule.description,
        "is_on": in_use is not None,
        "is_fast": rule.is_fast,
        "only_informs": rule.never_holds,
        "is_about_choices": rule.is_about_choices,
        "parameters": [
            {"name": name, "value": value, "smallest": smallest, "largest": largest, "meaning": meaning}
            for name, value in (in_use or rule.parameters).items()
            for smallest, largest, meaning in [fraud.PARAMETERS[name]]
        ],
    }
