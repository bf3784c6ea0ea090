"""Its view, and its one address."""

from django.urls import path
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from bench.task_per_vote.models import Choice
from bench.task_per_vote.tasks import count_vote


class VoteSerializer(serializers.Serializer):  # type: ignore[type-arg]
    voter = serializers.CharField(max_length=200)
    choice = serializers.PrimaryKeyRelatedField(queryset=Choice.objects.all())


class CastView(APIView):
    def post(self, request: Request, poll: int) -> Response:
        serializer = VoteSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        vote = serializer.validated_data
        task = count_vote.apply_async((poll, vote["voter"], vote["choice"].pk))
        return Response({"id": task.id, "status": "pending"}, status=202)


urlpatterns = [path("polls/<int:poll>/votes", CastView.as_view())]
