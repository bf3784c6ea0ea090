"""What voters saw is what their votes mean: texts and rules are frozen once a poll opens; what is wrong with a text stands beside it."""

import json
import threading
from contextlib import closing
from datetime import datetime, timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now
from psycopg2.errors import CheckViolation

from polls import editing, fraud, problems, results, roles, stages
from polls.counting import count_votes
from polls.editing import LONGEST_ERRATUM, MAX_ERRATA, SHORTEST_NOTICE
from polls.journal import Act
from polls.models import JournalEntry, Option, Outcome, Poll, Reason
from polls.problems import Refusal
from tests.conftest import WEB_ROLE, make_user, option, outcome_of, signed_in, tallies, vote_of
from tests.test_following import followed, stream_of
from tests.test_intake import assert_refused
from tests.test_security_roles import cursor_of

SECOND = timedelta(seconds=1)


@pytest.fixture(scope="session")
def strangers_api(pipeline):
    make_user("frozen stranger", roles.OWNER)
    return signed_in(pipeline, "frozen stranger")


def olga(at=None, reason="A slip."):
    return Act("olga", at or now(), reason)


def texts(poll):
    return list(Option.objects.filter(poll=poll).values_list("text", "description"))


def refused(*arguments, change=editing.change_poll, **named):
    with pytest.raises(Refusal) as caught:
        change(*arguments, **named)
    return caught.value.problem


# --- Frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"title": "Dinner"}, {"description": "At eight."}, {"options": [{"text": "salad"}, {"text": "soup"}]}],
    ids=["title", "description", "options"],
)
@pytest.mark.parametrize("stage", ["about to open", "open", "closing", "final", "archived"])
def test_texts_are_frozen_from_shortly_before_the_opening_for_good(make_poll, stage, change):
    poll = make_poll(**{"about to open": {"opens_in": 2}, "open": {}}.get(stage, {"closes_in": -5}))
    if stage in ("final", "archived"):
        Poll.objects.filter(pk=poll.pk).update(finalised_at=now(), archived_at=now() if stage == "archived" else None)
    before = Poll.objects.values().get(pk=poll.pk), texts(poll)

    assert refused(poll.pk, change, olga()) is problems.POLL_IN_USE

    assert (Poll.objects.values().get(pk=poll.pk), texts(poll)) == before


def test_options_do_not_change_under_an_accepted_vote_that_nobody_has_counted_yet(make_poll):
    poll = make_poll()
    vote = vote_of(poll, "alice")  # accepted, on its way

    swapped = [{"id": str(option(poll, "soup")), "text": "salad"}, {"id": str(option(poll, "salad")), "text": "soup"}]
    assert refused(poll.pk, {"options": swapped}, olga()) is problems.POLL_IN_USE

    count_votes([vote])
    assert tallies(poll) == {"soup": 1}


@pytest.mark.parametrize("change", [{"title": "Dinner"}, {"options": [{"text": "noodles"}, {"text": "pizza"}]}], ids=["title", "options"])
def test_an_edit_that_comes_in_before_the_opening_and_is_written_after_it_is_refused(make_poll, change):
    poll = make_poll()
    before = Poll.objects.values().get(pk=poll.pk), texts(poll)

    # It came in long enough before, and waited since then.
    assert refused(poll.pk, change, olga(at=poll.opens_at - SHORTEST_NOTICE - SECOND)) is problems.POLL_IN_USE

    assert (Poll.objects.values().get(pk=poll.pk), texts(poll)) == before


