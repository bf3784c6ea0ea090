"""What polls/intake.py answers, in OpenAPI: written by hand, and held to its source by tests/test_schema.py."""

from typing import Any

from polls import problems
from polls.accepting import MAX_VOTER_LENGTH, MAX_WAIT_SECONDS
from polls.intake import MAX_BATCH_BYTES, MAX_BATCH_VOTES, MAX_BODY_BYTES, MAX_RECEIPTS
from polls.models import Outcome, PollStatus, Reason, VotingMethod
from polls.problems import Problem

_DATE = {"type": "string", "format": "date-time"}
_UUID = {"type": "string", "format": "uuid"}
_RECEIPT = {"type": "string", "description": "Tells later what became of the vote."}
_CHOICE = {
    "option": {"type": ["string", "null"], "description": "Id of the chosen option."},
    "options": {
        "type": ["array", "null"],
        "items": {"type": "string"},
        "description": "Instead of `option`: the ids of several, in an approval poll.",
    },
}
# Either, and not both; null is as good as left out.
_ONE_CHOICE = [
    {"required": ["option"], "properties": {"option": {"type": "string"}, "options": {"type": "null"}}},
    {"required": ["options"], "properties": {"options": {"type": "array"}, "option": {"type": "null"}}},
]
_WHO = {
    "voter": {
        "type": ["string", "null"],
        "minLength": 1,
        "maxLength": MAX_VOTER_LENGTH,
        "description": "Only, and always, where voter_policy is `client`: your own reference of the voter. Stored as a keyed hash.",
    },
    "code": {
        "type": ["string", "null"],
        "description": "Only, and always, where voter_policy is `code`: the voter's code. Stored as a keyed hash.",
    },
}
_KEY = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[\\x21-\\x7e]+$"}


def _object(required: str, properties: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties, **rest}


def _body(properties: dict[str, Any], required: str = "", **rest: Any) -> dict[str, Any]:
    return _object(required, properties, additionalProperties=False, **rest)


_ACCEPTED = {
    "id": {**_UUID, "description": "The vote's id; the same for every repeat with one Idempotency-Key."},
    "receipt": _RECEIPT,
    "accepted_at": _DATE,
}
_VOTE_STATUS = _object(
    "id status reason accepted_at counted_at",
    {
        "id": _UUID,
        "status": {"type": "string", "enum": ["pending", *Outcome.values]},
        "reason": {"type": ["string", "null"], "enum": [*Reason.values, None], "description": "Why the vote does not stand."},
        "accepted_at": _DATE,
        "counted_at": {"type": ["string", "null"], "format": "date-time"},
    },
)
_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_COMPARED = _object(
    "total_votes options",
    {
        "total_votes": {"type": "integer"},
        "options": {"type": "array", "items": _object("id votes", {"id": {"type": "string"}, "votes": {"type": "integer"}})},
    },
)

