"""Who is measured: this product, vote by vote and in batches, and its peers; and how a crowd of votes is measured at all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import jwt
import psycopg2

from bench.figures import Values, percentile
from bench.processes import largest_rss_mb
from stack.demo import ask, make_poll, sign_in
from stack.folder import ROOT, is_free
from stack.load import Cast, cast_all, get, post
from stack.stack import Stack

# Clients at once, for each contestant those with which it counts most; each was tried with 64 and 256.
# The product: more of them make larger bundles.
PRODUCT_CONNECTIONS = 256
# The peers have 64 threads: more clients would only wait, and make their latencies longer.
PEER_CONNECTIONS = 64
# Clients that send batches. Chosen: enough to keep two workers busy.
BATCH_CONNECTIONS = 6
READ_CONNECTIONS = 64
BATCH = 1000
PATIENCE_SECONDS = 180
# How long votes are cast at half of the top rate.
HALF_RATE_SECONDS = 5
PRODUCT = ("web", "worker")
ENV = {
    # As in production, and as the peers are: with DEBUG, Django keeps each statement with all its values. TLS is a proxy's.
    "DEBUG": "false",
    "SECURE_SSL_REDIRECT": "false",
    # Every voter has an address of their own; without limits, for one client is the whole crowd.
    "TRUSTED_PROXIES": "1",
    "CLIENT_VOTES_PER_MINUTE": "0",
}
PERCENTILES = {"p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
# Two processes, each with as many threads as keep both cores busy while they wait for PostgreSQL.
GUNICORN = "gunicorn -k gthread --workers 2 --threads 32 --keep-alive 60 --log-level warning"
CELERY = "celery -A bench.peers.app worker -c 2 -P prefork -O fair --without-gossip --without-mingle --loglevel WARNING"


@dataclass
class Bench:
    """What all measurements share."""

    stack: Stack
    database: Database
    dev: dict[str, str]
    # How many one contestant gets in a round; see `python -m bench --help`.
    votes: int
    # Half of the rate that the product had last.
    half_rate: float = 0.0
    # Of the last round, what is too much for a table: {name: rows}.
    series: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.stack.env["PORT"])

    def have(self, *names: str) -> None:
        """Have exactly these of the product's programs run."""
        running = {name for name in ("web", "worker") if self.stack.pid(name)}
        if idle := running - set(names):
            self.stack.stop(*idle)
        if missing := set(names) - running:
            self.stack.start(*missing)

    def make_poll(self, policy: str = "client") -> dict[str, Any]:
        return make_poll(self.dev, title="Bench", options=[{"text": "a"}, {"text": "b"}], voter_policy=policy)

    def product_rss_mb(self) -> float:
        return largest_rss_mb(self.stack.pid(name) for name in PRODUCT)

    @property
    def client_key(self) -> dict[str, str]:
        return {"authorization": f"Api-Key {self.dev['client_key']}"}


class Database:
    """Straight to the tables: what was really counted."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg2.connect(url)
        self.connection.autocommit = True

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(query, arguments)
            return list(cursor.fetchall())

    def run(self, statement: str, *arguments: object) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(statement, arguments)

    def value(self, query: str, *arguments: object) -> float:
        rows = self.rows(query, *arguments)
        return float(rows[0][0] or 0) if rows else 0.0

    def tallied(self, poll_id: str) -> float:
        return self.value("SELECT sum(votes) FROM tallies WHERE poll_id = %s", poll_id)

    def lags_ms(self, poll_id: str, warm: int) -> list[tuple[float, float]]:
        """[(second of acceptance, from acceptance to the count)] of the poll's votes, in order, without so many of the first."""
        rows = self.rows(
            "SELECT extract(epoch FROM accepted_at)::float8, 1000 * extract(epoch FROM counted_at - accepted_at)::float8"
            " FROM votes WHERE poll_id = %s ORDER BY accepted_at OFFSET %s",
            poll_id,
            warm,
        )
        return [(at - rows[0][0], lag) for at, lag in rows]


def p99(lags: Sequence[tuple[float, float]]) -> float:
    return percentile(sorted(lag for _, lag in lags), 0.99)


