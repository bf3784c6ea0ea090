"""Intake: the hot routes (cast a vote, read results, read a receipt) as a bare ASGI application in front of Django."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from uuid import UUID, uuid4

import msgspec
from django.conf import settings
from django.utils.timezone import now

from polls import problems, receipts, results, voters
from polls.bundles import AcceptedVote
from polls.models import VoterPolicy
from polls.moments import from_microseconds, iso, microseconds_now
from polls.problems import Refusal
from polls.publishing import NobodyTookItError, Publisher
from polls.snapshots import ClientSnapshot, NothingKnownError, PollSnapshot, Snapshots

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = dict[bytes, bytes]
# Status, headers, body.
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
# What answers, the poll id or receipt in the path, the methods offered.
Door = tuple[Callable[[str, Scope, Receive], Awaitable[Answer]], str, tuple[str, ...]]
V = TypeVar("V")

POLLS = "/api/v1/polls/"
RECEIPTS = "/api/v1/votes/"
MAX_BODY_BYTES = 8192
MAX_VOTER_LENGTH = 200
RETRY_AFTER_SECONDS = "2"
_JSON = [(b"content-type", b"application/json")]
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class CastRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /api/v1/polls/{id}/votes`."""

    option: str
    voter: str | None = None


class Intake:
    """Answers the hot routes and passes everything else to `behind`. One per web process."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind
        self._publisher: Publisher | None = None  # made in the loop that serves
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="intake")
        self._polls = Snapshots(PollSnapshot.read, settings.POLL_SNAPSHOT_SECONDS, self._threads)
        self._clients = Snapshots(ClientSnapshot.read, settings.POLL_SNAPSHOT_SECONDS, self._threads)
        self._results = Snapshots(_read_results, settings.RESULTS_CACHE_SECONDS, self._threads)
        self._statuses = Snapshots(receipts.find_status, 0, self._threads)
        self._last_accepted_at = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] != "http":
            return await self._behind(scope, receive, send)
        door = self._find_door(scope["path"])
        if door is None:
            return await self._behind(scope, receive, send)
        answer, subject, methods = door
        try:
            if scope["method"] not in methods:
                raise problems.WRONG_METHOD.says(f"Use {methods[0]} here.", headers={"Allow": ", ".join(methods)})
            status, headers, body = await answer(subject, scope, receive)
        except Refusal as refusal:
            status, headers, body = _refuse(refusal)
        except Exception as exc:
            # The class only: the text may hold what was sent.
            logger.error("a hot route failed: %s", type(exc).__name__, exc_info=settings.DEBUG)
            status, headers, body = _refuse(
                problems.SERVER_ERROR.says("What became of this request is not known. Send it again with the same Idempotency-Key.")
            )
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _live(self, receive: Receive, send: Send) -> None:
        """Have a publisher from the server's start to its end (ASGI lifespan)."""
        await receive()
        self._publisher = Publisher()
        await self._publisher.start()
        # Django's own objects live as long as the process. Without this every full collection walks them all, which stops
        # the process for 60 ms about once a second at full rate.
        gc.collect()
        gc.freeze()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._publisher.stop()
        await send({"type": "lifespan.shutdown.complete"})

    def _find_door(self, path: str) -> Door | None:
        """Return what answers this path, the poll id or receipt in it, and the methods it offers."""
        if path.startswith(POLLS):
            poll_id, _, what = path[len(POLLS) :].rstrip("/").partition("/")
            if what == "votes":
                return self._cast, poll_id, ("POST",)
            if what == "results":
                return self._show_results, poll_id, ("GET", "HEAD")
        elif path.startswith(RECEIPTS):
            receipt = path[len(RECEIPTS) :].rstrip("/")
            if receipt and "/" not in receipt:
                return self._show_receipt, receipt, ("GET", "HEAD")
        return None

    async def _cast(self, poll_id: str, scope: Scope, receive: Receive) -> Answer:
        """`POST /api/v1/polls/{id}/votes`: judge the vote, have it carried, answer 202."""
        headers = dict(scope["headers"])
        cast = _decode(await _read_body(headers, receive))
        poll = self._polls.known(poll_id) or await self._find_poll(poll_id)
        voter = voters.voter_key(poll.id, poll.voter_policy, await self._identify_voter(poll, cast, scope, headers))
        accepted_at = self._last_accepted_at = max(microseconds_now(), self._last_accepted_at + 1)  # no two alike in a process
        if accepted_at < poll.opens_at:
            raise problems.POLL_NOT_OPEN.says(f"The poll opens at {iso(from_microseconds(poll.opens_at))}.")
        if accepted_at >= poll.closes_at:
            raise problems.POLL_CLOSED.says(f"The poll closed at {iso(from_microseconds(poll.closes_at))}.")
        option = poll.options.get(cast.option)
        if option is None:
            raise problems.UNKNOWN_OPTION.says(
                f"Choose one of the options that /api/v1/polls/{poll.id} lists, by its id.", pointer="/option"
            )
        vote_id = _vote_id(poll, voter, headers)
        assert self._publisher is not None
        try:
            await self._publisher.take(AcceptedVote(vote_id, poll.id, voter, (option,), accepted_at))
        except NobodyTookItError:
            raise problems.NOT_ACCEPTED.says(
                "Neither queue nor outbox answered in time. Repeat the request with the same Idempotency-Key: it counts at most once.",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            ) from None
        receipt = receipts.write(poll.id, voter, vote_id, accepted_at)
        location = RECEIPTS + receipt
        body = {
            "id": vote_id,
            "receipt": receipt,
            "status": "pending",
            "accepted_at": iso(from_microseconds(accepted_at)),
            "links": {"self": location, "results": f"{POLLS}{poll.id}/results"},
        }
        return 202, [*_JSON, (b"location", location.encode()), (b"cache-control", b"no-store")], msgspec.json.encode(body)

    async def _show_results(self, poll_id: str, scope: Scope, receive: Receive) -> Answer:
        """`GET /api/v1/polls/{id}/results`, from a short cache, 304 when the client has them already."""
        known = await _or_unavailable(self._results.get(poll_id)) if _UUID.fullmatch(poll_id) else None
        if known is None:
            raise _unknown_poll()
        etag, body = known
        headers = [(b"etag", etag), (b"cache-control", b"public, max-age=1")]
        if_none_match = dict(scope["headers"]).get(b"if-none-match", b"")
        if if_none_match == b"*" or etag.removeprefix(b"W/") in (tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b",")):
            return 304, headers, b""
        return 200, [*_JSON, *headers], body

    async def _show_receipt(self, receipt: str, scope: Scope, receive: Receive) -> Answer:
        """`GET /api/v1/votes/{receipt}`: what became of a vote, never what was chosen."""
        genuine = receipts.read(receipt)
        if genuine is None:
            raise problems.UNKNOWN_RECEIPT.says("Use the receipt exactly as the 202 gave it.")
        status = await _or_unavailable(self._statuses.get(genuine))
        body = {
            "id": status.vote_id,
            "status": status.status,
            "reason": status.reason,
            "accepted_at": iso(status.accepted_at),
            "counted_at": status.counted_at and iso(status.counted_at),
        }
        return 200, [*_JSON, (b"cache-control", b"no-store")], msgspec.json.encode(body)

    async def _find_poll(self, poll_id: str) -> PollSnapshot:
        poll = await _or_unavailable(self._polls.get(poll_id)) if _UUID.fullmatch(poll_id) else None
        if poll is None:
            raise _unknown_poll()
        return poll

    async def _identify_voter(self, poll: PollSnapshot, cast: CastRequest, scope: Scope, headers: Headers) -> str:
        """Return who votes, by the poll's policy; the text goes into the voter key only."""
        if poll.voter_policy == VoterPolicy.CLIENT:
            client = await self._authenticate_client(poll, headers)
            if not cast.voter:
                raise problems.INVALID.says(
                    "This poll needs `voter`: your own reference of the voter, such as a user id.", pointer="/voter"
                )
            if len(cast.voter) > MAX_VOTER_LENGTH:
                raise problems.INVALID.says(f"`voter` takes at most {MAX_VOTER_LENGTH} characters.", pointer="/voter")
            return f"{client.id}:{cast.voter}"
        if cast.voter is not None:
            raise problems.INVALID.says("This poll tells voters apart by their address. Leave `voter` out.", pointer="/voter")
        try:
            address = voters.client_address(scope["client"][0], _forwarded_for(scope), settings.TRUSTED_PROXIES)
            return voters.address_voter(address)
        except ValueError:
            logger.error("a request came without the X-Forwarded-For that TRUSTED_PROXIES=%d promises", settings.TRUSTED_PROXIES)
            raise problems.INVALID.says("Your address can't be told: the proxy in front of this service did not pass it on.") from None

    async def _authenticate_client(self, poll: PollSnapshot, headers: Headers) -> ClientSnapshot:
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        prefix = voters.key_prefix(key.strip()) if scheme.lower() == "api-key" else None
        client = (self._clients.known(prefix) or await _or_unavailable(self._clients.get(prefix))) if prefix else None
        if client is None or client.is_revoked or not voters.is_key(key.strip(), client.key_hash):
            raise problems.UNAUTHENTICATED.says(
                "Send `Authorization: Api-Key <key>` with a key that is not revoked.", headers={"WWW-Authenticate": "Api-Key"}
            )
        if client.owner_id != poll.owner_id:
            raise problems.FORBIDDEN.says("This key belongs to somebody else than the poll.")
        return client


