"""Intake: the hot routes (cast votes, read results and receipts) as a bare ASGI application in front of Django."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from random import getrandbits
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from django.conf import settings
from django.utils.timezone import now

from polls import accepting, following, hosts, metrics, problems, receipts, results, throttling, voters
from polls.accepting import VOTER_COOKIE, Accepted, BatchItem, Caller, Cast, Desk
from polls.bundles import AcceptedVote
from polls.following import Event, Follower, Following, Subject
from polls.models import ResultsVisibility
from polls.moments import iso, iso_of, microseconds_now
from polls.problems import Refusal
from polls.receipts import VoteStatus
from polls.snapshots import PollSnapshot, Snapshots

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Fields = list[tuple[bytes, bytes]]
# Status, headers, and the body, or who sends it bit by bit.
Answer = tuple[int, Fields, bytes | Follower]
WholeAnswer = tuple[int, Fields, bytes]
# What answers, the poll id or receipt in the path, the methods offered.
Door = tuple[Callable[[str, "Request"], Awaitable[Answer]], str, tuple[str, ...]]
T = TypeVar("T")

POLLS = "/api/v1/polls/"
VOTES = "/api/v1/votes/"
VOTERS = "/api/v1/voters"
MAX_BODY_BYTES = 8192
MAX_BATCH_VOTES = 1000
MAX_BATCH_BYTES = 1_000_000
MAX_RECEIPTS = 1000
# New objects between two looks for garbage. Chosen: a batch makes 20,000, and looking at each 700 of them cost a fifth of its time.
GC_THRESHOLD = 50_000
VOTER_COOKIE_SECONDS = 365 * 24 * 3600
_JSON = [(b"content-type", b"application/json")]
_FOR_ALL, _FOR_ONE = (b"cache-control", b"public, max-age=1"), (b"cache-control", b"private, no-cache")
# What Django's answers tell browsers: an answer is what it says it is and may load what SECURE_CSP allows, no other host learns that it was
# looked at, and this host is reached by TLS only.
_FOR_BROWSERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", "; ".join(f"{what} {' '.join(allowed)}" for what, allowed in settings.SECURE_CSP.items()).encode()),
    (b"referrer-policy", settings.SECURE_REFERRER_POLICY.encode()),
]
if settings.SECURE_HSTS_SECONDS:
    _FOR_BROWSERS.append((b"strict-transport-security", b"max-age=%d; includeSubDomains; preload" % settings.SECURE_HSTS_SECONDS))
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,64}")
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])")


class PassOn(Exception):
    """Django is to answer this request."""


class StatusRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /api/v1/votes/status`."""

    receipts: list[str]


class ShownVote(msgspec.Struct):
    """What is told of an accepted vote: written by msgspec, a uuid takes a fifth of the time that Python takes to make its text."""

    id: UUID
    receipt: str
    status: str
    accepted_at: str


class AcceptedAlone(ShownVote):
    """Of one that came by itself."""

    links: dict[str, str]


class AcceptedItem(ShownVote):
    """Of one of a batch."""

    index: int


class VoterRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /api/v1/voters`."""

    poll: str


class Intake:
    """Answers the hot routes and passes everything else to `behind`. One per web process."""

    def __init__(self, behind: Application) -> None:
        self._behind = behind
        self._desk = Desk()
        self._results = Snapshots("results", _read_results, settings.RESULTS_CACHE_SECONDS, self._desk.threads)
        self._following = Following(self._read_followed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        scope["desk"] = self._desk  # for Django's views that take votes
        door = self._find_door(scope["path"]) if scope["type"] == "http" else None
        if door is None:
            return await self._behind(scope, receive, send)
        headers = scope["headers"]
        request = Request(headers, dict(headers), scope["client"][0] if scope["client"] else "", receive)
        try:
            status, headers, body = await self._answer(door, scope["method"], request)
        except PassOn:
            return await self._behind(scope, receive, send)
        if isinstance(body, Follower):
            return await body.follow(scope["method"], headers, receive, send)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def answer_whole(
        self, method: str, path: str, headers: Fields, fields: dict[bytes, bytes], body: bytes, peer: str
    ) -> Coroutine[Any, Any, WholeAnswer] | None:
        """Return who answers a request that has arrived with all its body; None where it takes more than that, and ASGI, to answer it.

        `fields`: the headers by their names, the last line of each.
        """
        door = self._find_door(path)
        if door is None or door[0] == self._follow_results:
            return None
        request = Request(headers, fields, peer, body)
        if door[0] == self._show_results and request.authorization:  # it may be passed on
            return None
        return self._answer(door, method, request)  # type: ignore[return-value] # no Follower

    async def _answer(self, door: Door, method: str, request: Request) -> Answer:
        answer, subject, methods = door
        try:
            host = request.headers.get(b"host")  # HTTP/1.0 alone may leave it out, which no browser does
            if host not in hosts.accepted and host is not None and not hosts.is_ours(host):
                raise problems.BAD_REQUEST.says("The service does not go by the name that Host says.")
            if method not in methods:
                raise problems.WRONG_METHOD.says(f"Use {methods[0]} here.", headers={"Allow": ", ".join(methods)})
            status, headers, body = await answer(subject, request)
        except PassOn:
            raise
        except Refusal as refusal:
            logger.debug("request %s: %d %s", request.id, refusal.problem.status, refusal.problem.slug, extra={"request_id": request.id})
            status, headers, body = _refuse(refusal)
        except Exception:
            logger.exception("request %s failed", request.id, extra={"request_id": request.id})
            status, headers, body = _refuse(
                problems.SERVER_ERROR.says("What became of this request is not known. Send it again with the same Idempotency-Key.")
            )
        headers.append((b"x-request-id", request.id.encode()))
        headers += _FOR_BROWSERS
        if request.rate:
            headers += request.rate.fields
        if isinstance(body, Follower):
            return status, headers, body
        if status not in (204, 304):  # a length would be that of what was not sent (RFC 9110 8.6)
            headers.append((b"content-length", b"%d" % len(body)))
        return status, headers, b"" if method == "HEAD" else body

    async def _live(self, receive: Receive, send: Send) -> None:
        """Have the desk work from the server's start to its end (ASGI lifespan)."""
        await receive()
        await self._desk.start()
        self._following.start()
        sharing = asyncio.create_task(self._share_throttles()) if throttling.is_shared() else None
        # Django's own objects live as long as the process. Without this every full collection walks them all, which stops
        # the process for 60 ms about once a second at full rate.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if sharing:
            sharing.cancel()
        await self._desk.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _share_throttles(self) -> None:
        while True:
            await asyncio.sleep(throttling.SHARE_SECONDS)
            await asyncio.to_thread(throttling.share_all)

    def _find_door(self, path: str) -> Door | None:
        """Return what answers this path, the poll id or receipt in it, and the methods it offers."""
        if path.startswith(POLLS):
            poll_id, _, what = path[len(POLLS) :].removesuffix("/").partition("/")
            if what == "votes":
                return self._cast, poll_id, ("POST",)
            if what == "results":
                return self._show_results, poll_id, ("GET", "HEAD")
            if what == "results/stream":
                return self._follow_results, poll_id, ("GET", "HEAD")
            if what == "votes/batch":
                return self._cast_batch, poll_id, ("POST",)
            if what == "votes/withdraw":
                return self._withdraw, poll_id, ("POST",)
        elif path.startswith(VOTES):
            receipt = path[len(VOTES) :].removesuffix("/")
            if receipt == "status":
                return self._show_statuses, "", ("POST",)
            if receipt and "/" not in receipt:
                return self._show_receipt, receipt, ("GET", "HEAD")
        elif path.removesuffix("/") == VOTERS:
            return self._make_voter, "", ("POST",)
        return None

    # --- Casting ----------------------------------------------------------------------------------------------------

    async def _cast(self, poll_id: str, request: Request) -> Answer:
        """`POST /api/v1/polls/{id}/votes`: 202 once the vote is safe, or its outcome where the client wants to wait for it."""
        cast = _decode(await request.read_body(), _cast_decoder)
        return await self._accepted(await self._desk.accept(poll_id, cast, request), poll_id, request)

    async def _withdraw(self, poll_id: str, request: Request) -> Answer:
        """`POST /api/v1/polls/{id}/votes/withdraw`: the voter's vote stands no more."""
        cast = _decode(await request.read_body(), _cast_decoder)
        return await self._accepted(await self._desk.withdraw(poll_id, cast, request), poll_id, request)

    async def _accepted(self, accepted: Accepted, poll_id: str, request: Request) -> Answer:
        poll, vote = accepted
        shown_id, receipt = poll.show(vote)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("request %s: vote %s accepted", request.id, shown_id, extra={"request_id": request.id, "vote_id": shown_id})
        location = VOTES + receipt
        headers = [*_JSON, (b"location", location.encode()), (b"cache-control", b"no-store")]
        # `self` is for clients of the version before: what is in a URL stands in the logs of everything on the way.
        links = {"self": location, "status": f"{VOTES}status", "results": f"{POLLS}{poll_id}/results"}
        shown = AcceptedAlone(shown_id, receipt, "pending", iso_of(vote.accepted_at), links)
        code = 202
        if (seconds := request.wait_seconds) is not None:
            status = await self._desk.wait_for(poll.receipt_of(vote), seconds)
            if refusal := accepting.refusal_of(status):
                refusal.headers.update({"Location": location, "Preference-Applied": f"wait={seconds}"})
                raise refusal
            shown.status = status.status
            headers.append((b"preference-applied", b"wait=%d" % seconds))
            code = 201 if status.status == "counted" else 202
        return code, headers, msgspec.json.encode(shown)

    async def _cast_batch(self, poll_id: str, request: Request) -> Answer:
        """`POST /api/v1/polls/{id}/votes/batch`: every vote by itself, so that a bad one never fails its neighbours."""
        body = await request.read_body(MAX_BATCH_BYTES, ("application/json", "application/x-ndjson"))
        poll, taken = await self._desk.accept_batch(poll_id, _read_batch(body, request.media_type), request)
        shown = [_show_item(index, vote, poll) for index, vote in enumerate(taken)]
        for cause, votes in Counter(vote.problem.slug for vote in taken if isinstance(vote, Refusal)).items():
            metrics.refused[cause].inc(votes)
        accepted = sum(isinstance(vote, AcceptedVote) for vote in taken)
        answer = {"accepted": accepted, "refused": len(taken) - accepted, "votes": shown}
        return 200, [*_JSON, (b"cache-control", b"no-store")], msgspec.json.encode(answer)

    async def _make_voter(self, _: str, request: Request) -> Answer:
        """`POST /api/v1/voters`: an anonymous voter token for one poll, in the body and as a cookie."""
        wanted = _decode(await request.read_body(), _voter_decoder)
        poll_id, token = await self._desk.make_voter_token(wanted.poll, request)
        cookie = f"{VOTER_COOKIE}={token}; Path={POLLS}{poll_id}/; Max-Age={VOTER_COOKIE_SECONDS}; HttpOnly; SameSite=Lax"
        if settings.SESSION_COOKIE_SECURE:
            cookie += "; Secure"
        headers = [*_JSON, (b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
        return 201, headers, msgspec.json.encode({"token": token, "poll": poll_id})

    # --- Telling ----------------------------------------------------------------------------------------------------

    async def _show_results(self, poll_id: str, request: Request) -> Answer:
        """`GET /api/v1/polls/{id}/results`, 304 when the client has them already. Who may read more than others is Django's to tell."""
        is_somebody = request.authorization != ""
        poll = await self._desk.find_poll(poll_id, drafts=is_somebody)
        is_shown = not poll.is_draft and results.are_public(poll.results_visibility, poll.closes_at, microseconds_now())
        if not is_shown and _shows_a_receipt(poll, request):
            request.throttle()  # a receipt is looked up
            is_shown = await self._has_voted(poll, request)
        elif not (is_somebody and not is_shown):
            request.throttle()
        if is_somebody and not is_shown:
            raise PassOn
        if not is_shown:
            raise problems.RESULTS_HIDDEN.says(f"They are for {ResultsVisibility(poll.results_visibility).label}.")
        known = self._results.known(poll_id) or await accepting.or_unavailable(self._results.get(poll_id))
        if known is None:
            raise accepting.unknown_poll()
        etag, body = known
        headers = [(b"etag", etag), _FOR_ALL if poll.results_visibility == ResultsVisibility.ALWAYS else _FOR_ONE]
        if (if_none_match := request.headers.get(b"if-none-match")) is not None and _matches(if_none_match, etag):
            return 304, headers, b""
        return 200, [*_JSON, *headers], body

    async def _follow_results(self, poll_id: str, request: Request) -> Answer:
        """`GET /api/v1/polls/{id}/results/stream`: the results, and again whenever they change, to who may read them without signing in.

        204, which has an EventSource come back no more, for one that has the final ones.
        """
        poll = await self._desk.find_poll(poll_id)
        request.throttle()
        subject = poll_id, _shows_a_receipt(poll, request) and await self._has_voted(poll, request)
        event = Event(*await self._read_followed(subject))
        last_id = request.headers.get(b"last-event-id", b"")
        if not event.is_final:
            address = voters.address_voter(request.address)
            return 200, [*following.HEADERS], self._following.admit(subject, event, last_id, address)
        if event.id == last_id:
            return 204, [(b"cache-control", b"no-store")], b""
        return 200, [*following.HEADERS], event.message["body"]

    async def _read_followed(self, subject: Subject) -> tuple[bytes, bytes]:
        """Return ETag and body of a poll's results; raises Refusal when they are not shown to everybody, or to everybody who has voted."""
        poll_id, has_voted = subject
        poll = await self._desk.find_poll(poll_id)
        if not results.are_public(poll.results_visibility, poll.closes_at, microseconds_now(), has_voted=has_voted):
            label = ResultsVisibility(poll.results_visibility).label
            raise problems.RESULTS_HIDDEN.says(f"They are for {label}. Whoever may read them before others asks for them without /stream.")
        known = await accepting.or_unavailable(self._results.get(poll_id))
        if known is None:
            raise accepting.unknown_poll()
        return known

    async def _has_voted(self, poll: PollSnapshot, request: Request) -> bool:
        """Return whether the receipt is of a ballot in the poll that counts, or did. Raises Refusal while nobody can tell."""
        receipt = receipts.read(request.text(b"vote-receipt"))
        if receipt is None or receipt.poll_id != poll.id:
            return False
        (status,) = await self._desk.find_statuses([receipt])
        return status.has_counted

    async def _show_receipt(self, receipt: str, request: Request) -> Answer:
        """`GET /api/v1/votes/{receipt}`: what became of a vote, never what was chosen."""
        request.throttle()
        genuine = receipts.read(receipt)
        if genuine is None:
            raise problems.UNKNOWN_RECEIPT.says("Use the receipt exactly as it was given.")
        (status,) = await self._desk.find_statuses([genuine])
        return 200, [*_JSON, (b"cache-control", b"no-store")], msgspec.json.encode(_show_status(status))

    async def _show_statuses(self, _: str, request: Request) -> Answer:
        """`POST /api/v1/votes/status`: the same for many receipts, in their order; null for one that is none."""
        wanted = _decode(await request.read_body(MAX_BATCH_BYTES), _status_decoder).receipts
        request.throttle()
        if not 1 <= len(wanted) <= MAX_RECEIPTS:
            raise problems.INVALID.says(f"Send 1 to {MAX_RECEIPTS} receipts, not {len(wanted)}.", pointer="/receipts")
        genuine = [receipts.read(receipt) for receipt in wanted]
        found = iter(await self._desk.find_statuses([receipt for receipt in genuine if receipt]))
        body = {"votes": [_show_status(next(found)) if receipt else None for receipt in genuine]}
        return 200, [*_JSON, (b"cache-control", b"no-store")], msgspec.json.encode(body)


class Request(Caller):
    """What has arrived: the headers, each read on demand, and the body, or what it is received by."""

    __slots__ = ("_body", "_id", "_lines", "headers")

    def __init__(self, lines: Fields, headers: dict[bytes, bytes], peer: str, body: bytes | Receive) -> None:
        self.headers = headers
        self._lines = lines
        self._body = body
        given = self.text(b"x-request-id")
        self._id = given if given and REQUEST_ID.fullmatch(given) else None
        super().__init__(peer, self._id)

    @property
    def id(self) -> str:
        """What the client called the request, or else a name of ours: never a vote's id."""
        if self._id is None:
            self._id = new_request_id()
        return self._id

    def header(self, name: bytes) -> str | None:
        if (value := self.headers.get(name)) is None:
            return None
        if name == b"x-forwarded-for" and len(self.headers) < len(self._lines):  # some header has several lines
            value = b",".join([line for header, line in self._lines if header == name])
        return value.decode("latin-1")

    def text(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    @property
    def wait_seconds(self) -> int | None:
        """What `Prefer: wait=N` says (RFC 7240), None without it."""
        found = _WAIT.search(self.text(b"prefer")) if b"prefer" in self.headers else None
        return min(int(found[1]), accepting.MAX_WAIT_SECONDS) if found else None

    @property
    def media_type(self) -> str:
        return self.text(b"content-type").partition(";")[0].strip().lower()

    def throttle(self) -> None:
        accepting.throttle(throttling.by_address, self)

    async def read_body(self, most: int = MAX_BODY_BYTES, media_types: tuple[str, ...] = ("application/json",)) -> bytes:
        """Return the whole body. Refuses another media type, and one that is too large before reading further."""
        if self.media_type not in media_types:
            raise problems.NOT_JSON.says(f"Send `Content-Type: {' or '.join(media_types)}`.")
        length = self.headers.get(b"content-length", b"0")
        if len(length) > 9 or int(length) > most:
            raise _too_large(most)
        if isinstance(self._body, bytes):
            if len(self._body) > most:
                raise _too_large(most)
            return self._body
        body, more = bytearray(), True
        while more:
            message = await self._body()
            if message["type"] == "http.disconnect":
                raise problems.MALFORMED.says("The body ended early.")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                raise _too_large(most)
        return bytes(body)


def new_request_id() -> str:
    """Return a name for a request that came without one."""
    return f"{getrandbits(64):016x}"


def _too_large(most: int) -> Refusal:
    return problems.TOO_LARGE.says(f"This takes at most {most} bytes.")


def _read_batch(body: bytes, media_type: str) -> list[BatchItem | Refusal]:
    if media_type == "application/x-ndjson":
        items: list[Any] = [line for line in body.splitlines() if line.strip()]
    else:
        try:
            items = _list_decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise problems.MALFORMED.says("Send a JSON array of votes, or one vote a line as application/x-ndjson.") from None
    if not 1 <= len(items) <= MAX_BATCH_VOTES:
        raise problems.INVALID.says(f"A batch takes 1 to {MAX_BATCH_VOTES} votes, not {len(items)}.")
    return [_read_item(item) for item in items]


def _read_item(item: bytes | msgspec.Raw) -> BatchItem | Refusal:
    try:
        return _decode(item, _item_decoder)
    except Refusal as refusal:
        return refusal


def _show_item(index: int, taken: AcceptedVote | Refusal, poll: PollSnapshot) -> dict[str, Any] | AcceptedItem:
    if isinstance(taken, Refusal):
        return {"index": index, "status": "refused", "problem": taken.body()}
    return AcceptedItem(*poll.show(taken), "pending", iso_of(taken.accepted_at), index)


def _shows_a_receipt(poll: PollSnapshot, request: Request) -> bool:
    """Return whether the results may be shown because of a receipt, and one was sent."""
    return poll.results_visibility == ResultsVisibility.AFTER_VOTE and b"vote-receipt" in request.headers


def _matches(if_none_match: bytes, etag: bytes) -> bool:
    """Return whether the header names the ETag; weak ones are compared like strong ones (RFC 9110)."""
    return if_none_match == b"*" or etag.removeprefix(b"W/") in (tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b","))


def _show_status(status: VoteStatus) -> dict[str, Any]:
    return {
        "id": status.vote_id,
        "status": status.status,
        "reason": status.reason,
        "accepted_at": iso(status.accepted_at),
        "counted_at": status.counted_at and iso(status.counted_at),
    }


_cast_decoder = msgspec.json.Decoder(Cast)
_item_decoder = msgspec.json.Decoder(BatchItem)
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_status_decoder = msgspec.json.Decoder(StatusRequest)
_voter_decoder = msgspec.json.Decoder(VoterRequest)
_FIELD = re.compile(r"field `(\w+)`|at `\$\.(\w+)")


