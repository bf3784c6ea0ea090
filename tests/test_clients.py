"""API clients: who makes and sees them, keys that are shown once, rotation that lets nobody vote twice, and revocation."""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from uuid import uuid4

import pytest
from django.conf import settings as project
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client
from django.utils.timezone import now

from polls import clients, problems, voters
from polls.models import ApiClient
from tests.conftest import Api, make_user, signed_in, tallies, wait_until
from tests.test_intake import assert_refused

CLIENTS, DESK = "/api/v1/clients", "/admin/polls/apiclient/"
KEY = r"nxs_[a-z0-9]{8}_[A-Za-z0-9]{43}"
SHOWN = {"id", "name", "owner", "scopes", "poll", "prefix", "created_at", "last_used_at", "revoked_at", "previous_until"}
A_MOMENT = timedelta(microseconds=1)
_numbers = itertools.count()


@pytest.fixture(scope="session")
def staff(pipeline):
    """{role: the running pipeline as somebody with this role, and no other, sees it}; "nobody" has none."""
    for role in ("owner", "admin", "auditor", "operator"):
        make_user(f"clients-{role}", role)
    make_user("clients-nobody")
    return {role: signed_in(pipeline, f"clients-{role}") for role in ("owner", "admin", "auditor", "operator", "nobody")}


@pytest.fixture
def made(owners_api):
    """A client as it was made, with its key."""
    answer = owners_api.post(CLIENTS, kiosk())
    assert answer.status == 201, answer.text
    return answer.json


def kiosk(**fields):
    wanted = {"name": f"Kiosk {next(_numbers)}", "scopes": ["votes:cast"], **fields}
    return {name: value for name, value in wanted.items() if value is not ...}


def row(client):
    return ApiClient.objects.get(pk=client["id"])


def is_good(api, key):
    """Whether the API knows the key. It knows a good one's account too, but does not tell it to a program."""
    answer = api.get("/api/v1/auth/me", authorization=f"Api-Key {key}")
    assert answer.status in (401, 403)
    return answer.status == 403


# --- Making, reading, changing ----------------------------------------------------------------------------------------


def test_a_client_is_made_its_key_shown_once_and_good_for_a_vote(owners_api, poll):
    at = now()
    wanted = kiosk(scopes=["results:read", "votes:cast", "votes:cast"], poll=str(poll.pk))

    answer = owners_api.post(CLIENTS, wanted)

    assert answer.status == 201, answer.text
    client = answer.json
    key = client.pop("key")
    assert set(client) == SHOWN
    assert (client["name"], client["owner"], client["scopes"], client["poll"]) == (
        wanted["name"],
        "olga",
        ["results:read", "votes:cast"],
        str(poll.pk),
    )
    assert at <= datetime.fromisoformat(client["created_at"]) <= now()
    assert (client["last_used_at"], client["revoked_at"], client["previous_until"]) == (None, None, None)
    assert re.fullmatch(KEY, key) and voters.key_prefix(key) == client["prefix"]
    assert (answer.headers["location"], answer.headers["cache-control"]) == (f"{CLIENTS}/{client['id']}", "no-store")
    assert bytes(row(client).key_hash) == voters.key_hash(key)

    assert owners_api.cast(poll, "alice", authorization=f"Api-Key {key}").status == 202
    for path in (CLIENTS, answer.headers["location"]):
        shown = owners_api.get(path).text
        assert key not in shown and voters.key_hash(key).hex() not in shown and "hash" not in shown


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"name": ...}, "/name"),
        ({"name": ""}, "/name"),
        ({"name": "x" * 101}, "/name"),
        ({"name": "a\x00b"}, "/name"),
        ({"scopes": ...}, "/scopes"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": "votes:cast"}, "/scopes"),
        ({"scopes": ["votes:*"]}, "/scopes"),
        ({"scopes": ["votes:cast"] * 4}, "/scopes"),
        ({"scopes": [{}]}, "/scopes"),
        ({"poll": "lunch"}, "/poll"),
        ({"poll": str(uuid4())}, "/poll"),
        ({"owner": "root"}, "/owner"),
        ({"key": "nxs_mine"}, "/key"),
        ({"key_hash": "00"}, "/key_hash"),
        ({"revoked_at": None}, "/revoked_at"),
        ({"prefix": "mine"}, "/prefix"),
    ],
)
def test_a_client_with_a_field_wrong_is_neither_made_nor_changed(owners_api, made, fields, pointer):
    number, before = ApiClient.objects.count(), ApiClient.objects.values().get(pk=made["id"])

    refused = owners_api.post(CLIENTS, kiosk(**fields))
    assert refused.status == 400
    assert pointer in refused.json["errors"][0]["pointer"]
    change = {name: value for name, value in fields.items() if value is not ...}
    if change:
        assert owners_api.patch(f"{CLIENTS}/{made['id']}", change).status == 400

    assert ApiClient.objects.count() == number
    assert ApiClient.objects.values().get(pk=made["id"]) == before


