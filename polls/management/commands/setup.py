"""manage.py setup: make database and broker ready."""

from typing import Any

from amqp.exceptions import AMQPError, PreconditionFailed
from django.core.management import BaseCommand, CommandError, call_command
from django.db import OperationalError
from kombu.exceptions import KombuError

from tasks import queues


class Command(BaseCommand):
    help = "Migrate the database and declare the queues. Repeatable; run it once before each new version starts."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            call_command("migrate", interactive=False, verbosity=options["verbosity"])
            queues.declare()
        except OperationalError as exc:
            raise CommandError(f"The database of DATABASE_URL does not let us in: {exc}") from exc
        except PreconditionFailed as exc:
            raise CommandError(f"A queue is there already with other arguments; empty it, delete it, and try again. {exc}") from exc
        except (AMQPError, KombuError, OSError) as exc:
            raise CommandError(f"The broker of CELERY_BROKER_URL does not let us in: {exc}") from exc
        self.stdout.write("The database and the queues are ready.")
