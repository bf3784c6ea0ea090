"""Throttling: who asks too often is told when to come back; the hot routes, Django's and other processes count together."""

import time
from contextlib import contextmanager

import pytest

from polls import problems, throttling
from polls.throttling import Throttle
from tests.conftest import PASSWORD, Api, answers, free_port, option, wait_until, web
from tests.test_intake import assert_refused


@contextmanager
def limited(tmp_path, **environment):
    """A web process with limits, behind one trusted proxy; its API without an address."""
    port = free_port()
    with web(port, tmp_path / f"{port}.log", TRUSTED_PROXIES="1", **environment):
        wait_until(lambda: answers(port))
        if time.time() % 60 > 55:  # the limits are by the minute of the clock
            time.sleep(60.1 - time.time() % 60)
        yield Api(port, {})


def fields(answer):
    return {part.split("=")[0]: part.split("=")[1] for part in answer.headers["ratelimit"].split(";")[1:]}


def test_an_address_that_asks_too_often_is_told_when_to_come_back(tmp_path, poll):
    paths = ["/api/v1/polls", f"/api/v1/polls/{poll.pk}/results", "/api/v1/votes/x", f"/api/v1/polls/{poll.pk}", "/api/v1/auth/me"]
    with limited(tmp_path, ADDRESS_REQUESTS_PER_MINUTE="5") as api:
        allowed = [api.get(path, x_forwarded_for="192.0.2.1") for path in paths]
        refused = [api.get(path, x_forwarded_for="192.0.2.1") for path in paths]
        neighbour = api.get(paths[0], x_forwarded_for="192.0.2.2")
        alive = api.get("/healthz")

    assert [answer.status for answer in allowed] == [200, 200, 404, 200, 401]
    assert [int(fields(answer)["r"]) for answer in allowed] == [4, 3, 2, 1, 0]
    assert allowed[0].headers["ratelimit-policy"] == '"address";q=5;w=60'
    for answer in refused:
        assert_refused(answer, problems.TOO_MANY_REQUESTS)
        assert 0 < int(answer.headers["retry-after"]) <= 60
    assert (neighbour.status, alive.status) == (200, 200)


def test_an_api_client_is_counted_by_itself_and_a_batch_by_its_votes(tmp_path, poll, client_key):
    batch = [{"option": str(option(poll, "soup")), "voter": f"voter {n}"} for n in range(6)]
    path = f"/api/v1/polls/{poll.pk}/votes/batch"
    key = {"authorization": f"Api-Key {client_key}", "x_forwarded_for": "192.0.2.1"}
    with limited(tmp_path, ADDRESS_REQUESTS_PER_MINUTE="1", CLIENT_VOTES_PER_MINUTE="10") as api:
        first, second = api.post(path, batch, **key), api.post(path, batch, **key)
        in_django = api.get("/api/v1/polls", **key)
        listed = api.get("/api/v1/polls", x_forwarded_for="192.0.2.1")

    assert first.status == 200 and fields(first)["r"] == "4"
    assert_refused(second, problems.TOO_MANY_REQUESTS)
    assert_refused(in_django, problems.TOO_MANY_REQUESTS)
    assert listed.status == 200


def test_guessing_passwords_and_codes_is_slow(tmp_path, make_poll, owner):
    poll = make_poll(voter_policy="code")
    wrong_code = {"option": str(option(poll, "soup")), "code": "0000-0000-0000"}
    with limited(tmp_path, ATTEMPTS_PER_MINUTE="3") as api:
        signed = [
            api.post("/api/v1/auth/token", {"username": "olga", "password": password}, x_forwarded_for="192.0.2.1").status
            for password in ("a", "b", "c", PASSWORD)
        ]
        cast = [api.post(f"/api/v1/polls/{poll.pk}/votes", wrong_code, x_forwarded_for="192.0.2.2").status for _ in range(4)]
        elsewhere = api.post("/api/v1/auth/token", {"username": "olga", "password": PASSWORD}, x_forwarded_for="192.0.2.3")

    assert signed == [401, 401, 401, 429]
    assert cast == [403, 403, 403, 429]
    assert elsewhere.status == 200


def test_processes_with_a_common_cache_count_together(tmp_path):
    shared = {"CACHE_URL": f"filecache://{tmp_path}/cache", "ADDRESS_REQUESTS_PER_MINUTE": "20"}
    with limited(tmp_path, **shared) as one, limited(tmp_path, **shared) as other:
        for _ in range(20):
            assert one.get("/api/v1/polls", x_forwarded_for="192.0.2.1").status == 200
        # Two are worth telling of. Then it learns of the other's twenty, long before it has seen so many itself.
        asked = [other.get("/api/v1/polls", x_forwarded_for="192.0.2.1").status for _ in range(2)]
        while asked[-1] == 200 and len(asked) < 15:
            time.sleep(0.25)
            asked.append(other.get("/api/v1/polls", x_forwarded_for="192.0.2.1").status)

        assert asked[-1] == 429
        assert other.get("/api/v1/polls", x_forwarded_for="192.0.2.2").status == 200


def test_a_cache_that_is_away_changes_nothing(tmp_path):
    away = {"CACHE_URL": f"redis://127.0.0.1:{free_port()}/0", "ADDRESS_REQUESTS_PER_MINUTE": "5"}
    with limited(tmp_path, **away) as api:
        statuses = [api.get("/api/v1/polls", x_forwarded_for="192.0.2.1").status for _ in range(4)]
        time.sleep(1.2 * throttling.SHARE_SECONDS)
        statuses += [api.get("/api/v1/polls", x_forwarded_for="192.0.2.1").status for _ in range(2)]

    assert statuses == [200] * 5 + [429]


def test_a_new_minute_begins_at_nothing(monkeypatch):
    moment = [1_800_000_000.0]
    monkeypatch.setattr(throttling.time, "time", lambda: moment[0])
    throttle = Throttle("address", 2)

    assert [throttle.take("x").is_exceeded for _ in range(3)] == [False, False, True]
    moment[0] += 59.9
    assert throttle.take("x").reset_seconds == 1
    moment[0] += 0.1
    assert not throttle.take("x").is_exceeded


@pytest.mark.parametrize("cost", [1, 1000])
def test_no_limit_lets_everything_pass_and_promises_nothing(cost):
    rate = Throttle("address", 0).take("x", cost)

    assert not rate.is_exceeded and rate.fields == []