def test_a_client_is_for_a_poll_of_its_owner(staff, owners_api, made, poll):
    """Whoever changes it: an admin gives no poll away, and takes none."""
    assert_refused(staff["owner"].post(CLIENTS, kiosk(poll=str(poll.pk))), problems.INVALID, pointer="/poll")
    assert_refused(staff["admin"].post(CLIENTS, kiosk(poll=str(poll.pk))), problems.INVALID, pointer="/poll")
    assert staff["admin"].patch(f"{CLIENTS}/{made['id']}", {"poll": str(poll.pk)}).json["poll"] == str(poll.pk)
    assert owners_api.patch(f"{CLIENTS}/{made['id']}", {"poll": None}).json["poll"] is None


def test_name_scopes_and_poll_change_and_the_key_stays(owners_api, made, poll):
    key = made.pop("key")
    change = {"name": "Counter", "scopes": ["results:read", "polls:write"], "poll": str(poll.pk)}

    changed = owners_api.patch(f"{CLIENTS}/{made['id']}", change)

    assert (changed.status, changed.json) == (200, {**made, **change, "scopes": ["polls:write", "results:read"]})
    assert owners_api.get(f"{CLIENTS}/{made['id']}").json == changed.json
    assert owners_api.patch(f"{CLIENTS}/{made['id']}", {}).json == changed.json
    assert is_good(owners_api, key)


# --- Who may ----------------------------------------------------------------------------------------------------------


def everything(api, client_id):
    """{what is tried: the answer}"""
    one = f"{CLIENTS}/{client_id}"
    return {
        "list": api.get(CLIENTS),
        "make": api.post(CLIENTS, kiosk()),
        "read": api.get(one),
        "change": api.patch(one, {"name": "Mine"}),
        "rotate": api.post(f"{one}/rotate", {}),
        "revoke": api.send("DELETE", one),
    }


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("admin", {"list": 200, "make": 201, "read": 200, "change": 200, "rotate": 200, "revoke": 204}),
        ("auditor", {"list": 200, "make": 403, "read": 200, "change": 403, "rotate": 403, "revoke": 403}),
        ("owner", {"list": 200, "make": 201, "read": 404, "change": 404, "rotate": 404, "revoke": 404}),
        ("operator", dict.fromkeys(("list", "make", "read", "change", "rotate", "revoke"), 403)),
        ("nobody", dict.fromkeys(("list", "make", "read", "change", "rotate", "revoke"), 403)),
    ],
)
def test_what_each_role_may_do_with_anothers_client(staff, made, role, expected):
    before = ApiClient.objects.values("name", "prefix", "revoked_at").get(pk=made["id"])

    answers = everything(staff[role], made["id"])

    assert {tried: answer.status for tried, answer in answers.items()} == expected
    listed = made["id"] in [client["id"] for client in answers["list"].json.get("results", [])]
    assert listed == (role in ("admin", "auditor"))
    if role != "admin":
        assert ApiClient.objects.values("name", "prefix", "revoked_at").get(pk=made["id"]) == before
    if role == "auditor":
        assert not re.search(KEY, "".join(answer.text for answer in answers.values()))


