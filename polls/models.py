"""The tables, and the rules that PostgreSQL itself keeps."""

from __future__ import annotations

import uuid
from datetime import datetime

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import F, Q
from django.utils.timezone import now

MAX_OPTIONS = 100


class VoterPolicy(models.TextChoices):
    """Who is one voter in a poll."""

    IP = "ip", "the client's address (IPv6: its /64)"
    CLIENT = "client", "the reference that an authenticated API client sends"


class Outcome(models.TextChoices):
    """What became of an accepted vote. A vote without one is pending."""

    COUNTED = "counted"
    SUPERSEDED = "superseded"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


class Reason(models.TextChoices):
    """Why a vote does not stand."""

    DUPLICATE = "duplicate", "the voter's earlier vote stands"
    CHANGED = "changed", "the voter's later vote stands"
    POLL_UNKNOWN = "poll_unknown", "the poll was deleted"
    OPTION_UNKNOWN = "option_unknown", "the option was removed before the vote was counted"


class PollQuerySet(models.QuerySet["Poll"]):
    def due(self, at: datetime) -> PollQuerySet:
        return self.filter(opened_at=None, opens_at__lte=at)

    def expired(self, at: datetime) -> PollQuerySet:
        return self.filter(closed_at=None, closes_at__lte=at)


class Poll(models.Model):
    """A question with options. `opens_at` and `closes_at` judge votes; `opened_at` and `closed_at` are when the clock's job saw to it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="polls")
    title = models.CharField(max_length=200)
    description = models.TextField(blank=True, max_length=5000)
    voter_policy = models.CharField(max_length=10, choices=VoterPolicy)
    # True: a voter's last accepted vote stands. False: the first.
    allow_change = models.BooleanField(default=False)
    opens_at = models.DateTimeField(default=now)
    closes_at = models.DateTimeField()
    opened_at = models.DateTimeField(null=True, editable=False)
    closed_at = models.DateTimeField(null=True, editable=False)
    created_at = models.DateTimeField(default=now, editable=False)

    objects = PollQuerySet.as_manager()

    class Meta:
        db_table = "polls"
        constraints = [models.CheckConstraint(name="poll_closes_after_it_opens", condition=Q(closes_at__gt=F("opens_at")))]
        indexes = [
            models.Index(fields=["-created_at", "-id"], name="polls_newest_first"),  # GET /polls
            models.Index(fields=["closes_at"], name="polls_not_closed", condition=Q(closed_at=None)),  # closing.close_expired_polls
        ]

    def __str__(self) -> str:
        return self.title

    def clean(self) -> None:
        if self.closes_at and self.opens_at and self.closes_at <= self.opens_at:
            raise ValidationError({"closes_at": "A poll must close after it opens."})

    def status_at(self, at: datetime) -> str:
        return status(self.opens_at, self.closes_at, at)

    @property
    def status(self) -> str:
        return self.status_at(now())


def status(opens_at: datetime, closes_at: datetime, at: datetime) -> str:
    """Return "scheduled", "open" or "closed": what the moments say, so that no job that runs late can contradict the deadline."""
    if at < opens_at:
        return "scheduled"
    return "open" if at < closes_at else "closed"


class Option(models.Model):
    """A choice of a poll. Its id is unique over all polls, so an option of another poll is never mistaken for one of this."""

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="options")
    text = models.CharField(max_length=200)
    position = models.PositiveSmallIntegerField()

    class Meta:
        db_table = "options"
        ordering = ["position"]
        constraints = [
            models.UniqueConstraint(fields=["poll", "position"], name="one_option_per_position", deferrable=models.Deferrable.DEFERRED),
            models.UniqueConstraint(fields=["poll", "text"], name="one_option_per_text", deferrable=models.Deferrable.DEFERRED),
        ]

    def __str__(self) -> str:
        return self.text


class CastVote(models.Model):
    """What every stored vote holds, standing or not."""

    # No foreign key: counting locks the bundle's polls once instead of checking every row (see counting.py).
    poll_id = models.UUIDField()
    # Keyed hash of the voter in this poll (voters.py), never the voter.
    voter_key = models.UUIDField()
    vote_id = models.UUIDField()
    # Ids of the chosen options.
    selection = ArrayField(models.BigIntegerField())
    accepted_at = models.DateTimeField()

    class Meta:
        abstract = True


class Vote(CastVote):
    """The votes that stand. The key itself is the rule: one vote per voter per poll."""

    pk = models.CompositePrimaryKey("poll_id", "voter_key")
    counted_at = models.DateTimeField()

    class Meta:
        db_table = "votes"


class VoteAside(CastVote):
    """The votes that do not stand, each with its outcome. Whole, so that the order of arrival can't change a result."""

    pk = models.CompositePrimaryKey("poll_id", "voter_key", "vote_id")
    outcome = models.CharField(max_length=11, choices=Outcome)
    reason = models.CharField(max_length=20, choices=Reason)
    decided_at = models.DateTimeField()

    class Meta:
        db_table = "outcomes"
        indexes = [models.Index(fields=["decided_at"], name="outcomes_oldest")]  # closing.purge_outcomes


class Tally(models.Model):
    """The results table: how many votes stand for a selection. Changes only together with the votes, in one transaction."""

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="tallies")
    selection = ArrayField(models.BigIntegerField())
    votes = models.BigIntegerField()
    # How often this row changed; the sum over a poll is the revision of its results.
    revision = models.BigIntegerField()

    class Meta:
        db_table = "tallies"
        verbose_name_plural = "tallies"
        constraints = [models.UniqueConstraint(fields=["poll", "selection"], name="one_tally_per_selection")]


class OutboxBundle(models.Model):
    """A bundle that the broker could not take; `outbox.drain` counts and deletes it."""

    body = models.BinaryField()
    kept_at = models.DateTimeField(default=now)

    class Meta:
        db_table = "outbox"


class ApiClient(models.Model):
    """A program that votes for its own users. It may vote in the `client` polls of its owner."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_clients")
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=16, unique=True, editable=False)
    # SHA-256 of the key. The key is 256 random bits, so a slow password hash would protect nothing more.
    key_hash = models.BinaryField(max_length=32, editable=False)
    created_at = models.DateTimeField(default=now, editable=False)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "api_clients"
        verbose_name = "API client"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix})"


class DeadLetterDesk(models.Model):
    """No table: gives the queue of dead letters a page and a permission in the admin."""

    class Meta:
        managed = False
        default_permissions = ("view",)
        verbose_name = verbose_name_plural = "dead letters"
