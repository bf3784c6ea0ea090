"""Suspicious addresses in the admin: what operators see and decide there, and what auditors only look at."""

import re
import time
from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import OperationalError
from django.test import Client
from django.utils.html import escape
from django.utils.timezone import now

from polls import blocks, fraud
from polls.admin.deciding import MAX_AT_ONCE
from polls.counting import count_votes
from polls.journal import Act
from polls.models import Block, Decision, Poll, SuspiciousIP
from tests import test_cases_api
from tests.conftest import make_user, option, tallies, vote_of
from tests.test_admin import says, text_of
from tests.test_cases_api import cast, make_case

make_poll, lunch = test_cases_api.make_poll, test_cases_api.lunch  # the same cast

CASES, BLOCKS, DECISIONS = "/admin/polls/suspiciousip/", "/admin/polls/block/", "/admin/polls/decision/"
BEFORE, HONEST = {"soup": 40, "salad": 20}, {"soup": 10, "salad": 20}


def browser_of(*roles):
    user = make_user(f"desk-{uuid4().hex}", *roles)
    user.is_staff = True
    user.save()
    browser = Client(raise_request_exception=False)
    browser.force_login(user)
    return browser


@pytest.fixture
def desk(_database):
    return browser_of("operator")


@pytest.fixture
def auditors_desk(_database):
    return browser_of("auditor")


def page_of(case):
    return f"{CASES}{case.pk}/change/"


def decide(browser, case, ruling, **fields):
    """What the next page says after a button was pressed."""
    return says(browser.post(f"{CASES}{case.pk}/decide", {"ruling": ruling, "reason": "One script.", **fields}, follow=True))


def listed(page):
    """The cases in a list, by number."""
    return [int(number) for number in re.findall(r'field-case"><a[^>]*>\w+ #(\d+)<', text_of(page))]


# --- The list ---------------------------------------------------------------------------------------------------------


def test_cases_are_listed_newest_first_searched_and_filtered(desk, make_poll):
    poll = make_poll(title=f"Lunch {uuid4()}")
    old = make_case(poll, found_at=now() - timedelta(days=1), state="cleared", score=250.0)
    new = make_case(poll, kind="subnet", rule="burst")
    make_case(make_poll())

    assert listed(desk.get(CASES, {"q": poll.title})) == [new.pk, old.pk]
    assert listed(desk.get(CASES, {"q": str(poll.pk)})) == [new.pk, old.pk]
    assert listed(desk.get(CASES, {"q": poll.title, "state": "cleared"})) == [old.pk]
    assert listed(desk.get(CASES, {"q": poll.title, "rule": "burst"})) == [new.pk]
    page = text_of(desk.get(CASES, {"q": poll.title}))
    assert "192.0.2.7/32" in page and "192.0.2.0/24" in page


# --- One case ---------------------------------------------------------------------------------------------------------


def test_a_case_shows_what_helps_to_decide(desk, lunch):
    case = make_case(lunch, evidence={"votes_in_window": 42})
    neighbour = make_case(lunch, "192.0.2.8", rule="burst")

    page = text_of(desk.get(page_of(case)))

    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "3 votes from 192.0.2.7/32 in" in text and "3.5 times the rule&#x27;s threshold" in text.replace("'", "&#x27;")
    assert "votes in window 42" in text
    assert page.count('<rect class="counted"') == 1 and "30 votes within 1 minute" in text
    # Option; these voters; everybody else; votes now, if voided, if released.
    assert "soup 30 100 % 10 33 % 40 10 40" in text and "salad 0 0 % 20 67 % 20 20 20" in text
    assert "2 addresses voted" in text and "this one 30 30" in text and "no. 2 10 10" in text
    assert f"burst #{neighbour.pk} 192.0.2.8/32" in text
    assert "Nobody has decided anything yet." in text


