"""A request that has arrived as a whole is answered by a shorter way than ASGI: the same answers, in the same order, to the same end."""

import asyncio
import json
import random
import re
import socket
import time
from contextlib import asynccontextmanager

import pytest
import uvicorn
from django.core.exceptions import DisallowedHost
from django.db import connection
from django.test import RequestFactory

from core import deprecations, protocol
from core.__main__ import command
from core.protocol import Protocol
from polls import hosts
from tests.conftest import answers, free_port, option, tallies, wait_until, web
from tests.test_following import until

# --- The product, however a request arrives ---------------------------------------------------------------------------


def exchange(port, *pieces, pause=0.02):
    """Send the pieces, one after the other; return all that came until the server closed the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for place, piece in enumerate(pieces):
            if place:
                time.sleep(pause)
            connection.sendall(piece)
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


def request(method, path, body=b"", *, close=True, **headers):
    given = {"host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body:
        given = {"content-type": "application/json", "content-length": str(len(body)), **given}
    if close:
        given["connection"] = "close"
    return f"{method} {path} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in given.items()) + b"\r\n" + body


VARIABLE = re.compile(
    rb'date: [^\r]+|ratelimit: [^\r]+|x-request-id: [^\r]+|location: [^\r]+|"as_of":"[^"]+"|"(?:accepted_at|receipt|self|token)":"[^"]+"'
    rb"|set-cookie: [^\r]+"
)


@pytest.fixture
def requests(api, make_poll, client_key):
    """[(what, request)], of which none changes what the others are answered."""
    poll, by_session = make_poll(), make_poll(voter_policy="session")
    key = {"authorization": f"Api-Key {client_key}"}
    path = f"/api/v1/polls/{poll.pk}"
    vote = {"option": str(option(poll, "soup")), "voter": "alice"}
    body = json.dumps(vote).encode()
    accepted = api.post(f"{path}/votes", body, idempotency_key="once").json
    wait_until(lambda: api.get(accepted["links"]["self"]).json["status"] == "counted")
    wait_until(lambda: api.get(f"{path}/results").json["total_votes"] == 1)
    two = json.dumps([{**vote, "idempotency_key": "once"}, {"option": "0", "voter": "bob"}]).encode()
    return {
        "a vote": request("POST", f"{path}/votes", body, idempotency_key="once", **key),
        "one that is waited for": request("POST", f"{path}/votes/", body, idempotency_key="once", prefer="wait=5", **key),
        "without a key": request("POST", f"{path}/votes", body),
        "no JSON": request("POST", f"{path}/votes", b"{", **key),
        "no such option": request("POST", f"{path}/votes", b'{"option": "0", "voter": "alice"}', **key),
        "another method": request("PUT", f"{path}/votes", **key),
        "a batch": request("POST", f"{path}/votes/batch", two, **key),
        "a withdrawal that is not offered": request("POST", f"{path}/votes/withdraw", b'{"voter": "alice"}', **key),
        "a voter token": request("POST", "/api/v1/voters", json.dumps({"poll": str(by_session.pk)}).encode()),
        "a receipt": request("GET", accepted["links"]["self"]),
        "receipts": request("POST", "/api/v1/votes/status", json.dumps({"receipts": [accepted["receipt"], "none"]}).encode()),
        "results": request("GET", f"{path}/results?whatever=1"),
        "their head": request("HEAD", f"{path}/results"),
        "results to somebody": request("GET", f"{path}/results", **key),
        "no results": request("GET", f"/api/v1/polls/{'0' * 36}/results"),
        "an escaped path": request("GET", f"{path}/result%73"),
        "Django": request("GET", path),
        "nothing": request("GET", "/nothing", accept="application/json"),
        "health": request("GET", "/healthz"),
    }


def test_a_request_is_answered_alike_however_it_arrives(api, requests):
    for what, whole in requests.items():
        answer = exchange(api.port, whole)
        assert answer.startswith(b"HTTP/1.1 "), what
        head = whole.index(b"\r\n\r\n") + 4
        for cuts in ([head], [9], [head - 3, head + 1], sorted(random.sample(range(1, len(whole)), 3))):
            pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
            assert VARIABLE.sub(b"", exchange(api.port, *filter(None, pieces))) == VARIABLE.sub(b"", answer), (what, cuts)


def test_requests_that_arrive_together_are_answered_in_their_order(api, requests):
    """Some at once, some once the broker has confirmed, some by Django."""
    several = 2 * list(requests.values())
    random.shuffle(several)
    lasting = [whole.replace(b"connection: close\r\n", b"") for whole in several[:-1]]

    together = exchange(api.port, b"".join(lasting) + several[-1])

    answers = [VARIABLE.sub(b"", exchange(api.port, each)) for each in several]
    assert VARIABLE.sub(b"", together) == b"".join([*[each.replace(b"connection: close\r\n", b"") for each in answers[:-1]], answers[-1]])


def test_a_vote_counts_whose_client_has_gone_before_the_answer(api, make_poll, client_key):
    poll = make_poll()
    body = json.dumps({"option": str(option(poll, "soup")), "voter": "alice"}).encode()
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(request("POST", f"/api/v1/polls/{poll.pk}/votes", body, authorization=f"Api-Key {client_key}"))
    wait_until(lambda: tallies(poll) == {"soup": 1})
    assert api.cast(poll, "bob").status == 202


def test_what_the_product_wants_by_asgi(monkeypatch):
    """What Django may have to answer, what is sent bit by bit, and what is told more on its way out."""
    from core.asgi import application  # it sets Django up once more

    results = f"/api/v1/polls/{'0' * 36}/results"

    def goes_by_asgi(path, *headers):
        answering = application.answer_whole("GET", path, list(headers), dict(headers), b"", "127.0.0.1")
        if answering is not None:
            answering.close()
        return answering is None

    assert not goes_by_asgi(results)
    assert not goes_by_asgi("/api/v1/votes/receipt", (b"authorization", b"Bearer x"))
    assert goes_by_asgi(results, (b"authorization", b"Bearer x"))
    assert goes_by_asgi(results, (b"origin", b"https://shop.example.org"))
    assert goes_by_asgi(f"{results}/stream")
    assert goes_by_asgi("/api/v1/polls")
    monkeypatch.setattr(deprecations, "DEPRECATED", {"/api/v0/": None})
    assert goes_by_asgi(results)


def test_trailers_change_no_address(pipeline, make_poll, tmp_path):
    """Behind a proxy that passes them on, each was another voter."""
    port, poll = free_port(), make_poll(voter_policy="ip")
    body = json.dumps({"option": str(option(poll, "soup"))}).encode()
    head = f"POST /api/v1/polls/{poll.pk}/votes HTTP/1.1\r\nhost: localhost\r\nx-forwarded-for: 192.0.2.1\r\n"
    head += "content-type: application/json\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    with web(port, tmp_path / "log", TRUSTED_PROXIES="1"):
        wait_until(lambda: answers(port))
        for number in range(6):
            rest = b"%x\r\n%b\r\n0\r\nX-Forwarded-For: 203.0.113.%d\r\n\r\n" % (len(body), body, number)
            pieces = [head.encode() + rest] if number % 2 else [head.encode(), rest]
            assert exchange(port, *pieces).startswith(b"HTTP/1.1 202 ")

    wait_until(lambda: tallies(poll) == {"soup": 1})
    with connection.cursor() as cursor:
        wait_until(lambda: cursor.execute("SELECT count(*) FROM outcomes WHERE poll_id = %s", [poll.pk]) or cursor.fetchone() == (5,))
    assert tallies(poll) == {"soup": 1}


def test_a_path_has_one_spelling(api, poll):
    """A front's rule may compare the path as it was sent."""
    path = f"/api/v1/polls/{poll.pk}"
    vote = json.dumps({"option": str(option(poll, "soup")), "voter": "alice"}).encode()
    spelled = [
        f"{path}/%76otes",
        f"{path}/vote%73",
        f"{path}%2fvotes",
        f"{path}%2Fvotes",
        f"{path}/votes/%62atch",
        f"{path}/votes//",
        f"{path}/%77ithdraw",
    ]
    spelled += ["/%61pi/v1/voters", "/api/v1/votes/%73tatus", "/api/v1/voters//", "/%61dmin/login/", "/%67raphql", "/api/v1/auth%2Ftoken"]
    for each in spelled:
        for pieces in ([request("POST", each, vote)], [request("POST", each, vote)[:-5], vote[-5:]]):
            answer = exchange(api.port, *pieces)
            assert answer.startswith(b"HTTP/1.1 404 "), each
    for each in (
        f"{path}/result%73",
        f"{path}%2fresults/stream",
        "/api/v1/votes/%41BC",
        "/%68ealthz",
        "/%72eadyz",
        "/api/%64ocs",
        "/%2e/healthz",
    ):
        assert exchange(api.port, request("GET", each)).startswith(b"HTTP/1.1 404 "), each
    assert api.post(f"{path}/votes/", vote).status == 202
    assert api.get("/api/v1/polls?search=%61").status == 200


