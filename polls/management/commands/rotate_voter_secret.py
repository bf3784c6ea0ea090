"""manage.py rotate_voter_secret: go over to another VOTER_SECRET while polls are open."""

from typing import Any

from django.core.management import BaseCommand, CommandError, CommandParser
from django.utils.timezone import now

from polls import networks, voter_secrets


class Command(BaseCommand):
    requires_system_checks = []  # one of them would keep it from giving a lost secret up; it compares by itself
    help = (
        "Have polls that are made from now on use VOTER_SECRET. Older polls keep the secret that they were made with: leave it in "
        "VOTER_SECRET_FALLBACKS of every process until nothing needs it. Repeatable; docs/operations.md says the steps."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--status", action="store_true", help="only tell which secret is needed by what")
        parser.add_argument("--lost", action="store_true", help="give up the secrets that nobody has any more: their polls take no votes")

    def handle(self, *args: Any, **options: Any) -> None:
        if not options["status"]:
            if options["lost"]:
                lost = voter_secrets.give_up_lost(now())
                self.stdout.write(f"{lost} secrets are given up.")
            elif found := voter_secrets.faults():
                raise CommandError(" ".join(found))
            changed = voter_secrets.rotate(now())
            networks.rotate(now())
            self.stdout.write("New polls use VOTER_SECRET from now on." if changed else "New polls use VOTER_SECRET already.")
        for use in voter_secrets.uses():
            marks = {"current": use.is_current, "not in this process's settings": not use.is_known, "lost": use.is_lost}
            marked = "".join(f", {mark}" for mark, applies in marks.items() if applies)
            needed = f"{use.open_polls} polls that are not final, {use.network_secrets} secrets of networks"
            self.stdout.write(f"{use.fingerprint} since {use.since:%Y-%m-%d %H:%M}{marked}: {needed}")
