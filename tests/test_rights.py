"""Who may do what: every operation of the API, asked for by everybody there is, over real HTTP."""

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from types import SimpleNamespace
from uuid import uuid4

import pytest
from django.db import connection
from django.utils.timezone import now

from polls import accounts, blocks, clients, codes, editing, problems, receipts, roles, voters
from polls.bundles import AcceptedVote
from polls.journal import Act
from polls.models import ApiClient, Poll, Scope, VoterCode
from polls.moments import microseconds_now
from polls.voters import VoteIds
from tests.conftest import PASSWORD, Api, make_user, option, wait_until
from tests.test_cases_api import WHY, make_case
from tests.test_intake import assert_refused

# Rows: an operation by its id in the OpenAPI schema, and the kind of poll it is asked for (POLLS). The poll, and the API client under
# /clients, are of `owner`. Columns: who asks. Nobody in particular; people by their role; `rival` is an owner as well. Keys of the
# owner's API clients with one scope each (votes:cast, polls:write, results:read); of the rival's and of the admin's with all scopes; of
# the owner's with all scopes, but made for another poll, and but revoked.
# 400 says: may ask, but does so wrongly on purpose.
TABLE = """
                                 nobody member owner rival operator auditor admin cast write read rivals admins elsewhere revoked
polls_list             -         200    200    200   200   200      200     200   200  200   200  200    200    200       401
polls_create           -         401    403    201   201   403      403     201   403  201   403  201    201    403       401
polls_read             draft     404    404    200   404   404      200     200   404  200   404  404    404    404       401
polls_read             scheduled 200    200    200   200   200      200     200   200  200   200  200    200    200       401
polls_read             open      200    200    200   200   200      200     200   200  200   200  200    200    200       401
polls_read             archived  200    200    200   200   200      200     200   200  200   200  200    200    200       401
polls_change           draft     401    404    200   404   404      403     200   404  200   404  404    404    404       401
polls_change           open      401    403    200   403   403      403     200   403  200   403  403    403    403       401
errata_add             draft     401    404    409   404   404      403     409   404  409   404  404    404    404       401
errata_add             open      401    403    201   403   403      403     201   403  201   403  403    403    403       401
polls_delete           draft     401    404    204   404   404      403     204   404  204   404  404    404    404       401
polls_publish          draft     401    404    200   404   404      403     200   404  200   404  404    404    404       401
polls_open             scheduled 401    403    200   403   403      403     200   403  200   403  403    403    403       401
polls_close            open      401    403    200   403   403      403     200   403  200   403  403    403    403       401
polls_extend           open      401    403    200   403   403      403     200   403  200   403  403    403    403       401
polls_reopen           closing   401    403    200   403   403      403     200   403  200   403  403    403    403       401
polls_archive          final     401    403    200   403   403      403     200   403  200   403  403    403    403       401
polls_duplicate        draft     401    404    201   404   404      403     201   404  201   404  404    404    404       401
polls_duplicate        open      401    403    201   403   403      403     201   403  201   403  403    403    403       401
journal_list           draft     404    404    200   404   404      200     200   404  200   404  404    404    404       401
journal_list           open      401    403    200   403   403      200     200   403  200   403  403    403    403       401
results_read           draft     404    404    200   404   404      200     200   404  403   404  404    404    404       401
results_read           open      200    200    200   200   200      200     200   200  200   200  200    200    200       200
results_read           hidden    403    403    200   403   403      200     200   403  403   200  403    403    403       401
results_follow         draft     404    404    404   404   404      404     404   404  404   404  404    404    404       404
results_follow         open      200    200    200   200   200      200     200   200  200   200  200    200    200       200
results_follow         hidden    403    403    403   403   403      403     403   403  403   403  403    403    403       403
history_list           draft     404    404    200   404   404      200     200   404  200   404  404    404    404       401
history_list           open      200    200    200   200   200      200     200   200  200   200  200    200    200       401
integrity_read         draft     404    404    200   404   404      200     200   404  200   404  404    404    404       401
integrity_read         open      401    403    200   403   200      200     200   403  200   403  403    403    403       401
codes_list             planned   401    404    200   404   404      200     200   404  200   404  404    404    404       401
codes_list             codes     401    403    200   403   403      200     200   403  200   403  403    403    403       401
codes_count            codes     401    403    200   403   403      200     200   403  200   403  403    403    403       401
codes_add              planned   401    404    201   404   404      403     201   404  201   404  404    404    404       401
codes_add              codes     401    403    201   403   403      403     201   403  201   403  403    403    403       401
codes_revoke_one       codes     401    403    200   403   403      403     200   403  200   403  403    403    403       401
codes_revoke           codes     401    403    200   403   403      403     200   403  200   403  403    403    403       401
votes_cast             draft     404    404    404   404   404      404     404   404  404   404  404    404    404       404
votes_cast             ip        202    202    202   202   202      202     202   202  202   202  202    202    202       202
votes_cast             session   202    202    202   202   202      202     202   202  202   202  202    202    202       202
votes_cast             codes     202    202    202   202   202      202     202   202  202   202  202    202    202       202
votes_cast             account   401    202    202   202   202      202     202   401  401   401  401    401    401       401
votes_cast             open      401    401    401   401   401      401     401   202  403   403  403    403    403       401
votes_withdraw         open      401    401    401   401   401      401     401   202  403   403  403    403    403       401
votes_cast_batch       open      401    401    401   401   401      401     401   200  403   403  403    403    403       401
votes_cast_batch       codes     401    401    401   401   401      401     401   200  403   403  403    403    403       401
voters_create          session   201    201    201   201   201      201     201   201  201   201  201    201    201       201
votes_read             open      200    200    200   200   200      200     200   200  200   200  200    200    200       200
votes_read_many        open      200    200    200   200   200      200     200   200  200   200  200    200    200       200
accounts_create        -         201    201    201   201   201      201     201   201  201   201  201    201    201       201
token_obtain           -         200    200    200   200   200      200     200   200  200   200  200    200    200       200
token_refresh          -         200    200    200   200   200      200     200   200  200   200  200    200    200       200
token_revoke           -         204    204    204   204   204      204     204   204  204   204  204    204    204       204
accounts_read          -         401    200    200   200   200      200     200   403  403   403  403    403    403       401
password_change        -         401    400    400   400   400      400     400   403  403   403  403    403    403       401
password_reset         -         202    202    202   202   202      202     202   202  202   202  202    202    202       202
password_reset_confirm -         400    400    400   400   400      400     400   400  400   400  400    400    400       400
clients_list           -         401    403    200   200   403      200     200   403  403   403  403    403    403       401
clients_create         -         401    403    201   201   403      403     201   403  403   403  403    403    403       401
clients_read           -         401    403    200   404   403      200     200   403  403   403  403    403    403       401
clients_change         -         401    403    200   404   403      403     200   403  403   403  403    403    403       401
clients_revoke         -         401    403    204   404   403      403     204   403  403   403  403    403    403       401
clients_rotate         -         401    403    200   404   403      403     200   403  403   403  403    403    403       401
queues_read            -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
dead_letters_list      -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
dead_letters_replay    -         401    403    403   403   200      403     200   403  403   403  403    403    403       401
dead_letters_replay_one -        401    403    403   403   404      403     404   403  403   403  403    403    403       401
cases_list             -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
cases_read             -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
cases_quarantine       -         401    403    403   403   200      403     200   403  403   403  403    403    403       401
cases_release          -         401    403    403   403   200      403     200   403  403   403  403    403    403       401
cases_void             -         401    403    403   403   200      403     200   403  403   403  403    403    403       401
cases_clear            -         401    403    403   403   200      403     200   403  403   403  403    403    403       401
cases_block            -         401    403    403   403   201      403     201   403  403   403  403    403    403       401
rulings_list           -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
rulings_create         -         401    403    403   403   201      403     201   403  403   403  403    403    403       401
blocks_list            -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
blocks_create          -         401    403    403   403   201      403     201   403  403   403  403    403    403       401
blocks_lift            -         401    403    403   403   204      403     204   403  403   403  403    403    403       401
rules_list             -         401    403    403   403   200      200     200   403  403   403  403    403    403       401
rules_try              -         401    403    403   403   200      403     200   403  403   403  403    403    403       401
"""
_HEAD, *_ROWS = (line.split() for line in TABLE.strip().splitlines())

