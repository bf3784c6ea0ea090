"""Suspicious addresses: what rules found, what helps to decide, and the decisions. What changes goes through polls/review.py."""

from collections.abc import Callable
from datetime import datetime
from functools import cache, partial
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.timezone import now

from polls import cases, disclosure, fraud, review, roles
from polls.admin.blocks import MAX_HOURS, NewBlock, make_block
from polls.admin.charts import bars_of
from polls.admin.deciding import Deciding, Why, act_of, tell
from polls.admin.read_only import ReadOnly, StrictAdmin, operates
from polls.admin.trials import trial_of
from polls.journal import Act
from polls.models import CaseState, Decision, Option, Poll, Ruling, SuspiciousIP

# Polls of a case over all polls for which its page says what they voted for.
MAX_POLLS = 5

# What a decision did to votes; the others are about networks.
_DID = {
    Ruling.QUARANTINE: "held out of the tally",
    Ruling.RELEASE: "put back",
    Ruling.VOID: "left out for good",
    Ruling.CLEAR: "put back",
}
# In the order of the buttons: {ruling: what it does}.
RULINGS = {
    Ruling.QUARANTINE: "Hold the votes out of the tally until somebody decides. The case stays open.",
    Ruling.VOID: "Leave the votes out for good. The case is confirmed.",
    Ruling.RELEASE: "Put the votes back. The case stays open.",
    Ruling.CLEAR: "Nothing is wrong: what the case keeps out is put back. The case is cleared.",
}


def decided(decision: Decision, *, reads_results: bool) -> str:
    """Return what a decision changed, in words: "500 votes left out for good: soup 812 → 312."."""
    ruling = Ruling(decision.ruling)
    told = disclosure.changes_of(decision) if reads_results else None
    if ruling == Ruling.LOOK:
        return f"Looked at {decision.votes} votes{': ' + _in_words(told) if told else ''}."
    if ruling not in _DID:
        return "The network is refused." if ruling == Ruling.BLOCK else "The network is let in again."
    if not decision.votes:
        return "No vote changed."
    votes = f"{decision.votes} vote{'' if decision.votes == 1 else 's'} {_DID[ruling]}"
    if told is None:
        return f"{votes}."
    return f"{votes}: {_in_words(told)}." if told else f"{votes}; the results are the same."


def _in_words(changes: dict[str, list[int]]) -> str:
    texts = Option.objects.in_bulk(list(map(int, changes)))
    return ", ".join(f"{texts.get(int(option), option)} {before} → {after}" for option, (before, after) in changes.items())


def rule(case: SuspiciousIP, ruling: Ruling, act: Act, request: HttpRequest) -> list[str]:
    reads = readable(request, act.at)
    return [decided(decision, reads_results=reads(decision.poll_id)) for decision in review.rule_on_case(case.pk, ruling, act)]


def readable(request: HttpRequest, at: datetime) -> Callable[[UUID | None], bool]:
    """Return what tells, by a poll's id, whether who asks may read its results."""
    reader = roles.actor_of(request.user)

    @cache
    def reads_results(poll_id: UUID | None) -> bool:
        poll = Poll.objects.filter(pk=poll_id).first() if poll_id else None
        return poll is not None and reader.reads_results(poll, at)

    return reads_results


