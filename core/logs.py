"""How a line of the log looks, and what stands in none: the text of an exception, which may quote a voter's row."""

import json
import logging
import logging.config
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery import current_task
from django.conf import settings

# The request that is being answered, for every line that is written meanwhile.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

# What a line may say beside its text (`extra`). Nothing else: Celery adds the arguments of tasks, and so votes.
_FIELDS = ("request_id", "vote_id", "task_id")
_ROOT = f"{Path(__file__).parent.parent}/"


def configure(config: dict[str, Any]) -> None:
    """Log like this, warnings of Python's included. Django calls it for LOGGING_CONFIG, and Celery's processes through core/celery.py."""
    logging.config.dictConfig(config)
    logging.captureWarnings(True)
    logging.raiseExceptions = settings.DEBUG  # else a line that can't be formatted would be shown with all that is in it


class Text(logging.Formatter):
    """Lines for people. `texts` says whether exceptions are shown in full, with their texts: in development only."""

    def __init__(self, *, texts: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._texts = texts

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record, self.datefmt)} {record.levelname:<7} {record.name}: {self.message_of(record)}"
        if (request := request_id.get()) is not None:
            line += f" (request {request})"
        if not record.exc_info or record.exc_info[1] is None:
            return line
        if self._texts:
            return f"{line}\n{self.formatException(record.exc_info)}"
        lines = [f"{kind} at {' < '.join(reversed(places))}" for kind, places in chain_of(record.exc_info[1])]
        return "\n  ".join([line, *lines])

    def message_of(self, record: logging.LogRecord) -> str:
        return record.getMessage() if self._texts else message_of(record)


class Json(Text):
    """A JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": self.message_of(record),
            "pid": record.process,
            **fields_of(record),
        }
        if record.exc_info and (exc := record.exc_info[1]) is not None:
            line["exception"] = [{"type": kind, "at": places} for kind, places in chain_of(exc)]
            if self._texts:
                line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Return by what the line can be found."""
    return {**ids(), **{name: str(value) for name in _FIELDS if (value := record.__dict__.get(name)) is not None}}


def ids() -> dict[str, str]:
    """Return what is being done: the request that is answered, the task that is run."""
    found = {"request_id": request_id.get(), "task_id": current_task.request.id if current_task else None}
    return {name: value for name, value in found.items() if value is not None}


def message_of(record: logging.LogRecord) -> str:
    """Return the message; where it quotes an exception, by its class."""
    exc = record.exc_info[1] if record.exc_info else None
    if isinstance(record.args, Mapping):  # Celery's line about a task that failed, with the exception's text as `exc`
        args: Any = {**record.args, "exc": type(exc).__name__ if exc else "an exception"} if "exc" in record.args else record.args
    else:
        args = tuple(type(arg).__name__ if isinstance(arg, BaseException) else arg for arg in record.args or ())
    message = str(record.msg) % args if args else str(record.msg)
    if record.name == "asyncio":
        message = message.partition("\n")[0]  # then it shows what failed, with its result
    for seen in _chain(exc):
        for text in (repr(seen), str(seen)):
            if text:
                message = message.replace(text, type(seen).__name__)
    return message


def chain_of(exc: BaseException) -> Iterator[tuple[str, list[str]]]:
    """Yield class and places ("polls/counting.py:72 count_votes", outermost first) of the exception, and of those behind it."""
    for seen in _chain(exc):
        places, step = [], seen.__traceback__
        while step is not None:
            code = step.tb_frame.f_code
            path = code.co_filename.removeprefix(_ROOT).rpartition("site-packages/")[2]
            places.append(f"{path}:{step.tb_lineno} {code.co_name}")
            step = step.tb_next
        kind = type(seen)
        yield f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."), places


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and those behind it, each once: they may stand in a circle."""
    seen: list[BaseException] = []
    while exc is not None and not any(exc is other for other in seen):
        yield exc
        seen.append(exc)
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
