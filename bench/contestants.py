"""Who is measured: this product, vote by vote and in batches, one Celery task per vote, and the database alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import jwt
import psycopg2

from stack.demo import ask, make_poll, sign_in
from stack.folder import ROOT, is_free
from stack.load import Cast, cast_all, post
from stack.stack import Stack

CONNECTIONS = 64
PATIENCE_SECONDS = 180
BATCH = 1000
# Clients that send batches. Chosen: enough to keep two workers busy.
BATCH_CONNECTIONS = 6


@dataclass
class Round:
    """What one contestant did in one round; rates per second, times in milliseconds."""

    counted_per_s: float
    accepted_per_s: float
    p50_ms: float
    p99_ms: float
    # From acceptance to the count, 99 % of the votes; from the last answer to the last count where votes carry no times.
    lag_p99_ms: float


class Database:
    """Straight to the tables: what was really counted."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg2.connect(url)
        self.connection.autocommit = True

    def value(self, query: str, *arguments: object) -> float:
        with self.connection.cursor() as cursor:
            cursor.execute(query, arguments)
            row = cursor.fetchone()
            return float(row[0] or 0) if row else 0.0

    def tallied(self, poll_id: str) -> float:
        return self.value("SELECT sum(votes) FROM tallies WHERE poll_id = %s", poll_id)

    def lag_p99_ms(self, poll_id: str) -> float:
        """From acceptance to the count, 99 % of the poll's votes."""
        return self.value(
            "SELECT 1000 * extract(epoch FROM percentile_cont(0.99) WITHIN GROUP (ORDER BY counted_at - accepted_at)) "
            "FROM votes WHERE poll_id = %s",
            poll_id,
        )


def address(number: int) -> str:
    """An address for each of 16 million voters."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def measure(
    port: int,
    casts: list[Cast],
    count: Callable[[], float],
    lag: Callable[[], float] | None,
    *,
    votes: int = 0,
    connections: int = CONNECTIONS,
) -> Round:
    """Cast them all, wait until they are all counted, and check that they are: a rate with a lost vote is none.

    `votes`: how many the casts hold together, where one holds several.
    """
    votes = votes or len(casts)
    started = time.perf_counter()
    cast_all(port, casts, connections=connections, seconds=PATIENCE_SECONDS)
    accepted = time.perf_counter()
    while count() < votes:
        if time.perf_counter() - accepted > PATIENCE_SECONDS:
            raise SystemExit(f"{count():.0f} of {votes} accepted votes were counted: the figures would mean nothing.")
        time.sleep(0.005)
    counted = time.perf_counter()
    assert {cast.status for cast in casts} <= {200, 202}, {cast.status for cast in casts}
    assert count() == votes  # and not one more
    seconds = sorted(cast.seconds for cast in casts)
    return Round(
        counted_per_s=votes / (counted - started),
        accepted_per_s=votes / (accepted - started),
        p50_ms=seconds[len(seconds) // 2] * 1000,
        p99_ms=seconds[len(seconds) * 99 // 100] * 1000,
        lag_p99_ms=lag() if lag else (counted - accepted) * 1000,
    )


def measure_product(stack: Stack, database: Database, dev: dict[str, str], votes: int, policy: str = "client") -> Round:
    """One vote a request, in a poll with this voter policy; every voter at an address of their own."""
    stack.start("web", "worker")
    try:
        poll = make_poll(dev, title="Bench", options=[{"text": "a"}, {"text": "b"}], voter_policy=policy)
        options = [option["id"] for option in poll["options"]]
        warm = votes // 10
        port = int(stack.env["PORT"])
        casts = [
            Cast(post(poll["links"]["votes"], {"option": options[n % 2], **body}, {**headers, "x-forwarded-for": address(n)}))
            for n, (body, headers) in enumerate(voters_of(policy, stack, dev, poll, warm + votes))
        ]
        cast_all(port, casts[:warm], connections=CONNECTIONS)
        time.sleep(1)
        return measure(port, casts[warm:], count=lambda: database.tallied(poll["id"]) - warm, lag=lambda: database.lag_p99_ms(poll["id"]))
    finally:
        stack.stop("web", "worker")


def voters_of(
    policy: str, stack: Stack, dev: dict[str, str], poll: dict[str, Any], number: int
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Yield for each of so many voters what goes into the body and the headers of their vote."""
    if policy == "client":
        yield from (({"voter": uuid4().hex}, {"authorization": f"Api-Key {dev['client_key']}"}) for _ in range(number))
    elif policy == "ip":
        yield from (({}, {}) for _ in range(number))
    elif policy == "session":
        wanted = [Cast(post("/api/v1/voters", {"poll": poll["id"]}, {"x-forwarded-for": address(n)})) for n in range(number)]
        cast_all(int(stack.env["PORT"]), wanted, connections=CONNECTIONS)
        yield from (({}, {"voter-token": json.loads(got.body)["token"]}) for got in wanted)
    elif policy == "account":
        # Signed as a sign-in would: 30,000 of those would take longer than all the rest, and the hot route looks at the signature.
        claims = {"token_type": "access", "exp": int(time.time()) + 3600}
        yield from (
            ({}, {"authorization": f"Bearer {jwt.encode({**claims, 'user_id': str(n)}, stack.env['SECRET_KEY'], algorithm='HS256')}"})
            for n in range(number)
        )
    else:
        made = ask(f"{dev['base_url']}{poll['links']['self']}/codes", {"generate": number}, authorization=sign_in(dev))
        yield from (({"code": issued["code"]}, {}) for issued in made["codes"])


