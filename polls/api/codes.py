"""Voter codes through the API: in and out as JSON or CSV, for the people behind a poll."""

import csv
import io
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import IO, Any

from django.utils.timezone import now
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, OpenApiResponse, extend_schema, extend_schema_field
from rest_framework import parsers, permissions, renderers, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from polls import codes, problems
from polls.api.authentication import actor
from polls.api.pages import NewestFirst
from polls.api.schema import refuses
from polls.api.serializers import StrictSerializer, checked
from polls.journal import Act
from polls.models import Poll, VoterCode, label_of
from polls.moments import iso

# 100,000 of the longest codes with labels of 100 letters, as JSON.
MAX_BODY_BYTES = 25_000_000
NO_STORE = {"Cache-Control": "no-store"}


class CsvParser(parsers.BaseParser):
    """Reads `code,label` lines into codes.Row; as a tuple, which no JSON makes."""

    media_type = "text/csv"

    def parse(self, stream: IO[Any], media_type: Any = None, parser_context: Any = None) -> tuple[codes.Row, ...]:  # type: ignore[override]
        raw = stream.read()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as exc:
            raise problems.INVALID.says(f"Line {_line_of(raw, exc.start)} is not UTF-8.") from None
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            return tuple(_rows(lines))
        except csv.Error as exc:
            raise problems.INVALID.says(f"Line {lines.line_num} is no CSV: {exc}.") from None


def _line_of(raw: bytes, position: int) -> int:
    return raw.count(b"\n", 0, position) + 1


def _rows(lines: Any) -> Iterable[codes.Row]:
    columns = [name.strip().lower() for name in next(lines, [])]
    if sorted(columns) not in (["code"], ["code", "label"]):
        raise problems.INVALID.says("Line 1 must name the columns, with a comma between them: code,label (or code alone).")
    begins = lines.line_num + 1
    for cells in lines:
        if cells and len(cells) != len(columns):
            raise problems.INVALID.says(f"Line {begins} has {len(cells)} columns; line 1 names {len(columns)}.")
        if cells:
            row = dict(zip(columns, cells, strict=True))
            yield codes.Row(row["code"], row.get("label", ""), f"Line {begins}")
        begins = lines.line_num + 1


class CsvRenderer(renderers.BaseRenderer):
    """Writes rows of cells, the columns' names first. A refusal stays JSON."""

    media_type = "text/csv"
    format = "csv"

    def render(self, data: Any, accepted_media_type: str | None = None, renderer_context: Mapping[str, Any] | None = None) -> bytes:
        if renderer_context and renderer_context["response"].exception:
            return renderers.JSONRenderer().render(data)
        text = io.StringIO(newline="")
        csv.writer(text).writerows([_inert(cell) for cell in row] for row in data)
        return text.getvalue().encode()


def _inert(cell: Any) -> Any:
    """Return the cell so that a spreadsheet shows it instead of running it as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


class NewCodeSerializer(StrictSerializer):
    """A code of the owner's own."""

    code = serializers.CharField(
        help_text=f"{codes.MIN_LENGTH} to {codes.MAX_LENGTH} visible characters (digits only: {codes.MIN_DIGITS}), not counting spaces "
        "and hyphens, which make no difference. Nor does case, O for 0, and I or L for 1."
    )
    label = serializers.CharField(  # type: ignore[assignment]
        required=False, allow_blank=True, max_length=codes.MAX_LABEL_LENGTH, help_text="Your words for whom it is for."
    )


@extend_schema_field(NewCodeSerializer)
class NewCodeField(serializers.Field[Any, Any, Any, Any]):
    """The shape of NewCodeSerializer in a tenth of its time, for there may be 100,000 of them. What a code must be is in polls/codes.py."""

    def to_internal_value(self, data: Any) -> tuple[str, str]:
        if not isinstance(data, dict):
            raise serializers.ValidationError('Send an object like {"code": "SOUP-4711", "label": "alice"}.')
        wrong = {name: ["There is no such field."] for name in data if name not in ("code", "label")}
        if "code" not in data:
            wrong["code"] = ["This field is required."]
        wrong |= {name: ["This field takes text."] for name in ("code", "label") if not isinstance(data.get(name, ""), str)}
        if wrong:
            raise serializers.ValidationError(wrong)
        return data["code"], data.get("label", "")