def by_tenth_of_a_second(lags: Sequence[tuple[float, float]]) -> list[list[float]]:
    """[[second, half of the votes, 99 %]]"""
    tenths: dict[int, list[float]] = {}
    for second, lag in lags:
        tenths.setdefault(int(second * 10), []).append(lag)
    return [[tenth / 10, percentile(sorted(those), 0.5), percentile(sorted(those), 0.99)] for tenth, those in tenths.items()]


def address(number: int) -> str:
    """An address for each of 16 million voters."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def measure(
    port: int,
    casts: Sequence[Cast],
    count: Callable[[], float],
    *,
    connections: int,
    votes: int = 0,
    per_second: float | None = None,
) -> Values:
    """Cast them all, wait until they are all counted, and check that they are: a rate with a lost vote is none.

    `votes`: how many the casts hold together, where one holds several. Rates are per second, times in milliseconds.
    """
    votes = votes or len(casts)
    started = time.perf_counter()
    cast_all(port, casts, connections=connections, seconds=PATIENCE_SECONDS, per_second=per_second)
    accepted = time.perf_counter()
    while (so_far := count()) < votes:
        if time.perf_counter() - accepted > PATIENCE_SECONDS:
            raise SystemExit(f"{so_far:,.0f} of {votes:,} accepted votes were counted: the figures would mean nothing.")
        time.sleep(0.005)
    counted = time.perf_counter()
    if refused := {cast.status for cast in casts} - {200, 201, 202}:
        raise SystemExit(f"Some votes were answered {', '.join(map(str, sorted(refused)))}: the figures would mean nothing.")
    if (in_all := count()) != votes:
        raise SystemExit(f"{in_all:,.0f} votes were counted, and {votes:,} accepted: the figures would mean nothing.")
    return {
        "connections": connections,
        "counted_per_s": votes / (counted - started),
        "accepted_per_s": votes / (accepted - started),
        **times([cast.seconds for cast in casts]),
    }


def times(seconds: Sequence[float]) -> Values:
    """Return the percentiles in milliseconds."""
    ordered = sorted(seconds)
    return {f"{name}_ms": percentile(ordered, share) * 1000 for name, share in PERCENTILES.items()}


def of_contestant(name: str, values: Values) -> Values:
    return {f"contestants.{name}.{value}": figure for value, figure in values.items()}


# --- This product -----------------------------------------------------------------------------------------------------


def measure_single(
    bench: Bench, name: str, *, connections: int = PRODUCT_CONNECTIONS, policy: str = "client", half_rate: bool = False
) -> Values:
    """One vote a request, in a poll with this voter policy; every voter at an address of their own.

    `half_rate`: then as many again, at half of the rate that it had.
    """
    bench.have(*PRODUCT)
    poll, warm = bench.make_poll(policy), bench.votes // 10
    casts = casts_of(bench, poll, policy, warm + bench.votes)
    done = measure_poll(bench, poll, casts, warm, connections=connections)
    lags = bench.database.lags_ms(poll["id"], warm)
    values = of_contestant(name, done | {"lag_p99_ms": p99(lags), "rss_mb": bench.product_rss_mb()})
    if half_rate:
        bench.series["lag"] = by_tenth_of_a_second(lags)
        bench.half_rate = half = done["counted_per_s"] / 2
        poll = bench.make_poll(policy)
        casts = casts_of(bench, poll, policy, warm + min(bench.votes, int(half * HALF_RATE_SECONDS)))
        paced = measure_poll(bench, poll, casts, warm, connections=connections, per_second=half)
        values |= {f"half_rate.{name}": paced[name] for name in ("connections", "accepted_per_s", "p50_ms", "p99_ms")}
        values["half_rate.lag_p99_ms"] = p99(bench.database.lags_ms(poll["id"], warm))
    return values


def measure_poll(
    bench: Bench, poll: dict[str, Any], casts: Sequence[Cast], warm: int, *, connections: int, per_second: float | None = None
) -> Values:
    """Cast the first so many to warm up, and measure the others."""
    cast_all(bench.port, casts[:warm], connections=connections)
    time.sleep(1)
    return measure(
        bench.port, casts[warm:], lambda: bench.database.tallied(poll["id"]) - warm, connections=connections, per_second=per_second
    )


def casts_of(bench: Bench, poll: dict[str, Any], policy: str, number: int) -> list[Cast]:
    options = [option["id"] for option in poll["options"]]
    return [
        Cast(post(poll["links"]["votes"], {"option": options[n % 2], **body}, {**headers, "x-forwarded-for": address(n)}))
        for n, (body, headers) in enumerate(voters_of(bench, poll, policy, number))
    ]


def voters_of(bench: Bench, poll: dict[str, Any], policy: str, number: int) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Yield for each of so many voters what goes into the body and the headers of their vote."""
    if policy == "client":
        yield from (({"voter": uuid4().hex}, bench.client_key) for _ in range(number))
    elif policy == "ip":
        yield from (({}, {}) for _ in range(number))
    elif policy == "session":
        wanted = [Cast(post("/api/v1/voters", {"poll": poll["id"]}, {"x-forwarded-for": address(n)})) for n in range(number)]
        cast_all(bench.port, wanted, connections=PRODUCT_CONNECTIONS)
        yield from (({}, {"voter-token": json.loads(got.body)["token"]}) for got in wanted)
    elif policy == "account":
        # Signed as a sign-in would: 30,000 of those would take longer than all the rest, and the hot route looks at the signature.
        claims, secret = {"token_type": "access", "exp": int(time.time()) + 3600}, bench.stack.env["SECRET_KEY"]
        yield from (
            ({}, {"authorization": f"Bearer {jwt.encode({**claims, 'user_id': str(n)}, secret, algorithm='HS256')}"}) for n in range(number)
        )
    else:
        made = ask(f"{bench.dev['base_url']}{poll['links']['self']}/codes", {"generate": number}, authorization=sign_in(bench.dev))
        yield from (({"code": issued["code"]}, {}) for issued in made["codes"])


