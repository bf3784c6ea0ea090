"""SECURITY.md's table of who sees what, asked of running processes, of their logs and of the database."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.db import connection

from polls import codes, networks
from polls.journal import Act
from polls.models import Poll, SuspiciousIP, Vote, VoterCode
from polls.voters import VoterKeys
from tests.conftest import ROOT, Api, make_poll, now, option, wait_until  # noqa: F401 - a fixture
from tests.test_cases_api import make_case
from tests.test_rights import callers, people  # noqa: F401 - fixtures

SECTION = (ROOT / "SECURITY.md").read_text().partition("## Who sees what")[2].partition("\n## ")[0]
_HEAD, _, *_ROWS = ([cell.strip() for cell in line.strip("| ").split("|")] for line in re.findall(r"^\|.*\|$", SECTION, re.MULTILINE))
TABLE = {fact: dict(zip(_HEAD[1:], cells, strict=True)) for fact, *cells in _ROWS}
# The columns that ask by HTTP, and who asks.
ASK = {"everybody": "nobody", "owner": "owner", "key": "write", "operator": "operator", "auditor": "auditor", "admin": "admin"}
ADDRESS, LABEL = "198.51.100.77", "number 4711 of the roll"


@dataclass
class Scene:
    """Polls with votes; `tables` is a dump of the database without secrets, `log` what the processes wrote."""

    open: Poll
    hidden: Poll
    sealed: Poll
    election: Poll
    receipt: str
    code_id: int
    case_id: int
    voter_key: Any
    tables: str = ""
    log: str = ""
    answers: dict[str, Any] = field(default_factory=dict)


def cast(api: Api, poll: Poll, text: str = "soup", **more: Any) -> Any:
    answer = api.post(f"/api/v1/polls/{poll.pk}/votes", {"option": str(option(poll, text)), **more}, prefer="wait=10")
    assert answer.status == 201, answer.text
    return answer.json


@pytest.fixture
def scene(pipeline, callers, make_poll, tmp_path_factory):  # noqa: F811
    polls = {kind: make_poll(voter_policy="ip", results_visibility=kind) for kind in ("always", "owner", "sealed")}
    election = make_poll(voter_policy="code", results_visibility="after_close")
    [issued] = codes.generate(election, 1, Act("olga", now()), labels=[LABEL])
    voter = Api(pipeline, {})
    receipts = [cast(voter, poll) for poll in polls.values()]
    cast(voter, election, code=issued.code)
    case = make_case(polls["always"], ADDRESS)
    with connection.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'")
        dump = []
        for (table,) in cursor.fetchall():
            cursor.execute(f"SELECT t::text FROM {connection.ops.quote_name(table)} t")
            dump += [row for (row,) in cursor]
    logs = [path for path in tmp_path_factory.getbasetemp().glob("pipeline*/*.log") if not path.parent.is_symlink()]
    return Scene(
        polls["always"],
        polls["owner"],
        polls["sealed"],
        election,
        receipts[0]["receipt"],
        issued.id,
        case.pk,
        Vote.objects.get(poll_id=polls["always"].pk).voter_key,
        "\n".join(dump),
        "\n".join(path.read_text() for path in logs),
    )


def shows_results(api: Api, poll: Poll) -> bool:
    """By any door: results, stream, GraphQL, integrity."""
    path = f"/api/v1/polls/{poll.pk}"
    answer = api.get(f"{path}/results")
    if answer.status == 200 and answer.json["total_votes"] == 1:
        return True
    integrity = api.get(f"{path}/integrity")
    graphql = api.post(
        "/graphql", {"query": "query($id: ID!) { poll(id: $id) { results { totalVotes } } }", "variables": {"id": str(poll.pk)}}
    ).json
    assert not (integrity.status == 200 and integrity.json.get("tallies")), integrity.text
    assert not ((graphql.get("data") or {}).get("poll") or {}).get("results"), graphql
    assert api.send("HEAD", f"{path}/results/stream").status != 200
    return False


def listed(api: Api, scene: Scene) -> dict[str, Any]:
    answer = api.get(f"/api/v1/polls/{scene.election.pk}/codes")
    return next((code for code in answer.json["results"] if code["id"] == str(scene.code_id)), {}) if answer.status == 200 else {}


def case(api: Api, scene: Scene) -> dict[str, Any]:
    answer = api.get(f"/api/v1/suspicious-ips/{scene.case_id}")
    return answer.json if answer.status == 200 else {}


# {fact: whether whoever asks by HTTP reads it}
BY_HTTP: dict[str, Callable[[Api, Scene], bool]] = {
    "results of an open poll, `always`": lambda api, scene: shows_results(api, scene.open),
    "results of an open poll, `owner`": lambda api, scene: shows_results(api, scene.hidden),
    "results of a `sealed` poll before its end": lambda api, scene: shows_results(api, scene.sealed),
    "what became of a vote": lambda api, scene: False,  # nobody finds a vote without its receipt: no door lists votes
    "what a vote chose": lambda api, scene: bool(case(api, scene).get("choices")),
    "for whom a code is": lambda api, scene: listed(api, scene).get("label") == LABEL,
    "whose code was used, before the poll is final": lambda api, scene: listed(api, scene).get("state") == "used",
    "the address of a suspicious case": lambda api, scene: ADDRESS in str(case(api, scene).get("network")),
    "what was changed in a poll, and when": lambda api, scene: (
        api.get(f"/api/v1/polls/{scene.open.pk}/history").json["results"][0]["action"] != ""
    ),
    "who changed it, and why": lambda api, scene: api.get(f"/api/v1/polls/{scene.open.pk}/journal").status == 200,
}
# {fact: (whether logs and Flower, a dump, and a dump with VOTER_SECRET tell it)}
ELSEWHERE: dict[str, tuple[Callable[[Scene], bool], ...]] = {
    **dict.fromkeys(
        [fact for fact in BY_HTTP if fact.startswith("results of")],
        (
            lambda scene: "total_votes" in scene.log,
            lambda scene: f"{{{option(scene.sealed, 'soup')}}},1,1,{scene.sealed.pk}" in scene.tables,
            lambda scene: True,  # a dump has it without
        ),
    ),
    "what became of a vote": (
        lambda scene: str(scene.voter_key) in scene.log,
        lambda scene: f"({scene.open.pk},{scene.voter_key}," in scene.tables,
        lambda scene: VoterKeys(scene.open.pk, "ip", scene.open.voter_salt).of("127.0.0.1") == scene.voter_key,
    ),
    "what a vote chose": (
        lambda scene: str(scene.voter_key) in scene.log,
        lambda scene: "127.0.0.1" in scene.tables,  # the vote's row is there, and nobody's name on it
        lambda scene: VoterKeys(scene.open.pk, "ip", scene.open.voter_salt).of("127.0.0.1") == scene.voter_key,
    ),
    "for whom a code is": (
        lambda scene: LABEL in scene.log,
        lambda scene: LABEL in scene.tables or LABEL.encode().hex() in scene.tables,
        lambda scene: VoterCode.objects.get(pk=scene.code_id).label == LABEL,
    ),
    "whose code was used, before the poll is final": (
        lambda scene: LABEL in scene.log,
        lambda scene: LABEL in scene.tables or LABEL.encode().hex() in scene.tables,
        lambda scene: VoterCode.objects.get(pk=scene.code_id).label == LABEL,
    ),
    "the address of a suspicious case": (
        lambda scene: ADDRESS in scene.log,
        lambda scene: ADDRESS in scene.tables,
        lambda scene: ADDRESS in str(_reveal(scene)),
    ),
    "what was changed in a poll, and when": (
        lambda scene: False,
        lambda scene: f"{scene.open.pk}" in scene.tables and "created" in scene.tables,
        lambda scene: True,
    ),
    "who changed it, and why": (lambda scene: False, lambda scene: ",olga,created," in scene.tables, lambda scene: True),
}


def _reveal(scene: Scene) -> str | None:
    found = SuspiciousIP.objects.select_related("network_secret").get(pk=scene.case_id)
    return networks.reveal(found.network_secret, found.kind, found.network_key, found.subnet_key)


def test_the_table_has_every_fact_that_is_asked_and_no_other():
    assert list(TABLE) == list(BY_HTTP)
    assert {cell for row in TABLE.values() for cell in row.values()} == {"yes", "no"}


def test_who_sees_what(callers, scene):  # noqa: F811
    found: dict[str, dict[str, str]] = {}
    for fact, reads in BY_HTTP.items():
        told = {column: reads(callers[name], scene) for column, name in ASK.items()}
        told["logs, Flower"], told["a dump"], told["a dump and `VOTER_SECRET`"] = (is_told(scene) for is_told in ELSEWHERE[fact])
        voter = Api(callers["nobody"].port, {})
        told["voter"] = reads(voter, scene)
        if fact == "what became of a vote":
            status = voter.post("/api/v1/votes/status", {"receipts": [scene.receipt]}).json["votes"][0]
            told["voter"] = status["status"] == "counted" and "option" not in str(status)
        found[fact] = {column: "yes" if told[column] else "no" for column in _HEAD[1:]}

    assert {fact: row for fact, row in found.items() if row != TABLE[fact]} == {}


def test_the_people_behind_a_poll_see_its_codes_as_the_table_says_once_it_is_final(callers, scene):  # noqa: F811
    Poll.objects.filter(pk=scene.election.pk).update(closes_at=now(), finalised_at=now())

    seen = {name: listed(api, scene).get("state") for name, api in callers.items() if name in ASK.values()}

    assert {name for name, state in seen.items() if state == "used"} == {"owner", "write", "auditor", "admin"}


def test_a_vote_that_is_seen_counted_is_seen_without_its_choice(callers, scene):  # noqa: F811
    answer = callers["nobody"].post("/api/v1/votes/status", {"receipts": [scene.receipt]})
    wait_until(lambda: answer.status == 200)
    assert set(answer.json["votes"][0]) == {"id", "status", "reason", "accepted_at", "counted_at"}
