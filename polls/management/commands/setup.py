"""manage.py setup: make database and broker ready."""

from typing import Any

from amqp.exceptions import AMQPError, PreconditionFailed
from django.conf import settings
from django.core.management import BaseCommand, CommandError, call_command
from django.db import OperationalError, ProgrammingError, connection
from django.utils.timezone import now
from kombu.exceptions import KombuError
from psycopg2 import errorcodes

from polls import codes, networks, privileges, voter_secrets
from tasks import queues


class Command(BaseCommand):
    help = "Migrate the database and declare the queues. Repeatable; run it once before each new version starts."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            with connection.cursor() as cursor:
                # An index on a large table takes minutes. Waits for locks stay bounded: who waits for one holds up all who come after.
                cursor.execute("SET statement_timeout = 0")
            call_command("migrate", interactive=False, verbosity=options["verbosity"])
            self._compare()
            networks.current_secret(at=now())  # which no web process may make
            codes.seal_labels()
            privileges.grant(settings.WEB_DATABASE_ROLE, settings.WORKER_DATABASE_ROLE)
            queues.declare()
        except OperationalError as exc:
            if getattr(exc.__cause__, "pgcode", "") == errorcodes.LOCK_NOT_AVAILABLE:
                raise CommandError("A table that is to be changed is in use. What was begun is undone; try again.") from exc
            raise CommandError(f"The database of DATABASE_URL does not let us in: {exc}") from exc
        except ProgrammingError as exc:
            if getattr(exc.__cause__, "pgcode", "") != errorcodes.UNDEFINED_OBJECT:
                raise
            raise CommandError(f"WEB_DATABASE_ROLE and WORKER_DATABASE_ROLE name roles that are there: {exc}") from exc
        except PreconditionFailed as exc:
            raise CommandError(f"A queue is there already with other arguments; empty it, delete it, and try again. {exc}") from exc
        except (AMQPError, KombuError, OSError) as exc:
            raise CommandError(f"The broker of CELERY_BROKER_URL does not let us in: {exc}") from exc
        self.stdout.write("The database and the queues are ready.")

    def _compare(self) -> None:
        """Note VOTER_SECRET in a database that has none yet; raise CommandError when it is not this database's."""
        if voter_secrets.current() is None and not networks.can_be_read():
            raise CommandError("The addresses of stored votes can't be read with this VOTER_SECRET: it is not this database's.")
        if found := voter_secrets.faults():
            raise CommandError(" ".join(found))
        voter_secrets.record(now())
