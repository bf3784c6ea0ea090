"""What a decision is about: a case as whoever decides looks at it, and which votes a rule or a network means. Reads only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from django.db import connection
from django.db.models import Q, QuerySet

from polls import networks, problems
from polls.holds import Selector
from polls.models import CaseState, Decision, Hold, Poll, SuspiciousIP
from polls.moments import iso

# The rule whose cases are about the votes alone that a soft limit holds up, not about all of the network's.
SOFT_LIMIT = "soft_limit"
# What is shown of a long list: the beginning, its longest items first.
MAX_SHOWN = 20
MAX_ADDRESSES = 10

# The votes that fit a case, whatever became of them. Cost: those of its subnet are read (the index votes_of_a_network).
_THEIRS = """
    WITH theirs AS (
        SELECT poll_id, voter_key, vote_id, selection, accepted_at, address_key, signature_key, 'counted' AS outcome
        FROM votes WHERE subnet_key = %(subnet)s
        UNION ALL
        SELECT poll_id, voter_key, vote_id, selection, accepted_at, address_key, signature_key, outcome
        FROM outcomes WHERE subnet_key = %(subnet)s
    ), fitting AS (
        SELECT * FROM theirs
        WHERE (%(poll)s::uuid IS NULL OR poll_id = %(poll)s)
          AND (%(address)s::uuid IS NULL OR address_key = %(address)s)
          AND (%(signature)s::bigint IS NULL OR signature_key = %(signature)s)
    )
"""
# Each follows _THEIRS.
_FATES = "SELECT outcome, count(*) FROM fitting GROUP BY outcome ORDER BY count(*) DESC, outcome"
_SPAN = "SELECT min(accepted_at), max(accepted_at) FROM fitting"
# From a Monday on, in UTC.
_OVER_TIME = """
    SELECT date_bin(%(step)s, accepted_at, '2000-01-03Z'), count(*) FILTER (WHERE outcome = 'counted'), count(*)
    FROM fitting GROUP BY 1 ORDER BY 1
"""
# Of each voter the ballot that stands, or else the last one.
_BALLOTS = """
    SELECT DISTINCT ON (poll_id, voter_key) poll_id, voter_key, vote_id, selection, outcome = 'counted'
    FROM fitting WHERE selection <> '{}' ORDER BY poll_id, voter_key, outcome = 'counted' DESC, accepted_at DESC
"""
_ADDRESSES = """
    SELECT address_key = %(subject)s, count(*), count(DISTINCT voter_key), count(*) OVER ()
    FROM theirs WHERE %(poll)s::uuid IS NULL OR poll_id = %(poll)s
    GROUP BY address_key ORDER BY count(*) DESC, address_key LIMIT %(most)s
"""

# Steps of time that people can read, in seconds; the shortest that needs no more bars than this.
_STEPS = (60, 300, 900, 3600, 3 * 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600)
_MAX_BARS = 60


class Bar(NamedTuple):
    """Votes of a case that were accepted within one step of time."""

    begins_at: datetime
    counted: int
    votes: int  # with those that do not count


class Ballot(NamedTuple):
    """What one of a case's voters chose."""

    voter: UUID
    vote_id: UUID
    selection: list[int]
    stands: bool


class Choice(NamedTuple):
    """How many of a case's voters chose an option, beside everybody else of the poll. The shares are of ballots, from 0 to 1."""

    poll_id: UUID
    option_id: int
    text: str
    voters: int
    share: float
    others: int
    others_share: float
    votes: int  # that count for it, of all
    without: int  # if the case's were voided
    released: int  # if they were released
    as_of: datetime


class AddressVotes(NamedTuple):
    """What one address of the subnet sent; never which address."""

    is_subject: bool  # the address that the case is about
    votes: int
    voters: int


def network_of(case: SuspiciousIP) -> str | None:
    """Return the network in readable form, such as "192.0.2.7/32"; None once its secret is gone."""
    return networks.reveal(case.network_secret, case.kind, case.network_key, case.subnet_key)


def fates(case: SuspiciousIP) -> dict[str, int]:
    """Return `{outcome: votes}` of all votes that fit the case, the most frequent first."""
    return dict(_rows(_FATES, case))


def over_time(case: SuspiciousIP) -> tuple[timedelta, list[Bar]]:
    """Return the case's votes in steps of time, empty ones too, from the first to the last vote; and how long a step is."""
    [(first, last)] = _rows(_SPAN, case)
    if first is None:
        return timedelta(seconds=_STEPS[0]), []
    span = (last - first).total_seconds()
    step = timedelta(seconds=next((step for step in _STEPS if span <= step * (_MAX_BARS - 1)), _STEPS[-1]))
    found = {begins_at: Bar(begins_at, counted, votes) for begins_at, counted, votes in _rows(_OVER_TIME, case, step=step)}
    begins_at, bars = min(found), []
    while begins_at <= last:
        bars.append(found.get(begins_at, Bar(begins_at, 0, 0)))
        begins_at += step
    return step, bars


