"""Every refusal as application/problem+json, whichever part of Django or the REST framework raised it."""

import json
from collections.abc import Iterator
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from rest_framework import exceptions
from rest_framework.response import Response

from polls import metrics, problems
from polls.problems import Refusal


def answer_with_a_problem(exc: Exception, context: dict[str, Any]) -> Response | None:
    """Turn what a view raised into a problem; None (Django's 500) for what nobody foresaw."""
    refusal = refusal_of(exc)
    if refusal is None:
        return None
    metrics.refused[refusal.problem.slug].inc()
    return Response(refusal.body(), refusal.problem.status, headers=refusal.headers, content_type=problems.CONTENT_TYPE)


def refusal_of(exc: BaseException) -> Refusal | None:
    """Return the problem that an exception is, or None for what nobody foresaw."""
    match exc:
        case Refusal():
            return exc
        case exceptions.ValidationError():
            found = list(_flatten(exc.detail, ""))
            return Refusal(
                problems.INVALID, found[0][1], [{"detail": detail, "pointer": f"#{pointer}"} for pointer, detail in found if pointer]
            )
        case exceptions.ParseError() | RecursionError():  # the latter: brackets in brackets without end
            return problems.MALFORMED.says("Send a JSON object in UTF-8.")
        case exceptions.UnsupportedMediaType():
            return problems.NOT_JSON.says("Send `Content-Type: application/json`.")
        case exceptions.NotAuthenticated() | exceptions.AuthenticationFailed():
            detail = exc.detail["detail"] if isinstance(exc.detail, dict) else exc.detail
            return problems.UNAUTHENTICATED.says(str(detail), headers={"WWW-Authenticate": "Bearer"})
        case exceptions.PermissionDenied() | PermissionDenied():
            return problems.FORBIDDEN.says(str(exc) or "You may not do this.")
        case exceptions.NotFound():
            return problems.NOT_FOUND.says(str(exc.detail))
        case Http404():
            return problems.NOT_FOUND.says("Nothing has this address.")
        case exceptions.MethodNotAllowed():
            return problems.WRONG_METHOD.says(str(exc.detail))
        case exceptions.NotAcceptable():
            return problems.NOT_ACCEPTABLE.says("Ask for application/json.")
        case exceptions.Throttled():
            return problems.TOO_MANY_REQUESTS.says(str(exc.detail), headers={"Retry-After": str(int(getattr(exc, "wait", None) or 1))})
        case OperationalError() | InterfaceError():
            return problems.UNAVAILABLE.says("The database does not answer. Try again.", headers={"Retry-After": "2"})
    return None


def _flatten(detail: Any, pointer: str) -> Iterator[tuple[str, str]]:
    """Yield (pointer, sentence) for each of the REST framework's nested errors."""
    if isinstance(detail, dict):
        for name, inner in detail.items():
            yield from _flatten(inner, pointer if name == "non_field_errors" else f"{pointer}/{name}")
    elif isinstance(detail, list):
        for index, inner in enumerate(detail):
            # A list of sentences belongs to one field; a list of dicts has one for each item.
            yield from _flatten(inner, f"{pointer}/{index}" if isinstance(inner, dict) else pointer)
    else:
        yield pointer, str(detail)


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    """Answer an address that is none; below /api/ also when DEBUG is on, which would else list all addresses."""
    return _answer(request, problems.NOT_FOUND.says("Nothing has this address."))


def server_error(request: HttpRequest) -> HttpResponse:
    return _answer(request, problems.SERVER_ERROR.says("The error is in our log."))


def respond(refusal: Refusal) -> HttpResponse:
    """Return the answer of a door that is not the REST framework's."""
    metrics.refused[refusal.problem.slug].inc()
    return HttpResponse(
        json.dumps(refusal.body()), status=refusal.problem.status, headers=refusal.headers, content_type=problems.CONTENT_TYPE
    )


def _answer(request: HttpRequest, refusal: Refusal) -> HttpResponse:
    if request.path.startswith(("/api/", "/graphql")):
        return respond(refusal)
    return render(request, "polls/problem.html", refusal.body(), status=refusal.problem.status)


def explain(request: HttpRequest, slug: str) -> HttpResponse:
    """Show what a problem's `type` means: the address in it can be opened."""
    problem = next((problem for problem in problems.ALL if problem.slug == slug), None)
    if problem is None:
        raise Http404
    return render(request, "polls/problem.html", {"title": problem.title, "status": problem.status, "detail": "", "type": problem.type})
