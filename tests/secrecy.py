"""Attacks on the secrecy of votes: what strangers, operators and readers of logs or of a dump make of what they see.

They hold no secret and know nothing of the product but what its documentation says, and the marks that it once made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from typing import Any
from uuid import UUID

# A result that chance gives once in 30,000 runs.
SIGMAS = 4
# Of the many windows that are looked at, none may be so unlikely by chance.
HARDLY_CHANCE = 1e-9


@dataclass(frozen=True)
class Seen:
    """What is seen of one vote, and the truth about it."""

    poll: str
    # Which of the poll's few possible ballots it is, and the ids of the options in it.
    choice: int
    selection: tuple[int, ...]
    idempotency_key: str
    # {name of an artefact: its bytes}, such as the id, the receipt, a request id.
    artefacts: Mapping[str, bytes]
    # {name: whatever else is seen of it}, such as the length of an answer.
    traits: Mapping[str, Any] = field(default_factory=dict)


def windows(raw: bytes, size: int) -> Iterator[bytes]:
    return (raw[start : start + size] for start in range(len(raw) - size + 1))


def bytes_of(text: str) -> bytes:
    """Return what an id or a receipt is made of: a UUID's bytes, else what base64 or hexadecimal digits stand for, else the text's."""
    try:
        return UUID(text).bytes
    except ValueError:
        pass
    if re.fullmatch(r"(?:[0-9a-f]{2})+", text):
        return bytes.fromhex(text)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return text.encode()


def subsets(options: Collection[int]) -> list[tuple[int, ...]]:
    """All ballots that these options make; the one without any is a withdrawal."""
    return [chosen for size in range(len(options) + 1) for chosen in combinations(sorted(options), size)]


# --- Known marks ------------------------------------------------------------------------------------------------------

_MARK_BYTES = 4
_HASHES: Mapping[str, Callable[[bytes], bytes]] = {
    "blake2b of 4 bytes": lambda said: hashlib.blake2b(said, digest_size=_MARK_BYTES).digest(),
    "blake2b": lambda said: hashlib.blake2b(said).digest(),
    "sha256": lambda said: hashlib.sha256(said).digest(),
    "sha1": lambda said: hashlib.sha1(said).digest(),
    "md5": lambda said: hashlib.md5(said).digest(),
}


def marks_of(selection: tuple[int, ...]) -> set[bytes]:
    """Return the marks of 4 bytes that somebody without a secret can make of a choice."""
    spelled = [repr(selection), json.dumps(selection), json.dumps(selection, separators=(",", ":")), ",".join(map(str, selection))]
    hashed = [digest(text.encode()) for text in spelled for digest in _HASHES.values()]
    return {mark for whole in hashed for mark in (whole[:_MARK_BYTES], whole[-_MARK_BYTES:])}


def read_by_marks(raw: Iterable[bytes], marks: Mapping[bytes, tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Return the choices whose mark stands somewhere in these bytes."""
    return {marks[window] for part in raw for window in windows(part, _MARK_BYTES) if window in marks}


# --- Any pattern ------------------------------------------------------------------------------------------------------

_WIDTHS = range(1, 9)
Feature = tuple[str, int, int]


def features_of(seen: Seen) -> dict[Feature, Any]:
    """Every window of 1 to 8 bytes of every artefact, at every place; the artefacts' lengths; the traits."""
    found: dict[Feature, Any] = {(name, -1, -1): value for name, value in seen.traits.items()}
    for name, raw in seen.artefacts.items():
        found[(name, -1, 0)] = len(raw)
        for width in _WIDTHS:
            for start, window in enumerate(windows(raw, width)):
                found[(name, start, width)] = window
    return found


