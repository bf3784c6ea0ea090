"""Polls through the API: making, reading, changing, deleting, and who may."""

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now

from polls import clients, problems, roles, voters
from polls.models import ApiClient, JournalEntry, Poll
from tests.conftest import PASSWORD, Api, make_user, signed_in
from tests.test_intake import assert_refused


def lunch(**fields):
    wanted = {
        "title": "Lunch",
        "options": [{"text": "soup"}, {"text": "salad"}],
        "voter_policy": "ip",
        "closes_at": (now() + timedelta(days=1)).isoformat(),
        **fields,
    }
    return {name: value for name, value in wanted.items() if value is not ...}


def in_(**delta):
    return (now() + timedelta(**delta)).isoformat()


@pytest.fixture(scope="session")
def strangers_api(pipeline, owner):
    make_user("mallory")
    return signed_in(pipeline, "mallory")


@pytest.fixture(scope="session")
def auditors_api(pipeline):
    make_user("arthur", roles.AUDITOR)
    return signed_in(pipeline, "arthur")


def test_a_poll_is_created_read_and_listed(owners_api):
    created = owners_api.post("/api/v1/polls", lunch(description="Wednesday"))

    assert created.status == 201, created.text
    poll = created.json
    assert created.headers["location"] == f"/api/v1/polls/{poll['id']}"
    assert (poll["title"], poll["description"], poll["status"], poll["voter_policy"], poll["allow_change"]) == (
        "Lunch",
        "Wednesday",
        "open",
        "ip",
        False,
    )
    assert [(option["text"], option["position"]) for option in poll["options"]] == [("soup", 1), ("salad", 2)]
    assert all(isinstance(option["id"], str) for option in poll["options"])
    assert owners_api.get(f"/api/v1/polls/{poll['id']}").json == poll
    assert poll in owners_api.get("/api/v1/polls").json["results"]


def test_pages_follow_each_other_without_gaps(owners_api):
    wanted = [owners_api.post("/api/v1/polls", lunch(title=f"page {n}")).json["id"] for n in range(6)]

    first = owners_api.get("/api/v1/polls?page_size=2").json
    second = follow(owners_api, first["next"])
    third = follow(owners_api, second["next"])

    seen = [poll["id"] for page in (first, second, third) for poll in page["results"]]
    assert seen == wanted[::-1]


def follow(api, address):
    return api.get(address.split(str(api.port))[1]).json


def pages(api, query):
    """The ids in a list, page by page to its end, and back again to its beginning."""
    page = api.get(f"/api/v1/polls?{query}").json
    there, back = [[poll["id"] for poll in page["results"]]], []
    while page["next"]:
        page = follow(api, page["next"])
        there.append([poll["id"] for poll in page["results"]])
    while page["previous"]:
        page = follow(api, page["previous"])
        back.append([poll["id"] for poll in page["results"]])
    return there, back


@pytest.mark.parametrize("name", ["created_at", "opens_at", "closes_at", "title"])
@pytest.mark.parametrize("sign", ["", "-"])
def test_every_order_has_each_poll_on_one_page_forth_and_back(owners_api, make_poll, name, sign):
    word = uuid4().hex
    made = Poll.objects.filter(pk__in=[make_poll(title=f"{word} {'same' if n < 5 else n}", opens_in=600).pk for n in range(7)])
    same_time = now() + timedelta(days=2)
    Poll.objects.filter(title=f"{word} same").update(
        opens_at=same_time, closes_at=same_time + timedelta(days=1), created_at=same_time - timedelta(days=9)
    )
    expected = [str(id) for id in made.order_by(f"{sign}{name}", f"{sign}id").values_list("id", flat=True)]

    there, back = pages(owners_api, f"search={word}&ordering={sign}{name}&page_size=2")

    assert [id for page in there for id in page] == expected
    assert [len(page) for page in there] == [2, 2, 2, 1]
    assert back == there[-2::-1]


def test_a_poll_that_comes_or_goes_between_two_pages_moves_no_other(owners_api, make_poll):
    word = uuid4().hex
    made = [make_poll(title=word, draft=True) for _ in range(6)]
    order = [str(id) for id in Poll.objects.filter(title=word).order_by("id").values_list("id", flat=True)]
    first = owners_api.get(f"/api/v1/polls?search={word}&ordering=title&page_size=3").json
    assert [poll["id"] for poll in first["results"]] == order[:3]

    assert owners_api.send("DELETE", f"/api/v1/polls/{order[0]}").status == 204
    make_poll(title=f"a {word}")

    assert [poll["id"] for poll in follow(owners_api, first["next"])["results"]] == order[3:]
    assert len(made) == 6


