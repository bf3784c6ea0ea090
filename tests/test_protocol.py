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

from core import deprecations
from core.__main__ import command
from core.protocol import Protocol
from tests.conftest import option, tallies, wait_until
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
        answering = application.answer_whole("GET", path, list(headers), b"", "127.0.0.1")
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


# --- Any application --------------------------------------------------------------------------------------------------


class Both:
    """Tells which way a request came: `whole` by the short one, `asgi` by the other."""

    def __init__(self):
        self.go = None

    def answer_whole(self, method, path, headers, body, peer):
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
    plain = {"port": 0, "loop": "uvloop", "lifespan": "off", "log_config": None, "proxy_headers": False}
    config = uvicorn.Config(application, http=Protocol, **plain, **chosen)
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
    "with a fragment": ([request("GET", "/a#b")], b"asgi GET /a "),
    "as to a proxy": ([request("GET", "http://h/a")], b"asgi GET /a "),
    "to be upgraded": ([request("GET", "/a", close=False, connection="upgrade, close", upgrade="h2c")], b"asgi GET /a "),
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
