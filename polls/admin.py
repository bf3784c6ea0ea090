"""Django's admin: polls, tallies, API clients, dead letters. Never who voted what: votes and outcomes have no page."""

from typing import Any

from django.contrib import admin, messages
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import URLPattern, path
from django.utils.timezone import now
from kombu.exceptions import KombuError, OperationalError

from polls import deadletters, voters
from polls.models import ApiClient, DeadLetterDesk, Option, Poll, Tally

admin.site.site_header = admin.site.site_title = "Nexus"
admin.site.index_title = "Operator's desk"


class ReadOnly:
    """Looked at, not changed: what changes these rows must go through the domain."""

    def has_add_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


class OptionsInline(ReadOnly, admin.TabularInline):
    model = Option
    fields = ["position", "text", "id"]


class TalliesInline(ReadOnly, admin.TabularInline):
    model = Tally
    fields = ["selection", "votes", "revision"]


@admin.register(Poll)
class PollAdmin(admin.ModelAdmin):
    """Words may be mended here. Times, options and voters change through the API, which knows when they may."""

    list_display = ["title", "owner", "status", "voter_policy", "opens_at", "closes_at"]
    list_filter = ["voter_policy", "closed_at"]
    search_fields = ["title", "id", "owner__username"]
    list_select_related = ["owner"]
    readonly_fields = ["id", "owner", "status", "voter_policy", "allow_change", "opens_at", "closes_at", "opened_at", "closed_at"]
    fields = ["title", "description", *readonly_fields]
    inlines = [OptionsInline, TalliesInline]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Poll | None = None) -> bool:
        return False


@admin.register(Tally)
class TallyAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["poll", "selection", "votes", "revision"]
    list_select_related = ["poll"]
    search_fields = ["poll__title", "poll__id"]


@admin.register(ApiClient)
class ApiClientAdmin(admin.ModelAdmin):
    list_display = ["name", "prefix", "owner", "created_at", "revoked_at"]
    list_select_related = ["owner"]
    fields = ["name", "owner"]
    actions = ["revoke"]

    def save_model(self, request: HttpRequest, client: ApiClient, form: Any, change: bool) -> None:
        if not change:
            key = voters.new_client_key()
            client.prefix, client.key_hash = voters.key_prefix(key) or "", voters.key_hash(key)
            messages.warning(request, f"The key, shown this once: {key}")
        super().save_model(request, client, form, change)

    @admin.action(description="Revoke the keys of the selected clients")
    def revoke(self, request: HttpRequest, clients: QuerySet[ApiClient]) -> None:
        revoked = clients.filter(revoked_at=None).update(revoked_at=now())
        messages.success(request, f"{revoked} keys revoked; every web process knows within two seconds.")


@admin.register(DeadLetterDesk)
class DeadLetterAdmin(ReadOnly, admin.ModelAdmin):
    """A page on a queue instead of a table: `votes.dead`, with the button to replay it."""

    def get_urls(self) -> list[URLPattern]:
        replay = path("replay", self.admin_site.admin_view(self.replay_view), name="polls_deadletterdesk_replay")
        return [replay, *super().get_urls()]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        letters, total, broker_answers = [], 0, True
        try:
            total, letters = deadletters.count(), deadletters.peek()
        except (KombuError, OperationalError, OSError):
            broker_answers = False
        context = {
            **self.admin_site.each_context(request),
            "title": "Dead letters",
            "opts": self.model._meta,
            "letters": letters,
            "total": total,
            "broker_answers": broker_answers,
        }
        return render(request, "polls/dead_letters.html", context)

    def replay_view(self, request: HttpRequest) -> HttpResponse:
        if request.method == "POST" and request.user.is_superuser:
            try:
                messages.success(request, f"{deadletters.replay()} dead letters replayed. What still can't be counted comes back.")
            except (KombuError, OperationalError, OSError):
                messages.error(request, "The broker does not answer. Nothing is lost; try again.")
        return redirect("admin:polls_deadletterdesk_changelist")
