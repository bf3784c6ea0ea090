"""Dead letters."""

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import URLPattern, path

from polls import deadletters
from polls.admin.read_only import ReadOnly, StrictAdmin, operates
from polls.models import DeadLetterDesk


@admin.register(DeadLetterDesk)
class DeadLetterAdmin(ReadOnly, StrictAdmin):
    """A page on a queue instead of a table: `votes.dead`, with buttons to replay them, one or all. None drops one."""

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
        context["may_replay"] = operates(request)
        try:
            context |= {"total": deadletters.count(), "letters": deadletters.peek()}
        except deadletters.UnreachableError as exc:
            context["unreachable"] = str(exc)
        return render(request, "polls/dead_letters.html", context)

    def replay(self, request: HttpRequest) -> HttpResponse:
        if not operates(request):
            raise PermissionDenied
        if request.method == "POST":
            message_id = request.POST.get("message_id")
            try:
                replayed = deadletters.replay_one(message_id) if message_id else deadletters.replay()
                messages.success(request, f"Dead letters replayed: {replayed}. What still can't be counted comes back.")
            except deadletters.UnreachableError as exc:
                messages.error(request, str(exc))
        return redirect("admin:polls_deadletterdesk_changelist")
