"""Polls through the API: making, reading, changing, deleting, and who may."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from django.contrib.auth import get_user_model
from django.utils.timezone import now

from polls import problems
from polls.counting import count_votes
from polls.models import Poll
from tests.conftest import PASSWORD, Api, tallies, vote_of
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
    get_user_model().objects.create_user("mallory", password=PASSWORD)
    tokens = Api(pipeline, {}).post("/api/v1/auth/token", {"username": "mallory", "password": PASSWORD}).json
    return Api(pipeline, {"authorization": f"Bearer {tokens['access']}"})


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
    anonymous = Api(owners_api.port, {})
    assert anonymous.get(f"/api/v1/polls/{poll['id']}").json == poll
    assert poll in anonymous.get("/api/v1/polls").json["results"]


def test_pages_follow_each_other_without_gaps(owners_api):
    wanted = [owners_api.post("/api/v1/polls", lunch(title=f"page {n}")).json["id"] for n in range(5)]

    seen, path = [], "/api/v1/polls?page_size=2"
    while path and len(seen) < 5:
        page = owners_api.get(path).json
        assert len(page["results"]) == 2
        seen += [poll["id"] for poll in page["results"]]
        path = page["next"] and page["next"].split(str(owners_api.port))[1]

    assert seen[:5] == wanted[::-1]


@pytest.mark.parametrize("query", ["cursor=nonsense", "page_size=x", "page_size=-1", "page_size=100000"])
def test_a_page_that_is_none(owners_api, query):
    assert owners_api.get(f"/api/v1/polls?{query}").status in (200, 404)


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
    assert owners_api.send("DELETE", path).status == 204
    assert_refused(owners_api.get(path), problems.NOT_FOUND)


def test_a_superuser_may_change_any_poll(owners_api, make_poll):
    get_user_model().objects.create_superuser("root", password=PASSWORD)
    tokens = Api(owners_api.port, {}).post("/api/v1/auth/token", {"username": "root", "password": PASSWORD}).json

    answer = owners_api.patch(f"/api/v1/polls/{make_poll().pk}", {"title": "Mended"}, authorization=f"Bearer {tokens['access']}")

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


def test_options_change_until_there_is_a_vote(owners_api, make_poll):
    poll = make_poll()
    path = f"/api/v1/polls/{poll.pk}"
    assert owners_api.patch(path, {"options": [{"text": "soup"}, {"text": "noodles"}]}).status == 200

    count_votes([vote_of(poll, "alice")])

    assert_refused(owners_api.patch(path, {"options": [{"text": "noodles"}, {"text": "salad"}]}), problems.POLL_IN_USE, pointer="/options")
    assert tallies(poll) == {"soup": 1}


def test_an_option_of_another_poll_can_not_be_taken_over(owners_api, make_poll):
    poll, other = make_poll(), make_poll()
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
    assert owners_api.patch(path, {"title": "Lunch (over)"}).status == 200


def test_a_poll_that_was_open_can_not_be_deleted(owners_api, poll):
    assert_refused(owners_api.send("DELETE", f"/api/v1/polls/{poll.pk}"), problems.POLL_IN_USE)
    assert Poll.objects.filter(pk=poll.pk).exists()


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