def cursor_of(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


NEWEST = ["-created_at", "-id"]


@pytest.mark.parametrize(
    "query",
    [
        "cursor=nonsense",
        "cursor=%FF",
        "cursor=",
        f"cursor={cursor_of(7)}",
        f"cursor={cursor_of([NEWEST, 0, ['2026-01-01T00:00:00+00:00', str(uuid4())]])}",
        f"cursor={cursor_of([NEWEST, False, ['2026-01-01T00:00:00', str(uuid4())]])}",
        f"cursor={cursor_of([NEWEST, False, ['Lunch', str(uuid4())]])}",
        f"cursor={cursor_of([NEWEST, False, ['2026-01-01T00:00:00+00:00']])}",
        f"cursor={cursor_of([NEWEST, False, ['2026-01-01T00:00:00+00:00', 7]])}",
        f"cursor={cursor_of([NEWEST, False, {}])}",
        f"ordering=title&cursor={cursor_of([NEWEST, False, ['2026-01-01T00:00:00+00:00', str(uuid4())]])}",
        "ordering=title&cursor=" + cursor_of([["title", "id"], False, ["a" + chr(0), str(uuid4())]]),
        "page_size=x",
        "page_size=0",
        "page_size=-1",
        "page_size=201",
        "page_size=99999999999999999999",
        "page_size=",
        "status=closed",
        "status=open,closed",
        "status=open&status=final",
        "voter_policy=everybody",
        "method=ranked",
        "mine=perhaps",
        "mine=1",
        "opens_after=soon",
        "closes_before=2026-13-01T00:00:00Z",
        "search=%00",
        "search=" + "x" * 201,
        "ordering=owner",
        "ordering=title,created_at",
        "ordering=-id",
        "titel=Lunch",
        "Status=open",
    ],
)
def test_a_list_that_is_asked_for_nonsense_says_so(owners_api, query):
    name = query.split("&")[-1].split("=")[0]
    assert_refused(owners_api.get(f"/api/v1/polls?{query}"), problems.INVALID, pointer=f"/{name}")


@pytest.mark.parametrize("extreme", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01", "2026-01-01T00:00:00"])
def test_a_list_takes_every_moment(owners_api, extreme):
    text = extreme.replace("+", "%2B")
    for query in (f"opens_after={text}", f"closes_before={text}", f"cursor={cursor_of([NEWEST, False, [extreme, str(uuid4())]])}"):
        assert owners_api.get(f"/api/v1/polls?{query}").status in (200, 400), query


def listed(api, query):
    answer = api.get(f"/api/v1/polls?{query}")
    assert answer.status == 200, answer.text
    return {poll["title"].split()[-1] for poll in answer.json["results"]}


def test_the_list_is_filtered_by_all_that_is_said(owners_api, make_poll):
    word = uuid4().hex
    make_poll(title=f"{word} later", opens_in=7200, closes_in=9000)
    make_poll(title=f"{word} now", voter_policy="session")
    make_poll(title=f"{word} over", closes_in=-60)
    make_poll(title=f"{word} several", method="approval", description="Tomatoes")
    final = make_poll(title=f"{word} done", closes_in=-600)
    gone = make_poll(title=f"{word} gone", closes_in=-600)
    make_poll(title=f"{word} draft", draft=True)
    Poll.objects.filter(pk__in=[final.pk, gone.pk]).update(finalised_at=now())
    Poll.objects.filter(pk=gone.pk).update(archived_at=now())
    every = {"later", "now", "over", "several", "done", "gone", "draft"}

    def found(query):
        return listed(owners_api, f"search={word}&{query}")

    assert found("page_size=50") == every
    for status, names in {
        "draft": {"draft"},
        "scheduled": {"later"},
        "open": {"now", "several"},
        "closing": {"over"},
        "final": {"done"},
        "archived": {"gone"},
        "scheduled,closing,archived": {"later", "over", "gone"},
        "draft,scheduled,open,closing,final,archived": every,
    }.items():
        assert found(f"status={status}") == names, status
    assert found("voter_policy=session") == {"now"}
    assert found("method=approval") == {"several"}
    assert found("method=approval&status=draft") == set()
    assert found(f"opens_after={moment(hours=1)}") == {"later"}
    assert found(f"closes_before={moment(seconds=-120)}") == {"done", "gone"}
    assert found(f"opens_before={moment(hours=1)}&closes_after={moment()}") == {"now", "several", "draft"}
    assert listed(owners_api, "search=TOMATOES") == {"several"}
    assert listed(owners_api, "search=100%25") == set()  # no pattern, text


def moment(**delta):
    return in_(**delta).replace("+", "%2B")


def test_a_list_shows_drafts_and_archived_polls_to_their_owner_only(owners_api, strangers_api, make_poll):
    word = uuid4().hex
    make_poll(title=f"{word} draft", draft=True)
    gone = make_poll(title=f"{word} gone")
    Poll.objects.filter(pk=gone.pk).update(archived_at=now())
    make_poll(title=f"{word} public")

    assert listed(owners_api, f"search={word}") == {"draft", "gone", "public"}
    for caller in (strangers_api, Api(owners_api.port, {})):
        assert listed(caller, f"search={word}") == {"public"}
        assert listed(caller, f"search={word}&status=draft,archived") == set()
        assert listed(caller, f"search={word}&mine=true") == set()
        assert listed(caller, f"search={word}&mine=false") == {"public"}
    assert listed(owners_api, f"search={word}&mine=true") == {"draft", "gone", "public"}


def test_a_longer_list_takes_no_more_queries(make_poll, owner):
    word, browser = uuid4().hex, Client()
    token = browser.post("/api/v1/auth/token", {"username": owner.username, "password": PASSWORD}, "application/json").json()["access"]

    def queries():
        with CaptureQueriesContext(connection) as captured:
            page = browser.get(f"/api/v1/polls?search={word}", headers={"authorization": f"Bearer {token}"}).json()
        return len(page["results"]), len(captured)

    make_poll(title=word)
    one = queries()
    for _ in range(9):
        make_poll(title=word)
    ten = queries()

    assert (one[0], ten[0]) == (1, 10)
    assert one[1] == ten[1] <= 5


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"title": ...}, "/title"),
        ({"title": ""}, "/title"),
        ({"title": "x" * 201}, "/title"),
        ({"title": "a\x00b"}, "/title"),
        ({"title": {"a": 1}}, "/title"),
        ({"options": ...}, "/options"),
        ({"options": []}, "/options"),
        ({"options": [{"text": "only"}]}, "/options"),
        ({"options": [{"text": str(n)} for n in range(101)]}, "/options"),
        ({"options": "soup"}, "/options"),
        ({"options": [{"text": "soup"}, {"text": ""}]}, "/options/1/text"),
        ({"options": [{"text": "soup"}, {}]}, "/options/1/text"),
        ({"options": [{"text": "soup"}, {"text": "soup"}]}, "/options"),
        ({"options": [{"text": "soup"}, {"text": " soup "}]}, "/options"),
        ({"options": [{"text": "soup"}, {"text": "salad", "votes": 5}]}, "/options/1/votes"),
        ({"closes_at": ...}, "/closes_at"),
        ({"closes_at": "tomorrow"}, "/closes_at"),
        ({"closes_at": "2020-01-01T00:00:00Z"}, "/closes_at"),
        ({"opens_at": "2020-01-01T00:00:00Z"}, "/opens_at"),
        ({"opens_at": "2090-01-02T00:00:00Z", "closes_at": "2090-01-01T00:00:00Z"}, "/closes_at"),
        ({"opens_at": "2090-01-01T00:00:00Z", "closes_at": "2090-01-01T00:00:00Z"}, "/closes_at"),
        ({"voter_policy": ...}, "/voter_policy"),
        ({"voter_policy": "everybody"}, "/voter_policy"),
        ({"allow_change": "perhaps"}, "/allow_change"),
        ({"id": str(uuid4())}, "/id"),
        ({"version": 7}, "/version"),
        ({"published_at": "2026-01-01T00:00:00Z"}, "/published_at"),
        ({"status": "final"}, "/status"),
        ({"draft": "perhaps"}, "/draft"),
        ({"reason": "so"}, "/reason"),
        ({"method": "ranked"}, "/method"),
        ({"max_choices": 2}, "/max_choices"),
        ({"method": "single", "min_choices": 2, "max_choices": 2}, "/min_choices"),
        ({"method": "approval", "max_choices": 3}, "/max_choices"),
        ({"method": "approval", "min_choices": 0}, "/min_choices"),
        ({"method": "approval", "min_choices": 2, "max_choices": 1}, "/min_choices"),
        ({"method": "approval", "max_choices": 101}, "/max_choices"),
        ({"method": "approval", "max_choices": "many"}, "/max_choices"),
        ({"address_limit": 0}, "/address_limit"),
        ({"address_limit": -1}, "/address_limit"),
        ({"address_limit": 10**12}, "/address_limit"),
        ({"subnet_limit": 0}, "/subnet_limit"),
        ({"subnet_limit": 1.5}, "/subnet_limit"),
        ({"voter_policy": "client", "address_limit": 3}, "/address_limit"),
        ({"voter_policy": "client", "subnet_limit": 3}, "/subnet_limit"),
        ({"limit_mode": "strict"}, "/limit_mode"),
        ({"results_visibility": "nobody"}, "/results_visibility"),
        ({"allowed_networks": "192.0.2.0/24"}, "/allowed_networks"),
        ({"allowed_networks": ["192.0.2.0/33"]}, "/allowed_networks/0"),
        ({"allowed_networks": ["192.0.2.0/24", "fe80::1%eth0/64"]}, "/allowed_networks/1"),
        ({"allowed_networks": ["example.org"]}, "/allowed_networks/0"),
        ({"allowed_networks": [7]}, "/allowed_networks/0"),
        ({"allowed_networks": ["192.0.2\x00.0/24"]}, "/allowed_networks/0"),
        ({"allowed_networks": [f"10.0.{n}.0/24" for n in range(101)]}, "/allowed_networks"),
        ({"options": [{"text": "soup", "description": "x" * 2001}, {"text": "salad"}]}, "/options/0/description"),
        ({"draft": True, "closes_at": "2020-01-01T00:00:00Z"}, "/closes_at"),
        ({"owner": 1}, "/owner"),
        ({"titel": "Lunch"}, "/titel"),
    ],
)
def test_a_poll_with_a_field_wrong(owners_api, fields, pointer):
    assert_refused(owners_api.post("/api/v1/polls", lunch(**fields)), problems.INVALID, pointer=pointer)


