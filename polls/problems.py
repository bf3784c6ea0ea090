"""What a refused request is told: one table of problems, the same for the hot routes, the API and the documentation (RFC 9457)."""

from dataclasses import dataclass, field
from typing import Any

CONTENT_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Problem:
    """A kind of problem. `slug` is on the wire (in `type`): it never changes its meaning."""

    slug: str
    status: int
    title: str

    @property
    def type(self) -> str:
        return f"/problems/{self.slug}"

    def says(self, detail: str, *, pointer: str | None = None, headers: dict[str, str] | None = None) -> "Refusal":
        """Return the refusal with a sentence that helps; `pointer` is a JSON pointer (RFC 6901) to the field at fault."""
        return Refusal(self, detail, [{"detail": detail, "pointer": f"#{pointer}"}] if pointer else [], headers or {})


@dataclass
class Refusal(Exception):
    """One request's problem, ready to be sent."""

    problem: Problem
    detail: str
    errors: list[dict[str, str]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return `{"type", "title", "status", "detail", "errors": [{"detail", "pointer"}]}`; `errors` only where a field is at fault."""
        shown = {"type": self.problem.type, "title": self.problem.title, "status": self.problem.status, "detail": self.detail}
        return {**shown, "errors": self.errors} if self.errors else shown


BAD_REQUEST = Problem("bad-request", 400, "The request is not one of HTTP/1.1")
MALFORMED = Problem("malformed", 400, "The body is not valid JSON")
INVALID = Problem("invalid", 400, "A field is missing or wrong")
UNAUTHENTICATED = Problem("unauthenticated", 401, "Sign in first")
FORBIDDEN = Problem("forbidden", 403, "You may not do this")
UNKNOWN_CODE = Problem("unknown-code", 403, "The poll has no such voter code")
BLOCKED = Problem("blocked", 403, "Your network is blocked for a time")
LIMIT_REACHED = Problem("limit-reached", 403, "As many have voted from this network as the poll allows")
RESULTS_HIDDEN = Problem("results-hidden", 403, "The results are not shown to you yet")
NOT_FOUND = Problem("not-found", 404, "There is nothing here")
UNKNOWN_POLL = Problem("unknown-poll", 404, "There is no such poll")
UNKNOWN_RECEIPT = Problem("unknown-receipt", 404, "There is no such receipt")
WRONG_METHOD = Problem("wrong-method", 405, "This method is not offered here")
NOT_ACCEPTABLE = Problem("not-acceptable", 406, "Only JSON is offered")
POLL_NOT_OPEN = Problem("poll-not-open", 409, "The poll is not open yet")
POLL_CLOSED = Problem("poll-closed", 409, "The poll is closed")
POLL_IN_USE = Problem("poll-in-use", 409, "The poll can't be changed like this any more")
CLIENT_REVOKED = Problem("client-revoked", 409, "The API client is revoked")
NOT_OFFERED = Problem("not-offered", 409, "This poll does not offer that")
DUPLICATE = Problem("duplicate", 409, "The voter has voted already")
SUPERSEDED = Problem("superseded", 409, "A later vote of the voter stands")
CHANGED_MEANWHILE = Problem("changed-meanwhile", 412, "It has changed since you read it")
TOO_LARGE = Problem("too-large", 413, "The body is too large")
NOT_JSON = Problem("not-json", 415, "This media type is not taken")
ENCODED_BODY = Problem("encoded-body", 415, "The body is encoded")
UNKNOWN_OPTION = Problem("unknown-option", 422, "The poll has no such option")
WRONG_CHOICES = Problem("wrong-choices", 422, "The ballot has too few or too many options")
KEY_REUSED = Problem("key-reused", 422, "The Idempotency-Key belongs to another choice")
TOO_MANY_REQUESTS = Problem("too-many-requests", 429, "Too many requests")
SERVER_ERROR = Problem("server-error", 500, "Something went wrong on our side")
UNKNOWN_TRANSFER = Problem("unknown-transfer", 501, "This transfer coding is not known here")
NOT_ACCEPTED = Problem("not-accepted", 503, "The vote can't be accepted right now")
UNAVAILABLE = Problem("unavailable", 503, "This can't be answered right now")

ALL = [value for value in list(globals().values()) if isinstance(value, Problem)]
