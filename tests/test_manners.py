"""What every answer has, whichever door it comes from: CORS, request ids, problems, and a word before an address goes."""

import asyncio
import http.client
import json
import socket
from datetime import UTC, datetime
from uuid import UUID

import msgspec
import pytest

from core import deprecations
from core.deprecations import Deprecation
from polls import problems
from polls.counting import count_votes
from tests.conftest import Api, answers, free_port, vote_of, wait_until, web
from tests.test_intake import assert_refused

ORIGIN = "https://vote.example.org"


@pytest.fixture(scope="module")
def for_browsers(pipeline, tmp_path_factory):
    port = free_port()
    with web(port, tmp_path_factory.mktemp("cors") / "web.log", CORS_ALLOWED_ORIGINS=ORIGIN):
        wait_until(lambda: answers(port))
        yield Api(port, {})


def paths_of(poll):
    """A hot route, and one of Django's."""
    return f"/api/v1/polls/{poll.pk}/results", f"/api/v1/polls/{poll.pk}"


def test_a_page_of_an_allowed_origin_may_read_the_answer(for_browsers, poll):
    for path in paths_of(poll):
        answer = for_browsers.get(path, origin=ORIGIN)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "RateLimit" in answer.headers["access-control-expose-headers"]
        assert for_browsers.get(path, origin="https://evil.example.org").headers["access-control-allow-origin"] is None
        assert for_browsers.get(path).headers["access-control-allow-origin"] is None


def test_a_browser_may_ask_before_it_casts(for_browsers, poll):
    path = f"/api/v1/polls/{poll.pk}/votes"
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "content-type,idempotency-key,voter-token"}

    allowed, refused = (
        for_browsers.send("OPTIONS", path, origin=ORIGIN, **asked),
        for_browsers.send("OPTIONS", path, origin="null", **asked),
    )

    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert {"idempotency-key", "voter-token"} <= {
        name.strip().lower() for name in allowed.headers["access-control-allow-headers"].split(",")
    }
    assert refused.status == 400 and refused.headers["access-control-allow-origin"] is None


def test_without_the_setting_no_origin_is_allowed(api, poll):
    for path in paths_of(poll):
        assert api.get(path, origin=ORIGIN).headers["access-control-allow-origin"] is None


def test_a_request_keeps_the_id_that_the_client_gave_it(api, poll):
    for path in (*paths_of(poll), "/api/v1/nothing"):
        assert api.get(path, x_request_id="req-1/a:b").headers["x-request-id"] == "req-1/a:b"


@pytest.mark.parametrize("bad", ["two words", "x" * 65, "a\tb", "\xe9", ""])
def test_an_id_that_is_none_is_replaced(api, poll, bad):
    for path in paths_of(poll):
        given = api.get(path, x_request_id=bad).headers["x-request-id"]
        assert len(given) == 16 and given != bad


def test_the_name_of_a_request_is_not_its_votes(api, poll):
    answer = api.cast(poll, "alice", idempotency_key="alice-1")

    given = answer.headers["x-request-id"]
    vote_id = UUID(answer.json["id"]).hex
    assert len(given) == 16 and all(given[start : start + 6] not in vote_id for start in range(11))


def test_the_workers_log_names_the_request_of_a_vote_that_does_not_stand(api, poll, tmp_path_factory):
    api.cast(poll, "alice-the-voter", prefer="wait=10", x_request_id="request-one")
    refused = api.cast(poll, "alice-the-voter", "salad", prefer="wait=10", x_request_id="request-two")

    assert refused.status == 409
    (log,) = [path for path in tmp_path_factory.getbasetemp().glob("pipeline*/worker.log") if not path.parent.is_symlink()]
    wait_until(lambda: "rejected, duplicate; request request-two" in log.read_text())
    assert "alice-the-voter" not in log.read_text()


def test_every_decision_is_logged_with_its_request_where_that_is_wanted(poll, caplog):
    with caplog.at_level("DEBUG", logger="polls.counting"):
        vote = msgspec.structs.replace(vote_of(poll, "alice"), request_id="request-one")
        count_votes([vote])

    assert f"vote {vote.vote_id}: counted; request request-one" in caplog.text


def test_what_is_nowhere_is_a_problem_and_no_page(api):
    for path in ("/api/v1/nothing", "/api/v2/polls", "/api/v1/polls/not-a-uuid", "/api/v1/a%0Ab", "/api/"):
        assert_refused(api.get(path, accept="text/html"), problems.NOT_FOUND)


def test_django_takes_no_body_without_end(owners_api):
    """By its stated length before a byte of it is read, and chunk by chunk where none is stated."""
    assert_refused(owners_api.post("/api/v1/polls", b" " * 1_000_001), problems.TOO_LARGE)
    with socket.create_connection(("127.0.0.1", owners_api.port), timeout=10) as connection:
        connection.sendall(
            b"POST /api/v1/polls HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(100):
                connection.sendall(b"186A0\r\n" + b" " * 100_000 + b"\r\n")
        except OSError:
            pass  # refused before it was all sent
        assert b" 413 " in connection.recv(1000).partition(b"\r\n")[0]


def test_a_body_in_chunks_is_a_body_like_any_other(owners_api):
    body = json.dumps(
        {"title": "Lunch", "options": [{"text": "soup"}, {"text": "salad"}], "voter_policy": "ip", "closes_at": "2099-01-01T00:00:00Z"}
    )
    connection = http.client.HTTPConnection("127.0.0.1", owners_api.port, timeout=10)
    try:
        chunks = (body[start : start + 20].encode() for start in range(0, len(body), 20))
        connection.request("POST", "/api/v1/polls", chunks, {**owners_api.headers, "content-type": "application/json"}, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["title"]) == (201, "Lunch")
    finally:
        connection.close()


def test_an_address_that_will_go_says_so(monkeypatch):
    old = Deprecation(datetime(2027, 1, 1, tzinfo=UTC), datetime(2027, 7, 1, tzinfo=UTC), "/docs/moving")

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"etag", b"x")]})

    def headers_of(path):
        sent = []

        async def send(message):
            sent.append(message)

        asyncio.run(deprecations.announced(answer, {"/api/v0/": old})({"type": "http", "path": path}, None, send))
        return dict(sent[0]["headers"])

    assert headers_of("/api/v1/polls") == {b"etag": b"x"}
    assert headers_of("/api/v0/polls") == {
        b"etag": b"x",
        b"deprecation": b"@1798761600",
        b"sunset": b"Thu, 01 Jul 2027 00:00:00 GMT",
        b"link": b'</docs/moving>; rel="deprecation"',
    }
    assert deprecations.announced(answer, {}) is answer
