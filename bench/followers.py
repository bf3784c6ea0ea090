"""A crowd that follows a poll's results (Server-Sent Events), in a process of its own: `python -m bench.followers PORT PATH FOLLOWERS`.

Says "ready" when each has had its first event; goes when its input ends, and then tells what came when.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import subprocess
import sys
import time
import typing
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import uvloop

from bench.contestants import PRODUCT, PRODUCT_CONNECTIONS, Bench, address, casts_of, measure_poll
from bench.figures import Values, percentile
from stack.folder import ROOT
from stack.load import get

FOLLOWERS = 2000
# Connecting at once; more would only wait in the server's backlog.
AT_ONCE = 50
PATIENCE_SECONDS = 60
# A number that is cut in two by the network has no comma behind it: the next event brings a later one.
TOTAL = re.compile(rb'"total_votes": ?(\d+),')
# Of all changes, how many are looked up.
LOOKED_AT = 200

# Of one follower: [[when it came (time.time), votes in it]].
Events = list[tuple[float, int]]


class _Follower(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self.request = request
        self.events: Events = []
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        typing.cast("asyncio.Transport", transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        at = time.time()
        if found := TOTAL.findall(data):
            self.events.append((at, int(found[-1])))
            if not self.began.done():
                self.began.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.began.done():
            self.began.set_exception(ConnectionError("a follower was refused"))


async def follow(port: int, path: str, followers: int) -> list[Events]:
    """Have them all follow until our input ends; return the events of each."""
    loop = asyncio.get_running_loop()
    crowd: list[_Follower] = []

    async def start(number: int) -> None:
        request = get(path, {"accept": "text/event-stream", "x-forwarded-for": address(number)})
        _, follower = await loop.create_connection(lambda: _Follower(request), "127.0.0.1", port)
        crowd.append(follower)
        await follower.began

    async with asyncio.timeout(PATIENCE_SECONDS):
        for begin in range(0, followers, AT_ONCE):
            await asyncio.gather(*(start(number) for number in range(begin, min(begin + AT_ONCE, followers))))
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    return [follower.events for follower in crowd]


@contextmanager
def following(port: int, path: str, followers: int) -> Iterator[list[Events]]:
    """A crowd that follows while the block runs; the list has each one's events afterwards."""
    command = [sys.executable, "-m", "bench.followers", str(port), path, str(followers)]
    events: list[Events] = []
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
        assert crowd.stdout
        if crowd.stdout.readline() != "ready\n":
            raise SystemExit("Not all followers had an event.")
        try:
            yield events
        except BaseException:
            crowd.terminate()
            raise
        events += json.loads(crowd.communicate("", timeout=PATIENCE_SECONDS)[0])


def is_streamed(port: int, path: str) -> bool:
    """Whether this version has the route."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", path, headers={"accept": "text/event-stream", "x-forwarded-for": address(0)})
        return (connection.getresponse().getheader("content-type") or "").startswith("text/event-stream")


def delays(counted_at: Sequence[float], events: Sequence[Events]) -> list[float]:
    """Return how long each follower waited for each change (seconds): from the count of a vote to the first event that has it.

    `counted_at`: when each vote was counted, in order. What no event has any more is left out: nobody was following then.
    """
    found = []
    step = max(1, len(counted_at) // LOOKED_AT)
    for of_one in events:
        totals = [total for _, total in of_one]
        for place in range(0, len(counted_at), step):
            event = bisect_left(totals, place + 1)
            if event < len(of_one):
                found.append(of_one[event][0] - counted_at[place])
    return found


def measure_stream(bench: Bench, followers: int = FOLLOWERS) -> Values:
    """Votes as fast as can be in a poll that so many follow; nothing where this version has no streams."""
    bench.have(*PRODUCT)
    poll, warm = bench.make_poll(), bench.votes // 10
    path = f"{poll['links']['results']}/stream"
    if not is_streamed(bench.port, path):
        return {}
    casts = casts_of(bench, poll, "client", warm + bench.votes)
    with following(bench.port, path, followers) as events:
        done = measure_poll(bench, poll, casts, warm, connections=PRODUCT_CONNECTIONS)
        time.sleep(2)  # until the last change has reached everybody
    counted_at = [
        float(at)
        for (at,) in bench.database.rows("SELECT extract(epoch FROM counted_at) FROM votes WHERE poll_id = %s ORDER BY 1", poll["id"])
    ]
    if missed := sum(not of_one or of_one[-1][1] != len(counted_at) for of_one in events):
        raise SystemExit(f"{missed:,} of {followers:,} followers did not see the last change: the figures would mean nothing.")
    waited = sorted(delays(counted_at, events))
    return {
        "stream.followers": followers,
        "stream.counted_per_s": done["counted_per_s"],
        "stream.answer_p99_ms": done["p99_ms"],
        "stream.event_p50_ms": percentile(waited, 0.5) * 1000,
        "stream.event_p99_ms": percentile(waited, 0.99) * 1000,
        "stream.events_per_follower": sum(map(len, events)) / followers,
    }


def main() -> None:
    port, path, followers = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(runner.run(follow(int(port), path, int(followers))), sys.stdout)


if __name__ == "__main__":
    main()
