"""Error tracking: what of an unhandled error leaves the house, when SENTRY_DSN is set."""

from typing import Any, cast

import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.types import Event, Hint
from sentry_sdk.utils import BadDsn

from core import logs

# All that is sent. Whatever the library adds beside it, requests, users, arguments of tasks, local variables, stays here.
_EVENT = ("event_id", "timestamp", "platform", "level", "logger", "environment", "release", "sdk", "transaction")
_FRAME = ("filename", "function", "module", "lineno", "context_line", "in_app")


def report_to(dsn: str, environment: str) -> None:
    """Have unhandled errors, and lines of the log that are errors, sent to this address. Raises ValueError when it is none."""
    try:
        sentry_sdk.init(
            dsn,
            environment=environment,
            before_send=scrubbed,
            auto_enabling_integrations=False,
            integrations=[DjangoIntegration(transaction_style="url"), CeleryIntegration()],
            # Not even collected:
            send_default_pii=False,
            include_local_variables=False,
            max_request_body_size="never",
            max_breadcrumbs=0,
            auto_session_tracking=False,
        )
    except BadDsn as exc:
        raise ValueError from exc


def scrubbed(event: Event, hint: Hint) -> Event:
    """Return what may be told of an error: its classes and places, never the text of an exception, which may quote a voter's row."""
    given: dict[str, Any] = {**event}
    told: dict[str, Any] = {name: given[name] for name in _EVENT if name in given}
    if record := hint.get("log_record"):
        told["logentry"] = {"formatted": logs.message_of(record)}
    told["tags"] = logs.fields_of(record) if record else logs.ids()
    if exceptions := given.get("exception", {}).get("values"):
        told["exception"] = {"values": [_scrub(exception) for exception in exceptions]}
    return cast(Event, told)


def _scrub(exception: dict[str, Any]) -> dict[str, Any]:
    kept = {name: exception[name] for name in ("type", "module") if exception.get(name)}
    if frames := (exception.get("stacktrace") or {}).get("frames"):
        kept["stacktrace"] = {"frames": [{name: frame[name] for name in _FRAME if name in frame} for frame in frames]}
    return kept
