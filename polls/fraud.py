"""Fraud: rules that find suspicious networks in the stored votes, as plain SQL, and the cases they make. Changes no result by itself."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connection
from django.db.backends.utils import CursorWrapper
from django.db.models import Exists, OuterRef, Q

from polls import journal, networks, problems, results, review
from polls.cases import SOFT_LIMIT
from polls.holds import Selector
from polls.journal import CLOCK, Act
from polls.literals import array
from polls.models import CaseState, Hold, NetworkKind, Poll, ResultsVisibility, Ruling, SuspiciousIP
from polls.problems import Refusal

logger = logging.getLogger(__name__)

# What the fast rules look at, every minute. Chosen: a missed run or two is made up for, and at 1,000 votes a second a run still takes
# about a second.
FAST_WINDOW = timedelta(minutes=10)
# Polls without a vote for so long were looked at often enough.
_LATELY = timedelta(days=1)
# Beyond so many votes in all, polls with more than so many are sampled to see where to look. Chosen: below it takes a few seconds.
MANY_VOTES, LARGE_POLL = 2_000_000, 5000
_MANNERS = {
    "statement_timeout": "30s",
    "work_mem": "64MB",
    "max_parallel_workers_per_gather": "0",  # the other cores are for counting
    "jit": "off",  # takes longer than it saves
    "enable_nestloop": "off",  # the planner knows too little of what is made on the way, and would try each vote with each
}
_QUERY_CANCELED = "57014"
# Any number that no other lock of ours has.
_LOCK = (4, 15_300)

# --- The rules --------------------------------------------------------------------------------------------------------

# {parameter: (smallest, largest, what it means)}. Fewer than ten votes are a family's: looking at all of these would take hours.
PARAMETERS: dict[str, tuple[float, float, str]] = {
    "votes": (10, 1e9, "votes from the network at least"),
    "all_votes": (10, 1e9, "votes from the network in all polls together at least"),
    "minutes": (1, 10_080, "within so many minutes"),
    "times": (0, 1e6, "so many times what it is compared with"),
    "share": (0.5, 1, "this part of its votes at least"),
    "elsewhere": (0, 1, "and at most this part of everybody else's"),
    "odds": (1, 1e6, "the odds are so many times everybody else's"),
    "spread": (0, 1, "the middle half of its pauses differ by this part of the median at most"),
    "signature_votes": (10, 1e9, "votes with the browser signature at least"),
    "subnets": (2, 1e9, "from so many subnets at least"),
    "tries": (10, 1e9, "so many tries at least"),
    "hours": (1, 720, "within so many hours"),
    "held_up": (1, 1e9, "votes held up at least"),
}
# Beside the parameters: `"off": true` takes a rule out of use.
_OFF = "off"


@dataclass(frozen=True)
class Rule:
    """A question to the stored votes. Each row of its answer is a network that is suspicious in a poll."""

    name: str
    description: str
    sql: str
    parameters: Mapping[str, float]
    # Only networks of this kind, and of this IP version (an unreadable one passes for 4), where it is said.
    kind: NetworkKind | None = None
    ip_version: int | None = None
    # Whether it is asked every minute about what is new, beside every hour about all.
    is_fast: bool = False
    # Whether its answers are for people only (see `never_holds`).
    only_informs: bool = False
    # Whether it looks at many polls together.
    over_polls: bool = False
    # Whether it looks at what was chosen. How far it is beyond its thresholds then tells each further vote: only that it is, is kept.
    # That it is tells of choices too: it looks at no poll whose results are sealed, and it only informs, for everybody sees what is held.
    is_about_choices: bool = False

    @property
    def never_holds(self) -> bool:
        return self.only_informs or self.is_about_choices


_FOLDER = Path(__file__).parent / "rules"


def _sql(name: str, **replaced: str) -> str:
    text = (_FOLDER / f"{name}.sql").read_text()
    for word, by in replaced.items():
        text = text.replace(f"{{{word}}}", by)
    return text


# The reasons for the defaults, and what they find in a crowd, stand in docs/abuse.md.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "busy_address",
            "Many votes from one address in a short time.",
            _sql("busy"),
            {"votes": 300, "minutes": 60},
            kind=NetworkKind.ADDRESS,
            is_fast=True,
        ),
        Rule(
            "busy_ipv4_subnet",
            "Many votes from one /24 in a short time.",
            _sql("busy"),
            {"votes": 3000, "minutes": 60},
            kind=NetworkKind.SUBNET,
            ip_version=4,
            is_fast=True,
        ),
        Rule(
            "busy_ipv6_subnet",
            "Many votes from one /64, which is one home or one office, within a day.",
            _sql("busy"),
            {"votes": 300, "minutes": 1440},
            kind=NetworkKind.SUBNET,
            ip_version=6,
            is_fast=True,
        ),
        Rule(
            "busy_over_polls",
            "Many votes from one address in a short time, all polls together.",
            _sql("busy_over_polls"),
            {"all_votes": 3000, "minutes": 60, "votes": 100},
            over_polls=True,
        ),
        Rule(
            "burst",
            "A burst of votes from one network, far above everything that the rest of the poll sends.",
            _sql("burst"),
            {"votes": 250, "minutes": 10, "times": 3},
        ),
        Rule(
            "one_sided",
            "A network votes almost only for one option, unlike everybody else.",
            _sql("one_sided"),
            {"votes": 100, "share": 0.95, "odds": 20},
            is_about_choices=True,
        ),
        Rule(
            "one_signature",
            "One browser signature sends almost all votes of a network, and few elsewhere.",
            _sql("one_signature"),
            {"votes": 250, "share": 0.9, "elsewhere": 0.02},
        ),
        Rule(
            "shared_signature",
            "One browser signature, spread over many subnets, votes almost only for one option.",
            _sql("shared_signature"),
            {"signature_votes": 100, "subnets": 30, "share": 0.95, "odds": 20},
            is_about_choices=True,
        ),
        Rule(
            "regular",
            "A network's votes come as regularly as a machine sends them.",
            _sql("regular"),
            {"votes": 100, "spread": 0.25},
        ),
        Rule(
            "refused",
            "Most of a network's votes are duplicates, or refused for another reason.",
            _sql("refused"),
            {"votes": 200, "share": 0.7},
        ),
        Rule(
            "code_guessing",
            "Many wrong voter codes from one network.",
            _sql("attempts", column="wrong_codes"),
            {"tries": 50, "hours": 24, "times": 1},
            is_fast=True,
        ),
        Rule(
            "token_collecting",
            "Many voter tokens handed out to one network, and few of them used.",
            _sql("attempts", column="tokens"),
            {"tries": 500, "hours": 24, "times": 10},
            is_fast=True,
        ),
        Rule(
            SOFT_LIMIT,
            "A soft limit of the poll holds up votes of the network. Nothing is wrong with them otherwise.",
            _sql("soft_limit"),
            {"held_up": 1},
            only_informs=True,
        ),
    )
}


def check_parameters(rule_parameters: object, pointer: str) -> None:
    """Raise Refusal unless this is `{rule: {parameter: number, "off": true or false}}`; `pointer` names the field it came in."""
    if not isinstance(rule_parameters, dict):
        raise problems.INVALID.says("It must be an object: {rule: {parameter: number}}.", pointer=pointer)
    for name, changed in rule_parameters.items():
        here = f"{pointer}/{_escaped(name)}"
        if name not in RULES:
            raise problems.INVALID.says(f"There is no such rule; the rules are {', '.join(RULES)}.", pointer=here)
        if not isinstance(changed, dict):
            raise problems.INVALID.says("It must be an object: {parameter: number}.", pointer=here)
        for parameter, value in changed.items():
            _check_parameter(RULES[name], parameter, value, f"{here}/{_escaped(parameter)}")


def _check_parameter(rule: Rule, parameter: str, value: object, pointer: str) -> None:
    if parameter == _OFF:
        if not isinstance(value, bool):
            raise problems.INVALID.says("It must be true or false.", pointer=pointer)
        return
    if parameter not in rule.parameters:
        raise problems.INVALID.says(f"The rule {rule.name} has {', '.join([*rule.parameters, _OFF])}.", pointer=pointer)
    smallest, largest, _ = PARAMETERS[parameter]
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise problems.INVALID.says("It must be a number.", pointer=pointer)
    if not smallest <= value <= largest:
        raise problems.INVALID.says(f"It must be from {smallest:g} to {largest:g}.", pointer=pointer)


def _escaped(name: object) -> str:
    """Return the name as a part of a JSON pointer (RFC 6901)."""
    return str(name).replace("~", "~0").replace("/", "~1")


try:
    check_parameters(settings.RULES, "/RULES")
except Refusal as refusal:
    raise ImproperlyConfigured(f"{refusal.errors[0]['pointer'].removeprefix('#/')}: {refusal.detail}") from None


def parameters_of(rule: Rule, poll: Poll | None = None) -> dict[str, float] | None:
    """Return the rule's parameters in the installation, or in the poll; None where it is off."""
    found = {**rule.parameters, **settings.RULES.get(rule.name, {}), **(poll.rule_parameters.get(rule.name, {}) if poll else {})}
    return None if found.pop(_OFF, False) else found