SCHEMAS: dict[str, Any] = {
    "CastRequest": _body({**_CHOICE, **_WHO}, oneOf=_ONE_CHOICE),
    "WithdrawRequest": _body(_WHO),
    "BatchItem": _body(
        {
            **_CHOICE,
            **_WHO,
            "idempotency_key": {**_KEY, "type": ["string", "null"], "description": "Names this vote: its repeats are the same vote."},
        },
        oneOf=_ONE_CHOICE,
    ),
    "Accepted": _object(
        "id receipt status accepted_at links",
        {
            **_ACCEPTED,
            "status": {"type": "string", "enum": ["pending", "counted", "quarantined"]},
            "links": _object(
                "self status results",
                {
                    "self": {"type": "string", "description": "The receipt in a URL. `status` keeps it out of logs."},
                    "status": {"type": "string", "description": "Where to send the receipt in a body."},
                    "results": {"type": "string"},
                },
            ),
        },
    ),
    "BatchAnswer": _object(
        "accepted refused votes",
        {
            "accepted": {"type": "integer"},
            "refused": {"type": "integer"},
            "votes": {
                "type": "array",
                "description": "One for each vote, in the order they were sent.",
                "items": {
                    "oneOf": [
                        _object(
                            "index id receipt status accepted_at",
                            {"index": {"type": "integer"}, **_ACCEPTED, "status": {"type": "string", "enum": ["pending"]}},
                        ),
                        _object(
                            "index status problem",
                            {"index": {"type": "integer"}, "status": {"type": "string", "enum": ["refused"]}, "problem": _PROBLEM},
                        ),
                    ]
                },
            },
        },
    ),
    "VoteStatus": _VOTE_STATUS,
    "StatusRequest": _body(
        {"receipts": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_RECEIPTS}}, "receipts"
    ),
    "VoteStatuses": _object(
        "votes",
        {
            "votes": {
                "type": "array",
                "description": "In the order of the receipts; null where one is none.",
                "items": {"oneOf": [{"$ref": "#/components/schemas/VoteStatus"}, {"type": "null"}]},
            }
        },
    ),
    "VoterRequest": _body({"poll": {**_UUID, "description": "The poll that the token is for."}}, "poll"),
    "Voter": _object("token poll", {"token": {"type": "string"}, "poll": _UUID}),
    "Results": _object(
        "poll status method total_votes options revision as_of is_final errata review",
        {
            "poll": _UUID,
            "status": {"type": "string", "enum": PollStatus.values},
            "method": {"type": "string", "enum": VotingMethod.values},
            "total_votes": {"type": "integer", "description": "Ballots; in an approval poll each can add to several options."},
            "options": {
                "type": "array",
                "items": _object(
                    "id text position votes share",
                    {
                        "id": {"type": "string"},
                        "text": {"type": "string"},
                        "position": {"type": "integer"},
                        "votes": {"type": "integer"},
                        "share": {"type": "number", "minimum": 0, "maximum": 1, "description": "Of the ballots; 0 while there is none."},
                    },
                ),
            },
            "revision": {"type": "integer", "description": "Grows with every change of the tallies."},
            "as_of": _DATE,
            "is_final": {"type": "boolean", "description": "All accepted votes are counted; only a review still changes anything."},
            "errata": {"type": "array", "items": {"$ref": "#/components/schemas/Erratum"}, "description": "Oldest first."},
            "review": {
                "description": "How the results would be with all votes that are under review, and without any; null when none is.",
                "oneOf": [
                    _object(
                        "as_of open_cases voters with without",
                        {
                            "as_of": _DATE,
                            "open_cases": {"type": "integer", "description": "Suspicious addresses and subnets not yet decided about."},
                            "voters": {"type": "integer", "description": "Whose votes are under review."},
                            "with": _COMPARED,
                            "without": _COMPARED,
                        },
                    ),
                    {"type": "null"},
                ],
            },
        },
    ),
}


def _json(schema: str, description: str, headers: dict[str, str] | None = None, **rest: Any) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        **rest,
    }
    if headers:
        answer["headers"] = {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()}
    return answer


def _takes(schema: str, examples: dict[str, Any]) -> dict[str, Any]:
    shown = {name: {"value": value} for name, value in examples.items()}
    return {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}, "examples": shown}},
    }


def _in_path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _link(operation: str, **parameters: str) -> dict[str, Any]:
    return {"operationId": operation, "parameters": parameters}


_POLL_ID = _in_path("poll_id", _UUID)
_IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "Any text of yours that names this vote: the same key from the same voter is the same vote, and with another choice it is refused. "
    "Send one with every vote.",
    _KEY,
)
_PREFER = _header(
    "Prefer",
    f"`wait=5` waits up to 5 s (at most {MAX_WAIT_SECONDS}) for the outcome: 201 when the vote is counted, a problem when it does "
    "not stand, 202 when the time is up.",
    {"type": "string"},
)
_VOTER_TOKEN = _header(
    "Voter-Token", "Where voter_policy is `session`: the token of POST /api/v1/voters. Its cookie does as well.", {"type": "string"}
)
# Who votes is told by the poll's policy: nobody in particular, an API client, a signed-in user.
_ANYBODY: list[dict[str, Any]] = [{}, {"apiKey": []}, {"jwtAuth": []}]
_CASTING = (
    problems.MALFORMED,
    problems.INVALID,
    problems.UNAUTHENTICATED,
    problems.FORBIDDEN,
    problems.UNKNOWN_CODE,
    problems.BLOCKED,
    problems.LIMIT_REACHED,
    problems.POLL_NOT_OPEN,
    problems.POLL_CLOSED,
    problems.DUPLICATE,
    problems.SUPERSEDED,
    problems.TOO_LARGE,
    problems.NOT_JSON,
    problems.UNKNOWN_OPTION,
    problems.KEY_REUSED,
    problems.NOT_ACCEPTED,
)


def _accepted() -> dict[str, Any]:
    return {
        status: _json(
            "Accepted",
            description,
            {"Location": "Where to read what became of the vote.", "Preference-Applied": "Where the request said how long it waits."},
            links={
                "status": _link("votes_read", receipt="$response.body#/receipt"),
                "results": _link("results_read", poll_id="$request.path.poll_id"),
            },
        )
        for status, description in (("201", "Accepted and, as you waited for it, counted."), ("202", "Accepted: it can't be lost."))
    }