class NewCodesSerializer(StrictSerializer):
    """Either so many new codes, or the owner's own."""

    generate = serializers.IntegerField(required=False, min_value=1, max_value=codes.MAX_CODES, help_text="How many codes to make.")
    labels = serializers.ListField(
        child=serializers.CharField(allow_blank=True, max_length=codes.MAX_LABEL_LENGTH),
        required=False,
        help_text="Only with `generate`: labels for the first of them.",
    )
    codes = serializers.ListField(child=NewCodeField(), required=False, min_length=1, max_length=codes.MAX_CODES)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if ("generate" in attrs) == ("codes" in attrs):
            raise serializers.ValidationError("Send either `generate` or `codes`.")
        if "labels" in attrs and "generate" not in attrs:
            raise serializers.ValidationError(
                {"labels": ["Labels go with `generate`; each of your own `codes` has its `label` beside it."]}
            )
        return attrs


class IssuedCodeSerializer(serializers.Serializer[Any]):
    id = serializers.CharField()
    code = serializers.CharField()
    label = serializers.CharField()  # type: ignore[assignment]
    existing = serializers.BooleanField(help_text="True: the poll had this code already, and it stays as it was, label and revocation too.")


class IssuedCodesSerializer(serializers.Serializer[Any]):
    """The only answer that ever holds these codes."""

    created = serializers.IntegerField()
    existing = serializers.IntegerField()
    codes = IssuedCodeSerializer(many=True)


class CodeSerializer(serializers.ModelSerializer[VoterCode]):
    """A code as its owner sees it later: never the code itself."""

    id = serializers.CharField()
    state = serializers.ChoiceField(
        choices=codes.State.choices,
        allow_null=True,
        help_text="Null until the poll is final, unless the code is revoked: before that nobody is told which are used.",
    )
    revoked_at = serializers.DateTimeField(
        allow_null=True, help_text="From this moment on it is not accepted. A vote that came with it before counts."
    )

    class Meta:
        model = VoterCode
        fields = ["id", "label", "state", "created_at", "revoked_at"]
        read_only_fields = fields


class RevocationSerializer(StrictSerializer):
    """Either some codes, or all."""

    ids = serializers.ListField(
        child=serializers.RegexField(r"^[1-9][0-9]{0,17}$", error_messages={"invalid": "This is no id of a code."}),
        required=False,
        min_length=1,
        max_length=codes.MAX_CODES,
    )
    all_unused = serializers.BooleanField(
        required=False, help_text="True: all codes of the poll. Votes that came with one count; they can't be changed with it any more."
    )

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if ("ids" in attrs) == attrs.get("all_unused", False):
            raise serializers.ValidationError('Send either `ids` or `"all_unused": true`.')
        return attrs


class RevokedSerializer(serializers.Serializer[Any]):
    revoked = serializers.IntegerField(help_text="How many were revoked by this; those that were so already are left out.")
    revoked_at = serializers.DateTimeField(help_text="From this moment on they are not accepted.")


class InOrder(NewestFirst):
    ordering = ("id",)  # type: ignore[assignment]
    page_size_query_description = f"Codes on a page; {NewestFirst.page_size} if not said, {NewestFirst.max_page_size} at most."


class CountsSerializer(serializers.Serializer[Any]):
    """How many codes a poll has."""

    codes = serializers.IntegerField()
    used = serializers.IntegerField(help_text="A vote came with them, counted or not.")
    revoked = serializers.IntegerField(help_text="Used ones among them, too.")


STATE = OpenApiParameter(
    "state", enum=codes.State.values, description="Only the codes in this state; `used` and `unused` once the poll is final."
)