def test_an_edit_waits_for_another_one_no_longer_than_the_notice_leaves_room_for(make_poll):
    poll = make_poll(opens_in=600)
    is_locked, is_done = threading.Event(), threading.Event()

    def hold():
        with closing(connection), transaction.atomic():
            Poll.objects.select_for_update(no_key=True).get(pk=poll.pk)
            is_locked.set()
            is_done.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert is_locked.wait(20)
        started = now()
        assert refused(poll.pk, {"title": "Dinner"}, olga()) is problems.UNAVAILABLE
        assert now() - started < 10 * SECOND
        assert refused(poll.pk, olga(), change=stages.open_poll) is problems.UNAVAILABLE
    finally:
        is_done.set()
        other.join()
    assert editing.change_poll(poll.pk, {"title": "Dinner"}, olga()).title == "Dinner"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE polls SET title = 'Dinner' WHERE id = %s",
        "UPDATE polls SET description = 'At eight.' WHERE id = %s",
        "UPDATE options SET text = text || '!' WHERE poll_id = %s",
        "DELETE FROM options WHERE poll_id = %s",
        "UPDATE polls SET errata = '[]' WHERE id = %s",
        "UPDATE polls SET published_at = NULL WHERE id = %s",
        "UPDATE polls SET published_at = NULL, opened_at = NULL WHERE id = %s",
        "UPDATE polls SET opens_at = now() + interval '1 second' WHERE id = %s",
        "UPDATE polls SET opens_at = opens_at - interval '1 hour' WHERE id = %s",
        "UPDATE polls SET method = 'approval' WHERE id = %s",
        "UPDATE polls SET method = 'approval', max_choices = 2 WHERE id = %s",
        "UPDATE polls SET voter_policy = 'ip' WHERE id = %s",
        "UPDATE polls SET allow_change = NOT allow_change WHERE id = %s",
        "UPDATE polls SET allow_withdrawal = NOT allow_withdrawal WHERE id = %s",
        "UPDATE polls SET results_step = 2 WHERE id = %s",
        "UPDATE polls SET results_visibility = 'always' WHERE id = %s",
    ],
)
def test_the_database_keeps_the_texts_the_errata_and_the_seal_of_an_open_poll_by_itself(make_poll, statement):
    poll = make_poll(results_visibility="sealed", results_step=10)
    editing.add_erratum(poll.pk, olga(), field="title", text="Dinner")

    with connection.cursor() as cursor, pytest.raises(IntegrityError, match="a poll that has opened keeps"):
        cursor.execute(statement, [poll.pk])


@pytest.mark.parametrize("role", [None, WEB_ROLE], ids=["as the owner of the tables", "as a web process"])
def test_no_open_poll_is_made_a_draft_or_a_scheduled_one_for_a_moment(make_poll, role):
    poll = make_poll(results_visibility="sealed")
    before = Poll.objects.values().get(pk=poll.pk), texts(poll)

    for hide in ("published_at = NULL", "opened_at = NULL, published_at = NULL", "opens_at = now() + interval '1 minute'"):
        with cursor_of(role or WEB_ROLE) as cursor:
            if role is None:
                cursor = connection.cursor()  # the table's owner
            with pytest.raises((CheckViolation, IntegrityError), match="a poll that has opened keeps"):
                cursor.execute(f"UPDATE polls SET {hide} WHERE id = %s", [str(poll.pk)])

    assert (Poll.objects.values().get(pk=poll.pk), texts(poll)) == before


def test_a_poll_that_was_opened_is_open_whatever_its_moments_say(make_poll):
    poll = make_poll(opens_in=600)
    Poll.objects.filter(pk=poll.pk).update(opened_at=now())  # by a process whose clock is ahead of the database's

    for statement in ("UPDATE options SET text = text || '!' WHERE poll_id = %s", "UPDATE polls SET published_at = NULL WHERE id = %s"):
        with connection.cursor() as cursor, pytest.raises(IntegrityError, match="a poll that has opened keeps"):
            cursor.execute(statement, [poll.pk])


def test_what_may_change_of_an_open_poll_still_changes(make_poll):
    poll = make_poll()
    at = now()
    for changes in (
        {"opened_at": at},
        {"results_step": 5},
        {"closes_at": at + timedelta(days=2), "closed_at": None},
        {"closes_at": at},
        {"closed_at": at, "holds_version": 1, "network_secret": None, "voter_salt": None},
        {"finalised_at": at},
        {"archived_at": at},
    ):
        assert Poll.objects.filter(pk=poll.pk).update(**changes) == 1
    whole = Poll.objects.get(pk=poll.pk)
    whole.save()  # every column named


def test_a_temporary_table_does_not_stand_for_the_polls(poll):
    with cursor_of(WEB_ROLE) as cursor:
        cursor.execute("CREATE TEMPORARY TABLE polls (id uuid, published_at timestamptz, opens_at timestamptz)")
        with pytest.raises(CheckViolation, match="a poll that has opened keeps"):
            cursor.execute("UPDATE options SET text = text || '!' WHERE poll_id = %s", [str(poll.pk)])


def test_the_database_lets_no_sealed_poll_begin_anew_once_it_has_ended(make_poll):
    poll = make_poll(results_visibility="sealed", opens_in=-60, closes_in=-5)
    with pytest.raises(IntegrityError, match="a poll that has opened keeps"):
        Poll.objects.filter(pk=poll.pk).update(closes_at=now() + SECOND)


