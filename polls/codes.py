"""Voter codes: making, taking, revoking and knowing them. What is stored of a code is the voter key of its holder's vote."""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.db import connection, models, transaction
from django.db.models import Case, Exists, OuterRef, Q, Value, When

from polls import journal, keys, problems, voters
from polls.editing import SHORTEST_NOTICE
from polls.journal import Act
from polls.literals import array
from polls.models import Poll, PollStatus, Vote, VoteAside, VoterCode, VoterPolicy
from polls.problems import Refusal

# Of one call: stored in about two seconds, far below the database's limit of 15 for a statement.
MAX_CODES = 100_000
# Chosen: ten cities' electoral rolls; without an end, one owner could fill the disk.
MAX_CODES_OF_A_POLL = 10_000_000
MAX_LENGTH = 64
MAX_LABEL_LENGTH = 100
# What an owner's own codes must have, as normalised: fewer can be guessed, however slowly a guesser is served.
MIN_LENGTH = 8
MIN_DIGITS = 10  # where there is nothing but digits
MIN_DIFFERENT = 4
# Of a list with many mistakes, the first ones are told.
MAX_MISTAKES = 100

# Crockford's base32: no I, L, O and U. 12 of its characters are 60 random bits.
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
# It reads what people mix up as one: so do we, in every code, for when a vote comes nobody knows who made its code.
_LOOK_ALIKES = str.maketrans("OIL", "011")
# Spaces and hyphens, and the dashes that word processors and phones make of these.
_UNREAD = re.compile(r"[\s\-\u2010-\u2015\u2212]+")


class State(models.TextChoices):
    """What a code can still do. Which are used is told once the poll is final: beside moving tallies it would tell who voted for what."""

    UNUSED = "unused", "it can vote"
    USED = "used", "a vote came with it"
    REVOKED = "revoked", "it is not accepted, or will not be in a moment"


@dataclass(frozen=True)
class Row:
    """A code as an owner sends it; `place` is what a mistake in it is called by, such as "Line 4"."""

    code: str
    label: str
    place: str


@dataclass(frozen=True)
class Issued:
    """A code with the id it is known by from now on; `is_new` is False where the poll had it already."""

    id: int
    code: str
    label: str
    is_new: bool


@dataclass(frozen=True)
class Counts:
    """How many codes a poll has. A code that was used and revoked is among both."""

    codes: int
    used: int
    revoked: int


def normalise(code: str) -> str:
    """Return the code as it is hashed: however it was typed, in which case, with hyphens and spaces or without.

    Raises ValueError on what can't be a code, with a sentence that does not repeat it.
    """
    too_long = ValueError(f"A code has at most {MAX_LENGTH} characters.")
    if len(code) > 4 * MAX_LENGTH:
        raise too_long
    normalised = _UNREAD.sub("", unicodedata.normalize("NFKC", code)).upper().translate(_LOOK_ALIKES)
    if not normalised:
        raise ValueError("A code is not empty.")
    if len(normalised) > MAX_LENGTH:
        raise too_long
    if not normalised.isprintable():
        raise ValueError("A code has visible characters only.")
    return normalised


