"""VOTER_SECRET: whether this process has the VOTER_SECRET that its database was filled with, and the change to another one.

With another secret every voter is somebody else, and everybody could vote again. So the database holds the fingerprint of the
secret, and each process compares at its start.
"""

from dataclasses import dataclass
from datetime import datetime

from django.db import connection, transaction
from django.db.models import Exists, OuterRef

from polls import keys
from polls.models import NetworkSecret, Poll, VoterCode, VoterSecret

_CURE = "Set VOTER_SECRET or VOTER_SECRET_FALLBACKS to the secret with that one. To change it: docs/operations.md, Secrets."


@dataclass(frozen=True)
class Use:
    """What still needs a VOTER_SECRET: polls that are not final, and secrets of networks, whose addresses nobody reads without it."""

    fingerprint: str
    since: datetime
    is_current: bool
    is_known: bool
    is_lost: bool
    open_polls: int
    network_secrets: int


def current() -> bytes | None:
    """Return the fingerprint of the VOTER_SECRET that new polls get; None before the first `manage.py setup`."""
    newest = VoterSecret.objects.order_by("-since").values_list("fingerprint", flat=True).first()
    return None if newest is None else bytes(newest)


def record(at: datetime) -> None:
    """Note this process's VOTER_SECRET as that of a database that has none yet, and name it in rows that name none. Repeatable."""
    with transaction.atomic():
        _lock()
        first = VoterSecret.objects.order_by("since").first()
        if first is None:
            first = VoterSecret.objects.create(fingerprint=keys.OWN.fingerprint, since=at)
        for model in (Poll, NetworkSecret):
            model.objects.filter(voter_secret=None).update(voter_secret=bytes(first.fingerprint))  # type: ignore[attr-defined]


def faults() -> list[str]:
    """Return, in sentences, what keeps this process from working on this database; nothing when its secrets are the right ones."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT fingerprint FROM voter_secrets ORDER BY since DESC")
        recorded = [bytes(fingerprint) for (fingerprint,) in cursor]
        if not recorded:
            return []  # `manage.py setup` is still to come
        cursor.execute(
            """
            SELECT fingerprint, count(*) FROM (
                SELECT voter_secret AS fingerprint FROM polls WHERE finalised_at IS NULL AND archived_at IS NULL
                UNION ALL SELECT s.voter_secret FROM polls p JOIN network_secrets s ON s.id = p.network_secret_id
                WHERE finalised_at IS NULL AND archived_at IS NULL
            ) needed JOIN voter_secrets USING (fingerprint) WHERE lost_at IS NULL GROUP BY 1
            """
        )
        needed = {bytes(fingerprint): polls for fingerprint, polls in cursor}
    known = {of.fingerprint for of in keys.KNOWN}
    if recorded[0] not in known:
        return [f"VOTER_SECRET has the fingerprint {keys.OWN.fingerprint.hex()}; this database wants {recorded[0].hex()}. {_CURE}"]
    return [
        f"Polls that are not final need the VOTER_SECRET with the fingerprint {fingerprint.hex()}: add it to VOTER_SECRET_FALLBACKS."
        for fingerprint in needed
        if fingerprint not in known
    ]


def rotate(at: datetime) -> bool:
    """Have polls that are made from now on use this process's VOTER_SECRET; return whether they did not before.

    Polls keep the secret that they have, but for drafts without codes. Every process must have both secrets by now. Repeatable.
    """
    record(at)
    with transaction.atomic():
        _lock()
        if current() == keys.OWN.fingerprint:
            return False
        VoterSecret.objects.update_or_create(fingerprint=keys.OWN.fingerprint, defaults={"since": at, "lost_at": None})
        has_codes = Exists(VoterCode.objects.filter(poll_id=OuterRef("pk")))
        Poll.objects.filter(~has_codes, published_at=None).update(voter_secret=keys.OWN.fingerprint)
    return True


def give_up_lost(at: datetime) -> int:
    """Do without the secrets that this process does not have; return how many. Polls of theirs take no votes any more."""
    known = [of.fingerprint for of in keys.KNOWN]
    return VoterSecret.objects.filter(lost_at=None).exclude(fingerprint__in=known).update(lost_at=at)


def uses() -> list[Use]:
    """Return what needs which VOTER_SECRET, newest first."""
    known, newest = {of.fingerprint for of in keys.KNOWN}, current()
    return [
        Use(
            fingerprint=(fingerprint := bytes(secret.fingerprint)).hex(),
            since=secret.since,
            is_current=fingerprint == newest,
            is_known=fingerprint in known,
            is_lost=secret.lost_at is not None,
            open_polls=Poll.objects.filter(finalised_at=None, archived_at=None, voter_secret=fingerprint).count(),
            network_secrets=NetworkSecret.objects.filter(voter_secret=fingerprint).count(),
        )
        for secret in VoterSecret.objects.order_by("-since")
    ]


def _lock() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL statement_timeout = '10min'")  # every poll that there ever was may have to be named
        cursor.execute("LOCK TABLE voter_secrets IN SHARE ROW EXCLUSIVE MODE")
