"""Importing: the votes of a file, straight into counting. The file is their durable copy, and a repeat counts none of them twice."""

from __future__ import annotations

import codecs
import csv
import fcntl
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

import msgspec
from django.db import connection, transaction

from polls import accepting, codes, counting, patience, problems
from polls.accepting import BatchItem
from polls.ballots import Selection
from polls.bundles import AcceptedVote
from polls.models import Option, Poll, VoterPolicy
from polls.moments import from_microseconds, microseconds_now
from polls.problems import Refusal
from polls.snapshots import ClientSnapshot, PollSnapshot

# Rows of one transaction. Chosen: as fast as it gets, and short enough for workers and the clock's job that wait for the poll's rows.
ROWS_AT_ONCE = 1000

COLUMNS = ("voter", "code", "option", "options", "idempotency_key")
BETWEEN_OPTIONS = "|"
_REPORT_HEADER = b"line,problem,detail\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """What a line of the file says; `line` counts from 1."""

    line: int
    item: BatchItem | Refusal


class Progress(msgspec.Struct, forbid_unknown_fields=True):
    """How far an import has come, as it is kept beside its file between two batches."""

    poll: UUID
    client: int | None
    sha256: str
    # The last line that is done.
    line: int = 0
    rows: int = 0
    refused: int = 0
    # {outcome: votes}; "repeat": votes that had one already.
    outcomes: dict[str, int] = {}
    report_bytes: int = 0


def import_votes(file: VoteFile, poll_id: UUID, client_prefix: str | None, report: Path, *, restart: bool = False) -> Iterator[Progress]:
    """Cast the votes of the file in the poll, from where an earlier run stopped; yield how far it is, before and after each batch.

    Stopped at any moment, by any means, and run again, it ends as if it had not been. Raises Refusal when the file, its
    report or the client can't be used; rows that can't be taken stand in the report, by line, without what they say.
    """
    book = PollBook(poll_id, client_prefix, reads_texts=file.is_csv)
    progress = Progress(poll_id, book.client_id, file.sha256)
    if not restart:
        progress = _resume(file.progress_path, progress)
    if report.resolve() in (file.path.resolve(), file.progress_path.resolve()):
        raise problems.INVALID.says("The report needs a file of its own.")
    with Report(report, progress.report_bytes) as refused:
        progress.report_bytes = refused.size
        _write(file.progress_path, progress)
        yield progress
        for rows in _batches(file.rows()):
            judged = [book.judge(row) for row in rows]  # those that are done, too: it depends on them how later ones are named
            to_do = [(line, vote) for line, vote in judged if line > progress.line]
            if not to_do:
                continue
            outcomes, refusals = book.count(to_do)
            refused.add(refusals)
            progress.line, progress.report_bytes = rows[-1].line, refused.size
            progress.rows, progress.refused = progress.rows + len(to_do), progress.refused + len(refusals)
            progress.outcomes = dict(Counter(progress.outcomes) + outcomes)
            _write(file.progress_path, progress)
            yield progress
    file.progress_path.unlink()


# --- The file ---------------------------------------------------------------------------------------------------------


class VoteFile:
    """A file of votes: CSV whose first line names the columns, or NDJSON with the items of a batch (`POST …/votes/batch`)."""

    def __init__(self, path: Path) -> None:
        """Raises Refusal when it is neither, or not UTF-8 from the first to the last byte: then nothing of it is taken."""
        if path.suffix.lower() not in (".csv", ".ndjson"):
            raise problems.INVALID.says("The file's name must end in .csv or .ndjson.")
        self.path = path
        self.is_csv = path.suffix.lower() == ".csv"
        self.progress_path = path.with_name(f"{path.name}.progress")
        self.sha256, self.lines = _inspect(path)

    def rows(self) -> Iterator[Row]:
        """Yield what the lines say, without the empty ones. Raises Refusal when the first line does not name the columns."""
        with self.path.open(encoding="utf-8-sig") as text:
            lines = ((number, line.rstrip("\n")) for number, line in enumerate(text, start=1) if line.strip())
            yield from _read_csv(lines) if self.is_csv else (Row(number, _read_item(line)) for number, line in lines)


def _inspect(path: Path) -> tuple[str, int]:
    """Return the file's SHA-256 and how many lines it has."""
    digest, lines, decoder = hashlib.sha256(), 0, codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
                digest.update(chunk)
                lines += chunk.count(b"\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as exc:
            line = lines + exc.object.count(b"\n", 0, exc.start) + 1
            raise problems.INVALID.says(f"Line {line} is not UTF-8. Save the file as UTF-8; nothing of it was taken.") from None
    return digest.hexdigest(), lines


def _read_csv(lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    _, header = next(lines, (0, ""))
    columns = [name.strip().lower() for name in next(csv.reader([header]), [])]
    # What the line says is not repeated: without a header it is a vote.
    if not columns or not set(columns) <= set(COLUMNS) or len(set(columns)) < len(columns):
        raise problems.INVALID.says(f"The first line must name the columns, each once, with commas between them: of {', '.join(COLUMNS)}.")
    for number, line in lines:
        if line.strip(" \t,"):  # spreadsheets write such lines for rows that were emptied
            yield Row(number, _read_cells(line, columns))


def _read_cells(line: str, columns: Sequence[str]) -> BatchItem | Refusal:
    try:
        # Line by line: a quotation mark that is never closed spoils one row, not all that follow.
        [cells] = csv.reader([line], strict=True)
    except csv.Error:
        return problems.MALFORMED.says("The line is no CSV. Quoted cells end in the line in which they begin.")
    if len(cells) != len(columns):
        return problems.MALFORMED.says(f"The line has {len(cells)} cells; the first line names {len(columns)} columns.")
    said = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
    options = said.pop("options", None)
    return BatchItem(**said, options=None if options is None else options.split(BETWEEN_OPTIONS))  # type: ignore[arg-type]


def _read_item(line: str) -> BatchItem | Refusal:
    try:
        return _item_decoder.decode(line)
    except msgspec.ValidationError:
        # msgspec's own sentence names unknown fields, which may be anything.
        return problems.INVALID.says(f"A row is an object with texts: of {', '.join(COLUMNS)}, and nothing else; `options` is a list.")
    except (msgspec.DecodeError, RecursionError):
        return problems.MALFORMED.says("The line is no JSON.")


_item_decoder = msgspec.json.Decoder(BatchItem)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch


# --- Judging and counting ---------------------------------------------------------------------------------------------


class PollBook:
    """Judges rows as the API judges what an API client sends (polls/accepting.py), and counts their votes."""

    def __init__(self, poll_id: UUID, client_prefix: str | None, *, reads_texts: bool) -> None:
        """Raises Refusal where nothing can be imported; `reads_texts`: options may be named by their texts."""
        poll = PollSnapshot.read(str(poll_id))
        if poll is None:
            raise accepting.unknown_poll()
        if poll.is_draft:
            raise problems.POLL_NOT_OPEN.says("The poll is a draft. Publish it first.")
        if poll.voter_policy not in (VoterPolicy.CLIENT, VoterPolicy.CODE):
            raise problems.NOT_OFFERED.says("Votes are imported into polls whose voter_policy is `client` or `code`.")
        if poll.voter_policy == VoterPolicy.CODE and client_prefix is not None:
            raise problems.INVALID.says("This poll knows its voters by their codes. Leave --client out.")
        if poll.voter_policy == VoterPolicy.CLIENT and client_prefix is None:
            raise problems.INVALID.says("The poll's voters are those of an API client. Say with --client whose, by the prefix of its key.")
        self._poll = poll
        self._client_prefix = client_prefix
        self.client_id = self._check_client(poll)
        self._texts = dict(Option.objects.filter(poll=poll_id).values_list("text", "id")) if reads_texts else {}
        self._last_stands = Poll.objects.values_list("allow_change", flat=True).get(pk=poll_id)
        self._seen: Counter[tuple[UUID, Selection]] = Counter()
        self._last_accepted_at = 0

    def judge(self, row: Row) -> tuple[int, AcceptedVote | Refusal]:
        """Return the row's line, and its vote but for its moment, or why it is none. For each row once, in their order."""
        try:
            return row.line, self._vote(row)
        except Refusal as refusal:
            return row.line, refusal

    def count(self, judged: Sequence[tuple[int, AcceptedVote | Refusal]]) -> tuple[Counter[str], list[tuple[int, Refusal]]]:
        """Count the votes in one transaction, as accepted at this moment; return their outcomes, and the (line, refusal) of the others.

        Repeatable. Waits for PostgreSQL as long as a worker does. Raises Refusal when the client may not cast votes any more.
        """
        return patience.until_committed(lambda: self._count(judged))

    def _count(self, judged: Sequence[tuple[int, AcceptedVote | Refusal]]) -> tuple[Counter[str], list[tuple[int, Refusal]]]:
        votes, refused = [], []
        with transaction.atomic():
            # Until the commit the poll does not become final; and a change that ends it sooner leaves this moment before its end.
            with connection.cursor() as cursor:
                cursor.execute("SELECT FROM polls WHERE id = %s FOR KEY SHARE", [self._poll.id])
            self._last_accepted_at = max(microseconds_now(), self._last_accepted_at)
            poll = PollSnapshot.read(str(self._poll.id))
            if poll is None:
                raise accepting.unknown_poll()
            self._check_client(poll)
            known = self._known_codes([vote.voter_key for _, vote in judged if isinstance(vote, AcceptedVote)])
            for line, vote in judged:
                try:
                    votes.append(self._accept(poll, vote, known))
                except Refusal as refusal:
                    refused.append((line, refusal))
            return counting.count_votes(votes), refused

    def _accept(self, poll: PollSnapshot, vote: AcceptedVote | Refusal, known_codes: set[UUID] | None) -> AcceptedVote:
        if isinstance(vote, Refusal):
            raise vote
        if known_codes is not None and vote.voter_key not in known_codes:
            raise accepting.unknown_code()
        self._last_accepted_at += 1
        accepting.check_open(poll, self._last_accepted_at)
        return msgspec.structs.replace(vote, accepted_at=self._last_accepted_at)

    def _check_client(self, poll: PollSnapshot) -> int | None:
        """Return the id of the client whose voters these are; raises Refusal unless it may cast votes in the poll."""
        if self._client_prefix is None:
            return None
        client = ClientSnapshot.read(self._client_prefix)
        if client is None:
            raise problems.UNAUTHENTICATED.says("No API client has a key with this prefix, or it was revoked.")
        accepting.check_client(poll, client)
        return client.id

    def _known_codes(self, voter_keys: Iterable[UUID]) -> set[UUID] | None:
        """Return which of them belong to a code that is accepted; None where the poll has no codes."""
        if self._poll.voter_policy != VoterPolicy.CODE:
            return None
        at = from_microseconds(self._last_accepted_at)
        return {key for _, key in codes.valid([(self._poll.id, key) for key in voter_keys], at=at)}

    def _vote(self, row: Row) -> AcceptedVote:
        if isinstance(row.item, Refusal):
            raise row.item
        item = self._by_ids(row.item)
        item.check()
        voter_key = accepting.voter_of(self._poll, self.client_id, item)
        if isinstance(voter_key, Refusal):
            raise voter_key
        selection = item.select(self._poll)
        name = accepting.check_key(item.idempotency_key) or self._name(voter_key, selection)
        vote_id = self._poll.vote_ids.of(voter_key, name, selection)
        return AcceptedVote(vote_id, self._poll.id, voter_key, selection, 0, request_id=f"line {row.line}")

    def _name(self, voter_key: UUID, selection: Selection) -> str:
        """Return what a row without an Idempotency-Key is known by: what it says, in whichever line. No key of the API reads like it.

        Where voters may change their votes, soup, salad and soup again are three votes: how often it was said belongs to it.
        """
        if self._last_stands:
            self._seen[voter_key, selection] += 1
        return f"import {selection} {self._seen[voter_key, selection]}"

    def _by_ids(self, item: BatchItem) -> BatchItem:
        """Return the item with the ids of options that it names by their texts."""
        if not self._texts:
            return item
        option = None if item.option is None else self._id_of(item.option)
        options = None if item.options is None else [self._id_of(option) for option in item.options]
        return msgspec.structs.replace(item, option=option, options=options)

    def _id_of(self, option: str) -> str:
        option = option.strip()
        by_text = str(self._texts.get(option, option))
        if option in self._poll.options and by_text != option:
            raise problems.UNKNOWN_OPTION.says("This is one option's id and another one's text. Use NDJSON, which takes ids only.")
        return by_text


# --- What is kept beside the file -------------------------------------------------------------------------------------


class Report:
    """The refused rows as CSV, `line,problem,detail`. Never what they say."""

    def __init__(self, path: Path, size: int) -> None:
        """`size`: how many bytes of it belong to what is done; none: it begins anew."""
        self._path = path
        self.size = size

    def __enter__(self) -> Report:
        self._file: BinaryIO = self._path.open("a+b")
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, refused: Iterable[tuple[int, Refusal]]) -> None:
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows((line, refusal.problem.slug, refusal.detail) for line, refusal in refused)
        self._write(lines.getvalue().encode())

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise problems.INVALID.says("Another import writes this report at the moment.") from None
        there = self._file.seek(0, io.SEEK_END)
        self._file.seek(0)
        if there and self._file.read(len(_REPORT_HEADER)) != _REPORT_HEADER:
            raise problems.INVALID.says("The file for the report is there already and is none. Name another one with --report.")
        if there < self.size:
            raise problems.INVALID.says(
                "The report that this import began is not there. Name it with --report, or start over with --restart."
            )
        self._file.truncate(self.size)
        if not self.size:
            self._write(_REPORT_HEADER)

    def _write(self, lines: bytes) -> None:
        self._file.write(lines)
        self._file.flush()
        self.size += len(lines)


def _resume(path: Path, wanted: Progress) -> Progress:
    """Return how far the import has come; raises Refusal when what is kept there is another import's."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Progress)
    except FileNotFoundError:
        return wanted
    except msgspec.DecodeError:
        raise problems.INVALID.says(f"What {path.name} says can't be read. {_START_OVER}") from None
    if kept.line == 0:  # nothing was taken yet
        return wanted
    for what, then, is_now in (
        ("file has changed", kept.sha256, wanted.sha256),
        ("poll is another one", kept.poll, wanted.poll),
        ("client is another one", kept.client, wanted.client),
    ):
        if then != is_now:
            raise problems.INVALID.says(f"The {what} since the import stopped at line {kept.line}. {_START_OVER}")
    return kept


_START_OVER = "Start over with --restart: a row that was taken before counts no second time."


def _write(path: Path, progress: Progress) -> None:
    """Keep it, at once and whole: whoever reads it meanwhile finds this or the one before."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(msgspec.json.encode(progress))
    fresh.replace(path)
