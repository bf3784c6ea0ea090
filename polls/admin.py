"""Django's admin: polls, tallies, API clients, dead letters. Never who voted what: votes and outcomes have no page."""

from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import URLPattern, path
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timezone import now

from polls import clients, deadletters, editing, results, roles
from polls.journal import Act
from polls.models import ApiClient, DeadLetterDesk, JournalEntry, Poll, PollQuerySet, PollStatus, Scope, Tally
from polls.problems import Refusal

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


class ByStatus(admin.SimpleListFilter):
    title = parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(status, status) for status in PollStatus.values]

    def queryset(self, request: HttpRequest, polls: QuerySet[Poll]) -> QuerySet[Poll]:
        status = self.value()
        return cast(PollQuerySet, polls).in_status(status, now()) if status in PollStatus.values else polls


class JournalInline(ReadOnly, admin.TabularInline):
    """What happened to the poll, latest first."""

    model = JournalEntry
    verbose_name_plural = "journal"
    fields = ["at", "actor", "action", "reason", "changes"]
    ordering = ["-id"]
    extra = 0


@admin.register(Poll)
class PollAdmin(admin.ModelAdmin):
    """Words may be mended here. Times, options and voters change through the API, which knows when they may."""

    list_display = ["title", "owner", "status", "voters", "opens_at", "closes_at"]
    list_filter = [ByStatus, "voter_policy"]
    list_select_related = ["owner"]
    ordering = ["-created_at"]
    search_fields = ["title", "id", "owner__username"]
    readonly_fields = [
        "results",
        "id",
        "owner",
        "status",
        "version",
        "method",
        "min_choices",
        "max_choices",
        "voter_policy",
        "allow_change",
        "allow_withdrawal",
        "address_limit",
        "subnet_limit",
        "limit_mode",
        "allowed_networks",
        "results_visibility",
        "created_at",
        "published_at",
        "opens_at",
        "opened_at",
        "closes_at",
        "closed_at",
        "finalised_at",
        "archived_at",
    ]
    fields = ["title", "description", *readonly_fields]
    inlines = [JournalInline]

    @admin.display(ordering="voter_policy")
    def voters(self, poll: Poll) -> str:
        return poll.voter_policy

    @admin.display
    def results(self, poll: Poll) -> SafeString:
        """The poll's tallies as the API shows them."""
        read = results.read_results(poll.pk, at=now())
        options = read["options"] if read else []
        rows = [(option["position"], option["text"], option["votes"], f"{option['share']:.1%}", option["id"]) for option in options]
        return format_html(
            "<table><tr><th>Position</th><th>Option</th><th>Votes</th><th>Share</th><th>Id</th></tr>{}</table>",
            format_html_join("", "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", rows),
        )

    def save_model(self, request: HttpRequest, poll: Poll, form: Any, change: bool) -> None:
        words = {"title": poll.title, "description": poll.description}
        editing.change_poll(poll.pk, words, Act(request.user.get_username(), now(), reason="in the admin"))

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Poll | None = None) -> bool:
        return False


@admin.register(Tally)
class TallyAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["poll", "chosen", "votes", "revision"]
    list_display_links = None
    ordering = ["-poll__created_at", "poll_id", "-votes"]
    search_fields = ["poll__title", "poll__id"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Tally]:
        return super().get_queryset(request).select_related("poll").prefetch_related("poll__options")

    @admin.display
    def chosen(self, tally: Tally) -> str:
        texts = {option.pk: option.text for option in tally.poll.options.all()}
        return ", ".join(texts.get(option, str(option)) for option in tally.selection)


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
class ApiClientAdmin(admin.ModelAdmin):
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


@admin.register(DeadLetterDesk)
class DeadLetterAdmin(ReadOnly, admin.ModelAdmin):
    """A page on a queue instead of a table: `votes.dead`, with the button to replay it."""

    def get_urls(self) -> list[URLPattern]:
        wrap = self.admin_site.admin_view
        return [
            path("", wrap(self.show), name="polls_deadletterdesk_changelist"),
            path("replay", wrap(self.replay), name="polls_deadletterdesk_replay"),
        ]

    def show(self, request: HttpRequest) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {**self.admin_site.each_context(request), "title": "Dead letters", "opts": self.model._meta}
        context["may_replay"] = may_replay(request)
        try:
            context |= {"total": deadletters.count(), "letters": deadletters.peek()}
        except deadletters.UnreachableError as exc:
            context["unreachable"] = str(exc)
        return render(request, "polls/dead_letters.html", context)

    def replay(self, request: HttpRequest) -> HttpResponse:
        if not may_replay(request):
            raise PermissionDenied
        if request.method == "POST":
            try:
                messages.success(request, f"Dead letters replayed: {deadletters.replay()}. What still can't be counted comes back.")
            except deadletters.UnreachableError as exc:
                messages.error(request, str(exc))
        return redirect("admin:polls_deadletterdesk_changelist")


def may_replay(request: HttpRequest) -> bool:
    return roles.actor_of(request.user).operates
