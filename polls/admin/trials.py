"""The page on which a rule is tried: whom it would flag on the stored votes, and what that would change. Changes nothing itself."""

from typing import Any
from uuid import UUID

from django import forms
from django.core.exceptions import PermissionDenied
from django.db import OperationalError
from django.http import HttpRequest

from polls import cases, fraud, roles
from polls.admin.deciding import act_of
from polls.admin.read_only import operates
from polls.journal import LONGEST_REASON
from polls.models import Option, Poll
from polls.problems import Refusal

# Of what a rule finds, the most suspicious; their number is beside them.
MAX_SHOWN = 50
# Polls that the page offers, the newest; any other can be named by its id.
MAX_POLLS = 50


class Trial(forms.Form):
    """A rule with its parameters, in one poll or in all that took votes lately. One about choices is tried as it is in force only."""

    poll = forms.UUIDField(required=False, help_text="The poll's id; none: all polls that took votes lately.")
    reason = forms.CharField(max_length=LONGEST_REASON, help_text="For the record: it shows how results would change.")

    def __init__(self, rule: fraud.Rule, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["poll"].widget.attrs = {"list": "polls", "size": 40}
        in_use = {} if rule.is_about_choices else fraud.parameters_of(rule) or rule.parameters
        for name, value in in_use.items():
            smallest, largest, meaning = fraud.PARAMETERS[name]
            self.fields[name] = forms.FloatField(
                initial=f"{value:g}", min_value=smallest, max_value=largest, help_text=meaning, label=name.replace("_", " ")
            )
            self.fields[name].widget.attrs["step"] = "any"


def trial_of(request: HttpRequest) -> dict[str, Any]:
    """Return what polls/trial.html shows: the form, and once it was sent what the rule finds."""
    if not operates(request):
        raise PermissionDenied
    rule = fraud.RULES.get(request.GET.get("rule", ""), next(iter(fraud.RULES.values())))
    was_sent = request.method == "POST"
    form = Trial(rule, request.POST if was_sent else None)
    context = {
        "title": "Try a rule",
        "rule": rule,
        "rules": fraud.RULES.values(),
        "form": form,
        "polls": Poll.objects.order_by("-created_at", "-id")[:MAX_POLLS],
    }
    if not was_sent or not form.is_valid():
        return context
    poll_id: UUID | None = form.cleaned_data["poll"]
    parameters = {name: value for name, value in form.cleaned_data.items() if name not in ("poll", "reason")}
    reader, act = roles.actor_of(request.user), act_of(request, form)
    try:
        trial = fraud.try_rule(rule.name, act, lambda poll: reader.reads_results(poll, act.at), poll_id=poll_id, parameters=parameters)
    except Refusal as refusal:
        return {**context, "refused": refusal.detail}
    except OperationalError:  # it has half a minute (fraud.py)
        return {**context, "refused": "That took too long, or the database does not answer. Try it in one poll."}
    texts = Option.objects.select_related("poll").in_bulk(list(trial.changes or {}))
    shown = Poll.objects.in_bulk({case.poll_id for case in trial.cases[:MAX_SHOWN] if case.poll_id})
    return {
        **context,
        "trial": trial,
        "changes": [(texts[option], *change) for option, change in (trial.changes or {}).items() if option in texts],
        "found": [(case, cases.network_of(case), shown.get(case.poll_id)) for case in trial.cases[:MAX_SHOWN]],
    }
