"""Results: right for each method, and shown to those who may see them."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.test import Client
from django.utils.timezone import now

from polls import clients, closing, editing, fraud, integrity, problems, results, review, roles
from polls.counting import count_votes
from polls.holds import Selector
from polls.journal import Act
from polls.models import ApiClient, Poll, ResultsVisibility, Ruling, Tally
from polls.moments import to_microseconds
from polls.roles import actor_of
from tests.conftest import Api, make_user, option, signed_in, vote_of, wait_until
from tests.test_intake import assert_refused

MICROSECOND = timedelta(microseconds=1)


@pytest.fixture(scope="session")
def strangers_api(pipeline):
    make_user("simon", roles.OWNER)
    return signed_in(pipeline, "simon")


def read(poll, at=None):
    return results.read_results(poll.pk, at or now())


def vote_time(seconds):
    """The moment of `vote_of(..., at=seconds)`."""
    return datetime.fromtimestamp(1_800_000_000 + seconds, UTC)


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

BEFORE_AND_AFTER = {
    "always": (True, True),
    "after_vote": (False, True),
    "after_close": (False, True),
    "owner": (False, False),
    "sealed": (False, True),
}


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
        is_inside = who in ("owner", "auditor", "client") and visibility != "sealed"
        assert actor.reads_results(poll, now()) is (is_public or is_inside), who


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


# --- Sealed ones ------------------------------------------------------------------------------------------------------

ADMINS_PAGES = ("/admin/polls/poll/{}/change/", "/admin/polls/tally/?q={}")


@pytest.fixture(scope="session")
def insiders(pipeline, owner):
    """Everybody who has a role, in one person and apart."""
    for name, role in (("sealed auditor", roles.AUDITOR), ("sealed operator", roles.OPERATOR), ("sealed admin", roles.ADMIN)):
        make_user(name, role)
    return {name: signed_in(pipeline, name) for name in (owner.username, "sealed auditor", "sealed operator", "sealed admin")}


def ask_graphql(caller, poll):
    answer = caller.post("/graphql", {"query": f'{{ poll(id: "{poll.pk}") {{ results {{ totalVotes options {{ votes }} }} }} }}'})
    return answer.json["data"]["poll"]["results"]


def test_nobody_reads_sealed_results_before_the_end_whatever_their_role_and_everybody_after_it(insiders, strangers_api, api, make_poll):
    poll = make_poll(results_visibility="sealed")
    count_votes([vote_of(poll, "alice")])
    path, callers = f"/api/v1/polls/{poll.pk}/results", {**insiders, "stranger": strangers_api, "key": api}

    for who, caller in callers.items():
        assert_refused(caller.get(path), problems.RESULTS_HIDDEN)
        assert_refused(caller.get(f"{path}/stream"), problems.RESULTS_HIDDEN)
        assert ask_graphql(caller, poll) is None, who

    Poll.objects.filter(pk=poll.pk).update(closes_at=now())
    for who, caller in callers.items():
        wait_until(lambda caller=caller: caller.get(path).status == 200)
        assert ask_graphql(caller, poll)["totalVotes"] == 1, who


def test_a_receipt_does_not_open_sealed_results(api, strangers_api, make_poll):
    poll = make_poll(results_visibility="sealed")
    receipt = api.cast(poll, "alice").json["receipt"]
    wait_until(lambda: api.get(f"/api/v1/votes/{receipt}").json["status"] == "counted")

    assert_refused(strangers_api.get(f"/api/v1/polls/{poll.pk}/results", vote_receipt=receipt), problems.RESULTS_HIDDEN)


def test_the_admin_shows_no_tally_of_a_sealed_poll(make_poll):
    poll = make_poll(results_visibility="sealed")
    count_votes([vote_of(poll, f"voter {number}") for number in range(4711)])
    admin = Client()
    admin.force_login(get_user_model().objects.create_superuser(f"root {poll.pk}"))

    for page in ADMINS_PAGES:
        assert "4711" not in admin.get(page.format(poll.pk)).content.decode()
    assert "Sealed until" in admin.get(ADMINS_PAGES[0].format(poll.pk)).content.decode()

    Poll.objects.filter(pk=poll.pk).update(closes_at=now())
    for page in ADMINS_PAGES:
        assert "4711" in admin.get(page.format(poll.pk)).content.decode()


def test_what_a_ruling_or_a_recount_did_to_tallies_stands_in_the_journal_for_who_may_read_results(insiders, make_poll, owner):
    poll = make_poll(results_visibility="sealed")
    count_votes([vote_of(poll, f"voter {number}", at=number) for number in range(4711)])
    review.rule(poll.pk, [Selector(None, None, None, vote_time(0), vote_time(4000))], Ruling.VOID, Act("otto", now(), "They look alike."))
    Tally.objects.filter(poll=poll).update(votes=4711)
    integrity.recount(poll.pk, Act("otto", now()))
    path = f"/api/v1/polls/{poll.pk}/journal"

    def changes(caller):
        return {entry["action"]: entry["changes"] for entry in caller.get(path).json["results"]}

    admin = Client()
    admin.force_login(get_user_model().objects.create_superuser(f"root {poll.pk}"))
    for caller in (insiders[owner.username], insiders["sealed auditor"]):
        assert (changes(caller)["voided"], changes(caller)["recounted"]) == ({"voters": [0, 4000]}, {})
    assert "4711" not in admin.get(ADMINS_PAGES[0].format(poll.pk)).content.decode()

    Poll.objects.filter(pk=poll.pk).update(closes_at=now())
    # What was hidden at the moment of the ruling stays so: beside a later one it would tell what was cast between them.
    assert changes(insiders["sealed auditor"])["voided"] == {"voters": [0, 4000]}
    assert "4711" in str(changes(insiders["sealed auditor"])["recounted"])
    assert "4711" in admin.get(ADMINS_PAGES[0].format(poll.pk)).content.decode()


def test_a_key_that_may_not_read_results_reads_none_in_the_journal(pipeline, owner, make_poll):
    poll = make_poll(results_visibility="owner")
    count_votes([vote_of(poll, "alice")])
    Tally.objects.filter(poll=poll).update(votes=4711)
    integrity.recount(poll.pk, Act("otto", now()))

    def recounted(*scopes):
        _, key = clients.make_client(owner, {"name": "kiosk", "scopes": list(scopes)}, at=now())
        entries = Api(pipeline, {"authorization": f"Api-Key {key}"}).get(f"/api/v1/polls/{poll.pk}/journal").json["results"]
        return next(entry["changes"] for entry in entries if entry["action"] == "recounted")

    assert recounted("polls:write") == {}
    assert recounted("polls:write", "results:read") == {str(option(poll, "soup")): [4711, 1]}


def test_trying_a_rule_tells_no_tally_of_a_sealed_poll(make_poll):
    for visibility in ("owner", "sealed"):
        poll = make_poll(results_visibility=visibility, voter_policy="ip")
        count_votes([vote_of(poll, f"voter {number}", address="192.0.2.7") for number in range(300)])

        may_read = lambda poll: not results.are_sealed(poll.results_visibility, poll.closes_at, now())  # noqa: E731
        trial = fraud.try_rule("busy_address", Act("otto", now(), "A look."), reads_results=may_read, poll_id=poll.pk)

        assert len(trial.cases) == 1
        assert bool(trial.changes) is (visibility == "owner")


def test_a_sealed_poll_whose_results_may_have_been_seen_takes_no_more_votes(owners_api, make_poll):
    at = now()
    poll = make_poll(results_visibility="sealed", opens_in=-60)
    path = f"/api/v1/polls/{poll.pk}"
    later = (at + timedelta(days=2)).isoformat()

    for closes_at in (at + editing.SHORTEST_NOTICE, at - MICROSECOND):  # about to end, and ended
        Poll.objects.filter(pk=poll.pk).update(closes_at=closes_at)
        for refused in (
            owners_api.post(f"{path}/extend", {"closes_at": later}),
            owners_api.post(f"{path}/reopen", {"closes_at": later}),
            owners_api.patch(path, {"closes_at": later}),
        ):
            assert (refused.status, refused.json["type"]) == (409, problems.POLL_IN_USE.type)

    path = f"/api/v1/polls/{make_poll(results_visibility='sealed', closes_in=300).pk}"
    assert owners_api.post(f"{path}/extend", {"closes_at": later}).status == 200
