"""Who looks at pages of the admin, by what their lists are filtered, and who acts there."""

from typing import Any

from django.contrib import admin
from django.db import models
from django.http import HttpRequest

from polls import roles


class StrictAdmin(admin.ModelAdmin):
    """Lists are filtered by what `list_filter` names, and by nothing else.

    Django takes any field of the model from the address, shown or not: whether a row is listed then tells what is in it.
    """

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:
        named = self.get_list_filter(request) if request else self.list_filter
        for wanted in named:
            if isinstance(wanted, type) and issubclass(wanted, admin.SimpleListFilter):
                if lookup == wanted.parameter_name:
                    return True
            else:
                path = wanted[0] if isinstance(wanted, list | tuple) else wanted
                if lookup in (path, f"{path}__exact", f"{path}__isnull"):
                    return True
        return False


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
