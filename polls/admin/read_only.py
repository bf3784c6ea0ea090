"""Who looks at pages of the admin, and who acts there."""

from django.db import models
from django.http import HttpRequest

from polls import roles


class ReadOnly:
    """Looked at, not changed: what changes these rows must go through the domain."""

    def has_add_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


def operates(request: HttpRequest) -> bool:
    return roles.actor_of(request.user).operates