@pytest.mark.parametrize(
    ("body", "problem"), [(b"{", problems.MALFORMED), (b"\xff", problems.MALFORMED), (b"[]", problems.INVALID), (b"7", problems.INVALID)]
)
def test_a_body_that_is_no_poll(owners_api, body, problem):
    assert_refused(owners_api.post("/api/v1/polls", body), problem)


def test_a_body_that_does_not_say_it_is_json(owners_api):
    assert_refused(owners_api.send("POST", "/api/v1/polls", b"a=b", content_type="application/x-www-form-urlencoded"), problems.NOT_JSON)


def test_creating_needs_a_signed_in_user(owners_api):
    anonymous = Api(owners_api.port, {})
    assert_refused(anonymous.post("/api/v1/polls", lunch()), problems.UNAUTHENTICATED)
    refused = anonymous.post("/api/v1/polls", lunch(), authorization="Bearer nonsense")
    assert_refused(refused, problems.UNAUTHENTICATED)
    assert refused.headers["www-authenticate"].startswith("Bearer")


def test_a_wrong_password_gets_no_token(owners_api):
    assert_refused(Api(owners_api.port, {}).post("/api/v1/auth/token", {"username": "olga", "password": "guess"}), problems.UNAUTHENTICATED)
    assert_refused(Api(owners_api.port, {}).post("/api/v1/auth/token", {"username": "olga"}), problems.INVALID, pointer="/password")


