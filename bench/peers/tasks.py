"""The task of one of them: one vote, one transaction."""

from celery import shared_task
from django.db import IntegrityError, transaction
from django.db.models import F

from bench.peers.models import Ballot, Choice


@shared_task(name="task_per_vote.count_vote")
def count_vote(poll: int, voter: str, choice: int) -> None:
    try:
        with transaction.atomic():
            Ballot.objects.create(poll=poll, voter=voter, choice_id=choice)
            Choice.objects.filter(pk=choice).update(votes=F("votes") + 1)
    except IntegrityError:
        return