def _operation(
    operation_id: str, tag: str, summary: str, description: str, answers: dict[str, Any], *refusals: Problem, **rest: Any
) -> dict[str, Any]:
    return {
        "operationId": operation_id,
        "tags": [tag],
        "summary": summary,
        "description": description,
        **rest,
        "responses": answers,
        # As `refuses` says it of a view; polls/api/schema.py makes answers of it.
        "x-refusals": [problem.slug for problem in (*refusals, *_OF_EVERY_HOT_ROUTE)],
    }


_OF_EVERY_HOT_ROUTE = (problems.WRONG_METHOD, problems.TOO_MANY_REQUESTS, problems.SERVER_ERROR, problems.UNAVAILABLE)

PATHS: dict[str, Any] = {
    "/api/v1/polls/{poll_id}/votes": {
        "post": _operation(
            "votes_cast",
            "votes",
            "Cast a vote",
            "202 means: the broker's durable queue or the database's outbox holds the vote, it can't be lost, and it will have "
            "exactly one outcome. A timeout or a 5xx means that this is unknown: repeat the request with the same Idempotency-Key; "
            f"the vote then counts at most once. A body takes at most {MAX_BODY_BYTES} bytes.",
            _accepted(),
            *_CASTING,
            problems.UNKNOWN_POLL,
            problems.WRONG_CHOICES,
            parameters=[_POLL_ID, _IDEMPOTENCY_KEY, _PREFER, _VOTER_TOKEN],
            requestBody=_takes(
                "CastRequest",
                {
                    "ip, session or account": {"option": "17"},
                    "client": {"option": "17", "voter": "your user 4711"},
                    "code, approval": {"options": ["17", "18"], "code": "7KXF-20PM-Q9RT"},
                },
            ),
            security=_ANYBODY,
        )
    },
    "/api/v1/polls/{poll_id}/votes/withdraw": {
        "post": _operation(
            "votes_withdraw",
            "votes",
            "Withdraw a vote",
            "For polls with `allow_withdrawal`. Accepted, carried and counted like a vote, as safely. Where votes can't change it is for "
            "good.",
            _accepted(),
            *_CASTING,
            problems.UNKNOWN_POLL,
            problems.NOT_OFFERED,
            parameters=[_POLL_ID, _IDEMPOTENCY_KEY, _PREFER, _VOTER_TOKEN],
            requestBody=_takes("WithdrawRequest", {"ip, session or account": {}, "client": {"voter": "your user 4711"}}),
            security=_ANYBODY,
        )
    },
    "/api/v1/polls/{poll_id}/votes/batch": {
        "post": _operation(
            "votes_cast_batch",
            "votes",
            "Cast many votes",
            f"For API clients, in polls whose voter_policy is `client` or `code`: 1 to {MAX_BATCH_VOTES} votes, {MAX_BATCH_BYTES} bytes at "
            "most, as a JSON array or one a line (NDJSON). Each has an answer of its own; a bad one never fails its neighbours. Repeatable "
            "as a whole by Idempotency-Key, and by each vote's own `idempotency_key`.",
            {"200": _json("BatchAnswer", "What became of each vote. Those with a receipt are as safe as after a 202.")},
            problems.MALFORMED,
            problems.INVALID,
            problems.UNAUTHENTICATED,
            problems.FORBIDDEN,
            problems.UNKNOWN_POLL,
            problems.NOT_OFFERED,
            problems.TOO_LARGE,
            problems.NOT_JSON,
            problems.NOT_ACCEPTED,
            parameters=[_POLL_ID, _IDEMPOTENCY_KEY],
            requestBody={
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {
                            "type": "array",
                            "items": {"$ref": "#/components/schemas/BatchItem"},
                            "minItems": 1,
                            "maxItems": MAX_BATCH_VOTES,
                        },
                        "examples": {
                            "client": {
                                "value": [{"option": "17", "voter": "4711", "idempotency_key": "4711-1"}, {"option": "18", "voter": "4712"}]
                            }
                        },
                    },
                    "application/x-ndjson": {
                        "schema": {"type": "string"},
                        "examples": {"client": {"value": '{"option": "17", "voter": "4711"}\n{"option": "18", "voter": "4712"}\n'}},
                    },
                },
            },
            security=[{"apiKey": []}],
        )
    },
    "/api/v1/votes/{receipt}": {
        "get": _operation(
            "votes_read",
            "votes",
            "Read what became of a vote",
            "Never tells what was chosen. May still change where a voter's votes overtake each other on the way. A URL stands in the logs "
            "of everything on the way, and so does the receipt in it: `POST /api/v1/votes/status` takes it in the body.",
            {"200": _json("VoteStatus", "What is known of the vote.")},
            problems.UNKNOWN_RECEIPT,
            problems.INVALID,
            parameters=[_in_path("receipt", {"type": "string"})],
            security=[{}],
        )
    },
    "/api/v1/votes/status": {
        "post": _operation(
            "votes_read_many",
            "votes",
            "Read what became of many votes",
            f"1 to {MAX_RECEIPTS} receipts at once.",
            {"200": _json("VoteStatuses", "What is known of the votes.")},
            problems.MALFORMED,
            problems.INVALID,
            problems.TOO_LARGE,
            problems.NOT_JSON,
            requestBody=_takes("StatusRequest", {"two": {"receipts": ["AZx…", "AZy…"]}}),
            security=[{}],
        )
    },
    "/api/v1/voters": {
        "post": _operation(
            "voters_create",
            "votes",
            "Get an anonymous voter token",
            "For one poll whose voter_policy is `session`. Whoever holds it is one voter there; a browser gets it as a cookie, too.",
            {
                "201": _json(
                    "Voter",
                    "Send it as `Voter-Token` with the vote.",
                    {"Set-Cookie": "The same token, for the browser."},
                    links={
                        "vote": _link("votes_cast", **{"poll_id": "$response.body#/poll", "header.Voter-Token": "$response.body#/token"})
                    },
                )
            },
            problems.MALFORMED,
            problems.INVALID,
            problems.BLOCKED,
            problems.UNKNOWN_POLL,
            problems.NOT_OFFERED,
            problems.TOO_LARGE,
            problems.NOT_JSON,
            requestBody=_takes("VoterRequest", {"a poll": {"poll": "0b7f0c5e-6a4a-4c56-9a3e-5f6b1c2d3e4f"}}),
            security=[{}],
        )
    },
}

