"""Accepting: a vote's way from whichever door it came in by to the publisher. What stands here is true for all doors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import msgspec
from django.conf import settings
from django.utils.timezone import now

from polls import attempts, ballots, blocks, codes, limits, problems, receipts, throttling, voters
from polls.blocks import BlockedNetworks
from polls.bundles import AcceptedVote
from polls.models import Outcome, Reason, VoterPolicy
from polls.moments import from_microseconds, iso, microseconds_now
from polls.problems import Refusal
from polls.publishing import NobodyTookItError, Publisher
from polls.receipts import Receipt, VoteStatus
from polls.snapshots import ClientSnapshot, NothingKnownError, PollSnapshot, SharedReads, Snapshots, with_a_connection

logger = logging.getLogger(__name__)
V = TypeVar("V")

MAX_VOTER_LENGTH = 200
# What browsers say of themselves: never an address or a cookie. Chosen: all of it has room in this many bytes, the rest is not read.
BROWSER_HEADERS = (b"user-agent", b"accept-language", b"accept-encoding", b"sec-ch-ua", b"sec-ch-ua-platform")
_BROWSER_BYTES = 600
# Cookie of the policy `session`, one for each poll by its path.
VOTER_COOKIE = "voter_token"
RETRY_AFTER_SECONDS = "2"
# How long a request may wait for its vote's outcome.
MAX_WAIT_SECONDS = 10
# The pauses between two looks at what became of a vote, in seconds; all who wait look together.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25
# Between two writes of attempts, and how long the last one may keep the process from ending (seconds).
_ATTEMPTS_SECONDS, _LAST_ATTEMPTS_SECONDS = 2, 3
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# What nobody guesses: a UUID, 128 bits in hexadecimal, a ULID, 128 bits in base64; of each eight characters at least are different.
_RANDOM = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32,}|[0-9A-HJKMNP-TV-Z]{26}"
    r"|(?=(?:.*[0-9]){2})(?=.*[a-z])(?=.*[A-Z])(?!(?:.*[-_+/]){5})[A-Za-z0-9_+/-]{22,}={0,2}"
)
_DIFFERENT = 8
# Where somebody else may be the same voter to the poll: who shares the address; who made the code.
_SHARED_VOTERS = (VoterPolicy.IP, VoterPolicy.CODE)


class Cast(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What a voter sends: a choice, and who votes where the poll can't tell otherwise."""

    option: str | None = None
    options: list[str] | None = None
    voter: str | None = None
    code: str | None = None

    def check(self) -> None:
        """Raise Refusal unless there is exactly one kind of choice."""
        if (self.option is None) == (self.options is None):
            raise problems.INVALID.says("Send either `option` or `options`.", pointer="/option")

    def select(self, poll: PollSnapshot) -> ballots.Selection:
        """Return what the voter chose; raises Refusal when the poll does not take it."""
        chosen, pointer = (self.options or [], "/options") if self.option is None else ([self.option], "/option")
        return ballots.select(chosen, poll.options, poll.min_choices, poll.max_choices, pointer=pointer)


class BatchItem(Cast, gc=False):
    """One of many."""

    idempotency_key: str | None = None