def test_a_refresh_token_gives_an_access_token_and_is_none_itself(owners_api):
    anonymous = Api(owners_api.port, {})
    tokens = anonymous.post("/api/v1/auth/token", {"username": "olga", "password": PASSWORD}).json
    access = anonymous.post("/api/v1/auth/token/refresh", {"refresh": tokens["refresh"]}).json["access"]

    assert anonymous.post("/api/v1/polls", lunch(), authorization=f"Bearer {access}").status == 201
    assert anonymous.post("/api/v1/polls", lunch(), authorization=f"Bearer {tokens['refresh']}").status == 401


def test_only_the_owner_changes_or_deletes_a_poll(owners_api, strangers_api, make_poll):
    path = f"/api/v1/polls/{make_poll(opens_in=600).pk}"

    for caller, problem in [(strangers_api, problems.FORBIDDEN), (Api(owners_api.port, {}), problems.UNAUTHENTICATED)]:
        assert_refused(caller.patch(path, {"title": "Mine"}), problem)
        assert_refused(caller.send("DELETE", path), problem)
    assert owners_api.patch(path, {"title": "Still mine"}).json["title"] == "Still mine"
    assert Poll.objects.get(pk=path.rpartition("/")[2]).title == "Still mine"


def test_a_superuser_may_change_any_poll(owners_api, make_poll):
    get_user_model().objects.create_superuser("root", password=PASSWORD)
    tokens = Api(owners_api.port, {}).post("/api/v1/auth/token", {"username": "root", "password": PASSWORD}).json

    path = f"/api/v1/polls/{make_poll(opens_in=600).pk}"
    answer = owners_api.patch(path, {"title": "Mended"}, authorization=f"Bearer {tokens['access']}")

    assert (answer.status, answer.json["title"]) == (200, "Mended")


def test_before_it_opens_everything_can_change(owners_api, make_poll):
    poll = make_poll(opens_in=600)
    soup = str(poll.options.get(text="soup").pk)
    changes = {
        "title": "Dinner",
        "voter_policy": "ip",
        "allow_change": True,
        "opens_at": in_(days=2),
        "closes_at": in_(days=3),
        "options": [{"text": "noodles"}, {"id": soup, "text": "hot soup"}],
    }

    changed = owners_api.patch(f"/api/v1/polls/{poll.pk}", changes)

    assert changed.status == 200, changed.text
    assert {name: changed.json[name] for name in ("title", "voter_policy", "allow_change", "status")} == {
        "title": "Dinner",
        "voter_policy": "ip",
        "allow_change": True,
        "status": "scheduled",
    }
    assert [(o["text"], o["position"]) for o in changed.json["options"]] == [("noodles", 1), ("hot soup", 2)]
    assert changed.json["options"][1]["id"] == soup


