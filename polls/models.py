"""The tables, and the rules that PostgreSQL itself keeps."""

from __future__ import annotations

import secrets
import uuid
from datetime import datetime

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.contrib.postgres.indexes import BrinIndex, GinIndex
from django.db import models
from django.db.models import F, Q, Value
from django.db.models.functions import Now
from django.utils.timezone import now

from polls import keys

MAX_OPTIONS = 100


class VoterPolicy(models.TextChoices):
    """Who is one voter in a poll."""

    IP = "ip", "the client's address (IPv6: its /64)"
    SESSION = "session", "the holder of an anonymous voter token"
    ACCOUNT = "account", "the signed-in user"
    CODE = "code", "the holder of a voter code that the owner issued"
    CLIENT = "client", "the reference that an authenticated API client sends"


class VotingMethod(models.TextChoices):
    """What a ballot holds."""

    SINGLE = "single", "one option"
    APPROVAL = "approval", "several options, each worth one"


class ResultsVisibility(models.TextChoices):
    """Who reads a poll's results, and when. Its owner always does, but where they are sealed."""

    ALWAYS = "always", "everybody, at any time"
    AFTER_VOTE = "after_vote", "who shows the receipt of a vote; everybody once the poll is closed"
    AFTER_CLOSE = "after_close", "everybody, once the poll is closed"
    OWNER = "owner", "the owner only"
    SEALED = "sealed", "nobody before the poll's end, the people behind it included; then everybody"


class LimitMode(models.TextChoices):
    """What happens to votes beyond a poll's limits per address and per subnet."""

    HARD = "hard", "refused"
    SOFT = "soft", "accepted, and held in quarantine"


class PollStatus(models.TextChoices):
    """Where a poll is in its life. Always forward, but for a reopening while it is closing."""

    DRAFT = "draft", "its owner works on it; nobody else sees it"
    SCHEDULED = "scheduled", "it will open"
    OPEN = "open", "it takes votes"
    CLOSING = "closing", "it takes no votes any more; the last ones are being counted"
    FINAL = "final", "all its votes are counted"
    ARCHIVED = "archived", "out of sight, but for those who know its id"


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
    WITHDRAWN = "withdrawn", "the voter withdrew it"
    KEY_REUSED = "key_reused", "an earlier vote with the same Idempotency-Key made another choice"
    ADDRESS_LIMIT = "address_limit", "as many voters as the poll allows had voted from the address"
    SUBNET_LIMIT = "subnet_limit", "as many voters as the poll allows had voted from the subnet"
    UNDER_REVIEW = "under_review", "an operator looks into where it came from"
    VOIDED = "voided", "an operator left it out for good"
    POLL_UNKNOWN = "poll_unknown", "the poll was deleted"
    # Votes from before options were frozen at the poll's opening.
    OPTION_UNKNOWN = "option_unknown", "the option was removed before the vote was counted"


class NetworkKind(models.TextChoices):
    """What a network key stands for."""

    ADDRESS = "address", "one address"
    SUBNET = "subnet", "a /24, of IPv6 a /64"


class CaseState(models.TextChoices):
    """Where a case is."""

    OPEN = "open", "nobody has decided yet"
    CONFIRMED = "confirmed", "the votes were voided"
    CLEARED = "cleared", "nothing was wrong"
    EXPIRED = "expired", "nobody decided in time"


class Ruling(models.TextChoices):
    """What is decided about votes, or about where they come from."""

    QUARANTINE = "quarantine", "hold the votes out of the tally"
    RELEASE = "release", "put the votes back"
    VOID = "void", "leave the votes out for good"
    CLEAR = "clear", "nothing is wrong"
    BLOCK = "block", "refuse the network"
    UNBLOCK = "unblock", "let the network in again"
    LOOK = "look", "look at what a ruling would change"


class LookKind(models.TextChoices):
    """What a look showed."""

    DRY_RUN = "dry_run", "what a ruling would change"
    RULING = "ruling", "what a ruling changed"
    CASE = "case", "what a case's voters chose"
    COMPARISON = "comparison", "the results with and without what is under review"


