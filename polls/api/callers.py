"""Who calls Django's views, as the hot routes see a caller, and how often a caller may guess."""

from django.http import HttpRequest
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle

from polls import accepting, throttling
from polls.accepting import Caller


class DjangoCaller(Caller):
    """Who sends a request that Django answers. `idempotency_key`: what the request says in another place than its header."""

    __slots__ = ("_headers", "_key")

    def __init__(self, request: HttpRequest, idempotency_key: str | None = None) -> None:
        super().__init__(request.META.get("REMOTE_ADDR", ""), getattr(request, "given_id", None))
        self._headers = request.headers
        self._key = idempotency_key

    @property
    def idempotency_key(self) -> str | None:
        return super().idempotency_key if self._key is None else self._key

    def header(self, name: bytes) -> str | None:
        return self._headers.get(name.decode())


class ByAttempts(BaseThrottle):
    """Few tries for an address where a guesser could succeed."""

    def allow_request(self, request: Request, view: object) -> bool:
        if request.method == "POST":
            accepting.throttle(throttling.attempts, DjangoCaller(request._request))
        return True