class Caller:
    """What a request says about who sends it. A header is read when it matters: most votes need one or two of them."""

    __slots__ = ("_address", "peer", "rate", "request_id")

    def __init__(self, peer: str, request_id: str | None) -> None:
        self.peer = peer
        self.request_id = request_id
        # What its throttle said; the answer passes it on.
        self.rate: throttling.Rate | None = None
        self._address = ""

    def header(self, name: bytes) -> str | None:
        """Return the value of the header with this name, in lower case; None without it. Of X-Forwarded-For all lines, joined by commas."""
        raise NotImplementedError

    @property
    def authorization(self) -> str:
        return self.header(b"authorization") or ""

    @property
    def idempotency_key(self) -> str | None:
        key = self.header(b"idempotency-key")
        return key and key.strip()

    @property
    def voter_token(self) -> str:
        """What the header says, or else the cookie."""
        if token := self.header(b"voter-token"):
            return token
        for crumb in (self.header(b"cookie") or "").split(";"):
            name, _, value = crumb.strip().partition("=")
            if name == VOTER_COOKIE:
                return value
        return ""

    @property
    def browser(self) -> bytes:
        """The values of BROWSER_HEADERS, a line each."""
        return "\n".join([self.header(name) or "" for name in BROWSER_HEADERS]).encode("latin-1", "replace")

    @property
    def address(self) -> str:
        """The client's address; raises Refusal when a proxy of ours does not pass it on."""
        if self._address:
            return self._address
        proxies = settings.TRUSTED_PROXIES
        forwarded_for = (self.header(b"x-forwarded-for") or "") if proxies else ""
        try:
            self._address = voters.client_address(self.peer, forwarded_for, proxies)
            return self._address
        except ValueError:
            logger.error("a request came without the X-Forwarded-For that TRUSTED_PROXIES=%d promises", settings.TRUSTED_PROXIES)
            raise problems.INVALID.says("Your address can't be told: the proxy in front of this service did not pass it on.") from None


@dataclass(slots=True)
class Voter:
    """Who votes: the voter key, and where from, if that matters in the poll."""

    key: UUID
    address_key: UUID | None = None
    subnet_key: UUID | None = None
    signature_key: int | None = None


# A vote that can't be lost any more, and its poll, which knows how it is shown.
Accepted = tuple[PollSnapshot, AcceptedVote]


