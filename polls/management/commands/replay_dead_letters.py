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
        parser.add_argument("--id", help="replay the letter with this id only")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["most"] is not None and options["most"] < 1:
            raise CommandError("--most takes a number from 1.")
        if options["id"] is not None and (options["dry_run"] or options["most"]):
            raise CommandError("--id goes with neither --dry-run nor --most.")
        try:
            if options["dry_run"]:
                letters = deadletters.peek(options["most"] or 1000)
                for letter in letters:
                    known = [letter.message_id or "(no id)", letter.reason, str(letter.died_at or ""), f"{letter.size} bytes"]
                    votes = f"{letter.votes} votes ({letter.pending} pending), {letter.unreadable} unreadable"
                    self.stdout.write("  ".join([*known, "no bundle" if letter.votes is None else votes]))
                    for poll in letter.polls:
                        self.stdout.write(f"    poll {poll.id}: {poll.votes} votes")
                    for fault in letter.faults:
                        self.stdout.write(f"    {'message' if fault.item is None else f'item {fault.item}'}: {fault.why}")
                self.stdout.write(f"{len(letters)} dead letters")
            elif options["id"] is not None:
                self.stdout.write(f"{deadletters.replay_one(options['id'])} dead letters replayed")
            else:
                self.stdout.write(f"{deadletters.replay(options['most'])} dead letters replayed")
        except deadletters.UnreachableError as exc:
            raise CommandError(str(exc)) from exc
