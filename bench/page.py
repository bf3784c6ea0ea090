"""docs/performance.md as text, from what `make bench` and bench.scale wrote: every figure in it comes from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.figures import shown

# As the page calls them, in its order.
CONTESTANTS = {
    "product_single": "this product, one vote a request",
    "product_single_64": "the same, as few clients as the peers",
    "product_batch": "this product, 1,000 votes a request",
    "task_per_vote": "one Celery task per vote",
    "sync_drf": "DRF and PostgreSQL, a counter",
    "sync_drf_count": "DRF and PostgreSQL, COUNT(*)",
    "policy_ip": "this product, policy `ip`",
    "policy_session": "this product, policy `session`",
    "policy_account": "this product, policy `account`",
    "policy_code": "this product, policy `code`",
}
LIMITS = {
    "noop_http_per_s": "nothing behind the server",
    "noop_whole_per_s": "nothing behind the server, below ASGI",
    "confirmed_publish_per_s": "confirmed messages of one vote",
    "bulk_insert_per_s": "bare bulk INSERT",
    "single_commits_per_s": "commits of one row",
    "generator_per_s": "the load generator alone",
}
READS = {
    "product": "this product",
    "noop": "nothing behind the server",
    "noop_whole": "nothing behind the server, below ASGI",
    "sync_drf": "DRF, counters",
    "sync_drf_count": "DRF, COUNT(*)",
}
# {plot: what it shows}, as bench/report.py draws them.
PLOTS = {
    "votes": "Votes a second, and the limits of this machine",
    "latency": "How long an answer takes, by share of the requests",
    "lag": "From acceptance to the count, while votes come at the top rate",
    "scale": "What becomes of it as the table grows",
}
_COLUMNS = {
    "connections": "clients",
    "counted_per_s": "counted a second",
    "accepted_per_s": "accepted a second",
    "p50_ms": "answer, 50 % (ms)",
    "p99_ms": "answer, 99 % (ms)",
    "lag_p99_ms": "to the count, 99 % (ms)",
    "rss_mb": "largest process (MB)",
}


def page(summary: dict[str, Any], scale: dict[str, Any] | None, plots: Iterable[str]) -> str:
    """Return the page. `summary`: bench.json; `scale`: scale.json of bench/scale.py, of which any part may be missing."""
    about, plots = summary["about"], set(plots)
    parts = [
        "# Performance",
        "Written by `make bench-report` from what `make bench` measured; no figure is typed by hand.",
        f"{about['rounds']} rounds in turn, {about['votes']:,} votes of one contestant in a round, everything on {about['cores']} cores,"
        f" the load generator included. Python {about['python']}, PostgreSQL {about['postgresql']}, RabbitMQ {about['rabbitmq']}; load"
        f" average {about['load_average'][0]:.1f} at the end. Medians (least to most). Rates say what this machine does; ratios, taken"
        " round by round, say more.",
        "## What is wanted, and what is",
        _claims(summary["claims"]),
        "## Votes",
        _plot("votes", plots),
        _contestants(summary.get("contestants", {})),
        "The time to the count is that from `accepted_at` to `counted_at`; of a peer, from the answer to the row.",
        _plot("latency", plots),
        _half_rate(summary.get("half_rate")),
        _plot("lag", plots),
        "## Limits of this machine",
        _limits(summary.get("limits", {}), about),
        "## Reading results",
        _reads(summary.get("reads", {})),
        _stream(summary.get("stream")),
        *_scale(scale or {}, plots),
        "## How it is measured",
        _method(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_range(values: dict[str, Any], name: str) -> str:
    """Return "9,800 (9,100 to 10,200)"; the value alone where it was always the same."""
    if name not in values:
        return ""
    least, most = values["range"][name]
    return shown(values[name]) if least == most else f"{shown(values[name])} ({shown(least)} to {shown(most)})"


def _plot(name: str, plots: set[str]) -> str:
    return f"![{PLOTS[name]}](performance/{name}.svg)" if name in plots else ""


def _claims(claims: dict[str, Any]) -> str:
    rows = []
    for claim in claims.values():
        least, most = claim["range"]
        wanted = "" if claim["wanted"] is None else f"{'at most ' if claim['at_most'] else ''}{claim['wanted']:g}"
        verdict = ("yes" if claim["met"] else "**no**") if wanted else ""
        rows.append([claim["words"], f"{shown(claim['value'])} ({shown(least)} to {shown(most)})", wanted, verdict])
    return table(["ratio", "measured", "wanted", "reached"], rows)


def _contestants(contestants: dict[str, Any]) -> str:
    rows = [
        [words, *(with_range(contestants[name], column) for column in _COLUMNS)]
        for name, words in CONTESTANTS.items()
        if name in contestants
    ]
    return table(["", *_COLUMNS.values()], rows)


def _half_rate(values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    return (
        f"At half of its top rate ({with_range(values, 'accepted_per_s')} a second, one vote a request, sent when they are due whatever"
        f" the answers do): half of the answers within {with_range(values, 'p50_ms')} ms, 99 % within {with_range(values, 'p99_ms')} ms of"
        f" the moment they were due, counted within {with_range(values, 'lag_p99_ms')} ms. The same server with nothing behind it, at the"
        f" same rate: {with_range(values, 'noop_p50_ms')} and {with_range(values, 'noop_p99_ms')} ms."
    )


def _limits(limits: dict[str, Any], about: dict[str, Any]) -> str:
    rows = [[words, with_range(limits, name)] for name, words in LIMITS.items() if name in limits]
    generator = with_range(limits, "generator_client_us")
    cost = f" The load generator takes {generator} µs of a processor for each request." if generator else ""
    return table(["", "a second"], rows) + f"\n\nCommits of one row: {about['single_commits_by']}.{cost}"


def _reads(reads: dict[str, Any]) -> str:
    rows = [
        [words, *(with_range(reads, f"{name}_{value}") for value in ("per_s", "p50_ms", "p99_ms"))]
        for name, words in READS.items()
        if f"{name}_per_s" in reads
    ]
    return table(["", "a second", "50 % (ms)", "99 % (ms)"], rows)


def _stream(values: dict[str, Any] | None) -> str:
    if not values:
        return ""
    return (
        f"## Followers\n\nWhile {shown(values['followers'])} follow the results and {with_range(values, 'counted_per_s')} votes a second"
        f" are counted, a change reaches half of them within {with_range(values, 'event_p50_ms')} ms and 99 % within"
        f" {with_range(values, 'event_p99_ms')} ms; votes are answered within {with_range(values, 'answer_p99_ms')} ms (99 %)."
    )


# What is shown of each size of the table: {name in scale.json: its head}.
STORED = {
    "stored": "votes stored",
    "first_postgres_us": "straight after a checkpoint: PostgreSQL (µs)",
    "first_wal_bytes": "WAL (bytes)",
    "same_postgres_us": "then: PostgreSQL (µs)",
    "same_worker_us": "worker (µs)",
    "same_wal_bytes": "WAL (bytes) ",
    "same_counted_per_s": "counted a second",
    "other_postgres_us": "another poll: PostgreSQL (µs)",
    "other_wal_bytes": "WAL (bytes)  ",
    "other_counted_per_s": "counted a second ",
}


def points(scale: dict[str, Any]) -> list[dict[str, float]]:
    """Return a row for each size of the table, with what is shown of it, by its head."""
    return [{head: row[name] for name, head in STORED.items()} for row in scale.get("stored", [])]


def _scale(scale: dict[str, Any], plots: set[str]) -> list[str]:
    parts = ["## As it grows"] if scale else []
    if found := points(scale):
        parts += [
            "What a vote costs (processor time, WAL) when so many are stored already, all in one poll: one of the first 200,000 that come"
            " to that poll after a checkpoint, where each page of the index that a key lands in goes to the WAL; one of two million that"
            " come to it then; and one that comes to another poll. Batches of 1,000.",
            _plot("scale", plots),
            table(list(found[0]), [[shown(value) for value in row.values()] for row in found]),
        ]
    if found := scale.get("polls", []):
        rows = [[shown(row["polls"]), shown(row["counted_per_s"]), shown(row["p99_ms"])] for row in found]
        parts += ["One vote a request, to so many polls at random:", table(["polls", "counted a second", "answer, 99 % (ms)"], rows)]
    if found := scale.get("processes", []):
        names = ["web", "worker", "counted_per_s", "votes_per_bundle", "web_us", "worker_us", "rabbitmq_us", "postgres_us"]
        rows = [[shown(row[name]) for name in names] for row in found]
        heads = ["web processes", "children of the worker", "counted a second", "votes in a bundle", "web (µs)", "worker (µs)"]
        parts += ["More processes on these cores, one vote a request:", table([*heads, "RabbitMQ (µs)", "PostgreSQL (µs)"], rows)]
    if backlog := scale.get("backlog"):
        sizes = {name: [row[place] for row in backlog["series"]] for name, place in (("worker", 2), ("RabbitMQ", 3))}
        largest = "; ".join(f"{name} {shown(min(size))} to {shown(max(size))} MB" for name, size in sizes.items())
        parts.append(
            f"**A backlog** of {backlog['votes']:,} votes, accepted at {shown(backlog['accepted_per_s'])} a second while no worker ran, was"
            f" counted in {shown(backlog['seconds'])} s: {shown(backlog['counted_per_s'])} a second. Largest process meanwhile: {largest}."
        )
    if memory := scale.get("memory"):
        rows = [[f"{int(votes):,}", shown(web), shown(worker)] for votes, web, worker in memory]
        parts += ["**Memory** of the largest process after so many votes, in batches:", table(["votes", "web (MB)", "worker (MB)"], rows)]
    return parts


def _method(about: dict[str, Any]) -> str:
    commands = "\n".join(f"{name:<16}{command}" for name, command in about["commands"].items())
    return f"{_METHOD}\n\n```\n{commands}\n```"


_METHOD = """\
A private PostgreSQL and a private RabbitMQ. Contestants take turns, and whoever is compared with another is measured close to it. Each
warms up with a tenth of its votes. A run in which not every accepted vote was counted exactly once ends without a figure.

- **This product**: `web` and `worker`, with the settings below; what they don't say is as in `.env.example`.
- **One Celery task per vote**: a DRF view that publishes a task, and a worker that writes the vote and adds to a counter.
- **DRF and PostgreSQL, a counter**: the vote (unique constraint) and `F()` in one transaction, in the request; results from the counters.
- **DRF and PostgreSQL, COUNT(\\*)**: the vote alone; results are counted when they are read, among as many votes as one contestant casts.
- **Nothing behind the server**: the command line of `web`, with an ASGI application that gives the product's own answers.
- **The same, below ASGI**: with one that answers without ASGI, as hot routes do with requests that arrive as a whole (`core/protocol.py`).
- **Confirmed messages**: the product's message for one vote, to a quorum queue, up to 1,000 unconfirmed.
- **Bare bulk INSERT**: counting's statements, as many votes a transaction as a bundle takes (2,000), in one loop.
- **The load generator alone**: at a server that writes one constant answer for whatever it reads."""