def _rounded(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


class ByState(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(state, state) for state in CaseState.values]

    def queryset(self, request: HttpRequest, found: QuerySet[SuspiciousIP]) -> QuerySet[SuspiciousIP]:
        return found.filter(state=self.value()) if self.value() in CaseState.values else found


@admin.register(SuspiciousIP)
class CaseAdmin(Deciding):
    change_list_template = "polls/cases.html"
    list_filter = [ByState, "rule", ("kind", admin.AllValuesFieldListFilter)]
    list_select_related = ["poll", "network_secret"]
    ordering = ["-found_at", "-id"]
    search_fields = ["poll__title", "poll__id"]
    search_help_text = "Title or id of a poll"
    actions = ["quarantine", "void", "clear"]

    # --- The list ---

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        network = ["network"] if operates(request) else []
        return ["case", "state_", *network, "about", "votes", "how_far", "latest"]

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        return super().changelist_view(request, {"may_decide": operates(request), "title": "Suspicious addresses"})

    @admin.display(ordering="id", description="case")
    def case(self, case: SuspiciousIP) -> str:
        return str(case)

    @admin.display
    def network(self, case: SuspiciousIP) -> str:
        return cases.network_of(case) or "unreadable by now"

    @admin.display(description="poll", ordering="poll__title")
    def about(self, case: SuspiciousIP) -> str:
        return str(case.poll) if case.poll else "all polls"

    @admin.display(description="score", ordering="score")
    def how_far(self, case: SuspiciousIP) -> SafeString:
        """How many times the threshold, as a bar that is full at ten times."""
        width = round(min(case.score, 10) * 10)
        return format_html('<svg class="case-score"><rect width="{}%" height="100%"/></svg> {}', width, f"{case.score:.1f}")

    @admin.display(description="last vote (UTC)", ordering="last_seen")
    def latest(self, case: SuspiciousIP) -> str:
        return f"{case.last_seen:%m-%d %H:%M}"

    @admin.display(description="state", ordering="state")
    def state_(self, case: SuspiciousIP) -> SafeString:
        return format_html('<span class="case-state {}">{}</span>', case.state, case.state)

    # --- Several at once ---

    @admin.action(description="Quarantine the votes of the selected cases", permissions=["decide"])
    def quarantine(self, request: HttpRequest, selected: QuerySet[SuspiciousIP]) -> HttpResponse | None:
        return self._decide(request, selected, Ruling.QUARANTINE)

    @admin.action(description="Void the votes of the selected cases", permissions=["decide"])
    def void(self, request: HttpRequest, selected: QuerySet[SuspiciousIP]) -> HttpResponse | None:
        return self._decide(request, selected, Ruling.VOID)

    @admin.action(description="Clear the selected cases", permissions=["decide"])
    def clear(self, request: HttpRequest, selected: QuerySet[SuspiciousIP]) -> HttpResponse | None:
        return self._decide(request, selected, Ruling.CLEAR)

    def _decide(self, request: HttpRequest, selected: QuerySet[SuspiciousIP], ruling: Ruling) -> HttpResponse | None:
        """Rule on one case after the other: each is one transaction."""
        act = self.ask_why(request, selected, f"{ruling.capitalize()} {selected.count()} cases", RULINGS[ruling])
        if not isinstance(act, Act):
            return act
        for case in selected:
            tell(request, partial(rule, case, ruling, act, request), f"{case}: ")
        return None

    # --- One ---

    def get_urls(self) -> list[URLPattern]:
        wrap = self.admin_site.admin_view
        own = [
            path("try", wrap(self.try_rule), name="polls_suspiciousip_try"),
            path("<int:case_id>/decide", wrap(self.decide), name="polls_suspiciousip_decide"),
        ]
        return own + super().get_urls()

    def try_rule(self, request: HttpRequest) -> HttpResponse:
        return self.page(request, "polls/trial.html", trial_of(request))

    def change_view(self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        """Show the case: what helps to decide, and the buttons."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        case = self.get_object(request, object_id)
        if case is None:
            raise Http404
        may_decide, at = operates(request), now()
        reads = readable(request, at)
        network = cases.network_of(case) if may_decide else None
        return self.page(
            request,
            "polls/case.html",
            {
                "title": str(case),
                "case": case,
                "network": network,
                "rule": fraud.RULES.get(case.rule),
                "evidence": [
                    (name.replace("_", " "), _rounded(value)) for name, value in fraud.without_choices(case.rule, case.evidence).items()
                ],
                "fates": cases.fates(case),
                "chart": bars_of(*cases.over_time(case)),
                "choices": review.choices(case, Act(request.user.get_username(), at), lambda poll: reads(poll.pk))[:MAX_POLLS],
                "least": disclosure.LEAST_VOTERS,
                "addresses": cases.addresses(case),
                "neighbours": [(other, cases.network_of(other) if may_decide else None) for other in cases.neighbours(case)],
                "holds": cases.holds(case),
                "decisions": [
                    (decision, decided(decision, reads_results=reads(decision.poll_id)))
                    for decision in cases.decisions(case)[: cases.MAX_SHOWN]
                ],
                "blocks": case.blocks.filter(until__gt=now()),
                "may_decide": may_decide,
                "rulings": RULINGS,
                "max_hours": MAX_HOURS,
            },
        )

    def decide(self, request: HttpRequest, case_id: int) -> HttpResponse:
        if not operates(request):
            raise PermissionDenied
        case = get_object_or_404(SuspiciousIP, pk=case_id)
        if request.method == "POST":
            self._decide_on(request, case, request.POST.get("ruling"))
        return redirect("admin:polls_suspiciousip_change", case_id)

    def _decide_on(self, request: HttpRequest, case: SuspiciousIP, asked: str | None) -> None:
        form = (NewBlock if asked == Ruling.BLOCK else Why)(request.POST)
        if asked not in (*RULINGS, Ruling.BLOCK):
            messages.error(request, "Press one of the buttons.")
        elif not form.is_valid():
            messages.error(request, " ".join(f"{field}: {found[0]}" for field, found in form.errors.items()))
        elif asked == Ruling.BLOCK:
            tell(request, partial(make_block, form.cleaned_data, act_of(request, form), case))
        else:
            tell(request, partial(rule, case, Ruling(asked), act_of(request, form), request))


@admin.register(Decision)
class DecisionAdmin(ReadOnly, StrictAdmin):
    """Only ever added, by decisions; nobody can change them."""

    list_display_links = None
    list_filter = ["ruling", "actor"]
    fields = readonly_fields = ("at", "actor", "ruling", "votes", "reason", "about")
    ordering = ["-id"]
    search_fields = ["poll_id", "actor", "reason"]
    list_per_page = 50

    @admin.display(description="cases")
    def about(self, decision: Decision) -> SafeString:
        links = ((reverse("admin:polls_suspiciousip_change", args=[case]), case) for case in decision.cases[: cases.MAX_SHOWN])
        return format_html_join(", ", '<a href="{}">#{}</a>', links)

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        reads = readable(request, now())

        @admin.display
        def what_changed(decision: Decision) -> str:
            return decided(decision, reads_results=reads(decision.poll_id))

        return ["at", "actor", "ruling", "votes", "reason", "about", what_changed]