def test_hot_routes_go_by_the_services_names_only(api, poll, requests):
    for what, whole in requests.items():
        wrong = whole.replace(b"host: localhost", b"host: evil.example")
        for pieces in ([wrong], [wrong[:40], wrong[40:]]):
            answer = exchange(api.port, *pieces)
            if what == "health":  # probes call a pod by its address
                assert answer.startswith(b"HTTP/1.1 200 ")
            elif b"/api/v1/" in whole and what not in ("an escaped path", "Django", "results to somebody"):
                assert answer.startswith(b"HTTP/1.1 400 ") and json.loads(content(answer) or b'{"type": "/problems/bad-request"}')[
                    "type"
                ] == ("/problems/bad-request"), what


HOSTS = [
    "localhost",
    "LOCALHOST:8000",
    "vote.example.org",
    "example.org",
    "a.b.example.org",
    "xexample.org",
    "[::1]",
    "[::1]:80",
    "::1",
    "",
]
HOSTS += [
    "vote.example.org.",
    "vote.example.org:x",
    "vote.example.org:",
    "vote.example.org:8\r",
    "a b",
    "localhost@evil",
    "10.0.0.1",
    "x" * 400,
]


@pytest.mark.parametrize("allowed", [["localhost", "[::1]"], ["vote.example.org"], [".example.org"], ["*"], []], ids=str)
def test_a_host_is_ours_where_django_says_so(allowed, settings, monkeypatch):
    settings.ALLOWED_HOSTS, settings.DEBUG = allowed, False
    monkeypatch.setattr(hosts, "accepted", set())
    factory = RequestFactory()

    def is_djangos(host):
        asked = factory.get("/", headers={"host": host})
        try:
            return bool(asked.get_host())
        except DisallowedHost:
            return False

    for host in [*HOSTS, *HOSTS]:
        assert hosts.is_ours(host.encode()) == is_djangos(host), host


