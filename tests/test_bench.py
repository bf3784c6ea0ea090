"""The benchmark's own instruments: what the load generator reads and when it sends, and what is reckoned from that."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httptools
import pytest

from bench import contestants, figures, followers, page, processes
from bench.figures import Claim
from bench.limits import Confirms
from stack.load import Cast, cast_all, get, post, read_answer
from tests.conftest import wait_until

ACCEPTED = b'HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"id": "one"}'
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsoup\r\n6\r\n salad\r\n0\r\n\r\n"
ANSWERS = {
    "as uvicorn writes it": (ACCEPTED, (202, b'{"id": "one"}', True)),
    "as gunicorn writes it": (
        b"HTTP/1.1 202 Accepted\r\nServer: gunicorn\r\nConnection: keep-alive\r\nContent-Length: 2\r\nVary: Accept\r\n\r\n{}",
        (202, b"{}", True),
    ),
    "a length written as nobody else does": (b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:4\r\n\r\nsoup", (200, b"soup", True)),
    "a length that is another header's": (b"HTTP/1.1 200 OK\r\nx-content-length: 9\r\ncontent-length: 4\r\n\r\nsoup", (200, b"soup", True)),
    "an empty body": (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", (503, b"", True)),
    "a body that holds what ends a head": (b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n\r\n\r\n\r\n\r\n", (200, b"\r\n" * 4, True)),
    "no body by its status": (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"", True)),
    "no body, and the length of the one not sent": (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 500\r\n\r\n", (304, b"", True)),
    "in chunks": (CHUNKED, (200, b"soup salad", True)),
    "after a 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + ACCEPTED, (202, b'{"id": "one"}', True)),
    "the last one of its connection": (b"HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 4\r\n\r\nsoup", (200, b"soup", False)),
    "the last one in chunks": (CHUNKED.replace(b"OK", b"OK\r\nconnection: close"), (200, b"soup salad", False)),
    "of an old server": (b"HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\nsoup", (200, b"soup", False)),
}


@pytest.mark.parametrize(("data", "answer"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_read_when_its_last_byte_has_come_and_not_before(data: bytes, answer):
    assert {read_answer(data[:size]) for size in range(len(data))} == {None}
    assert read_answer(data) == answer


@pytest.mark.parametrize("data", [ACCEPTED, CHUNKED])
def test_a_connection_that_says_more_than_it_was_asked_is_not_used_again(data: bytes):
    status, body, stays = read_answer(data)

    assert stays
    assert read_answer(data + data) == (status, body, False)
    assert read_answer(data + b"nonsense") == (status, body, False)


def test_what_is_no_http_is_no_answer():
    with pytest.raises(httptools.HttpParserError):
        read_answer(b"SSH-2.0-OpenSSH\r\n\r\n")


@contextmanager
def server(answer: Callable[[int], bytes | None], *, byte_by_byte: bool = False) -> Iterator[int]:
    """Answer the n-th request, whoever sends it; None: hang up. Yields the port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=100)
    numbers = itertools.count()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(65536):
                data = answer(next(numbers))
                if data is None:
                    return
                for start in range(len(data)) if byte_by_byte else [0]:
                    connection.sendall(data[start : start + 1] if byte_by_byte else data)
                if b": close\r" in data:
                    return

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=[listening.accept()[0]], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def casts(number: int) -> list[Cast]:
    return [Cast(post("/votes", {"voter": f"{n}"}, {})) for n in range(number)]


def test_every_vote_gets_an_answer_that_comes_in_pieces():
    wanted = casts(20)

    with server(lambda _: ACCEPTED, byte_by_byte=True) as port:
        cast_all(port, wanted, connections=4, seconds=10)

    assert {(cast.status, cast.body) for cast in wanted} == {(202, b'{"id": "one"}')}
    assert all(0 < cast.seconds < 5 and not cast.unknown for cast in wanted)


def test_a_server_that_closes_after_each_answer_gets_each_vote_once():
    wanted, asked = casts(50), []
    last = ACCEPTED.replace(b"Accepted\r\n", b"Accepted\r\nconnection: close\r\n")

    with server(lambda n: asked.append(n) or last) as port:
        cast_all(port, wanted, connections=4, seconds=10)

    assert {cast.status for cast in wanted} == {202}
    assert len(asked) == 50
    assert not any(cast.unknown for cast in wanted)


