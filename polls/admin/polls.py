"""Polls and tallies."""

import json
from typing import Any, cast

from django.contrib import admin, messages
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timezone import now

from polls import editing, journal, results
from polls.admin.read_only import ReadOnly
from polls.journal import Act
from polls.models import JournalEntry, Poll, PollQuerySet, PollStatus, ResultsVisibility, Tally
from polls.problems import Refusal


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
    fields = readonly_fields = ["at", "actor", "action", "reason", "shown"]  # type: ignore[assignment]
    ordering = ["-id"]
    extra = 0

    @admin.display(description="changes")
    def shown(self, entry: JournalEntry) -> str:
        if journal.tells_tallies(entry.action, entry.changes) and _is_sealed(entry.poll):
            return "sealed"
        return json.dumps(entry.changes, ensure_ascii=False)


@admin.register(Poll)
class PollAdmin(admin.ModelAdmin):
    """Words may be mended here until the poll opens. Errata, times, options and voters are for the API, which knows when."""

    list_display = ["title", "owner", "status", "voters", "opens_at", "closes_at"]
    list_filter = [ByStatus, "voter_policy"]
    list_select_related = ["owner"]
    ordering = ["-created_at"]
    search_fields = ["title", "id", "owner__username"]
    readonly_fields = [
        "results",
        "errata",
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
        "auto_quarantine",
        "rule_parameters",
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
        """The poll's tallies as the API shows them, to whom it shows them."""
        if _is_sealed(poll):
            return format_html("{}", f"Sealed until the poll's end, {poll.closes_at:%Y-%m-%d %H:%M:%S} UTC.")
        read = results.read_results(poll.pk, at=now())
        options = read["options"] if read else []
        rows = [(option["position"], option["text"], option["votes"], f"{option['share']:.1%}", option["id"]) for option in options]
        return format_html(
            "<table><tr><th>Position</th><th>Option</th><th>Votes</th><th>Share</th><th>Id</th></tr>{}</table>",
            format_html_join("", "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", rows),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Poll | None = None) -> list[str]:
        words = ["title", "description"] if obj and editing.is_frozen(obj, now()) else []
        return [*words, *self.readonly_fields]

    def save_model(self, request: HttpRequest, poll: Poll, form: Any, change: bool) -> None:
        words = {"title": poll.title, "description": poll.description}
        try:
            editing.change_poll(poll.pk, words, Act(request.user.get_username(), now(), reason="in the admin"))
        except Refusal as refusal:  # it opened after the form was read
            messages.error(request, refusal.detail)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Poll | None = None) -> bool:
        return False


def _is_sealed(poll: Poll) -> bool:
    return results.are_sealed(poll.results_visibility, poll.closes_at, now())


@admin.register(Tally)
class TallyAdmin(ReadOnly, admin.ModelAdmin):
    list_display = ["poll", "chosen", "votes", "revision"]
    list_display_links = None
    ordering = ["-poll__created_at", "poll_id", "-votes"]
    search_fields = ["poll__title", "poll__id"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Tally]:
        sealed = Q(poll__results_visibility=ResultsVisibility.SEALED, poll__closes_at__gt=now())
        return super().get_queryset(request).exclude(sealed).select_related("poll").prefetch_related("poll__options")

    @admin.display
    def chosen(self, tally: Tally) -> str:
        texts = {option.pk: option.text for option in tally.poll.options.all()}
        return ", ".join(texts.get(option, str(option)) for option in tally.selection)
