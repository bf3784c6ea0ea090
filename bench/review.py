"""`make bench-review`: rulings on 5,000 votes and the rules' jobs, in a table of 10 million, alone and beside a process that counts."""

# ruff: noqa: E402 - Django has to know its settings first

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any
from uuid import UUID, uuid4

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
django.setup()

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connection, connections
from django.db.backends.utils import CursorWrapper
from django.utils.timezone import now

from polls import counting, editing, fraud, patience, review
from polls.bundles import AcceptedVote
from polls.holds import Selector
from polls.journal import Act
from polls.models import Poll, Ruling
from polls.moments import microseconds_now
from stack.folder import ROOT

DAYS = 7
# The polls' shares of the votes; the first one is reviewed.
SHARES = (0.20, 0.15, 0.12, 0.10, 0.08, 0.07, 0.06, 0.05, *[0.02] * 5, *[0.01] * 7)
# Votes that a busy web process sends together.
BUNDLE = 500
# Of the votes that are counted meanwhile, those from a network under review: one in so many.
REVIEWED_AMONG_COUNTED = 500
CYCLE = (Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID, Ruling.RELEASE)
JOBS = (("hourly", False), ("every minute", True))
REST_SECONDS = 3.0

# A week's votes, with moments that rise from row to row, as where votes are written as they come. Every fifth is from a carrier's
# address (800 votes each, four to a /24), every fifth from a school's or an office's (50 votes each), the others from homes: three
# votes each, and two of five have a /64 of their own, while twenty of the others share a /24.
_FILL = """
    INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, counted_at)
    SELECT polls[width_bucket(chance, steps)], gen_random_uuid(), gen_random_uuid(),
           ARRAY[first_options[width_bucket(chance, steps)] + floor(5 * power(random(), 1.3))::int], at, md5('address ' || address)::uuid,
           md5(CASE WHEN address < carriers THEN 'carrier ' || address / 4
                    WHEN address < carriers + offices OR address %% 5 < 2 THEN 'own ' || address
                    ELSE 'homes ' || address / 33 END)::uuid,
           1000 + floor(300 * power(random(), 2.5))::int, at
    FROM (
        SELECT random() AS chance, %(begins_at)s::timestamptz + n * (%(seconds)s::float / %(n)s) * interval '1 second' AS at,
               CASE n %% 5 WHEN 0 THEN floor(random() * carriers)::int
                           WHEN 1 THEN carriers + floor(random() * offices)::int
                           ELSE carriers + offices + floor(random() * homes)::int END AS address, carriers, offices
        FROM generate_series(1, %(n)s) AS n,
             (SELECT %(n)s / 4000 AS carriers, %(n)s / 250 AS offices, %(n)s / 5 AS homes) AS addresses
    ) AS v, (SELECT %(polls)s::uuid[] AS polls, %(first_options)s::bigint[] AS first_options, %(steps)s::float[] AS steps) AS p
"""
# One voter in thirty tries again.
_FILL_ASIDE = """
    INSERT INTO outcomes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key,
                          outcome, reason, decided_at)
    SELECT poll_id, voter_key, gen_random_uuid(), selection, accepted_at + interval '1 minute', address_key, subnet_key, signature_key,
           'rejected', 'duplicate', accepted_at + interval '1 minute'
    FROM votes TABLESAMPLE BERNOULLI (3.3)
"""
# 5,000 bots of the last day in the first poll: 2,000 in a /24, 2,000 in a /64, 1,000 at 300 homes, these by one browser.
_FILL_BOTS = """
    INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, counted_at)
    SELECT %(poll)s, gen_random_uuid(), gen_random_uuid(), ARRAY[%(option)s::bigint], at, md5(address)::uuid, md5(subnet)::uuid, browser, at
    FROM (
        SELECT %(until)s::timestamptz - n * interval '15 seconds' AS at, 9000 + kind AS browser,
               CASE kind WHEN 0 THEN 'bots ' || n %% 250 WHEN 1 THEN 'bots ' || n ELSE 'address ' || home END AS address,
               CASE kind WHEN 0 THEN 'bots /24' WHEN 1 THEN 'bots /64' ELSE 'homes ' || home / 33 END AS subnet
        FROM (SELECT n, least(n %% 5 / 2, 2) AS kind, %(homes_begin)s / 5 * 5 + 5 * (1 + n / 5 %% 300 * 7) + 3 AS home
              FROM generate_series(1, 5000) AS n) AS numbers
    ) AS v
"""
_FILL_TALLIES = """
    INSERT INTO tallies (poll_id, selection, votes, counted, revision)
    SELECT poll_id, selection, count(*), count(*), 1 FROM votes GROUP BY 1, 2
"""
_BOTS_OF = """
    SELECT DISTINCT CASE browser WHEN 9002 THEN address_key END, subnet_key, CASE browser WHEN 9002 THEN browser END
    FROM (SELECT address_key, subnet_key, signature_key AS browser FROM votes WHERE poll_id = %s AND signature_key >= 9000) AS v
"""