# Every kind is an open poll for API clients but for this.
POLLS = {
    "-": {},
    "draft": {"published_at": None},
    "scheduled": {"opens_at": now() + timedelta(hours=1), "closes_at": now() + timedelta(hours=2)},
    "open": {},
    "closing": {"closes_at": now()},
    "final": {"closes_at": now(), "finalised_at": now()},
    "archived": {"archived_at": now()},
    "hidden": {"results_visibility": "owner"},
    "codes": {"voter_policy": "code"},
    "planned": {"voter_policy": "code", "published_at": None},
    "session": {"voter_policy": "session"},
    "account": {"voter_policy": "account"},
    "ip": {"voter_policy": "ip"},
}

LATER = (now() + timedelta(days=3)).isoformat()
LUNCH = {"title": "Lunch", "options": [{"text": "soup"}, {"text": "salad"}], "voter_policy": "ip", "closes_at": LATER}


@dataclass
class Scene:
    """What one request is about: a poll of the owner's, and an API client of theirs."""

    poll: Poll
    client: ApiClient

    @property
    def ballot(self):
        """A vote for soup, by whom the poll lets vote."""
        ballot = {"option": str(option(self.poll, "soup"))}
        if self.poll.voter_policy == "code":
            return {**ballot, "code": self.code.code}
        return {**ballot, "voter": "alice"} if self.poll.voter_policy == "client" else ballot

    @cached_property
    def code(self):
        return issue_code(self.poll)

    @cached_property
    def case(self):
        """A case about an address in the poll."""
        return make_case(self.poll, "198.18.113.8")

    @cached_property
    def block(self):
        return blocks.block("198.18.113.9", now() + timedelta(hours=1), Act("otto", now(), "Guesses codes."))

    def rows(self):
        """All that a refused request must leave as it was."""
        with connection.cursor() as cursor:
            cursor.execute(
                """
                SELECT (SELECT p::text FROM polls p WHERE id = %(poll)s), (SELECT c::text FROM api_clients c WHERE id = %(client)s),
                       ARRAY(SELECT o::text FROM options o WHERE poll_id = %(poll)s ORDER BY id),
                       ARRAY(SELECT c::text FROM voter_codes c WHERE poll_id = %(poll)s ORDER BY id),
                       ARRAY(SELECT j::text FROM journal j WHERE poll_id = %(poll)s ORDER BY id),
                       (SELECT count(*) FROM polls), (SELECT count(*) FROM api_clients),
                       (SELECT count(*) FROM decisions), (SELECT count(*) FROM holds),
                       ARRAY(SELECT c::text FROM suspicious_ips c WHERE poll_id = %(poll)s ORDER BY id),
                       ARRAY(SELECT b::text FROM blocks b ORDER BY id)
                """,
                {"poll": self.poll.pk, "client": self.client.pk},
            )
            return cursor.fetchone()


