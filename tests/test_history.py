"""What everybody may know of what was done to a poll, and that nobody covers it up."""

from datetime import timedelta

import pytest
from django.db import InternalError, connection, transaction
from django.utils.timezone import now

from polls import closing, codes, editing, integrity, problems, review, stages
from polls.counting import count_votes
from polls.holds import Selector
from polls.journal import LONGEST_PUBLIC, Act
from polls.models import JournalEntry, Poll, Ruling, Tally
from tests.conftest import WEB_ROLE, Api, option, vote_of
from tests.test_intake import assert_refused
from tests.test_results import vote_time
from tests.test_security_roles import cursor_of

SECRETS = ("olga", "otto", "kiosk", "The cook is ill")


@pytest.fixture(scope="session")
def anonymous(pipeline):
    return Api(pipeline, {})


def olga():
    return Act("olga", now(), "The cook is ill.")


def history(api, poll, query=""):
    """The poll's history, oldest first: [(action, changed, changes)]"""
    answer = api.get(f"/api/v1/polls/{poll.pk}/history{query}")
    assert answer.status == 200, answer.text
    assert not any(secret in answer.text for secret in SECRETS)
    return [(entry["action"], entry["changed"], entry["changes"]) for entry in reversed(answer.json["results"])]


def test_everybody_reads_what_happened_without_names_and_reasons(anonymous, make_poll):
    poll = make_poll(opens_in=600, title="Lunch")
    editing.change_poll(poll.pk, {"title": "Dinner"}, olga())
    stages.open_poll(poll.pk, olga())
    editing.add_erratum(poll.pk, olga(), field="title", text="Supper")
    stages.extend_poll(poll.pk, olga(), poll.closes_at + timedelta(days=1))
    stages.close_poll(poll.pk, olga())
    Poll.objects.filter(pk=poll.pk).update(closes_at=now())
    closing.close_expired_polls(now())

    found = history(anonymous, poll)

    assert [action for action, _, _ in found] == ["created", "changed", "opened", "erratum", "extended", "closed", "closed"]
    assert found[1] == ("changed", ["title"], {"title": ["Lunch", "Dinner"]})
    assert found[2][2]["status"] == ["scheduled", "open"]
    assert found[3][2]["erratum"][1]["text"] == "Supper"
    assert found[4][1] == ["closes_at", *(["closed_at"] if "closed_at" in found[4][1] else [])]


def test_what_happened_to_a_draft_is_no_ones_business_and_what_came_after_is(anonymous, owners_api, make_poll):
    poll = make_poll(draft=True, opens_in=600)
    editing.change_poll(poll.pk, {"title": "A secret plan"}, olga())
    path = f"/api/v1/polls/{poll.pk}/history"

    assert_refused(anonymous.get(path), problems.UNKNOWN_POLL)
    draft = owners_api.get(path)
    assert [entry["action"] for entry in draft.json["results"]] == ["created"]
    assert draft.headers["cache-control"] == "no-store"

    editing.change_poll(poll.pk, {"title": "Lunch"}, olga())
    stages.publish_poll(poll.pk, olga())
    editing.change_poll(poll.pk, {"description": "At eight."}, olga())

    assert [action for action, _, _ in history(anonymous, poll)] == ["created", "published", "changed"]
    answer = anonymous.get(path)
    assert "secret plan" not in answer.text
    assert (answer.headers["cache-control"], answer.headers["vary"]) == ("public, max-age=5", "Authorization")


def test_of_limits_and_rules_it_is_told_that_they_changed_and_not_how(anonymous, make_poll):
    poll = make_poll(voter_policy="ip", address_limit=4711, auto_quarantine=True, rule_parameters={"burst": {"votes": 4711}})
    changes = {"address_limit": None, "allowed_networks": ["198.51.100.0/24"], "auto_quarantine": False, "rule_parameters": {}}
    editing.change_poll(poll.pk, changes, olga())

    [_, (action, changed, shown)] = history(anonymous, poll)

    assert (action, changed, shown) == ("changed", sorted(changes), {})
    assert "4711" not in anonymous.get(f"/api/v1/polls/{poll.pk}/history").text


