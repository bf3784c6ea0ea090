"""Blocks: networks that the API refuses for a time."""

from datetime import timedelta
from functools import partial
from typing import Any

from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.utils.timezone import now

from polls import blocks
from polls.admin.deciding import Deciding, Why, act_of, tell
from polls.admin.read_only import operates
from polls.journal import Act
from polls.models import Block, SuspiciousIP
from polls.problems import Refusal

MAX_HOURS = blocks.LONGEST // timedelta(hours=1)


class NewBlock(Why):
    field_order = ["network", "hours", "reason"]

    network = forms.CharField(max_length=49, help_text="An address or a network such as 192.0.2.0/24 or 2001:db8::/64.")
    hours = forms.IntegerField(min_value=1, max_value=MAX_HOURS, initial=24)


def make_block(wanted: dict[str, Any], act: Act, case: SuspiciousIP | None = None) -> list[str]:
    """Block what NewBlock takes; return what to tell. Raises Refusal."""
    made = blocks.block(wanted["network"], act.at + timedelta(hours=wanted["hours"]), act, case)
    return [f"Blocked until {made.until:%Y-%m-%d %H:%M} UTC. Every web process knows within two seconds."]


def lift_block(block: Block, act: Act) -> list[str]:
    blocks.lift(block.pk, act)
    return ["The network is let in again. Every web process knows within two seconds."]


@admin.register(Block)
class BlockAdmin(Deciding):
    list_display_links = None
    ordering = ["-made_at", "-id"]
    actions = ["lift"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Block]:
        return blocks.active(now())

    def get_list_display(self, request: HttpRequest) -> list[Any]:
        return [*(["network"] if operates(request) else []), "until", "reason", "actor", "made_at", "case"]

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return operates(request)

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        if not operates(request):
            raise PermissionDenied
        form = NewBlock(request.POST if request.method == "POST" else None)
        if form.is_valid():
            try:
                told = make_block(form.cleaned_data, act_of(request, form))
            except Refusal as refusal:
                form.add_error(None, refusal.detail)
            else:
                tell(request, lambda: told)
                return redirect("admin:polls_block_changelist")
        return self.page(request, "polls/block.html", {"title": "Block a network", "form": form})

    def change_view(self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        """There is nothing more to see than in the list."""
        return redirect("admin:polls_block_changelist")

    @admin.action(description="Let the selected networks in again", permissions=["decide"])
    def lift(self, request: HttpRequest, selected: QuerySet[Block]) -> HttpResponse | None:
        act = self.ask_why(request, selected, "Let the networks in again", "Before their time. Their cases stay as they are.")
        if not isinstance(act, Act):
            return act
        for block in selected:
            tell(request, partial(lift_block, block, act), f"{block}: ")
        return None