def test_nobody_in_particular_may_nothing(pipeline, made):
    for answer in everything(Api(pipeline, {}), made["id"]).values():
        assert_refused(answer, problems.UNAUTHENTICATED)


def test_an_api_key_manages_no_clients_not_even_itself(api, made):
    """Not with every scope: a lost key must not be able to make itself others."""
    for answer in everything(api, made["id"]).values():
        assert_refused(answer, problems.FORBIDDEN)
    assert "API key" in api.get(CLIENTS).json["detail"]


@pytest.mark.parametrize("which", ["0", "999999999", "9" * 30, "x", "-1"])
def test_a_client_that_is_none(owners_api, which):
    assert_refused(owners_api.get(f"{CLIENTS}/{which}"), problems.NOT_FOUND)
    assert owners_api.post(f"{CLIENTS}/{which}/rotate", {}).status == 404


def test_one_sees_all_of_ones_clients_newest_first_in_pages(pipeline):
    name = f"clients-owner{next(_numbers)}"
    make_user(name, "owner")
    api = signed_in(pipeline, name)
    wanted = [api.post(CLIENTS, kiosk()).json["id"] for _ in range(3)]

    first = api.get(f"{CLIENTS}?page_size=2").json
    rest = api.get(first["next"].split(str(pipeline))[1]).json

    assert [client["id"] for client in first["results"] + rest["results"]] == wanted[::-1]
    assert rest["next"] is None
    assert_refused(api.get(f"{CLIENTS}?cursor=x"), problems.INVALID, pointer="/cursor")


def test_who_is_no_owner_any_more_sees_no_clients(pipeline):
    name = f"clients-former{next(_numbers)}"
    user = make_user(name, "owner")
    api = signed_in(pipeline, name)
    client = api.post(CLIENTS, kiosk()).json
    user.groups.clear()
    assert {answer.status for answer in everything(api, client["id"]).values()} == {403}


# --- Rotation ---------------------------------------------------------------------------------------------------------


def test_a_rotation_lets_nobody_vote_twice(api, owners_api, made, poll):
    first = owners_api.cast(poll, "alice", authorization=f"Api-Key {made['key']}").json
    wait_until(lambda: api.get(first["links"]["self"]).json["status"] == "counted")

    key = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {}).json["key"]

    wait_until(lambda: owners_api.cast(poll, "bob", authorization=f"Api-Key {key}").status == 202)
    again = owners_api.cast(poll, "alice", "salad", authorization=f"Api-Key {key}")
    if again.status == 202:
        wait_until(lambda: api.get(again.json["links"]["self"]).json["status"] != "pending")
        again = api.get(again.json["links"]["self"])
        assert (again.json["status"], again.json["reason"]) == ("rejected", "duplicate")
    else:
        assert_refused(again, problems.DUPLICATE)
    assert tallies(poll) == {"soup": 2}


def test_the_new_key_works_at_once_and_the_old_one_a_day_longer(owners_api, made):
    at = now()

    rotated = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {})

    assert rotated.status == 200, rotated.text
    assert (set(rotated.json), rotated.json["id"]) == (SHOWN | {"key"}, made["id"])
    assert rotated.headers["cache-control"] == "no-store"
    assert rotated.json["prefix"] == voters.key_prefix(rotated.json["key"]) != made["prefix"]
    until = datetime.fromisoformat(rotated.json["previous_until"])
    assert at <= until - timedelta(hours=project.KEY_ROTATION_HOURS) <= now()
    assert is_good(owners_api, rotated.json["key"]) and is_good(owners_api, made["key"])
    assert clients.find(made["key"], until - A_MOMENT) == row(made)
    assert clients.find(made["key"], until) is None
    assert clients.find(rotated.json["key"], until) == row(made)


def test_how_long_the_old_key_works_can_be_said(owners_api, made):
    at = now()
    until = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {"overlap_hours": 720}).json["previous_until"]
    assert at <= datetime.fromisoformat(until) - timedelta(hours=720) <= now()

    last = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {"overlap_hours": 0}).json

    assert last["previous_until"] is None
    assert is_good(owners_api, last["key"]) and not is_good(owners_api, made["key"])


