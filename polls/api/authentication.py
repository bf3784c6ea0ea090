"""Who asks the REST framework's views: a signed-in user, or an API client with its key."""

from typing import Any, cast

from django.contrib.auth.models import User
from django.utils.timezone import now
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from polls import accepting, clients, roles, throttling
from polls.api.callers import DjangoCaller
from polls.models import ApiClient


class ApiKeyAuthentication(BaseAuthentication):
    """`Authorization: Api-Key <key>`: the client's owner, with the client beside it in `request.auth`."""

    def authenticate(self, request: Request) -> tuple[User, ApiClient] | None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "api-key":
            return None
        at, caller = now(), DjangoCaller(request._request)
        try:
            client = clients.find(key.strip(), at)
            if client is None:
                accepting.throttle(throttling.by_address, caller)
                raise AuthenticationFailed("This API key is wrong or revoked.")
            accepting.throttle_client(client.pk, caller)
        finally:
            request._request.rate = caller.rate  # type: ignore[attr-defined]
        clients.note_use(client.pk, at)
        return client.owner, client

    def authenticate_header(self, request: Request) -> str:
        return "Api-Key"


def actor(request: Request) -> roles.Actor:
    """Return who asks; read once per request."""
    known: Any = getattr(request, "actor", None)
    if known is None:
        client = request.auth if isinstance(request.auth, ApiClient) else None
        known = request.actor = roles.actor_of(request.user, client)  # type: ignore[attr-defined]
    return cast(roles.Actor, known)