Window = tuple[float, float]  # when it began and ended, by time.monotonic


# --- A big table ------------------------------------------------------------------------------------------------------


@contextmanager
def scratch_database() -> Iterator[None]:
    """A database of this run's own on the server of DATABASE_URL, dropped at the end."""
    before = settings.DATABASES["default"]["NAME"]
    settings.DATABASES["default"].setdefault("TEST", {})["NAME"] = f"bench_review_{os.getpid()}"
    connection.creation.create_test_db(verbosity=0, autoclobber=True)
    try:
        yield
    finally:
        connections.close_all()
        connection.creation.destroy_test_db(before, verbosity=0)


def fill(votes: int) -> tuple[Poll, list[Selector]]:
    """Write so many votes, up to now; return the poll that is reviewed, and what fits its 5,000 bots: 2 subnets and 300 addresses."""
    at = now()
    polls = [make_poll(at) for _ in SHARES]
    options = [list(poll.options.values_list("pk", flat=True)) for poll in polls]
    table: dict[str, Any] = {
        "n": votes,
        "begins_at": at - timedelta(days=DAYS),
        "seconds": timedelta(days=DAYS).total_seconds(),
        "polls": [str(poll.pk) for poll in polls],
        "first_options": [of_poll[0] for of_poll in options],
        "steps": [sum(SHARES[:number]) for number in range(len(SHARES))],
    }
    bots: dict[str, Any] = {"poll": polls[0].pk, "option": options[0][-1], "until": at, "homes_begin": votes // 4000 + votes // 250}
    with connection.cursor() as cursor:
        cursor.execute("SET statement_timeout = 0; SET synchronous_commit = off; SET maintenance_work_mem = '512MB'")
        with without_indexes(cursor):
            cursor.execute(_FILL, table)
            cursor.execute(_FILL_BOTS, bots)
            cursor.execute(_FILL_ASIDE)
        cursor.execute(_FILL_TALLIES)
        for statement in ("VACUUM ANALYZE votes", "VACUUM ANALYZE outcomes", "CHECKPOINT"):
            cursor.execute(statement)
        cursor.execute(_BOTS_OF, [polls[0].pk])
        selectors = [Selector(*row) for row in cursor]
    connection.close()  # with its settings
    return polls[0], selectors


def make_poll(at: datetime) -> Poll:
    owner, _ = get_user_model().objects.get_or_create(username="bench")
    options = [{"text": text} for text in ("soup", "salad", "bread", "stew", "cake")]
    times = {"opens_at": at, "closes_at": at + timedelta(days=7)}
    poll = editing.create_poll(owner, {"title": "Bench", "voter_policy": "session", "options": options, "draft": True, **times}, at=at)
    began = at - timedelta(days=DAYS)  # of a draft: an open poll's opening can't move
    Poll.objects.filter(pk=poll.pk).update(opens_at=began, opened_at=began, published_at=began, network_secret_since=began)
    poll.refresh_from_db()
    return poll


@contextmanager
def without_indexes(cursor: CursorWrapper) -> Iterator[None]:
    """Take the indexes of votes and outcomes away, and make them again: a table that has them takes ten times as long to fill."""
    cursor.execute(
        "SELECT conrelid::regclass, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE contype = 'p' AND conrelid IN ('votes'::regclass, 'outcomes'::regclass)"
    )
    keys = cursor.fetchall()
    for table, name, _ in keys:
        cursor.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    cursor.execute("SELECT indexname, indexdef FROM pg_indexes WHERE tablename IN ('votes', 'outcomes')")
    indexes = cursor.fetchall()
    for name, _ in indexes:
        cursor.execute(f"DROP INDEX {name}")
    yield
    for table, name, definition in keys:
        cursor.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}")
    for _, definition in indexes:
        cursor.execute(definition)


# --- Counting beside --------------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """When each bundle was begun and done; known once the process has ended."""

    bundles: list[Window] = field(default_factory=list)

    def per_second(self, windows: Sequence[Window]) -> float:
        """Votes a second through these windows."""
        return len(self.within(windows)) * BUNDLE / sum(end - begin for begin, end in windows)

    def longest_pause(self, windows: Sequence[Window]) -> float:
        """The longest time, in seconds, from a bundle's end to the next one's that has a part in one of the windows."""
        pauses = pairwise(done for _, done in self.bundles)
        return max(after - before for before, after in pauses if any(before < end and after > begin for begin, end in windows))

    def seconds(self, windows: Sequence[Window]) -> float:
        """What a bundle took in the middle of all."""
        return statistics.median(done - begun for begun, done in self.within(windows))

    def within(self, windows: Sequence[Window]) -> list[Window]:
        return [bundle for bundle in self.bundles if any(begin <= bundle[1] < end for begin, end in windows)]