def test_a_vote_from_before_for_an_option_that_is_gone_still_gets_its_outcome(make_poll):
    poll = make_poll(opens_in=600)
    vote = vote_of(poll, "alice")
    editing.change_poll(poll.pk, {"options": [{"text": "noodles"}, {"text": "pizza"}]}, olga())

    count_votes([vote])

    assert outcome_of(vote) == (Outcome.REJECTED, Reason.OPTION_UNKNOWN)


# --- How suspicious votes are looked for ------------------------------------------------------------------------------

OWN = {"one_sided": {"votes": 500, "share": 0.99}, "burst": {"off": True}}


@pytest.mark.parametrize(
    "wanted",
    [
        {**OWN, "one_sided": {"votes": 10, "share": 0.5, "odds": 1}},  # a rival's networks
        {**OWN, "one_sided": {"votes": 400, "share": 0.99}},  # nearer to the installation's, and nobody knows what that finds
        {**OWN, "one_sided": {"votes": 500}},
        {**OWN, "burst": {"off": False, "votes": 10}},
        {**OWN, "regular": {"off": True}},
        {**OWN, "busy_address": {"votes": 10}},
    ],
)
def test_an_open_polls_rules_become_the_installations_or_stay(owners_api, make_poll, wanted):
    poll = make_poll(rule_parameters=OWN, auto_quarantine=True)
    path = f"/api/v1/polls/{poll.pk}"

    assert_refused(owners_api.patch(path, {"rule_parameters": wanted}), problems.POLL_IN_USE, pointer="/rule_parameters")

    assert owners_api.patch(path, {"rule_parameters": {"one_sided": OWN["one_sided"], "burst": {}}}).status == 200
    assert fraud.parameters_of(fraud.RULES["burst"], Poll.objects.get(pk=poll.pk)) == fraud.parameters_of(fraud.RULES["burst"])
    assert owners_api.patch(path, {"rule_parameters": {}}).status == 200
    assert_refused(owners_api.patch(path, {"rule_parameters": OWN}), problems.POLL_IN_USE, pointer="/rule_parameters")


def test_automatic_quarantine_can_be_ended_while_a_poll_is_open_and_not_begun(owners_api, make_poll):
    path = f"/api/v1/polls/{make_poll(auto_quarantine=True).pk}"

    assert owners_api.patch(path, {"auto_quarantine": False}).json["auto_quarantine"] is False
    assert_refused(owners_api.patch(path, {"auto_quarantine": True}), problems.POLL_IN_USE, pointer="/auto_quarantine")


# --- Networks that no limit applies to --------------------------------------------------------------------------------

TOO_WIDE = ["0.0.0.0/0", "198.51.0.0/15", "::/0", "2001:d00::/31", "::ffff:0.0.0.0/96"]


@pytest.mark.parametrize("network", TOO_WIDE)
def test_an_allowed_network_is_no_wider_than_a_block(owners_api, make_poll, network):
    lunch = {
        "title": "Lunch",
        "options": [{"text": "soup"}, {"text": "salad"}],
        "voter_policy": "ip",
        "closes_at": (now() + timedelta(days=1)).isoformat(),
    }

    made = owners_api.post("/api/v1/polls", {**lunch, "allowed_networks": ["192.0.2.0/24", network]})

    assert made.status == 400 and made.json["errors"][0]["pointer"].startswith("#/allowed_networks/"), made.text
    for opens_in in (0, 600):
        poll = make_poll(voter_policy="ip", opens_in=opens_in)
        changed = owners_api.patch(f"/api/v1/polls/{poll.pk}", {"allowed_networks": [network]})
        assert_refused(changed, problems.INVALID, pointer="/allowed_networks/0")
    query = "mutation($input: NewPoll!) { createPoll(input: $input) { id } }"
    names = {"voterPolicy": "IP", "closesAt": lunch["closes_at"], "allowedNetworks": [network]}
    wanted = {"title": "Lunch", "options": lunch["options"], **names}
    answer = owners_api.post("/graphql", {"query": query, "variables": {"input": wanted}})
    assert answer.json["errors"][0]["extensions"]["type"] == problems.INVALID.type, answer.text


def test_the_widest_allowed_networks_are_taken(owners_api, make_poll):
    widest = ["198.51.0.0/16", "2001:db8::/32"]
    poll = make_poll(voter_policy="ip")

    assert owners_api.patch(f"/api/v1/polls/{poll.pk}", {"allowed_networks": widest}).json["allowed_networks"] == widest


