"""Review: people's rulings on votes (quarantine, release, void), each one transaction with the tallies, and on record for good."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import groupby, repeat
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from django.db import OperationalError, connection, transaction
from django.db.models import F

from polls import counting, disclosure, journal, problems, results
from polls.ballots import Selection
from polls.cases import MAX_SHOWN, SOFT_LIMIT, Ballot, Choice, ballots_of, beside_others, of_rule, restored, stored
from polls.holds import HELD, NO_HOLDS, VOIDED, Holds, Rule, Selector, in_force
from polls.journal import CLOCK, Act
from polls.literals import array
from polls.models import CaseState, Comparison, Decision, Hold, LookKind, Outcome, Poll, Ruling, SuspiciousIP, VoteAside

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
    # {option id: (votes now, votes then)}, where they differ; None where that would tell the choices of too few voters, or is not
    # for who asks.
    changes: dict[int, tuple[int, int]] | None


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
        # It is of before. Until it is made anew, the results show none. It also must not be kept where it can't be.
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
    before = results.tallies_now(poll.pk)
    were_held_back = results.are_held_back(poll.pk)
    shown = _shown_tallies(poll.pk, act.at)
    moves, change = counting.settle_voters(poll.pk, sorted(set(_find_fitting(poll.pk, selectors))), _pardons(ruling, selectors))
    is_shown = disclosure.show(poll.pk, [moves], act, disclosure.Shown(LookKind.RULING, selectors))
    changes = _beside(shown, change) if is_shown and (not moves or _may_record(poll, act.at)) else None
    if moves and (not is_shown or were_held_back):
        results.hold_back(poll.pk, before, disclosure.LEAST_VOTERS, act.at)
    elif moves:
        results.show_again(poll.pk)
    if moves:
        told: dict[str, tuple[Any, Any]] = {"voters": (0, len(moves))}
        if changes is not None:
            sides = [{str(option): votes[side] for option, votes in changes.items()} for side in (0, 1)]
            told["results"] = (sides[0], sides[1])
        journal.write(poll, act, _DONE[ruling], told)
    return _record(ruling, act, poll.pk, [hold.case_id for hold in holds if hold.case_id], len(moves), changes)


def _record(
    ruling: Ruling,
    act: Act,
    poll_id: UUID | None,
    cases: Sequence[int],
    votes: int = 0,
    changes: Mapping[int, tuple[int, int]] | None = MappingProxyType({}),
) -> Decision:
    """Write the decision down; `changes`: None where they are not to be shown."""
    return Decision.objects.create(
        at=act.at,
        actor=act.actor,
        ruling=ruling,
        reason=act.reason,
        poll_id=poll_id,
        cases=list(cases),
        votes=votes,
        changes={str(option): list(change) for option, change in (changes or {}).items()},
        hides_changes=changes is None,
    )


def _may_record(poll: Poll, at: datetime) -> bool:
    """Return whether tallies of this moment may stand in the record: where everybody reads them, or could have.

    Those of a poll that hides its results would be read after its end, and two of them could differ by one vote that came in between.
    """
    return results.are_public(poll.results_visibility, poll.closes_at, at)


def _shown_tallies(poll_id: UUID, at: datetime) -> dict[int, int]:
    """Return {option id: votes} as the results show them."""
    read = results.read_results(poll_id, at)
    return {int(option["id"]): option["votes"] for option in read["options"]} if read else {}


def _beside(tallies: Mapping[int, int], change: Counter[Selection]) -> dict[int, tuple[int, int]]:
    """Return {option id: (votes, votes then)} of the options that the change is about."""
    return {
        selection[0]: (tallies.get(selection[0], 0), tallies.get(selection[0], 0) + difference)
        for selection, difference in sorted(change.items())
        if selection and difference
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


def look(
    poll_id: UUID, selectors: Sequence[Selector], ruling: Ruling, act: Act, cases: Sequence[int] = (), *, reads_results: bool
) -> Imagined:
    """Return what `rule` would do, and put it on record that somebody looked. Raises Refusal (UNKNOWN_POLL, INVALID).

    What would change is shown to who may read the poll's results, and where it is about enough voters (disclosure.py).
    """
    journal.require_reason(act)
    with transaction.atomic():
        if not disclosure.lock(poll_id):
            raise problems.UNKNOWN_POLL.says("No poll has this id.")
        imagined, moves = imagine(poll_id, selectors, ruling, cases, act.at)
        what = disclosure.Shown(LookKind.DRY_RUN, selectors)
        if not (reads_results and disclosure.show(poll_id, [moves], act, what)):
            imagined = replace(imagined, changes=None)
        poll = Poll.objects.get(pk=poll_id)
        journal.write(poll, act, "looked", {"voters": (0, imagined.voters)})
        _record(Ruling.LOOK, act, poll_id, cases, imagined.votes, imagined.changes if _may_record(poll, act.at) else None)
    return imagined


def imagine(
    poll_id: UUID, selectors: Sequence[Selector], ruling: Ruling, cases: Sequence[int], at: datetime
) -> tuple[Imagined, list[counting.Move]]:
    """Return what `rule` would do, whatever that tells, and by which voters. Reads only, without locks."""
    fitting = _find_fitting(poll_id, selectors)
    voters = sorted(set(fitting))
    fate = _FATE_OF.get(ruling)
    others = [rule for rule in in_force(poll_id) if not rule.case or rule.case not in cases]
    new = [Rule(selector, fate, case) for selector, case in zip(selectors, cases or repeat(None), strict=False) if fate or not case]
    then = Holds(others + new)
    ((change, moves),) = counting.imagine(poll_id, voters, [(then, _pardons(ruling, selectors))])
    return Imagined(len(fitting), len(voters), _beside(_shown_tallies(poll_id, at), change)), moves


class PollChoices(NamedTuple):
    """What a case's voters chose in one poll; None where that would tell the choices of too few, or is not for who asks."""

    poll: Poll
    choices: list[Choice] | None