# --- Finding ----------------------------------------------------------------------------------------------------------


def find_suspicious(at: datetime, *, fast: bool = False) -> list[SuspiciousIP]:
    """Make cases of what the rules find, and bring open ones up to date; return those that are new or changed.

    All rules look at the whole of the polls that took votes lately; with `fast`, the fast rules at the last minutes alone. Repeatable.
    While another run is at work, it returns at once. Reads votes without locks, by several statements, so that none keeps
    PostgreSQL from tidying up after counting for long.
    """
    with _alone() as is_alone:
        if not is_alone:
            return []
        rules = [rule for rule in RULES.values() if rule.is_fast or not fast]
        polls = _polls_with_news(at, at - FAST_WINDOW if fast else at - _LATELY)
        found = _apply(rules, polls, at, since=at - FAST_WINDOW if fast else None)
        changed = [case for rule in rules for case in _store(found.get(rule.name, []))]
    _quarantine(at)
    for poll_id in {case.poll_id for case in changed if case.poll_id}:
        review.compare(poll_id, at)
    by_rule = Counter(case.rule for case in changed)
    logger.info("cases new or changed: %s", ", ".join(f"{rule} {cases}" for rule, cases in sorted(by_rule.items())) or "none")
    return changed


@contextmanager
def _alone() -> Iterator[bool]:
    """Tell whether no other run is at work, and keep others out if so."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", _LOCK)
        (is_alone,) = cursor.fetchone()
        try:
            yield is_alone
        finally:
            if is_alone:
                cursor.execute("SELECT pg_advisory_unlock(%s, %s)", _LOCK)


def _polls_with_news(at: datetime, since: datetime) -> list[Poll]:
    """Return the polls in which somebody voted, or tried to, since then, and those with sealed results that have ended since.

    Rules about choices have never looked at these.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT DISTINCT poll_id FROM votes WHERE accepted_at > %(since)s AND accepted_at <= %(at)s
            UNION SELECT DISTINCT poll_id FROM outcomes WHERE accepted_at > %(since)s AND accepted_at <= %(at)s
            UNION SELECT DISTINCT poll_id FROM attempts WHERE hour > %(since)s - interval '1 hour' AND hour <= %(at)s
            UNION SELECT id FROM polls WHERE results_visibility = %(sealed)s AND closes_at > %(since)s AND closes_at <= %(at)s
            """,
            {"since": since, "at": at, "sealed": ResultsVisibility.SEALED},
        )
        ids = [poll_id for (poll_id,) in cursor]
    return _read_polls(Q(pk__in=ids))


def _read_polls(which: Q) -> list[Poll]:
    return list(Poll.objects.filter(which).select_related("network_secret"))


# Made one after the other, each from those before. Rules that are fast do without the last.
_TABLES = ("sampled", "sieve", "sieved", "networks", "network_votes", "minutes", "signatures")


@contextmanager
def _gathered(
    poll_ids: Sequence[UUID], since: datetime | None, least: Mapping[str, float], tables: Sequence[str]
) -> Iterator[CursorWrapper]:
    """Give a cursor that sees the votes of these polls in temporary tables, added up as rules want them (rules/tables)."""
    with connection.cursor() as cursor:
        try:
            for name, value in _MANNERS.items():
                cursor.execute("SELECT set_config(%s, %s, false)", [name, value])
            cursor.execute(_sql("looked_at"), {"polls": array(poll_ids), "many_votes": MANY_VOTES, "large_poll": LARGE_POLL})
            cursor.execute("ANALYZE looked_at")
            # Few polls are read by their key, many by reading all.
            which = f"poll_id = ANY('{array(poll_ids)}')" if len(poll_ids) <= 20 else "TRUE"
            cursor.execute(_sql("casts", which=which, when=f"accepted_at > '{since.isoformat()}'" if since else "TRUE"))
            for number, table in enumerate(tables, 1):
                cursor.execute(f"CREATE TEMPORARY TABLE {table} AS {_sql(f'tables/{number}_{table}')}", least)
                cursor.execute(f"ANALYZE {table}")
            yield cursor
        finally:
            if not connection.needs_rollback and not cursor.closed and connection.is_usable():
                cursor.execute(f"DROP VIEW IF EXISTS casts; DROP TABLE IF EXISTS looked_at, {', '.join(_TABLES)}")
                cursor.execute("".join(f"RESET {name};" for name in _MANNERS))


class _Found(NamedTuple):
    """A row of a rule's answer."""

    poll_id: UUID | None
    kind: str
    network_key: UUID
    subnet_key: UUID
    signature_key: int | None
    votes: int
    first_seen: datetime
    last_seen: datetime
    score: float
    evidence: dict[str, Any]