def valid(keys: Iterable[tuple[UUID, UUID]], at: datetime) -> set[tuple[UUID, UUID]]:
    """Return which of these (poll id, voter key) belong to a code that is accepted at this moment. One statement, however many."""
    asked = list(keys)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT poll_id, voter_key FROM voter_codes
            WHERE (poll_id, voter_key) IN (SELECT * FROM unnest(%s::uuid[], %s::uuid[])) AND (revoked_at IS NULL OR revoked_at > %s)
            """,
            [array(poll_id for poll_id, _ in asked), array(voter_key for _, voter_key in asked), at],
        )
        return set(cursor)


def generate(poll: Poll, count: int, act: Act, labels: Sequence[str] = ()) -> list[Issued]:
    """Give the poll this many new codes, all or none, and return them: they can't be read again.

    The first codes get the labels. Raises Refusal where the poll takes no codes (any more).
    """
    if len(labels) > count:
        raise problems.INVALID.says("There are more labels than codes.", pointer="/labels")
    mistakes = [(f"/labels/{index}", mistake) for index, label in enumerate(labels) if (mistake := _mistake_in_label(label))]
    _refuse(mistakes)
    codes: set[str] = set()
    while len(codes) < count:
        codes.add(_new_code())
    rows = [Row(code, label, "") for code, label in zip(codes, [*labels, *[""] * (count - len(labels))], strict=True)]
    # One that the poll has already comes once in a hundred million lists of 100,000; the answer then lacks it.
    return [issued for issued in _add(poll, rows, act) if issued.is_new]


def upload(poll: Poll, rows: Sequence[Row], act: Act) -> list[Issued]:
    """Give the poll these codes, all or none, and return each in their order; one that it has already stays as it is.

    Raises Refusal on mistakes, with the place of each, and where the poll takes no codes (any more).
    """
    if not 1 <= len(rows) <= MAX_CODES:
        raise problems.INVALID.says(f"A list has at least one code and at most {MAX_CODES}.", pointer="/codes")
    _refuse(_mistakes(rows))
    return _add(poll, rows, act)


def revoke(poll: Poll, ids: Iterable[int] | None, act: Act) -> tuple[int, datetime]:
    """Revoke these codes, all or none (None: all there are); return how many, and from when on they are not accepted.

    Used ones as well: to leave them out would tell which they are. A vote that came with one counts, and changes no more.
    """
    revoked_at = act.at + SHORTEST_NOTICE
    with transaction.atomic():
        poll = _lock(poll, act.at)
        wanted = poll.codes.all() if ids is None else _known(poll, list(ids))
        before = poll.codes.filter(revoked_at__isnull=False).count()
        revoked = wanted.filter(revoked_at=None).update(revoked_at=revoked_at)
        if revoked:
            journal.write(poll, act, "codes_revoked", {"revoked_codes": (before, before + revoked)})
    return revoked, revoked_at


def listing(poll: Poll, state: str | None = None) -> models.QuerySet[VoterCode]:
    """Return the poll's codes, of one State only where it is given, each annotated with its `state`.

    Before the poll is final `state` is None, but for those that are revoked, used or not; and used and unused ones can't be listed
    apart: raises Refusal.
    """
    if poll.voter_policy != VoterPolicy.CODE:
        raise _not_offered(poll)
    if poll.finalised_at is None:
        if state not in (None, State.REVOKED):
            raise problems.NOT_OFFERED.says("Which codes were used is told once the poll is final, until then only how many: see counts.")
        codes = poll.codes.filter(revoked_at__isnull=False) if state else poll.codes.all()
        return codes.annotate(state=Case(When(revoked_at__isnull=False, then=Value(State.REVOKED.value)), output_field=models.CharField()))
    codes = poll.codes.filter(_in_state(state)) if state else poll.codes.all()
    return codes.annotate(state=Case(*(When(_in_state(state), then=Value(state)) for state in State.values)))


def count(poll: Poll) -> Counts:
    """Return how many codes the poll has. Cost: its votes are read, and those that do not stand: seconds where there are millions."""
    if poll.voter_policy != VoterPolicy.CODE:
        raise _not_offered(poll)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT (SELECT count(*) FROM voter_codes WHERE poll_id = %(poll)s),
                   (SELECT count(*) FROM (
                       SELECT voter_key FROM votes WHERE poll_id = %(poll)s UNION SELECT voter_key FROM outcomes WHERE poll_id = %(poll)s
                   ) used),
                   (SELECT count(*) FROM voter_codes WHERE poll_id = %(poll)s AND revoked_at IS NOT NULL)
            """,
            {"poll": poll.pk},
        )
        return Counts(*cursor.fetchone())


def _in_state(state: str) -> Q:
    its_voter = {"poll_id": OuterRef("poll_id"), "voter_key": OuterRef("voter_key")}
    used = Q(Exists(Vote.objects.filter(**its_voter))) | Q(Exists(VoteAside.objects.filter(**its_voter)))
    return {
        State.UNUSED.value: ~used & Q(revoked_at=None),
        State.USED.value: used,
        State.REVOKED.value: ~used & Q(revoked_at__isnull=False),
    }[state]


def _known(poll: Poll, ids: list[int]) -> models.QuerySet[VoterCode]:
    """Return these codes; raises Refusal when the poll does not have one of them."""
    wanted = poll.codes.filter(pk__in=ids)
    known = set(wanted.values_list("pk", flat=True))
    _refuse([(f"/ids/{index}", "The poll has no code with this id.") for index, pk in enumerate(ids) if pk not in known])
    return wanted


# Codes whose labels are sealed in one transaction.
SEALED_AT_ONCE = 5000


def seal_labels() -> int:
    """Encrypt the labels that the version before stored in clear; return how many. Repeatable."""
    sealed, clear = 0, VoterCode.objects.filter(sealed_label=None).exclude(clear_label="").select_related("poll")
    while some := list(clear.order_by("pk")[:SEALED_AT_ONCE]):
        for code in some:
            code.sealed_label = keys.of(code.poll.voter_secret).seal(code.clear_label, code.poll_id.bytes)
            code.clear_label = ""
        VoterCode.objects.bulk_update(some, ["sealed_label", "clear_label"])
        sealed += len(some)
    return sealed


def _new_code() -> str:
    characters = "".join(_ALPHABET[byte % 32] for byte in secrets.token_bytes(12))
    return "-".join((characters[:4], characters[4:8], characters[8:]))


