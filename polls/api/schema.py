"""The OpenAPI schema: what drf-spectacular can't see by itself: problems, ways to sign in, the hot routes."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.utils import extend_schema

from polls import problems
from polls.accepting import RETRY_AFTER_SECONDS
from polls.api import hot_routes
from polls.api.serializers import PollSerializer
from polls.models import MAX_OPTIONS
from polls.problems import Problem

F = TypeVar("F", bound=Callable[..., Any])

_PROBLEM_REF = {"$ref": "#/components/schemas/Problem"}
_PROBLEM = {
    "type": "object",
    "description": "What went wrong (RFC 9457).",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {
            "type": "string",
            "format": "uri-reference",
            "enum": [problem.type for problem in problems.ALL],
            "description": "Stable; decide by it.",
        },
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "A sentence that helps."},
        "errors": {
            "type": "array",
            "description": "The fields at fault.",
            "items": {
                "type": "object",
                "required": ["detail", "pointer"],
                "properties": {
                    "detail": {"type": "string"},
                    "pointer": {"type": "string", "description": "JSON pointer, as a URI fragment: #/options/0/text"},
                },
            },
        },
    },
}


class ApiKeys(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """Tells drf-spectacular which of the security schemes below an API key is."""

    target_class = "polls.api.authentication.ApiKeyAuthentication"
    name = "apiKey"

    def get_security_definition(self, auto_schema: Any) -> dict[str, Any]:
        return {}  # `complete` writes them all


def refuses(*refusals: Problem) -> Callable[[F], F]:
    """Say which problems an operation of the REST framework can answer, besides those that every one can."""
    return extend_schema(extensions={_REFUSALS: [problem.slug for problem in (*refusals, *_OF_EVERY_VIEW)]})


# What every operation behind Django can answer: a method or a media type that it does not offer, a caller who asks too often, an
# address that a proxy of ours does not pass on, a bug, a database that is away.
_OF_EVERY_VIEW = (
    problems.WRONG_METHOD,
    problems.NOT_ACCEPTABLE,
    problems.TOO_MANY_REQUESTS,
    problems.INVALID,
    problems.SERVER_ERROR,
    problems.UNAVAILABLE,
)
# Carries the slugs from `refuses` to `complete`, which takes it out.
_REFUSALS = "x-refusals"


def answers(success: dict[str, Any], *refusals: Problem) -> dict[str, Any]:
    by_status: dict[str, list[Problem]] = {}
    for problem in sorted(set(refusals), key=lambda problem: (problem.status, problem.slug)):
        by_status.setdefault(str(problem.status), []).append(problem)
    for status, alternatives in by_status.items():
        examples = {problem.slug: {"$ref": f"#/components/examples/{problem.slug}"} for problem in alternatives}
        success[status] = {
            "description": "; ".join(problem.title for problem in alternatives) + ".",
            "content": {problems.CONTENT_TYPE: {"schema": _PROBLEM_REF, "examples": examples}},
        }
        if status in ("429", "503"):
            success[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "example": int(RETRY_AFTER_SECONDS)}}
    return success


# What core/protocol.py refuses before it is looked where a request goes.
_OF_THE_PROTOCOL = (problems.BAD_REQUEST, problems.ENCODED_BODY, problems.UNKNOWN_TRANSFER)
# {what makes something: (the parameter that names it, where its id stands in the answer)}
_MADE = {
    "polls_create": ("poll_id", "$response.body#/id"),
    "polls_duplicate": ("poll_id", "$response.body#/id"),
    "clients_create": ("client_id", "$response.body#/id"),
    "blocks_create": ("block_id", "$response.body#/id"),
    "cases_block": ("block_id", "$response.body#/id"),
}


def _link_what_is_made(paths: dict[str, Any]) -> None:
    """Say of each answer that makes something which operations it can be used in."""
    operations = [(path, operation) for path, methods in paths.items() for operation in methods.values()]
    for _, maker in operations:
        if maker["operationId"] in _MADE:
            parameter, expression = _MADE[maker["operationId"]]
            maker["responses"]["201"]["links"] = {
                user["operationId"]: {"operationId": user["operationId"], "parameters": {f"path.{parameter}": expression}}
                for path, user in operations
                if f"{{{parameter}}}" in path and user is not maker
            }


def complete(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Add to drf-spectacular's schema the problems, and what polls/intake.py answers."""
    by_slug = {problem.slug: problem for problem in problems.ALL}
    for operations in result["paths"].values():  # of Django, so that core/middleware.py sees to them
        for method, operation in operations.items():
            if method != "get":
                operation[_REFUSALS] = [*operation[_REFUSALS], problems.BLOCKED.slug]
    result["paths"] = {**result["paths"], **deepcopy(hot_routes.PATHS)}
    for operations in result["paths"].values():
        for operation in operations.values():
            answers(operation["responses"], *(by_slug[slug] for slug in operation.pop(_REFUSALS)), *_OF_THE_PROTOCOL)
    _link_what_is_made(result["paths"])
    components = result["components"]
    components["schemas"].update({"Problem": _PROBLEM, **hot_routes.SCHEMAS})
    components["examples"] = {problem.slug: {"value": problem.says("A sentence that helps.").body()} for problem in problems.ALL}
    components["securitySchemes"] = {
        "apiKey": {
            "type": "apiKey",
            "in": "header",
            "name": "Authorization",
            "description": (
                "An API client's key, as `Api-Key <key>`: see `POST /api/v1/clients`. It acts for its owner, within its scopes."
            ),
        },
        "jwtAuth": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "The `access` token of `POST /api/v1/auth/token`.",
        },
    }
    for schema in ("NewPollRequest", "PatchedPollChangeRequest", "Poll"):
        components["schemas"][schema]["properties"]["options"].update(minItems=2, maxItems=MAX_OPTIONS)
    poll = components["schemas"]["Poll"]
    poll["required"] = sorted(poll["properties"].keys() - set(PollSerializer.INSIDE))
    return result
