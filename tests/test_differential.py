"""One request is one request: the product and the proxies in front of it read alike whatever is sent (tests/corpus.py).

A note is taken of each request that reaches the product, with the address that it takes it to come from (tests/witness.py). Nothing that
is hidden in a request may be among them, nobody may get the answer to a request of somebody else's, and no address may be other than
what the front wrote. The fronts are the nginx of docker-compose.yml, HAProxy, and an nginx that passes `Upgrade` on, as ingress-nginx does.
"""

import json
import os
import random
import re
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from core.__main__ import command
from stack import fronts
from stack.folder import StackError
from tests.conftest import ROOT, WEB_ROLE, answers, database_url, free_port, option, process, wait_until
from tests.corpus import PATH, corpus
from tests.test_security_house import make_certificates

# Written by a front in the place of what the client says; by the test where there is no front.
DIRECT = "198.51.100.9"
BY_FRONT = "127.0.0.1"
CASES = {f"c{number:03}": case for number, case in enumerate(corpus())}
# [statuses] by the name of each case.
KNOWN = Path(__file__).with_name("corpus.json")


@cache
def known():
    return json.loads(KNOWN.read_text()) if KNOWN.exists() else {}


# How long an answer that is known to come may take, and how long it is listened for more.
ANSWER_SECONDS, MORE_SECONDS = 5, 0.3


@dataclass
class Witnessed:
    """The product, and what its witness noted."""

    port: int
    notes: Path
    poll: str = ""
    option: str = ""
    read: int = 0

    def seen(self):
        """Return {number of a case: the notes of it} since it was last asked."""
        lines = self.notes.read_text().splitlines()[self.read :]
        self.read += len(lines)
        found = {}
        for note in map(json.loads, lines):
            found.setdefault(note["id"].partition(".")[0], []).append(note)
        return found