class VoterSecret(models.Model):
    """A VOTER_SECRET that this installation uses or used, by its fingerprint (keys.py). New polls get the newest."""

    fingerprint = models.BinaryField(primary_key=True, max_length=8, editable=False)
    since = models.DateTimeField()
    # When somebody said that nobody has it any more.
    lost_at = models.DateTimeField(null=True)

    class Meta:
        db_table = "voter_secrets"


class NetworkSecret(models.Model):
    """What turns addresses into network keys, and back as long as this row exists (networks.py)."""

    secret = models.BinaryField(max_length=32, editable=False)
    # The fingerprint of the VOTER_SECRET that it goes with; none: of the oldest.
    voter_secret = models.BinaryField(max_length=8, null=True, editable=False)
    made_at = models.DateTimeField()

    class Meta:
        db_table = "network_secrets"


def new_voter_salt() -> bytes:
    return secrets.token_bytes(16)


class PollQuerySet(models.QuerySet["Poll"]):
    def in_status(self, status: str, at: datetime) -> PollQuerySet:
        """The polls that `status` calls so. Raises KeyError on anything that is no PollStatus."""
        published = Q(archived_at=None, published_at__isnull=False)
        return self.filter(
            {
                PollStatus.DRAFT.value: Q(archived_at=None, published_at=None),
                PollStatus.SCHEDULED.value: published & Q(opens_at__gt=at),
                PollStatus.OPEN.value: published & Q(opens_at__lte=at, closes_at__gt=at),
                PollStatus.CLOSING.value: published & Q(closes_at__lte=at, finalised_at=None),
                PollStatus.FINAL.value: published & Q(closes_at__lte=at, finalised_at__isnull=False),
                PollStatus.ARCHIVED.value: Q(archived_at__isnull=False),
            }[status]
        )


