"""Pages of lists, by what their last item reads: they stay right while rows are added and removed, and cost no scan."""

import base64
import json
from datetime import datetime
from typing import Any, cast

from django.core.exceptions import ValidationError
from django.db.models import Model, Q
from rest_framework import pagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.utils.urls import replace_query_param
from rest_framework.views import APIView

from polls import problems


class NewestFirst(pagination.BasePagination):
    """Pages in the queryset's order, newest first if it has none. The order's last field is the id: no two rows are alike in it."""

    ordering: tuple[str, ...] = ("-created_at", "-id")
    page_size = 50
    max_page_size = 200
    cursor_query_description = "Where the page begins: follow `next` and `previous` instead of making one up."
    page_size_query_description = f"Polls on a page; {page_size} if not said, {max_page_size} at most."

    def paginate_queryset(self, queryset: Any, request: Request, view: APIView | None = None) -> list[Any]:
        self.address = request.build_absolute_uri()
        return self.cut(queryset, self.size_of(request), request.query_params.get("cursor"))

    def cut(self, queryset: Any, size: int, begins: str | None, *, pointer: str = "/cursor") -> list[Any]:
        """Return a page's rows: so many, from where the cursor reads. Sets `next_row` and `previous_row`, which are beside other pages."""
        self.order = tuple(map(str, queryset.query.order_by)) or self.ordering
        cursor = self._read_cursor(begins, queryset.model, pointer)
        is_backward = cursor is not None and cursor[0]
        order = tuple(map(_turned, self.order)) if is_backward else self.order
        if cursor:
            queryset = queryset.filter(_beyond(order, cursor[1]))
        rows = list(queryset.order_by(*order)[: size + 1])
        is_more, rows = len(rows) > size, rows[:size]
        if is_backward:
            rows.reverse()
        self.next_row = rows[-1] if rows and (is_more or is_backward) else None
        self.previous_row = rows[0] if rows and cursor and (is_more or not is_backward) else None
        return rows

    def get_paginated_response(self, data: Any) -> Response:
        return Response({"next": self._link(self.next_row, False), "previous": self._link(self.previous_row, True), "results": data})

    def get_paginated_response_schema(self, schema: dict[str, Any]) -> dict[str, Any]:
        address = {"type": ["string", "null"], "format": "uri"}
        return {
            "type": "object",
            "required": ["next", "previous", "results"],
            "properties": {"next": address, "previous": address, "results": schema},
        }

    def get_schema_operation_parameters(self, view: APIView) -> list[dict[str, Any]]:
        sizes = {"type": "integer", "minimum": 1, "maximum": self.max_page_size, "default": self.page_size}
        return [
            {"name": "cursor", "in": "query", "description": self.cursor_query_description, "schema": {"type": "string"}},
            {"name": "page_size", "in": "query", "description": self.page_size_query_description, "schema": sizes},
        ]

    def size_of(self, request: Request) -> int:
        """Return how many rows the request wants on a page. Raises Refusal for what is no such number."""
        text = request.query_params.get("page_size", str(self.page_size))
        if not (text.isdecimal() and text.isascii() and 1 <= int(text[:10]) <= self.max_page_size):
            raise problems.INVALID.says(f"`page_size` is a number from 1 to {self.max_page_size}.", pointer="/page_size")
        return int(text)

    def cursor(self, row: Model, *, is_backward: bool = False) -> str:
        """Return where the page after this row begins, or the one before it."""
        texts = [_written(getattr(row, name.lstrip("-"))) for name in self.order]
        return base64.b64encode(json.dumps([self.order, is_backward, texts]).encode(), altchars=b"-_").decode()

    def _read_cursor(self, text: str | None, model: type[Model], pointer: str) -> tuple[bool, list[Any]] | None:
        """Return whether the page is before what the cursor reads, and that: a value for each field of the order."""
        if text is None:
            return None
        try:
            order, is_backward, texts = json.loads(base64.b64decode(text.encode(), altchars=b"-_", validate=True))
            if order != list(self.order) or type(is_backward) is not bool:
                raise ValueError
            return is_backward, [_read(model, name, text) for name, text in zip(order, texts, strict=True)]
        except (ValueError, TypeError, RecursionError, ValidationError):
            raise problems.INVALID.says(
                "This cursor is none of this list's, in this order: send one as it came with a page.", pointer=pointer
            ) from None

    def _link(self, row: Model | None, is_backward: bool) -> str | None:
        if row is None:
            return None
        return str(replace_query_param(self.address, "cursor", self.cursor(row, is_backward=is_backward)))


def _turned(name: str) -> str:
    return name[1:] if name.startswith("-") else f"-{name}"


def _beyond(order: tuple[str, ...], read: list[Any]) -> Q:
    """Return what comes after the row that reads so: of one field, or of a field and the id."""
    names = [(name.lstrip("-"), "lt" if name.startswith("-") else "gt") for name in order]
    (last, side), value = names[-1], read[-1]
    beyond = Q(**{f"{last}__{side}": value})
    for (name, side), value in zip(names[-2::-1], read[-2::-1], strict=True):
        # Said twice, as `<= a and (< a or ...)`, for PostgreSQL then begins at the right place of an index.
        beyond = Q(**{f"{name}__{side}e": value}) & (Q(**{f"{name}__{side}": value}) | beyond)
    return beyond


def _read(model: type[Model], name: str, text: Any) -> Any:
    if not isinstance(text, str) or "\x00" in text:
        raise ValueError
    value = cast(Any, model._meta.get_field(name.lstrip("-"))).to_python(text)
    if isinstance(value, datetime) and value.tzinfo is None:
        raise ValueError
    return value


def _written(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