@pytest.fixture(scope="module")
def witnessed(broker, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("product"), free_port()
    program = ["uvicorn", "tests.witness:application", *command("web")[2:], "--port", str(port)]
    environment = {"DATABASE_URL": database_url(WEB_ROLE), "TRUSTED_PROXIES": "1", "WITNESS_NOTES": str(folder / "notes")}
    with process(*program, log=folder / "log", **environment):
        wait_until(lambda: answers(port))
        yield Witnessed(port, folder / "notes")


@pytest.fixture
def product(witnessed, make_poll):
    poll = make_poll(voter_policy="ip")
    witnessed.poll, witnessed.option = f"/api/v1/polls/{poll.pk}", str(option(poll, "soup"))
    return witnessed


# --- The fronts -------------------------------------------------------------------------------------------------------


@dataclass
class Entrance:
    """Where clients come in, and the line that a front would have written there."""

    port: int
    has_tls: bool = False
    line: str = ""
    address: str = BY_FRONT
    is_direct: bool = False
    context: ssl.SSLContext = field(default_factory=lambda: ssl._create_unverified_context())

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.context.wrap_socket(connection) if self.has_tls else connection


@contextmanager
def running(front, arguments, port):
    log = subprocess.Popen(
        [front.command, *arguments], env={**os.environ, **front.env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert log.poll() is None, log.stdout.read()
                time.sleep(0.05)
        yield
    finally:
        log.terminate()
        log.wait(10)


def provided(name):
    try:
        return fronts.provide(name)
    except StackError as exc:
        pytest.skip(f"There is no {name} here: {exc}")


@contextmanager
def nginx(folder, product, change=lambda text: text):
    """deploy/nginx/nginx.conf with this machine's ports, certificate and web process."""
    front, port = provided("nginx"), free_port()
    make_certificates(folder)
    text = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
    replaced = {
        "/tmp/": f"{folder}/",
        "listen 8080;": f"listen 127.0.0.1:{free_port()};",
        "listen 8443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "server web:8000 resolve max_fails=0;": f"server 127.0.0.1:{product.port} max_fails=0;",
        "/etc/nginx/tls/tls.crt": f"{folder}/server.pem",
        "/etc/nginx/tls/tls.key": f"{folder}/server.key",
    }
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    text = re.sub(r"listen \[::\]:\d+( ssl)?;|resolver [^;]*;", "", text)  # neither IPv6 nor Docker's name server
    if front.version < (1, 25, 1):
        text = text.replace("http2 on;", "")
    (folder / "nginx.conf").write_text(change(text))
    # Its workers can read the folder.
    more = "daemon off; user root;" if os.getuid() == 0 else "daemon off;"
    with running(front, ["-e", "stderr", "-c", folder / "nginx.conf", "-p", folder, "-g", more], port):
        yield Entrance(port, has_tls=True)


def passing_upgrade_on(text):
    """Return the configuration with what ingress-nginx's template says for every path."""
    by_upgrade = "map $http_upgrade $connection_upgrade {\n        default upgrade;\n        '' '';\n    }\n"
    passed = "proxy_set_header Upgrade $http_upgrade;\n    proxy_set_header Connection $connection_upgrade;"
    assert text.count('proxy_set_header Connection "";') == 1
    text = text.replace('proxy_set_header Upgrade "";', "")
    return text.replace("    upstream web {", f"    {by_upgrade}\n    upstream web {{").replace('proxy_set_header Connection "";', passed)


@contextmanager
def haproxy(folder, product):
    front, port = provided("haproxy"), free_port()
    (folder / "haproxy.cfg").write_text(f"""
defaults
    mode http
    option forwardfor
    http-reuse always
    timeout connect 2s
    timeout client 10s
    timeout server 10s
    timeout http-request 2s
frontend clients
    bind 127.0.0.1:{port}
    default_backend web
backend web
    server web 127.0.0.1:{product.port}
""")
    with running(front, ["-db", "-f", folder / "haproxy.cfg"], port):
        yield Entrance(port)


@contextmanager
def no_front(folder, product):
    yield Entrance(product.port, line=f"X-Forwarded-For: {DIRECT}", address=DIRECT, is_direct=True)


@contextmanager
def nginx_like_ingress(folder, product):
    with nginx(folder, product, passing_upgrade_on) as entrance:
        yield entrance


# --- What is sent -----------------------------------------------------------------------------------------------------


def cut(sent, cuts):
    return [sent[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True) if sent[start:end]]


def together(pieces):
    return [b"".join(pieces)]


def cut_at_random(pieces):
    [sent] = together(pieces)
    return cut(sent, sorted(random.sample(range(1, len(sent)), 3)))


def pieces_of(case, number, entrance, product):
    pieces = [written(piece, number, entrance, product) for piece in case.pieces]
    return cut(*pieces, case.cuts) if case.cuts else pieces


def written(piece, number, entrance, product):
    """Return the bytes of a case's piece."""
    line = f"{entrance.line}\r\n".encode() if entrance.line else b""
    piece = piece.replace(b"FRONT\r\n", line).replace(b"@@@@", number.encode())
    piece = piece.replace(PATH.encode(), b"POLL").replace(b"POLL", product.poll.encode())
    return piece.replace(b'"OPTION"', f'"{product.option}"'.ljust(8).encode())  # as long as it is said to be


def told(received, *, is_head=False):
    """Return [(status, X-Request-ID, head)] of the answers, and what is left over. `is_head`: no body follows."""
    found = []
    while received:
        begun, end, rest = received.partition(b"\r\n\r\n")
        matched = re.match(rb"HTTP/1\.\d (\d{3})", begun)
        if not (matched and end):
            return found, received
        status = int(matched[1])
        lower = begun.lower()
        length = re.search(rb"\r\ncontent-length: *(\d+)", lower)
        if is_head or status < 200 or status in (204, 304):
            body = 0
        elif b"\r\ntransfer-encoding: chunked" in lower:
            body = rest.find(b"0\r\n\r\n") + 5
        else:
            body = int(length[1]) if length else len(rest)
        if status >= 200:
            name = re.search(rb"\r\nx-request-id: *([^\r]+)", lower)
            found.append((status, name[1].decode() if name else "", begun))
        received = rest[body:]
    return found, b""


def exchange(entrance, pieces, expected=1, pause=0.05):
    """Return what is answered to these pieces; so many answers are waited for."""
    received = b""
    try:
        with entrance.connect() as connection:
            try:
                for place, piece in enumerate(pieces):
                    if place:
                        time.sleep(pause)
                    connection.sendall(piece)
            except OSError:  # it was refused before all of it was sent
                pass
            while True:
                try:
                    more = connection.recv(262_144)
                except TimeoutError:
                    break
                if not more:
                    break
                received += more
                is_enough = len(told(received)[0]) >= expected
                connection.settimeout(MORE_SECONDS if is_enough else ANSWER_SECONDS)
    except OSError:
        pass
    return received


@dataclass
class Tried:
    """What came of a case: its answers, and those to somebody who asked after it."""

    answers: list
    after: list


def tried(number, entrance, product, arriving):
    case = CASES[number]
    pieces = arriving(pieces_of(case, number, entrance, product))
    expected = len(known().get(case.name, [])) or 1
    found, _ = told(exchange(entrance, pieces, expected), is_head=case.name.startswith("HEAD"))
    asked = f"GET {product.poll}/results HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {number}.after\r\n{entrance.line}".rstrip()
    after, _ = told(exchange(entrance, [f"{asked}\r\nConnection: close\r\n\r\n".encode()]))
    return Tried(found, after)


def try_all(entrance, product, arriving=list):
    """Return {number: what came of the case} and what the witness saw. `arriving` returns other pieces of the same."""
    product.seen()
    with ThreadPoolExecutor(8) as threads:
        results = dict(zip(CASES, threads.map(lambda number: tried(number, entrance, product, arriving), CASES), strict=True))
    time.sleep(1)  # for what was not waited for
    return results, product.seen()


def differences(results, seen, entrance):
    """Return what is wrong, in words."""
    found = []
    for number, result in results.items():
        case, notes = CASES[number], [note for note in seen.get(number, []) if not note["id"].endswith(".after")]
        ids = sorted(note["id"] for note in notes)
        answered = [name for _, name, _ in result.answers if re.match(r"c\d+\.", name)]
        most = case.requests if entrance.is_direct else max(case.requests, case.by_front)
        allowed = [f"{number}.{place}" for place in range(1, most + 1)]
        if any(name.endswith(".hidden") for name in [*ids, *answered]):
            found.append(f"{case.name}: what was hidden in it was taken for a request")
        elif ids != [name for name in allowed if name in ids]:
            found.append(f"{case.name}: {ids} reached the product")
        if len(result.answers) > most:
            found.append(f"{case.name}: {len(result.answers)} answers")
        if answered != [name for name in allowed if name in answered]:
            found.append(f"{case.name}: the answers to {answered}")
        if case.ends and len(ids) > len(result.answers):
            found.append(f"{case.name}: {len(ids)} reached the product, and {len(result.answers)} were answered")
        if [(status, name) for status, name, _ in result.after] != [(200, f"{number}.after")]:
            found.append(f"{case.name}: whoever came after it was answered {[(status, name) for status, name, _ in result.after]}")
        for note in seen.get(number, []):
            if note["address"] != entrance.address:
                found.append(f"{case.name}: came from {note['address']}")
    if strangers := set(seen) - set(results):
        found.append(f"requests of no case: {strangers}")
    return found


@pytest.mark.parametrize("front", [nginx, haproxy, nginx_like_ingress], ids=lambda front: front.__name__)
def test_nobody_reads_two_requests_where_one_was_sent(front, product, tmp_path):
    with front(tmp_path, product) as entrance:
        results, seen = try_all(entrance, product)

    found = differences(results, seen, entrance)
    assert not found, f"{len(found)} differences in {len(CASES)} cases:\n" + "\n".join(found)


@pytest.mark.parametrize("arriving", [list, together, cut_at_random], ids=lambda arriving: arriving.__name__)
def test_what_the_product_answers_is_known_and_does_not_depend_on_how_it_arrives(arriving, product, tmp_path):
    """corpus.json has it; with WRITE_CORPUS in the environment it is written anew, to be read."""
    with no_front(tmp_path, product) as entrance:
        results, seen = try_all(entrance, product, arriving)

    assert differences(results, seen, entrance) == []
    answered = {CASES[number].name: [status for status, _, _ in result.answers] for number, result in results.items()}
    if os.environ.get("WRITE_CORPUS") and arriving is list:
        KNOWN.write_text(json.dumps(answered, indent=0) + "\n")
        known.cache_clear()
    assert {name: (statuses, known().get(name)) for name, statuses in answered.items() if statuses != known().get(name)} == {}
    assert known().keys() == answered.keys()