class Desk:
    """Takes votes. One per web process, in its event loop."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="desk")
        self._publisher = Publisher()
        self._polls = Snapshots("polls", PollSnapshot.read_all, settings.POLL_SNAPSHOT_SECONDS, self.threads)
        self._clients = Snapshots("clients", ClientSnapshot.read_all, settings.POLL_SNAPSHOT_SECONDS, self.threads)
        self._blocked: Snapshots[None, BlockedNetworks] = Snapshots("blocks", _find_blocked, settings.POLL_SNAPSHOT_SECONDS, self.threads)
        self._codes = SharedReads(_find_codes, self.threads)
        self._limits = SharedReads(limits.find_reached, self.threads)
        self._statuses = SharedReads(receipts.find_statuses, self.threads)
        self._attempts = attempts.Notes()
        self._scribe: asyncio.Task[None] | None = None
        self._last_accepted_at = 0

    async def start(self) -> None:
        self._scribe = asyncio.create_task(self._write_attempts_for_ever())
        with contextlib.suppress(NothingKnownError):  # known from the start, for when PostgreSQL is away later
            await self._blocked.get(None)
        await self._publisher.start()

    async def stop(self) -> None:
        if self._scribe:
            self._scribe.cancel()
        await self._publisher.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ATTEMPTS_SECONDS):
                await self._write_attempts()

    # --- Taking -------------------------------------------------------------------------------------------------------

    async def accept(self, poll_id: str, cast: Cast, caller: Caller) -> Accepted:
        """Return the vote once it can't be lost any more; raises Refusal when it is not taken, or when nobody knows whether it is."""
        cast.check()
        poll = await self.find_poll(poll_id)
        voter = await self._identify(poll, cast, caller)
        accepted_at = self._moment(poll)
        return await self._take(poll, voter, cast.select(poll), accepted_at, caller)

    async def withdraw(self, poll_id: str, cast: Cast, caller: Caller) -> Accepted:
        """Return the withdrawal of the voter's vote, as safe as a vote; raises Refusal as `accept` does."""
        poll = await self.find_poll(poll_id)
        if not poll.allow_withdrawal:
            raise problems.NOT_OFFERED.says("In this poll no vote can be withdrawn.")
        if cast.option is not None or cast.options is not None:
            raise problems.INVALID.says("A withdrawal chooses nothing.", pointer="/option" if cast.option is not None else "/options")
        voter = await self._identify(poll, cast, caller)
        return await self._take(poll, voter, ballots.WITHDRAWAL, self._moment(poll), caller)

    async def _take(self, poll: PollSnapshot, voter: Voter, selection: ballots.Selection, at: int, caller: Caller) -> Accepted:
        if poll.has_hard_limits and voter.address_key is not None and voter.subnet_key is not None:
            arrival = (poll.id, voter.key, voter.address_key, voter.subnet_key)
            if reason := await or_unavailable(self._limits.get(arrival)):
                raise problems.LIMIT_REACHED.says(f"No more voters are let in from this network: {Reason(reason).label}.")
        key = check_key(caller.idempotency_key)
        if key is not None and poll.voter_policy in _SHARED_VOTERS and not _is_secret(poll, key):
            key = None
        vote_id = poll.vote_ids.of(voter.key, key, selection)
        vote = AcceptedVote(
            vote_id,
            poll.id,
            voter.key,
            selection,
            at,
            None,
            None,
            caller.request_id,
            voter.address_key,
            voter.subnet_key,
            voter.signature_key,
        )
        try:
            await self._publisher.take(vote)
        except NobodyTookItError:
            raise _nobody_took_it() from None
        return poll, vote

    async def accept_batch(
        self, poll_id: str, casts: Sequence[BatchItem | Refusal], caller: Caller
    ) -> tuple[PollSnapshot, list[AcceptedVote | Refusal]]:
        """Return the poll, and for each of the casts the vote, safe as in `accept`, or why it is not taken; a Refusal among them stays one.

        For API clients only, so that nobody can try codes by the thousand. A key of the whole batch (Idempotency-Key)
        makes every cast without one of its own repeatable, by its place.
        """
        poll = await self.find_poll(poll_id)
        client = await self._authenticate_client(poll, caller, cost=len(casts))
        if poll.voter_policy not in (VoterPolicy.CLIENT, VoterPolicy.CODE):
            raise problems.NOT_OFFERED.says(
                "Batches are for polls whose voter_policy is `client` or `code`: in others a request is one voter."
            )
        batch_key = check_key(caller.idempotency_key)
        keys = [cast if isinstance(cast, Refusal) else voter_of(poll, client.id, cast) for cast in casts]
        if poll.voter_policy == VoterPolicy.CODE:
            asked = [(poll.id, key) for key in keys if isinstance(key, UUID)]
            known = set(filter(None, await or_unavailable(self._codes.get_all(asked))))
            keys = [key if isinstance(key, Refusal) or (poll.id, key) in known else unknown_code() for key in keys]

        taken: list[AcceptedVote | Refusal] = []
        for index, (cast, key) in enumerate(zip(casts, keys, strict=True)):
            try:
                if isinstance(cast, Refusal):
                    raise cast
                if isinstance(key, Refusal):
                    raise key
                cast.check()
                accepted_at = self._moment(poll)
                selection = cast.select(poll)
                name = check_key(cast.idempotency_key) or (batch_key and f"{batch_key}#{index}")
                vote_id = poll.vote_ids.of(key, name, selection)
                taken.append(AcceptedVote(vote_id, poll.id, key, selection, accepted_at, request_id=caller.request_id))
            except Refusal as refusal:
                taken.append(refusal)
        votes = [vote for vote in taken if isinstance(vote, AcceptedVote)]
        lost = await self._publisher.take_all(votes)
        if votes and len(lost) == len(votes):
            raise _nobody_took_it()
        return poll, [_nobody_took_it() if isinstance(vote, AcceptedVote) and vote.vote_id in lost else vote for vote in taken]

    async def make_voter_token(self, poll_id: str, caller: Caller) -> tuple[UUID, str]:
        """Return the poll's id and a fresh voter token for it; raises Refusal where nobody may have one."""
        throttle(throttling.by_address, caller)
        await self.refuse_blocked(caller)
        poll = await self.find_poll(poll_id)
        if poll.voter_policy != VoterPolicy.SESSION:
            raise problems.NOT_OFFERED.says("Voter tokens are for polls whose voter_policy is `session`.")
        self._note_attempt(poll, caller.address, tokens=1)
        return poll.id, voters.new_voter_token(poll.id, poll.keys)

    # --- Judging ------------------------------------------------------------------------------------------------------

    async def find_poll(self, poll_id: str, *, drafts: bool = False) -> PollSnapshot:
        """Return what is known of the poll, about a second old; raises Refusal for none, and for a draft unless wanted."""
        poll = self._polls.known(poll_id) or (await or_unavailable(self._polls.get(poll_id)) if _UUID.fullmatch(poll_id) else None)
        if poll is None or (poll.is_draft and not drafts):
            raise unknown_poll()
        return poll

    def _moment(self, poll: PollSnapshot) -> int:
        """Return the moment of acceptance, no two alike in a process; raises Refusal when the poll is not open then."""
        accepted_at = self._last_accepted_at = max(microseconds_now(), self._last_accepted_at + 1)
        check_open(poll, accepted_at)
        return accepted_at

    async def _identify(self, poll: PollSnapshot, cast: Cast, caller: Caller) -> Voter:
        """Return who votes, by the poll's policy; raises Refusal when that can't be told. Throttles the caller on the way."""
        policy = poll.voter_policy
        if policy == VoterPolicy.CLIENT:
            client = await self._authenticate_client(poll, caller)
            key = voter_of(poll, client.id, cast)
            if isinstance(key, Refusal):
                raise key
            return Voter(key)
        address = caller.address
        throttle(throttling.by_address, caller)
        await self.refuse_blocked(caller)
        if cast.voter is not None:
            raise problems.INVALID.says("This poll tells voters apart by itself. Leave `voter` out.", pointer="/voter")
        if cast.code is not None and policy != VoterPolicy.CODE:
            raise problems.INVALID.says("This poll knows no codes. Leave `code` out.", pointer="/code")
        if policy == VoterPolicy.IP:
            who = voters.address_voter(address)
        elif policy == VoterPolicy.SESSION:
            who = caller.voter_token
            if not voters.is_voter_token(poll.id, who, poll.keys):
                raise problems.UNAUTHENTICATED.says(
                    "Get a voter token for this poll by POST /api/v1/voters, and send it as `Voter-Token`, or the cookie that came with it."
                )
        elif policy == VoterPolicy.ACCOUNT:
            scheme, _, token = caller.authorization.partition(" ")
            account = voters.account_of(token.strip()) if scheme.lower() == "bearer" else None
            if account is None:
                raise problems.UNAUTHENTICATED.says(
                    "Sign in, and send `Authorization: Bearer <access token>`.", headers={"WWW-Authenticate": "Bearer"}
                )
            who = account
        else:
            who = await self._check_code(poll, cast, address)
        voter_key = poll.voter_keys.of(who)
        if (network_keys := poll.network_keys(address)) is None:
            return Voter(voter_key)
        return Voter(voter_key, *network_keys, poll.cipher.signature(caller.browser[:_BROWSER_BYTES]))

    async def refuse_blocked(self, caller: Caller) -> None:
        """Raise Refusal when the caller's network is blocked at this moment, by what was known of blocks a second ago."""
        if (blocked := self._blocked.known(None)) is None:
            blocked = await or_unavailable(self._blocked.get(None))
        if not blocked:
            return
        at = microseconds_now()
        if until := blocked.until(caller.address, at):
            raise problems.BLOCKED.says(
                f"It is until {iso(from_microseconds(until))}. Reading stays possible.",
                headers={"Retry-After": str((until - at) // 1_000_000 + 1)},
            )

    async def _check_code(self, poll: PollSnapshot, cast: Cast, address: str) -> str:
        """Return the code as it is hashed; raises Refusal when it is none. Wrong ones count as attempts of the address."""
        if cast.code is None:
            raise problems.INVALID.says("This poll needs `code`: the voter's own, from its owner.", pointer="/code")
        throttling.attempts.check(voters.address_voter(address))
        try:
            code = codes.normalise(cast.code)
            voter_key = poll.voter_keys.of(code)
            if await or_unavailable(self._codes.get((poll.id, voter_key))):
                return code
        except ValueError:
            pass
        throttling.attempts.take(voters.address_voter(address))
        self._note_attempt(poll, address, wrong_codes=1)
        raise unknown_code()

    async def _authenticate_client(self, poll: PollSnapshot, caller: Caller, *, cost: int = 1) -> ClientSnapshot:
        prefix, key_hash = voters.client_key_of(caller.authorization) or ("", b"")
        client = (self._clients.known(prefix) or await or_unavailable(self._clients.get(prefix))) if prefix else None
        if client is None or not hmac.compare_digest(key_hash, client.key_hash):
            throttle(throttling.by_address, caller)
            raise problems.UNAUTHENTICATED.says(
                "Send `Authorization: Api-Key <key>` with a key that is not revoked.", headers={"WWW-Authenticate": "Api-Key"}
            )
        throttle_client(client.id, caller, cost)
        check_client(poll, client)
        return client

    # --- Noting attempts ----------------------------------------------------------------------------------------------

    def _note_attempt(self, poll: PollSnapshot, address: str, *, wrong_codes: int = 0, tokens: int = 0) -> None:
        if keys := poll.network_keys(address):
            self._attempts.add(poll.id, keys, microseconds_now(), wrong_codes=wrong_codes, tokens=tokens)

    async def _write_attempts_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_ATTEMPTS_SECONDS)
            await self._write_attempts()

    async def _write_attempts(self) -> None:
        """Write down what was noted. While PostgreSQL is away it is kept; no vote waits for it."""
        if seen := self._attempts.take():
            try:
                await asyncio.get_running_loop().run_in_executor(self.threads, with_a_connection, attempts.write, seen)
            except Exception:
                self._attempts.put_back(seen)

    # --- Telling ------------------------------------------------------------------------------------------------------

    async def find_statuses(self, asked: Sequence[Receipt]) -> list[VoteStatus]:
        """Return what became of the votes; raises Refusal while PostgreSQL does not answer."""
        return [status for status in await or_unavailable(self._statuses.get_all(asked)) if status is not None]

    async def wait_for(self, receipt: Receipt, seconds: float) -> VoteStatus:
        """Return what became of the vote, or "pending" when that is not known after these seconds (MAX_WAIT_SECONDS at most)."""
        deadline, pause = time.monotonic() + min(seconds, MAX_WAIT_SECONDS), _FIRST_PAUSE
        while True:
            try:
                (status,) = await self.find_statuses([receipt])
            except Refusal:  # the vote is safe all the same
                status = receipt.pending()
            left = deadline - time.monotonic()
            if status.status != "pending" or left <= 0:
                return status
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, _LONGEST_PAUSE)


