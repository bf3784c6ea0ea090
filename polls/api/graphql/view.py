"""The door at /graphql. Authentication, throttling and refusals are the REST framework's, as in REST."""

import json
import logging
import re
import time
from typing import Any

from django.utils.timezone import now
from drf_spectacular.utils import extend_schema
from graphql import GraphQLError
from rest_framework import permissions, serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from strawberry.schema.exceptions import CannotGetOperationTypeError

from polls import accepting, metrics, problems
from polls.api.errors import refusal_of
from polls.api.graphql.limits import MAX_DOCUMENT_LENGTH
from polls.api.graphql.schema import schema
from polls.api.graphql.shapes import Asked
from polls.api.serializers import StrictSerializer, checked
from polls.problems import Refusal

logger = logging.getLogger(__name__)

# 100 receipts are 10 kB; a poll with 100 options of usual length is about as much.
MAX_BODY_BYTES = 65_536


class DocumentSerializer(StrictSerializer):
    """The body of a request (GraphQL over HTTP)."""

    query = serializers.CharField(max_length=MAX_DOCUMENT_LENGTH, trim_whitespace=False)
    variables = serializers.DictField(required=False, allow_null=True)
    operationName = serializers.CharField(required=False, allow_null=True)  # noqa: N815 - as it is on the wire
    extensions = serializers.DictField(required=False, allow_null=True)  # some clients send them; none is known here

    def validate_variables(self, variables: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            json.dumps(variables, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise serializers.ValidationError("Half a surrogate pair is no character.") from None
        return variables


# Not in the OpenAPI description: GraphQL has one of its own.
# A POST in JSON only, with no session cookie read: no other site's page can send one unasked, so it needs no CSRF token.
@extend_schema(exclude=True)
class GraphQLView(APIView):
    permission_classes = [permissions.AllowAny]  # each field has its own rule

    def post(self, request: Request) -> Response:
        if int(request.META.get("CONTENT_LENGTH") or 0) > MAX_BODY_BYTES:
            raise problems.TOO_LARGE.says(f"This takes at most {MAX_BODY_BYTES} bytes.")
        wanted = checked(DocumentSerializer, request.data)
        asked = Asked(request, now(), time.monotonic() + accepting.MAX_WAIT_SECONDS)
        try:
            result = schema.execute_sync(
                wanted["query"], wanted.get("variables"), context_value=asked, operation_name=wanted.get("operationName")
            )
        except CannotGetOperationTypeError:
            raise problems.INVALID.says("The document has no such operation.", pointer="/operationName") from None
        answer: dict[str, Any] = {"errors": [_shown(error) for error in result.errors]} if result.errors else {}
        # Every field of the root may be null, so there is none of this only where nothing was begun.
        if result.data is not None:
            answer["data"] = result.data
        return Response(answer, headers={"Cache-Control": "no-store"})


def _shown(error: GraphQLError) -> dict[str, Any]:
    """Return the error with what a problem of REST says in its `extensions`."""
    refusal = _refusal(error)
    metrics.refused[refusal.problem.slug].inc()
    body = refusal.body()
    del body["detail"]
    if errors := body.get("errors"):
        body["errors"] = [{**each, "pointer": _in_camel_case(each["pointer"])} for each in errors]
    return {**error.formatted, "message": refusal.detail, "extensions": body}


def _refusal(error: GraphQLError) -> Refusal:
    cause = error.original_error
    if error.path is None and (cause is None or error.nodes):  # of the document or its variables
        return problems.INVALID.says(error.message)
    if cause is not None and (refusal := refusal_of(cause)):
        return refusal
    logger.error("GraphQL's field %s failed", ".".join(map(str, error.path or ())), exc_info=cause or error)
    return problems.SERVER_ERROR.says("The error is in our log.")


def _in_camel_case(pointer: str) -> str:
    """Return a pointer into a REST body as one into the arguments."""
    return re.sub(r"_([a-z])", lambda letter: letter[1].upper(), pointer)