def issue_code(poll):
    """The code SOUP-4711 of this poll."""
    [code] = codes.upload(poll, [codes.Row("SOUP-4711", "alice", "Row 1")], Act("olga", now()))
    return code


# What is sent: method, path, body, headers.
REQUESTS = {
    "polls_list": lambda scene: ("GET", "/polls"),
    "polls_create": lambda scene: ("POST", "/polls", LUNCH),
    "polls_read": lambda scene: ("GET", f"/polls/{scene.poll.pk}"),
    "polls_change": lambda scene: ("PATCH", f"/polls/{scene.poll.pk}", {"closes_at": LATER}),
    "errata_add": lambda scene: ("POST", f"/polls/{scene.poll.pk}/errata", {"field": "title", "text": "Dinner", **WHY}),
    "polls_delete": lambda scene: ("DELETE", f"/polls/{scene.poll.pk}"),
    "polls_publish": lambda scene: ("POST", f"/polls/{scene.poll.pk}/publish", {}),
    "polls_open": lambda scene: ("POST", f"/polls/{scene.poll.pk}/open", {}),
    "polls_close": lambda scene: ("POST", f"/polls/{scene.poll.pk}/close", {}),
    "polls_extend": lambda scene: ("POST", f"/polls/{scene.poll.pk}/extend", {"closes_at": LATER}),
    "polls_reopen": lambda scene: ("POST", f"/polls/{scene.poll.pk}/reopen", {"closes_at": LATER}),
    "polls_archive": lambda scene: ("POST", f"/polls/{scene.poll.pk}/archive", {}),
    "polls_duplicate": lambda scene: ("POST", f"/polls/{scene.poll.pk}/duplicate", {}),
    "journal_list": lambda scene: ("GET", f"/polls/{scene.poll.pk}/journal"),
    "history_list": lambda scene: ("GET", f"/polls/{scene.poll.pk}/history"),
    "integrity_read": lambda scene: ("GET", f"/polls/{scene.poll.pk}/integrity"),
    # GET does not end while the poll is open.
    "results_follow": lambda scene: ("HEAD", f"/polls/{scene.poll.pk}/results/stream"),
    "results_read": lambda scene: ("GET", f"/polls/{scene.poll.pk}/results"),
    "codes_list": lambda scene: ("GET", f"/polls/{scene.poll.pk}/codes"),
    "codes_count": lambda scene: ("GET", f"/polls/{scene.poll.pk}/codes/counts"),
    "codes_add": lambda scene: ("POST", f"/polls/{scene.poll.pk}/codes", {"generate": 1}),
    "codes_revoke_one": lambda scene: ("DELETE", f"/polls/{scene.poll.pk}/codes/{scene.code.id}"),
    "codes_revoke": lambda scene: ("POST", f"/polls/{scene.poll.pk}/codes/revoke", {"ids": [str(scene.code.id)]}),
    "votes_cast": lambda scene: (
        "POST",
        f"/polls/{scene.poll.pk}/votes",
        scene.ballot,
        {"voter_token": voters.new_voter_token(scene.poll.pk)} if scene.poll.voter_policy == "session" else {},
    ),
    "votes_withdraw": lambda scene: (
        "POST",
        f"/polls/{scene.poll.pk}/votes/withdraw",
        {name: value for name, value in scene.ballot.items() if name != "option"},
    ),
    "votes_cast_batch": lambda scene: ("POST", f"/polls/{scene.poll.pk}/votes/batch", [scene.ballot]),
    "voters_create": lambda scene: ("POST", "/voters", {"poll": str(scene.poll.pk)}),
    "votes_read": lambda scene: ("GET", f"/votes/{receipt_of(scene)}"),
    "votes_read_many": lambda scene: ("POST", "/votes/status", {"receipts": [receipt_of(scene)]}),
    "accounts_create": lambda scene: (
        "POST",
        "/auth/register",
        {"username": f"new-{uuid4().hex}", "email": f"{uuid4().hex}@example.org", "password": PASSWORD},
    ),
    "token_obtain": lambda scene: ("POST", "/auth/token", {"username": "olga", "password": PASSWORD}),
    "token_refresh": lambda scene: ("POST", "/auth/token/refresh", {"refresh": accounts.sign_in("olga", PASSWORD).refresh}),
    "token_revoke": lambda scene: ("POST", "/auth/logout", {"refresh": accounts.sign_in("olga", PASSWORD).refresh}),
    "accounts_read": lambda scene: ("GET", "/auth/me"),
    "password_change": lambda scene: ("POST", "/auth/password", {"old_password": "wrong", "new_password": f"{PASSWORD}!"}),
    "password_reset": lambda scene: ("POST", "/auth/password/reset", {"email": "nobody@example.org"}),
    "password_reset_confirm": lambda scene: (
        "POST",
        "/auth/password/reset/confirm",
        {"uid": "MQ", "token": "wrong", "new_password": f"{PASSWORD}!"},
    ),
    "clients_list": lambda scene: ("GET", "/clients"),
    "clients_create": lambda scene: ("POST", "/clients", {"name": "new", "scopes": ["votes:cast"]}),
    "clients_read": lambda scene: ("GET", f"/clients/{scene.client.pk}"),
    "clients_change": lambda scene: ("PATCH", f"/clients/{scene.client.pk}", {"name": "changed"}),
    "clients_revoke": lambda scene: ("DELETE", f"/clients/{scene.client.pk}"),
    "clients_rotate": lambda scene: ("POST", f"/clients/{scene.client.pk}/rotate", {}),
    "queues_read": lambda scene: ("GET", "/queues"),
    "dead_letters_list": lambda scene: ("GET", "/dead-letters"),
    "dead_letters_replay": lambda scene: ("POST", "/dead-letters/replay", {"most": 1}),
    "dead_letters_replay_one": lambda scene: ("POST", "/dead-letters/unknown/replay", {}),
    "cases_list": lambda scene: ("GET", "/suspicious-ips"),
    "cases_read": lambda scene: ("GET", f"/suspicious-ips/{scene.case.pk}"),
    **{
        f"cases_{ruling}": lambda scene, ruling=ruling: ("POST", f"/suspicious-ips/{scene.case.pk}/{ruling}", WHY)
        for ruling in ("quarantine", "release", "void", "clear")
    },
    "cases_block": lambda scene: ("POST", f"/suspicious-ips/{scene.case.pk}/block", {"hours": 1, **WHY}),
    "rulings_list": lambda scene: ("GET", f"/polls/{scene.poll.pk}/rulings"),
    "rulings_create": lambda scene: ("POST", f"/polls/{scene.poll.pk}/rulings", {"ruling": "void", "address": "192.0.2.7", **WHY}),
    "blocks_list": lambda scene: ("GET", "/blocks"),
    "blocks_create": lambda scene: ("POST", "/blocks", {"network": "198.18.113.7", "hours": 1, **WHY}),
    "blocks_lift": lambda scene: ("DELETE", f"/blocks/{scene.block.pk}?reason=Over"),
    "rules_list": lambda scene: ("GET", "/rules"),
    "rules_try": lambda scene: ("POST", "/rules/burst/try", {"poll": str(scene.poll.pk), "reason": "to see"}),
}


