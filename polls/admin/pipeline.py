"""The pipeline as it is now: how fast votes are counted, what waits, for whom, and whether the clock's jobs run."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.conf import settings
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db import connection, connections, transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import URLPattern, path
from django.utils.timezone import now

from polls import clocks, deadletters, finality, jobs
from polls.admin.read_only import ReadOnly, StrictAdmin
from polls.models import PipelineDesk, Poll

# The page asks for itself again after so many seconds, and waits so long for the broker.
REFRESH_SECONDS = 5
PATIENCE_SECONDS = 2
# How many polls of those that are not final are told what they wait for.
MAX_POLLS = 20
# Pages at the end of the table of votes among which the newest votes are.
_LAST_PAGES = 8

_threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pipeline")


class Newest(NamedTuple):
    """The vote that was counted last."""

    counted_at: datetime
    lag: timedelta


class Job(NamedTuple):
    name: str
    every: timedelta
    succeeded_at: datetime | None
    is_late: bool


class Closing(NamedTuple):
    poll: Poll
    waits_for: str | None


@admin.register(PipelineDesk)
class PipelineAdmin(ReadOnly, StrictAdmin):
    """A page instead of a table. No row of votes is read: it costs the same however many there are."""

    def get_urls(self) -> list[URLPattern]:
        return [path("", self.admin_site.admin_view(self.show), name="polls_pipelinedesk_changelist")]

    def show(self, request: HttpRequest) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        at = now()
        context = {**self.admin_site.each_context(request), "title": "Pipeline", "opts": self.opts, "at": at, **look(at)}
        answer = render(request, "polls/pipeline.html", context)
        answer["Refresh"] = str(REFRESH_SECONDS)  # no script is needed
        return answer


def look(at: datetime) -> dict[str, Any]:
    """Return what the page shows; what the broker does not tell in time is None."""
    survey, held = _threads.submit(deadletters.survey), _threads.submit(_with_own_connection, finality.count_bundles)
    bundles, oldest = _outbox()
    newest = _newest()
    closing = _closing(at)
    queues = _in_time(survey)
    ready = sum(queue.ready for queue in queues if queue.name in settings.VOTES_QUEUES) if queues else None
    return {
        "rates": _rates(),
        "newest": newest,
        "silence": at - newest.counted_at if newest else None,
        "queues": queues,
        "ready": ready,
        "held": _in_time(held),
        "dead_letters": next(queue.ready for queue in queues if queue.name == settings.DEAD_LETTER_QUEUE) if queues else None,
        "outbox": bundles,
        "outbox_age": at - oldest if oldest else None,
        "closing": closing,
        "jobs": _jobs(at),
        "clocks": clocks.known(),
    }


def _in_time(asked: Future[Any]) -> Any:
    try:
        return asked.result(PATIENCE_SECONDS)
    except (deadletters.UnreachableError, TimeoutError):
        return None


def _with_own_connection(ask: Any) -> Any:
    try:
        return ask()
    finally:
        connections.close_all()


# --- How fast ---------------------------------------------------------------------------------------------------------

# (when, how many outcomes there had been by then), seen by this process.
_seen: deque[tuple[float, int]] = deque(maxlen=120)


def _rates() -> list[tuple[int, float]]:
    """Return [(seconds, votes counted a second in them)], by what PostgreSQL counts of rows that were ever inserted; short time first."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT sum(n_tup_ins) FROM pg_stat_user_tables WHERE relname IN ('votes', 'outcomes')")
        (inserted,) = cursor.fetchone()
    at, inserted = time.monotonic(), int(inserted or 0)
    found = []
    for wanted in (10, 300):
        then = next(((seen_at, seen) for seen_at, seen in _seen if at - seen_at <= wanted * 1.5), None)
        if then and at - then[0] >= REFRESH_SECONDS / 2 and then[1] <= inserted:  # a server that crashed begins anew
            found.append((round(at - then[0]), (inserted - then[1]) / (at - then[0])))
    _seen.append((at, inserted))
    return list(dict(found).items())


def _newest() -> Newest | None:
    """Return what was counted last, where the table grows. An index on the moment of counting would cost every vote."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT counted_at, counted_at - accepted_at FROM votes
            WHERE ctid >= (
                SELECT format('(%%s,0)', greatest(0, pg_relation_size('votes') / current_setting('block_size')::int - %s))::tid
            )
            ORDER BY counted_at DESC LIMIT 1
            """,
            [_LAST_PAGES],
        )
        row = cursor.fetchone()
    return Newest(*row) if row else None


# --- What waits -------------------------------------------------------------------------------------------------------


def _outbox() -> tuple[int, datetime | None]:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT count(*), min(kept_at) FROM outbox")
        bundles, oldest = cursor.fetchone()
        return bundles, oldest


def _closing(at: datetime) -> list[Closing]:
    """Return the polls that have ended and are not final, the oldest first, with what each waits for."""
    late = Poll.objects.filter(finalised_at=None, archived_at=None, published_at__isnull=False, closes_at__lte=at)
    polls = list(late.order_by("closes_at")[:MAX_POLLS])
    found = finality.look(at) if polls else None
    return [Closing(poll, finality.why_not(poll, found, at)) for poll in polls] if found else []


def _jobs(at: datetime) -> list[Job]:
    """Return the clock's jobs; one is late that has not succeeded for three intervals and a minute, or never since all began."""
    succeeded = jobs.successes()
    with connection.cursor() as cursor:
        cursor.execute("SELECT min(applied) FROM django_migrations")
        (installed_at,) = cursor.fetchone()
    return [
        Job(name, every, succeeded[name], at - (succeeded[name] or installed_at) > 3 * every + timedelta(minutes=1))
        for name, every in sorted(jobs.intervals().items())
    ]
