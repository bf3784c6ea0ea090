"""Review: people's rulings on votes (quarantine, release, void), each one transaction with the tallies, and on record for good."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby, repeat
from typing import TypeVar
from uuid import UUID

from django.db import OperationalError, connection, transaction

from polls import counting, journal, problems
from polls.ballots import Selection
from polls.cases import SOFT_LIMIT, of_rule
from polls.holds import HELD, NO_HOLDS, VOIDED, Holds, Rule, Selector, in_force
from polls.journal import Act
from polls.literals import array
from polls.models import CaseState, Comparison, Decision, Hold, Outcome, Poll, Ruling, SuspiciousIP, Tally, VoteAside

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Rulings on votes; the others are about networks and cases.
ON_VOTES = (Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID)
_STATE_AFTER = {
    Ruling.QUARANTINE: CaseState.OPEN,
    Ruling.RELEASE: CaseState.OPEN,
    Ruling.VOID: CaseState.CONFIRMED,
    Ruling.CLEAR: CaseState.CLEARED,
}
_FATE_OF = {Ruling.QUARANTINE: HELD, Ruling.VOID: VOIDED}
_DONE = {Ruling.QUARANTINE: "quarantined", Ruling.RELEASE: "released", Ruling.VOID: "voided", Ruling.CLEAR: "cleared"}
# How long a ruling waits for the bundles that are being counted, and for another ruling on the poll (seconds).
_PATIENCE_SECONDS = 3
# Counting locks votes in another order where one voter's votes come and go at once. Rare, and PostgreSQL ends it after a second.
_ATTEMPTS = 4
_LOCK_NOT_AVAILABLE, _DEADLOCK = "55P03", "40P01"
# A ruling that is not settled by then was interrupted.
_INTERRUPTED_AFTER = timedelta(seconds=10)


@dataclass(frozen=True)
class Imagined:
    """What a ruling would do."""

    votes: int  # that fit
    voters: int
    # {option id: (votes now, votes then)}, where they differ
    changes: dict[int, tuple[int, int]]


def rule(poll_id: UUID, selectors: Sequence[Selector], ruling: Ruling, act: Act, cases: Sequence[int] = ()) -> Decision:
    """Quarantine, release or void the votes that fit one of the selectors, those still to come included; return the decision.

    `cases`: whose selectors they are, one each. Repeatable. Raises Refusal (UNKNOWN_POLL, INVALID, UNAVAILABLE).

    Two transactions. The first, a moment long, waits for the votes that are being counted and says how those to come are judged;
    the second moves the votes that are there and changes the tallies, while counting goes on. `settle_unfinished` runs it if a
    crash comes between.
    """
    _check(selectors, ruling, act)
    version = _declare(poll_id, selectors, ruling, act, cases)
    return _settle(poll_id, version)


def rule_on_case(case_id: int, ruling: Ruling, act: Act) -> list[Decision]:
    """Rule on all votes of a case, and say so in it; return a decision for each poll that has some, or one if none has.

    CLEAR releases what the case keeps out. Raises Refusal (NOT_FOUND, INVALID, UNAVAILABLE).
    """
    case = SuspiciousIP.objects.filter(pk=case_id).first()
    if case is None:
        raise problems.NOT_FOUND.says("No case has this id.")
    selector = Selector.of_case(case)
    _check([selector], ruling, act, allowed=tuple(_STATE_AFTER))
    poll_ids = [case.poll_id] if case.poll_id else _polls_of(selector)
    if ruling == Ruling.CLEAR:
        keeps_out = Hold.objects.filter(case=case, ruling__in=_FATE_OF)
        poll_ids = list(keeps_out.order_by("poll_id").values_list("poll_id", flat=True).distinct())
    decisions = [_settle(poll_id, _declare(poll_id, [selector], ruling, act, [case.pk])) for poll_id in poll_ids]
    if not decisions:
        _say_in([case.pk], ruling, act)
        decisions = [_record(ruling, act, None, [case.pk])]
        if case.poll_id:
            compare(case.poll_id, act.at)
    return decisions


def rule_on_rule(poll_id: UUID, rule: str, ruling: Ruling, act: Act) -> Decision:
    """Rule on the votes of all cases of this rule in the poll that are not cleared or expired, at once. Raises Refusal."""
    found = list(of_rule(poll_id, rule))
    if not found:
        raise problems.NOT_FOUND.says("The poll has no such case that is open or confirmed.")
    selectors = [Selector.of_case(case) for case in found]
    _check(selectors, ruling, act, allowed=tuple(_STATE_AFTER))
    return _settle(poll_id, _declare(poll_id, selectors, ruling, act, [case.pk for case in found]))


def settle_unfinished(at: datetime) -> int:
    """Finish the rulings that a crash left half done; return in how many polls."""
    interrupted = Hold.objects.filter(is_settled=False, ruled_at__lt=at - _INTERRUPTED_AFTER).values_list("poll_id", flat=True)
    polls = sorted(set(interrupted))
    for poll_id in polls:
        _settle(poll_id)
    return len(polls)


# --- The two steps ----------------------------------------------------------------------------------------------------


def _check(selectors: Sequence[Selector], ruling: Ruling, act: Act, allowed: tuple[Ruling, ...] = ON_VOTES) -> None:
    if ruling not in allowed:
        raise problems.INVALID.says(f"Rule {', '.join(allowed[:-1])} or {allowed[-1]}.", pointer="/ruling")
    journal.require_reason(act)
    for selector in selectors:
        if selector.subnet_key is None and (selector.accepted_from is None or selector.accepted_until is None):
            raise problems.INVALID.says("Say which votes: of a network, or between two moments.", pointer="/accepted_from")
        if selector.accepted_from and selector.accepted_until and selector.accepted_from >= selector.accepted_until:
            raise problems.INVALID.says("`accepted_from` is not before `accepted_until`.", pointer="/accepted_until")


def _declare(poll_id: UUID, selectors: Sequence[Selector], ruling: Ruling, act: Act, cases: Sequence[int]) -> int:
    """Put the ruling in force for votes that are counted from now on; return its version."""

    def declare() -> int:
        poll = Poll.objects.select_for_update(no_key=True).filter(pk=poll_id).first()
        if poll is None:
            raise problems.UNKNOWN_POLL.says("No poll has this id.")
        poll.holds_version += 1
        poll.save(update_fields=["holds_version"])
        ruled = {
            "ruling": ruling,
            "version": poll.holds_version,
            "is_settled": False,
            "ruled_at": act.at,
            "actor": act.actor,
            "reason": act.reason,
        }
        on = dict.fromkeys(zip(selectors, cases or repeat(None), strict=False))
        Hold.objects.bulk_create(
            [Hold(poll=poll, case_id=case, **selector._asdict(), **ruled) for selector, case in on],
            update_conflicts=True,
            unique_fields=["poll", "case", *Selector._fields],
            update_fields=list(ruled),
        )
        _say_in(cases, ruling, act)
        # Whoever counts without knowing of this has then finished, and nobody begins before the commit.
        counting.keep_counting_out(poll_id)
        return poll.holds_version

    return _patiently(declare)


def _say_in(cases: Iterable[int], ruling: Ruling, act: Act) -> None:
    SuspiciousIP.objects.filter(pk__in=list(cases)).update(
        state=_STATE_AFTER[ruling], reviewer=act.actor, reviewed_at=act.at, note=act.reason
    )


def _settle(poll_id: UUID, version: int | None = None) -> Decision:
    """Make the tallies what all declared rulings make them, and record these; return the decision of this version, or the last."""

    def settle() -> dict[int, Decision]:
        poll = Poll.objects.select_for_update(no_key=True).get(pk=poll_id)
        unsettled = Hold.objects.filter(poll=poll, is_settled=False)
        by_version = groupby(unsettled.order_by("version", "id"), key=lambda hold: hold.version)
        decided = {made: _carry_out(poll, list(holds)) for made, holds in by_version}
        unsettled.update(is_settled=True)
        # It is of before. Until it is made anew, the results show none.
        Comparison.objects.filter(poll=poll).delete()
        return decided

    decided = _patiently(settle)
    # `settle_unfinished` may have been faster.
    decision = decided.get(version) if version else None
    decision = decision or Decision.objects.filter(poll_id=poll_id).latest("id")
    compare(poll_id, decision.at)
    logger.info("decision %d: %s, %d votes", decision.pk, decision.ruling, decision.votes)
    return decision


def _carry_out(poll: Poll, holds: Sequence[Hold]) -> Decision:
    """Move the votes of one ruling, and record it."""
    first = holds[0]
    ruling, act = Ruling(first.ruling), Act(first.actor, first.ruled_at, first.reason)
    selectors = [Selector(*(getattr(hold, name) for name in Selector._fields)) for hold in holds]
    before = _tallies(poll.pk)
    moved = counting.settle_voters(poll.pk, sorted(set(_find_fitting(poll.pk, selectors))), _pardons(ruling, selectors))
    after = _tallies(poll.pk)
    changes = {option: (before.get(option, 0), after.get(option, 0)) for option in before | after}
    changes = {option: change for option, change in changes.items() if change[0] != change[1]}
    if moved:
        shown = [{str(option): change[side] for option, change in changes.items()} for side in (0, 1)]
        journal.write(poll, act, _DONE[ruling], {"results": (shown[0], shown[1])})
    return _record(ruling, act, poll.pk, [hold.case_id for hold in holds if hold.case_id], moved, changes)


def _record(
    ruling: Ruling, act: Act, poll_id: UUID | None, cases: Sequence[int], votes: int = 0, changes: dict[int, tuple[int, int]] | None = None
) -> Decision:
    return Decision.objects.create(
        at=act.at,
        actor=act.actor,
        ruling=ruling,
        reason=act.reason,
        poll_id=poll_id,
        cases=list(cases),
        votes=votes,
        changes={str(option): list(change) for option, change in (changes or {}).items()},
    )


def _tallies(poll_id: UUID) -> dict[int, int]:
    """Return {option id: votes}."""
    return {
        selection[0]: votes for selection, votes in Tally.objects.filter(poll_id=poll_id).values_list("selection", "votes") if selection
    }


def _patiently(work: Callable[[], T]) -> T:
    """Run `work` in a transaction that waits only so long for locks; again after a deadlock. Raises Refusal where that does not help."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            with transaction.atomic():
                with connection.cursor() as cursor:
                    cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{_PATIENCE_SECONDS}s"])
                return work()
        except OperationalError as exc:
            code = getattr(exc.__cause__, "pgcode", "")
            if code not in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
                raise
            if code == _LOCK_NOT_AVAILABLE or not attempts_left:
                break
    raise problems.UNAVAILABLE.says("The poll is busy. Try again.", headers={"Retry-After": "2"})