def test_names_are_remembered_but_not_without_end(settings, monkeypatch):
    settings.ALLOWED_HOSTS = ["*"]
    monkeypatch.setattr(hosts, "accepted", set())

    assert all(hosts.is_ours(b"host-%d" % number) for number in range(2 * hosts.MAX_ACCEPTED))

    assert len(hosts.accepted) == hosts.MAX_ACCEPTED


def test_an_encoded_body_is_told_what_is_taken(api, poll):
    vote = {"option": str(option(poll, "soup")), "voter": "alice"}
    for path in (f"/api/v1/polls/{poll.pk}/votes", "/api/v1/auth/token"):
        refused = api.post(path, vote, content_encoding="gzip")
        assert (refused.status, refused.json["type"], refused.headers["accept-encoding"]) == (415, "/problems/encoded-body", "identity")
        assert refused.headers["content-type"] == "application/problem+json" and refused.headers["x-request-id"]
    assert tallies(poll) == {}


def test_what_did_not_change_has_no_length(api, poll):
    path = f"/api/v1/polls/{poll.pk}/results"
    etag = api.get(path).headers["etag"]

    for sent in (request("GET", path, if_none_match=etag), request("HEAD", path, if_none_match=etag)):
        for pieces in ([sent], [sent[:20], sent[20:]]):
            answer = exchange(api.port, *pieces)
            assert answer.startswith(b"HTTP/1.1 304 ") and b"content-length" not in answer and b"transfer-encoding" not in answer
            assert answer.endswith(b"\r\n\r\n")