@dataclass(frozen=True)
class Guess:
    """How many choices a classifier guessed, of how many, and how many are right by luck at most."""

    right: int
    of: int
    by_luck: float
    feature: Feature | None = None

    @property
    def beats_luck(self) -> bool:
        return self.right > self.by_luck

    def __str__(self) -> str:
        return f"{self.right} of {self.of} choices guessed by {self.feature}; by luck at most {self.by_luck:.0f}"


def most_by_luck(votes: int, share: float) -> float:
    """Return how many choices a guesser without a clue gets right, and SIGMAS more."""
    return votes * share + SIGMAS * math.sqrt(votes * share * (1 - share))


Learned = Sequence[tuple[Seen, dict[Feature, Any]]]


def learn(votes: Iterable[Seen]) -> Learned:
    return [(vote, features_of(vote)) for vote in votes]


def classify(votes: Learned, share: float) -> Guess:
    """Learn from every second vote what tells a choice, and guess the others by the best that was found.

    The feature is chosen among the known half alone, so that there is one guess of each other vote, and one bound. `share`: how likely
    the likeliest choice is.
    """
    known, asked = votes[::2], votes[1::2]
    tried = {feature for _, found in known for feature in found}
    scores = {feature: _right(known[::2], known[1::2], feature) + _right(known[1::2], known[::2], feature) for feature in tried}
    best = max(sorted(scores), key=scores.__getitem__)
    right = _right(known, asked, best)
    return Guess(right, len(asked), most_by_luck(len(asked), share), best)


def _right(known: Learned, asked: Learned, feature: Feature) -> int:
    """Return how many of the asked are guessed by what this feature said of the known ones of the poll; else by the commonest choice."""
    choices: dict[tuple[str, Any], Counter[int]] = defaultdict(Counter)
    for vote, found in known:
        choices[vote.poll, found.get(feature)][vote.choice] += 1
        choices[vote.poll, Seen][vote.choice] += 1
    right = 0
    for vote, found in asked:
        likely = choices.get((vote.poll, found.get(feature))) or choices[vote.poll, Seen]
        right += likely.most_common(1)[0][0] == vote.choice
    return right


@dataclass(frozen=True)
class Sharing:
    """Pairs of votes that share a window: how many, and how many of them chose the same."""

    feature: Feature
    pairs: int
    alike: int
    chance: float


def shared_more_often(votes: Learned) -> list[Sharing]:
    """Return the windows that votes with the same choice share more often than others do, beyond all chance."""
    alike_by_poll = {}
    for poll in {vote.poll for vote, _ in votes}:
        counts = Counter(vote.choice for vote, _ in votes if vote.poll == poll)
        alike_by_poll[poll] = sum(map(_pairs, counts.values())) / _pairs(counts.total())
    groups: dict[Feature, dict[tuple[str, bytes], list[int]]] = defaultdict(lambda: defaultdict(list))
    for vote, found in votes:
        for feature, value in found.items():
            if feature[1] >= 0:
                groups[feature][vote.poll, value].append(vote.choice)
    beyond = []
    for feature, by_value in groups.items():
        pairs = alike = 0
        expected = 0.0
        for (poll, _), choices in by_value.items():
            if len(choices) > 1:
                pairs += (together := _pairs(len(choices)))
                alike += sum(map(_pairs, Counter(choices).values()))
                expected += together * alike_by_poll[poll]
        if pairs and (chance := _chance(pairs, alike, expected / pairs)) < HARDLY_CHANCE:
            beyond.append(Sharing(feature, pairs, alike, chance))
    return beyond


def _pairs(of: int) -> int:
    return of * (of - 1) // 2


def _chance(tries: int, hits: int, share: float) -> float:
    """Return at most how likely so many hits, or more, are by chance (Chernoff's bound)."""
    if hits <= tries * share:
        return 1.0
    rate = hits / tries
    if share <= 0:
        return 0.0
    divergence = rate * math.log(rate / share) + ((1 - rate) * math.log((1 - rate) / (1 - share)) if rate < 1 else 0)
    return math.exp(-tries * divergence)