def measure_batches(bench: Bench) -> Values:
    """The same votes, 1,000 a request, and three times as many; the times are those of a request."""
    bench.have(*PRODUCT)
    poll = bench.make_poll()
    votes = max(BATCH, 3 * bench.votes // BATCH * BATCH)
    warm = max(BATCH, votes // 10 // BATCH * BATCH)
    cast_all(bench.port, batches_of(bench, poll, warm), connections=BATCH_CONNECTIONS)
    time.sleep(1)
    casts = batches_of(bench, poll, votes)
    done = measure(bench.port, casts, lambda: bench.database.tallied(poll["id"]) - warm, votes=votes, connections=BATCH_CONNECTIONS)
    return of_contestant(
        "product_batch", done | {"lag_p99_ms": p99(bench.database.lags_ms(poll["id"], warm)), "rss_mb": bench.product_rss_mb()}
    )


def batches_of(bench: Bench, poll: dict[str, Any], number: int) -> list[Cast]:
    options = [option["id"] for option in poll["options"]]
    rows = [{"option": options[n % 2], "voter": uuid4().hex, "idempotency_key": str(n)} for n in range(number)]
    headers = {**bench.client_key, "x-forwarded-for": address(0)}
    return [Cast(post(f"{poll['links']['votes']}/batch", rows[start : start + BATCH], headers)) for start in range(0, number, BATCH)]


# --- Its peers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One of bench/peers: what its votes are counted by, and the share of the votes that it gets, so that it takes as long as others."""

    name: str
    counted: str
    share: float
    has_worker: bool = False
    shows_results: bool = True
    connections: int = PEER_CONNECTIONS


_COUNTER, _ROWS = "SELECT sum(votes) FROM peers_choice WHERE poll = %s", "SELECT count(*) FROM peers_ballot WHERE poll = %s"
PEERS = [
    Peer("task_per_vote", _COUNTER, share=0.1, has_worker=True, shows_results=False),
    Peer("sync_drf", _COUNTER, share=0.15),
    Peer("sync_drf_count", _ROWS, share=0.15),
]


def measure_peer(bench: Bench, peer: Peer) -> Values:
    bench.have()
    database, port = bench.database, bench.stack.folder.port("PEERS")
    with ExitStack() as ending:
        started = [ending.enter_context(process(bench.stack, *f"{GUNICORN} --bind 127.0.0.1:{port} bench.peers.app:application".split()))]
        if peer.has_worker:
            started.append(ending.enter_context(process(bench.stack, *CELERY.split())))
        while is_free(port, "127.0.0.1"):
            time.sleep(0.1)
        poll = int(database.value("SELECT coalesce(max(poll), 0) + 1 FROM peers_choice"))
        choices = [
            row[0] for row in database.rows("INSERT INTO peers_choice (poll, votes) VALUES (%s, 0), (%s, 0) RETURNING id", poll, poll)
        ]
        path, votes = f"/{peer.name}/polls/{poll}", max(100, int(bench.votes * peer.share))
        warm, voters = votes // 10, [uuid4().hex for _ in range(votes + votes // 10)]
        casts = [Cast(post(f"{path}/votes", {"choice": choices[n % 2], "voter": voter}, {})) for n, voter in enumerate(voters)]
        measure(port, casts[:warm], lambda: database.value(peer.counted, poll), connections=peer.connections)
        done = measure(port, casts[warm:], lambda: database.value(peer.counted, poll) - warm, connections=peer.connections)
        done["lag_p99_ms"] = p99_from_answer_ms(database, poll, dict(zip(voters[warm:], casts[warm:], strict=True)))
        done["rss_mb"] = largest_rss_mb(running.pid for running in started)
        values = of_contestant(peer.name, done)
        if peer.shows_results:
            # As many ballots as the product's poll has votes: COUNT(*) looks at each.
            database.run(
                "INSERT INTO peers_ballot (poll, voter, choice_id, created_at) SELECT %s, 'more ' || n, %s + n %% 2, now()"
                " FROM generate_series(1, %s) AS n",
                poll, choices[0], bench.votes - votes,
            )  # fmt: skip
            database.run("VACUUM ANALYZE peers_ballot")
            values |= measure_reads(port, f"{path}/results", peer.name, max(64, bench.votes // 20), connections=peer.connections)
    return values


def p99_from_answer_ms(database: Database, poll: int, casts: dict[str, Cast]) -> float:
    """From the answer to the moment at which the row was written, of 99 % of the voters; none where that came before the answer."""
    clock = time.time() - time.perf_counter()
    lags = [
        max(0.0, float(written_at) - clock - (casts[voter].due_at + casts[voter].seconds))
        for voter, written_at in database.rows("SELECT voter, extract(epoch FROM created_at) FROM peers_ballot WHERE poll = %s", poll)
        if voter in casts
    ]
    return percentile(sorted(lags), 0.99) * 1000


@contextmanager
def process(stack: Stack, *command: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process beside the stack, on its servers."""
    with (stack.folder / "log" / f"{command[0]}.log").open("ab") as log:
        env = {**stack.env, "DJANGO_SETTINGS_MODULE": "bench.peers.settings", **env}
        running = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(30)


# --- Reading results --------------------------------------------------------------------------------------------------


def measure_reads(port: int, path: str, name: str, number: int, *, connections: int = READ_CONNECTIONS) -> Values:
    """Read the same results again and again, on connections that stay."""
    reads = [Cast(get(path, {"accept": "application/json", "x-forwarded-for": address(n)})) for n in range(number)]
    cast_all(port, reads[: number // 10], connections=connections, seconds=PATIENCE_SECONDS)
    measured = reads[number // 10 :]
    started = time.perf_counter()
    cast_all(port, measured, connections=connections, seconds=PATIENCE_SECONDS)
    seconds = time.perf_counter() - started
    if {read.status for read in reads} != {200}:
        raise SystemExit(f"{name}: results were not answered 200: the figures would mean nothing.")
    done = {"per_s": len(measured) / seconds, **times([read.seconds for read in measured])}
    return {f"reads.{name}_{value}": figure for value, figure in done.items() if value in ("per_s", "p50_ms", "p99_ms")}


def measure_product_reads(bench: Bench) -> Values:
    """Of a poll that nobody votes in just then."""
    bench.have(*PRODUCT)
    poll = bench.make_poll()
    return measure_reads(bench.port, poll["links"]["results"], "product", bench.votes)
