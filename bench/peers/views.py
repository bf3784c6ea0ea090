"""Their views and addresses: /<contestant>/polls/<poll>/votes and .../results."""

from django.db import IntegrityError, transaction
from django.db.models import Count, F
from django.urls import path
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from bench.peers.models import Ballot, Choice
from bench.peers.tasks import count_vote


class VoteSerializer(serializers.Serializer):
    voter = serializers.CharField(max_length=200)
    choice = serializers.PrimaryKeyRelatedField(queryset=Choice.objects.all())


def read_vote(request: Request) -> tuple[str, Choice]:
    serializer = VoteSerializer(data=request.data)
    serializer.is_valid(raise_exception=True)
    return serializer.validated_data["voter"], serializer.validated_data["choice"]


class PublishTask(APIView):
    """One Celery task per vote."""

    def post(self, request: Request, poll: int) -> Response:
        voter, choice = read_vote(request)
        task = count_vote.apply_async((poll, voter, choice.pk))
        return Response({"id": task.id, "status": "pending"}, status=202)


class WriteAndAdd(APIView):
    """The vote and the counter in one transaction. The counter last, so that its row is locked for as short as can be."""

    def post(self, request: Request, poll: int) -> Response:
        voter, choice = read_vote(request)
        try:
            with transaction.atomic():
                ballot = Ballot.objects.create(poll=poll, voter=voter, choice=choice)
                Choice.objects.filter(pk=choice.pk).update(votes=F("votes") + 1)
        except IntegrityError:
            return Response({"detail": "You have voted."}, status=409)
        return Response({"id": ballot.pk, "status": "counted"}, status=201)


class Write(APIView):
    """The vote alone."""

    def post(self, request: Request, poll: int) -> Response:
        voter, choice = read_vote(request)
        try:
            ballot = Ballot.objects.create(poll=poll, voter=voter, choice=choice)
        except IntegrityError:
            return Response({"detail": "You have voted."}, status=409)
        return Response({"id": ballot.pk, "status": "counted"}, status=201)


class ReadCounters(APIView):
    def get(self, request: Request, poll: int) -> Response:
        return Response({"poll": poll, "options": list(Choice.objects.filter(poll=poll).order_by("pk").values("id", "votes"))})


class CountVotes(APIView):
    """COUNT(*), each time."""

    def get(self, request: Request, poll: int) -> Response:
        counted = Ballot.objects.filter(poll=poll).values("choice").order_by("choice").annotate(votes=Count("*"))
        return Response({"poll": poll, "options": [{"id": row["choice"], "votes": row["votes"]} for row in counted]})


urlpatterns = [
    path("task_per_vote/polls/<int:poll>/votes", PublishTask.as_view()),
    path("sync_drf/polls/<int:poll>/votes", WriteAndAdd.as_view()),
    path("sync_drf/polls/<int:poll>/results", ReadCounters.as_view()),
    path("sync_drf_count/polls/<int:poll>/votes", Write.as_view()),
    path("sync_drf_count/polls/<int:poll>/results", CountVotes.as_view()),
]
