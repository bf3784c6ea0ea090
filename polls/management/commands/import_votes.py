"""manage.py import_votes: cast votes that were collected elsewhere."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any
from uuid import UUID

from django.core.management import BaseCommand, CommandError
from django.db import InterfaceError, OperationalError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from polls import importing
from polls.importing import Progress
from polls.patience import DatabaseStaysAwayError
from polls.problems import Refusal

GOES_ON = "Run the same command again: it goes on where it stopped."


class Command(BaseCommand):
    help = (
        "Cast the votes of a file, while the poll is open. CSV: the first line names the columns, voter or code, option (id or text) or "
        "options (with | between them), and idempotency_key if you like. NDJSON: one item of POST …/votes/batch a line. Safe to stop "
        "and to repeat: no row counts twice. Ends with 0 when all rows were taken, with 2 when some were refused, with 1 when it stopped."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path, help="votes in UTF-8, .csv or .ndjson")
        parser.add_argument("--poll", type=UUID, required=True, metavar="ID", help="the poll's id")
        parser.add_argument("--client", metavar="PREFIX", help="whose voters they are (voter_policy client): nxs_<prefix>_… of its key")
        parser.add_argument("--report", type=Path, metavar="FILE", help="where refused rows are listed; FILE.refused.csv if not said")
        parser.add_argument("--restart", action="store_true", help="begin at the first line, whatever an earlier run has done")

    def handle(self, *args: Any, **options: Any) -> None:
        path: Path = options["file"]
        report: Path = options["report"] or path.with_name(f"{path.name}.refused.csv")
        try:
            done = self._import(path, report, options)
        except Refusal as refusal:
            raise CommandError(refusal.detail) from None
        except OSError as exc:
            raise CommandError(f"{exc.filename}: {exc.strerror}.") from exc
        except (OperationalError, InterfaceError, DatabaseStaysAwayError) as exc:
            raise CommandError(f"The database of DATABASE_URL does not let us in. {GOES_ON}") from exc
        except KeyboardInterrupt:
            raise CommandError(f"Stopped. {GOES_ON}") from None
        votes = done.outcomes
        self.stdout.write(
            f"{done.rows} rows: {votes.get('counted', 0)} counted, {votes.get('superseded', 0)} superseded, "
            f"{votes.get('rejected', 0)} rejected, {votes.get('repeat', 0)} taken before, {done.refused} refused"
        )
        if done.refused:
            raise CommandError(f"{done.refused} of {done.rows} rows were refused: {report} says which and why.", returncode=2)

    def _import(self, path: Path, report: Path, options: dict[str, Any]) -> Progress:
        file = importing.VoteFile(path)
        with logging_redirect_tqdm(), tqdm(total=file.lines, unit=" lines", disable=None) as bar:
            for progress in importing.import_votes(file, options["poll"], options["client"], report, restart=options["restart"]):
                bar.update(progress.line - bar.n)
        return progress
