"""The API's description: complete, valid, and shown without the internet."""

import ast
import inspect
import json
import re
from collections import defaultdict
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit
from urllib.request import urlopen

import pytest
import yaml
from django.core.management import CommandError, call_command
from openapi_spec_validator import OpenAPIV31SpecValidator

from polls import accepting, ballots, following, intake, problems, throttling
from polls.api import postman, urls
from polls.management.commands import write_api_docs
from tests.conftest import Api

# The hot routes, and the methods of polls.intake.Intake that answer them.
HOT = {
    "/api/v1/polls/{poll_id}/votes": "_cast",
    "/api/v1/polls/{poll_id}/votes/batch": "_cast_batch",
    "/api/v1/polls/{poll_id}/votes/withdraw": "_withdraw",
    "/api/v1/polls/{poll_id}/results": "_show_results",
    "/api/v1/polls/{poll_id}/results/stream": "_follow_results",
    "/api/v1/votes/{receipt}": "_show_receipt",
    "/api/v1/votes/status": "_show_statuses",
    "/api/v1/voters": "_make_voter",
}


@pytest.fixture(scope="session")
def anonymous(pipeline):
    return Api(pipeline, {})


@pytest.fixture(scope="session")
def schema(anonymous):
    """The schema as a client gets it."""
    return anonymous.get("/api/schema?format=json").json


def operations(schema):
    """[(path, method, operation)]"""
    return [(path, method, operation) for path, methods in schema["paths"].items() for method, operation in methods.items()]


def problems_of(operation):
    """The slugs of the problems that the schema shows for it."""
    return {
        slug
        for answer in operation["responses"].values()
        for slug in answer.get("content", {}).get(problems.CONTENT_TYPE, {}).get("examples", {})
    }


def test_it_builds_without_a_warning(tmp_path):
    call_command("spectacular", "--validate", "--fail-on-warn", "--file", str(tmp_path / "schema.yaml"))