def refusal_of(status: VoteStatus) -> Refusal | None:
    """Return what to answer a voter whose vote was accepted but does not stand; None where it does, or nobody knows yet."""
    if status.reason is None or status.status == Outcome.QUARANTINED:
        return None
    reason = Reason(status.reason)
    problem = {
        Reason.DUPLICATE: problems.DUPLICATE,
        Reason.KEY_REUSED: problems.KEY_REUSED,
        Reason.ADDRESS_LIMIT: problems.LIMIT_REACHED,
        Reason.SUBNET_LIMIT: problems.LIMIT_REACHED,
        Reason.POLL_UNKNOWN: problems.UNKNOWN_POLL,
        Reason.OPTION_UNKNOWN: problems.UNKNOWN_OPTION,
    }.get(reason, problems.SUPERSEDED)
    return problem.says(f"The vote was accepted, but does not stand: {reason.label}.")


def throttle(limit: throttling.Throttle, caller: Caller) -> None:
    """Count the request against its address; raises Refusal when it was one too many."""
    caller.rate = rate = limit.take(voters.address_voter(caller.address))
    if rate.is_exceeded:
        raise rate.refusal()


def throttle_client(client_id: int, caller: Caller, cost: int = 1) -> None:
    """Count the request against its API client; raises Refusal when it was one too many."""
    caller.rate = rate = throttling.by_client.take(str(client_id), cost)
    if rate.is_exceeded:
        raise rate.refusal()