# --- Any application --------------------------------------------------------------------------------------------------


class Both:
    """Tells which way a request came: `whole` by the short one, `asgi` by the other."""

    def __init__(self):
        self.go = None

    def answer_whole(self, method, path, headers, fields, body, peer):
        return None if path == "/asgi" else self._answer(method, path, body, peer)

    async def _answer(self, method, path, body, peer):
        if path == "/wait":
            self.go = asyncio.get_running_loop().create_future()
            await self.go
        if path == "/yield":
            await asyncio.sleep(0)
        if path == "/fail":
            raise SystemError("on purpose")
        assert peer == "127.0.0.1"
        content = b"whole %s %s %s" % (method.encode(), path.encode(), body)
        return 200, [(b"content-length", b"%d" % len(content))], content

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        content = b"asgi %s %s %s" % (scope["method"].encode(), scope["path"].encode(), body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]})
        await send({"type": "http.response.body", "body": content})


@asynccontextmanager
async def serving(application, **options):
    chosen = {"access_log": False, **options}
    plain = {"port": 0, "loop": "uvloop", "lifespan": "off", "log_config": None, "proxy_headers": False, "http": Protocol}
    config = uvicorn.Config(application, **{**plain, **chosen})
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def ask(port, *pieces):
    """Return what the server says to these pieces until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.02)
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def content(answer):
    return answer.partition(b"\r\n\r\n")[2]


GET = request("GET", "/a")
CHUNKED = b"POST /a HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
ARRIVING = {
    "whole": ([GET], b"whole GET /a "),
    "by HTTP/1.0": ([b"GET /a HTTP/1.0\r\n\r\n"], b"whole GET /a "),
    "with a query": ([request("GET", "/a?b=c")], b"whole GET /a "),
    "with a query that is escaped": ([request("GET", "/a?b=%63")], b"asgi GET /a "),
    "with a body": ([request("POST", "/a?b=c", b"{}")], b"whole POST /a {}"),
    "its head in pieces": ([GET[:20], GET[20:]], b"whole GET /a "),
    "its body later": ([request("POST", "/a", b"{}")[:-2], b"{", b"}"], b"asgi POST /a {}"),
    "its body a piece more": ([request("POST", "/a", b"{}")[:-1], b"}"], b"asgi POST /a {}"),
    "in chunks together": ([CHUNKED + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"], b"whole POST /a abc"),
    "and let others go first": ([request("GET", "/yield")], b"whole GET /yield "),
    "in chunks one by one": ([CHUNKED, b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n"], b"asgi POST /a abc"),
    "wanted by ASGI": ([request("POST", "/asgi", b"{}")], b"asgi POST /asgi {}"),
    "escaped": ([request("GET", "/%61")], b"asgi GET /a "),
    "as to a proxy": ([request("GET", "http://LOCALHOST/a")], b"asgi GET /a "),
    "to be upgraded": ([request("GET", "/a", close=False, connection="upgrade", upgrade="h2c")], b"whole GET /a "),
    "to be upgraded, with a body": ([request("POST", "/a", b"{}", close=False, connection="upgrade", upgrade="h2c")], b"whole POST /a {}"),
    "with trailers": ([CHUNKED + b"2\r\nab\r\n0\r\nhost: other\r\n\r\n"], b"whole POST /a ab"),
    "its body when told to go on": ([request("POST", "/a", b"{}", expect="100-continue")], b"HTTP/1.1 200 OK"),
}


@pytest.mark.parametrize("how", ARRIVING)
def test_which_way_a_request_goes(how):
    pieces, expected = ARRIVING[how]

    async def main():
        async with serving(Both()) as (_, port):
            return await ask(port, *pieces)

    answer = asyncio.run(main())
    if how == "its body when told to go on":
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
        assert answer.endswith(b"asgi POST /a {}")
    else:
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nconnection: close\r\n" in answer
        assert b"\r\ndate: " in answer
        assert content(answer) == expected


@pytest.mark.parametrize("options", [{"limit_concurrency": 100}, {"root_path": "/below"}, {"access_log": True}], ids=str)
def test_what_uvicorn_is_asked_for_beyond_answering_is_done_by_asgi(options):
    async def main():
        async with serving(Both(), **options) as (_, port):
            return await ask(port, GET)

    assert content(asyncio.run(main())).startswith(b"asgi GET ")


def test_an_application_that_knows_asgi_alone():
    async def application(scope, receive, send):
        await Both()(scope, receive, send)

    async def main():
        async with serving(application) as (_, port):
            return await ask(port, GET)

    assert content(asyncio.run(main())) == b"asgi GET /a "


def test_a_connection_takes_one_request_after_the_other():
    async def main():
        async with serving(Both()) as (server, port):
            answer = await ask(port, *3 * [request("GET", "/a", close=False)], request("GET", "/asgi", close=False), GET)
            assert server.server_state.total_requests == 5
            return answer

    answer = asyncio.run(main())
    assert re.findall(rb"(?:whole|asgi) GET /\w+", answer) == [b"whole GET /a"] * 3 + [b"asgi GET /asgi", b"whole GET /a"]
    assert answer.count(b"connection: close") == 1


def test_an_idle_connection_is_closed():
    async def main():
        async with serving(Both(), timeout_keep_alive=1) as (_, port):
            started = time.monotonic()
            await ask(port, request("GET", "/a", close=False))
            return time.monotonic() - started

    assert 0.9 < asyncio.run(main()) < 3


def test_a_request_that_waits_is_answered_before_the_server_ends():
    application = Both()

    async def main():
        async with serving(application) as (server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("GET", "/wait", close=False))
            await until(lambda: application.go is not None)
            server.should_exit = True
            await asyncio.sleep(0.2)
            application.go.set_result(None)
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return answer

    answer = asyncio.run(main())
    assert content(answer) == b"whole GET /wait "
    assert b"\r\nconnection: close\r\n" in answer


def test_what_comes_while_a_request_waits_is_answered_after_it():
    application = Both()

    async def main():
        async with serving(application) as (_, port):
            asking = asyncio.create_task(ask(port, request("GET", "/wait", close=False), request("GET", "/b", close=False) + GET))
            await until(lambda: application.go is not None)
            await asyncio.sleep(0.1)
            application.go.set_result(None)
            return await asking

    assert re.findall(rb"(?:whole|asgi) GET /\w+", asyncio.run(main())) == [b"whole GET /wait", b"asgi GET /b", b"asgi GET /a"]


def test_a_client_that_goes_while_its_request_waits_disturbs_nobody():
    application = Both()

    async def main():
        async with serving(application) as (server, port):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request("GET", "/wait"))
            await until(lambda: application.go is not None)
            writer.close()
            await until(lambda: not server.server_state.connections)
            application.go.set_result(None)
            return await ask(port, GET)

    assert content(asyncio.run(main())) == b"whole GET /a "


def test_what_can_not_be_read_is_told_so_and_reaches_nobody():
    two_lengths = GET.replace(b"host", b"content-length: 1\r\ncontent-length: 2\r\nhost")
    bad = [b"GET /a HTTP/9.9\r\n\r\n", b"\x00\r\n\r\n", CHUNKED + b"nonsense\r\n", two_lengths]

    async def main():
        async with serving(Both()) as (server, port):
            answers = [await ask(port, each) for each in bad]
            assert server.server_state.total_requests == 0
            assert not server.server_state.tasks
            return answers

    for answer in asyncio.run(main()):
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert content(answer) == b"Invalid HTTP request received."


# --- One request is one request ---------------------------------------------------------------------------------------


class Noting(Both):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.paths, self.fields = [], []

    def answer_whole(self, method, path, headers, fields, body, peer):
        answering = super().answer_whole(method, path, headers, fields, body, peer)
        if answering is not None:
            self._note(path, headers)
        return answering

    async def __call__(self, scope, receive, send):
        await super().__call__(scope, receive, send)
        self._note(scope["path"], scope["headers"])

    def _note(self, path, headers):
        self.paths.append(path)
        self.fields.append(dict(headers))


def noted(*pieces, pause=0.02):
    """Return the answer to these pieces, and the application that saw them."""
    application = Noting()

    async def main():
        async with serving(application) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(pause)
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return answer

    return asyncio.run(main()), application


def answers_in(received):
    return received.count(b"HTTP/1.1 ")


HIDDEN = b"POST /hidden HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}"


@pytest.mark.parametrize("path", ["/a", "/asgi"])
@pytest.mark.parametrize("protocol", ["foo", "h2c", "websocket"])
@pytest.mark.parametrize("padding", [0, 70_000, 600_000])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_body_after_an_upgrade_is_the_body_and_no_request(path, protocol, padding, in_chunks):
    """It was read as the next request, where it came in another read than the head: request smuggling."""
    body = b"\r\n" * (padding // 2) + HIDDEN
    head = f"POST {path} HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: {protocol}\r\n".encode()
    if in_chunks:
        head, sent = head + b"transfer-encoding: chunked\r\n\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        head, sent = head + b"content-length: %d\r\n\r\n" % len(body), body

    for pieces in ([head + sent], [head, sent], [head[:30], head[30:] + sent[:-9], sent[-9:]]):
        answer, application = noted(*pieces, HIDDEN)

        assert application.paths == [path]
        assert answers_in(answer) == 1 and content(answer).endswith(b" POST %s %s" % (path.encode(), body))
        assert b"\r\nconnection: close\r\n" in answer
        assert not application.fields[0].keys() & {b"upgrade"}


@pytest.mark.parametrize("path", ["/a", "/asgi"])
def test_nothing_is_read_after_a_request_that_is_a_connections_last(path):
    lasts = [
        f"GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n",
        f"GET {path} HTTP/1.0\r\nhost: h\r\n\r\n",
        f"GET {path} HTTP/1.0\r\nhost: h\r\nconnection: keep-alive\r\n\r\n",
        f"GET {path} HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
        f"CONNECT {path} HTTP/1.1\r\nhost: h\r\n\r\n",
    ]
    for last in lasts:
        for pieces in ([last.encode() + HIDDEN], [last.encode(), HIDDEN]):
            answer, application = noted(*pieces)

            assert application.paths == [path], (last, pieces)
            assert answers_in(answer) == 1


@pytest.mark.parametrize("path", ["/a", "/asgi"])
def test_trailers_are_no_headers(path):
    head = f"POST {path} HTTP/1.1\r\nhost: h\r\nx-forwarded-for: 192.0.2.1\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    body = b"2\r\n{}\r\n0\r\n"
    trailers = b"X-Forwarded-For: 203.0.113.77\r\nAuthorization: Api-Key x\r\nHost: other\r\nConnection: close\r\nUpgrade: foo\r\n\r\n"
    after = request("GET", "/after")

    for pieces in ([head + body + trailers + after], [head, body, trailers + after], [head + body + trailers[:20], trailers[20:] + after]):
        answer, application = noted(*pieces)

        assert application.paths == [path]  # the parser is not asked where the next one begins
        assert b"\r\nconnection: close\r\n" in answer
        assert application.fields[0] == {b"host": b"h", b"x-forwarded-for": b"192.0.2.1", b"transfer-encoding": b"chunked"}
        assert answers_in(answer) == 1


GOOD = b"POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}"
REFUSED = {
    **{
        f"two of {name}": (GOOD.replace(b"\r\n\r\n", b"\r\n%b: a\r\n%b: a\r\n\r\n" % (name.encode(), name.encode())), 400)
        for name in ("Host", "Authorization", "Idempotency-Key", "content-TYPE", "Content-Encoding", "Voter-Token", "Origin")
    },
    "two lengths": (GOOD.replace(b"host: h", b"host: h\r\ncontent-length: 2"), 400),
    "no host": (GOOD.replace(b"host: h\r\n", b""), 400),
    "a fragment": (GOOD.replace(b"/a", b"/a#b"), 400),
    "the URL of another host": (GOOD.replace(b"/a", b"http://other/a"), 400),
    "the URL of a file": (GOOD.replace(b"/a", b"file://h/a"), 400),
    "another version": (GOOD.replace(b"1.1", b"2.0"), 400),
    "an encoded body": (GOOD.replace(b"host: h", b"host: h\r\ncontent-encoding: gzip"), 415),
    "chunks by HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
    **{
        f"transfer encoding {coding!r}": (CHUNKED.replace(b"chunked", coding) + b"0\r\n\r\n", 501)
        for coding in (b"gzip, chunked", b"xchunked", b"identity", b"chunked;q=1", b"gzip")
    },
    **{
        f"transfer encoding {coding!r}": (CHUNKED.replace(b"chunked", coding) + b"0\r\n\r\n", 400)  # as the parser says
        for coding in (b"chunked, gzip", b"chunked,", b"chunked, chunked")
    },
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("path", ["/a", "/asgi"])
def test_what_a_proxy_may_read_differently_reaches_nobody(what, path):
    sent, status = REFUSED[what]
    sent = sent.replace(b"/a ", f"{path} ".encode())
    head = sent.index(b"\r\n\r\n") + 4

    for pieces in ([sent + GET], [sent[:head], sent[head:] + GET]):
        answer, application = noted(*pieces)

        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert application.paths in ([], ["/a"])  # the request after it, where it is certain that it begins there
        assert answers_in(answer) == 1 + len(application.paths)


def test_an_encoding_that_changes_nothing_and_capitals_are_taken():
    good = [
        GOOD.replace(b"host: h", b"host: h\r\nconnection: close\r\ncontent-encoding: Identity"),
        CHUNKED.replace(b"chunked", b"Chunked") + b"0\r\n\r\n",
        b"GET /a HTTP/1.0\r\n\r\n",
    ]
    for sent in good:
        assert noted(sent)[0].startswith(b"HTTP/1.1 200 "), sent


def test_what_can_not_be_read_is_told_after_the_answers_to_what_came_before():
    answer, application = noted(request("GET", "/yield", close=False) + 3 * request("GET", "/asgi", close=False) + b"\0\r\n\r\n" + GET)

    assert application.paths == ["/yield", "/asgi", "/asgi", "/asgi"]
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"] * 4 + [b"400"]


@pytest.mark.parametrize("before", [b"", request("GET", "/asgi", close=False)])
def test_a_body_that_breaks_gets_one_answer(before):
    answer, _ = noted(before + CHUNKED.replace(b"/a", b"/asgi"), b"2\r\n{}\r\n", b"nonsense\r\n")

    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"] * bool(before) + [b"400"]


def test_a_body_that_breaks_after_its_answer_ends_the_connection():
    class Early(Both):
        async def __call__(self, scope, receive, send):
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    async def main():
        async with serving(Early()) as (_, port):
            return await ask(port, CHUNKED.replace(b"connection: close\r\n", b"").replace(b"/a", b"/asgi"), b"nonsense\r\n")

    assert re.findall(rb"HTTP/1.1 (\d+)", asyncio.run(main())) == [b"413"]


def test_an_answer_before_the_body_was_asked_for_ends_the_connection():
    """A client that waits for "100 Continue" may leave the body out, and its next request would be taken for it."""
    answer, application = noted(
        request("POST", "/a", b"{}", close=False, expect="100-continue", content_encoding="gzip")[:-2], request("GET", "/next")
    )

    assert application.paths == []
    assert answer.startswith(b"HTTP/1.1 415 ") and answers_in(answer) == 1 and b"\r\nconnection: close\r\n" in answer


def test_what_can_not_be_read_is_told_to_the_log_once_a_minute(caplog, monkeypatch):
    monkeypatch.setattr(protocol, "_unreadable", protocol._Unreadable())

    async def main():
        async with serving(Both()) as (_, port):
            for _ in range(20):
                await ask(port, b"\0\r\n\r\n")
                await ask(port, request("GET", "/a", close=False, connection="upgrade", upgrade="foo"))

    asyncio.run(main())

    assert [line.levelname for line in caplog.records if line.levelname != "INFO"] == ["WARNING"]


@pytest.mark.parametrize("path", ["/a", "/asgi", "/stream"])
def test_who_sends_on_and_reads_nothing_is_not_listened_to(path):
    """Else each request that waits is a kilobyte or two, as long as somebody likes to send more."""
    waiting = []

    class Slow(Both):
        async def __call__(self, scope, receive, send):
            message = await receive()
            if scope["path"] == "/stream":  # it looks whether its client is still there
                listening = asyncio.ensure_future(receive())
                await asyncio.sleep(0)
                listening.cancel()
            await super().__call__(scope, lambda: asyncio.sleep(0, message), send)

    class Watched(Protocol):
        def _settle(self):
            super()._settle()
            waiting.append(len(self.pipeline))

    async def main():
        async with serving(Slow(), http=Watched) as (_, port):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.setblocking(False)
                await asyncio.sleep(0.1)
                one = request("GET", path, close=False)
                count = 1_000_000 // len(one)
                unsent = memoryview(one * count)
                for _ in range(100):
                    try:
                        unsent = unsent[connection.send(unsent) :]
                    except BlockingIOError:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                most = max(waiting)
                answers, last = 0, b""
                while answers < count:
                    try:
                        if unsent:
                            unsent = unsent[connection.send(unsent) :]
                    except BlockingIOError:
                        pass
                    try:
                        received = last + connection.recv(1_000_000)
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
                        continue
                    answers += received.count(b"HTTP/1.1 200 OK")
                    last = received[-14:]
                    await asyncio.sleep(0)
                return most, max(waiting), answers == count

    most, most_of_all, are_all_answered = asyncio.run(main())

    assert most <= most_of_all <= protocol.MAX_WAITING + protocol.PIECE // len(request("GET", path, close=False)) + 1
    assert are_all_answered


# --- What breaks ------------------------------------------------------------------------------------------------------


def test_an_application_that_breaks_ends_the_connection_and_no_other(caplog):
    async def main():
        async with serving(Both()) as (_, port):
            return await ask(port, request("GET", "/fail", close=False)), await ask(port, GET)

    failed, answered = asyncio.run(main())
    assert failed == b""
    assert "SystemError: on purpose" in caplog.text
    assert content(answered) == b"whole GET /a "


def test_a_client_that_asks_and_does_not_read_is_asked_to_wait():
    """Once its answers fill the buffers, no more requests of it are answered until it reads; then all are, in their order."""
    answered = []

    class Long(Both):
        async def _answer(self, method, path, body, peer):
            answered.append(path)
            text = path.encode() + b"x" * 50_000
            return 200, [(b"content-length", b"%d" % len(text))], text

        async def __call__(self, scope, receive, send):
            status, headers, body = await self._answer("", scope["path"], b"", "")
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def main():
        async with serving(Long()) as (_, port):
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.setblocking(False)
                await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
                reader, writer = await asyncio.open_connection(sock=connection, limit=10_000)
                for number in range(400):
                    writer.write(request("GET", f"/{number}", close=number == 399))
                await asyncio.sleep(0.5)
                before = len(answered)
                received = await asyncio.wait_for(reader.read(), 20)
                writer.close()
                return before, received

    before, received = asyncio.run(main())
    assert before < 200
    assert [int(number) for number in re.findall(rb"\r\n\r\n/(\d+)x", received)] == list(range(400))


def test_the_product_speaks_it():
    assert "core.protocol:Protocol" in command("web")