class Poll(models.Model):
    """A question with options. `opens_at` and `closes_at` judge votes; `opened_at` and `closed_at` are when the clock's job saw to it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="polls")
    title = models.CharField(max_length=200)
    description = models.TextField(blank=True, max_length=5000)

    method = models.CharField(max_length=10, choices=VotingMethod, default=VotingMethod.SINGLE)
    # How many options a ballot holds; 1 and 1 for a single choice.
    min_choices = models.PositiveSmallIntegerField(default=1)
    max_choices = models.PositiveSmallIntegerField(default=1)

    voter_policy = models.CharField(max_length=10, choices=VoterPolicy)
    # True: a voter's last accepted vote stands. False: the first.
    allow_change = models.BooleanField(default=False)
    allow_withdrawal = models.BooleanField(default=False)

    # Voters that may vote from one address and one subnet (/24, IPv6: /64); none: as many as there are.
    address_limit = models.PositiveIntegerField(null=True, blank=True)
    subnet_limit = models.PositiveIntegerField(null=True, blank=True)
    limit_mode = models.CharField(max_length=4, choices=LimitMode, default=LimitMode.HARD)
    # Networks that no limit applies to, such as "198.51.100.0/24": a school, an office, a kiosk.
    allowed_networks = ArrayField(models.CharField(max_length=43), default=list, blank=True)

    # Whether votes from a network that a rule finds suspicious are held before anybody has looked (fraud.py).
    auto_quarantine = models.BooleanField(default=False)
    # {rule: {parameter: value}} where the poll's are not the installation's (fraud.py).
    rule_parameters = models.JSONField(default=dict, blank=True)

    # What its votes' network keys are made with, if accepted since that moment. Older ones can't be turned back any more.
    network_secret = models.ForeignKey(NetworkSecret, null=True, editable=False, on_delete=models.SET_NULL, related_name="+")
    network_secret_since = models.DateTimeField(null=True, editable=False)
    # Part of its voter keys. Deleted some time after its end: then nobody can try addresses against them.
    voter_salt = models.BinaryField(max_length=16, null=True, default=new_voter_salt, editable=False)
    # The fingerprint of the VOTER_SECRET that it keeps to its end; none: the oldest.
    voter_secret = models.BinaryField(max_length=8, null=True, editable=False)
    # False where it took votes before vote ids were keyed (voters.FormerVoteIds). The version before does not know the column.
    has_keyed_vote_ids = models.BooleanField(default=True, db_default=False, editable=False)
    # Grows with every change of its holds; 0: it never had any.
    holds_version = models.PositiveIntegerField(default=0, editable=False)

    results_visibility = models.CharField(max_length=11, choices=ResultsVisibility, default=ResultsVisibility.ALWAYS)
    # Until the poll is final its results change only once so many ballots more are in.
    results_step = models.PositiveIntegerField(db_default=1, default=1)

    opens_at = models.DateTimeField(default=now)
    closes_at = models.DateTimeField()
    published_at = models.DateTimeField(null=True, editable=False)  # none: a draft
    opened_at = models.DateTimeField(null=True, editable=False)
    closed_at = models.DateTimeField(null=True, editable=False)
    finalised_at = models.DateTimeField(null=True, editable=False)
    archived_at = models.DateTimeField(null=True, editable=False)
    created_at = models.DateTimeField(default=now, editable=False)
    # What was said about frozen texts, oldest first: [{"field", "option", "text", "at"}] (editing.py). Results read it with the row.
    errata = models.JSONField(default=list, db_default=Value([], models.JSONField()), editable=False)
    # Grows with every change by a person; a client that changes the poll can say which version it has read.
    version = models.PositiveIntegerField(default=1, editable=False)

    objects = PollQuerySet.as_manager()

    class Meta:
        db_table = "polls"
        constraints = [
            models.CheckConstraint(name="poll_closes_after_it_opens", condition=Q(closes_at__gt=F("opens_at"))),
            models.CheckConstraint(name="poll_choices_are_a_range", condition=Q(min_choices__gte=1) & Q(max_choices__gte=F("min_choices"))),
            models.CheckConstraint(name="single_choice_is_one_choice", condition=~Q(method="single") | Q(min_choices=1, max_choices=1)),
            models.CheckConstraint(name="poll_limits_let_somebody_vote", condition=~Q(address_limit=0) & ~Q(subnet_limit=0)),
        ]
        indexes = [
            models.Index(fields=["-created_at", "-id"], name="polls_newest_first"),  # GET /polls
            models.Index(fields=["owner", "-created_at"], name="polls_of_an_owner"),  # GET /polls?mine=true
            models.Index(fields=["closes_at"], name="polls_not_final", condition=Q(finalised_at=None)),  # closing.py
        ]

    def __str__(self) -> str:
        return self.title

    def status_at(self, at: datetime) -> PollStatus:
        return status(
            at,
            opens_at=self.opens_at,
            closes_at=self.closes_at,
            published_at=self.published_at,
            finalised_at=self.finalised_at,
            archived_at=self.archived_at,
        )

    @property
    def status(self) -> PollStatus:
        return self.status_at(now())


def status(
    at: datetime,
    *,
    opens_at: datetime,
    closes_at: datetime,
    published_at: datetime | None,
    finalised_at: datetime | None,
    archived_at: datetime | None,
) -> PollStatus:
    """Return where a poll with these moments is: no job that runs late can contradict the deadline."""
    if archived_at is not None:
        return PollStatus.ARCHIVED
    if published_at is None:
        return PollStatus.DRAFT
    if at < opens_at:
        return PollStatus.SCHEDULED
    if at < closes_at:
        return PollStatus.OPEN
    return PollStatus.CLOSING if finalised_at is None else PollStatus.FINAL


class Option(models.Model):
    """A choice of a poll. Its id is unique over all polls, so an option of another poll is never mistaken for one of this."""

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="options")
    text = models.CharField(max_length=200)
    description = models.TextField(blank=True, max_length=2000)
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


class JournalEntry(models.Model):
    """A change of a poll: who, when, why, and what it was before. Only ever added."""

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="journal")
    at = models.DateTimeField()
    # The name of the user or API client, or "the clock". Text, so that it outlives them.
    actor = models.CharField(max_length=200)
    action = models.CharField(max_length=20)
    reason = models.TextField(blank=True, max_length=500)
    # {field: [before, after]}
    changes = models.JSONField(default=dict)

    class Meta:
        db_table = "journal"
        verbose_name_plural = "journal entries"
        indexes = [models.Index(fields=["poll", "-id"], name="journal_of_a_poll")]  # GET /polls/{id}/journal

    def __str__(self) -> str:
        return f"{self.action} by {self.actor}"


class CastVote(models.Model):
    """What every stored vote holds, standing or not."""

    # No foreign key: counting locks the bundle's polls once instead of checking every row (see counting.py).
    poll_id = models.UUIDField()
    # Keyed hash of the voter in this poll (voters.py), never the voter.
    voter_key = models.UUIDField()
    vote_id = models.UUIDField()
    # Ids of the chosen options, sorted; none where the voter withdrew.
    selection = ArrayField(models.BigIntegerField())
    accepted_at = models.DateTimeField()
    # The client's address and subnet, encrypted, and a keyed hash of what its browser says of itself (networks.py); none for
    # allowed networks and for votes by API clients.
    address_key = models.UUIDField(null=True)
    subnet_key = models.UUIDField(null=True)
    signature_key = models.BigIntegerField(null=True)

    class Meta:
        abstract = True


class Vote(CastVote):
    """The votes that stand. The key itself is the rule: one vote per voter per poll. A withdrawal stands as a vote for nothing."""

    pk = models.CompositePrimaryKey("poll_id", "voter_key")
    counted_at = models.DateTimeField()

    class Meta:
        db_table = "votes"
        indexes = [
            # review.py, cases.py
            models.Index(fields=["subnet_key", "address_key"], name="votes_of_a_network", condition=Q(subnet_key__isnull=False)),
            BrinIndex(fields=["accepted_at"], name="votes_by_time", pages_per_range=32),  # fraud.py, review.py
        ]


class VoteAside(CastVote):
    """The votes that do not stand, each with its outcome. Whole, so that the order of arrival can't change a result."""

    pk = models.CompositePrimaryKey("poll_id", "voter_key", "vote_id")
    outcome = models.CharField(max_length=11, choices=Outcome)
    reason = models.CharField(max_length=20, choices=Reason)
    decided_at = models.DateTimeField()

    class Meta:
        db_table = "outcomes"
        indexes = [
            models.Index(fields=["decided_at"], name="outcomes_oldest"),  # closing.purge_outcomes
            # review.py, cases.py
            models.Index(fields=["subnet_key", "address_key"], name="outcomes_of_a_network", condition=Q(subnet_key__isnull=False)),
            BrinIndex(fields=["accepted_at"], name="outcomes_by_time", pages_per_range=32),  # fraud.py, review.py
        ]