def test_what_got_no_definite_answer_is_cast_again():
    wanted, answered = casts(40), []
    refused = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"

    with server(lambda n: refused if n % 5 == 1 else None if n % 5 == 3 else ACCEPTED) as port:
        cast_all(port, iter(wanted), connections=4, seconds=10, on_answer=answered.append)

    assert {cast.status for cast in wanted} == {202}
    assert sorted(map(id, answered)) == sorted(map(id, wanted))
    assert {status for cast in wanted for status, _ in cast.unknown} == {0, 503}


def test_a_server_that_is_not_there_is_waited_for_and_nothing_to_cast_needs_none():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    cast_all(port, [], seconds=1)
    with pytest.raises(TimeoutError):
        cast_all(port, casts(1), connections=2, seconds=0.2)


def test_at_a_rate_votes_are_sent_when_they_are_due_and_wait_for_a_free_connection():
    """Of a server that takes 20 ms, one connection gets 50 a second: of 100 a second each waits 10 ms longer than the last."""
    wanted = casts(20)

    def slowly(_: int) -> bytes:
        time.sleep(0.02)
        return ACCEPTED

    with server(slowly) as port:
        cast_all(port, wanted, connections=1, seconds=10, per_second=100)
        waited = [cast.seconds for cast in wanted]
        cast_all(port, wanted, connections=8, seconds=10, per_second=100)

    assert [late.due_at - early.due_at for early, late in itertools.pairwise(wanted)] == pytest.approx([0.01] * 19)
    assert 0.2 <= waited[-1] < 2
    assert max(cast.seconds for cast in wanted) < waited[-1]


def test_a_get_has_no_body():
    assert get("/results", {"accept": "*/*"}) == b"GET /results HTTP/1.1\r\nhost: localhost\r\naccept: */*\r\n\r\n"


# --- Arithmetic -------------------------------------------------------------------------------------------------------

OURS, THEIRS = "contestants.ours.counted_per_s", "contestants.theirs.counted_per_s"


def test_a_ratio_is_that_of_each_round_and_not_of_the_medians():
    """The machine was slow in the second round, for both."""
    rounds = [{OURS: 1000.0, THEIRS: 100.0}, {OURS: 100.0, THEIRS: 20.0}, {OURS: 900.0, THEIRS: 60.0}]

    found = figures.judged(rounds, [Claim("ours : theirs", OURS, THEIRS, wanted=10)])

    assert found["ours/theirs"] == {
        "words": "ours : theirs",
        "value": 10,
        "range": [5, 15],
        "wanted": 10,
        "at_most": False,
        "met": True,
    }


def test_a_round_without_one_of_the_two_says_nothing_of_their_ratio():
    rounds = [{OURS: 900.0, THEIRS: 90.0}, {OURS: 100.0}, {THEIRS: 50.0}]

    assert Claim("", OURS, THEIRS).of(rounds) == [10]
    assert figures.judged([{OURS: 1.0}], [Claim("", OURS, THEIRS)]) == {}


@pytest.mark.parametrize(("value", "at_most", "met"), [(9.99, False, False), (10, False, True), (10, True, True), (10.01, True, False)])
def test_a_bar_is_met_when_it_is_reached(value: float, at_most: bool, met: bool):
    claim = figures.judged([{OURS: value}], [Claim("ours", OURS, wanted=10, at_most=at_most)])["ours"]

    assert claim["met"] is met
    assert ("MISSED" in figures.in_words(claim)) is not met
    assert "wanted at most 10" in figures.in_words(claim) or not at_most


def test_medians_stand_beside_their_range_as_deep_as_their_sections_are():
    summary = figures.summed_up([{OURS: 3.0, "limits.noop_http_per_s": 7.0}, {OURS: 1.0}, {OURS: 2.0}])

    assert summary["contestants"] == {"ours": {"counted_per_s": 2, "range": {"counted_per_s": [1, 3]}}}
    assert summary["limits"] == {"noop_http_per_s": 7, "range": {"noop_http_per_s": [7, 7]}}
    assert summary["ratios"] == {"range": {}}


def test_every_claim_has_a_name_of_its_own():
    assert len({claim.name for claim in figures.CLAIMS}) == len(figures.CLAIMS)


@pytest.mark.parametrize(("share", "value"), [(0, 1), (0.5, 3), (0.99, 5), (1, 5)])
def test_a_percentile_is_one_of_the_values(share: float, value: float):
    assert figures.percentile([1, 2, 3, 4, 5], share) == value
    assert figures.percentile([], share) == 0


