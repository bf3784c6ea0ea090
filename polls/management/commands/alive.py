"""`manage.py alive worker|periodic|beat`: whether that program of this machine goes on, for containers."""

from argparse import ArgumentParser

from django.core.management.base import BaseCommand, CommandError

from tasks import liveness


class Command(BaseCommand):
    help = (
        f"Fails when the program has not noted for {liveness.HANGS_AFTER_SECONDS} s that it lives: it has ended, or hangs. "
        "One that waits for the broker or the database lives: starting it again would not help."
    )
    requires_system_checks = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("program", choices=liveness.PROGRAMS)

    def handle(self, *, program: str, **_: object) -> None:
        silence = liveness.silence_of(program)
        if silence is None:
            raise CommandError(f"{program} has never noted that it lives, here.")
        if silence > liveness.HANGS_AFTER_SECONDS:
            raise CommandError(f"{program} noted {silence:.0f} s ago that it lived, and should every {liveness.NOTE_SECONDS} s.")
        self.stdout.write(f"{program} lives, as of {silence:.0f} s ago.")
