"""Their tables: a unique constraint, and a counter on the choice, which COUNT(*) leaves alone."""

from django.db import models


class Choice(models.Model):
    poll = models.IntegerField(db_index=True)
    votes = models.IntegerField(default=0)


class Ballot(models.Model):
    poll = models.IntegerField()
    voter = models.CharField(max_length=200)
    choice = models.ForeignKey(Choice, on_delete=models.CASCADE)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["poll", "voter"], name="bench_one_ballot_per_voter")]