def receipt_of(scene):
    vote = AcceptedVote(uuid4(), scene.poll.pk, uuid4(), (), microseconds_now())
    return receipts.writer(scene.poll.pk, VoteIds())(vote)[1]


@pytest.fixture(scope="session")
def people(owner):
    """{name: user}, one for each role and one without."""
    named = {"member": (), "rival": (roles.OWNER,), "operator": (roles.OPERATOR,), "auditor": (roles.AUDITOR,), "admin": (roles.ADMIN,)}
    return {"owner": owner, **{name: make_user(f"rights-{name}", *has) for name, has in named.items()}}


def make_client(owner, *scopes, poll=None):
    """A new API client and its key."""
    return clients.make_client(owner, {"name": "kiosk", "scopes": list(scopes), "poll_id": poll and poll.pk}, at=now())


def a_poll(make_poll, kind, **fields):
    """A poll of the owner's that is of this kind."""
    poll = make_poll(opens_in=-3600, allow_withdrawal=True, draft=True, **fields)
    Poll.objects.filter(pk=poll.pk).update(**{"published_at": poll.created_at, **POLLS[kind]})
    poll.refresh_from_db()
    return poll


@pytest.fixture(scope="session")
def callers(pipeline, people):
    """{name in the table: the API as they see it}"""
    owner, rival = people["owner"], people["rival"]
    another = editing.create_poll(owner, {**LUNCH, "closes_at": now() + timedelta(days=1)}, at=now())
    keys = {
        "cast": make_client(owner, Scope.VOTES_CAST)[1],
        "write": make_client(owner, Scope.POLLS_WRITE)[1],
        "read": make_client(owner, Scope.RESULTS_READ)[1],
        "rivals": make_client(rival, *Scope)[1],
        "admins": make_client(people["admin"], *Scope)[1],
        "elsewhere": make_client(owner, *Scope, poll=another)[1],
        "revoked": make_client(owner, *Scope)[1],
    }
    ApiClient.objects.filter(prefix=voters.key_prefix(keys["revoked"])).update(revoked_at=now())
    known = {name: f"Bearer {accounts.sign_in(user.username, PASSWORD).access}" for name, user in people.items()}
    known |= {name: f"Api-Key {key}" for name, key in keys.items()}
    return {"nobody": Api(pipeline, {}), **{name: Api(pipeline, {"authorization": value}) for name, value in known.items()}}