# --- Which votes ------------------------------------------------------------------------------------------------------

_FITTING = """
    SELECT v.voter_key FROM {table} v JOIN unnest(%(address)s::uuid[], %(subnet)s::uuid[], %(signature)s::bigint[],
                                                  %(since)s::timestamptz[], %(until)s::timestamptz[])
        AS s (address_key, subnet_key, signature_key, accepted_from, accepted_until)
      ON {which}
     AND (s.signature_key IS NULL OR v.signature_key = s.signature_key)
     AND v.accepted_at >= coalesce(s.accepted_from, '-infinity') AND v.accepted_at < coalesce(s.accepted_until, 'infinity')
    WHERE v.poll_id = %(poll)s
"""
# The first two by an index; of a time alone by the blocks that hold it.
_OF_AN_ADDRESS = "(v.subnet_key, v.address_key) = (s.subnet_key, s.address_key)"
_OF_A_SUBNET = "v.subnet_key = s.subnet_key"
_OF_A_TIME = "s.subnet_key IS NULL"


def _find_fitting(poll_id: UUID, selectors: Iterable[Selector]) -> list[UUID]:
    """Return the voter keys of all votes that fit one of the selectors, one for each vote and selector."""
    groups: dict[str, list[Selector]] = {_OF_AN_ADDRESS: [], _OF_A_SUBNET: [], _OF_A_TIME: []}
    for selector in selectors:
        groups[_OF_AN_ADDRESS if selector.address_key else _OF_A_SUBNET if selector.subnet_key else _OF_A_TIME].append(selector)
    found: list[UUID] = []
    with connection.cursor() as cursor:
        for which, group in groups.items():
            if group:
                address, subnet, signature, since, until = zip(*group, strict=True)
                statement = " UNION ALL ".join(_FITTING.format(table=table, which=which) for table in ("votes", "outcomes"))
                cursor.execute(
                    statement,
                    {
                        "poll": poll_id,
                        "address": array(address),
                        "subnet": array(subnet),
                        "signature": array(signature),
                        "since": list(since),
                        "until": list(until),
                    },
                )
                found += [key for (key,) in cursor]
    return found


