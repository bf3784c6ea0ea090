"""What happens to every request that reaches Django."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse


class OptionalSlash:
    """Make `/api/…/` the same as `/api/…`, so that no client is redirected (a redirected POST loses its body)."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path_info.startswith("/api/") and request.path_info.endswith("/"):
            request.path_info = request.path_info.rstrip("/")
        return self.get_response(request)
