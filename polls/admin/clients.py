"""API clients and their keys."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.timezone import now

from polls import clients
from polls.admin.read_only import StrictAdmin
from polls.models import ApiClient, Scope
from polls.problems import Refusal


class ApiClientForm(forms.ModelForm):
    scopes = forms.MultipleChoiceField(choices=Scope.choices, widget=forms.CheckboxSelectMultiple)

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or {}
        owner, poll = cleaned.get("owner"), cleaned.get("poll")
        if owner and poll:
            try:
                clients.check_poll(owner, poll.pk)
            except Refusal as refusal:
                self.add_error("poll", refusal.detail)
        return cleaned


@admin.register(ApiClient)
class ApiClientAdmin(StrictAdmin):
    """Keys are shown once: when a client is made, and when it gets another one. A revoked client is only looked at."""

    form = ApiClientForm
    list_display = ["name", "prefix", "owner", "may", "poll", "created_at", "last_used_at", "revoked_at"]
    list_select_related = ["owner", "poll"]
    ordering = ["-created_at"]
    search_fields = ["name", "prefix", "owner__username"]
    readonly_fields = ["prefix", "created_at", "last_used_at", "previous_until", "revoked_at"]
    fields = ["name", "owner", "scopes", "poll", *readonly_fields]
    autocomplete_fields = ["poll"]
    actions = ["rotate", "revoke"]

    @admin.display
    def may(self, client: ApiClient) -> str:
        return ", ".join(client.scopes)

    def has_change_permission(self, request: HttpRequest, obj: ApiClient | None = None) -> bool:
        return super().has_change_permission(request, obj) and (obj is None or obj.revoked_at is None)

    def save_model(self, request: HttpRequest, client: ApiClient, form: Any, change: bool) -> None:
        if change:
            # Not the whole row: the key may have been rotated meanwhile.
            client.save(update_fields=["name", "owner", "scopes", "poll"])
        else:
            key = clients.give_key(client)
            client.save()
            messages.warning(request, f"The key, shown this once: {key}")

    @admin.action(description="Give the selected clients other keys", permissions=["change"])
    def rotate(self, request: HttpRequest, selected: QuerySet[ApiClient]) -> None:
        for client in selected:
            try:
                client, key = clients.rotate(client, at=now())
            except Refusal as refusal:
                messages.error(request, f"{client.name}: {refusal.detail}")
            else:
                until = f"{client.previous_until:%Y-%m-%d %H:%M} UTC" if client.previous_until else "now"
                messages.warning(request, f"{client.name}: the new key, shown this once: {key}. The old one works until {until}.")

    @admin.action(description="Revoke the keys of the selected clients", permissions=["change"])
    def revoke(self, request: HttpRequest, selected: QuerySet[ApiClient]) -> None:
        revoked = clients.revoke(list(selected.values_list("pk", flat=True)), at=now())
        messages.success(request, f"Keys revoked: {revoked}. Every web process knows within two seconds.")