def ballots_of(case: SuspiciousIP) -> dict[UUID, list[Ballot]]:
    """Return {poll id: the ballot of each of the case's voters}."""
    found: dict[UUID, list[Ballot]] = {}
    for poll_id, *ballot in _rows(_BALLOTS, case):
        found.setdefault(poll_id, []).append(Ballot._make(ballot))
    return found


def beside_others(
    read: Mapping[str, Any],
    ballots: Sequence[Ballot],
    without: Mapping[int, tuple[int, int]],
    released: Mapping[int, tuple[int, int]],
    at: datetime,
) -> list[Choice]:
    """Return the poll's options in their order, by its results and what voiding and releasing the case's votes would change."""
    voters = Counter(option for ballot in ballots for option in ballot.selection)
    standing = Counter(option for ballot in ballots if ballot.stands for option in ballot.selection)
    all_others = read["total_votes"] - sum(ballot.stands for ballot in ballots)
    found = []
    for option in read["options"]:
        option_id, votes = int(option["id"]), option["votes"]
        # Not below 0: the results may be held back.
        others = max(votes - standing[option_id], 0)
        found.append(
            Choice(
                UUID(read["poll"]),
                option_id,
                option["text"],
                voters[option_id],
                round(voters[option_id] / len(ballots), 4),
                others,
                round(others / all_others, 4) if all_others > 0 else 0.0,
                votes,
                without.get(option_id, (votes, votes))[1],
                released.get(option_id, (votes, votes))[1],
                at,
            )
        )
    return found


def stored(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """Return the choices as JSON has them."""
    return [{**choice._asdict(), "poll_id": str(choice.poll_id), "as_of": iso(choice.as_of)} for choice in choices]


def restored(choices: Iterable[Mapping[str, Any]]) -> list[Choice]:
    return [
        Choice(**{**choice, "poll_id": UUID(choice["poll_id"]), "as_of": datetime.fromisoformat(choice["as_of"])}) for choice in choices
    ]


def addresses(case: SuspiciousIP) -> tuple[int, list[AddressVotes]]:
    """Return how many addresses of the case's subnet voted, and the busiest of them."""
    rows = _rows(_ADDRESSES, case, subject=case.network_key, most=MAX_ADDRESSES)
    return (rows[0][3] if rows else 0), [AddressVotes(is_subject, votes, voters) for is_subject, votes, voters, _ in rows]


def neighbours(case: SuspiciousIP) -> QuerySet[SuspiciousIP]:
    """Return the latest other cases in the case's subnet, in whatever poll."""
    found = SuspiciousIP.objects.filter(subnet_key=case.subnet_key).exclude(pk=case.pk)
    return found.select_related("poll", "network_secret").order_by("-found_at", "-id")[:MAX_SHOWN]


def holds(case: SuspiciousIP) -> QuerySet[Hold]:
    """Return the rulings on the case's votes, or on more of them: its address, its subnet. Those on a time alone are not looked for."""
    selector = Selector.of_case(case)
    found = Hold.objects.filter(subnet_key=case.subnet_key)
    for name in ("address_key", "signature_key"):
        found = found.filter(Q(**{name: None}) | Q(**{name: getattr(selector, name)}))
    found = found if case.poll_id is None else found.filter(poll_id=case.poll_id)
    return found.order_by("-ruled_at", "id")[:MAX_SHOWN]


def decisions(case: SuspiciousIP) -> QuerySet[Decision]:
    """Return what was decided about the case, latest first."""
    return Decision.objects.filter(cases__contains=[case.pk]).order_by("-id")


# --- Which votes are meant --------------------------------------------------------------------------------------------


def of_rule(poll_id: UUID, rule: str) -> QuerySet[SuspiciousIP]:
    """Return the rule's cases in the poll that are open or confirmed: those that a ruling on the rule is about."""
    return SuspiciousIP.objects.filter(poll_id=poll_id, rule=rule, state__in=[CaseState.OPEN, CaseState.CONFIRMED]).order_by("pk")


def keys_in(poll: Poll, address: str) -> tuple[UUID, UUID]:
    """Return the keys of an address and of its subnet among the poll's votes since its `network_secret_since`.

    Raises Refusal when the poll has no secret any more, or the address is none.
    """
    try:
        return networks.cipher_for(poll).keys(address)
    except LookupError:
        raise problems.NOT_OFFERED.says("Nothing can tell this poll's addresses any more.") from None
    except ValueError:
        raise problems.INVALID.says("This is no address.", pointer="/address") from None


def _rows(statement: str, case: SuspiciousIP, **more: Any) -> list[tuple[Any, ...]]:
    selector = Selector.of_case(case)
    with connection.cursor() as cursor:
        cursor.execute(
            _THEIRS + statement,
            {
                "poll": case.poll_id,
                "subnet": selector.subnet_key,
                "address": selector.address_key,
                "signature": selector.signature_key,
                **more,
            },
        )
        return list(cursor)