class Tally(models.Model):
    """The results table: how many votes stand for a selection. Changes only together with the votes, in one transaction.

    A single choice adds to the tally of its option; an approval ballot to that of each chosen option, and to the one
    without options, which counts the ballots.
    """

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="tallies")
    selection = ArrayField(models.BigIntegerField())
    votes = models.BigIntegerField()
    # The same by counting alone: where it differs, somebody else has changed `votes` (integrity.py).
    counted = models.BigIntegerField(db_default=0)
    # How often this row changed; the sum over a poll is the revision of its results.
    revision = models.BigIntegerField()

    class Meta:
        db_table = "tallies"
        verbose_name_plural = "tallies"
        constraints = [models.UniqueConstraint(fields=["poll", "selection"], name="one_tally_per_selection")]


class NetworkCount(models.Model):
    """How many voters a limited poll has let vote from an address or subnet. Changes together with the votes, never falls."""

    pk = models.CompositePrimaryKey("poll_id", "network_key")
    poll_id = models.UUIDField()
    network_key = models.UUIDField()
    voters = models.IntegerField()

    class Meta:
        db_table = "network_counts"


class SuspiciousIP(models.Model):
    """A case: an address or subnet that a rule found suspicious (fraud.py). By itself it changes no result."""

    # None: over all polls.
    poll = models.ForeignKey(Poll, null=True, on_delete=models.CASCADE, related_name="cases")
    rule = models.CharField(max_length=30)
    kind = models.CharField(max_length=7, choices=NetworkKind)
    # The address key or the subnet key, and the subnet key of both.
    network_key = models.UUIDField()
    subnet_key = models.UUIDField()
    # Only the votes with this browser signature; none: all.
    signature_key = models.BigIntegerField(null=True)
    # What turns the keys back into a network, as long as it exists.
    network_secret = models.ForeignKey(NetworkSecret, null=True, on_delete=models.SET_NULL, related_name="+")
    # What the rule saw, in numbers: {"votes": 500, "voters": 500, "share": 0.98}. Never an address.
    evidence = models.JSONField(default=dict)
    # How far beyond the rule's threshold: 1 is just there, 3 three times as much.
    score = models.FloatField()
    votes = models.IntegerField()
    first_seen = models.DateTimeField()
    last_seen = models.DateTimeField()
    found_at = models.DateTimeField()
    state = models.CharField(max_length=9, choices=CaseState, default=CaseState.OPEN)
    reviewer = models.CharField(max_length=200, blank=True)
    reviewed_at = models.DateTimeField(null=True)
    note = models.TextField(blank=True, max_length=500)

    class Meta:
        db_table = "suspicious_ips"
        verbose_name = "suspicious address"
        verbose_name_plural = "suspicious addresses"
        constraints = [
            models.UniqueConstraint(
                fields=["poll", "rule", "network_key", "signature_key"], name="one_case_per_rule_and_network", nulls_distinct=False
            )
        ]
        indexes = [
            models.Index(fields=["-found_at", "-id"], name="cases_newest_first"),  # GET /suspicious-ips
            models.Index(fields=["subnet_key"], name="cases_of_a_subnet"),  # neighbours
        ]

    def __str__(self) -> str:
        return f"{self.rule} #{self.pk}"