def _mistakes(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Yield (pointer, sentence) for each row that is no good code."""
    first: dict[str, Row] = {}
    for index, row in enumerate(rows):
        if mistake := _mistake_in_label(row.label):
            yield f"/codes/{index}/label", f"{row.place}: {mistake}"
        try:
            code = normalise(row.code)
        except ValueError as exc:
            yield f"/codes/{index}/code", f"{row.place}: {exc}"
            continue
        if mistake := _weakness(code):
            yield f"/codes/{index}/code", f"{row.place}: {mistake}"
        elif (same := first.setdefault(code, row)) is not row:
            yield f"/codes/{index}/code", f"{row.place}: This code reads like that of {same.place[0].lower()}{same.place[1:]}."


def _weakness(code: str) -> str | None:
    if len(code) < MIN_LENGTH:
        return f"A code has at least {MIN_LENGTH} characters."
    if code.isdecimal() and len(code) < MIN_DIGITS:
        return f"A code of digits only (O, I and L read as digits) has at least {MIN_DIGITS} of them."
    if len(set(code)) < MIN_DIFFERENT:
        return f"A code has at least {MIN_DIFFERENT} different characters."
    return None


def _mistake_in_label(label: str) -> str | None:
    if len(label) > MAX_LABEL_LENGTH:
        return f"A label has at most {MAX_LABEL_LENGTH} characters."
    return None if not label or label.isprintable() else "A label is one line of visible characters."


def _refuse(mistakes: Iterable[tuple[str, str]]) -> None:
    """Raise the Refusal that tells these (pointer, sentence), if there are any."""
    errors = [{"detail": detail, "pointer": f"#{pointer}"} for pointer, detail in mistakes]
    if len(errors) > MAX_MISTAKES:
        raise Refusal(problems.INVALID, f"{errors[0]['detail']} And {len(errors) - 1} more.", errors[:MAX_MISTAKES])
    if errors:
        raise Refusal(problems.INVALID, errors[0]["detail"], errors)


def _add(poll: Poll, rows: Sequence[Row], act: Act) -> list[Issued]:
    poll_keys = keys.of(poll.voter_secret)
    voter_keys = voters.VoterKeys(poll.pk, VoterPolicy.CODE, poll.voter_salt, poll_keys)
    hashed = [voter_keys.of(normalise(row.code)) for row in rows]
    with transaction.atomic():
        poll = _lock(poll, act.at)
        before = poll.codes.count()
        if before + len(rows) > MAX_CODES_OF_A_POLL:
            raise problems.INVALID.says(f"A poll has at most {MAX_CODES_OF_A_POLL} codes; this one has {before}.", pointer="/codes")
        new = _insert(poll, hashed, [poll_keys.seal(row.label, poll.pk.bytes) if row.label else None for row in rows], act.at)
        known = dict(poll.codes.filter(voter_key__in=set(hashed) - new.keys()).values_list("voter_key", "pk"))
        if new:
            journal.write(poll, act, "codes_added", {"codes": (before, before + len(new))})
    return [
        Issued(new[key], row.code, row.label, True) if key in new else Issued(known[key], row.code, row.label, False)
        for key, row in zip(hashed, rows, strict=True)
    ]


def _lock(poll: Poll, at: datetime) -> Poll:
    """Keep others from changing the poll, and let its votes be counted; raises Refusal where its codes can't change (any more)."""
    poll = Poll.objects.select_for_update(no_key=True).get(pk=poll.pk)
    if poll.voter_policy != VoterPolicy.CODE:
        raise _not_offered(poll)
    status = poll.status_at(at)
    if status not in (PollStatus.DRAFT, PollStatus.SCHEDULED, PollStatus.OPEN):
        raise problems.POLL_IN_USE.says(f"Codes can't change any more: the poll is {status}.")
    return poll


def _insert(poll: Poll, voter_keys: Sequence[UUID], labels: Sequence[bytes | None], at: datetime) -> dict[UUID, int]:
    """Insert the codes that the poll does not have; return {voter key: id} of these.

    In the order of their hashes: in the order of the list, their ids would tell whose each is to whoever has the list.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO voter_codes (poll_id, voter_key, sealed_label, created_at)
            SELECT %s, voter_key, sealed_label, %s FROM unnest(%s::uuid[], %s::bytea[]) AS c (voter_key, sealed_label)
            ORDER BY voter_key ON CONFLICT DO NOTHING RETURNING voter_key, id
            """,
            [poll.pk, at, array(voter_keys), array(None if label is None else f"\\x{label.hex()}" for label in labels)],
        )
        return dict(cursor)


def _not_offered(poll: Poll) -> Refusal:
    return problems.NOT_OFFERED.says(f"Only a poll with voter_policy code has voter codes; this one's is {poll.voter_policy}.")
