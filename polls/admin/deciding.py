"""What pages share on which operators decide: the reason, without which nothing is decided, and what is told afterwards."""

from collections.abc import Callable, Iterable
from typing import Any

from django import forms
from django.contrib import messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.timezone import now

from polls.admin.read_only import ReadOnly, StrictAdmin, operates
from polls.journal import Act
from polls.problems import Refusal

# Rows that are decided on at once: a request should not take minutes.
MAX_AT_ONCE = 100


class Why(forms.Form):
    """What every decision takes."""

    reason = forms.CharField(max_length=500, widget=forms.Textarea(attrs={"rows": 2, "cols": 80}))


class Deciding(ReadOnly, StrictAdmin):
    """Rows that operators decide on, one or several at once, and that others only look at."""

    list_per_page = list_max_show_all = MAX_AT_ONCE

    class Media:
        css = {"all": ["polls/cases.css"]}

    def has_decide_permission(self, request: HttpRequest) -> bool:
        return operates(request)

    def page(self, request: HttpRequest, template: str, context: dict[str, Any]) -> HttpResponse:
        return render(request, template, {**self.admin_site.each_context(request), "opts": self.opts, **context})

    def ask_why(self, request: HttpRequest, selected: QuerySet[Any], title: str, says: str) -> Act | HttpResponse | None:
        """Return the wish to do it once a reason was given; before that the page that asks for one, which also confirms it.

        None where too many are selected.
        """
        if selected.count() > MAX_AT_ONCE:
            messages.error(request, f"Select at most {MAX_AT_ONCE} at once.")
            return None
        form = Why(request.POST if "reason" in request.POST else None)
        if form.is_valid():
            return act_of(request, form)
        context = {"title": title, "says": says, "selected": selected, "action": request.POST["action"], "form": form}
        return self.page(request, "polls/decide.html", context)


def act_of(request: HttpRequest, form: forms.Form) -> Act:
    return Act(request.user.get_username(), now(), form.cleaned_data["reason"])


def tell(request: HttpRequest, decide: Callable[[], Iterable[str]], prefix: str = "") -> None:
    """Decide, and tell on the next page what was changed, or why nothing was."""
    try:
        for told in decide():
            messages.success(request, prefix + told)
    except Refusal as refusal:
        messages.error(request, prefix + refusal.detail)
