"""Following: results as they change, for many at once, who can neither hold each other up nor keep the process from ending."""

import asyncio
import http.client
import json
import re
import resource
import signal
import socket
import time
from contextlib import asynccontextmanager, contextmanager

import pytest
import uvicorn
from django.utils.timezone import now

from polls import closing, following, problems
from polls.counting import count_votes
from polls.following import HEADERS, Event, Following
from tests.conftest import ROOT, Api, answers, free_port, vote_of, wait_until, web
from tests.test_intake import assert_refused


def stream_of(poll):
    return f"/api/v1/polls/{poll.pk}/results/stream"


class Stream:
    """An open stream, read as a browser's EventSource does."""

    def __init__(self, response):
        self.status, self.headers = response.status, response.headers
        self._response = response

    def next(self):
        """The fields of the next part, as they came; None once the stream has ended as it should."""
        fields = {}
        while (line := self._response.readline().decode()) not in ("\n", ""):
            name, _, value = line.rstrip("\n").partition(":")
            fields[name] = value.removeprefix(" ")
        return fields if line else None

    def next_results(self):
        part = {}
        while "data" not in part:
            part = self.next()
            assert part is not None, "it has ended"
        return json.loads(part["data"])


@contextmanager
def followed(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        yield Stream(connection.getresponse())
    finally:
        connection.close()


def finalise(poll):
    closing.close_expired_polls(now())
    closing.finalise_polls(now(), [poll.pk])


# --- Over HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [b"BAD\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b""])
def test_who_goes_in_the_middle_of_something_takes_no_other_follower_along(api, poll, more):
    with followed(api.port, stream_of(poll)) as stream:
        stream.next(), stream.next()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", api.port), timeout=10) as odd:
                odd.sendall(f"GET {stream_of(poll)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() + more)
                assert b" 200 " in odd.recv(1000)
        time.sleep(0.5)
        for voter in ("alice", "bob", "carol"):
            api.cast(poll, voter)
            stream.next()


def test_a_follower_gets_the_results_and_then_each_change(api, poll):
    with followed(api.port, stream_of(poll)) as stream:
        begin, first = stream.next(), stream.next()
        read = api.get(f"/api/v1/polls/{poll.pk}/results", authorization=None)
        api.cast(poll, "alice")
        second = stream.next()

    assert 1000 <= int(begin["retry"]) <= 5000
    assert (first["event"], second["event"]) == ("results", "results")
    assert {**json.loads(first["data"]), "as_of": ""} == {**read.json, "as_of": ""}
    assert first["id"] == read.headers["etag"].removeprefix("W/").strip('"') != second["id"]
    assert [json.loads(event["data"])["total_votes"] for event in (first, second)] == [0, 1]


def test_a_stream_is_neither_kept_nor_buffered_nor_sized(api, poll):
    with followed(api.port, stream_of(poll), x_request_id="mine") as stream:
        told = {name: stream.headers[name] for name in ("content-type", "cache-control", "x-accel-buffering", "x-request-id")}

        assert stream.status == 200
        assert "content-length" not in stream.headers
    assert told == {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no", "x-request-id": "mine"}


def test_a_page_of_another_origin_is_streamed_to_as_well(api, poll):
    with followed(api.port, stream_of(poll), origin="https://vote.example.org") as stream:
        assert "origin" in stream.headers["vary"].lower()
        assert stream.next_results()["total_votes"] == 0
        api.cast(poll, "alice")
        assert stream.next_results()["total_votes"] == 1


def test_who_comes_back_gets_what_is_new_and_nothing_twice(api, poll):
    with followed(api.port, stream_of(poll)) as stream:
        stream.next()
        has = stream.next()["id"]
    with followed(api.port, stream_of(poll), last_event_id=has) as same, followed(api.port, stream_of(poll), last_event_id="old") as other:
        assert other.next_results()["total_votes"] == 0
        api.cast(poll, "alice")
        assert same.next_results()["total_votes"] == 1


@pytest.mark.parametrize("slash", ["", "/"])
def test_other_methods(api, poll, slash):
    head = api.send("HEAD", stream_of(poll) + slash)
    assert (head.status, head.text, head.headers["content-type"], head.headers["content-length"]) == (200, "", "text/event-stream", None)
    refused = api.post(stream_of(poll) + slash, {})
    assert_refused(refused, problems.WRONG_METHOD)
    assert refused.headers["allow"] == "GET, HEAD"


# --- Who may ----------------------------------------------------------------------------------------------------------


def test_an_unknown_poll_and_a_draft_are_not_there(owners_api, api, make_poll):
    draft = make_poll(draft=True)
    for asked in (api.get("/api/v1/polls/1/results/stream"), api.get(stream_of(draft)), owners_api.get(stream_of(draft))):
        assert_refused(asked, problems.UNKNOWN_POLL)


@pytest.mark.parametrize("visibility", ["after_vote", "after_close", "owner"])
def test_only_what_everybody_may_read_is_streamed(owners_api, api, make_poll, visibility):
    poll = make_poll(results_visibility=visibility)

    for caller in (Api(api.port, {}), owners_api, api):
        refused = caller.get(stream_of(poll))
        assert_refused(refused, problems.RESULTS_HIDDEN)
        assert "without /stream" in refused.json["detail"]
    over = make_poll(results_visibility="after_close", closes_in=-1)
    with followed(api.port, stream_of(over)) as stream:
        assert stream.next_results()["status"] == "closing"


def test_who_has_voted_follows_what_is_for_voters(api, make_poll):
    poll, other = make_poll(results_visibility="after_vote"), make_poll(results_visibility="after_vote")
    receipt = api.cast(poll, "alice", prefer="wait=10").json["receipt"]

    assert_refused(api.get(stream_of(other), vote_receipt=receipt), problems.RESULTS_HIDDEN)
    with followed(api.port, stream_of(poll), vote_receipt=receipt) as stream:
        while stream.next_results()["total_votes"] < 1:
            pass


# --- The end ----------------------------------------------------------------------------------------------------------


def test_final_results_end_the_stream_and_whoever_has_them_is_told_to_stay_away(api, make_poll):
    poll = make_poll(closes_in=-600)
    count_votes([vote_of(poll, "alice")])
    with followed(api.port, stream_of(poll)) as stream:
        assert stream.next_results()["is_final"] is False
        finalise(poll)
        last = stream.next()
        assert json.loads(last["data"])["is_final"] is True
        assert stream.next() is None

    with followed(api.port, stream_of(poll), last_event_id=last["id"]) as again:
        assert (again.status, again.headers["content-length"]) == (204, None)
    with followed(api.port, stream_of(poll), last_event_id="old") as late:
        assert late.next()["id"] == last["id"]
        assert late.next() is None


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop_waits_for_no_follower(tmp_path, poll, broker, sent):
    port = free_port()
    with web(port, tmp_path / "web.log") as process:
        wait_until(lambda: answers(port))
        with followed(port, stream_of(poll)) as one, followed(port, stream_of(poll)) as other:
            assert (one.next_results()["total_votes"], other.next_results()["total_votes"]) == (0, 0)
            asked_at = time.monotonic()
            process.send_signal(sent)

            assert (one.next(), other.next()) == (None, None)
            process.wait(10)
            assert time.monotonic() - asked_at < 3


def test_there_is_room_for_so_many_and_for_a_tenth_of_them_from_one_address(tmp_path, poll, broker):
    port = free_port()
    limits = {"FOLLOWERS_MAX": "21", "TRUSTED_PROXIES": "1", "ADDRESS_REQUESTS_PER_MINUTE": "50"}
    with web(port, tmp_path / "web.log", **limits):
        wait_until(lambda: answers(port))

        def ask(n):
            return Api(port, {}).get(stream_of(poll), x_forwarded_for=f"192.0.2.{n}")

        with followed(port, stream_of(poll), x_forwarded_for="192.0.2.1") as first:
            assert first.next_results()["total_votes"] == 0
            assert "ratelimit" in first.headers  # a request like any other
            with followed(port, stream_of(poll), x_forwarded_for="192.0.2.1") as second:
                assert second.status == 200
                third = ask(1)
                assert_refused(third, problems.TOO_MANY_REQUESTS)
                assert int(third.headers["retry-after"]) >= 1

                streams = [followed(port, stream_of(poll), x_forwarded_for=f"192.0.2.{n}") for n in range(2, 21)]
                assert {stream.__enter__().status for stream in streams} == {200}
                refused = ask(99)
                assert_refused(refused, problems.UNAVAILABLE)
                assert int(refused.headers["retry-after"]) >= 1
                assert Api(port, {}).get(f"/api/v1/polls/{poll.pk}/results", x_forwarded_for="192.0.2.99").status == 200
                for stream in streams:
                    stream.__exit__(None, None, None)

        wait_until(lambda: head_of(port, poll, 1) == 200)  # the clients are gone, and with them what they took


def head_of(port, poll, n):
    return Api(port, {}).send("HEAD", stream_of(poll), x_forwarded_for=f"192.0.2.{n}").status


# --- Inside a process -------------------------------------------------------------------------------------------------


class Tallies:
    """Results that a test changes."""

    def __init__(self):
        self.votes, self.is_final, self.reads, self.refusal = 0, False, 0, None

    async def read(self, subject):
        self.reads += 1
        if self.refusal:
            raise self.refusal
        return b'W/"%d"' % self.votes, json.dumps({"total_votes": self.votes, "is_final": self.is_final}).encode()


class Client:
    """The far end of a stream, in the same process."""

    def __init__(self):
        self.seen, self.has_room, self.is_gone = [], asyncio.Event(), asyncio.Event()
        self.has_room.set()
        self.has_ended = False

    async def receive(self):
        await self.is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.has_room.wait()  # as uvicorn does, before it writes
        assert not self.has_ended
        if message["type"] == "http.response.body":
            self.seen += message.get("body", b"").decode().split("\n\n")[:-1]
            self.has_ended = not message.get("more_body")

    @property
    def votes(self):
        return [json.loads(part.rpartition("data: ")[2])["total_votes"] for part in self.seen if "data" in part]


async def until(claim):
    async with asyncio.timeout(10):
        while not claim():  # noqa: ASYNC110 - many things are waited for
            await asyncio.sleep(0.005)


@asynccontextmanager
async def following_by(number, tallies, monkeypatch, last_id=b"", **fields):
    """Clients that follow; the tallies are looked at often."""
    for name, value in {"_LOOK_SECONDS": 0.01, "_REST": 0, **fields}.items():
        monkeypatch.setattr(following, name, value)
    keeper, clients = Following(tallies.read), [Client() for _ in range(number)]
    event = Event(*await tallies.read(("a", False)))
    streams = [
        asyncio.create_task(keeper.admit(("a", False), event, last_id, str(n)).follow("GET", HEADERS, client.receive, client.send))
        for n, client in enumerate(clients)
    ]
    await until(lambda: keeper._count == number)
    yield keeper, clients
    for client in clients:
        client.is_gone.set()
        client.has_room.set()
    await asyncio.gather(*streams)
    assert (keeper._count, keeper._addresses, keeper._followed) == (0, {}, {})
    await until(keeper._looking.done)  # nobody follows: nobody looks


def test_one_look_serves_all_who_follow(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(300, tallies, monkeypatch, _LOOK_SECONDS=0.05) as (_, clients):
            began = tallies.reads, time.monotonic()
            for votes in (1, 2, 3):
                tallies.votes = votes
                await until(lambda votes=votes: all(client.votes[-1:] == [votes] for client in clients))
            assert tallies.reads - began[0] <= (time.monotonic() - began[1]) / 0.05 + 1
        assert all(client.votes == [0, 1, 2, 3] for client in clients)

    asyncio.run(main())


def test_what_has_not_changed_is_not_sent_again(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(2, tallies, monkeypatch) as (_, clients):
            await until(lambda: tallies.reads > 5)
        assert [client.votes for client in clients] == [[0], [0]]
        async with following_by(2, tallies, monkeypatch, last_id=b"0") as (_, clients):
            await until(lambda: tallies.reads > 10)
        assert [client.votes for client in clients] == [[], []]

    asyncio.run(main())


def test_who_comes_while_the_others_are_told_something_is_told_it_too(monkeypatch):
    async def main():
        tallies, late = Tallies(), Client()
        async with following_by(1, tallies, monkeypatch) as (keeper, [early]):
            old = Event(*await tallies.read(("a", False)))
            tallies.votes = 1
            await until(lambda: early.votes == [0, 1])
            stream = asyncio.create_task(keeper.admit(("a", False), old, b"", "x").follow("GET", HEADERS, late.receive, late.send))
            await until(lambda: late.votes == [1])
            late.is_gone.set()
            await stream

    asyncio.run(main())


def test_a_slow_follower_holds_nobody_up_and_gets_what_is_newest(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(3, tallies, monkeypatch) as (_, (slow, *others)):
            slow.has_room.clear()
            for votes in (1, 2, 3):
                tallies.votes = votes
                await until(lambda votes=votes: all(client.votes[-1] == votes for client in others))
            slow.has_room.set()
            await until(lambda: slow.votes[-1] == 3)
            tallies.votes = 4
            await until(lambda: slow.votes[-1] == 4)
        assert [client.votes for client in others] == [[0, 1, 2, 3, 4]] * 2
        assert slow.votes == [0, 3, 4]

    asyncio.run(main())


def test_a_slow_follower_misses_states_but_no_part_of_one_on_a_real_connection(monkeypatch):
    """Rests on uvicorn: it waits for room before it writes, and never after."""
    monkeypatch.setattr(following, "_LOOK_SECONDS", 0.001)
    monkeypatch.setattr(following, "_REST", 0)
    states = iter(range(1_000_000))

    async def read(subject):
        state = next(states)
        return b'"%d"' % state, json.dumps({"state": state, "is_final": False, "text": "x" * 50_000}).encode()

    keeper = Following(read)

    async def application(scope, receive, send):
        event = Event(*await read(("a", False)))
        await keeper.admit(("a", False), event, b"", "192.0.2.1").follow("GET", HEADERS, receive, send)

    async def events(reader):
        while line := await reader.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])

    async def main():
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(application, port=port, http="httptools", lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=connection, limit=100_000)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            await until(lambda: keeper._followed)
            [followed] = keeper._followed.values()
            [follower] = followed.followers
            await until(lambda: follower._catching_up)
            full_at = int(followed.newest.id)
            await until(lambda: int(followed.newest.id) > full_at + 20)

            seen = []
            async for event in events(reader):
                seen.append(event["state"])
                if seen[-1] > full_at + 20:
                    break
            writer.close()
        await until(lambda: not keeper._followed)
        server.should_exit = True
        await serving
        assert seen == sorted(set(seen))
        assert not set(range(full_at + 1, full_at + 20)) & set(seen)

    asyncio.run(main())


def test_a_silent_poll_is_kept_alive_by_pings(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(2, tallies, monkeypatch, PING_SECONDS=0.05) as (_, clients):
            await until(lambda: all(client.seen.count(":") >= 2 for client in clients))
        assert [client.votes for client in clients] == [[0], [0]]

    asyncio.run(main())


def test_while_the_database_is_away_followers_stay_and_then_go_on(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(2, tallies, monkeypatch, PING_SECONDS=0.05) as (_, clients):
            tallies.refusal, reads = problems.UNAVAILABLE.says("Away."), tallies.reads
            await until(lambda: tallies.reads > reads + 3 and all(":" in client.seen for client in clients))
            assert not any(client.has_ended for client in clients)
            tallies.refusal, tallies.votes = None, 1
            await until(lambda: all(client.votes == [0, 1] for client in clients))

    asyncio.run(main())


@pytest.mark.parametrize("problem", [problems.RESULTS_HIDDEN, problems.UNKNOWN_POLL])
def test_results_that_are_hidden_again_are_followed_no_more(monkeypatch, problem):
    async def main():
        tallies = Tallies()
        async with following_by(2, tallies, monkeypatch) as (keeper, clients):
            tallies.refusal, tallies.votes = problem.says("Hidden."), 1
            await until(lambda: all(client.has_ended for client in clients))
            assert [client.votes for client in clients] == [[0], [0]]
            assert keeper._count == 0

    asyncio.run(main())


def test_a_stream_ends_by_itself(monkeypatch):
    async def main():
        async with following_by(3, Tallies(), monkeypatch, LIFE_SECONDS=(0.05, 0.3)) as (keeper, clients):
            await until(lambda: all(client.has_ended for client in clients))
            assert keeper._count == 0

    asyncio.run(main())


def test_the_last_results_reach_a_slow_follower_before_its_stream_ends(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(1, tallies, monkeypatch) as (keeper, [slow]):
            slow.has_room.clear()
            tallies.votes, tallies.is_final = 7, True
            await until(lambda: keeper._count == 0)
            slow.has_room.set()
            await until(lambda: slow.has_ended)
        assert slow.votes == [0, 7]

    asyncio.run(main())


def test_one_that_does_not_read_keeps_its_stream_from_ending_for_a_moment_only(monkeypatch):
    async def main():
        tallies = Tallies()
        async with following_by(1, tallies, monkeypatch, _END_SECONDS=0.05) as (keeper, [stuck]):
            stuck.has_room.clear()
            tallies.votes = 1
            await until(lambda: all(follower._catching_up for follower in keeper._followed["a", False].followers))
            keeper.end()
            await until(lambda: keeper._count == 0)
            await asyncio.sleep(0.1)
        assert (stuck.votes, stuck.has_ended) == ([0], False)

    asyncio.run(main())


def test_who_comes_while_the_final_results_are_told_gets_them_and_ends(monkeypatch):
    async def main():
        tallies, late = Tallies(), Client()
        async with following_by(1, tallies, monkeypatch) as (keeper, [early]):
            old = Event(*await tallies.read(("a", False)))
            early.has_room.clear()
            tallies.votes, tallies.is_final = 1, True
            keeper._followed["a", False].newest = Event(*await tallies.read(("a", False)))
            await asyncio.wait_for(keeper.admit(("a", False), old, b"", "x").follow("GET", HEADERS, late.receive, late.send), 5)
        assert (late.votes, late.has_ended) == ([1], True)

    asyncio.run(main())


def test_nobody_new_follows_a_process_that_ends():
    async def main():
        tallies = Tallies()
        keeper = Following(tallies.read)
        event = Event(*await tallies.read(("a", False)))
        admitted, client = keeper.admit(("a", False), event, b"", "192.0.2.1"), Client()
        keeper.end()
        await asyncio.wait_for(admitted.follow("GET", HEADERS, client.receive, client.send), 5)
        assert (client.votes, client.has_ended) == ([0], True)
        with pytest.raises(problems.Refusal) as refused:
            keeper.admit(("a", False), event, b"", "192.0.2.1")
        assert refused.value.problem is problems.UNAVAILABLE

    asyncio.run(main())


def test_many_followers_leave_a_process_time_for_votes(monkeypatch):
    """A look that takes long is followed by a longer rest."""

    async def main():
        tallies = Tallies()
        read = tallies.read

        async def slow_read(subject):
            await asyncio.sleep(0.05)
            return await read(subject)

        tallies.read = slow_read
        async with following_by(1, tallies, monkeypatch, _REST=3):
            began = tallies.reads, time.monotonic()
            await asyncio.sleep(0.5)
            assert 1 <= tallies.reads - began[0] <= (time.monotonic() - began[1]) / (4 * 0.05) + 1

    asyncio.run(main())


@pytest.mark.parametrize("front", ["nginx/nginx.conf", "kubernetes/ingress.yaml"])
def test_a_front_waits_for_longer_than_a_stream_is_silent(front):
    [seconds] = re.findall(r"proxy[_-]read[_-]timeout:? \"?(\d+)", (ROOT / "deploy" / front).read_text())
    assert int(seconds) >= 1.5 * following.PING_SECONDS


def test_an_event_is_one_line_of_data():
    event = Event(b'W/"abc"', b'{"is_final":true}')

    assert event.message["body"] == b'event: results\nid: abc\ndata: {"is_final":true}\n\n'
    assert event.is_final


def test_a_process_may_open_as_many_files_as_followers_need_or_takes_fewer(monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for limits, allowed, changed in [
        ((1024, 50_000), 20_000, [(20_000, 50_000)]),
        ((1024, 4096), 4096, [(4096, 4096)]),
        ((30_000, 50_000), 30_000, []),
        ((1024, resource.RLIM_INFINITY), 20_000, [(20_000, resource.RLIM_INFINITY)]),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 20_000, []),
    ]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        set_to.clear()
        assert following._allow_files(20_000) == allowed
        assert set_to == changed