@contextmanager
def counting_beside(poll: Poll, rate: int) -> Iterator[Counted]:
    """Another process that counts so many votes a second for the poll; 0: bundle after bundle."""
    context = get_context("fork")
    stop, (receiver, sender) = context.Event(), context.Pipe(duplex=False)
    options = list(poll.options.values_list("pk", flat=True))
    connections.close_all()  # the processes must not share one
    process = context.Process(target=_count, args=(poll.pk, options, rate, stop, sender))
    process.start()
    counted = Counted()
    try:
        time.sleep(REST_SECONDS)  # until it runs smoothly
        yield counted
    finally:
        stop.set()
        counted.bundles += receiver.recv()
        process.join()


def _count(poll_id: UUID, options: Sequence[int], rate: int, stop: Event, sender: Connection) -> None:
    chance, bundles, next_at = random.Random(1), [], time.monotonic()
    networks = [(uuid4(), uuid4()) for _ in range(10_000)]
    with connection.cursor() as cursor:
        cursor.execute("SELECT md5('bots /24')::uuid")
        (reviewed,) = cursor.fetchone()
    while not stop.is_set():
        votes = []
        for number in range(BUNDLE):
            address_key, subnet_key = (uuid4(), reviewed) if number % REVIEWED_AMONG_COUNTED == 0 else chance.choice(networks)
            vote = AcceptedVote(uuid4(), poll_id, uuid4(), (chance.choice(options),), microseconds_now(),
                                address_key=address_key, subnet_key=subnet_key, signature_key=1000 + chance.randrange(300))  # fmt: skip
            votes.append(vote)
        if rate:
            next_at = max(next_at + BUNDLE / rate, time.monotonic() - 1)
            time.sleep(max(0, next_at - time.monotonic()))
        begun = time.monotonic()
        patience.until_committed(partial(counting.count_votes, votes))  # as workers do
        bundles.append((begun, time.monotonic()))
    sender.send(bundles)


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """{what was measured: its values}"""

    rows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.rows.setdefault(name, []).append(value)

    def timed(self, name: str, work: Callable[[], object]) -> Window:
        """Do the work, and note how many seconds it took."""
        began = time.monotonic()
        work()
        ended = time.monotonic()
        self.add(name, ended - began)
        return began, ended

    def add_counting(self, name: str, counted: Counted, windows: Sequence[Window]) -> None:
        self.add(f"counted {name} (votes/s)", counted.per_second(windows))
        self.add(f"a bundle of {BUNDLE} {name} (s)", counted.seconds(windows))
        self.add(f"longest pause of counting {name} (s)", counted.longest_pause(windows))

    def print(self) -> None:
        for name, values in self.rows.items():
            spread = f"   ({min(values):,.2f} to {max(values):,.2f}; {len(values)} times)" if len(values) > 1 else ""
            print(f"  {name:<58}{statistics.median(values):>12,.2f}{spread}")


def measure_rulings(report: Report, poll: Poll, selectors: list[Selector], repeats: int, rate: int) -> None:
    """Quarantine, release, void and release the votes, so many times each, alone and while others of the poll are counted."""

    def rule(ruling: Ruling) -> None:
        decision = review.rule(poll.pk, selectors, ruling, Act("bench", now(), "a measurement"))
        assert decision.votes >= 5000, decision.votes

    for ruling in CYCLE * repeats:
        report.timed(f"{ruling}, alone (s)", partial(rule, ruling))
    during, between = [], []
    with counting_beside(poll, rate) as counted:
        for ruling in CYCLE * repeats:
            during.append(report.timed(f"{ruling}, while counting (s)", partial(rule, ruling)))
            between.append(report.timed("rest", partial(time.sleep, REST_SECONDS)))
    report.add_counting("between rulings", counted, between)
    report.add_counting("during rulings", counted, during)


def measure_jobs(report: Report, poll: Poll, repeats: int, rate: int) -> None:
    """Run the jobs that look for suspicious networks, alone and while votes are counted."""

    def find(*, fast: bool) -> None:
        fraud.find_suspicious(now(), fast=fast)

    for name, fast in JOBS * repeats:
        report.timed(f"rules {name}, alone (s)", partial(find, fast=fast))
    windows: dict[str, list[Window]] = {name: [] for name, _ in (("without rules", False), *JOBS)}
    with counting_beside(poll, rate) as counted:
        for name, fast in JOBS * repeats:
            windows[name].append(report.timed(f"rules {name}, while counting (s)", partial(find, fast=fast)))
            windows["without rules"].append(report.timed("rest", partial(time.sleep, 2 * REST_SECONDS)))
    for name, of_this in windows.items():
        report.add_counting(name if name == "without rules" else f"while rules run {name}", counted, of_this)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.review", description=__doc__)
    parser.add_argument("--votes", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=int, default=2000, help="votes counted a second meanwhile (0: as many as can be)")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # a line for each vote that is held: a worker's are written elsewhere
    report = Report()
    with scratch_database():
        poll, selectors = fill(arguments.votes)
        measure_rulings(report, poll, selectors, arguments.repeats, arguments.rate)
        measure_jobs(report, poll, arguments.repeats, arguments.rate)
    report.rows.pop("rest")
    report.print()
    target = ROOT / ".local" / "bench" / "review.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"votes": arguments.votes, "rate": arguments.rate, "rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
