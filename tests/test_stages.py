"""A poll's life: draft, scheduled, open, closing, final, archived; who moves it on, when, and how the journal tells it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connection, transaction
from django.utils.timezone import now

from polls import closing, editing, problems, roles, stages
from polls.counting import count_votes
from polls.editing import SHORTEST_NOTICE
from polls.journal import Act
from polls.models import JournalEntry, Poll
from tests.conftest import Api, make_user, signed_in, vote_of
from tests.test_intake import assert_refused

SECOND, MICROSECOND = timedelta(seconds=1), timedelta(microseconds=1)
# Every stage and a poll in it, as arguments of `make_poll` and columns written past the rules.
IN_STAGE = {
    "draft": ({"draft": True}, []),
    "scheduled": ({"opens_in": 600}, []),
    "open": ({}, []),
    "closing": ({"closes_in": -5}, []),
    "final": ({"closes_in": -600}, ["finalised_at"]),
    "archived": ({"closes_in": -600}, ["finalised_at", "archived_at"]),
}
ALLOWED = {
    "publish": {"draft"},
    "open": {"scheduled"},
    "close": {"open"},
    "extend": {"scheduled", "open"},
    "reopen": {"closing"},
    "archive": {"final", "scheduled"},
}


@pytest.fixture
def make_poll_in(make_poll):
    def make_poll_in(stage, **fields):
        arguments, moments = IN_STAGE[stage]
        poll = make_poll(**{**arguments, **fields})
        Poll.objects.filter(pk=poll.pk).update(**dict.fromkeys(moments, now()))
        assert Poll.objects.get(pk=poll.pk).status == stage
        return poll

    return make_poll_in


@pytest.fixture(scope="session")
def roberts_api(pipeline):
    """Somebody else who makes polls."""
    make_user("robert", roles.OWNER)
    return signed_in(pipeline, "robert")


def in_(**delta):
    return (now() + timedelta(**delta)).isoformat()


def journal(poll):
    """[(actor, action, reason, changes)], oldest first."""
    return list(JournalEntry.objects.filter(poll=poll).order_by("id").values_list("actor", "action", "reason", "changes"))


def actions(poll):
    return [(actor, action) for actor, action, _, _ in journal(poll)]


def body_of(move):
    return {"closes_at": in_(days=30)} if move in ("extend", "reopen") else {}


# --- Moves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", IN_STAGE)
@pytest.mark.parametrize("move", ALLOWED)
def test_each_move_is_made_from_its_stages_only(owners_api, make_poll_in, stage, move):
    poll = make_poll_in(stage)
    before = Poll.objects.values().get(pk=poll.pk)

    answer = owners_api.post(f"/api/v1/polls/{poll.pk}/{move}", {**body_of(move), "reason": "The cook is ill."})

    if stage in ALLOWED[move]:
        assert answer.status == 200, answer.text
        assert answer.json["version"] == before["version"] + 1
        assert answer.headers["etag"] == f'"{answer.json["version"]}-{answer.json["status"]}"'
        *_, (actor, _, reason, changes) = journal(poll)
        assert (actor, reason) == ("olga", "The cook is ill.")
        assert changes
    else:
        assert_refused(answer, problems.POLL_IN_USE)
        assert stage in answer.json["detail"]
        assert Poll.objects.values().get(pk=poll.pk) == before
        assert len(journal(poll)) == 1


def test_a_poll_lives_from_draft_to_archive(owners_api, owner):
    begin = now()
    options = [{"text": "soup"}, {"text": "salad"}]
    fields = {"title": "Lunch", "voter_policy": "client", "options": options, "closes_at": begin + timedelta(days=9), "draft": True}
    fields["opens_at"] = begin + timedelta(days=1)
    poll = editing.create_poll(owner, fields, begin)
    assert poll.status_at(begin) == "draft"

    at = begin + timedelta(hours=1)
    poll = stages.publish_poll(poll.pk, Act("olga", at, "It is complete."))
    assert poll.status_at(at) == "scheduled"
    poll = stages.open_poll(poll.pk, Act("olga", at + SECOND))
    assert poll.status_at(at + SECOND) == "open" and poll.status_at(at) == "scheduled"
    at += timedelta(hours=1)
    poll = stages.extend_poll(poll.pk, Act("olga", at), begin + timedelta(days=10))
    poll = stages.close_poll(poll.pk, Act("olga", at))
    assert poll.closes_at == at + SHORTEST_NOTICE
    assert poll.status_at(at + SHORTEST_NOTICE - MICROSECOND) == "open"
    at += SHORTEST_NOTICE
    closing.close_expired_polls(at)
    assert Poll.objects.get(pk=poll.pk).status_at(at) == "closing"
    poll = stages.reopen_poll(poll.pk, Act("olga", at), at + timedelta(hours=1))
    assert (poll.status_at(at), poll.closed_at) == ("open", None)
    at = poll.closes_at
    closing.close_expired_polls(at)
    at += timedelta(seconds=settings.FINAL_AFTER_SECONDS)
    closing.finalise_polls(at, [poll.pk])
    poll = stages.archive_poll(poll.pk, Act("olga", at))
    assert poll.status_at(at) == "archived"
    assert [(actor, action, changes.get("status")) for actor, action, _, changes in journal(poll)] == [
        ("olga", "created", [None, "draft"]),
        ("olga", "published", ["draft", "scheduled"]),
        ("olga", "opened", ["scheduled", "open"]),
        ("olga", "extended", None),
        ("olga", "closed", None),
        ("the clock", "closed", ["open", "closing"]),
        ("olga", "reopened", ["closing", "open"]),
        ("the clock", "closed", ["open", "closing"]),
        ("the clock", "finalised", ["closing", "final"]),
        ("olga", "archived", ["final", "archived"]),
    ]
    assert journal(poll)[1][2] == "It is complete."


def test_a_draft_whose_beginning_has_passed_opens_when_it_is_published(make_poll):
    poll = make_poll(draft=True, opens_in=-3600)
    at = now()

    poll = stages.publish_poll(poll.pk, Act("olga", at))

    assert (poll.opens_at, poll.opened_at, poll.status_at(at)) == (at, at, "open")
    closing.open_due_polls(at + SECOND)
    assert actions(poll) == [("olga", "created"), ("olga", "published")]


def test_a_draft_whose_end_has_passed_is_not_published(owners_api, make_poll):
    for closes_in in (-60, 1):
        poll = make_poll(draft=True, opens_in=-3600, closes_in=closes_in)
        assert_refused(owners_api.post(f"/api/v1/polls/{poll.pk}/publish", {}), problems.INVALID, pointer="/closes_at")
        assert Poll.objects.get(pk=poll.pk).status == "draft"


def test_closing_early_leaves_time_for_every_web_process_to_know(make_poll):
    poll, at = make_poll(), now()
    soonest = at + SHORTEST_NOTICE

    with pytest.raises(problems.Refusal, match="earliest") as refused:
        stages.close_poll(poll.pk, Act("olga", at), soonest - MICROSECOND)
    assert refused.value.problem == problems.INVALID
    assert stages.close_poll(poll.pk, Act("olga", at), soonest).closes_at == soonest
    with pytest.raises(problems.Refusal, match="anyway"):
        stages.close_poll(poll.pk, Act("olga", at + SECOND))  # it would end later by that
    with pytest.raises(problems.Refusal, match="anyway"):
        stages.close_poll(poll.pk, Act("olga", at), soonest + SECOND)
    assert Poll.objects.get(pk=poll.pk).closes_at == soonest


def test_an_extension_is_later_than_the_end_it_replaces(owners_api, make_poll):
    poll = make_poll()
    path = f"/api/v1/polls/{poll.pk}/extend"

    for wrong in (
        {},
        {"closes_at": "later"},
        {"closes_at": poll.closes_at.isoformat()},
        {"closes_at": in_(seconds=60)},
        {"closes_at": None},
    ):
        assert_refused(owners_api.post(path, wrong), problems.INVALID, pointer="/closes_at")
    assert owners_api.post(path, {"closes_at": "2090-01-01T00:00:00Z"}).json["closes_at"] == "2090-01-01T00:00:00Z"


def test_a_poll_that_the_clock_closes_while_it_is_extended_closes_again(make_poll):
    for extend in (
        lambda poll, act, end: stages.extend_poll(poll.pk, act, end),
        lambda poll, act, end: editing.change_poll(poll.pk, {"closes_at": end}, act),
    ):
        poll = make_poll()
        before, later = Act("olga", poll.closes_at - timedelta(minutes=1)), poll.closes_at + timedelta(hours=1)
        closing.close_expired_polls(poll.closes_at)

        assert extend(poll, before, later).closed_at is None

        closing.close_expired_polls(later)
        assert Poll.objects.get(pk=poll.pk).closed_at == later
        assert [action for actor, action in actions(poll) if actor == "the clock"] == ["closed", "closed"]


def test_a_reopened_poll_stays_open_for_as_long_as_the_shortest_notice_at_least(owners_api, make_poll):
    path = f"/api/v1/polls/{make_poll(closes_in=-5).pk}/reopen"

    for wrong in ({}, {"closes_at": in_(seconds=-1)}, {"closes_at": in_(seconds=1)}):
        assert_refused(owners_api.post(path, wrong), problems.INVALID, pointer="/closes_at")
    assert owners_api.post(path, {"closes_at": in_(minutes=5)}).json["status"] == "open"


def test_a_scheduled_poll_is_archived_until_votes_may_be_on_their_way(make_poll):
    poll = make_poll(opens_in=600)

    with pytest.raises(problems.Refusal, match="about to open"):
        stages.archive_poll(poll.pk, Act("olga", poll.opens_at - SHORTEST_NOTICE))
    archived = stages.archive_poll(poll.pk, Act("olga", poll.opens_at - SHORTEST_NOTICE - MICROSECOND))

    assert archived.status_at(poll.closes_at) == "archived"
    closing.open_due_polls(poll.closes_at)
    closing.close_expired_polls(poll.closes_at)
    assert actions(poll) == [("olga", "created"), ("olga", "archived")]


def test_an_archived_poll_takes_no_votes_and_leaves_the_lists_but_not_its_address(api, owners_api, make_poll_in):
    poll = make_poll_in("archived")

    assert api.cast(poll, "alice").status == 409
    anonymous = Api(api.port, {})
    assert anonymous.get(f"/api/v1/polls/{poll.pk}").json["status"] == "archived"
    assert anonymous.get(f"/api/v1/polls?search={poll.title.replace(' ', '%20')}").json["results"] == []


@pytest.mark.parametrize("move", [*ALLOWED, "duplicate"])
def test_a_move_that_is_asked_for_wrongly(owners_api, roberts_api, make_poll, move):
    path = f"/api/v1/polls/{make_poll(draft=True).pk}/{move}"

    assert_refused(owners_api.post(path, {**body_of(move), "reasons": "x"}), problems.INVALID, pointer="/reasons")
    assert_refused(owners_api.post(path, {**body_of(move), "reason": "x" * 501}), problems.INVALID, pointer="/reason")
    assert_refused(owners_api.post(path, {**body_of(move), "reason": "a\x00b"}), problems.INVALID, pointer="/reason")
    assert_refused(owners_api.post(path, b"{"), problems.MALFORMED)
    assert_refused(owners_api.post(path, b"[]"), problems.INVALID)
    assert_refused(owners_api.post(f"/api/v1/polls/{uuid4()}/{move}", {}), problems.UNKNOWN_POLL)
    assert_refused(Api(owners_api.port, {}).post(path, {}), problems.UNAUTHENTICATED)
    assert_refused(roberts_api.post(path, {}), problems.UNKNOWN_POLL)
    assert_refused(roberts_api.post(f"/api/v1/polls/{make_poll().pk}/{move}", {}), problems.FORBIDDEN)
    assert_refused(owners_api.get(path), problems.WRONG_METHOD)


def test_a_move_needs_no_body(owners_api, make_poll):
    assert owners_api.send("POST", f"/api/v1/polls/{make_poll(draft=True).pk}/publish").status == 200


def test_of_two_moves_at_once_one_is_made(owners_api, make_poll):
    for _ in range(5):
        poll = make_poll(draft=True)
        start = threading.Barrier(2)

        def publish(_, path=f"/api/v1/polls/{poll.pk}/publish", start=start):
            start.wait()
            return owners_api.post(path, {}).status

        with ThreadPoolExecutor(2) as threads:
            assert sorted(threads.map(publish, range(2))) == [200, 409]
        assert actions(poll) == [("olga", "created"), ("olga", "published")]


def test_a_poll_closes_and_lets_in_more_while_its_votes_are_being_counted(make_poll):
    poll = make_poll(allowed_networks=[], voter_policy="ip", address_limit=1)

    with transaction.atomic():
        count_votes([vote_of(poll, "alice")])
        run_at_once(lambda at: stages.close_poll(poll.pk, Act("olga", at)), now(), threads=1)
        run_at_once(lambda at: editing.change_poll(poll.pk, {"address_limit": 2}, Act("olga", at)), now(), threads=1)

    assert actions(poll) == [("olga", "created"), ("olga", "closed"), ("olga", "changed")]


# --- Duplicates -------------------------------------------------------------------------------------------------------


def test_a_duplicate_is_a_draft_with_all_settings_and_options_and_no_votes(owners_api, make_poll):
    made = {
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
        "allowed_networks": ["192.0.2.0/24"],
        "results_visibility": "owner",
    }
    options = [{"text": "soup", "description": "Leek"}, {"text": "salad", "description": ""}]
    poll = make_poll(**made, options=options, closes_in=-60)
    count_votes([vote_of(poll, "alice")])

    answer = owners_api.post(f"/api/v1/polls/{poll.pk}/duplicate", {"reason": "Every week."})

    assert answer.status == 201, answer.text
    twin = answer.json
    assert answer.headers["location"] == twin["links"]["self"] == f"/api/v1/polls/{twin['id']}"
    assert {name: twin[name] for name in made} == made
    assert [(option["text"], option["description"]) for option in twin["options"]] == [("soup", "Leek"), ("salad", "")]
    assert {option["id"] for option in twin["options"]}.isdisjoint(str(option.pk) for option in poll.options.all())
    assert (twin["id"] != str(poll.pk), twin["status"], twin["title"], twin["version"]) == (True, "draft", poll.title, 1)
    opens_at, closes_at = (datetime.fromisoformat(twin[name]) for name in ("opens_at", "closes_at"))
    assert abs(opens_at - now()) < timedelta(seconds=5)
    assert closes_at - opens_at == poll.closes_at - poll.opens_at
    assert journal(twin["id"]) == [("olga", "created", "Every week.", {"status": [None, "draft"], "duplicate_of": [None, str(poll.pk)]})]
    assert owners_api.get(f"/api/v1/polls/{twin['id']}/results").json["total_votes"] == 0
    assert actions(poll) == [("olga", "created")]


def test_a_duplicate_takes_other_times(owners_api, poll):
    path = f"/api/v1/polls/{poll.pk}/duplicate"
    times = {"opens_at": "2090-01-01T00:00:00Z", "closes_at": "2090-01-02T00:00:00Z"}

    twin = owners_api.post(path, times).json
    assert {name: twin[name] for name in times} == times
    assert_refused(owners_api.post(path, {"closes_at": in_(seconds=-1)}), problems.INVALID, pointer="/closes_at")
    assert_refused(owners_api.post(path, {"opens_at": "2020-01-01T00:00:00Z"}), problems.INVALID, pointer="/opens_at")
    assert_refused(owners_api.post(path, {"opens_at": "9999-12-31T23:59:59Z"}), problems.INVALID, pointer="/closes_at")


def test_only_who_sees_the_inside_of_a_poll_and_makes_polls_duplicates_it(roberts_api, pipeline, poll):
    make_user("aurelia", roles.AUDITOR)
    make_user("audrey", roles.AUDITOR, roles.OWNER)
    path = f"/api/v1/polls/{poll.pk}/duplicate"

    assert_refused(roberts_api.post(path, {}), problems.FORBIDDEN)
    assert_refused(signed_in(pipeline, "aurelia").post(path, {}), problems.FORBIDDEN)
    twin = signed_in(pipeline, "audrey").post(path, {})
    assert twin.status == 201
    assert Poll.objects.get(pk=twin.json["id"]).owner == get_user_model().objects.get(username="audrey")


# --- The journal --------------------------------------------------------------------------------------------------------


def test_the_journal_is_for_the_people_behind_the_poll_and_auditors(owners_api, roberts_api, api, pipeline, poll):
    make_user("adam", roles.AUDITOR)
    path = f"/api/v1/polls/{poll.pk}/journal"

    for caller in (owners_api, api, signed_in(pipeline, "adam")):
        [entry] = caller.get(path).json["results"]
        assert (entry["actor"], entry["action"], entry["changes"]) == ("olga", "created", {"status": [None, "open"]})
    assert_refused(roberts_api.get(path), problems.FORBIDDEN)
    assert_refused(Api(pipeline, {}).get(path), problems.UNAUTHENTICATED)
    assert_refused(owners_api.get(f"/api/v1/polls/{uuid4()}/journal"), problems.UNKNOWN_POLL)


def test_the_journal_comes_in_pages_latest_first(owners_api, make_poll):
    poll = make_poll(opens_in=600)
    path = f"/api/v1/polls/{poll.pk}"
    for n in range(4):
        owners_api.patch(path, {"title": f"Lunch {n}"})

    page, seen = owners_api.get(f"{path}/journal?page_size=2").json, []
    while True:
        seen += [entry["changes"].get("title", [0, 0])[1] for entry in page["results"]]
        if not page["next"]:
            break
        page = owners_api.get(page["next"].split(str(owners_api.port))[1]).json

    assert seen == ["Lunch 3", "Lunch 2", "Lunch 1", "Lunch 0", 0]
    assert_refused(owners_api.get(f"{path}/journal?cursor=x"), problems.INVALID, pointer="/cursor")


def test_a_change_that_is_refused_leaves_no_entry_and_an_entry_that_fails_no_change(make_poll):
    poll = make_poll(opens_in=600)

    with pytest.raises(problems.Refusal):
        editing.change_poll(poll.pk, {"title": "Dinner", "min_choices": 2}, Act("olga", now()))
    with pytest.raises(Exception, match="value too long"):
        editing.change_poll(poll.pk, {"title": "Dinner"}, Act("o" * 201, now()))

    assert actions(poll) == [("olga", "created")]
    assert (Poll.objects.get(pk=poll.pk).title, Poll.objects.get(pk=poll.pk).version) == (poll.title, 1)


# --- By the clock -----------------------------------------------------------------------------------------------------


def run_at_once(job, at, threads=4):
    """Run the job in several threads that wait for each other; what they returned."""
    start = threading.Barrier(threads)

    def run(_):
        try:
            start.wait()
            return job(at)
        finally:
            connection.close()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_beats_at_once_write_one_entry_for_each_poll(make_poll):
    for job in (closing.open_due_polls, closing.close_expired_polls):
        job(now())  # what other tests left
    polls = [make_poll(opens_in=60, closes_in=120) for _ in range(20)]
    opens_at, closes_at = max(poll.opens_at for poll in polls), max(poll.closes_at for poll in polls)
    final_at = closes_at + timedelta(seconds=settings.FINAL_AFTER_SECONDS)

    finalise = partial(closing.finalise_polls, polls=[poll.pk for poll in polls])
    for job, at in ((closing.open_due_polls, opens_at), (closing.close_expired_polls, closes_at), (finalise, final_at)):
        run_at_once(job, at)
        job(at)  # what was locked a moment ago is left for the next run
        assert job(at) == 0

    for poll in polls:
        assert actions(poll) == [("olga", "created"), ("the clock", "opened"), ("the clock", "closed"), ("the clock", "finalised")]
        poll.refresh_from_db()
        assert (poll.opened_at, poll.closed_at, poll.finalised_at) == (opens_at, closes_at, final_at)
        assert poll.version == 1