class CodesView(APIView):
    permission_classes = [permissions.IsAuthenticated]
    parser_classes = [parsers.JSONParser, CsvParser]
    renderer_classes = [renderers.JSONRenderer, CsvRenderer]

    @refuses(
        problems.INVALID, problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND, problems.UNKNOWN_POLL, problems.NOT_OFFERED
    )
    @extend_schema(
        operation_id="codes_list",
        tags=["codes"],
        summary="List a poll's voter codes",
        description="Never the codes themselves: those are in the answer that made them. As CSV: all of them, without pages.",
        parameters=[
            STATE,
            OpenApiParameter("cursor", description=InOrder.cursor_query_description),
            OpenApiParameter("page_size", int, description=InOrder.page_size_query_description),
        ],
        responses={
            (200, "application/json"): OpenApiResponse(
                InOrder().get_paginated_response_schema({"type": "array", "items": {"$ref": "#/components/schemas/Code"}}),
                "A page of codes, or with CSV all of them: id,label,state,created_at,revoked_at.",
            ),
            (200, "text/csv"): OpenApiTypes.STR,
        },
    )
    def get(self, request: Request, poll_id: str) -> Response:
        poll = _poll_to_look_into(request, poll_id)
        state = request.query_params.get("state")
        if state not in (None, *codes.State.values):
            raise problems.INVALID.says(f"`state` is one of {', '.join(codes.State.values)}.")
        found = codes.listing(poll, state)
        pages = InOrder()
        pages.size_of(request)  # refused when it is wrong, also where there are no pages
        if _wants_csv(request):
            return _csv(["id", "label", "state", "created_at", "revoked_at"], _cells(found.order_by("id")))
        page = pages.paginate_queryset(found, request, self)
        answer = pages.get_paginated_response(CodeSerializer(page, many=True).data)
        answer["Cache-Control"] = "no-store"
        return answer

    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.NOT_OFFERED,
        problems.POLL_IN_USE,
        problems.TOO_LARGE,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="codes_add",
        tags=["codes"],
        summary="Add voter codes to a poll",
        description=(
            f"Makes codes, or takes your own (as JSON, or as CSV with the columns code,label), at most {codes.MAX_CODES} at once, all or "
            "none of them. Keep the answer: the service stores no code, only what it takes to know it again. Repeatable with your own "
            "codes: one that the poll has already stays as it is. Until the poll is closed."
        ),
        request={"application/json": NewCodesSerializer, "text/csv": OpenApiTypes.STR},
        examples=[
            OpenApiExample("generate", {"generate": 500}, request_only=True, media_type="application/json"),
            OpenApiExample("own", {"codes": [{"code": "SOUP-4711", "label": "alice"}]}, request_only=True, media_type="application/json"),
        ],
        responses={
            (201, "application/json"): OpenApiResponse(IssuedCodesSerializer, "The codes, in your order; as CSV: id,code,label,existing."),
            (201, "text/csv"): OpenApiTypes.STR,
        },
    )
    def post(self, request: Request, poll_id: str) -> Response:
        poll = _poll_to_change(request, poll_id)
        if int(request.META.get("CONTENT_LENGTH") or 0) > MAX_BODY_BYTES:
            raise problems.TOO_LARGE.says(f"A list of codes takes at most {MAX_BODY_BYTES} bytes.")
        issued = self._add(poll, request)
        if _wants_csv(request):
            cells = ([code.id, code.code, code.label, str(not code.is_new).lower()] for code in issued)
            return _csv(["id", "code", "label", "existing"], cells, status.HTTP_201_CREATED)
        created = sum(code.is_new for code in issued)
        shown = [{"id": str(code.id), "code": code.code, "label": code.label, "existing": not code.is_new} for code in issued]
        answer = {"created": created, "existing": len(issued) - created, "codes": shown}
        return Response(answer, status.HTTP_201_CREATED, headers=NO_STORE)

    def _add(self, poll: Poll, request: Request) -> list[codes.Issued]:
        if isinstance(request.data, tuple):
            return codes.upload(poll, request.data, _act(request))
        wanted = checked(NewCodesSerializer, request.data)
        if "generate" in wanted:
            return codes.generate(poll, wanted["generate"], _act(request), labels=wanted.get("labels", []))
        rows = [codes.Row(code, label, f"Row {number}") for number, (code, label) in enumerate(wanted["codes"], start=1)]
        return codes.upload(poll, rows, _act(request))