class _Question(NamedTuple):
    """A rule, as it is asked about polls that have the same parameters."""

    rule: Rule
    parameters: Mapping[str, float]
    polls: list[Poll]


def _apply(
    rules: Iterable[Rule], polls: Sequence[Poll], at: datetime, *, since: datetime | None, parameters: Mapping[str, float] | None = None
) -> dict[str, list[SuspiciousIP]]:
    """Return {rule: the cases that it finds}, not stored. `parameters` instead of the installation's and the polls'."""
    questions = [question for rule in rules for question in _questions(rule, _open_to(rule, polls, at), parameters)]
    least = min((question.parameters.get("votes", 1e9) for question in questions), default=1e9)
    in_minutes = min(
        (
            question.parameters.get("votes", 1e9)
            for question in questions
            if not question.rule.over_polls and "minutes" in question.parameters
        ),
        default=1e9,
    )
    tables = _TABLES[:-1] if all(question.rule.is_fast for question in questions) else _TABLES
    found: dict[str, list[SuspiciousIP]] = defaultdict(list)
    with _gathered([poll.pk for poll in polls], since, {"least": least, "least_in_minutes": in_minutes}, tables) as cursor:
        for rule, given, asked in questions:
            known = {
                "polls": array(poll.pk for poll in asked),
                "kind": rule.kind,
                "since": since or datetime.min.replace(tzinfo=UTC),
                "at": at,
            }
            try:
                cursor.execute(rule.sql, {**{name: float(value) for name, value in given.items()}, **known})
            except OperationalError as exc:
                if getattr(exc.__cause__, "pgcode", "") != _QUERY_CANCELED:
                    raise
                logger.warning("the rule %s took too long, and found nothing this time", rule.name)
                continue
            answer = [_Found._make([*row, json.loads(evidence)]) for *row, evidence in cursor]
            found[rule.name] += _cases(rule, answer, asked, at)
    return found


