"""manage.py setup: make database and broker ready."""

from typing import Any

from django.core.management import BaseCommand, call_command

from tasks import queues


class Command(BaseCommand):
    help = "Migrate the database and declare the queues. Repeatable; run it once before each new version starts."

    def handle(self, *args: Any, **options: Any) -> None:
        call_command("migrate", interactive=False, verbosity=options["verbosity"])
        queues.declare()
        self.stdout.write("The database and the queues are ready.")
