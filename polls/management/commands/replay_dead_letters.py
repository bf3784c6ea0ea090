"""manage.py replay_dead_letters: have dead letters counted after all, once their cause is cured."""

from argparse import ArgumentParser
from typing import Any

from django.core.management import BaseCommand, CommandError

from polls import deadletters


class Command(BaseCommand):
    help = "Send the messages of votes.dead back to the queue of votes. Safe to repeat: no vote counts twice."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="only say what is there")
        parser.add_argument("--most", type=int, help="replay at most this many, oldest first")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["most"] is not None and options["most"] < 1:
            raise CommandError("--most takes a number from 1.")
        try:
            if options["dry_run"]:
                letters = deadletters.peek(options["most"] or 1000)
                for letter in letters:
                    what = "no bundle" if letter.votes is None else f"{letter.votes} votes, {letter.unreadable} unreadable"
                    self.stdout.write(
                        f"{letter.message_id or '(no id)'}  {letter.reason}  {letter.died_at or ''}  {letter.size} bytes  {what}"
                    )
                self.stdout.write(f"{len(letters)} dead letters")
            else:
                self.stdout.write(f"{deadletters.replay(options['most'])} dead letters replayed")
        except deadletters.UnreachableError as exc:
            raise CommandError(str(exc)) from exc