@pytest.mark.parametrize("change", [{"voter_policy": "ip"}, {"allow_change": True}, {"opens_at": "2090-01-01T00:00:00Z"}])
def test_once_it_is_open_nothing_changes_that_says_what_a_vote_means(owners_api, make_poll, change):
    assert_refused(owners_api.patch(f"/api/v1/polls/{make_poll().pk}", change), problems.POLL_IN_USE, pointer=f"/{next(iter(change))}")


def test_saying_what_is_so_already_is_no_change(owners_api, make_poll):
    poll = make_poll()
    path = f"/api/v1/polls/{poll.pk}"
    now_so = owners_api.get(path).json

    same = owners_api.patch(path, {name: now_so[name] for name in ("title", "voter_policy", "allow_change", "opens_at", "closes_at")})

    assert (same.status, same.json) == (200, now_so)


def test_an_option_of_another_poll_can_not_be_taken_over(owners_api, make_poll):
    poll, other = make_poll(opens_in=600), make_poll(opens_in=600)
    theirs = str(other.options.first().pk)
    answer = owners_api.patch(f"/api/v1/polls/{poll.pk}", {"options": [{"id": theirs, "text": "a"}, {"text": "b"}]})
    assert_refused(answer, problems.UNKNOWN_OPTION, pointer="/options/0/id")
    assert other.options.first().text == "soup"


def test_a_poll_closes_later_or_earlier_but_never_in_the_past(owners_api, make_poll):
    poll = make_poll()
    path = f"/api/v1/polls/{poll.pk}"

    assert owners_api.patch(path, {"closes_at": in_(days=9)}).status == 200
    assert owners_api.patch(path, {"closes_at": in_(seconds=10)}).status == 200
    assert_refused(owners_api.patch(path, {"closes_at": in_(seconds=1)}), problems.INVALID, pointer="/closes_at")  # a 202 may be under way
    assert_refused(owners_api.patch(path, {"closes_at": in_(days=-1)}), problems.INVALID, pointer="/closes_at")


def test_a_closed_poll_stays_closed(owners_api, make_poll):
    path = f"/api/v1/polls/{make_poll(closes_in=-5).pk}"

    assert_refused(owners_api.patch(path, {"closes_at": in_(days=1)}), problems.POLL_IN_USE, pointer="/closes_at")
    assert_refused(owners_api.patch(path, {"title": "Lunch (over)"}), problems.POLL_IN_USE, pointer="/title")


def test_only_a_draft_can_be_deleted(owners_api, poll, make_poll):
    for kept in (poll, make_poll(opens_in=600), make_poll(closes_in=-60)):
        assert_refused(owners_api.send("DELETE", f"/api/v1/polls/{kept.pk}"), problems.POLL_IN_USE)
        assert Poll.objects.filter(pk=kept.pk).exists()

    draft = f"/api/v1/polls/{make_poll(draft=True).pk}"
    assert owners_api.send("DELETE", draft).status == 204
    assert_refused(owners_api.get(draft), problems.UNKNOWN_POLL)


# --- Drafts, and what only the people behind a poll see ---------------------------------------------------------------


def test_every_setting_can_be_made_and_is_read_as_it_is_stored(owners_api):
    settings = {
        "description": "Wednesday",
        "method": "approval",
        "min_choices": 1,
        "max_choices": 2,
        "voter_policy": "session",
        "allow_change": True,
        "allow_withdrawal": True,
        "address_limit": 3,
        "subnet_limit": 30,
        "limit_mode": "soft",
        "results_visibility": "after_close",
    }
    options = [{"text": "soup", "description": "Leek"}, {"text": "salad"}, {"text": "noodles", "description": ""}]
    networks = ["198.51.100.7/24", "2001:DB8::1/48", "192.0.2.1", "::ffff:198.51.100.0/120"]

    poll = owners_api.post("/api/v1/polls", lunch(**settings, options=options, allowed_networks=networks)).json

    assert {name: poll[name] for name in settings} == settings
    assert poll["allowed_networks"] == ["192.0.2.1/32", "198.51.100.0/24", "2001:db8::/48"]
    assert [(o["text"], o["description"]) for o in poll["options"]] == [("soup", "Leek"), ("salad", ""), ("noodles", "")]
    assert owners_api.get(poll["links"]["self"]).json == poll


