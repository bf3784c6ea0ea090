"""Negative controls: the product broken on purpose, in one place each. The oracle must find out, or it proves nothing."""

from __future__ import annotations

from dataclasses import replace

from chaos import scenarios
from chaos.scenario import Scenario
from chaos.stage import Edit

ALL: dict[str, Scenario] = {}


def _control(name: str, what: str, under: str, *edits: Edit, finds: str = "") -> None:
    """Run the scenario `under` with these edits; `finds` is what it then complains of, where the oracle sees nothing."""
    ALL[name] = replace(scenarios.ALL[under], name=name, what=f"{what} ({under})", edits=edits, finds=finds)


_control(
    "acknowledged-early",
    "a bundle is acknowledged before it is counted",
    "child-killed",
    Edit("core/settings.py", "CELERY_TASK_ACKS_LATE = True", "CELERY_TASK_ACKS_LATE = False"),
)
_control(
    "not-mandatory",
    "the broker may confirm what no queue took",
    "queue-deleted",
    Edit("polls/publishing.py", "mandatory=True,  # without it", "mandatory=False,  # without it"),
)
_control(
    "confirm-not-awaited",
    "a vote is answered 202 before the broker has confirmed it",
    "broker-killed",
    Edit("polls/publishing.py", "connection.channel(publisher_confirms=True)", "connection.channel(publisher_confirms=False)"),
)
_control(
    "whoever-comes-first-stands",
    "ON CONFLICT DO NOTHING instead of the rule",
    "child-killed",
    Edit(
        "polls/counting.py",
        "            decisions.append(_Decided(voter, current, stood, winner, fates, repeats))",
        "            if current and winner and winner is not current:\n"
        "                fates = [(v, f) for v, f in fates if v is not current] + [(winner, (Outcome.REJECTED, Reason.DUPLICATE))]\n"
        "                winner = current\n"
        "            decisions.append(_Decided(voter, current, stood, winner, fates, repeats))",
    ),
)
_control(
    "tally-apart",
    "the tallies change in a transaction of their own",
    "child-killed",
    Edit(
        "polls/counting.py",
        "        self.change_tallies()\n        return self\n",
        "        return self\n",
    ),
    Edit(
        "polls/counting.py",
        "        count = _Count(cursor).run(votes)\n",
        "        count = _Count(cursor).run(votes)\n    with connection.cursor() as cursor:\n"
        "        count.cursor = cursor\n        count.change_tallies()\n",
    ),
)
_control(
    "a-clock-is-believed",
    "a moment that a clock says counts, however far ahead it is",
    "clock-ahead-then-right",
    Edit("tasks/periodic.py", "    return min(now(), stamps.clock())\n", "    return now()\n"),
    Edit("polls/finality.py", "    seen_at = min(at, stamps.clock()) - FIGURES_AGE\n", "    seen_at = at - FIGURES_AGE\n"),
    Edit("polls/stamps.py", "VALUES (%s, least(%s, clock_timestamp()), clock_timestamp())", "VALUES (%s, %s, clock_timestamp())"),
    Edit(
        "polls/stamps.py",
        "SELECT name, least(at, noted_at) FROM moments WHERE name = ANY(%s) AND least(at, noted_at) <= clock_timestamp()",
        "SELECT name, at FROM moments WHERE name = ANY(%s)",
    ),
    finds="the poll was final with votes in the queue",
)
_control(
    "beat-waits-for-the-old-time",
    "beat goes on from the moments that it has worked out before its clock was put back",
    "clock-put-back",
    Edit("tasks/clock.py", "        if self._is_put_back():\n", "        if False:\n"),
    finds="the poll did not become final",
)
_control(
    "expiry-by-the-workers-clock",
    "a job expires by beat's clock, and workers compare that with theirs",
    "clocks-apart",
    Edit("tasks/clock.py", 'self.options["expiration"] = min(', 'self.options["expires"] = min('),
    finds="the poll did not become final",
)
_hosts = scenarios.ALL["host-killed"]
ALL["standby-not-awaited"] = replace(
    _hosts,
    name="standby-not-awaited",
    what="commits do not wait for the standby that takes over (host-killed)",
    stage={**_hosts.stage, "awaits_standby": False},
)
