"""A crowd: a day's votes of 50,000 honest people and 5,000 bots in one poll, and who of them is what. The same for the same seed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from itertools import accumulate
from random import Random
from typing import Any
from uuid import UUID

from polls import networks
from polls.bundles import AcceptedVote
from polls.models import Poll, SuspiciousIP
from polls.moments import to_microseconds

# A poll for them; whoever has a token votes, so that many can from one address.
POLL: dict[str, Any] = {"voter_policy": "session", "options": [{"text": text} for text in ("soup", "salad", "bread", "stew", "cake")]}
HONEST_VOTES = 50_000
SUBNET_BOTS, PREFIX_BOTS, DRIP_BOTS = 2000, 2000, 1000
# What the bots want. Third among the honest, and with the bots' votes first.
BOTS_OPTION = 2
HONEST_SHARES = (0.27, 0.25, 0.22, 0.16, 0.10)
DAY_SECONDS = 86_400

# Where a vote came from. Four places stand by themselves, that nobody may suspect, and one that a machine can only take for bots.
HOME, OFFICE, SCHOOL, CARRIER = "home", "office", "school", "carrier"
CLASSROOM, BIG_SCHOOL, PROUD_SCHOOL, BIG_CARRIER = "classroom of 30", "school of 200", "school for its own", "carrier of 2,000"
RALLY = "rally of 150"
BOTS_SUBNET, BOTS_PREFIX, BOTS_DRIP = "bots in a /24", "bots in a /64", "bots that drip"
BOTS = (BOTS_SUBNET, BOTS_PREFIX, BOTS_DRIP)

# Votes by hour of the day: few at night, most in the evening.
_HOURS = list(accumulate((2, 1, 1, 1, 1, 2, 4, 6, 7, 7, 7, 7, 8, 7, 6, 6, 7, 8, 9, 10, 10, 9, 6, 4)))
_WORKING_HOURS = list(accumulate([0] * 8 + [6, 9, 8, 7, 9, 7, 7, 6, 5, 2] + [0] * 6))
# Browsers as they call themselves: some 300, a few of them behind most voters.
_BROWSERS = range(1001, 1301)
_BROWSER_SHARES = list(accumulate(1 / (rank + 2) for rank in range(len(_BROWSERS))))
# Schools hand out machines that are all alike; their makers are few.
_SCHOOL_BROWSERS = (1004, 1011, 1023)
_HOME_SUBNETS = 5000
# People's home addresses end below, so that a bot can sit next door.
_HOME_HOSTS = 200

Clock = Callable[[], float]  # gives a vote's second of the day


@dataclass(frozen=True)
class Crowd:
    # As they were accepted, one after the other.
    votes: list[AcceptedVote]
    # {vote id: where it came from}
    origins: dict[UUID, str]

    def of(self, *origins: str) -> list[AcceptedVote]:
        return [vote for vote in self.votes if self.origins[vote.vote_id] in origins]

    @property
    def honest(self) -> list[AcceptedVote]:
        return [vote for vote in self.votes if self.origins[vote.vote_id] not in BOTS]

    @property
    def bots(self) -> list[AcceptedVote]:
        return self.of(*BOTS)

    def fitting(self, cases: Iterable[SuspiciousIP]) -> list[AcceptedVote]:
        """The votes that one of the cases is about."""
        return list(
            {
                vote.vote_id: vote
                for case in cases
                for vote in self._by_network[case.network_key]
                if case.signature_key in (None, vote.signature_key)
            }.values()
        )

    @cached_property
    def _by_network(self) -> dict[UUID | None, list[AcceptedVote]]:
        found = defaultdict(list)
        for vote in self.votes:
            found[vote.address_key].append(vote)
            found[vote.subnet_key].append(vote)
        return found


def tally(votes: Sequence[AcceptedVote]) -> Counter[int]:
    """{option id: votes} where each voter's first vote stands. Told again, so that a test does not ask the code it tests."""
    first: dict[UUID, AcceptedVote] = {}
    for vote in sorted(votes, key=lambda vote: (vote.accepted_at, vote.vote_id)):
        first.setdefault(vote.voter_key, vote)
    return Counter(vote.selection[0] for vote in first.values())