# --- Guessing keys ----------------------------------------------------------------------------------------------------

# What must be the same before a guess is taken for confirmed: chance does that once in 10 ** 11 tries of all that are made here.
_CONFIRMED_BYTES = 8
_DIGEST_SIZES = (8, 10, 12, 14, 16, 20, 32, 64)


def confirms(raw: bytes, guess: str, near: Iterable[bytes] = ()) -> bool:
    """Return whether these bytes hold an unkeyed hash of the guess: of it alone, or beside 16 bytes that stand there or near."""
    said = guess.encode()
    parts = {b"", *windows(raw, 16), *near}
    there = set(windows(raw, _CONFIRMED_BYTES))
    for part in parts:
        for content in {part + said, said + part, part + b":" + said, said + b":" + part}:
            for digest in _digests(content):
                if digest[:_CONFIRMED_BYTES] in there or digest[-_CONFIRMED_BYTES:] in there:
                    return True
    return False


def _digests(content: bytes) -> Iterator[bytes]:
    for size in _DIGEST_SIZES:
        yield hashlib.blake2b(content, digest_size=size).digest()
    yield hashlib.sha256(content).digest()
    yield hashlib.sha1(content).digest()
    yield hashlib.md5(content).digest()


# --- A dump -----------------------------------------------------------------------------------------------------------

Row = Mapping[str, Any]
# A value that stands in more rows than these links nobody to anything: the poll's id, a moment, a number.
_RARE = 8
_LONG = 16
_STEPS = 3


@dataclass
class Dump:
    """All rows of all tables, as somebody reads them who has no secret."""

    tables: Mapping[str, Sequence[Row]]

    def __post_init__(self) -> None:
        self._texts = [(row, " ".join(map(_spelled, row.values()))) for rows in self.tables.values() for row in rows]
        self._by_value: dict[str, list[Row]] = defaultdict(list)
        for row, _ in self._texts:
            for value in _values_of(row):
                self._by_value[value].append(row)

    def rows_with(self, text: str) -> list[Row]:
        return [row for row, spelled in self._texts if text in spelled]

    def selections_beside(self, text: str) -> set[tuple[int, ...]]:
        """Return the choices in rows that hold the text, or that lead there from one to the next by values that few rows share."""
        near = {id(row): row for row in self.rows_with(text)}
        reached = near
        for _ in range(_STEPS):
            values = {value for row in reached.values() for value in _values_of(row) if len(self._by_value[value]) <= _RARE}
            reached = {id(row): row for value in values for row in self._by_value[value] if id(row) not in near}
            near |= reached
        return {tuple(row["selection"]) for row in near.values() if row.get("selection")}


def _spelled(value: Any) -> str:
    return bytes(value).decode("latin-1") if isinstance(value, (bytes, memoryview)) else str(value)


def _values_of(row: Row) -> set[str]:
    """Those of a row's values that are long enough to be nobody else's by chance."""
    own = [value for value in row.values() if not isinstance(value, (list, dict, datetime))]
    return {spelled for value in own if len(spelled := _spelled(value)) >= _LONG}


# --- Answers ----------------------------------------------------------------------------------------------------------


# Numbers beside an option that are no votes.
_NO_VOTES = ("position",)


def counted_in(answer: Any, options: Collection[str]) -> set[str]:
    """Return for which of the options an answer's JSON has a number, such as `{"17": [10, 9]}` or `{"id": "17", "votes": 9}`."""
    if isinstance(answer, list):
        return {option for value in answer for option in counted_in(value, options)}
    if not isinstance(answer, dict):
        return set()
    found = {option for value in answer.values() for option in counted_in(value, options)}
    found |= {option for option in options if _has_number(answer.get(option))}
    if any(_has_number(value) for name, value in answer.items() if name not in _NO_VOTES):
        found |= {value for value in answer.values() if isinstance(value, str) and value in options}
    return found


def _has_number(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)