def test_a_rotation_without_a_body_is_one(owners_api, made):
    rotated = owners_api.send("POST", f"{CLIENTS}/{made['id']}/rotate")
    assert rotated.status == 200, rotated.text


@pytest.mark.parametrize("hours", [-1, 721, "many", 1.5, None, [1]])
def test_an_overlap_that_is_none_rotates_nothing(owners_api, made, hours):
    answer = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {"overlap_hours": hours})
    assert_refused(answer, problems.INVALID, pointer="/overlap_hours")
    assert_refused(owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {"hours": 1}), problems.INVALID, pointer="/hours")
    assert row(made).prefix == made["prefix"]


def test_a_second_rotation_ends_the_first_key(owners_api, made):
    second = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {}).json["key"]
    third = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {}).json["key"]
    assert [is_good(owners_api, key) for key in (made["key"], second, third)] == [False, True, True]


def test_a_wrong_secret_behind_a_right_prefix_is_no_key(owners_api, made):
    rotated = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {}).json
    for prefix in (made["prefix"], rotated["prefix"]):
        assert not is_good(owners_api, f"nxs_{prefix}_{'x' * 43}")
    # Each prefix goes with its own secret.
    assert not is_good(owners_api, f"nxs_{made['prefix']}_{rotated['key'].split('_')[2]}")


def test_of_two_rotations_at_once_the_later_keeps_the_earliers_key(owners_api, made):
    client, ready = row(made), Barrier(2)

    def rotate(_):
        try:
            ready.wait(10)
            return clients.rotate(client, at=now())[1]
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        keys = list(pool.map(rotate, range(2)))

    stored = row(made)
    assert {stored.prefix, stored.previous_prefix} == {voters.key_prefix(key) for key in keys}
    assert all(is_good(owners_api, key) for key in keys)


# --- Revocation and use -----------------------------------------------------------------------------------------------


def test_a_revoked_client_has_no_key_and_never_gets_one(owners_api, made):
    path = f"{CLIENTS}/{made['id']}"
    key = owners_api.post(f"{path}/rotate", {}).json["key"]

    assert (owners_api.send("DELETE", path).status, owners_api.send("DELETE", path).text) == (204, "")

    revoked_at = row(made).revoked_at
    assert not is_good(owners_api, key) and not is_good(owners_api, made["key"])
    assert_refused(owners_api.post(f"{path}/rotate", {}), problems.CLIENT_REVOKED)
    assert_refused(owners_api.patch(path, {"name": "Back"}), problems.CLIENT_REVOKED)
    assert owners_api.send("DELETE", path).status == 204
    assert row(made).revoked_at == revoked_at
    assert datetime.fromisoformat(owners_api.get(path).json["revoked_at"]) == revoked_at


def test_the_key_of_an_owner_whose_account_is_closed_is_none(pipeline, anonymous_api):
    name = f"clients-closed{next(_numbers)}"
    make_user(name, "owner")
    key = signed_in(pipeline, name).post(CLIENTS, kiosk()).json["key"]
    assert is_good(anonymous_api, key)

    get_user_model().objects.filter(username=name).update(is_active=False)

    assert not is_good(anonymous_api, key)


@pytest.fixture
def anonymous_api(pipeline):
    return Api(pipeline, {})


def test_when_a_client_was_used_is_noted_about_once_a_minute(made):
    at = now()

    def noted(moment):
        clients.note_use(int(made["id"]), moment)
        return row(made).last_used_at

    assert row(made).last_used_at is None
    assert noted(at) == at
    assert noted(at + timedelta(minutes=1)) == at
    assert noted(at + timedelta(minutes=1) + A_MOMENT) == at + timedelta(minutes=1) + A_MOMENT
    assert noted(at) == at + timedelta(minutes=1) + A_MOMENT  # a slower clock takes nothing back


def test_a_request_with_its_key_is_a_use_and_one_with_a_wrong_key_is_none(owners_api, made):
    at = now()
    is_good(owners_api, f"nxs_{made['prefix']}_{'x' * 43}")
    assert row(made).last_used_at is None

    is_good(owners_api, made["key"])

    assert at <= row(made).last_used_at <= now()
    assert datetime.fromisoformat(owners_api.get(f"{CLIENTS}/{made['id']}").json["last_used_at"]) == row(made).last_used_at