def measure_batches(stack: Stack, database: Database, dev: dict[str, str], votes: int) -> Round:
    """The same votes, 1,000 a request; the times are those of a request."""
    stack.start("web", "worker")
    try:
        poll = make_poll(dev, title="Bench", options=[{"text": "a"}, {"text": "b"}])
        options = [option["id"] for option in poll["options"]]
        headers = {"authorization": f"Api-Key {dev['client_key']}", "x-forwarded-for": address(0)}

        def batches(number: int) -> list[Cast]:
            rows = [{"option": options[n % 2], "voter": uuid4().hex, "idempotency_key": str(n)} for n in range(number)]
            return [
                Cast(post(f"{poll['links']['votes']}/batch", rows[start : start + BATCH], headers)) for start in range(0, number, BATCH)
            ]

        port, warm = int(stack.env["PORT"]), votes // 10
        cast_all(port, batches(warm), connections=BATCH_CONNECTIONS)
        time.sleep(1)
        return measure(
            port,
            batches(votes),
            count=lambda: database.tallied(poll["id"]) - warm,
            lag=lambda: database.lag_p99_ms(poll["id"]),
            votes=votes,
            connections=BATCH_CONNECTIONS,
        )
    finally:
        stack.stop("web", "worker")


def measure_bulk_insert(stack: Stack, database: Database, dev: dict[str, str], votes: int) -> Round:
    """The limit of batches: a bare loop of counting's own statements, 1,000 votes a transaction, with nothing before or around it."""
    stack.start("web")
    poll = make_poll(dev, title="Bench", options=[{"text": "a"}, {"text": "b"}])
    stack.stop("web")
    options = [int(option["id"]) for option in poll["options"]]
    batches = [bulk_arrays(poll["id"], options, BATCH) for _ in range(votes // BATCH)]
    seconds = []
    connection = psycopg2.connect(stack.database_url)
    with connection.cursor() as cursor:
        for arrays in batches:
            begun = time.perf_counter()
            cursor.execute(BULK_INSERT, arrays)
            cursor.execute(BULK_TALLY, [poll["id"], options[0], poll["id"], options[1]])
            connection.commit()
            seconds.append(time.perf_counter() - begun)
    connection.close()
    assert database.tallied(poll["id"]) == len(batches) * BATCH
    rate = len(batches) * BATCH / sum(seconds)
    seconds.sort()
    return Round(rate, rate, seconds[len(seconds) // 2] * 1000, seconds[len(seconds) * 99 // 100] * 1000, 0)


# As polls/counting.py has it, word for word.
BULK_INSERT = """
    WITH v AS (
        SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::uuid[], %s::text[], %s::bigint[], %s::uuid[], %s::uuid[], %s::bigint[])
        WITH ORDINALITY AS v (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, place)
    ), inserted AS (
        INSERT INTO votes (poll_id, voter_key, vote_id, selection, accepted_at, address_key, subnet_key, signature_key, counted_at)
        SELECT poll_id, voter_key, vote_id, selection::bigint[],
               timestamptz 'epoch' + accepted_at * interval '1 microsecond', address_key, subnet_key, signature_key,
               clock_timestamp()
        FROM v
        WHERE NOT EXISTS (
            SELECT FROM outcomes o WHERE (o.poll_id, o.voter_key, o.vote_id) = (v.poll_id, v.voter_key, v.vote_id)
        )
        ORDER BY poll_id, voter_key
        ON CONFLICT DO NOTHING
        RETURNING poll_id, voter_key
    )
    SELECT place - 1 FROM v WHERE NOT EXISTS (
        SELECT FROM inserted i WHERE (i.poll_id, i.voter_key) = (v.poll_id, v.voter_key)
    )
"""
BULK_TALLY = """
    INSERT INTO tallies (poll_id, selection, votes, counted, revision) VALUES (%s, ARRAY[%s], 500, 500, 1), (%s, ARRAY[%s], 500, 500, 1)
    ON CONFLICT (poll_id, selection) DO UPDATE SET votes = tallies.votes + excluded.votes,
        counted = tallies.counted + excluded.counted, revision = tallies.revision + 1
"""


def bulk_arrays(poll_id: str, options: list[int], votes: int) -> list[str]:
    """Return the array literals of so many votes."""
    at = int(time.time() * 1_000_000)
    columns: list[list[str]] = [
        [poll_id] * votes,
        [str(uuid4()) for _ in range(votes)],
        [str(uuid4()) for _ in range(votes)],
        [f'"{{{options[n % 2]}}}"' for n in range(votes)],
        [str(at + n) for n in range(votes)],
        *3 * [["NULL"] * votes],
    ]
    return ["{" + ",".join(column) + "}" for column in columns]


def measure_task_per_vote(stack: Stack, database: Database, votes: int) -> Round:
    port = stack.folder.port("TASK_PER_VOTE")
    gunicorn = f"gunicorn -k gthread --workers 2 --threads 32 --keep-alive 60 --bind 127.0.0.1:{port} --log-level warning"
    worker = "celery -A bench.task_per_vote.app worker -c 2 -P prefork -O fair --without-gossip --without-mingle --loglevel WARNING"
    with process(stack, *gunicorn.split(), "bench.task_per_vote.app:application"), process(stack, *worker.split()):
        while is_free(port, "127.0.0.1"):
            time.sleep(0.1)
        poll = int(time.time())
        with database.connection.cursor() as cursor:
            cursor.execute("INSERT INTO task_per_vote_choice (poll, votes) VALUES (%s, 0), (%s, 0) RETURNING id", [poll, poll])
            choices = [row[0] for row in cursor.fetchall()]

        def casts(number: int) -> list[Cast]:
            return [Cast(post(f"/polls/{poll}/votes", {"choice": choices[n % 2], "voter": uuid4().hex}, {})) for n in range(number)]

        def count() -> float:
            return database.value("SELECT sum(votes) FROM task_per_vote_choice WHERE poll = %s", poll)

        warm = casts(votes // 10)
        measure(port, warm, count, None)
        return measure(port, casts(votes), lambda: count() - len(warm), None)


@contextmanager
def process(stack: Stack, *command: str) -> Iterator[None]:
    """A process beside the stack, on its servers."""
    with (stack.folder / "log" / f"{command[0]}.log").open("ab") as log:
        env = {**stack.env, "DJANGO_SETTINGS_MODULE": "bench.task_per_vote.settings"}
        running = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            running.terminate()
            running.wait(30)
