"""Django's admin: polls, tallies, API clients, dead letters. Never who voted what: votes and outcomes have no page."""

from typing import Any

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

from polls import deadletters, results, voters
from polls.models import ApiClient, DeadLetterDesk, Poll, Tally

admin.site.site_header = admin.site.site_title = "Nexus"
admin.site.index_title = "Operator's desk"


class ReadOnly:
    """Looked at, not changed: what changes these rows must go through the domain."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: models.Model | None = None) -> bool:
        return False


class ByStatus(admin.SimpleListFilter):
    title = parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(status, status) for status in ("scheduled", "open", "closed")]

    def queryset(self, request: HttpRequest, polls: QuerySet[Poll]) -> QuerySet[Poll]:
        at = now()
        match self.value():
            case "scheduled":
                return polls.filter(opens_at__gt=at)
            case "open":
                return polls.filter(opens_at__lte=at, closes_at__gt=at)
            case "closed":
                return polls.filter(closes_at__lte=at)
        return polls


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
        "voter_policy",
        "allow_change",
        "opens_at",
        "closes_at",
        "opened_at",
        "closed_at",
    ]
    fields = ["title", "description", *readonly_fields]

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
        # Not the whole row: the API or the clock may have changed the rest of it meanwhile.
        poll.save(update_fields=["title", "description"])

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


@admin.register(ApiClient)
class ApiClientAdmin(admin.ModelAdmin):
    list_display = ["name", "prefix", "owner", "created_at", "revoked_at"]
    list_select_related = ["owner"]
    ordering = ["-created_at"]
    search_fields = ["name", "prefix", "owner__username"]
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
        try:
            context |= {"total": deadletters.count(), "letters": deadletters.peek()}
        except deadletters.UnreachableError as exc:
            context["unreachable"] = str(exc)
        return render(request, "polls/dead_letters.html", context)

    def replay(self, request: HttpRequest) -> HttpResponse:
        if not request.user.is_superuser:
            raise PermissionDenied
        if request.method == "POST":
            try:
                messages.success(request, f"Dead letters replayed: {deadletters.replay()}. What still can't be counted comes back.")
            except deadletters.UnreachableError as exc:
                messages.error(request, str(exc))
        return redirect("admin:polls_deadletterdesk_changelist")
