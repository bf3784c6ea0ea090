"""manage.py try_rule: whom a rule would flag on the stored votes, and what that would change, before anybody relies on it."""

import getpass
from argparse import ArgumentParser
from typing import Any
from uuid import UUID

from django.core.management import BaseCommand, CommandError
from django.utils.timezone import now

from polls import fraud, networks, roles
from polls.fraud import RULES, Trial
from polls.journal import Act
from polls.models import Option, SuspiciousIP
from polls.moments import iso
from polls.problems import Refusal


class Command(BaseCommand):
    help = "Show whom a rule would flag on the stored votes, how the result would change, and how that agrees with past decisions."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name", nargs="?", help="the rule")
        parser.add_argument("--list", action="store_true", help="only say which rules there are, with their parameters")
        parser.add_argument("--poll", type=UUID, help="in this poll; otherwise in all that took votes lately")
        parser.add_argument("--set", action="append", default=[], metavar="PARAMETER=VALUE", help="another value than usually; repeatable")
        parser.add_argument("--reason", default="", help="why, for the record: it shows how results would change")
        parser.add_argument("--reveal", action="store_true", help="show the networks readable, while their secret exists")
        parser.add_argument("--most", type=int, default=50, help="show at most this many, the most suspicious first (50)")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["list"]:
            return self._list()
        if options["name"] is None:
            raise CommandError("Say which rule: try_rule NAME, or try_rule --list.")
        if options["most"] < 1:
            raise CommandError("--most takes a number from 1.")
        at = now()
        try:
            trial = fraud.try_rule(
                options["name"],
                Act(f"{getpass.getuser()} at the console", at, options["reason"]),
                # Who is at the console has no role here.
                lambda poll: roles.actor_of(None).reads_results(poll, at),
                poll_id=options["poll"],
                parameters=_parameters(options["set"]),
            )
        except Refusal as refusal:
            raise CommandError(f"{_field(refusal)}{refusal.detail}") from None
        self._show(trial, most=options["most"], reveals=options["reveal"])

    def _list(self) -> None:
        for rule in RULES.values():
            used = fraud.parameters_of(rule)
            shown = "off" if used is None else ", ".join(f"{name}={value:g}" for name, value in used.items())
            self.stdout.write(f"{rule.name:<18} {rule.description} ({shown})")

    def _show(self, trial: Trial, *, most: int, reveals: bool) -> None:
        given = ", ".join(f"{name}={value:g}" for name, value in trial.parameters.items())
        self.stdout.write(f"{trial.rule.name}: {trial.rule.description}\n  with {given}\n")
        for case in trial.cases[:most]:
            numbers = ", ".join(f"{name} {value}" for name, value in case.evidence.items())
            self.stdout.write(
                f"{_network(case, reveals=reveals):<24} score {case.score:6.2f}  {iso(case.first_seen)[:16]} to {iso(case.last_seen)[:16]}"
                f"  {numbers}"
            )
        if len(trial.cases) > most:
            self.stdout.write(f"... and {len(trial.cases) - most} more")
        self.stdout.write(f"\n{len(trial.cases)} networks, {trial.votes} votes of {trial.voters} voters")
        if trial.changes is None:
            self.stdout.write(
                "  how the results would change is not shown: it would tell what too few voters chose, or they are not public"
            )
        changes = trial.changes or {}
        texts = dict(Option.objects.filter(pk__in=changes).values_list("pk", "text"))
        for option, (votes, then) in sorted(changes.items()):
            self.stdout.write(f"  {texts.get(option, option)}: {votes} -> {then}")
        seen = trial.reviewed
        self.stdout.write(
            f"\nOf these networks, people have decided on {seen.confirmed + seen.cleared}: {seen.confirmed} voided, {seen.cleared} cleared"
            f"{_part('precision', seen.precision)}.\nOf the {seen.all_confirmed} cases that people voided, under whichever rule, it finds"
            f" {seen.found_again}{_part('recall', seen.recall)}."
        )


def _parameters(texts: list[str]) -> dict[str, float]:
    """Read `name=value`s. Raises CommandError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not (name and equals):
            raise CommandError(f"--set takes PARAMETER=NUMBER, not {text!r}.")
    return found


def _field(refusal: Refusal) -> str:
    return f"{refusal.errors[0]['pointer'].rpartition('/')[2]}: " if refusal.errors else ""


def _network(case: SuspiciousIP, *, reveals: bool) -> str:
    readable = networks.reveal(case.network_secret, case.kind, case.network_key) if reveals else None
    return readable or f"{case.kind} {str(case.network_key)[:8]}"


def _part(name: str, part: float | None) -> str:
    return "" if part is None else f" ({name} {part:.0%})"
