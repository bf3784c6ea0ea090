"""The OpenAPI schema: what drf-spectacular can't see by itself, above all the hot routes."""

from collections.abc import Callable
from typing import Any, TypeVar

from drf_spectacular.utils import extend_schema

from polls import problems
from polls.intake import MAX_BODY_BYTES, MAX_VOTER_LENGTH, RETRY_AFTER_SECONDS
from polls.models import MAX_OPTIONS, Outcome, Reason
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
_RECEIPT_STATUS = ["pending", *Outcome.values]
_DATE = {"type": "string", "format": "date-time"}
_SCHEMAS: dict[str, Any] = {
    "Problem": _PROBLEM,
    "CastRequest": {
        "type": "object",
        "required": ["option"],
        "additionalProperties": False,
        "properties": {
            "option": {"type": "string", "description": "Id of the chosen option."},
            "voter": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_VOTER_LENGTH,
                "description": "Only, and always, where voter_policy is `client`: your own reference of the voter. Stored as a keyed hash.",
            },
        },
    },
    "Accepted": {
        "type": "object",
        "required": ["id", "receipt", "status", "accepted_at", "links"],
        "properties": {
            "id": {"type": "string", "format": "uuid", "description": "The vote's id; the same for every repeat with one Idempotency-Key."},
            "receipt": {"type": "string", "description": "Tells later what became of the vote."},
            "status": {"type": "string", "enum": ["pending"]},
            "accepted_at": _DATE,
            "links": {
                "type": "object",
                "required": ["self", "results"],
                "properties": {"self": {"type": "string"}, "results": {"type": "string"}},
            },
        },
    },
    "VoteStatus": {
        "type": "object",
        "required": ["id", "status", "reason", "accepted_at", "counted_at"],
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "status": {"type": "string", "enum": _RECEIPT_STATUS},
            "reason": {"type": ["string", "null"], "enum": [*Reason.values, None], "description": "Why the vote does not stand."},
            "accepted_at": _DATE,
            "counted_at": {"type": ["string", "null"], "format": "date-time"},
        },
    },
    "Results": {
        "type": "object",
        "required": ["poll", "status", "total_votes", "options", "revision", "as_of"],
        "properties": {
            "poll": {"type": "string", "format": "uuid"},
            "status": {"type": "string", "enum": ["scheduled", "open", "closed"]},
            "total_votes": {"type": "integer"},
            "options": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["id", "text", "position", "votes", "share"],
                    "properties": {
                        "id": {"type": "string"},
                        "text": {"type": "string"},
                        "position": {"type": "integer"},
                        "votes": {"type": "integer"},
                        "share": {"type": "number", "minimum": 0, "maximum": 1, "description": "Of the total; 0 while there is none."},
                    },
                },
            },
            "revision": {"type": "integer", "description": "Grows with every change of the tallies."},
            "as_of": _DATE,
        },
    },
}


def refuses(*refusals: Problem) -> Callable[[F], F]:
    """Say which problems an operation of the REST framework can answer, besides those that every one can."""
    return extend_schema(extensions={_REFUSALS: [problem.slug for problem in (*refusals, *_OF_EVERY_VIEW)]})


# What every operation behind Django can answer: a method or a media type that it does not offer, a bug, a database that is away.
_OF_EVERY_VIEW = (problems.WRONG_METHOD, problems.NOT_ACCEPTABLE, problems.SERVER_ERROR, problems.UNAVAILABLE)
# Carries the slugs from `refuses` to `complete`, which takes it out.
_REFUSALS = "x-refusals"


def _answers(success: dict[str, Any], *refusals: Problem) -> dict[str, Any]:
    by_status: dict[str, list[Problem]] = {}
    for problem in sorted(refusals, key=lambda problem: problem.status):
        by_status.setdefault(str(problem.status), []).append(problem)
    for status, alternatives in by_status.items():
        examples = {
            problem.slug: {
                "value": {"type": problem.type, "title": problem.title, "status": problem.status, "detail": "A sentence that helps."}
            }
            for problem in alternatives
        }
        success[status] = {
            "description": "; ".join(problem.title for problem in alternatives) + ".",
            "content": {problems.CONTENT_TYPE: {"schema": _PROBLEM_REF, "examples": examples}},
        }
        if status == "503":
            success[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "example": int(RETRY_AFTER_SECONDS)}}
    return success