def _vote_id(poll: PollSnapshot, voter: UUID, headers: Headers) -> UUID:
    key = headers.get(b"idempotency-key")
    if key is None:
        return uuid4()
    text = key.decode("latin-1").strip()
    if not _IDEMPOTENCY_KEY.fullmatch(text):
        raise problems.INVALID.says("Idempotency-Key takes 1 to 255 visible ASCII characters, such as a UUID.")
    return voters.repeated_vote_id(poll.id, voter, text)


async def _read_body(headers: Headers, receive: Receive) -> bytes:
    """Return the whole body. Refuses one that is not JSON by its type, or too large before reading further."""
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise problems.NOT_JSON.says("Send the vote with `Content-Type: application/json`.")
    too_large = problems.TOO_LARGE.says(f"A vote takes at most {MAX_BODY_BYTES} bytes.")
    if len(length := headers.get(b"content-length", b"0")) > 9 or int(length) > MAX_BODY_BYTES:
        raise too_large
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise problems.MALFORMED.says("The body ended early.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return body


_cast_decoder = msgspec.json.Decoder(CastRequest)
_FIELD = re.compile(r"field `(\w+)`|at `\$\.(\w+)`")


def _decode(body: bytes) -> CastRequest:
    try:
        return _cast_decoder.decode(body)
    except msgspec.ValidationError as exc:
        # msgspec names types and fields, never the values that were sent.
        named = _FIELD.search(str(exc))
        field = named and (named[1] or named[2])
        raise problems.INVALID.says(f"{exc}.", pointer=f"/{field}" if field else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise problems.MALFORMED.says('Send a JSON object like {"option": "17"}, in UTF-8.') from None


def _read_results(poll_id: str) -> tuple[bytes, bytes] | None:
    """Return ETag and body of the poll's results, or None when there is no such poll."""
    read = results.read_results(UUID(poll_id), at=now())
    if read is None:
        return None
    # Weak: the same results at a later moment differ in `as_of` only.
    return (f'W/"{read["revision"]}-{read["status"]}"'.encode(), msgspec.json.encode(read))


async def _or_unavailable(reading: Awaitable[V]) -> V:
    try:
        return await reading
    except NothingKnownError:
        raise problems.UNAVAILABLE.says("The database does not answer. Try again.", headers={"Retry-After": RETRY_AFTER_SECONDS}) from None


def _unknown_poll() -> Refusal:
    return problems.UNKNOWN_POLL.says("No poll has this id.")


def _refuse(refusal: Refusal) -> Answer:
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    return (
        refusal.problem.status,
        [(b"content-type", problems.CONTENT_TYPE.encode()), (b"cache-control", b"no-store"), *headers],
        msgspec.json.encode(refusal.body()),
    )


def _forwarded_for(scope: Scope) -> str:
    return b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for").decode("latin-1")