def test_rulings_recounts_and_codes_are_facts_without_numbers(anonymous, make_poll):
    poll = make_poll()
    count_votes([vote_of(poll, f"voter {number}", at=number) for number in range(4711)])
    everything = Selector(None, None, None, vote_time(0), vote_time(9999))
    for ruling in (Ruling.QUARANTINE, Ruling.RELEASE, Ruling.VOID):
        review.rule(poll.pk, [everything], ruling, Act("otto", now(), "They look alike."))
    Tally.objects.filter(poll=poll).update(votes=4711)
    integrity.recount(poll.pk, Act("otto", now()))

    found = history(anonymous, poll)

    assert found[1:] == [(action, ["results"], {}) for action in ("quarantined", "released", "voided", "recounted")]
    text = anonymous.get(f"/api/v1/polls/{poll.pk}/history").text
    assert "4711" not in text and f'"{option(poll, "soup")}":' not in text  # as a tally names it; a date may hold the number

    election = make_poll(voter_policy="code")
    codes.generate(election, 4711, olga())
    assert history(anonymous, election)[1] == ("codes_added", ["codes"], {})


def test_pages_are_bounded_in_number_and_length(anonymous, make_poll):
    poll = make_poll(opens_in=600)
    long = [{"text": f"{n} {'x' * 190}", "description": "y" * 2000} for n in range(100)]
    editing.change_poll(poll.pk, {"options": long}, olga())
    for n in range(60):
        editing.change_poll(poll.pk, {"description": f"{n}" * (LONGEST_PUBLIC // 8)}, olga())
    path = f"/api/v1/polls/{poll.pk}/history"

    page = anonymous.get(path)
    assert len(page.json["results"]) == 50 and len(page.text) < 51 * (LONGEST_PUBLIC + 500)
    rest = anonymous.get(page.json["next"].split(str(anonymous.port))[1]).json
    assert [entry["changed"] for entry in rest["results"]][-2:] == [["options"], ["status"]]
    assert [entry["changes"] for entry in rest["results"]][-2] is None  # of this length, only that there was a change
    assert_refused(anonymous.get(f"{path}?page_size=51"), problems.INVALID, pointer="/page_size")
    assert_refused(anonymous.get(f"{path}?cursor=x"), problems.INVALID, pointer="/cursor")


def test_who_sees_an_archived_poll_reads_its_history_and_nobody_that_of_one_that_is_not_there(anonymous, make_poll):
    poll = make_poll(opens_in=600)
    stages.archive_poll(poll.pk, olga())

    assert [action for action, _, _ in history(anonymous, poll)] == ["created", "archived"]
    assert_refused(anonymous.get("/api/v1/polls/7c0a5b0e-0000-4000-8000-000000000000/history"), problems.UNKNOWN_POLL)


# --- Only ever added --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE journal SET reason = 'Nothing happened.' WHERE poll_id = %s",
        "DELETE FROM journal WHERE poll_id = %s",
        "WITH gone AS (DELETE FROM journal WHERE poll_id = %s RETURNING 1) SELECT count(*) FROM gone",
    ],
)
def test_an_entry_of_the_journal_can_not_be_changed_or_deleted_whoever_asks(make_poll, statement):
    poll = make_poll()
    before = list(JournalEntry.objects.filter(poll=poll).values())

    with connection.cursor() as cursor, pytest.raises(InternalError, match="never changed or deleted"):
        cursor.execute(statement, [poll.pk])  # as the owner of the table

    assert list(JournalEntry.objects.filter(poll=poll).values()) == before


def test_the_journal_can_not_be_emptied():
    with connection.cursor() as cursor, pytest.raises(InternalError, match="never changed or deleted"):
        cursor.execute("TRUNCATE journal")
    assert JournalEntry.objects.exists()


def test_a_draft_goes_with_its_journal_and_a_poll_that_was_made_one_again_does_not(make_poll):
    draft, published = make_poll(draft=True), make_poll(draft=True, opens_in=600)
    for poll in (draft, published):
        editing.change_poll(poll.pk, {"title": "Dinner"}, olga())
    stages.publish_poll(published.pk, olga())

    editing.delete_poll(draft.pk, olga())
    assert not JournalEntry.objects.filter(poll_id=draft.pk).exists()

    with cursor_of(WEB_ROLE) as cursor:
        cursor.execute("UPDATE polls SET published_at = NULL WHERE id = %s", [str(published.pk)])
        with pytest.raises(Exception, match="never changed or deleted"):
            cursor.execute("SELECT delete_draft(%s)", [str(published.pk)])
    assert JournalEntry.objects.filter(poll=published, action="published").exists()


def test_no_entry_of_a_draft_is_changed_either(make_poll):
    poll = make_poll(draft=True)
    with pytest.raises(InternalError, match="never changed or deleted"), transaction.atomic():
        JournalEntry.objects.filter(poll=poll).update(reason="x")