def gather(poll: Poll, day: datetime, *, seed: int = 1, bots_among_homes: bool = False) -> Crowd:
    """Return the votes of the day that begins then, in a poll made with POLL.

    `bots_among_homes`: those that drip do it from honest people's own addresses, as malware does; else from some next door.
    """
    gathering = _Gathering(poll, day, Random(seed))
    homes = gathering.gather_the_honest()
    gathering.gather_bots(homes if bots_among_homes else None)
    gathering.votes.sort(key=lambda vote: vote.accepted_at)
    return Crowd(gathering.votes, gathering.origins)


class _Gathering:
    def __init__(self, poll: Poll, day: datetime, random: Random) -> None:
        self.poll_id = poll.pk
        self.options = list(poll.options.order_by("position").values_list("pk", flat=True))
        self.day = to_microseconds(day)
        self.random = random
        self.keys = networks.cipher_for(poll).keys
        self.votes: list[AcceptedVote] = []
        self.origins: dict[UUID, str] = {}

    # --- The honest ---------------------------------------------------------------------------------------------------

    def gather_the_honest(self) -> list[str]:
        """Return the homes' IPv4 addresses."""
        random = self.random
        self._gather_at_schools()
        self._gather_at_carriers()
        for office in range(300):
            clock, shares = self._clock(_WORKING_HOURS), self._leaning(0.1)
            for _ in range(random.randint(5, 40)):
                self._cast_honestly(OFFICE, f"172.24.{office}.1" if office < 256 else f"172.25.{office - 256}.1", clock(), shares)
        return self._gather_at_home()

    def _gather_at_schools(self) -> None:
        noon = 12 * 3600.0
        laptops = _SCHOOL_BROWSERS[0]
        self._gather_in_a_room(CLASSROOM, "172.16.1.1", 30, noon - 3000, 120, self._leaning(0.1), laptops)
        self._gather_in_a_room(BIG_SCHOOL, "172.16.2.1", 200, noon - 7200, 3600, self._leaning(0.1))
        for_its_own = [0.05, 0.80, 0.05, 0.05, 0.05]
        self._gather_in_a_room(PROUD_SCHOOL, "172.16.3.1", 120, noon + 3600, 2400, for_its_own)
        # Supporters in a hall with one network. Only a person can tell.
        self._gather_in_a_room(RALLY, "172.16.0.1", 150, 19 * 3600, 7200, [0.005, 0.98, 0.005, 0.005, 0.005])
        for school in range(4, 40):
            pupils, begins = self.random.randint(30, 200), self.random.uniform(8 * 3600, 15 * 3600)
            # A class after another; in two of five schools at machines of its own.
            seconds = 120 * pupils / 30 * self.random.uniform(1, 3)
            browser = self.random.choice(_SCHOOL_BROWSERS) if self.random.random() < 0.4 else None
            self._gather_in_a_room(SCHOOL, f"172.16.{school}.1", pupils, begins, seconds, self._leaning(0.15), browser)

    def _gather_in_a_room(
        self, origin: str, address: str, people: int, begins: float, seconds: float, shares: Sequence[float], browser: int | None = None
    ) -> None:
        for _ in range(people):
            self._cast_honestly(origin, address, begins + self.random.uniform(0, seconds), shares, browser)

    def _gather_at_carriers(self) -> None:
        """Phones by the thousand behind few addresses, all day."""
        clock = self._clock(_HOURS)
        for subnet, crowds in enumerate([(2000, 1200, 900, 700), (1500, 1100, 800, 400), (1200, 900, 700, 300), (600, 400, 300)]):
            shares = self._leaning(0.05)
            for host, phones in enumerate(crowds, 10):
                origin = BIG_CARRIER if phones == 2000 else CARRIER
                for _ in range(phones):
                    self._cast_honestly(origin, f"100.64.{subnet}.{host}", clock(), shares)

    def _gather_at_home(self) -> list[str]:
        """One to four people at an address, until HONEST_VOTES; two of five homes have a /64 instead. Return the others' addresses."""
        random, clock = self.random, self._clock(_HOURS)
        leanings = [self._leaning(0.15) for _ in range(20)]  # regions
        homes: dict[str, bool] = {}  # {address: whether it has a /64}
        while len(self.votes) < HONEST_VOTES:
            subnet = random.randrange(_HOME_SUBNETS)
            home = f"10.{subnet >> 8}.{subnet & 255}.{random.randint(1, _HOME_HOSTS)}"
            if home in homes:
                continue
            has_prefix = homes[home] = random.random() < 0.4
            first = clock()
            for _ in range(random.choices((1, 2, 3, 4), (60, 25, 10, 5))[0]):
                if len(self.votes) == HONEST_VOTES:
                    break
                address = f"2001:db8:{subnet:x}:{len(homes):x}::{random.getrandbits(16):x}" if has_prefix else home
                # Families talk about it at dinner.
                second = (first + random.expovariate(1 / 900)) % DAY_SECONDS if random.random() < 0.7 else clock()
                self._cast_honestly(HOME, address, second, leanings[subnet % len(leanings)])
        return [home for home, has_prefix in homes.items() if not has_prefix]

    def _cast_honestly(self, origin: str, address: str, second: float, shares: Sequence[float], browser: int | None = None) -> None:
        """A person's vote; one in thirty votes once more, some of them for something else."""
        random = self.random
        voter, choice = self._uuid(), random.choices(self.options, shares)[0]
        browser = browser or random.choices(_BROWSERS, cum_weights=_BROWSER_SHARES)[0]
        self._cast(origin, voter, address, second, choice, browser)
        if random.random() < 1 / 30 and len(self.votes) < HONEST_VOTES:
            choice = random.choices(self.options, shares)[0] if random.random() < 0.4 else choice
            self._cast(origin, voter, address, second + random.uniform(5, 600), choice, browser)

    # --- The bots -----------------------------------------------------------------------------------------------------

    def gather_bots(self, homes: Sequence[str] | None) -> None:
        random = self.random
        # A rented /24 through four hours; one vote in ten is a token's second.
        tokens = [self._uuid() for _ in range(SUBNET_BOTS * 9 // 10)]
        for token in tokens + random.sample(tokens, SUBNET_BOTS - len(tokens)):
            address = f"198.51.100.{random.randint(1, 250)}"
            self._cast(BOTS_SUBNET, token, address, 10 * 3600 + random.uniform(0, 4 * 3600), self._wanted(), random.choice((2001, 2002)))
        # One machine, another address of its /64 every five seconds.
        for step in range(PREFIX_BOTS):
            address = f"2001:db8:bad::{random.getrandbits(16):x}:{random.getrandbits(16):x}:{random.getrandbits(16):x}"
            self._cast(BOTS_PREFIX, self._uuid(), address, 15 * 3600 + 5 * step + random.uniform(0, 0.5), self._wanted(), 2003)
        # Other people's machines, all day, as the honest do.
        if homes is None:
            next_door = [f"10.{n >> 8}.{n & 255}.{_HOME_HOSTS + 1 + n % 50}" for n in random.sample(range(_HOME_SUBNETS), 300)]
        clock, addresses = self._clock(_HOURS), next_door if homes is None else random.sample(homes, 300)
        for _ in range(DRIP_BOTS):
            self._cast(BOTS_DRIP, self._uuid(), random.choice(addresses), clock(), self._wanted(), 2004)

    def _wanted(self) -> int:
        """The option that bots vote for; now and then another, to look honest."""
        return self.options[BOTS_OPTION] if self.random.random() < 0.97 else self.random.choice(self.options)

    # --- All ----------------------------------------------------------------------------------------------------------

    def _cast(self, origin: str, voter: UUID, address: str, second: float, option: int, browser: int) -> None:
        accepted_at = self.day + int(second * 1_000_000)
        address_key, subnet_key = self.keys(address)
        vote = AcceptedVote(
            self._uuid(), self.poll_id, voter, (option,), accepted_at, address_key=address_key, subnet_key=subnet_key, signature_key=browser
        )
        self.votes.append(vote)
        self.origins[vote.vote_id] = origin

    def _uuid(self) -> UUID:
        return UUID(bytes=self.random.randbytes(16))

    def _leaning(self, strength: float) -> list[float]:
        """What people of one place like: what all do, a little shifted."""
        return [share * (1 + self.random.uniform(-strength, strength)) for share in HONEST_SHARES]

    def _clock(self, hours: Sequence[int]) -> Clock:
        return lambda: (self.random.choices(range(24), cum_weights=hours)[0] + self.random.random()) * 3600


def day_before(at: datetime) -> datetime:
    """Return when the day began that has just ended, so that all its votes lie in the past."""
    return at - timedelta(seconds=DAY_SECONDS + 900)
