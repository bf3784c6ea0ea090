"""Who calls Django's views, as the hot routes see a caller, and how often a caller may guess."""

from django.http import HttpRequest
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle

from polls import accepting, throttling
from polls.accepting import Caller


def caller_of(request: HttpRequest) -> Caller:
    return Caller(
        peer=request.META.get("REMOTE_ADDR", ""),
        forwarded_for=request.headers.get("X-Forwarded-For", ""),
        authorization=request.headers.get("Authorization", ""),
        voter_token=request.headers.get("Voter-Token", ""),
        idempotency_key=request.headers.get("Idempotency-Key"),
        request_id=getattr(request, "given_id", None),
        browser="\n".join(request.headers.get(name, "") for name in accepting.BROWSER_HEADERS).encode("latin-1", "replace"),
    )


class ByAttempts(BaseThrottle):
    """Few tries for an address where a guesser could succeed."""

    def allow_request(self, request: Request, view: object) -> bool:
        if request.method == "POST":
            accepting.throttle(throttling.attempts, caller_of(request._request))
        return True
