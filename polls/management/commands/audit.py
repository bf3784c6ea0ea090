"""manage.py audit: does every accepted vote have one outcome, and is every tally what the votes say?"""

import sys
from argparse import ArgumentParser
from typing import Any
from uuid import UUID

from django.core.management import BaseCommand, CommandError

from polls import finality, integrity
from polls.models import Outcome, Poll


class Command(BaseCommand):
    help = "Count the votes of a poll, or of all polls, and compare. Ends with 1 when something is wrong; `recount` repairs tallies."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--poll", type=UUID, help="only this one")

    def handle(self, *args: Any, **options: Any) -> None:
        polls = Poll.objects.filter(published_at__isnull=False) if options["poll"] is None else Poll.objects.filter(pk=options["poll"])
        poll_ids = list(polls.order_by("created_at", "id").values_list("id", flat=True))
        if options["poll"] and not poll_ids:
            raise CommandError("No poll has this id.")
        wrong = sum(not self._is_exact(poll_id) for poll_id in poll_ids)
        waiting = finality.count_bundles()
        told = "unknown: the broker's management does not answer" if waiting is None else str(waiting)
        self.stdout.write(f"{len(poll_ids)} polls, {wrong} with a mismatch; bundles in the queue and with workers: {told}")
        if wrong:
            sys.exit(1)

    def _is_exact(self, poll_id: UUID) -> bool:
        """Show what became of the poll's votes; return whether all is as it must be."""
        report = integrity.read(poll_id)
        if report is None:  # deleted a moment ago
            return True
        numbers = {
            "accepted": report.accepted,
            "counted": report.counted,
            **{outcome.value: report.total(outcome) for outcome in (Outcome.SUPERSEDED, Outcome.REJECTED, Outcome.QUARANTINED)},
            "pending": report.pending,
        }
        self.stdout.write(f"{poll_id}  {', '.join(f'{name} {votes}' for name, votes in numbers.items())}")
        if report.doubled:
            self.stdout.write(f"  {report.doubled} votes have two outcomes")
        for option, tally, recount in report.tallies:
            if tally != recount:
                self.stdout.write(f"  {'ballots' if option is None else f'option {option}'}: tally {tally}, votes {recount}")
        return report.is_exact
