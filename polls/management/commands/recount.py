"""manage.py recount: make a poll's tallies what its votes say, while votes keep coming in."""

import getpass
from argparse import ArgumentParser
from typing import Any
from uuid import UUID

from django.core.management import BaseCommand, CommandError
from django.utils.timezone import now

from polls import integrity
from polls.journal import Act
from polls.problems import Refusal


class Command(BaseCommand):
    help = "Make a poll's tallies what its votes say. Votes are accepted meanwhile, and counted afterwards. Safe to repeat."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("poll", type=UUID)
        parser.add_argument("--reason", default="", help="for the journal")

    def handle(self, *args: Any, **options: Any) -> None:
        if len(options["reason"]) > 500:
            raise CommandError("--reason takes at most 500 characters.")
        try:
            wrong = integrity.recount(options["poll"], Act(getpass.getuser(), now(), options["reason"]))
        except Refusal as refusal:
            raise CommandError(refusal.detail) from None
        for name, (before, after) in sorted(wrong.items()):
            self.stdout.write(f"{name}: {before} -> {after}")
        self.stdout.write(f"{len(wrong)} tallies were wrong" if wrong else "Every tally was what the votes say.")