class Hold(models.Model):
    """What was ruled last about some votes of a poll: those that fit everything said here, and those still to come.

    Several may fit one vote (holds.py): those of cases each stand for themselves, one without a case also ends those before it.
    """

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="holds")
    case = models.ForeignKey(SuspiciousIP, null=True, on_delete=models.CASCADE, related_name="holds")
    address_key = models.UUIDField(null=True)
    subnet_key = models.UUIDField(null=True)
    signature_key = models.BigIntegerField(null=True)
    accepted_from = models.DateTimeField(null=True)
    accepted_until = models.DateTimeField(null=True)  # not included

    ruling = models.CharField(max_length=10, choices=Ruling)
    # The poll's `holds_version` that this ruling made: the order of rulings. Those of one decision share it.
    version = models.PositiveIntegerField()
    # Whether the tallies are what this ruling makes them, and its decision is on record (review.py).
    is_settled = models.BooleanField(default=False)
    ruled_at = models.DateTimeField()
    actor = models.CharField(max_length=200)
    reason = models.TextField(max_length=500)

    class Meta:
        db_table = "holds"
        constraints = [
            models.CheckConstraint(
                name="hold_names_a_network_or_a_time",
                condition=Q(subnet_key__isnull=False) | Q(accepted_from__isnull=False, accepted_until__isnull=False),
            ),
            models.CheckConstraint(
                name="hold_knows_the_subnet_of_its_address", condition=Q(address_key=None) | Q(subnet_key__isnull=False)
            ),
            models.UniqueConstraint(
                fields=["poll", "case", "address_key", "subnet_key", "signature_key", "accepted_from", "accepted_until"],
                name="one_hold_per_selection",
                nulls_distinct=False,
            ),
        ]
        indexes = [models.Index(fields=["ruled_at"], name="holds_not_settled", condition=Q(is_settled=False))]  # review.settle_unfinished


class Decision(models.Model):
    """What was decided about votes or networks: who, when, why, and what it changed. Only ever added: a trigger keeps it so."""

    at = models.DateTimeField()
    # The name of the user, or "the clock". Text, so that it outlives them.
    actor = models.CharField(max_length=200)
    ruling = models.CharField(max_length=10, choices=Ruling)
    reason = models.TextField(max_length=500)
    # No foreign keys: nothing may change a decision, not even the deletion of what it was about.
    poll_id = models.UUIDField(null=True)
    cases = ArrayField(models.BigIntegerField(), default=list)
    # How many votes it took out of the tally, or put into it; of a look: how many it was about.
    votes = models.IntegerField(default=0)
    # {option id: [votes before, votes after]}
    changes = models.JSONField(default=dict)
    # Whether `changes` is empty because it would tell the choices of too few voters (disclosure.py), or the poll hid its results then.
    hides_changes = models.BooleanField(db_default=False, default=False)

    class Meta:
        db_table = "decisions"
        indexes = [
            GinIndex(fields=["cases"], name="decisions_of_a_case"),  # GET /suspicious-ips/{id}
            models.Index(fields=["poll_id", "-id"], name="decisions_of_a_poll"),
        ]

    def __str__(self) -> str:
        return f"{self.ruling} by {self.actor}"


