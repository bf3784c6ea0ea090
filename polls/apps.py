"""Django's entry for the domain."""

from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.db import OperationalError, ProgrammingError, connection


class PollsConfig(AppConfig):
    name = "polls"

    def ready(self) -> None:
        checks.register(check_voter_secret, "voter_secret")


def check_voter_secret(**_: Any) -> list[checks.CheckMessage]:
    """Have every command compare VOTER_SECRET with the database. Nothing to compare with: no database, or none that is set up."""
    from polls import voter_secrets

    try:
        return [checks.Critical(fault, id="polls.C001") for fault in voter_secrets.faults()]
    except (OperationalError, ProgrammingError):
        return []
    finally:
        connection.close()