class CountsView(APIView):
    permission_classes = [permissions.IsAuthenticated]

    @refuses(problems.UNAUTHENTICATED, problems.FORBIDDEN, problems.NOT_FOUND, problems.UNKNOWN_POLL, problems.NOT_OFFERED)
    @extend_schema(
        operation_id="codes_count",
        tags=["codes"],
        summary="Count a poll's voter codes",
        description="At any time. Reads the poll's votes, which takes seconds where there are millions.",
        responses=OpenApiResponse(CountsSerializer, "How many there are, were used, and are revoked."),
    )
    def get(self, request: Request, poll_id: str) -> Response:
        poll = _poll_to_look_into(request, poll_id)
        return Response(CountsSerializer(codes.count(poll)).data, headers=NO_STORE)


class CodeView(APIView):
    permission_classes = [permissions.IsAuthenticated]

    @refuses(
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.NOT_OFFERED,
        problems.POLL_IN_USE,
    )
    @extend_schema(
        operation_id="codes_revoke_one",
        tags=["codes"],
        summary="Revoke a voter code",
        description="Whether it was used is not told; a vote that came with it counts. Repeatable.",
        responses={200: OpenApiResponse(CodeSerializer, "The code; from its `revoked_at` on it is not accepted.")},
    )
    def delete(self, request: Request, poll_id: str, code_id: int) -> Response:
        poll = _poll_to_change(request, poll_id)
        if not codes.listing(poll).filter(pk=code_id).exists():
            raise problems.NOT_FOUND.says("The poll has no code with this id.")
        codes.revoke(poll, [code_id], _act(request))
        return Response(CodeSerializer(codes.listing(poll).get(pk=code_id)).data, headers=NO_STORE)


class RevocationView(APIView):
    permission_classes = [permissions.IsAuthenticated]

    @refuses(
        problems.MALFORMED,
        problems.INVALID,
        problems.UNAUTHENTICATED,
        problems.FORBIDDEN,
        problems.NOT_FOUND,
        problems.UNKNOWN_POLL,
        problems.NOT_OFFERED,
        problems.POLL_IN_USE,
        problems.NOT_JSON,
    )
    @extend_schema(
        operation_id="codes_revoke",
        tags=["codes"],
        summary="Revoke voter codes",
        description=(
            "All or none of `ids`; or all of the poll's (`all_unused`). Which were used is not told, so used ones are revoked like others: "
            "votes that came with them count. Repeatable."
        ),
        request=RevocationSerializer,
        responses=OpenApiResponse(RevokedSerializer, "They are revoked."),
    )
    def post(self, request: Request, poll_id: str) -> Response:
        poll = _poll_to_change(request, poll_id)
        ids = checked(RevocationSerializer, request.data).get("ids")
        revoked, revoked_at = codes.revoke(poll, ids and map(int, ids), _act(request))
        return Response({"revoked": revoked, "revoked_at": iso(revoked_at)})


def _poll(request: Request, poll_id: str) -> Poll:
    poll = Poll.objects.filter(pk=poll_id).first()
    if poll is None or not actor(request).sees(poll, at=now()):
        raise problems.UNKNOWN_POLL.says("No poll has this id.")
    return poll


def _poll_to_look_into(request: Request, poll_id: str) -> Poll:
    poll = _poll(request, poll_id)
    if not actor(request).reads_journal(poll):
        raise problems.FORBIDDEN.says("Only the people behind the poll see its codes.")
    return poll


def _poll_to_change(request: Request, poll_id: str) -> Poll:
    poll = _poll(request, poll_id)
    if not actor(request).changes(poll):
        raise problems.FORBIDDEN.says("Only the poll's owner may change its codes.")
    return poll


def _act(request: Request) -> Act:
    return Act(actor(request).name, now())


def _wants_csv(request: Request) -> bool:
    return request.accepted_renderer.format == "csv"


def _csv(columns: list[str], rows: Iterable[list[Any]], status: int = status.HTTP_200_OK) -> Response:
    return Response(chain([columns], rows), status, headers={**NO_STORE, "Content-Disposition": 'attachment; filename="codes.csv"'})


def _cells(found: Any) -> Iterable[list[Any]]:
    columns = ("id", "poll_id", "sealed_label", "clear_label", "state", "created_at", "revoked_at")
    for pk, poll_id, sealed, clear, state, created_at, revoked_at in found.values_list(*columns).iterator():
        yield [pk, label_of(poll_id, sealed, clear), state, iso(created_at), revoked_at and iso(revoked_at)]