def test_a_poll_with_wider_networks_from_before_goes_on_and_takes_others_beside_them(owners_api, make_poll):
    poll = make_poll(voter_policy="ip")
    Poll.objects.filter(pk=poll.pk).update(allowed_networks=["0.0.0.0/0"])
    path = f"/api/v1/polls/{poll.pk}"

    assert owners_api.patch(path, {"allowed_networks": ["0.0.0.0/0", "192.0.2.0/24"]}).status == 200
    assert_refused(
        owners_api.patch(path, {"allowed_networks": ["0.0.0.0/0", "192.0.2.0/24", "::/0"]}), problems.INVALID, pointer="/allowed_networks/2"
    )
    assert_refused(owners_api.post(f"{path}/duplicate", {}), problems.INVALID, pointer="/allowed_networks/0")


# --- Errata -----------------------------------------------------------------------------------------------------------


def test_an_erratum_stands_beside_the_old_text_in_poll_results_stream_and_graphql(owners_api, strangers_api, make_poll):
    poll = make_poll(title="What shall we have for lunch?")
    path = f"/api/v1/polls/{poll.pk}"
    soup = str(option(poll, "soup"))
    with followed(owners_api.port, stream_of(poll)) as stream:
        assert stream.next_results()["errata"] == []

        made = owners_api.post(f"{path}/errata", {"field": "title", "text": "… for dinner?", "reason": "A slip."})
        of_soup = {"field": "description", "option": soup, "text": "Leek, not onion.", "reason": "The cook says so."}
        assert owners_api.post(f"{path}/errata", of_soup).status == 201

        assert made.status == 201, made.text
        assert made.json["title"] == "What shall we have for lunch?"
        assert made.headers["etag"] == '"2-open"'
        errata = strangers_api.get(path).json["errata"]
        said = [(erratum["field"], erratum["option"], erratum["text"]) for erratum in errata]
        assert said == [("title", None, "… for dinner?"), ("description", soup, "Leek, not onion.")]
        assert all(abs((now() - datetime.fromisoformat(erratum["at"])).total_seconds()) < 60 for erratum in errata)
        while stream.next_results()["errata"] != errata:
            pass
    shown = strangers_api.get(f"{path}/results").json
    assert shown["errata"] == errata
    assert [option["text"] for option in shown["options"]] == ["soup", "salad"]
    query = f'{{ poll(id: "{poll.pk}") {{ errata }} }}'
    asked = strangers_api.post("/graphql", {"query": query}).json["data"]["poll"]
    assert asked["errata"] == errata
    assert "reason" not in json.dumps([errata, asked])


def test_errata_are_made_by_graphql_too(owners_api, strangers_api, make_poll):
    poll = make_poll()
    query = (
        f'mutation {{ addErratum(id: "{poll.pk}", field: TEXT, option: "{option(poll, "soup")}", text: "Soup!", reason: "A slip.")'
        " { errata } }"
    )

    answer = strangers_api.post("/graphql", {"query": query}).json
    assert answer["errors"][0]["extensions"]["type"] == problems.FORBIDDEN.type
    answer = owners_api.post("/graphql", {"query": query}).json
    [erratum] = answer["data"]["addErratum"]["errata"]
    assert (erratum["field"], erratum["option"], erratum["text"]) == ("text", str(option(poll, "soup")), "Soup!")


@pytest.mark.parametrize(
    ("wrong", "problem", "pointer"),
    [
        ({"text": ""}, problems.INVALID, "/text"),
        ({"text": "  "}, problems.INVALID, "/text"),
        ({"text": "x" * (LONGEST_ERRATUM + 1)}, problems.INVALID, "/text"),
        ({"text": "a\x00b"}, problems.INVALID, "/text"),
        ({"text": "Soup\nSalad"}, problems.INVALID, "/text"),
        ({"text": "\x1b[2J"}, problems.INVALID, "/text"),
        *[({"text": f"Soup {chr(sign)}dalas"}, problems.INVALID, "/text") for sign in (0x202A, 0x202E, 0x2066, 0x2069, 0x200F, 0x200B)],
        ({"text": 7}, problems.INVALID, "/text"),
        ({"field": "voter_policy"}, problems.INVALID, "/field"),
        ({"field": "text"}, problems.INVALID, "/field"),
        ({"field": "title", "option": "SOUP"}, problems.INVALID, "/field"),
        ({"field": "text", "option": "0"}, problems.UNKNOWN_OPTION, "/option"),
        ({"field": "text", "option": "x" * 5000}, problems.UNKNOWN_OPTION, "/option"),
        ({"reason": ""}, problems.INVALID, "/reason"),
        ({"reason": "x" * 501}, problems.INVALID, "/reason"),
        ({"reason": ...}, problems.INVALID, "/reason"),
        ({"at": "2020-01-01T00:00:00Z"}, problems.INVALID, "/at"),
    ],
)
def test_an_erratum_that_is_none(owners_api, make_poll, wrong, problem, pointer):
    poll = make_poll()
    body = {"field": "title", "text": "Dinner", "reason": "A slip.", **wrong}
    body = {name: value for name, value in body.items() if value is not ...}
    if body.get("option") == "SOUP":
        body["option"] = str(option(poll, "soup"))

    assert_refused(owners_api.post(f"/api/v1/polls/{poll.pk}/errata", body), problem, pointer=pointer)
    assert Poll.objects.get(pk=poll.pk).errata == []