def test_confirms_are_counted_once_each_alone_or_together():
    confirms = Confirms()
    numbers = []
    for tag, multiple in [(1, False), (3, False), (4, False), (5, True), (9, False), (8, True), (12, True)]:
        confirms.ack(tag, multiple)
        numbers.append(confirms.number)

    assert numbers == [1, 2, 3, 5, 6, 9, 12]


def test_a_follower_waits_for_each_change_until_the_first_event_that_has_it():
    """Votes are counted at 10.0, 10.1 and 10.2; one follower is told of two at 10.15 and of all at 10.5, another goes before the end."""
    counted_at = [10.0, 10.1, 10.2]

    waited = followers.delays(counted_at, [[(9.0, 0), (10.15, 2), (10.5, 3)], [(10.01, 1)]])

    assert waited == pytest.approx([0.15, 0.05, 0.3, 0.01])


def test_the_largest_process_is_found_among_children():
    with subprocess.Popen([sys.executable, "-c", "x = b'x' * 50_000_000; input()"], stdin=subprocess.PIPE) as child:
        wait_until(lambda: processes.largest_rss_mb([child.pid]) > 50, seconds=5)
        assert processes.largest_rss_mb([os.getpid()]) >= processes.largest_rss_mb([child.pid])
        child.communicate(b"\n")
    assert processes.largest_rss_mb([child.pid]) == 0


# --- The page ---------------------------------------------------------------------------------------------------------

ABOUT = {
    "python": "3.11.7",
    "postgresql": "15.20",
    "rabbitmq": "3.10.8",
    "cores": 2,
    "rounds": 3,
    "votes": 30_000,
    "load_average": [2.04, 1, 1],
    "single_commits_by": "pgbench, 64 connections",
    "commands": {"bench": "make bench"},
}


def test_the_page_has_the_figures_that_were_measured_and_leaves_out_what_was_not():
    single = "contestants.product_single"
    rounds = [
        {f"{single}.counted_per_s": rate, f"{single}.lag_p99_ms": 12.34, "limits.noop_http_per_s": 20_000.0}
        for rate in (9000.0, 9600.0, 12_000.0)
    ]

    text = page.page({"about": ABOUT, **figures.summed_up(rounds)}, None, ["votes"])

    assert "| this product, one vote a request |  | 9,600 (9,000 to 12,000) |  |  |  | 12.3 |  |" in text
    assert "| one vote a request : nothing behind the server | 0.48 (0.45 to 0.60) | 0.5 | **no** |" in text
    assert "| nothing behind the server | 20,000 |" in text
    assert "(performance/votes.svg)" in text
    assert not any(word in text for word in ("Celery task per vote |", "Followers", "latency.svg", "As it grows", "None"))


def test_the_page_shows_what_becomes_of_a_growing_table_where_that_was_measured():
    costs = {f"{poll}_{name}": 12.5 for poll in ("first", "same", "other") for name in ("postgres_us", "worker_us", "wal_bytes")}
    rates = {10**6: 9000.5, 10**9: 8000}
    rows = [{"stored": stored, "same_counted_per_s": rate, "other_counted_per_s": 9000, **costs} for stored, rate in rates.items()]
    series = [[0, 0, 70, 200], [9, 10**6, 80, 300]]
    backlog = {"votes": 10**6, "accepted_per_s": 50_000, "seconds": 20, "counted_per_s": 50_000, "series": series}

    text = page.page({"about": ABOUT, **figures.summed_up([{}])}, {"stored": rows, "backlog": backlog, "memory": [[0, 99, 98]]}, ["scale"])

    assert "| 1,000,000 | 12.5 | 12.5 | 12.5 | 12.5 | 12.5 | 9,000 | 12.5 | 12.5 | 9,000 |\n| 1,000,000,000 | 12.5 |" in text
    assert "(performance/scale.svg)" in text
    assert "worker 70 to 80 MB; RabbitMQ 200 to 300 MB" in text
    assert "| 0 | 99 | 98 |" in text and "polls at random" not in text


def test_lags_are_gathered_by_the_tenth_of_a_second():
    lags = [(0.0, 5.0), (0.05, 7.0), (0.31, 2.0)]

    assert contestants.by_tenth_of_a_second(lags) == [[0, 7, 7], [0.3, 2, 2]]
    assert contestants.p99(lags) == 7