def choices(case: SuspiciousIP, act: Act, reads_results: Callable[[Poll], bool]) -> list[PollChoices]:
    """Return what the case's voters chose, for each of the polls with most of its votes; put on record what is new of it.

    Where only few have come since it was last shown (or gone), it is shown as it was then.
    """
    by_poll = ballots_of(case)
    poll_ids = sorted(by_poll, key=lambda poll_id: (-len(by_poll[poll_id]), poll_id))[:MAX_SHOWN]
    found = Poll.objects.in_bulk(poll_ids)  # one may have been deleted
    return [
        PollChoices(poll, _choices(case, poll, by_poll[poll_id], act) if reads_results(poll) else None)
        for poll_id in poll_ids
        if (poll := found.get(poll_id))
    ]


def _choices(case: SuspiciousIP, poll: Poll, ballots: Sequence[Ballot], act: Act) -> list[Choice] | None:
    selector = Selector.of_case(case)
    with transaction.atomic():
        if not disclosure.lock(poll.pk) or (read := results.read_results(poll.pk, act.at)) is None:
            return None
        (without, voided), (released, back) = (
            imagine(poll.pk, [selector], ruling, [case.pk], act.at) for ruling in (Ruling.VOID, Ruling.RELEASE)
        )
        chosen = [counting.Move(ballot.voter, ballot.vote_id, None) for ballot in ballots]
        standing = [move for move, ballot in zip(chosen, ballots, strict=True) if ballot.stands]
        shown = beside_others(read, ballots, without.changes or {}, released.changes or {}, act.at)
        what = disclosure.Shown(LookKind.CASE, [selector], case.pk, stored(shown))
        if disclosure.show(poll.pk, [chosen, standing, voided, back], act, what):
            return shown
        before = disclosure.latest(poll.pk, case.pk)
        return restored(before.shown or ()) if before else None


def compare(poll_id: UUID, at: datetime) -> None:
    """Work out anew how the poll's results would be with, and without, everything that is under review; forget it when nothing is.

    Under review are the votes of open cases, and those in quarantine. Voided ones are out in both. Where both can't be shown without
    telling the choices of too few voters (disclosure.py), what is shown stays, and where nothing is, they are only counted.
    """
    with transaction.atomic():
        if disclosure.lock(poll_id):
            _compare(poll_id, at)


def _compare(poll_id: UUID, at: datetime) -> None:
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
    (with_all, let_in), (without_any, left_out) = counting.imagine(
        poll_id, voters, [(lifted, lambda _: True), (held_too, NO_HOLDS.fate_of)]
    )
    act, what = Act(CLOCK, at), disclosure.Shown(LookKind.COMPARISON, suspected + held)
    is_shown = len(voters) >= disclosure.LEAST_VOTERS and disclosure.show(poll_id, [let_in, left_out], act, what)
    if not is_shown and Comparison.objects.filter(poll_id=poll_id, shown_as_of=F("as_of"), voters__lte=len(voters)).exists():
        return
    Comparison.objects.update_or_create(
        poll_id=poll_id,
        defaults={
            "as_of": at,
            "cases": len(cases),
            "voters": len(voters),
            "with_votes": _stored(with_all) if is_shown else {},
            "without_votes": _stored(without_any) if is_shown else {},
            "shown_as_of": at if is_shown else None,
        },
    )


def _stored(change: Counter[Selection]) -> dict[str, int]:
    return {str(selection[0]) if selection else "": votes for selection, votes in change.items() if votes}