@pytest.mark.parametrize("text", ["salad", " SALAD ", "\uff53\uff41\uff4c\uff41\uff44", "bread", "Bread", "fruit  salad"])
@pytest.mark.parametrize("field", ["text", "description"])
def test_an_erratum_gives_no_option_the_name_of_another(owners_api, make_poll, field, text):
    poll = make_poll(options=[{"text": "soup"}, {"text": "salad"}, {"text": "Fruit salad"}])
    path, soup, salad = f"/api/v1/polls/{poll.pk}/errata", str(option(poll, "soup")), str(option(poll, "salad"))
    why = {"reason": "A slip."}
    assert owners_api.post(path, {"field": "text", "option": salad, "text": "bread", **why}).status == 201

    assert_refused(owners_api.post(path, {"field": field, "option": soup, "text": text, **why}), problems.INVALID, pointer="/text")

    assert len(Poll.objects.get(pk=poll.pk).errata) == 1


def test_two_options_may_have_the_same_wrong_in_their_descriptions_and_one_its_own_name(make_poll):
    poll = make_poll()
    soup, salad = str(option(poll, "soup")), str(option(poll, "salad"))
    for which, field, text in (
        (soup, "text", "Soup"),
        (soup, "description", "With bread."),
        (salad, "description", "With bread."),
        (salad, "text", "Blattsalat mit Nüssen"),
        (None, "title", "Soup or salad?"),
    ):
        editing.add_erratum(poll.pk, olga(), field=field, text=text, option=which)
    assert len(Poll.objects.get(pk=poll.pk).errata) == 5


def test_an_option_of_another_poll_gets_no_erratum_here(make_poll):
    poll, other = make_poll(), make_poll()
    theirs = str(option(other, "soup"))
    assert refused(poll.pk, olga(), change=editing.add_erratum, field="text", text="x", option=theirs) is problems.UNKNOWN_OPTION


def test_errata_are_for_texts_that_are_frozen(make_poll):
    for poll in (make_poll(draft=True), make_poll(opens_in=600)):
        assert refused(poll.pk, olga(), change=editing.add_erratum, field="title", text="Dinner") is problems.POLL_IN_USE
    for poll in (make_poll(opens_in=2), make_poll(), make_poll(closes_in=-5)):
        assert len(editing.add_erratum(poll.pk, olga(), field="title", text="Dinner").errata) == 1


def test_an_erratum_that_is_said_again_is_said_once_and_there_are_only_so_many(make_poll):
    poll = make_poll()
    for n in range(MAX_ERRATA):
        for _ in range(2):
            editing.add_erratum(poll.pk, olga(), field="title", text=f"Dinner {n}")

    poll.refresh_from_db()
    assert (len(poll.errata), poll.version) == (MAX_ERRATA, 1 + MAX_ERRATA)
    assert refused(poll.pk, olga(), change=editing.add_erratum, field="title", text="Tea") is problems.POLL_IN_USE
    entries = JournalEntry.objects.filter(poll=poll, action="erratum")
    assert (len(entries), entries[0].reason, entries[0].changes["erratum"][1]["text"]) == (MAX_ERRATA, "A slip.", "Dinner 0")


def test_errata_cost_results_no_further_statement(make_poll):
    poll = make_poll()
    editing.add_erratum(poll.pk, olga(), field="title", text="Dinner")

    with CaptureQueriesContext(connection) as asked:
        shown = results.read_results(poll.pk, now())
    assert (len(shown["errata"]), len(asked)) == (1, 1)


def test_a_duplicate_begins_without_errata(owners_api, make_poll):
    poll = make_poll()
    editing.add_erratum(poll.pk, olga(), field="title", text="Dinner")

    assert owners_api.post(f"/api/v1/polls/{poll.pk}/duplicate", {}).json["errata"] == []