def check_key(idempotency_key: str | None) -> str | None:
    """Return the key, or None for none; raises Refusal for one that is no key."""
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise problems.INVALID.says("Idempotency-Key takes 1 to 255 visible ASCII characters, such as a UUID.")
    return idempotency_key


def _is_secret(poll: PollSnapshot, idempotency_key: str) -> bool:
    """Return whether only who sent the key can know it. In a poll whose vote ids are not keyed any key will do: it is older than this.

    Behind one address strangers are one voter, and so is a code's holder and who made it. With the key of another's request, "counted" or
    "the key belongs to another choice" would tell whether both chose alike. A key that can be guessed is therefore none there: whoever
    votes second has a duplicate anyway.
    """
    is_random = _RANDOM.fullmatch(idempotency_key) and len(set(idempotency_key)) >= _DIFFERENT
    return not poll.has_keyed_vote_ids or bool(is_random and str(poll.id) not in idempotency_key.lower())


async def or_unavailable(reading: Awaitable[V]) -> V:
    try:
        return await reading
    except NothingKnownError:
        raise problems.UNAVAILABLE.says("The database does not answer. Try again.", headers={"Retry-After": RETRY_AFTER_SECONDS}) from None


def unknown_poll() -> Refusal:
    return problems.UNKNOWN_POLL.says("No poll has this id.")