# --- The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "kind", "expected"),
    [(operation, kind, dict(zip(_HEAD, map(int, statuses), strict=True))) for operation, kind, *statuses in _ROWS],
    ids=[f"{operation} {kind}" for operation, kind, *_ in _ROWS],
)
def test_who_may(callers, people, make_poll, operation, kind, expected):
    answered, scene = {}, None
    for name, api in callers.items():
        scene = scene or Scene(a_poll(make_poll, kind), make_client(people["owner"])[0])
        method, path, body, headers = (*REQUESTS[operation](scene), None, None)[:4]
        before = scene.rows()

        answer = api.send(method, f"/api/v1{path}", body, **(headers or {}))

        answered[name] = answer.status
        if answer.status >= 400:
            assert answer.headers["content-type"] == problems.CONTENT_TYPE, answer.text
            assert scene.rows() == before, f"{name} was refused, and changed something"
        else:
            scene = None  # the next one asks for another: only who is refused leaves it as it was
    assert answered == expected


def test_every_operation_of_the_api_is_in_the_table(callers):
    schema = callers["nobody"].get("/api/schema?format=json").json

    operations = {operation["operationId"] for methods in schema["paths"].values() for operation in methods.values()}

    assert operations == {operation for operation, *_ in _ROWS}


# --- What lists show --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["draft", "archived"])
def test_polls_out_of_sight_are_listed_for_who_changes_or_audits_them(callers, make_poll, kind):
    poll = a_poll(make_poll, kind, title=f"Lunch {uuid4()}")

    seen = {name: api.get(f"/api/v1/polls?search={poll.title.split()[1]}") for name, api in callers.items() if name != "revoked"}

    assert {name for name, answer in seen.items() if answer.json["results"]} == {"owner", "auditor", "admin", "write"}
    mine = {name: api.get(f"/api/v1/polls?mine=true&search={poll.title.split()[1]}") for name, api in callers.items() if name != "revoked"}
    assert {name for name, answer in mine.items() if answer.json["results"]} == {"owner", "write"}