def test_an_approval_ballot_may_hold_all_options_if_nobody_says_else(owners_api):
    poll = owners_api.post("/api/v1/polls", lunch(method="approval", draft=True)).json
    assert (poll["min_choices"], poll["max_choices"]) == (1, 2)
    path = poll["links"]["self"]

    more = owners_api.patch(path, {"options": [{"text": text} for text in "abcde"]}).json
    assert more["max_choices"] == 5
    assert_refused(owners_api.patch(path, {"max_choices": 6}), problems.INVALID, pointer="/max_choices")
    assert owners_api.patch(path, {"min_choices": 2, "max_choices": 3}).json["max_choices"] == 3
    assert_refused(owners_api.patch(path, {"options": [{"text": "a"}, {"text": "b"}]}), problems.INVALID, pointer="/max_choices")
    single = owners_api.patch(path, {"method": "single"}).json
    assert (single["method"], single["min_choices"], single["max_choices"]) == ("single", 1, 1)
    again = owners_api.patch(path, {"method": "approval"}).json
    assert (again["min_choices"], again["max_choices"]) == (1, 5)


def test_a_draft_is_there_for_its_owner_and_for_nobody_else(owners_api, strangers_api):
    draft = owners_api.post("/api/v1/polls", lunch(draft=True)).json
    path = draft["links"]["self"]
    assert draft["status"] == "draft"
    assert owners_api.get(path).json == draft

    for caller in (strangers_api, Api(owners_api.port, {})):
        hidden, unknown = caller.get(path), caller.get(f"/api/v1/polls/{uuid4()}")
        assert_refused(hidden, problems.UNKNOWN_POLL)
        assert hidden.text == unknown.text
    for move in ("publish", "duplicate"):
        assert_refused(strangers_api.post(f"{path}/{move}", {}), problems.UNKNOWN_POLL)
    assert_refused(strangers_api.patch(path, {"title": "Mine"}), problems.UNKNOWN_POLL)
    assert_refused(strangers_api.get(f"{path}/journal"), problems.UNKNOWN_POLL)


def test_limits_and_version_are_shown_to_the_people_behind_a_poll_only(owners_api, strangers_api, api, auditors_api, make_poll):
    path = f"/api/v1/polls/{make_poll(voter_policy='session', address_limit=3, allowed_networks=['192.0.2.0/24']).pk}"
    inside = {"address_limit", "subnet_limit", "limit_mode", "allowed_networks", "version"}

    for caller in (owners_api, api, auditors_api):
        assert caller.get(path).json.keys() >= inside
    for caller in (strangers_api, Api(owners_api.port, {})):
        assert not caller.get(path).json.keys() & inside
        assert not any(poll.keys() & inside for poll in caller.get("/api/v1/polls").json["results"])
        assert caller.get(path).headers["vary"].lower().count("authorization") == 1


def test_making_polls_takes_the_role_of_an_owner(strangers_api, auditors_api):
    for caller in (strangers_api, auditors_api):
        assert_refused(caller.post("/api/v1/polls", lunch()), problems.FORBIDDEN)


def test_an_api_client_makes_and_changes_polls_with_the_scope_for_it_only(api, owner):
    poll = api.post("/api/v1/polls", lunch(opens_at=in_(hours=1))).json
    assert api.patch(poll["links"]["self"], {"title": "Dinner"}).json["title"] == "Dinner"
    assert Poll.objects.get(pk=poll["id"]).owner == owner
    actors = [entry["actor"] for entry in api.get(f"{poll['links']['self']}/journal").json["results"]]
    assert len(actors) == 2 and all(actor.startswith("kiosk (") for actor in actors)

    key = voters.new_client_key()
    hashed = {"prefix": voters.key_prefix(key), "key_hash": voters.key_hash(key)}
    ApiClient.objects.create(owner=owner, name="urn", scopes=["votes:cast", "results:read"], **hashed)
    urn = Api(api.port, {"authorization": f"Api-Key {key}"})
    assert_refused(urn.post("/api/v1/polls", lunch()), problems.FORBIDDEN)
    assert_refused(urn.patch(poll["links"]["self"], {"title": "Mine"}), problems.FORBIDDEN)
    assert_refused(urn.post(f"{poll['links']['self']}/open", {}), problems.FORBIDDEN)


# --- Changing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"method": "approval"},
        {"min_choices": 1, "max_choices": 2},
        {"voter_policy": "account"},
        {"allow_change": True},
        {"allow_withdrawal": True},
        {"limit_mode": "soft"},
        {"opens_at": "2090-01-01T00:00:00Z"},
        {"address_limit": 2},
        {"subnet_limit": 9},
        {"allowed_networks": []},
        {"allowed_networks": ["192.0.2.0/25"]},
        {"title": "Dinner"},
        {"description": "At eight."},
        {"options": [{"text": "soup"}, {"text": "noodles"}]},
        {"results_visibility": "after_close"},
        {"auto_quarantine": True},
        {"rule_parameters": {"one_sided": {"votes": 10}}},
    ],
)
@pytest.mark.parametrize("opens_in", [0, 2])
def test_an_open_poll_and_one_that_is_about_to_open_keep_what_a_vote_means_and_whom_they_let_in(owners_api, make_poll, change, opens_in):
    poll = make_poll(opens_in=opens_in, voter_policy="session", address_limit=3, subnet_limit=None, allowed_networks=["192.0.2.0/24"])
    before = Poll.objects.values().get(pk=poll.pk)

    refused = owners_api.patch(f"/api/v1/polls/{poll.pk}", {"closes_at": in_(days=9), **change})

    assert refused.status == 409, refused.text
    assert_refused(refused, problems.POLL_IN_USE, pointer=refused.json["errors"][0]["pointer"][1:])
    assert refused.json["errors"][0]["pointer"][2:] in change
    assert Poll.objects.values().get(pk=poll.pk) == before


