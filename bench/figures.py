"""The arithmetic of a run: medians with their range, ratios round by round, and what is wanted of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What one round found: {"contestants.product_single.counted_per_s": 9800.0}.
Values = dict[str, float]


@dataclass(frozen=True)
class Claim:
    """A ratio of two values, or one value where there are no `theirs`; and the bar that it should reach, if there is one."""

    words: str
    ours: str
    theirs: str = ""
    wanted: float | None = None
    at_most: bool = False  # the bar is one to stay under

    @property
    def name(self) -> str:
        return f"{_short(self.ours)}/{_short(self.theirs)}" if self.theirs else _short(self.ours)

    def of(self, rounds: Sequence[Values]) -> list[float]:
        """One value for each round in which both were measured: a machine that is slow for a while is so for both."""
        if not self.theirs:
            return [values[self.ours] for values in rounds if self.ours in values]
        return [values[self.ours] / values[self.theirs] for values in rounds if values.get(self.theirs) and self.ours in values]

    def is_met(self, value: float) -> bool:
        return self.wanted is None or (value <= self.wanted if self.at_most else value >= self.wanted)


def _short(path: str) -> str:
    """ "contestants.product_single.counted_per_s" is known as product_single."""
    section, _, rest = path.partition(".")
    return rest.removesuffix(".counted_per_s") if section in ("contestants", "limits") else path


SINGLE, BATCH = "contestants.product_single.counted_per_s", "contestants.product_batch.counted_per_s"
SINGLE_64 = "contestants.product_single_64.counted_per_s"
TASKS, DRF = "contestants.task_per_vote.counted_per_s", "contestants.sync_drf.counted_per_s"
DRF_COUNT = "contestants.sync_drf_count.counted_per_s"
NOOP = "limits.noop_http_per_s"

CLAIMS = [
    Claim("one vote a request : one task per vote", SINGLE, TASKS, 15),
    Claim("one vote a request : DRF with a counter", SINGLE, DRF, 10),
    Claim("one vote a request : DRF with COUNT(*)", SINGLE, DRF_COUNT),
    Claim("the same with 64 connections : one task per vote", SINGLE_64, TASKS),
    Claim("the same with 64 connections : DRF with a counter", SINGLE_64, DRF),
    Claim("one vote a request : nothing behind the server", SINGLE, NOOP, 0.5),
    Claim("one vote a request : nothing behind the server, below ASGI", SINGLE, "limits.noop_whole_per_s"),
    Claim("one vote a request : confirmed messages of one vote", SINGLE, "limits.confirmed_publish_per_s"),
    Claim("one vote a request : commits of one row", SINGLE, "limits.single_commits_per_s"),
    Claim("batches of 1,000 : bare bulk INSERT", BATCH, "limits.bulk_insert_per_s", 0.7),
    Claim("reading results : nothing behind the server", "reads.product_per_s", "reads.noop_per_s", 0.8),
    Claim("reading results : nothing behind the server, below ASGI", "reads.product_per_s", "reads.noop_whole_per_s"),
    Claim("reading results : DRF, counters", "reads.product_per_s", "reads.sync_drf_per_s"),
    Claim("reading results : DRF, COUNT(*)", "reads.product_per_s", "reads.sync_drf_count_per_s"),
    Claim("votes with followers : without", "stream.counted_per_s", SINGLE),
    Claim("answer at half of the top rate, 99 % (ms)", "half_rate.p99_ms", wanted=10, at_most=True),
    Claim("from acceptance to the count at the top rate, 99 % (ms)", "contestants.product_single.lag_p99_ms", wanted=500, at_most=True),
    Claim("session : ip", "contestants.policy_session.counted_per_s", "contestants.policy_ip.counted_per_s"),
    Claim("account : ip", "contestants.policy_account.counted_per_s", "contestants.policy_ip.counted_per_s"),
    Claim("code : ip", "contestants.policy_code.counted_per_s", "contestants.policy_ip.counted_per_s"),
]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that this share of the ordered values does not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def medians(rounds: Sequence[Values]) -> dict[str, Any]:
    """Return {section: {name: median, "range": {name: [least, most]}}}, as deep as the paths are."""
    summary: dict[str, Any] = {}
    for path in dict.fromkeys(path for values in rounds for path in values):
        *sections, name = path.split(".")
        place = summary
        for section in sections:
            place = place.setdefault(section, {})
        found = [values[path] for values in rounds if path in values]
        place[name] = statistics.median(found)
        place.setdefault("range", {})[name] = [min(found), max(found)]
    return summary


def judged(rounds: Sequence[Values], claims: Sequence[Claim] = CLAIMS) -> dict[str, dict[str, Any]]:
    """Return {name of a claim: {"words", "value": median, "range": [least, most], "wanted", "at_most", "met"}} of what was measured."""
    found = {}
    for claim in claims:
        if of_rounds := claim.of(rounds):
            value = statistics.median(of_rounds)
            found[claim.name] = {
                "words": claim.words,
                "value": value,
                "range": [min(of_rounds), max(of_rounds)],
                "wanted": claim.wanted,
                "at_most": claim.at_most,
                "met": claim.is_met(value),
            }
    return found


def summed_up(rounds: Sequence[Values]) -> dict[str, Any]:
    """Return what `.local/bench.json` says of the rounds: medians by section, the ratios, and all that was wanted."""
    claims = judged(rounds)
    ratios: dict[str, Any] = {name: claim["value"] for name, claim in claims.items() if "/" in name}
    return medians(rounds) | {"ratios": ratios | {"range": {name: claims[name]["range"] for name in ratios}}, "claims": claims}


def in_words(claim: dict[str, Any]) -> str:
    """Return "one vote a request : one task per vote 15.9 (15.1 to 16.0; wanted 15)", and whether it was missed."""
    least, most = claim["range"]
    wanted = f"; wanted {'at most ' if claim['at_most'] else ''}{claim['wanted']:g}" if claim["wanted"] is not None else ""
    missed = "" if claim["met"] else "  MISSED"
    return f"{claim['words']:<62}{shown(claim['value']):>9} ({shown(least)} to {shown(most)}{wanted}){missed}"


def shown(value: float) -> str:
    """Return it with as many digits as it can mean: 12,345, 97.2, 0.83; a whole number as one."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"