def test_it_is_valid_openapi_3_1(schema):
    assert schema["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(schema).validate()
    assert "nullable" not in json.dumps(schema)  # a word of 3.0


def test_it_holds_every_address_of_the_api_and_no_other(schema):
    of_django = {
        "/" + re.sub(r"<\w+:(\w+)>", r"{\1}", str(url.pattern)) for url in urls.urlpatterns if str(url.pattern).startswith("api/v1/")
    }
    assert len(of_django) > 20
    assert set(schema["paths"]) == of_django | set(HOT)


def test_every_operation_is_named_described_and_sorted(schema):
    found = operations(schema)
    assert len({operation["operationId"] for _, _, operation in found}) == len(found)
    tags = [tag["name"] for tag in schema["tags"]]
    for path, method, operation in found:
        assert operation["summary"], (path, method)
        assert set(operation["tags"]) <= set(tags), (path, method)
        for status, answer in operation["responses"].items():
            assert answer["description"], (path, method, status)


def test_every_operation_says_who_may(schema):
    declared = schema["components"]["securitySchemes"]
    open_to_all = {"token_obtain", "token_refresh"}
    for _, _, operation in operations(schema):
        assert "security" in operation or operation["operationId"] in open_to_all
        assert {name for choice in operation.get("security", []) for name in choice} <= set(declared)


# --- Problems ---------------------------------------------------------------------------------------------------------


def what_intake_raises(door):
    """The slugs of the problems that the source raises on the way of a request through this door, by the names of what it calls."""
    functions = defaultdict(list)
    for module in (throttling, ballots, accepting, following, intake):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions[node.name].append(node)
    slugs, seen, ahead = set(), set(), [door, "__call__"]
    while ahead:
        name = ahead.pop()
        if name in seen or (name in HOT.values() and name != door):
            continue
        seen.add(name)
        for node in (inner for function in functions[name] for inner in ast.walk(function)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "problems":
                problem = getattr(problems, node.attr)
                slugs |= {problem.slug} if isinstance(problem, problems.Problem) else set()
            elif isinstance(node, ast.Attribute | ast.Name):
                ahead.append(node.attr if isinstance(node, ast.Attribute) else node.id)
    return slugs


# Of a batch, what is wrong with a vote stands in its own place. Results that are not public are Django's to answer.
IN_AN_ITEM = {"poll-not-open", "poll-closed", "unknown-code", "unknown-option", "wrong-choices"}
OF_DJANGO = {"unauthenticated", "not-acceptable"}
# What is refused before it is looked where a request goes (core/protocol.py).
OF_THE_PROTOCOL = {"bad-request", "encoded-body", "unknown-transfer"}


@pytest.mark.parametrize("path", HOT)
def test_a_hot_route_shows_exactly_the_problems_that_its_source_raises(schema, path):
    [operation] = schema["paths"][path].values()
    raised = what_intake_raises(HOT[path])
    raised -= IN_AN_ITEM if HOT[path] == "_cast_batch" else set()
    raised |= OF_DJANGO if HOT[path] == "_show_results" else set()
    raised |= OF_THE_PROTOCOL

    assert len(raised) >= 4
    assert problems_of(operation) == raised


def test_every_problem_is_shown_somewhere_with_its_status(schema):
    known, shown = {problem.slug: problem for problem in problems.ALL}, set()
    for path, method, operation in operations(schema):
        shown |= problems_of(operation)
        for status, answer in operation["responses"].items():
            for slug, example in answer.get("content", {}).get(problems.CONTENT_TYPE, {}).get("examples", {}).items():
                assert status == str(known[slug].status), (path, method, slug)
                assert example == {"$ref": f"#/components/examples/{slug}"}
                assert schema["components"]["examples"][slug]["value"]["type"] == known[slug].type
    assert set(known) == shown
    assert schema["components"]["schemas"]["Problem"]["properties"]["type"]["enum"] == [problem.type for problem in problems.ALL]


def test_what_the_api_answered_wrong_requests_is_in_the_schema(schema, anonymous, owners_api, poll):
    """One request per kind of refusal; the parametrised ones of the other files are its long form."""
    one, votes = f"/api/v1/polls/{poll.pk}", f"/api/v1/polls/{poll.pk}/votes"
    asked = [
        ("/api/v1/polls", "get", anonymous.get("/api/v1/polls?cursor=x")),
        ("/api/v1/polls", "get", anonymous.get("/api/v1/polls", authorization="Bearer x")),
        ("/api/v1/polls", "get", anonymous.get("/api/v1/polls", accept="text/csv")),
        ("/api/v1/polls", "post", owners_api.post("/api/v1/polls", b"{")),
        ("/api/v1/polls", "post", owners_api.post("/api/v1/polls", {})),
        ("/api/v1/polls", "post", anonymous.post("/api/v1/polls", {})),
        ("/api/v1/polls", "post", owners_api.post("/api/v1/polls", b"a=b", content_type="text/plain")),
        ("/api/v1/polls/{poll_id}", "patch", owners_api.patch(one, {"voter_policy": "ip"})),
        ("/api/v1/polls/{poll_id}", "delete", owners_api.send("DELETE", one)),
        ("/api/v1/auth/token", "post", anonymous.post("/api/v1/auth/token", {"username": "olga", "password": "guess"})),
        ("/api/v1/auth/token", "post", anonymous.post("/api/v1/auth/token", b"[")),
        ("/api/v1/auth/token/refresh", "post", anonymous.post("/api/v1/auth/token/refresh", {"refresh": "x"})),
        ("/api/v1/auth/token/refresh", "post", anonymous.post("/api/v1/auth/token/refresh", {})),
        ("/api/v1/polls/{poll_id}/votes", "post", anonymous.post(votes, {"option": "1", "voter": "alice"})),
    ]
    for path, method, answer in asked:
        slug = answer.json["type"].rpartition("/")[2]
        assert slug in problems_of(schema["paths"][path][method]), (path, method, slug)


# --- As files ---------------------------------------------------------------------------------------------------------


def test_the_files_in_docs_are_what_the_code_describes():
    call_command("write_api_docs", "--check")


def test_a_file_that_differs_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(write_api_docs, "FOLDER", tmp_path)

    with pytest.raises(CommandError, match="make api-docs"):
        call_command("write_api_docs", "--check")
    assert list(tmp_path.iterdir()) == []


def test_the_postman_collection_has_every_operation_with_a_body_that_is_json(schema):
    made = postman.collection(schema)

    requests = [item["request"] for folder in made["item"] for item in folder["item"]]
    assert len(requests) == len(operations(schema))
    assert {request["url"]["raw"].partition("}}")[2] for request in requests} == {
        path.replace("{", ":").replace("}", "") for path in schema["paths"]
    }
    for request in requests:
        if "body" in request:
            assert json.loads(request["body"]["raw"]) is not None
    cast = next(request for request in requests if request["url"]["raw"].endswith("/polls/:poll_id/votes"))
    assert json.loads(cast["body"]["raw"]) == {"option": "17"}


# --- Over HTTP --------------------------------------------------------------------------------------------------------


class Sources(HTMLParser):
    """What a page loads: the addresses of its scripts, styles, images and frames."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "embed") and given.get("src"):
            self.found.append(given["src"])
        if tag == "link" and given.get("href"):
            self.found.append(given["href"])


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("query", ["", "?format=json", "?format=yaml"])
def test_the_schema_answers_in_yaml_and_json(anonymous, slash, query, schema):
    answer = anonymous.get(f"/api/schema{slash}{query}")

    assert answer.status == 200
    assert yaml.load(answer.text, yaml.CSafeLoader) == schema  # JSON is YAML
    assert ("json" in answer.headers["content-type"]) == ("json" in query)


@pytest.mark.parametrize("path", ["/api/docs", "/api/docs/", "/api/redoc", "/api/redoc/", "/admin/login/", "/problems/poll-closed"])
def test_a_page_loads_nothing_from_another_host(anonymous, path):
    page = anonymous.get(path)
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    sources = Sources()
    sources.feed(page.text)

    here = f"http://127.0.0.1:{anonymous.port}"
    loaded = [urlsplit(urljoin(here + path, source)) for source in sources.found if not source.startswith("data:")]
    assert loaded or path.startswith("/problems")
    for address in loaded:
        assert f"{address.scheme}://{address.netloc}" == here
        with urlopen(address.geturl()) as answer:  # raises unless it is 200
            text = answer.read().decode(errors="replace")
        if address.path.endswith(".css"):
            assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text)


@pytest.mark.parametrize("path", ["/api/docs", "/api/redoc"])
def test_a_browser_lets_the_scripts_of_the_documentation_load_nothing_from_elsewhere(anonymous, path):
    """They would: a logo, a validator's badge, fonts."""
    page = anonymous.get(path)

    assert "/api/schema" in page.text + anonymous.get(f"{path}?script=").text
    rules = dict(rule.split(maxsplit=1) for rule in page.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == "'self'"
    assert {word for words in rules.values() for word in words.split()} <= {"'self'", "'none'", "'unsafe-inline'", "data:", "blob:"}