def unknown_code() -> Refusal:
    return problems.UNKNOWN_CODE.says("No voter code of this poll reads like this, or it was revoked.")


def check_open(poll: PollSnapshot, accepted_at: int) -> None:
    """Raise Refusal unless the poll is open at this moment (microseconds since 1970 UTC)."""
    if accepted_at >= poll.closes_at:
        raise problems.POLL_CLOSED.says(f"The poll closed at {iso(from_microseconds(poll.closes_at))}.")
    if accepted_at < poll.opens_at:
        raise problems.POLL_NOT_OPEN.says(f"The poll opens at {iso(from_microseconds(poll.opens_at))}.")


def check_client(poll: PollSnapshot, client: ClientSnapshot) -> None:
    """Raise Refusal unless the API client may cast votes in this poll."""
    if client.owner_id != poll.owner_id or client.poll_id not in (None, poll.id):
        raise problems.FORBIDDEN.says("This key is not for this poll.")
    if not client.may_cast:
        raise problems.FORBIDDEN.says("This key lacks the scope votes:cast.")


def voter_of(poll: PollSnapshot, client_id: int | None, cast: Cast) -> UUID | Refusal:
    """Return the voter key of what an API client sends, or an import reads. Whether the poll has the code is not said by it.

    The client matters only where the poll's voters are its own.
    """
    if poll.voter_policy == VoterPolicy.CODE:
        if cast.code is None or cast.voter is not None:
            return problems.INVALID.says("This poll needs `code`, and no `voter`.", pointer="/code" if cast.code is None else "/voter")
        try:
            return poll.voter_keys.of(codes.normalise(cast.code))
        except ValueError:
            return unknown_code()
    if cast.code is not None:
        return problems.INVALID.says("This poll knows no codes. Leave `code` out.", pointer="/code")
    if not cast.voter:
        return problems.INVALID.says("This poll needs `voter`: your own reference of the voter, such as a user id.", pointer="/voter")
    if len(cast.voter) > MAX_VOTER_LENGTH:
        return problems.INVALID.says(f"`voter` takes at most {MAX_VOTER_LENGTH} characters.", pointer="/voter")
    return poll.voter_keys.of(f"{client_id}:{cast.voter}")


def _find_blocked(_: object) -> dict[None, BlockedNetworks]:
    return {None: blocks.in_force(now())}


def _find_codes(keys: Iterable[tuple[UUID, UUID]]) -> dict[tuple[UUID, UUID], tuple[UUID, UUID]]:
    return {key: key for key in codes.valid(keys, at=now())}


def _nobody_took_it() -> Refusal:
    return problems.NOT_ACCEPTED.says(
        "Neither queue nor outbox answered in time. Repeat the request with the same Idempotency-Key: it counts at most once.",
        headers={"Retry-After": RETRY_AFTER_SECONDS},
    )
