"""What nothing on this machine can exceed: the server, the broker and the database, each alone and doing only what it must."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg2
from django.conf import settings
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from bench import noop
from bench.contestants import (
    HALF_RATE_SECONDS,
    PATIENCE_SECONDS,
    PRODUCT_CONNECTIONS,
    Bench,
    address,
    casts_of,
    measure_reads,
    process,
    times,
)
from bench.figures import Values
from core.__main__ import command
from stack import rabbitmq
from stack.folder import is_free
from stack.load import Cast, cast_all

# How long each limit is measured.
SECONDS = 3
# Messages on their way at once; 64 were a fifth slower.
IN_FLIGHT = 1000
# Connections that commit at once; tried: 16, 64 and 128. They share the disk's fsync.
COMMIT_CONNECTIONS = 64
VOTES_QUEUES = ("votes.even", "votes.odd")
_APPLICATION = "core.asgi:application"


class Recorded:
    """What the product says and sends for one vote, recorded once: the limits say and send the same."""

    def __init__(self, bench: Bench) -> None:
        bench.have("web")
        poll = bench.make_poll()
        [cast] = casts_of(bench, poll, "client", 1)
        head, _, body = cast.request.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        self.answers = bench.stack.folder / "noop.json"
        self.results_path = poll["links"]["results"]
        noop.keep_answers(
            self.answers,
            {
                "POST": self._ask(bench.port, "POST", poll["links"]["votes"], body, headers),
                "GET": self._ask(bench.port, "GET", self.results_path, b"", {"x-forwarded-for": address(0)}),
            },
        )
        self.message = self._take_message(bench)

    @staticmethod
    def _ask(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, list[tuple[str, str]], bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            # The date is uvicorn's own.
            return answer.status, [header for header in answer.getheaders() if header[0].lower() != "date"], answer.read()

    @staticmethod
    def _take_message(bench: Bench) -> Any:
        """The message of one vote; it goes back into its queue and is counted later."""
        with rabbitmq.connect(bench.stack.broker_url, 5) as connection:
            channel = connection.channel()
            for queue in VOTES_QUEUES:
                if message := channel.basic_get(queue):
                    channel.basic_reject(message.delivery_tag, requeue=True)
                    return message
        raise SystemExit("The message of a vote was in no queue of votes.")


def noop_command(port: int, application: str = "application") -> list[str]:
    """The product's own command line, with nothing behind it: an endpoint of bench/noop.py."""
    product = command("web") or []
    if _APPLICATION not in product:
        raise SystemExit(f"`python -m core web` does not serve {_APPLICATION} any more: what is the same server with nothing behind it?")
    ours = [f"bench.noop:{application}" if part == _APPLICATION else part for part in product]
    return [*ours, "--host", "127.0.0.1", "--port", str(port)]


def measure_noop(bench: Bench, recorded: Recorded) -> Values:
    """The same server, the same requests, answers of the same size, nothing between them: votes, and results; by ASGI, and without."""
    bench.have()
    port = bench.stack.folder.port("NOOP")
    with process(bench.stack, *noop_command(port), NOOP_ANSWERS=str(recorded.answers)):
        _wait_for(port)
        values = _post_all(bench, port, "noop_http", connections=PRODUCT_CONNECTIONS)
        values |= measure_reads(port, recorded.results_path, "noop", bench.votes)
    with process(bench.stack, *noop_command(port, "whole"), NOOP_ANSWERS=str(recorded.answers)):
        _wait_for(port)
        values |= _post_all(bench, port, "noop_whole", connections=PRODUCT_CONNECTIONS)
        return values | measure_reads(port, recorded.results_path, "noop_whole", bench.votes)