def test_a_page_of_a_case_names_no_voter_no_vote_and_no_key(desk, lunch):
    case = make_case(lunch)
    [vote] = cast(lunch, "dora")
    for path in (page_of(case), CASES, DECISIONS, f"{CASES}{case.pk}/history/"):
        page = text_of(desk.get(path))
        for secret in (vote.voter_key, vote.vote_id, case.network_key, case.subnet_key):
            assert str(secret) not in page and secret.hex not in page


def test_what_owners_write_is_no_markup(desk, make_poll):
    evil = "<script>alert(1)</script>"
    poll = make_poll(title=evil, options=[{"text": evil}, {"text": "salad"}])
    cast(poll, "a", text=evil)
    case = make_case(poll, note=evil, reviewer=evil)
    decide(desk, case, "void", reason=evil)
    cast(poll, *(f"bot {n}" for n in range(9)), text=evil)
    for path in (CASES, page_of(case), DECISIONS, f"{CASES}try"):
        page = text_of(desk.get(path))
        assert evil not in page and escape(evil) in page, path


@pytest.mark.parametrize(
    "fields",
    [
        {"network_secret": None},
        {"poll": None},
        {"poll": None, "network_secret": None},
        {"kind": "subnet"},
        {"signature_key": 7},
        {"evidence": {f"number_{n}": n / 7 for n in range(1000)}},
        {"evidence": {}},
        {"rule": "of_the_past"},
    ],
)
def test_every_kind_of_case_has_its_page_and_its_line(desk, lunch, fields):
    case = make_case(lunch, **fields)

    assert "Decide" in text_of(desk.get(page_of(case)))
    assert case.pk in listed(desk.get(CASES))
    assert ("unreadable by now" in text_of(desk.get(CASES, {"q": str(lunch.pk)}))) == (fields == {"network_secret": None})
    for ruling in ("void", "clear"):
        assert decide(desk, case, ruling)
        text_of(desk.get(page_of(case)))


def test_a_case_of_an_approval_poll_and_one_without_votes_have_pages(desk, make_poll):
    poll = make_poll(method="approval")
    count_votes([vote_of(poll, "a", "soup", "salad", address="192.0.2.7")])
    page = text_of(desk.get(page_of(make_case(poll))))
    assert "What they voted for" in page and "fewer than 10 voters" in page and "soup" not in page
    assert "It has no votes any more." in text_of(desk.get(page_of(make_case(poll, "198.51.100.1"))))


def test_what_is_no_case_has_no_page(desk):
    for path in (f"{CASES}999999999/change/", f"{CASES}x/change/", f"{CASES}999999999/decide"):
        assert desk.get(path).status_code == 404
    assert desk.post(f"{CASES}999999999/decide", {"ruling": "void", "reason": "x"}).status_code == 404


# --- The buttons ------------------------------------------------------------------------------------------------------


def test_the_buttons_rule_and_tell_what_changed(desk, lunch):
    case = make_case(lunch)
    for ruling, told, left, state in [
        ("quarantine", "30 votes held out of the tally: soup 40 → 10.", HONEST, "open"),
        ("release", "30 votes put back: soup 10 → 40.", BEFORE, "open"),
        ("void", "30 votes left out for good: soup 40 → 10.", HONEST, "confirmed"),
        ("void", "No vote changed.", HONEST, "confirmed"),
        ("clear", "30 votes put back: soup 10 → 40.", BEFORE, "cleared"),
    ]:
        assert decide(desk, case, ruling) == [told]
        assert tallies(lunch) == left
        case.refresh_from_db()
        assert (case.state, case.note) == (state, "One script.")
        page = text_of(desk.get(page_of(case)))
        assert told in page and "One script." in page
    assert "30 votes left out for good: soup 40 → 10." in text_of(desk.get(DECISIONS))


def test_the_page_says_beforehand_what_a_button_would_change(desk, lunch):
    case = make_case(lunch)
    decide(desk, case, "quarantine")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text_of(desk.get(page_of(case)))))
    assert "soup 30 100 % 10 33 % 10 10 40" in text
    assert "In force since" in text