class Look(models.Model):
    """What was shown of some voters' choices, added up: to whom, when, why (disclosure.py). Only ever added: a trigger keeps it so."""

    # No foreign keys, as in decisions.
    poll_id = models.UUIDField()
    at = models.DateTimeField()
    # The name of the user, or "the clock". Text, so that it outlives them.
    actor = models.CharField(max_length=200)
    reason = models.TextField(blank=True, max_length=500)
    kind = models.CharField(max_length=10, choices=LookKind)
    # Whose choices: [{field of a selector: its value}]
    selectors = models.JSONField(default=list)
    case_id = models.BigIntegerField(null=True)
    # What was shown, where it is shown again until something else may be.
    shown = models.JSONField(null=True)

    class Meta:
        db_table = "looks"
        indexes = [models.Index(fields=["poll_id", "-id"], name="looks_of_a_poll")]

    def __str__(self) -> str:
        return f"{self.kind} by {self.actor}"


class LookedAt(models.Model):
    """A set of voters whose choices a look added up. Only ever added."""

    look = models.ForeignKey(Look, on_delete=models.PROTECT, related_name="sets")
    poll_id = models.UUIDField()
    # Of each of them two numbers of 8 bytes: who, and which votes come or go (disclosure.py).
    moves = models.BinaryField()

    class Meta:
        db_table = "looked_at_sets"
        indexes = [models.Index(fields=["poll_id"], name="looked_at_sets_of_a_poll")]  # disclosure.py


class ShownResults(models.Model):
    """What a poll's results show while they are held back: where the tallies differ from it by too few voters (results.py)."""

    poll = models.OneToOneField(Poll, primary_key=True, on_delete=models.CASCADE, related_name="shown_results")
    # {option id, or "" for the ballots of an approval poll: votes}
    votes = models.JSONField(default=dict)
    revision = models.BigIntegerField(default=0)
    as_of = models.DateTimeField()
    # So many ballots the tallies had when they were last shown, or last ruled on; and by how many they must differ to be shown again.
    ballots = models.BigIntegerField(default=0)
    step = models.IntegerField()

    class Meta:
        db_table = "shown_results"


class Comparison(models.Model):
    """How a poll's results would change with all votes that are under review, and without any of them (review.py)."""

    poll = models.OneToOneField(Poll, primary_key=True, on_delete=models.CASCADE, related_name="comparison")
    as_of = models.DateTimeField()
    cases = models.IntegerField()  # open ones
    voters = models.IntegerField()  # whose votes are under review
    # {option id or "" for ballots: what to add to the tally}
    with_votes = models.JSONField(default=dict)
    without_votes = models.JSONField(default=dict)
    # The same as `as_of` where both may be shown (disclosure.py).
    shown_as_of = models.DateTimeField(null=True)

    class Meta:
        db_table = "comparisons"


class Block(models.Model):
    """A network that the API refuses for a time. Readable, for it must be recognised; the row goes when the block ends."""

    network = models.CharField(max_length=43)  # such as "192.0.2.0/24"
    until = models.DateTimeField()
    made_at = models.DateTimeField()
    actor = models.CharField(max_length=200)
    reason = models.TextField(max_length=500)
    case = models.ForeignKey(SuspiciousIP, null=True, on_delete=models.SET_NULL, related_name="blocks")

    class Meta:
        db_table = "blocks"
        constraints = [models.UniqueConstraint(fields=["network"], name="one_block_per_network")]

    def __str__(self) -> str:
        return f"block {self.pk}"


class Attempts(models.Model):
    """How often an address tried to become a voter of a poll in one hour, without voting: for who guesses codes or collects tokens."""

    pk = models.CompositePrimaryKey("poll_id", "address_key", "hour")
    poll_id = models.UUIDField()
    address_key = models.UUIDField()
    subnet_key = models.UUIDField()
    hour = models.DateTimeField()
    wrong_codes = models.IntegerField(default=0)
    tokens = models.IntegerField(default=0)

    class Meta:
        db_table = "attempts"