def measure_noop_at_half_rate(bench: Bench, recorded: Recorded) -> Values:
    """The same at the rate at which the product's answers were timed last: no answer of anybody's comes sooner on this machine."""
    bench.have()
    port = bench.stack.folder.port("NOOP")
    casts = _casts(bench, int(bench.half_rate * HALF_RATE_SECONDS))
    with process(bench.stack, *noop_command(port), NOOP_ANSWERS=str(recorded.answers)):
        _wait_for(port)
        cast_all(port, casts[: len(casts) // 10], connections=PRODUCT_CONNECTIONS)
        paced = casts[len(casts) // 10 :]
        cast_all(port, paced, connections=PRODUCT_CONNECTIONS, seconds=PATIENCE_SECONDS, per_second=bench.half_rate)
    done = times([cast.seconds for cast in paced])
    return {f"half_rate.noop_{name}": done[name] for name in ("p50_ms", "p99_ms")}


def measure_generator(bench: Bench, recorded: Recorded) -> Values:
    """The load generator alone, at a server that does nothing but write."""
    bench.have()
    port = bench.stack.folder.port("CONSTANT")
    with process(bench.stack, "bench.noop", str(port), NOOP_ANSWERS=str(recorded.answers)):
        _wait_for(port)
        return _post_all(bench, port, "generator", connections=PRODUCT_CONNECTIONS)


def _wait_for(port: int) -> None:
    while is_free(port, "127.0.0.1"):
        time.sleep(0.05)


def _casts(bench: Bench, number: int) -> list[Cast]:
    """So many votes for a poll that there is not."""
    poll = {"links": {"votes": f"/api/v1/polls/{uuid4()}/votes"}, "options": [{"id": "1000001"}, {"id": "1000002"}]}
    return casts_of(bench, poll, "client", number)


def _post_all(bench: Bench, port: int, name: str, *, connections: int) -> Values:
    """Post as many votes as a contestant gets, after as much of a warm-up."""
    warm = bench.votes // 10
    casts = _casts(bench, warm + bench.votes)
    cast_all(port, casts[:warm], connections=connections, seconds=PATIENCE_SECONDS)
    started, used = time.perf_counter(), time.process_time()
    cast_all(port, casts[warm:], connections=connections, seconds=PATIENCE_SECONDS)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    if {cast.status for cast in casts} != {202}:
        raise SystemExit(f"{name}: not every answer was 202: the figures would mean nothing.")
    done = times([cast.seconds for cast in casts[warm:]])
    return {
        f"limits.{name}_per_s": bench.votes / seconds,
        f"limits.{name}_p50_ms": done["p50_ms"],
        f"limits.{name}_p99_ms": done["p99_ms"],
        # Of a processor, for each request, on our side.
        f"limits.{name}_client_us": used / bench.votes * 1e6,
    }


# --- The broker -------------------------------------------------------------------------------------------------------


def measure_publish(bench: Bench, recorded: Recorded) -> Values:
    """The message of one vote, again and again, to a quorum queue that nobody consumes; counted when it is confirmed.

    It is encoded once: what is measured is the broker and not a library.
    """
    bench.have()
    with rabbitmq.connect(bench.stack.broker_url, 5) as connection:
        channel = connection.channel()
        channel.queue_declare("bench", durable=True, auto_delete=False, arguments={"x-queue-type": "quorum"})
        channel.confirm_select()
        confirms = Confirms()
        channel.events["basic_ack"].add(confirms.ack)
        message, sent, started = _encoded(recorded.message, "bench", channel.channel_id), 0, time.perf_counter()
        while time.perf_counter() < started + SECONDS:
            room = IN_FLIGHT - (sent - confirms.number)
            connection.transport.write(message * room)
            sent += room
            connection.drain_events(timeout=10)
        while confirms.number < sent:
            connection.drain_events(timeout=10)
        seconds = time.perf_counter() - started
        channel.queue_delete("bench")
    return {"limits.confirmed_publish_per_s": sent / seconds}


def _encoded(message: Any, queue: str, channel_id: int) -> bytes:
    """Return the three frames that publish it."""
    properties = {"headers" if name == "application_headers" else name: value for name, value in message.properties.items()}
    body = message.body if isinstance(message.body, bytes) else message.body.encode()
    frames = (
        Basic.Publish(routing_key=queue, mandatory=True),
        ContentHeader(body_size=len(body), properties=Basic.Properties(**properties)),
        ContentBody(body),
    )
    return b"".join(frame.marshal(part, channel_id) for part in frames)


class Confirms:
    """How many messages are confirmed: each by itself, or all up to one."""

    def __init__(self) -> None:
        self.number = 0
        self._all_up_to = 0
        self._beyond: set[int] = set()

    def ack(self, delivery_tag: int, multiple: bool) -> None:
        if multiple:
            alone = {tag for tag in self._beyond if tag <= delivery_tag}
            self.number += delivery_tag - self._all_up_to - len(alone)
            self._beyond -= alone
            self._all_up_to = delivery_tag
        else:
            self.number += 1
            self._beyond.add(delivery_tag)
        while self._all_up_to + 1 in self._beyond:
            self._all_up_to += 1
            self._beyond.remove(self._all_up_to)


# --- The database -----------------------------------------------------------------------------------------------------


def measure_bulk_insert(bench: Bench) -> Values:
    """A bare loop of counting's own statements, as many votes a transaction as a bundle takes, with nothing before or around it."""
    bench.have("web")
    poll = bench.make_poll()
    bench.have()
    options = [int(option["id"]) for option in poll["options"]]
    votes = settings.BUNDLE_MAX_VOTES
    number = max(2, 3 * bench.votes // votes)
    batches = [_bulk_arrays(poll["id"], options, votes) for _ in range(number + number // 10)]
    tally = [
        f"{{{poll['id']},{poll['id']}}}",
        "{" + ",".join(f'"{{{option}}}"' for option in options) + "}",
        f"{{{votes // 2},{votes // 2}}}",
    ]
    from polls.counting import CHANGE_TALLIES, INSERT_STANDING

    seconds = []
    with closing(psycopg2.connect(bench.stack.database_url)) as connection, connection.cursor() as cursor:
        for statement in (INSERT_STANDING, CHANGE_TALLIES):
            cursor.execute(statement.preparation)
        for arrays in batches:
            begun = time.perf_counter()
            cursor.execute(INSERT_STANDING.execution, [*arrays, False])
            cursor.execute(CHANGE_TALLIES.execution, tally)
            connection.commit()
            seconds.append(time.perf_counter() - begun)
    if bench.database.tallied(poll["id"]) != len(batches) * votes:
        raise SystemExit("Not every vote of the bare INSERT was tallied: the figures would mean nothing.")
    return {"limits.bulk_insert_per_s": number * votes / sum(seconds[-number:])}


def _bulk_arrays(poll_id: str, options: list[int], votes: int) -> list[str]:
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


COMMITS = """
    CREATE TABLE IF NOT EXISTS bench_commits (
        poll integer, voter uuid, choice integer, at timestamptz DEFAULT now(), PRIMARY KEY (poll, voter)
    )
"""
COMMIT = "INSERT INTO bench_commits (poll, voter, choice) VALUES (1, gen_random_uuid(), 2)"


def measure_commits(bench: Bench) -> Values:
    """One row, one commit, as many connections as make it fastest: by pgbench, or by threads where that is not there."""
    bench.have()
    bench.database.run(COMMITS)
    before = bench.database.value("SELECT count(*) FROM bench_commits")
    tool = find_pgbench(bench)
    rate = _commit_by_pgbench(bench, tool) if tool else _commit_by_threads(bench)
    if bench.database.value("SELECT count(*) FROM bench_commits") == before:
        raise SystemExit("No row was committed: the figures would mean nothing.")
    return {"limits.single_commits_per_s": rate}


def find_pgbench(bench: Bench) -> str | None:
    """Beside the private server, or on the path."""
    server = bench.stack.programs.get("postgres")
    beside = Path(server.command[0]).parent / "pgbench" if server else None
    return str(beside) if beside and beside.exists() else shutil.which("pgbench")


def _commit_by_pgbench(bench: Bench, tool: str) -> float:
    script = bench.stack.folder / "commit.sql"
    script.write_text(COMMIT + ";\n")
    url = urlsplit(bench.stack.database_url)
    env = {**bench.stack.env, "PGPASSWORD": url.password or ""}
    where = ["-h", url.hostname or "", "-p", str(url.port or 5432), "-U", url.username or "", url.path.lstrip("/")]
    options = ["-n", "-M", "prepared", "-f", str(script), "-c", str(COMMIT_CONNECTIONS), "-j", "2", "-T", str(SECONDS)]
    said = subprocess.run([tool, *options, *where], env=env, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
    assert found, said
    return float(found[1])


def _commit_by_threads(bench: Bench) -> float:
    """Python waits for PostgreSQL without its lock, so threads do."""

    def commit(_: int) -> int:
        done = 0
        with closing(psycopg2.connect(bench.stack.database_url)) as connection, connection.cursor() as cursor:
            over_at = time.monotonic() + SECONDS
            while time.monotonic() < over_at:
                cursor.execute(COMMIT)
                connection.commit()
                done += 1
        return done

    with ThreadPoolExecutor(COMMIT_CONNECTIONS) as pool:
        return sum(pool.map(commit, range(COMMIT_CONNECTIONS))) / SECONDS