def test_a_network_is_blocked_from_its_case(desk, lunch):
    case = make_case(lunch, "198.18.113.90")

    [told] = decide(desk, case, "block", network="198.18.113.90", hours="2")

    assert told.startswith("Blocked until ")
    block = Block.objects.get(network="198.18.113.90/32")
    assert (block.case, block.reason) == (case, "One script.")
    assert "198.18.113.90/32" in text_of(desk.get(page_of(case)))


@pytest.mark.parametrize(
    "sent",
    [
        {"ruling": "void", "reason": ""},
        {"ruling": "void", "reason": " "},
        {"ruling": "void", "reason": "x" * 501},
        {"ruling": "void"},
        {"ruling": "win", "reason": "x"},
        {"reason": "x"},
        {"ruling": "block", "reason": "x"},
        {"ruling": "block", "reason": "x", "network": "198.18.113.91", "hours": "0"},
        {"ruling": "block", "reason": "x", "network": "198.18.113.91", "hours": "soon"},
        {"ruling": "block", "reason": "x", "network": "203.0.0.0/8", "hours": "1"},
        {"ruling": "block", "reason": "", "network": "198.18.113.91", "hours": "1"},
    ],
)
def test_a_wrong_button_changes_nothing_and_says_so(desk, lunch, sent):
    case = make_case(lunch)
    page = desk.post(f"{CASES}{case.pk}/decide", sent, follow=True)
    assert says(page) and page.redirect_chain == [(page_of(case), 302)]
    assert tallies(lunch) == BEFORE
    assert not Decision.objects.filter(cases__contains=[case.pk]).exists()


def test_looking_at_the_buttons_address_decides_nothing(desk, lunch):
    case = make_case(lunch)
    assert desk.get(f"{CASES}{case.pk}/decide?ruling=void&reason=x")["location"] == page_of(case)
    assert tallies(lunch) == BEFORE


def test_another_sites_form_decides_nothing(lunch):
    case, browser = make_case(lunch), Client(enforce_csrf_checks=True)
    user = make_user(f"desk-{uuid4().hex}", "operator")
    user.is_staff = True
    user.save()
    browser.force_login(user)
    assert browser.post(f"{CASES}{case.pk}/decide", {"ruling": "void", "reason": "x"}).status_code == 403
    assert tallies(lunch) == BEFORE


# --- Several at once --------------------------------------------------------------------------------------------------


def selection(action, *rows, **more):
    return {"action": action, "_selected_action": [row.pk for row in rows], **more}


@pytest.mark.parametrize(
    ("action", "state", "left"), [("quarantine", "open", {"salad": 20}), ("void", "confirmed", {"salad": 20}), ("clear", "cleared", BEFORE)]
)
def test_several_cases_are_ruled_on_with_one_reason(desk, lunch, action, state, left):
    chosen = [make_case(lunch), make_case(lunch, "192.0.2.8")]
    other = make_case(lunch, "198.51.100.1")

    asked = text_of(desk.post(CASES, selection(action, *chosen)))
    assert f"{action.capitalize()} 2 cases" in asked and tallies(lunch) == BEFORE
    assert "This field is required." in text_of(desk.post(CASES, selection(action, *chosen, reason=" ")))
    assert tallies(lunch) == BEFORE

    told = says(desk.post(CASES, selection(action, *chosen, reason="One script."), follow=True))

    assert len(told) == 2 and tallies(lunch) == left
    assert {case.state for case in SuspiciousIP.objects.filter(pk__in=[case.pk for case in chosen])} == {state}
    other.refresh_from_db()
    assert (other.state, other.reviewer) == ("open", "")


def test_not_too_many_are_ruled_on_at_once(desk, lunch, monkeypatch):
    monkeypatch.setattr("polls.admin.deciding.MAX_AT_ONCE", 1)
    assert MAX_AT_ONCE > 1
    chosen = [make_case(lunch), make_case(lunch, "192.0.2.8")]
    assert says(desk.post(CASES, selection("void", *chosen, reason="x"), follow=True)) == ["Select at most 1 at once."]
    assert tallies(lunch) == BEFORE