def _pardons(ruling: Ruling, selectors: Iterable[Selector]) -> counting.Pardon:
    """Return what the ruling lets in of what soft limits hold up."""
    return Holds(Rule(selector, HELD) for selector in selectors).fate_of if ruling == Ruling.RELEASE else NO_HOLDS.fate_of


def _polls_of(selector: Selector) -> list[UUID]:
    """Return the polls in which the network has votes."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT DISTINCT poll_id FROM (
                SELECT poll_id, address_key FROM votes WHERE subnet_key = %(subnet)s
                UNION ALL SELECT poll_id, address_key FROM outcomes WHERE subnet_key = %(subnet)s
            ) v JOIN polls p ON p.id = v.poll_id WHERE %(address)s::uuid IS NULL OR address_key = %(address)s ORDER BY poll_id
            """,
            {"subnet": selector.subnet_key, "address": selector.address_key},
        )
        return [poll_id for (poll_id,) in cursor]


# --- What would be ----------------------------------------------------------------------------------------------------


def imagine(poll_id: UUID, selectors: Sequence[Selector], ruling: Ruling, cases: Sequence[int] = ()) -> Imagined:
    """Return what `rule` would do. Reads only, without locks. Raises Refusal (UNKNOWN_POLL)."""
    if not Poll.objects.filter(pk=poll_id).exists():
        raise problems.UNKNOWN_POLL.says("No poll has this id.")
    fitting = _find_fitting(poll_id, selectors)
    voters = sorted(set(fitting))
    fate = _FATE_OF.get(ruling)
    others = [rule for rule in in_force(poll_id) if not rule.case or rule.case not in cases]
    new = [Rule(selector, fate, case) for selector, case in zip(selectors, cases or repeat(None), strict=False) if fate or not case]
    then = Holds(others + new)
    (change,) = counting.imagine(poll_id, voters, [(then, _pardons(ruling, selectors))])
    tallies = _tallies(poll_id)
    changes = {
        selection[0]: (tallies.get(selection[0], 0), tallies.get(selection[0], 0) + difference)
        for selection, difference in sorted(change.items())
        if selection and difference
    }
    return Imagined(len(fitting), len(voters), changes)