def test_an_open_polls_limits_can_be_loosened(owners_api, make_poll):
    poll = make_poll(voter_policy="session", address_limit=3, subnet_limit=9, allowed_networks=["192.0.2.0/24"])
    path = f"/api/v1/polls/{poll.pk}"

    looser = {"address_limit": 4, "subnet_limit": None, "allowed_networks": ["192.0.2.0/24", "2001:db8::/48"]}
    changed = owners_api.patch(path, looser)

    assert changed.status == 200, changed.text
    assert {name: changed.json[name] for name in looser} == looser
    assert_refused(owners_api.patch(path, {"subnet_limit": 9}), problems.POLL_IN_USE, pointer="/subnet_limit")


def test_who_sees_the_results_changes_until_the_poll_opens_and_is_for_keys_that_read_them(owners_api, owner, make_poll):
    poll = make_poll(opens_in=600)
    path = f"/api/v1/polls/{poll.pk}"
    wanted = {"results_visibility": "owner"}

    def key(*scopes):
        _, key = clients.make_client(owner, {"name": "kiosk", "scopes": list(scopes)}, at=now())
        return Api(owners_api.port, {"authorization": f"Api-Key {key}"})

    assert_refused(key("polls:write").patch(path, wanted), problems.FORBIDDEN)
    assert key("polls:write").patch(path, {"results_visibility": "always", "title": "Dinner"}).status == 200  # as it is: no change
    assert key("polls:write", "results:read").patch(path, wanted).json["results_visibility"] == "owner"
    assert owners_api.patch(path, {"results_visibility": "sealed"}).json["results_visibility"] == "sealed"
    for opened in (poll, make_poll(results_visibility="owner", opens_in=600)):
        Poll.objects.filter(pk=opened.pk).update(opens_at=now())
        refused = owners_api.patch(f"/api/v1/polls/{opened.pk}", {"results_visibility": "always"})
        assert_refused(refused, problems.POLL_IN_USE, pointer="/results_visibility")


def test_a_change_is_one_version_and_no_change_is_none(owners_api, make_poll):
    poll = make_poll(description="Wednesday", opens_in=600)
    path = f"/api/v1/polls/{poll.pk}"
    first = owners_api.get(path).json
    ids = [{name: option[name] for name in ("id", "text", "description")} for option in first["options"]]

    same = owners_api.patch(path, {"description": "Wednesday", "options": ids, "allowed_networks": [], "reason": "none"})
    assert (same.json["version"], JournalEntry.objects.filter(poll=poll).count()) == (1, 1)

    changed = owners_api.patch(path, {"title": "Dinner", "description": "Thursday", "reason": "The cook is ill."})
    assert changed.json["version"] == 2
    entry = owners_api.get(f"{path}/journal").json["results"][0]
    assert (entry["actor"], entry["action"], entry["reason"]) == ("olga", "changed", "The cook is ill.")
    assert entry["changes"] == {"title": [first["title"], "Dinner"], "description": ["Wednesday", "Thursday"]}


def test_options_are_described_and_put_in_order(owners_api, make_poll):
    poll = make_poll(opens_in=600)
    path = f"/api/v1/polls/{poll.pk}"
    soup, salad = (str(option.pk) for option in poll.options.all())

    turned = owners_api.patch(path, {"options": [{"id": salad, "text": "salad"}, {"id": soup, "text": "soup", "description": "Leek"}]})

    assert [(o["id"], o["position"], o["description"]) for o in turned.json["options"]] == [(salad, 1, ""), (soup, 2, "Leek")]
    kept = owners_api.patch(path, {"options": [{"id": soup, "text": "hot soup"}, {"id": salad, "text": "salad"}]}).json["options"][0]
    assert (kept["text"], kept["description"]) == ("hot soup", "Leek")
    before, after = owners_api.get(f"{path}/journal").json["results"][0]["changes"]["options"]
    assert [option["text"] for option in before] == ["salad", "soup"]
    assert [(option["id"], option["text"]) for option in after] == [(soup, "hot soup"), (salad, "salad")]


# --- ETags --------------------------------------------------------------------------------------------------------------