# --- Blocks -----------------------------------------------------------------------------------------------------------


def test_a_block_is_made_listed_and_lifted(desk, auditors_desk):
    assert "Block a network" in text_of(desk.get(f"{BLOCKS}add/"))
    made = desk.post(f"{BLOCKS}add/", {"network": "198.18.113.99/24", "hours": "2", "reason": "Guesses codes."}, follow=True)
    assert made.redirect_chain == [(BLOCKS, 302)] and says(made)[0].startswith("Blocked until ")
    assert "198.18.113.0/24" in text_of(desk.get(BLOCKS))
    assert "198.18.113" not in text_of(auditors_desk.get(BLOCKS)) and "Guesses codes." in text_of(auditors_desk.get(BLOCKS))
    block = Block.objects.get(network="198.18.113.0/24")
    assert desk.get(f"{BLOCKS}{block.pk}/change/")["location"] == BLOCKS

    assert "Reason" in text_of(desk.post(BLOCKS, selection("lift", block)))
    assert Block.objects.filter(pk=block.pk).exists()
    assert len(says(desk.post(BLOCKS, selection("lift", block, reason="A school."), follow=True))) == 1
    assert not Block.objects.filter(pk=block.pk).exists()


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"network": "soup", "hours": "1", "reason": "x"},
        {"network": "203.0.0.0/8", "hours": "1", "reason": "x"},
        {"network": "198.18.113.92", "hours": "0", "reason": "x"},
        {"network": "198.18.113.92", "hours": "8785", "reason": "x"},
        {"network": "198.18.113.92", "hours": "1", "reason": " "},
    ],
)
def test_a_wrong_block_is_told(desk, sent):
    assert "errorlist" in text_of(desk.post(f"{BLOCKS}add/", sent))
    assert not Block.objects.filter(network__startswith="198.18.113.92").exists()


# --- Trying a rule ----------------------------------------------------------------------------------------------------


def test_a_rule_is_tried(desk, make_poll):
    poll = make_poll()
    cast(poll, *(f"bot {n}" for n in range(12)), at=int(time.time()) - 600 - 1_800_000_000)
    for rule in fraud.RULES:
        assert f"<h2>{rule}</h2>" in text_of(desk.get(f"{CASES}try", {"rule": rule}))

    page = desk.post(f"{CASES}try?rule=busy_address", {"reason": "to see", "poll": str(poll.pk), "votes": "10", "minutes": "60"})

    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text_of(page)))
    assert "1 network would be flagged: 12 votes of 12 voters." in text
    assert "soup 12 0" in text and "192.0.2.7/32" in text
    assert not SuspiciousIP.objects.filter(poll=poll).exists() and tallies(poll) == {"soup": 12}
    everywhere = desk.post(f"{CASES}try?rule=busy_address", {"reason": "to see", "poll": "", "votes": "10", "minutes": "60"})
    assert "would be flagged" in text_of(everywhere)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"poll": "lunch"}, "Enter a valid UUID."),
        ({"reason": ""}, "This field is required."),
        ({"poll": str(uuid4())}, "No poll has this id."),
        ({"votes": "many"}, "Enter a number."),
        ({"votes": "1"}, "greater than or equal to 10"),
        ({"votes": "inf"}, "Enter a number."),
    ],
)
def test_a_wrong_trial_is_told(desk, sent, told):
    page = text_of(desk.post(f"{CASES}try?rule=busy_address", {"reason": "to see", "poll": "", "votes": "10", "minutes": "60", **sent}))
    assert told in page and "would be flagged" not in page


def test_a_trial_that_takes_too_long_is_told(desk, monkeypatch):
    def cancelled(*_, **__):
        raise OperationalError("canceling statement due to statement timeout")

    monkeypatch.setattr(fraud, "try_rule", cancelled)
    page = text_of(desk.post(f"{CASES}try?rule=busy_address", {"reason": "to see", "poll": "", "votes": "10", "minutes": "60"}))
    assert "That took too long" in page and "would be flagged" not in page


