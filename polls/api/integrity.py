"""Whether a poll's tallies are what its votes say, for whoever wants to check."""

from typing import Any
from uuid import UUID

from django.utils.timezone import now
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.exceptions import NotAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from polls import finality, integrity, problems, results
from polls.api.authentication import actor
from polls.api.operators import NOT_STORED
from polls.api.schema import refuses
from polls.api.views import seen
from polls.models import Outcome, Poll


class ComparedSerializer(serializers.Serializer[Any]):
    """A tally beside what the votes say."""

    option = serializers.CharField(allow_null=True, help_text="Null: the ballots of an approval poll.")
    tally = serializers.IntegerField(help_text="As the results show it.")
    recount = serializers.IntegerField(help_text="Counted from the votes for this answer.")


class IntegritySerializer(serializers.Serializer[Any]):
    """What became of all votes, as of one moment. `accepted` is the sum of the others down to `pending`."""

    accepted = serializers.IntegerField(help_text="Votes that are known; not those that the broker still holds.")
    counted = serializers.IntegerField(help_text="Votes that stand, withdrawals too.")
    superseded = serializers.IntegerField()
    rejected = serializers.DictField(child=serializers.IntegerField(), help_text="{reason: votes}")
    quarantined = serializers.IntegerField()
    pending = serializers.IntegerField(help_text="Votes that wait in the database, because the broker could not take them.")
    tallies = ComparedSerializer(
        many=True,
        allow_null=True,
        help_text="Null for who may not read the poll's results, and while these are held back: they change by several ballots at once.",
    )
    is_exact = serializers.BooleanField(help_text="Whether every vote has one outcome, and every tally is what the votes say.")
    bundles_waiting = serializers.IntegerField(
        allow_null=True, help_text="Messages with votes, of all polls, that the broker held seconds ago. Null: it does not tell."
    )
    not_final_because = serializers.CharField(
        allow_null=True, help_text="What a closed poll waits for before it can be final; null where it is final, or has not closed."
    )
    as_of = serializers.DateTimeField()


class IntegrityView(APIView):
    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND, problems.UNKNOWN_POLL)
    @extend_schema(
        operation_id="integrity_read",
        tags=["results"],
        summary="Count a poll's votes anew, and compare",
        description=(
            "For the people behind the poll, auditors and operators. Counts every vote, which takes seconds where there are millions. "
            "Outcomes are kept for some time after a poll's end; later, votes that do not stand are not known any more."
        ),
        responses=OpenApiResponse(IntegritySerializer, "What became of the votes, and the tallies beside a recount."),
    )
    def get(self, request: Request, poll_id: UUID) -> Response:
        poll = seen(request, str(poll_id), now())
        asks = actor(request)
        if asks.user is None:
            raise NotAuthenticated
        if not (asks.reads_journal(poll) or asks.operates):
            raise problems.FORBIDDEN.says("This is for the people behind the poll, auditors and operators.")
        report = integrity.read(poll.pk)
        if report is None:
            raise problems.UNKNOWN_POLL.says("No poll has this id.")
        found = finality.look(now())
        reads_tallies = asks.reads_results(poll, report.as_of) and not results.are_held_back(poll.pk)
        return Response(IntegritySerializer(_shown(poll, report, found, reads_tallies=reads_tallies)).data, headers=NOT_STORED)


def _shown(poll: Poll, report: integrity.Report, found: finality.Outstanding, *, reads_tallies: bool) -> dict[str, Any]:
    return {
        "accepted": report.accepted,
        "counted": report.counted,
        "superseded": report.total(Outcome.SUPERSEDED),
        "rejected": report.aside.get(Outcome.REJECTED, {}),
        "quarantined": report.total(Outcome.QUARANTINED),
        "pending": report.pending,
        "tallies": [compared._asdict() for compared in report.tallies] if reads_tallies else None,
        "is_exact": report.is_exact,
        "bundles_waiting": found.bundles,
        "not_final_because": finality.why_not(poll, found, report.as_of),
        "as_of": report.as_of,
    }
