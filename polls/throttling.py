"""Throttling: how many requests an address or an API client may send a minute, without asking anybody for each."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import NamedTuple

from django.conf import settings
from django.core.cache import cache

from polls import problems
from polls.problems import Refusal

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 60
SHARE_SECONDS = 1.0
# Processes tell each other of a subject once it has used this share of its limit in one of them: the others can't matter yet.
WORTH_SHARING = 0.1


class Rate(NamedTuple):
    """Where a subject stands in the minute that is under way."""

    policy: str
    limit: int
    used: int
    reset_seconds: int

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        """The fields of draft-ietf-httpapi-ratelimit-headers-10; none where there is no limit."""
        if not self.limit:
            return []
        name, policy = _policy_fields(self.policy, self.limit)
        return [policy, (b"ratelimit", b"%b;r=%d;t=%d" % (name, max(0, self.limit - self.used), self.reset_seconds))]

    @property
    def is_exceeded(self) -> bool:
        return self.used > self.limit > 0

    def refusal(self) -> Refusal:
        """Return what to answer when that was too much."""
        return problems.TOO_MANY_REQUESTS.says(
            f"At most {self.limit} a minute. Wait {self.reset_seconds} s.", headers={"Retry-After": str(self.reset_seconds)}
        )


@lru_cache
def _policy_fields(policy: str, limit: int) -> tuple[bytes, tuple[bytes, bytes]]:
    """Return the policy's name as fields have it, and the field that says what it allows."""
    name = f'"{policy}"'.encode()
    return name, (b"ratelimit-policy", b"%b;q=%d;w=%d" % (name, limit, WINDOW_SECONDS))


class Throttle:
    """Counts by subject in fixed minutes; a limit of 0 lets everything pass.

    Exact in one process. `share` makes processes agree through the cache, about a second late and only on subjects
    that are near their limit: then a subject gets at most what it sends within that second too much.
    """

    def __init__(self, policy: str, limit: int) -> None:
        self.policy = policy
        self.limit = limit
        self._minute = 0
        self._used: dict[str, int] = {}  # in this process
        self._shared: dict[str, int] = {}  # of it, what the other processes know
        self._elsewhere: dict[str, int] = {}

    def take(self, subject: str, cost: int = 1) -> Rate:
        """Note that the subject asks for this much, and return where it stands then."""
        at = time.time()
        if (minute := int(at) // WINDOW_SECONDS) != self._minute:
            self._minute, self._used, self._shared, self._elsewhere = minute, {}, {}, {}
        used = self._used[subject] = self._used.get(subject, 0) + cost
        return Rate(self.policy, self.limit, used + self._elsewhere.get(subject, 0), WINDOW_SECONDS - int(at) % WINDOW_SECONDS)

    def check(self, subject: str) -> None:
        """Raise Refusal when the subject has nothing left; notes nothing."""
        if (
            self.limit
            and self._used.get(subject, 0) + self._elsewhere.get(subject, 0) >= self.limit
            and (rate := self.take(subject)).is_exceeded
        ):
            raise rate.refusal()

    def share(self) -> None:
        """Add what was used here to the cache, and learn what was used elsewhere. Costs a round trip for each subject that matters."""
        if not self.limit:
            return
        minute, used, shared = self._minute, self._used, self._shared
        for subject, total in list(used.items()):
            if total >= self.limit * WORTH_SHARING:
                key = f"throttle:{self.policy}:{minute}:{subject}"
                cache.add(key, 0, timeout=2 * WINDOW_SECONDS)
                everywhere = cache.incr(key, total - shared.get(subject, 0))  # also without news of ours: others may have some
                shared[subject] = total
                if minute == self._minute:
                    self._elsewhere[subject] = everywhere - total


by_address = Throttle("address", settings.ADDRESS_REQUESTS_PER_MINUTE)
by_client = Throttle("client", settings.CLIENT_VOTES_PER_MINUTE)
# What only a guesser does often: sign-ins, registrations, voter codes that do not exist.
attempts = Throttle("attempts", settings.ATTEMPTS_PER_MINUTE)


def is_shared() -> bool:
    """Return whether there is a cache that processes share."""
    return not settings.CACHES["default"]["BACKEND"].endswith("LocMemCache")


def share_all() -> None:
    """Make the processes agree. A cache that is away changes nothing: each process counts for itself meanwhile."""
    for throttle in (by_address, by_client, attempts):
        try:
            throttle.share()
        except Exception as exc:
            logger.warning("the cache does not answer (%s): requests are throttled by each process for itself", type(exc).__name__)
            return