def test_a_rule_about_choices_is_tried_as_it_is_in_force_by_who_may_read_the_results(desk, make_poll):
    """Else its thresholds told the network's tally."""
    poll = make_poll(results_visibility="owner")
    cast(poll, *(f"bot {n}" for n in range(12)), at=int(time.time()) - 600 - 1_800_000_000)
    for rule in (rule.name for rule in fraud.RULES.values() if rule.is_about_choices):
        form = text_of(desk.get(f"{CASES}try", {"rule": rule}))
        assert 'name="share"' not in form and "parameters in force" in form
        sent = {"reason": "to see", "poll": str(poll.pk), "share": "0.5", "odds": "1", "votes": "10"}
        page = text_of(desk.post(f"{CASES}try?rule={rule}", sent))
        assert "who may read the poll&#x27;s results now" in page and "would be flagged" not in page


def test_a_rule_that_is_none_shows_the_first(desk):
    assert "<h2>busy_address</h2>" in text_of(desk.get(f"{CASES}try", {"rule": "none_such"}))


# --- Who may ----------------------------------------------------------------------------------------------------------


def test_auditors_look_without_networks_and_buttons(auditors_desk, lunch):
    case = make_case(lunch)
    make_case(lunch, "192.0.2.8")

    for path in (CASES, page_of(case), DECISIONS, BLOCKS):
        page = text_of(auditors_desk.get(path))
        assert "192.0.2" not in page, path
        assert "Quarantine" not in page and "Try a rule" not in page and "Lift" not in page, path
    assert auditors_desk.post(f"{CASES}{case.pk}/decide", {"ruling": "void", "reason": "x"}).status_code == 403
    assert auditors_desk.get(f"{CASES}try").status_code == 403
    assert auditors_desk.get(f"{BLOCKS}add/").status_code == 403
    assert auditors_desk.post(f"{BLOCKS}add/", {"network": "198.18.113.93", "hours": "1", "reason": "x"}).status_code == 403
    auditors_desk.post(CASES, selection("void", case, reason="x"))
    block = blocks.block("198.18.113.94", now() + timedelta(hours=1), Act("otto", now(), "x"))
    auditors_desk.post(BLOCKS, selection("lift", block, reason="x"))
    assert Block.objects.filter(pk=block.pk).exists()
    assert tallies(lunch) == BEFORE


@pytest.mark.parametrize("role", ["owner", None])
def test_others_see_nothing(lunch, role):
    browser, case = browser_of(*([role] if role else [])), make_case(lunch)
    for path in (CASES, page_of(case), f"{CASES}try", BLOCKS, f"{BLOCKS}add/", DECISIONS):
        assert browser.get(path).status_code == 403, path
    assert browser.post(f"{CASES}{case.pk}/decide", {"ruling": "void", "reason": "x"}).status_code == 403
    assert tallies(lunch) == BEFORE


def test_nothing_here_is_changed_or_deleted_by_hand(desk, lunch):
    case = make_case(lunch)
    decide(desk, case, "void")
    decision = Decision.objects.filter(cases__contains=[case.pk]).latest("id")
    for path in (f"{CASES}{case.pk}/delete/", f"{CASES}add/", f"{DECISIONS}{decision.pk}/delete/", f"{DECISIONS}add/"):
        assert desk.get(path).status_code == 403 and desk.post(path, {"post": "yes"}).status_code == 403, path
    assert desk.post(f"{DECISIONS}{decision.pk}/change/", {"reason": "Another."}).status_code == 403
    desk.post(page_of(case), {"state": "open"})
    case.refresh_from_db()
    assert (case.state, Poll.objects.get(pk=lunch.pk).title) == ("confirmed", lunch.title)
    assert option(lunch, "soup")