def compare(poll_id: UUID, at: datetime) -> None:
    """Work out anew how the poll's results would be with, and without, everything that is under review; forget it when nothing is.

    Under review are the votes of open cases, and those in quarantine. Voided ones are out in both.
    """
    cases = list(SuspiciousIP.objects.filter(poll_id=poll_id, state=CaseState.OPEN))
    suspects = [case for case in cases if case.rule != SOFT_LIMIT]
    rules = in_force(poll_id)
    suspected = [Selector.of_case(case) for case in suspects]
    held = [rule.selector for rule in rules if rule.fate == HELD]
    aside = VoteAside.objects.filter(poll_id=poll_id, outcome=Outcome.QUARANTINED).values_list("voter_key", flat=True)
    voters = sorted({*_find_fitting(poll_id, suspected + held), *aside})
    if not voters:
        Comparison.objects.filter(poll_id=poll_id).delete()
        return
    lifted = Holds(rule._replace(fate=None) if rule.fate == HELD else rule for rule in rules if not (rule.case and rule.fate == HELD))
    held_too = Holds([*rules, *(Rule(Selector.of_case(case), HELD, case.pk) for case in suspects)])
    with_all, without_any = counting.imagine(poll_id, voters, [(lifted, lambda _: True), (held_too, NO_HOLDS.fate_of)])
    Comparison.objects.update_or_create(
        poll_id=poll_id,
        defaults={
            "as_of": at,
            "cases": len(cases),
            "voters": len(voters),
            "with_votes": _stored(with_all),
            "without_votes": _stored(without_any),
        },
    )


def _stored(change: Counter[Selection]) -> dict[str, int]:
    return {str(selection[0]) if selection else "": votes for selection, votes in change.items() if votes}