def test_api_clients_are_listed_for_their_owner_and_who_audits(callers, people):
    client, _ = make_client(people["owner"])

    for name, sees in {"owner": True, "rival": False, "auditor": True, "admin": True}.items():
        answer = callers[name].get("/api/v1/clients?page_size=200")
        assert (str(client.pk) in {shown["id"] for shown in answer.json["results"]}) == sees, name
        assert "key" not in answer.json["results"][0]


# --- What belongs to one poll is nothing to another -------------------------------------------------------------------


def ballot_for(poll, **voter):
    return {"option": str(option(poll, "soup")), **voter}


def test_a_code_lets_vote_in_its_own_poll_only(callers, make_poll):
    mine, other = a_poll(make_poll, "codes"), a_poll(make_poll, "codes")
    issue_code(mine)
    cast = callers["cast"]

    for path, body in [("votes", ballot_for(other, code="SOUP-4711")), ("votes/withdraw", {"code": "SOUP-4711"})]:
        assert_refused(cast.post(f"/api/v1/polls/{other.pk}/{path}", body), problems.UNKNOWN_CODE)
    [refused] = cast.post(f"/api/v1/polls/{other.pk}/votes/batch", [ballot_for(other, code="SOUP-4711")]).json["votes"]
    assert refused["problem"]["type"] == problems.UNKNOWN_CODE.type
    assert cast.post(f"/api/v1/polls/{mine.pk}/votes", ballot_for(mine, code="SOUP-4711")).status == 202