# Also a view of Django's, which describes it; this is what both answer.
RESULTS_PATH = "/api/v1/polls/{poll_id}/results"
PATHS[RESULTS_PATH] = {
    "get": _operation(
        "results_read",
        "results",
        "Read a poll's results",
        "Who reads them when is the poll's `results_visibility`. Its owner, auditors and API clients with the scope `results:read` "
        "always do.",
        {
            "200": _json("Results", "The tallies of the votes counted so far.", {"ETag": "Changes with the results."}),
            "304": {"description": "You have them already."},
        },
        problems.UNAUTHENTICATED,
        problems.RESULTS_HIDDEN,
        problems.INVALID,
        problems.UNKNOWN_POLL,
        problems.NOT_ACCEPTABLE,
        parameters=[
            _POLL_ID,
            _header("If-None-Match", "The ETag of the results that you have.", {"type": "string"}),
            _header(
                "Vote-Receipt",
                "Where results_visibility is `after_vote`: the receipt of a vote in this poll that counted.",
                {"type": "string"},
            ),
        ],
        security=_ANYBODY,
    )
}
PATHS["/api/v1/polls/{poll_id}/results/stream"] = {
    "get": _operation(
        "results_follow",
        "results",
        "Follow a poll's results",
        "Server-Sent Events, for a browser's `EventSource`: the results now, and again whenever they change, up to four times a second. "
        "Each event is named `results`, its `data` is what `GET …/results` answers, its `id` tells the state: whoever sends it back as "
        "`Last-Event-ID` gets nothing before the next change. A slow reader misses states in between, never the newest. A stream ends by "
        "itself after 5 to 10 minutes and with the final results; clients come back, and are told by 204 to stay away once they have "
        "those. Only what may be read without signing in is streamed.",
        {
            "200": {
                "description": "A stream that stays open.",
                "content": {
                    "text/event-stream": {
                        "schema": {"type": "string"},
                        "example": 'retry: 2718\n\nevent: results\nid: 3f2a9c\ndata: {"poll": "…", "total_votes": 2, "options": ["…"]}\n\n',
                    }
                },
            },
            "204": {"description": "You have the final results already."},
        },
        problems.RESULTS_HIDDEN,
        problems.INVALID,
        problems.UNKNOWN_POLL,
        parameters=[
            _POLL_ID,
            _header("Last-Event-ID", "The `id` of the results that you have.", {"type": "string"}),
            _header(
                "Vote-Receipt",
                "Where results_visibility is `after_vote`: the receipt of a vote in this poll that counted.",
                {"type": "string"},
            ),
        ],
        security=[{}],
    )
}