def _json(schema: str, description: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }
    if headers:
        answer["headers"] = {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()}
    return answer


def _in_path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


_POLL_ID = _in_path("poll_id", {"type": "string", "format": "uuid"})
_PATHS: dict[str, Any] = {
    "/api/v1/polls/{poll_id}/votes": {
        "post": {
            "operationId": "votes_cast",
            "tags": ["votes"],
            "summary": "Cast a vote",
            "description": (
                "202 means: the broker's durable queue or the database's outbox holds the vote, it can't be lost, and it will have "
                "exactly one outcome. A timeout or a 5xx means that this is unknown: repeat the request with the same Idempotency-Key; "
                f"the vote then counts at most once. A body takes at most {MAX_BODY_BYTES} bytes."
            ),
            "parameters": [
                _POLL_ID,
                _header(
                    "Idempotency-Key",
                    "Any text of yours that names this vote: the same key from the same voter is the same vote. Send one with every vote.",
                    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x21-\\x7e]+$"},
                ),
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/CastRequest"},
                        "examples": {
                            "ip": {"summary": "voter_policy ip", "value": {"option": "17"}},
                            "client": {"summary": "voter_policy client", "value": {"option": "17", "voter": "your user 4711"}},
                        },
                    }
                },
            },
            "security": [{}, {"apiKey": []}],
            "responses": _answers(
                {"202": _json("Accepted", "Accepted.", {"Location": "Where to read what became of the vote."})},
                problems.MALFORMED,
                problems.INVALID,
                problems.UNAUTHENTICATED,
                problems.FORBIDDEN,
                problems.UNKNOWN_POLL,
                problems.WRONG_METHOD,
                problems.POLL_NOT_OPEN,
                problems.POLL_CLOSED,
                problems.TOO_LARGE,
                problems.NOT_JSON,
                problems.UNKNOWN_OPTION,
                problems.SERVER_ERROR,
                problems.NOT_ACCEPTED,
                problems.UNAVAILABLE,
            ),
        }
    },
    "/api/v1/polls/{poll_id}/results": {
        "get": {
            "operationId": "results_read",
            "tags": ["results"],
            "summary": "Read a poll's results",
            "parameters": [_POLL_ID, _header("If-None-Match", "The ETag of the results that you have.", {"type": "string"})],
            "security": [{}],
            "responses": _answers(
                {
                    "200": _json("Results", "The tallies of the votes counted so far.", {"ETag": "Changes with the results."}),
                    "304": {"description": "You have them already."},
                },
                problems.UNKNOWN_POLL,
                problems.WRONG_METHOD,
                problems.SERVER_ERROR,
                problems.UNAVAILABLE,
            ),
        }
    },
    "/api/v1/votes/{receipt}": {
        "get": {
            "operationId": "votes_read",
            "tags": ["votes"],
            "summary": "Read what became of a vote",
            "description": "Never tells what was chosen. May still change where a voter's votes overtake each other on the way.",
            "parameters": [_in_path("receipt", {"type": "string"})],
            "security": [{}],
            "responses": _answers(
                {"200": _json("VoteStatus", "What is known of the vote.")},
                problems.UNKNOWN_RECEIPT,
                problems.WRONG_METHOD,
                problems.SERVER_ERROR,
                problems.UNAVAILABLE,
            ),
        }
    },
}


def complete(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Add to drf-spectacular's schema the problems, and what polls/intake.py answers."""
    by_slug = {problem.slug: problem for problem in problems.ALL}
    for operations in result["paths"].values():
        for operation in operations.values():
            _answers(operation["responses"], *(by_slug[slug] for slug in operation.pop(_REFUSALS)))
    result["paths"] = {**_PATHS, **result["paths"]}
    components = result["components"]
    components["schemas"].update(_SCHEMAS)
    components["securitySchemes"] = {
        "apiKey": {
            "type": "apiKey",
            "in": "header",
            "name": "Authorization",
            "description": (
                "An API client's key, for polls whose voter_policy is `client`: type `Api-Key <key>`. Operators make keys in the admin."
            ),
        },
        "jwtAuth": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "The `access` token of `POST /api/v1/auth/token`, for changing polls.",
        },
    }
    for schema in ("NewPollRequest", "PatchedPollRequest", "Poll"):
        components["schemas"][schema]["properties"]["options"].update(minItems=2, maxItems=MAX_OPTIONS)
    return result
