"""`make demo`: a poll, a crowd of voters, and whether every vote was counted."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from bisect import bisect_left
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stack.load import Cast, cast_all, post

VOTES = 20_000
CLIENTS = 100
OPTIONS = ["Soup", "Salad", "Noodles"]
DEV_JSON = Path(".local/dev.json")
# How long the last vote may take to be counted (seconds).
PATIENCE = 60


def ask(url: str, body: object = None, **headers: str) -> Any:
    content = None if body is None else json.dumps(body).encode()
    # Behind a stack that trusts one proxy, too: it takes the address from there.
    request = urllib.request.Request(url, content, {"content-type": "application/json", "x-forwarded-for": "127.0.0.1", **headers})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def sign_in(dev: dict[str, Any]) -> str:
    """Return what the administrator of dev.json sends as Authorization."""
    tokens = ask(f"{dev['base_url']}/api/v1/auth/token", {"username": dev["admin_user"], "password": dev["admin_password"]})
    return f"Bearer {tokens['access']}"


def make_poll(dev: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Create a poll as the administrator of dev.json, for its API client and an hour unless `fields` say else; return it."""
    closes_at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    wanted = {"voter_policy": "client", "closes_at": closes_at, **fields}
    poll: dict[str, Any] = ask(f"{dev['base_url']}/api/v1/polls", wanted, authorization=sign_in(dev))
    return poll


def main() -> int:
    """Run the demo against the running stack; return 0 when the results are exact."""
    if not DEV_JSON.exists():
        print("Nothing runs here. Start it with `make up` in another terminal.", file=sys.stderr)
        return 1
    dev = json.loads(DEV_JSON.read_text())
    base = dev["base_url"]
    poll = make_poll(dev, title=f"Demo of {datetime.now(UTC):%Y-%m-%d %H:%M:%S}", options=[{"text": text} for text in OPTIONS])
    choices = [option["id"] for option in poll["options"]]
    # Three sevenths for the first: the results are known before the first vote is cast.
    chosen = [choices[number % 7 % len(choices)] for number in range(VOTES)]
    expected = Counter(chosen)
    key = {"authorization": f"Api-Key {dev['client_key']}"}
    casts = [
        Cast(post(poll["links"]["votes"], {"option": option, "voter": f"voter-{number}"}, {**key, "idempotency-key": str(number)}))
        for number, option in enumerate(chosen)
    ]
    print(f"{poll['title']}: {VOTES:,} voters, {CLIENTS} clients at once, one vote a request. Results: {base}{poll['links']['results']}")

    accepted_at: list[float] = []
    watcher = Watcher(f"{base}{poll['links']['results']}", accepted_at)
    started = time.perf_counter()
    watcher.start()
    port = int(base.rpartition(":")[2])
    cast_all(
        port, casts, connections=CLIENTS, on_answer=lambda cast: accepted_at.append(time.perf_counter()) if cast.status == 202 else None
    )
    accepting = time.perf_counter() - started
    watcher.join()

    seconds = sorted(cast.seconds for cast in casts)
    refused = Counter(cast.status for cast in casts if cast.status != 202)
    print(f"accepted  {len(accepted_at):,} of {VOTES:,} in {accepting:.1f} s: {len(accepted_at) / accepting:,.0f} a second")
    if refused:
        print(f"refused   {dict(refused)} (HTTP status: requests)")
    print(f"answers   half within {seconds[VOTES // 2] * 1000:.1f} ms, 99 % within {seconds[VOTES * 99 // 100] * 1000:.1f} ms")
    late = watcher.finished - started - accepting
    print(f"counted   {watcher.counted:,} of {VOTES:,}, {late:.2f} s after the last answer; largest lag seen {watcher.worst_lag:.2f} s")
    for option in watcher.results["options"]:
        wanted = expected[option["id"]]
        verdict = "exact" if option["votes"] == wanted else f"WRONG, expected {wanted:,}"
        print(f"  {option['text']:<10} {option['votes']:>7,}  {option['share']:6.1%}  {verdict}")
    exact = {option["id"]: option["votes"] for option in watcher.results["options"]} == expected
    print("The results are exact." if exact else "The results are NOT exact.")
    return 0 if exact else 1


class Watcher(threading.Thread):
    """Follows the results while votes come in: draws the bar, measures how far counting lags behind accepting."""

    def __init__(self, url: str, accepted_at: list[float]) -> None:
        super().__init__(daemon=True)
        self.url, self.accepted_at = url, accepted_at
        self.counted, self.worst_lag, self.finished = 0, 0.0, 0.0
        self.results: dict[str, Any] = {}

    def run(self) -> None:
        deadline = time.perf_counter() + PATIENCE
        with tqdm(total=VOTES, unit=" votes", desc="counted") as bar:
            while self.counted < VOTES and time.perf_counter() < deadline:
                asked = time.perf_counter()
                self.results = ask(self.url)
                self.counted = self.results["total_votes"]
                # The votes not in these results, but accepted before they were asked for, lag at least since then.
                accepted = bisect_left(self.accepted_at, asked)
                lag = asked - self.accepted_at[self.counted] if self.counted < accepted else 0.0
                self.worst_lag = max(self.worst_lag, lag)
                bar.set_postfix(accepted=f"{len(self.accepted_at):,}", lag=f"{lag:.2f} s")
                bar.update(self.counted - bar.n)
                time.sleep(0.1)
        self.finished = time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
