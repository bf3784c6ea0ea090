"""What happens to every request that reaches Django."""

from collections.abc import Callable
from uuid import uuid4

from django.http import HttpRequest, HttpResponse

from polls import accepting, throttling
from polls.api import errors
from polls.api.callers import caller_of
from polls.intake import REQUEST_ID
from polls.problems import Refusal

GetResponse = Callable[[HttpRequest], HttpResponse]


class OptionalSlash:
    """Make `/api/…/` the same as `/api/…`, so that no client is redirected (a redirected POST loses its body)."""

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path_info.startswith("/api/") and request.path_info.endswith("/"):
            request.path_info = request.path_info.rstrip("/")
        return self.get_response(request)


class Manners:
    """Give Django's answers what the hot routes' have: the request's id, and a limit on how many an address may ask for.

    An API client is counted by itself, once its key is known (polls/api/authentication.py).
    """

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        given = request.headers.get("X-Request-ID", "")
        request.given_id = given if REQUEST_ID.fullmatch(given) else None  # type: ignore[attr-defined]
        response = self._refused(request) or self.get_response(request)
        response["X-Request-ID"] = request.given_id or str(uuid4())  # type: ignore[attr-defined]
        if rate := getattr(request, "rate", None):
            for name, value in rate.headers.items():
                response[name] = value
        return response

    def _refused(self, request: HttpRequest) -> HttpResponse | None:
        """Return the answer to an address that asks too often; None for one that does not."""
        is_client = request.headers.get("Authorization", "").lower().startswith("api-key ")
        if is_client or not request.path.startswith(("/api/", "/graphql")):
            return None
        caller = caller_of(request)
        try:
            accepting.throttle(throttling.by_address, caller)
        except Refusal as refusal:
            return errors.respond(refusal)
        finally:
            request.rate = caller.rate  # type: ignore[attr-defined]
        return None