def test_a_code_of_another_poll_can_not_be_revoked_through_ones_own(callers, people, make_poll):
    mine, theirs = a_poll(make_poll, "codes"), a_poll(make_poll, "codes")
    Poll.objects.filter(pk=theirs.pk).update(owner=people["rival"])
    code = issue_code(theirs).id

    assert_refused(callers["owner"].send("DELETE", f"/api/v1/polls/{mine.pk}/codes/{code}"), problems.NOT_FOUND)
    refused = callers["owner"].post(f"/api/v1/polls/{mine.pk}/codes/revoke", {"ids": [str(code)]})
    assert_refused(refused, problems.INVALID, pointer="/ids/0")
    assert VoterCode.objects.get(pk=code).revoked_at is None


def test_a_voter_token_lets_vote_in_its_own_poll_only(callers, make_poll):
    mine, other = a_poll(make_poll, "session"), a_poll(make_poll, "session")
    nobody = callers["nobody"]
    token = nobody.post("/api/v1/voters", {"poll": str(mine.pk)}).json["token"]

    for path, body in [("votes", ballot_for(other)), ("votes/withdraw", {})]:
        for how in ({"voter_token": token}, {"cookie": f"voter_token={token}"}):
            assert_refused(nobody.post(f"/api/v1/polls/{other.pk}/{path}", body, **how), problems.UNAUTHENTICATED)
    assert nobody.post(f"/api/v1/polls/{mine.pk}/votes", ballot_for(mine), voter_token=token).status == 202


def test_a_key_for_one_poll_works_in_that_one_and_no_other(callers, people, make_poll):
    mine, other = a_poll(make_poll, "hidden"), a_poll(make_poll, "hidden")
    _, key = make_client(people["owner"], *Scope, poll=mine)
    api = Api(callers["nobody"].port, {"authorization": f"Api-Key {key}"})

    answered = {
        poll.pk: [
            api.cast(poll, "alice").status,
            api.post(f"/api/v1/polls/{poll.pk}/votes/withdraw", {"voter": "alice"}).status,
            api.post(f"/api/v1/polls/{poll.pk}/votes/batch", [ballot_for(poll, voter="bob")]).status,
            api.get(f"/api/v1/polls/{poll.pk}/results").status,
            api.get(f"/api/v1/polls/{poll.pk}/journal").status,
            api.patch(f"/api/v1/polls/{poll.pk}", {"closes_at": LATER}).status,
        ]
        for poll in (mine, other)
    }
    assert answered == {mine.pk: [202, 202, 200, 200, 200, 200], other.pk: [403] * 6}


