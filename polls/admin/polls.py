"""Polls and tallies."""

import json
from functools import cache
from typing import Any, cast

from django.contrib import admin, messages
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timezone import now

from polls import disclosure, editing, results, roles
from polls.admin.read_only import ReadOnly, StrictAdmin
from polls.journal import Act
from polls.models import JournalEntry, Poll, PollQuerySet, PollStatus, Tally
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
    fields = ["at", "actor", "action", "reason", "told"]
    readonly_fields = ["told"]
    ordering = ["-id"]
    extra = 0

    def get_queryset(self, request: HttpRequest) -> QuerySet[JournalEntry]:
        self._reader = roles.actor_of(request.user)  # an inline is made for each request
        return super().get_queryset(request).select_related("poll")

    @admin.display(description="changes")
    def told(self, entry: JournalEntry) -> str:
        reads_tallies = self._reader.reads_results(entry.poll, now()) and not results.are_held_back(entry.poll_id)
        return json.dumps(disclosure.journal_of(entry, reads_tallies=reads_tallies), ensure_ascii=False)


@admin.register(Poll)
class PollAdmin(StrictAdmin):
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
        "results_step",
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

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Poll | None:
        poll = super().get_object(request, object_id, from_field)
        if poll is not None:
            poll.reader = roles.actor_of(request.user)
        return poll

    @admin.display
    def results(self, poll: Poll) -> SafeString:
        """The poll's tallies as the API shows them to whoever looks."""
        at = now()
        if results.are_sealed(poll.results_visibility, poll.closes_at, at):
            return format_html("<p>Sealed until the poll's end, {}.</p>", f"{poll.closes_at:%Y-%m-%d %H:%M:%S} UTC")
        read = results.read_results(poll.pk, at) if poll.reader.reads_results(poll, at) else None  # type: ignore[attr-defined] # get_object
        if read is None:
            return format_html("<p>They are for {}.</p>", poll.get_results_visibility_display())
        rows = [(option["position"], option["text"], option["votes"], f"{option['share']:.1%}", option["id"]) for option in read["options"]]
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


@admin.register(Tally)
class TallyAdmin(ReadOnly, StrictAdmin):
    """The tallies, as the results show them to whoever looks."""

    list_display_links = None
    fields = readonly_fields = ("poll", "chosen")
    ordering = ["-poll__created_at", "poll_id", "selection"]
    search_fields = ["poll__title", "poll__id"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Tally]:
        """Only rows that the results show too: that there is one tells that somebody chose the option."""
        readable = roles.actor_of(request.user).with_readable_results(Poll.objects.all(), now())
        # Rather too many: where enough ballots have come since, the poll's page shows them all the same.
        held_back = Q(poll__finalised_at=None) & (Q(poll__results_step__gt=1) | Q(poll__shown_results__step__gt=0))
        shown = super().get_queryset(request).filter(poll__in=readable).exclude(held_back)
        return shown.select_related("poll").prefetch_related("poll__options")

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        reader, at = roles.actor_of(request.user), now()

        @cache
        def votes_of(poll: Poll) -> dict[int | None, int]:
            read = results.read_results(poll.pk, at) if reader.reads_results(poll, at) else None
            return {None: read["total_votes"], **{int(option["id"]): option["votes"] for option in read["options"]}} if read else {}

        @admin.display(description="votes")
        def votes(tally: Tally) -> int | str:
            return votes_of(tally.poll).get(tally.selection[0] if tally.selection else None, "hidden")

        return ["poll", "chosen", votes]

    @admin.display
    def chosen(self, tally: Tally) -> str:
        texts = {option.pk: option.text for option in tally.poll.options.all()}
        return ", ".join(texts.get(option, str(option)) for option in tally.selection)