def _open_to(rule: Rule, polls: Sequence[Poll], at: datetime) -> Sequence[Poll]:
    """Return the polls that the rule may look at."""
    if not rule.is_about_choices:
        return polls
    return [poll for poll in polls if not results.are_sealed(poll.results_visibility, poll.closes_at, at)]


def _questions(rule: Rule, polls: Sequence[Poll], parameters: Mapping[str, float] | None) -> list[_Question]:
    by_parameters: dict[Any, list[Poll]] = defaultdict(list)
    for poll in polls:
        of_poll = parameters_of(rule, poll) if parameters is None else parameters
        if of_poll is not None and rule.over_polls:
            # Keys of one secret only can be compared; and one poll's wishes are not for all.
            of_all = parameters_of(rule) if parameters is None else parameters
            if of_all is not None and poll.network_secret_id is not None:
                by_parameters[poll.network_secret_id, tuple(of_all.items())].append(poll)
        elif of_poll is not None:
            by_parameters[None, tuple(of_poll.items())].append(poll)
    return [_Question(rule, dict(items), of_these) for (_, items), of_these in by_parameters.items()]


def _cases(rule: Rule, answer: Iterable[_Found], polls: Sequence[Poll], at: datetime) -> list[SuspiciousIP]:
    """Return the cases, without those of allowed networks: votes from before a network was allowed have keys."""
    by_id = {poll.pk: _Context(poll) for poll in polls}
    cases = []
    for found in answer:
        context = by_id[found.poll_id] if found.poll_id else _Context(polls[0], is_over_polls=True)
        network = context.reveal(found)
        if context.allows(network) or (rule.ip_version and rule.ip_version != (network.version if network else 4)):
            continue
        if rule.is_about_choices:
            found = found._replace(score=float(int(found.score)), evidence=without_choices(rule.name, found.evidence))
        secret = context.poll.network_secret if network else None
        cases.append(SuspiciousIP(rule=rule.name, network_secret=secret, found_at=at, **found._asdict()))
    return cases