def test_a_receipt_opens_the_results_of_its_own_poll_only(callers, make_poll):
    mine, other = (a_poll(make_poll, "open") for _ in range(2))
    Poll.objects.filter(pk__in=[mine.pk, other.pk]).update(results_visibility="after_vote")
    receipt, nobody = callers["cast"].cast(mine, "alice", prefer="wait=10").json["receipt"], callers["nobody"]

    assert_refused(nobody.get(f"/api/v1/polls/{other.pk}/results", vote_receipt=receipt), problems.RESULTS_HIDDEN)
    assert_refused(nobody.get(f"/api/v1/polls/{mine.pk}/results"), problems.RESULTS_HIDDEN)
    assert nobody.get(f"/api/v1/polls/{mine.pk}/results", vote_receipt=receipt).status == 200


def test_an_api_client_can_not_be_made_for_or_moved_to_somebody_elses_poll(callers, people, make_poll):
    theirs = a_poll(make_poll, "open")
    client, _ = make_client(people["rival"])
    wanted = {"name": "kiosk", "scopes": ["votes:cast"], "poll": str(theirs.pk)}

    assert callers["rival"].post("/api/v1/clients", wanted).status in (400, 403, 404)
    assert callers["rival"].patch(f"/api/v1/clients/{client.pk}", {"poll": str(theirs.pk)}).status in (400, 403, 404)
    client.refresh_from_db()
    assert client.poll_id is None


# --- When rights end --------------------------------------------------------------------------------------------------


@pytest.fixture
def former(callers, make_poll):
    """An owner of two polls whose rights are about to end; {"user", "polls", "apis": signed in, and by a key with all scopes}"""
    user = make_user(f"rights-{uuid4().hex}", roles.OWNER)
    polls = {kind: a_poll(make_poll, kind) for kind in ("draft", "hidden")}
    Poll.objects.filter(pk__in=[poll.pk for poll in polls.values()]).update(owner=user)
    known = [f"Bearer {accounts.sign_in(user.username, PASSWORD).access}", f"Api-Key {make_client(user, *Scope)[1]}"]
    return SimpleNamespace(user=user, polls=polls, apis=[Api(callers["nobody"].port, {"authorization": value}) for value in known])


def answers_to(former):
    """Statuses: the draft changed and read, the open poll changed, its hidden results, a new poll, how many drafts are listed."""
    draft, hidden = (f"/api/v1/polls/{former.polls[kind].pk}" for kind in ("draft", "hidden"))
    return [
        [
            api.patch(draft, {"title": "Dinner"}).status,
            api.get(draft).status,
            api.patch(hidden, {"closes_at": LATER}).status,
            api.get(f"{hidden}/results").status,
            api.post("/api/v1/polls", LUNCH).status,
            len(api.get("/api/v1/polls?status=draft").json.get("results", [])),
        ]
        for api in former.apis
    ]


def test_who_is_no_owner_any_more_changes_nothing_nor_does_a_key_of_theirs(former):
    assert answers_to(former) == [[200, 200, 200, 200, 201, 1]] * 2

    former.user.groups.clear()

    assert answers_to(former) == [[404, 404, 403, 403, 403, 0], [401] * 5 + [0]]  # the person's, the key's
    key = former.apis[1]
    wait_until(lambda: key.cast(former.polls["hidden"], "alice").status == 401, seconds=3)


def test_an_account_that_was_ended_is_nobodys_and_so_are_its_keys(former):
    former.user.is_active = False
    former.user.save()

    assert answers_to(former) == [[401] * 5 + [0]] * 2
    key = former.apis[1]
    wait_until(lambda: key.cast(former.polls["hidden"], "alice").status == 401, seconds=3)


def test_a_superuser_has_every_role(callers, make_poll):
    user = make_user(f"rights-{uuid4().hex}")
    user.is_superuser = True
    user.save()
    root = Api(callers["nobody"].port, {"authorization": f"Bearer {accounts.sign_in(user.username, PASSWORD).access}"})
    draft = f"/api/v1/polls/{a_poll(make_poll, 'draft').pk}"

    assert [root.patch(draft, {"title": "Dinner"}).status, root.get(f"{draft}/journal").status, root.get("/api/v1/queues").status] == [
        200
    ] * 3
