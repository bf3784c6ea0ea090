"""Results: right for each method, and shown to those who may see them."""

from datetime import timedelta
from uuid import uuid4

import pytest
from django.conf import settings
from django.utils.timezone import now

from polls import closing, problems, results, roles
from polls.counting import count_votes
from polls.models import ApiClient, Poll, ResultsVisibility
from polls.moments import to_microseconds
from polls.roles import actor_of
from tests.conftest import make_user, option, signed_in, vote_of
from tests.test_intake import assert_refused

MICROSECOND = timedelta(microseconds=1)


@pytest.fixture(scope="session")
def strangers_api(pipeline):
    make_user("simon", roles.OWNER)
    return signed_in(pipeline, "simon")


def read(poll, at=None):
    return results.read_results(poll.pk, at or now())


def votes(shown):
    return {option["text"]: (option["votes"], option["share"]) for option in shown["options"]}


def test_a_single_choice_polls_total_is_the_sum_of_its_options(make_poll):
    poll = make_poll(allow_withdrawal=True)
    assert (read(poll)["total_votes"], votes(read(poll))) == (0, {"soup": (0, 0.0), "salad": (0, 0.0)})

    count_votes([vote_of(poll, "alice"), vote_of(poll, "bob"), vote_of(poll, "carol", "salad")])

    shown = read(poll)
    assert (shown["poll"], shown["method"], shown["status"], shown["is_final"]) == (str(poll.pk), "single", "open", False)
    assert shown["total_votes"] == 3
    assert votes(shown) == {"soup": (2, 0.666667), "salad": (1, 0.333333)}
    assert [(o["id"], o["position"]) for o in shown["options"]] == [(str(option(poll, "soup")), 1), (str(option(poll, "salad")), 2)]


def test_an_approval_polls_total_counts_ballots_and_its_shares_are_of_them(make_poll):
    poll = make_poll(method="approval", options=[{"text": text} for text in ("soup", "salad", "noodles")])
    assert read(poll)["total_votes"] == 0

    count_votes([vote_of(poll, "alice", "soup", "salad"), vote_of(poll, "bob", "soup"), vote_of(poll, "carol", "soup", "salad")])

    shown = read(poll)
    assert (shown["method"], shown["total_votes"]) == ("approval", 3)
    assert votes(shown) == {"soup": (3, 1.0), "salad": (2, 0.666667), "noodles": (0, 0.0)}


@pytest.mark.parametrize("method", ["single", "approval"])
def test_the_revision_grows_with_every_change(make_poll, method):
    poll = make_poll(method=method, allow_change=True)
    seen = [read(poll)["revision"]]

    for n, text in enumerate(["soup", "salad", "soup"]):
        count_votes([vote_of(poll, "alice", text, at=n)])
        seen.append(read(poll)["revision"])

    assert sorted(set(seen)) == seen


def test_results_say_when_they_are_final(make_poll):
    poll = make_poll(closes_in=-600)
    count_votes([vote_of(poll, "alice")])
    assert (read(poll)["status"], read(poll)["is_final"]) == ("closing", False)

    closing.close_expired_polls(now())
    closing.finalise_polls(now() + timedelta(seconds=settings.FINAL_AFTER_SECONDS), [poll.pk])
    assert (read(poll)["status"], read(poll)["is_final"]) == ("final", True)

    Poll.objects.filter(pk=poll.pk).update(archived_at=now())
    assert (read(poll)["status"], read(poll)["is_final"], read(poll)["total_votes"]) == ("archived", True, 1)


def test_there_are_no_results_of_no_poll():
    assert results.read_results(uuid4(), now()) is None


# --- Who sees them ----------------------------------------------------------------------------------------------------

BEFORE_AND_AFTER = {"always": (True, True), "after_vote": (False, True), "after_close": (False, True), "owner": (False, False)}


@pytest.mark.parametrize("visibility", ResultsVisibility.values)
def test_results_are_public_by_the_polls_wish_to_the_microsecond(visibility):
    end = now()
    before, after = BEFORE_AND_AFTER[visibility]

    assert results.are_public(visibility, end, end - MICROSECOND) is before
    assert results.are_public(visibility, end, end) is after
    number = to_microseconds(end)
    assert (results.are_public(visibility, number, number - 1), results.are_public(visibility, number, number)) == (before, after)


@pytest.fixture(scope="session")
def people(_database, owner):
    return {
        "owner": actor_of(owner),
        "auditor": actor_of(make_user("ariadne", roles.AUDITOR)),
        "other owner": actor_of(make_user("rita", roles.OWNER)),
        "operator": actor_of(make_user("oscar", roles.OPERATOR)),
        "owner who is one no more": actor_of(make_user("ex")),
        "nobody": actor_of(None),
        "client": actor_of(owner, ApiClient(owner=owner, scopes=["results:read"])),
        "client without the scope": actor_of(owner, ApiClient(owner=owner, scopes=["votes:cast", "polls:write"])),
    }


@pytest.mark.parametrize("visibility", ResultsVisibility.values)
@pytest.mark.parametrize("is_over", [False, True])
def test_the_people_behind_a_poll_see_its_results_before_everybody_does(make_poll, people, visibility, is_over):
    poll = make_poll(results_visibility=visibility, closes_in=-60 if is_over else 60)
    is_public = BEFORE_AND_AFTER[visibility][is_over]

    for who, actor in people.items():
        assert actor.reads_results(poll, now()) is (is_public or who in ("owner", "auditor", "client")), who


@pytest.mark.parametrize("visibility", ["after_vote", "after_close", "owner"])
def test_hidden_results_are_answered_to_whom_they_are_shown(owners_api, strangers_api, api, make_poll, visibility):
    poll = make_poll(results_visibility=visibility)
    count_votes([vote_of(poll, "alice")])
    path = f"/api/v1/polls/{poll.pk}/results"

    for caller in (owners_api, api):
        answer = caller.get(path)
        assert answer.status == 200, answer.text
        assert (answer.json["total_votes"], answer.json["is_final"]) == (1, False)
        assert "no-store" in answer.headers["cache-control"]
    refused = strangers_api.get(path)
    assert_refused(refused, problems.RESULTS_HIDDEN)
    assert "votes" not in refused.json


def test_a_drafts_results_are_as_unknown_as_it_is(owners_api, strangers_api, make_poll):
    path = f"/api/v1/polls/{make_poll(draft=True, results_visibility='owner').pk}/results"

    assert owners_api.get(path).json["status"] == "draft"
    assert_refused(strangers_api.get(path), problems.UNKNOWN_POLL)