# --- In the admin -----------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(_database):
    """A browser in which a superuser is signed in."""
    browser = Client(raise_request_exception=False)
    browser.force_login(get_user_model().objects.create_superuser(f"root{next(_numbers)}"))
    return browser


def keys_in(page):
    assert page.status_code == 200
    return re.findall(KEY, page.content.decode())


def test_the_desk_gives_selected_clients_other_keys_and_shows_each_once(desk, owners_api, made):
    revoked = owners_api.post(CLIENTS, kiosk()).json
    owners_api.send("DELETE", f"{CLIENTS}/{revoked['id']}")

    page = desk.post(DESK, {"action": "rotate", "_selected_action": [made["id"], revoked["id"]]}, follow=True)

    [key] = keys_in(page)
    assert is_good(owners_api, key) and is_good(owners_api, made["key"])
    assert f"{revoked['name']}: The client is revoked" in page.content.decode()
    assert row(revoked).prefix == revoked["prefix"]
    assert keys_in(desk.get(DESK)) == []


def test_the_desk_shows_what_a_client_may_and_a_revoked_one_is_only_looked_at(desk, owners_api, made):
    assert re.search(r'field-may">votes:cast<', desk.get(DESK).content.decode())
    assert "_save" in desk.get(f"{DESK}{made['id']}/change/").content.decode()

    owners_api.send("DELETE", f"{CLIENTS}/{made['id']}")

    assert "_save" not in desk.get(f"{DESK}{made['id']}/change/").content.decode()
    assert desk.post(f"{DESK}{made['id']}/change/", {"name": "Back"}).status_code == 403


def test_the_desk_makes_no_client_without_scopes_or_for_anothers_poll(desk, made, poll):
    stranger = make_user(f"stranger{next(_numbers)}")
    number = ApiClient.objects.count()
    wanted = {"name": "kiosk", "owner": stranger.pk, "scopes": ["votes:cast"], "poll": poll.pk}

    for fields, field in [({}, "poll"), ({"scopes": []}, "scopes"), ({"scopes": ["all"]}, "scopes"), ({"poll": uuid4()}, "poll")]:
        page = desk.post(f"{DESK}add/", {**wanted, **fields})
        assert field in page.context["adminform"].form.errors
        assert keys_in(page) == []
    assert ApiClient.objects.count() == number


def test_saving_at_the_desk_takes_no_rotation_back(desk, owners_api, made):
    """The form was opened before it."""
    key = owners_api.post(f"{CLIENTS}/{made['id']}/rotate", {}).json["key"]

    saved = desk.post(
        f"{DESK}{made['id']}/change/", {"name": "Counter", "owner": row(made).owner_id, "scopes": ["polls:write"], "poll": ""}
    )

    assert saved.status_code == 302
    assert (row(made).name, row(made).scopes, row(made).prefix) == ("Counter", ["polls:write"], voters.key_prefix(key))


def test_staff_who_may_look_at_clients_neither_rotate_nor_revoke_them(made):
    watcher = make_user(f"watcher{next(_numbers)}", "auditor")
    get_user_model().objects.filter(pk=watcher.pk).update(is_staff=True)
    browser = Client(raise_request_exception=False)
    browser.force_login(watcher)
    assert made["prefix"] in browser.get(DESK).content.decode()

    for action in ("rotate", "revoke"):
        browser.post(DESK, {"action": action, "_selected_action": [made["id"]]})

    assert (row(made).prefix, row(made).revoked_at) == (made["prefix"], None)


def test_operators_see_clients_neither_in_the_api_nor_in_the_admin(staff, made):
    assert_refused(staff["operator"].get(CLIENTS), problems.FORBIDDEN)
    user = get_user_model().objects.get(username="clients-operator")
    user.is_staff = True
    user.save()
    browser = Client(raise_request_exception=False)
    browser.force_login(user)

    assert [browser.get(page).status_code for page in (DESK, f"{DESK}{made['id']}/change/")] == [403, 403]
