"""What happens to every request that reaches Django."""

import logging
from collections.abc import Callable

from asgiref.sync import async_to_sync
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.utils.timezone import now

from core import logs
from polls import accepting, clients, throttling
from polls.accepting import Caller
from polls.api import errors
from polls.api.callers import DjangoCaller
from polls.intake import REQUEST_ID, new_request_id
from polls.problems import Refusal

logger = logging.getLogger(__name__)

GetResponse = Callable[[HttpRequest], HttpResponse]


class PagePolicies:
    """Tell browsers what a page may load (SECURE_CSP, or what the page's view says), and that it wants no camera and the like."""

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        response["Permissions-Policy"] = "camera=(), geolocation=(), microphone=(), payment=(), usb=()"
        if settings.DEBUG and response.status_code in (404, 500):  # Django's own page about the error, which styles itself
            return response
        sources = {**settings.SECURE_CSP, **getattr(response, "more_sources", {})}
        response["Content-Security-Policy"] = "; ".join(f"{what} {' '.join(allowed)}" for what, allowed in sources.items())
        return response


class OptionalSlash:
    """Make `/api/…/` the same as `/api/…`, so that no client is redirected (a redirected POST loses its body)."""

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path_info.startswith("/api/") and request.path_info.endswith("/"):
            request.path_info = request.path_info.rstrip("/")
        return self.get_response(request)


class Manners:
    """Give Django's answers what the hot routes' have: the request's id, a limit on how many an address may ask for, and blocks.

    An API client is counted by itself, once its key is known (polls/api/authentication.py), and never blocked.
    """

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        given = request.headers.get("X-Request-ID", "")
        request.given_id = given if REQUEST_ID.fullmatch(given) else None  # type: ignore[attr-defined]
        request_id = request.given_id or new_request_id()  # type: ignore[attr-defined]
        named = logs.request_id.set(request_id)
        try:
            response = self._refused(request) or self.get_response(request)
            _tell(request, response)
        finally:
            logs.request_id.reset(named)
        response["X-Request-ID"] = request_id
        if rate := getattr(request, "rate", None):
            for name, value in rate.fields:
                response[name.decode()] = value.decode()
        return response

    def _refused(self, request: HttpRequest) -> HttpResponse | None:
        """Return the answer to an address that asks too often, or is blocked from changing anything; None for any other."""
        if not request.path.startswith(("/api/", "/graphql")):
            return None
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        client_key = key.strip() if scheme.lower() == "api-key" else None
        caller = DjangoCaller(request)
        try:
            if client_key is None:
                accepting.throttle(throttling.by_address, caller)
            if request.method not in ("GET", "HEAD", "OPTIONS"):
                _refuse_blocked(request, caller, client_key)
        except Refusal as refusal:
            return errors.respond(refusal)
        finally:
            request.rate = caller.rate  # type: ignore[attr-defined]
        return None


def _tell(request: HttpRequest, response: HttpResponse) -> None:
    """Log what was decided, by the route: an address may hold a receipt or a token. Who only reads is told at DEBUG."""
    level = logging.DEBUG if request.method in ("GET", "HEAD", "OPTIONS") else logging.INFO
    if logger.isEnabledFor(level):
        route = request.resolver_match.route if request.resolver_match else "?"
        logger.log(level, "%s %s: %d", request.method, route, response.status_code)


def _refuse_blocked(request: HttpRequest, caller: Caller, client_key: str | None) -> None:
    desk = getattr(request, "scope", {}).get("desk")
    if desk is None:  # Django alone, without the web process around it: nothing but tests
        return
    try:
        async_to_sync(desk.refuse_blocked)(caller)
    except Refusal:
        # Looked up only now: anybody may write a key into a header.
        if client_key is None or clients.find(client_key, now()) is None:
            raise