def _decode(body: bytes | msgspec.Raw, decoder: msgspec.json.Decoder[T]) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        # msgspec names types and fields, never the values that were sent.
        named = _FIELD.search(str(exc))
        field = named and (named[1] or named[2])
        raise problems.INVALID.says(f"{exc}.", pointer=f"/{field}" if field else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise problems.MALFORMED.says('Send a JSON object like {"option": "17"}, in UTF-8.') from None


def _read_results(poll_ids: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
    """Return ETag and body of the results of those of the polls that there are."""
    read = results.read_public_results([UUID(poll_id) for poll_id in poll_ids], at=now())
    return {str(poll_id): _written(shown) for poll_id, shown in read.items()}


def _written(shown: dict[str, Any]) -> tuple[bytes, bytes]:
    # Weak: the same results at a later moment differ in `as_of` only.
    digest = hashlib.blake2b(msgspec.json.encode({**shown, "as_of": None}), digest_size=12).hexdigest()
    return f'W/"{digest}"'.encode(), msgspec.json.encode(shown)


def refuse(refusal: Refusal, fields: Fields) -> WholeAnswer:
    """Return the answer to a request with these headers that comes to no door."""
    status, headers, body = _refuse(refusal)
    request_id = Request(fields, dict(fields), "", b"").id.encode()
    headers += [(b"x-request-id", request_id), *_FOR_BROWSERS, (b"content-length", b"%d" % len(body))]
    return status, headers, body


def _refuse(refusal: Refusal) -> WholeAnswer:
    metrics.refused[refusal.problem.slug].inc()
    headers = [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
    return (
        refusal.problem.status,
        [(b"content-type", problems.CONTENT_TYPE.encode()), (b"cache-control", b"no-store"), *headers],
        msgspec.json.encode(refusal.body()),
    )