def without_choices(rule: str, evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evidence without what it tells of choices, where the rule is about these; versions before this one stored it."""
    is_about_choices = rule in RULES and RULES[rule].is_about_choices
    return {name: value for name, value in evidence.items() if not (is_about_choices and name.startswith("share"))}


class _Context:
    """What a poll knows of networks."""

    def __init__(self, poll: Poll, *, is_over_polls: bool = False) -> None:
        self.poll = poll
        self._own = [] if is_over_polls else poll.allowed_networks

    @cached_property
    def _allowed(self) -> list[IPv4Network | IPv6Network]:
        return [*settings.ALLOWED_NETWORKS, *(ip_network(network) for network in self._own)]

    def reveal(self, found: _Found) -> IPv4Network | IPv6Network | None:
        text = networks.reveal(self.poll.network_secret, found.kind, found.network_key, found.subnet_key)
        return ip_network(text) if text else None

    def allows(self, network: IPv4Network | IPv6Network | None) -> bool:
        """Whether the network, or a part of it, is allowed."""
        return network is not None and any(network.overlaps(allowed) for allowed in self._allowed if allowed.version == network.version)


# Who has decided on a case has decided on its votes: it opens again only when there are twice as many.
_STORE = """
    INSERT INTO suspicious_ips AS c (poll_id, rule, kind, network_key, subnet_key, signature_key, network_secret_id, evidence, score, votes,
                                     first_seen, last_seen, found_at, state, reviewer, note)
    SELECT f.poll_id, rule, kind, network_key, subnet_key, signature_key, s.id, evidence, score, votes, first_seen, last_seen, found_at,
           'open', '', ''
    FROM jsonb_to_recordset(%s) AS f (poll_id uuid, rule text, kind text, network_key uuid, subnet_key uuid, signature_key bigint,
                                      network_secret_id bigint, evidence jsonb, score float, votes int, first_seen timestamptz,
                                      last_seen timestamptz, found_at timestamptz)
    LEFT JOIN network_secrets s ON s.id = f.network_secret_id
    ORDER BY f.poll_id, network_key, signature_key
    ON CONFLICT (poll_id, rule, network_key, signature_key) DO UPDATE
    SET evidence = CASE WHEN excluded.score >= c.score THEN excluded.evidence ELSE c.evidence END,
        score = greatest(c.score, excluded.score), votes = greatest(c.votes, excluded.votes),
        first_seen = least(c.first_seen, excluded.first_seen), last_seen = greatest(c.last_seen, excluded.last_seen),
        found_at = CASE c.state WHEN 'open' THEN c.found_at ELSE excluded.found_at END, state = 'open'
    WHERE (c.state = 'open' AND (excluded.score > c.score OR excluded.votes > c.votes OR excluded.first_seen < c.first_seen
                                 OR excluded.last_seen > c.last_seen))
       OR (c.state IN ('cleared', 'expired') AND excluded.votes >= 2 * greatest(c.votes, 1))
    RETURNING id
"""
_STORED = ("poll_id", "rule", "kind", "network_key", "subnet_key", "signature_key", "network_secret_id", "evidence", "score", "votes",
           "first_seen", "last_seen", "found_at")  # fmt: skip


def _store(cases: Sequence[SuspiciousIP]) -> list[SuspiciousIP]:
    """Write one rule's cases; return those that are new, or not as they were."""
    if not cases:
        return []
    rows = [{name: getattr(case, name) for name in _STORED} for case in cases]
    with connection.cursor() as cursor:
        cursor.execute(_STORE, [json.dumps(rows, default=str)])
        ids = [pk for (pk,) in cursor]
    return list(SuspiciousIP.objects.filter(pk__in=ids).order_by("pk"))


def _quarantine(at: datetime) -> None:
    """Hold the votes of cases that nobody has looked at, where the poll's owner wants that. A missed run is made up for by the next."""
    informing = [rule.name for rule in RULES.values() if rule.never_holds]
    waiting = SuspiciousIP.objects.filter(poll__auto_quarantine=True, state=CaseState.OPEN, reviewed_at=None).exclude(rule__in=informing)
    by_poll_and_rule: dict[tuple[UUID, str], list[SuspiciousIP]] = defaultdict(list)
    for case in waiting.order_by("pk"):
        if case.poll_id:
            by_poll_and_rule[case.poll_id, case.rule].append(case)
    for (poll_id, rule), cases in sorted(by_poll_and_rule.items()):
        try:
            selectors = [Selector.of_case(case) for case in cases]
            review.rule(poll_id, selectors, Ruling.QUARANTINE, Act(CLOCK, at, f"rule {rule}"), [case.pk for case in cases])
        except Refusal as refusal:
            logger.warning("cases of the rule %s wait for their quarantine: %s", rule, refusal.detail)


def expire_cases(at: datetime) -> int:
    """End the open cases that keep nothing out and that nobody decided on in time, or whose network nobody can read any more."""
    kept_out = Hold.objects.filter(case=OuterRef("pk"), ruling__in=[Ruling.QUARANTINE, Ruling.VOID])
    late = Q(found_at__lt=at - timedelta(days=settings.CASE_OPEN_DAYS)) | Q(network_secret=None)
    due = SuspiciousIP.objects.filter(~Exists(kept_out), late, state=CaseState.OPEN)
    polls = set(due.exclude(poll=None).values_list("poll_id", flat=True))
    expired = due.update(state=CaseState.EXPIRED)
    for poll_id in polls:
        review.compare(poll_id, at)
    if expired:
        logger.info("%d cases expired", expired)
    return expired


# --- Trying -----------------------------------------------------------------------------------------------------------


class Reviewed(NamedTuple):
    """How what a rule finds agrees with what people decided, in the same polls and under whichever rule.

    A case found agrees with a decided one about the same network, or about the subnet that holds its address, or the other way
    round. Where people decided both ways, voiding counts.
    """

    confirmed: int  # of the cases found, about a network whose votes were voided
    cleared: int  # ... and about one that was cleared
    all_confirmed: int  # voided cases, found or not
    found_again: int  # ... that what is found agrees with

    @property
    def precision(self) -> float | None:
        """Of the cases found that people have decided on: the part that is right. None where they decided on none."""
        return self.confirmed / (self.confirmed + self.cleared) if self.confirmed + self.cleared else None

    @property
    def recall(self) -> float | None:
        """Of the cases that people voided: the part that is found again. None where they voided none."""
        return self.found_again / self.all_confirmed if self.all_confirmed else None


@dataclass(frozen=True)
class Trial:
    """What a rule would do."""

    rule: Rule
    parameters: Mapping[str, float]
    # Not stored; the most suspicious first.
    cases: list[SuspiciousIP]
    # That fit one of them, and of how many voters.
    votes: int
    voters: int
    # {option id: (votes now, votes if all were quarantined)}, where they differ; of the polls where that may be shown, None if of none
    changes: dict[int, tuple[int, int]] | None
    reviewed: Reviewed


def try_rule(
    name: str,
    act: Act,
    reads_results: Callable[[Poll], bool],
    *,
    poll_id: UUID | None = None,
    parameters: Mapping[str, float] | None = None,
) -> Trial:
    """Return what the rule finds in all votes of the poll, or of the polls that took votes lately. Changes nothing.

    It is on record in each poll where it finds something that somebody looked (see `review.look`). `parameters` in place of some of the
    installation's, and of the poll's. Raises Refusal (NOT_FOUND, UNKNOWN_POLL, INVALID, FORBIDDEN).

    Whether a rule about choices finds a network tells of these: with thresholds at will, what each of its voters chose. So it is tried
    as it is in force only, in polls whose results whoever asks may read now, and it is on record in all of them.
    """
    at = act.at
    rule = RULES.get(name)
    if rule is None:
        raise problems.NOT_FOUND.says(f"There is no such rule; the rules are {', '.join(RULES)}.")
    for parameter, value in (parameters or {}).items():
        _check_parameter(rule, parameter, value, f"/parameters/{_escaped(parameter)}")
    if rule.is_about_choices and parameters:
        raise problems.INVALID.says(
            "The rule is about choices: it is tried with the parameters in force, and no others.", pointer="/parameters"
        )
    polls = _polls_with_news(at, at - _LATELY) if poll_id is None else _read_polls(Q(pk=poll_id))
    if poll_id is not None and not polls:
        raise problems.UNKNOWN_POLL.says("No poll has this id.")
    journal.require_reason(act)
    poll = polls[0] if poll_id is not None else None
    if rule.is_about_choices:
        polls = _polls_to_try(rule, polls, at, reads_results, poll)
    given = {**rule.parameters, **(parameters_of(rule, poll) or {}), **(parameters or {})}
    given.pop(_OFF, None)
    found = _apply([rule], polls, at, since=None, parameters=None if rule.is_about_choices else given)
    cases = sorted(found.get(name, []), key=lambda case: (-case.score, str(case.network_key)))
    selectors: dict[UUID, list[Selector]] = defaultdict(list)
    if rule.is_about_choices:  # that it finds nothing tells something, too
        selectors.update((poll.pk, []) for poll in polls)
    for case in cases:
        if case.poll_id:
            selectors[case.poll_id].append(Selector.of_case(case))
    by_id = {poll.pk: poll for poll in polls}
    imagined = [
        review.look(poll_id, of_poll, Ruling.QUARANTINE, act, reads_results=reads_results(by_id[poll_id]))
        for poll_id, of_poll in selectors.items()
    ]
    shown = [one.changes for one in imagined if one.changes is not None]
    return Trial(
        rule,
        given,
        cases,
        sum(one.votes for one in imagined),
        sum(one.voters for one in imagined),
        {option: change for changes in shown for option, change in changes.items()} if shown or not imagined else None,
        _compare_with_decisions(cases, [poll.pk for poll in polls]),
    )


def _polls_to_try(rule: Rule, polls: Sequence[Poll], at: datetime, reads_results: Callable[[Poll], bool], asked: Poll | None) -> list[Poll]:
    """Return those of the polls in which the rule about choices may be tried. Raises Refusal if that is not the one asked for."""
    readable = [poll for poll in _open_to(rule, polls, at) if reads_results(poll)]
    if asked and not readable:
        raise problems.FORBIDDEN.says("The rule is about choices: it is tried by who may read the poll's results now.")
    in_force = [poll for poll in readable if parameters_of(rule, poll) is not None]
    if asked and not in_force:
        raise problems.INVALID.says("The rule is about choices, and off in the poll: it is tried as it is in force only.", pointer="/poll")
    return in_force


def _compare_with_decisions(cases: Sequence[SuspiciousIP], poll_ids: Sequence[UUID]) -> Reviewed:
    decided = SuspiciousIP.objects.filter(poll__in=poll_ids, state__in=[CaseState.CONFIRMED, CaseState.CLEARED])
    by_subnet: dict[tuple[UUID | None, UUID], list[SuspiciousIP]] = defaultdict(list)
    for case in decided:
        by_subnet[case.poll_id, case.subnet_key].append(case)
    confirmed = cleared = 0
    found_again: set[int] = set()
    for case in cases:
        agreeing = [other for other in by_subnet.get((case.poll_id, case.subnet_key), ()) if _are_about_the_same(case, other)]
        voided = {other.pk for other in agreeing if other.state == CaseState.CONFIRMED}
        found_again |= voided
        confirmed += bool(voided)
        cleared += bool(agreeing) and not voided
    return Reviewed(confirmed, cleared, decided.filter(state=CaseState.CONFIRMED).count(), len(found_again))


def _are_about_the_same(one: SuspiciousIP, other: SuspiciousIP) -> bool:
    """Whether two cases in one subnet of a poll are about the same votes, or one about some of the other's."""
    return (NetworkKind.SUBNET in (one.kind, other.kind) or one.network_key == other.network_key) and (
        None in (one.signature_key, other.signature_key) or one.signature_key == other.signature_key
    )