def test_a_poll_that_is_known_is_not_sent_again(owners_api, make_poll):
    poll = make_poll(opens_in=600)
    path = f"/api/v1/polls/{poll.pk}"
    tag = owners_api.get(path).headers["etag"]
    assert tag == '"1-scheduled"'

    for known in (tag, f"W/{tag}", f'"7-final", {tag}', "*"):
        answer = owners_api.get(path, if_none_match=known)
        assert (answer.status, answer.text, answer.headers["etag"]) == (304, "", tag)
    for other in ('"2-scheduled"', "nonsense", ""):
        assert owners_api.get(path, if_none_match=other).status == 200

    assert owners_api.patch(path, {"title": "Dinner"}).headers["etag"] == '"2-scheduled"'
    assert owners_api.get(path, if_none_match=tag).status == 200
    Poll.objects.filter(pk=poll.pk).update(opens_at=now())
    assert owners_api.get(path).headers["etag"] == '"2-open"'


def test_a_change_can_be_asked_for_only_if_nothing_has_changed_meanwhile(owners_api, make_poll):
    poll = make_poll(opens_in=600)
    path = f"/api/v1/polls/{poll.pk}"

    assert owners_api.patch(path, {"title": "Dinner"}, if_match='"1-scheduled"').status == 200
    for stale in ('"1-scheduled"', 'W/"2-scheduled"', '"2-open", "3-scheduled"', '""'):
        assert_refused(owners_api.patch(path, {"title": "Tea"}, if_match=stale), problems.CHANGED_MEANWHILE)
        assert_refused(owners_api.post(f"{path}/open", {}, if_match=stale), problems.CHANGED_MEANWHILE)
    for malformed in ("2-scheduled", '"2-open', '"2-scheduled" "3-scheduled"', "", '"a b"', "*, *"):
        assert_refused(owners_api.patch(path, {"title": "Tea"}, if_match=malformed), problems.INVALID)
        assert_refused(owners_api.post(f"{path}/open", {}, if_match=malformed), problems.INVALID)
    assert Poll.objects.get(pk=poll.pk).title == "Dinner"
    for right in ('"2-scheduled"', '"1-scheduled" , "3-scheduled"', "*"):
        assert owners_api.patch(path, {"title": f"Tea {right}"}, if_match=right).status == 200, right

    draft = f"/api/v1/polls/{make_poll(draft=True).pk}"
    assert_refused(owners_api.send("DELETE", draft, if_match='"2-draft"'), problems.CHANGED_MEANWHILE)
    assert_refused(owners_api.send("DELETE", draft, if_match="draft"), problems.INVALID)
    assert owners_api.send("DELETE", draft, if_match='"1-draft"').status == 204


def test_of_two_edits_of_one_version_at_once_exactly_one_wins(owners_api, make_poll):
    for _ in range(10):
        path = f"/api/v1/polls/{make_poll(opens_in=600).pk}"
        start = threading.Barrier(4)

        def edit(title, path=path, start=start):
            start.wait()
            return owners_api.patch(path, {"title": title}, if_match='"1-scheduled"')

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(edit, ["a", "b", "c", "d"]))

        assert sorted(answer.status for answer in answers) == [200, 412, 412, 412]
        [won] = [answer.json["title"] for answer in answers if answer.status == 200]
        assert owners_api.get(path).json["title"] == won
        assert owners_api.get(path).json["version"] == 2


def test_times_are_utc_whatever_zone_they_came_in(owners_api):
    closes_at = datetime(2090, 5, 1, 12, tzinfo=UTC)
    poll = owners_api.post("/api/v1/polls", lunch(closes_at="2090-05-01T14:00:00+02:00")).json
    assert (poll["closes_at"], closes_at.isoformat()) == ("2090-05-01T12:00:00Z", "2090-05-01T12:00:00+00:00")


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/api/v1/polls/x", "/api/", "/api/v1/polls/x/y/z"])
def test_an_address_that_is_none(owners_api, path):
    assert_refused(owners_api.get(path), problems.NOT_FOUND)


def test_a_method_that_is_none(owners_api, poll):
    answer = owners_api.send("PUT", f"/api/v1/polls/{poll.pk}", {})
    assert_refused(answer, problems.WRONG_METHOD)
    assert "PATCH" in answer.headers["allow"]


def test_a_moment_may_have_any_offset(owners_api):
    """PostgreSQL takes offsets below 16 hours only; ISO 8601 knows others."""
    far = "2099-01-01T00:00:00%2B22:31"

    assert owners_api.get(f"/api/v1/polls?closes_before={far}").status == 200
    assert_refused(owners_api.get("/api/v1/polls?closes_after=0001-01-01T00:00:00%2B23:59"), problems.INVALID, pointer="/closes_after")
    made = owners_api.post("/api/v1/polls", lunch(closes_at="2099-01-01T00:00:00+22:31"))
    assert (made.status, made.json["closes_at"]) == (201, "2098-12-31T01:29:00Z")