class VoterCode(models.Model):
    """A code that lets its holder vote in one poll. The code itself is not stored: its hash is the voter key of its vote."""

    poll = models.ForeignKey(Poll, on_delete=models.CASCADE, related_name="codes", db_index=False)
    voter_key = models.UUIDField()
    # The owner's own words for whom it was made, such as a membership number, encrypted: beside the votes they would name voters.
    sealed_label = models.BinaryField(null=True, editable=False)
    # The same in clear, as the version before stored it, until `codes.seal_labels` comes by.
    clear_label = models.CharField(max_length=100, blank=True, default="", db_default="", db_column="label", editable=False)
    created_at = models.DateTimeField(default=now)
    # From this moment on it is not accepted. A little after the revocation, by when every web process knows.
    revoked_at = models.DateTimeField(null=True)

    class Meta:
        db_table = "voter_codes"
        constraints = [models.UniqueConstraint(fields=["poll", "voter_key"], name="one_code_per_voter")]
        indexes = [models.Index(fields=["poll", "id"], name="codes_of_a_poll")]  # GET /polls/{id}/codes, page by page

    def __str__(self) -> str:
        return f"code {self.pk}"

    @property
    def label(self) -> str:
        """For whom it was made; empty where nothing was said, or the VOTER_SECRET that sealed it is gone."""
        return label_of(self.poll_id, self.sealed_label, self.clear_label)


def label_of(poll_id: uuid.UUID, sealed_label: bytes | memoryview | None, clear_label: str) -> str:
    return clear_label if sealed_label is None else keys.unseal(sealed_label, poll_id.bytes) or ""


class OutboxBundle(models.Model):
    """A bundle that the broker could not take; `outbox.drain` counts and deletes it."""

    body = models.BinaryField()
    kept_at = models.DateTimeField(default=now)

    class Meta:
        db_table = "outbox"


class Moment(models.Model):
    """When something last happened or was last true, by name (stamps.py)."""

    name = models.CharField(primary_key=True, max_length=200)
    at = models.DateTimeField()
    # By PostgreSQL's clock: when it was written. A version that does not know of this column leaves an older moment, which counts for less.
    noted_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "moments"

    def __str__(self) -> str:
        return self.name


class Clock(models.Model):
    """How far a program's clock on a host is ahead of PostgreSQL's (clocks.py)."""

    place = models.CharField(primary_key=True, max_length=150)  # program@host
    program = models.CharField(max_length=20)
    host = models.CharField(max_length=100)
    ahead_seconds = models.FloatField()
    noted_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "clocks"

    def __str__(self) -> str:
        return self.place


class Scope(models.TextChoices):
    """What an API client may do in its owner's name."""

    VOTES_CAST = "votes:cast", "cast votes"
    POLLS_WRITE = "polls:write", "make and change polls"
    RESULTS_READ = "results:read", "read results that are not public"


class ApiClient(models.Model):
    """A program that acts for its owner, within its scopes, in the owner's polls (or in the one it was made for)."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_clients")
    name = models.CharField(max_length=100)
    scopes = ArrayField(models.CharField(max_length=20, choices=Scope), default=list)
    poll = models.ForeignKey(Poll, null=True, blank=True, on_delete=models.CASCADE, related_name="api_clients")
    prefix = models.CharField(max_length=16, unique=True, editable=False)
    # SHA-256 of the key. The key is 256 random bits, so a slow password hash would protect nothing more.
    key_hash = models.BinaryField(max_length=32, editable=False)
    # The key before the last rotation works until this moment, so that the program can change over.
    previous_prefix = models.CharField(max_length=16, null=True, unique=True, editable=False)
    previous_key_hash = models.BinaryField(max_length=32, null=True, editable=False)
    previous_until = models.DateTimeField(null=True, editable=False)
    created_at = models.DateTimeField(default=now, editable=False)
    # About a minute exact: not written for every vote.
    last_used_at = models.DateTimeField(null=True, editable=False)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "api_clients"
        verbose_name = "API client"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix})"


class PipelineDesk(models.Model):
    """No table: gives the page that shows the pipeline a permission in the admin."""

    class Meta:
        managed = False
        default_permissions = ("view",)
        verbose_name = verbose_name_plural = "pipeline"


class DeadLetterDesk(models.Model):
    """No table: gives the queue of dead letters a page and a permission in the admin."""

    class Meta:
        managed = False
        default_permissions = ("view",)
        verbose_name = verbose_name_plural = "dead letters"
