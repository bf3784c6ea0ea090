"""The operator's desk: what it shows, what little it changes, and that nobody sees there who voted what."""

import re
import socket
import time
from datetime import timedelta
from uuid import uuid4

import pytest
from django.conf import settings as project
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.messages.storage.fallback import FallbackStorage
from django.test import Client, RequestFactory
from django.urls import reverse
from django.utils.timezone import now

from polls import deadletters, roles, voters
from polls.admin.polls import PollAdmin
from polls.admin.read_only import StrictAdmin
from polls.bundles import AcceptedVote
from polls.counting import count_votes
from polls.models import (
    ApiClient,
    Attempts,
    Block,
    DeadLetterDesk,
    Decision,
    JournalEntry,
    NetworkSecret,
    Option,
    OutboxBundle,
    PipelineDesk,
    Poll,
    ResultsVisibility,
    Scope,
    SuspiciousIP,
    Tally,
    Vote,
    VoteAside,
)
from tests.conftest import PASSWORD, bundle_of, standing, tallies, vote_of, wait_until

POLLS, CLIENTS, TALLIES = "/admin/polls/poll/", "/admin/polls/apiclient/", "/admin/polls/tally/"
DEAD, REPLAY = "/admin/polls/deadletterdesk/", "/admin/polls/deadletterdesk/replay"


@pytest.fixture(scope="session")
def operator(_database):
    return get_user_model().objects.create_superuser("otto", password=PASSWORD)


@pytest.fixture
def desk(operator):
    """A browser in which the operator is signed in; wrong requests raise nothing, as in production."""
    browser = Client(raise_request_exception=False)
    browser.force_login(operator)
    return browser


@pytest.fixture
def make_staff(_database):
    def make_staff(*permissions):
        """A browser in which somebody is signed in who is staff, but no superuser."""
        user = get_user_model().objects.create_user(f"staff {uuid4()}", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
        browser = Client(raise_request_exception=False)
        browser.force_login(user)
        return browser

    return make_staff


def text_of(page):
    assert page.status_code == 200, page
    return page.content.decode()


def titles(page):
    """The titles in the list of polls."""
    return re.findall(r'field-title"><a[^>]*>([^<]*)<', text_of(page))


def says(page):
    """The messages on top of a page."""
    return [message.message for message in page.context["messages"]]


def complaints(page):
    return {field: [str(complaint) for complaint in found] for field, found in page.context["adminform"].form.errors.items()}


# --- Who may ----------------------------------------------------------------------------------------------------------


def test_without_signing_in_there_is_only_the_way_in(poll):
    for path in ["/admin/", POLLS, f"{POLLS}{poll.pk}/change/", CLIENTS, f"{CLIENTS}add/", TALLIES, DEAD, REPLAY, "/admin/auth/user/"]:
        for answer in (Client().get(path), Client().post(path)):
            assert (answer.status_code, answer["location"]) == (302, f"/admin/login/?next={path}"), path


def test_a_password_opens_it_to_staff_and_to_nobody_else(operator, owner):
    def sign_in(name, password):
        browser = Client()
        browser.post("/admin/login/", {"username": name, "password": password, "next": "/admin/"})
        return browser.get("/admin/").status_code

    assert sign_in("otto", PASSWORD) == 200
    assert sign_in("otto", "guess") == 302
    assert sign_in("olga", PASSWORD) == 302  # owns polls, is no staff


def test_staff_see_only_what_they_were_permitted(make_staff, poll):
    staff = make_staff("view_poll")

    assert poll.title in text_of(staff.get(POLLS))
    assert staff.post(f"{POLLS}{poll.pk}/change/", {"title": "Mine", "description": ""}).status_code == 403
    for path in [CLIENTS, TALLIES, DEAD, REPLAY, f"{CLIENTS}add/"]:
        assert staff.get(path).status_code == 403, path
    assert Poll.objects.get(pk=poll.pk).title == poll.title


# --- Nobody sees who voted what -----------------------------------------------------------------------------------------


def test_votes_and_outcomes_have_no_page():
    shown = set(admin.site._registry)

    assert {model for model in shown if model._meta.app_label == "polls"} == {
        Poll,
        Tally,
        ApiClient,
        DeadLetterDesk,
        PipelineDesk,
        SuspiciousIP,
        Block,
        Decision,
    }
    secret = {Vote, VoteAside, OutboxBundle, Attempts, NetworkSecret}
    assert not shown & secret
    for model, page in admin.site._registry.items():
        assert not {inline.model for inline in page.inlines} & (secret | {Option}), model


def test_no_page_names_a_voter_key_or_a_vote(desk, make_poll):
    poll = make_poll(allow_change=True)
    cast = [vote_of(poll, "alice", "soup", at=1), vote_of(poll, "alice", "salad", at=2), vote_of(poll, "bob")]
    count_votes(cast)
    assert len(standing(poll)) == 2
    tally = Tally.objects.filter(poll=poll).first()
    pages = [f"{POLLS}{poll.pk}/{page}/" for page in ("change", "history")] + [f"{TALLIES}{tally.pk}/change/", "/admin/"]
    pages += [f"/admin/{model._meta.app_label}/{model._meta.model_name}/" for model in admin.site._registry]
    pages += [f"{TALLIES}?q={poll.pk}"]

    for path in pages:
        page = text_of(desk.get(path))
        for vote in cast:
            for secret in (vote.voter_key, vote.vote_id):
                assert str(secret) not in page and secret.hex not in page, path
    for listing in (POLLS, TALLIES):
        for vote in cast:
            assert "field-" not in text_of(desk.get(listing, {"q": str(vote.voter_key)}))


# --- Polls ------------------------------------------------------------------------------------------------------------


def test_polls_are_listed_newest_first_searched_and_filtered(desk, make_poll):
    word = uuid4().hex
    wanted = {
        "scheduled": make_poll(title=f"{word} later", opens_in=600),
        "open": make_poll(title=f"{word} now", voter_policy="ip"),
        "closing": make_poll(title=f"{word} over", closes_in=-60),
        "draft": make_poll(title=f"{word} draft", draft=True),
    }
    newest_first = [poll.title for poll in reversed(wanted.values())]

    assert titles(desk.get(POLLS, {"q": word})) == newest_first
    assert titles(desk.get(POLLS))[: len(wanted)] == newest_first
    for status, poll in wanted.items():
        assert titles(desk.get(POLLS, {"q": word, "status": status})) == [poll.title]
        assert titles(desk.get(POLLS, {"q": str(poll.pk)})) == [poll.title]
    assert titles(desk.get(POLLS, {"q": word, "voter_policy__exact": "ip"})) == [wanted["open"].title]
    assert titles(desk.get(POLLS, {"q": f"olga {word}"})) == newest_first
    assert titles(desk.get(POLLS, {"q": uuid4().hex})) == []


@pytest.mark.parametrize("query", [{"q": "\x00"}, {"q": "' OR 1=1 --"}, {"status": "x"}, {"o": "1.2.3.4.5.6"}, {"o": "x"}, {"p": "99"}])
def test_a_list_that_is_asked_for_nonsense(desk, query):
    assert desk.get(POLLS, query).status_code in (200, 302)


def test_a_poll_shows_its_results_as_the_api_does(desk, poll):
    count_votes([vote_of(poll, "alice"), vote_of(poll, "bob"), vote_of(poll, "carol", "salad")])

    page = text_of(desk.get(f"{POLLS}{poll.pk}/change/"))

    rows = [re.findall(r"<td>([^<]*)</td>", row)[:4] for row in re.findall(r"<tr><td>.*?</tr>", page)]
    assert rows == [["1", "soup", "2", "66.7%"], ["2", "salad", "1", "33.3%"]]


def test_what_voters_wrote_is_shown_as_text(desk, make_poll):
    poll = make_poll(title="<b>bold</b>", options=[{"text": "<script>alert(1)</script>"}, {"text": "salad"}])

    page = text_of(desk.get(f"{POLLS}{poll.pk}/change/"))

    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<b>bold" not in page + text_of(desk.get(POLLS))


# What a browser sends for the part of the form that can't be filled in.
NO_JOURNAL = {"journal-TOTAL_FORMS": "0", "journal-INITIAL_FORMS": "0"}


def test_title_and_description_can_be_mended_until_the_poll_opens_and_nothing_else(desk, make_poll):
    poll = make_poll(opens_in=600)
    path = f"{POLLS}{poll.pk}/change/"
    assert list(desk.get(path).context["adminform"].form.fields) == ["title", "description"]
    before = Poll.objects.values().get(pk=poll.pk)
    forged = {
        "voter_policy": "ip",
        "allow_change": "on",
        "opens_at_0": "2020-01-01",
        "closes_at": "2090-01-01",
        "owner": "1",
        "id": str(uuid4()),
    }

    saved = desk.post(path, {"title": "Dinner", "description": "At eight.", **NO_JOURNAL, **forged})

    assert saved.status_code == 302
    assert Poll.objects.values().get(pk=poll.pk) == {**before, "title": "Dinner", "description": "At eight.", "version": 2}
    entry = JournalEntry.objects.filter(poll=poll).last()
    assert (entry.actor, entry.action) == ("otto", "changed")
    assert entry.changes == {"title": [poll.title, "Dinner"], "description": ["", "At eight."]}

    Poll.objects.filter(pk=poll.pk).update(opens_at=now())
    assert list(desk.get(path).context["adminform"].form.fields) == []
    desk.post(path, {"title": "Breakfast", "description": "At eight.", **NO_JOURNAL})
    assert Poll.objects.get(pk=poll.pk).title == "Dinner"


def test_a_poll_shows_its_journal_and_nobody_rewrites_it(desk, make_poll):
    poll = make_poll(opens_in=600)
    path = f"{POLLS}{poll.pk}/change/"
    desk.post(path, {"title": "Dinner", "description": "", **NO_JOURNAL})
    entry = JournalEntry.objects.filter(poll=poll).last()
    written = list(JournalEntry.objects.filter(poll=poll).values())

    page = text_of(desk.get(path))
    assert "in the admin" in page and "&quot;title&quot;" in page
    forged = {"journal-TOTAL_FORMS": "2", "journal-INITIAL_FORMS": "1", "journal-0-id": entry.pk, "journal-0-poll": str(poll.pk)}
    forged |= {"journal-0-actor": "nobody", "journal-0-DELETE": "on", "journal-1-poll": str(poll.pk), "journal-1-actor": "nobody"}
    desk.post(path, {"title": "Dinner", "description": "", **forged})

    assert list(JournalEntry.objects.filter(poll=poll).values()) == written


@pytest.mark.parametrize(
    ("field", "text"),
    [("title", ""), ("title", "   "), ("title", "x" * 201), ("title", "a\x00b"), ("description", "x" * 5001), ("description", "a\x00b")],
)
def test_words_that_a_poll_can_not_have_change_nothing(desk, make_poll, field, text):
    poll = make_poll(opens_in=600)
    before = Poll.objects.values().get(pk=poll.pk)

    page = desk.post(f"{POLLS}{poll.pk}/change/", {"title": "Dinner", "description": "At eight.", **NO_JOURNAL, field: text})

    assert page.status_code == 200
    assert list(complaints(page)) == [field]
    assert complaints(page)[field][0] in text_of(page)
    assert Poll.objects.values().get(pk=poll.pk) == before


def test_a_form_without_its_fields_changes_nothing(desk, make_poll):
    poll = make_poll(opens_in=600)
    page = desk.post(f"{POLLS}{poll.pk}/change/", {})
    assert complaints(page) == {"title": ["This field is required."]}


def saved(poll, operator, **words):
    """Save the poll as the form of its page does, as it was read before; what the page then says."""
    for name, text in words.items():
        setattr(poll, name, text)
    request = RequestFactory().post("/")
    request.user = operator
    request.session = {}
    request._messages = FallbackStorage(request)
    PollAdmin(Poll, admin.site).save_model(request, poll, None, change=True)
    return [message.message for message in request._messages]


def test_mending_words_never_takes_back_what_the_clock_or_the_api_wrote_meanwhile(make_poll, operator):
    poll = make_poll(opens_in=600)
    as_the_form_read_it = Poll.objects.get(pk=poll.pk)
    closes_at = now() + timedelta(days=9)
    Poll.objects.filter(pk=poll.pk).update(closes_at=closes_at)

    assert saved(as_the_form_read_it, operator, title="Dinner") == []

    poll.refresh_from_db()
    assert (poll.title, poll.closes_at) == ("Dinner", closes_at)


def test_words_that_are_mended_after_the_poll_has_opened_stay_and_the_page_says_why(make_poll, operator):
    poll = make_poll(opens_in=600)
    as_the_form_read_it = Poll.objects.get(pk=poll.pk)
    Poll.objects.filter(pk=poll.pk).update(opens_at=now())

    [told] = saved(as_the_form_read_it, operator, title="Dinner")

    assert "can't change any more" in told
    assert Poll.objects.get(pk=poll.pk).title == poll.title


def test_polls_are_neither_made_nor_deleted_here(desk, poll):
    polls = Poll.objects.count()

    for path in (f"{POLLS}add/", f"{POLLS}{poll.pk}/delete/"):
        assert desk.get(path).status_code == 403
        assert desk.post(path, {"title": "Mine", "description": "", "post": "yes"}).status_code == 403
    desk.post(POLLS, {"action": "delete_selected", "_selected_action": str(poll.pk), "post": "yes"})

    assert Poll.objects.count() == polls
    listing = text_of(desk.get(POLLS))
    assert "delete_selected" not in listing and f"{POLLS}add/" not in listing


# The same in every process: tests that run side by side are known by their names.
NOBODYS_ID = "7c0a5b0e-0000-4000-8000-000000000000"


@pytest.mark.parametrize("which", ["x", "0", NOBODYS_ID, "%00"])
def test_a_poll_that_is_none(desk, which):
    answer = desk.get(f"{POLLS}{which}/change/")
    assert (answer.status_code, answer["location"]) == (302, "/admin/")
    assert "exist. Perhaps it was deleted?" in says(desk.get("/admin/"))[0]


# --- Filters in the address ---------------------------------------------------------------------------------------------

OURS = [model for model in admin.site._registry if model._meta.app_label == "polls"]
WITH_LISTS = [model for model in OURS if model not in (DeadLetterDesk, PipelineDesk)]


def lookups_of(model, *, depth=2):
    """Names under which Django finds the model's fields: its own, those of what it points to, and of what points to it."""
    found = ["pk"]
    for field in model._meta.get_fields():
        name = field.name
        found.append(name)
        if field.concrete:
            found.append(field.attname)
            found += [f"{name}__44__0"] * (field.get_internal_type() in ("JSONField", "ArrayField"))
        if field.is_relation and depth > 1:
            found += [f"{name}__{further}" for further in lookups_of(field.related_model, depth=depth - 1)]
    return found


@pytest.mark.parametrize("model", WITH_LISTS, ids=lambda model: model.__name__)
def test_a_list_is_filtered_by_nothing_that_it_does_not_offer(desk, model):
    """Whether a row is listed told what is in it: `?changes__44__0__iexact=7` a tally, `?key_hash__gt=a` a key's hash."""
    page = admin.site._registry[model]
    offered = set()
    for wanted in page.list_filter:
        if isinstance(wanted, type):
            offered.add(wanted.parameter_name)
        else:
            name = wanted if isinstance(wanted, str) else wanted[0]
            offered |= {name, f"{name}__exact", f"{name}__isnull"}
    for name in lookups_of(model):
        for lookup in (name, *(f"{name}__{kind}" for kind in ("exact", "gt", "startswith", "isnull", "in", "44__0__iexact"))):
            for request in (None, RequestFactory().get("/")):
                assert page.lookup_allowed(lookup, "a", request) is (lookup in offered), lookup
    address = reverse(f"admin:polls_{model._meta.model_name}_changelist")
    for field in model._meta.concrete_fields:
        for lookup in (field.name, f"{field.name}__gt", f"{field.name}__44__0__iexact"):
            assert (desk.get(address, {lookup: "7"}).status_code == 400) is (lookup not in offered), lookup


@pytest.mark.parametrize(
    ("model", "query"),
    [
        ("decision", {"changes__44__0__iexact": "7"}),
        ("tally", {"votes": "5"}),
        ("tally", {"counted": "5"}),
        ("tally", {"revision__gt": "0"}),
        ("tally", {"poll__tally__votes__gt": "0"}),
        ("poll", {"voter_salt__gt": "a"}),
        ("poll", {"tallies__votes": "5"}),
        ("poll", {"pk__gt": "0"}),
        ("poll", {"x": "y"}),
        ("apiclient", {"key_hash__gt": "a"}),
        ("suspiciousip", {"network_key__gt": "7c0a5b0e-0000-4000-8000-000000000000"}),
        ("block", {"network__startswith": "1"}),
    ],
)
def test_a_list_that_is_asked_for_what_it_does_not_show(desk, model, query):
    assert desk.get(f"/admin/polls/{model}/", query).status_code == 400


def test_every_page_of_ours_is_strict():
    assert all(isinstance(page, StrictAdmin) for model, page in admin.site._registry.items() if model in OURS)


# --- Tallies ----------------------------------------------------------------------------------------------------------


def test_tallies_are_shown_in_words_and_never_changed(desk, poll):
    count_votes([vote_of(poll, "alice"), vote_of(poll, "bob"), vote_of(poll, "carol", "salad")])
    tally = Tally.objects.filter(poll=poll).first()
    before = list(Tally.objects.order_by("pk").values())

    listing = text_of(desk.get(TALLIES, {"q": str(poll.pk)}))
    assert re.findall(r'field-chosen">(.*?)<.*?field-votes">(.*?)<', listing) == [("soup", "2"), ("salad", "1")]
    for path in (f"{TALLIES}add/", f"{TALLIES}{tally.pk}/change/", f"{TALLIES}{tally.pk}/delete/"):
        assert desk.post(path, {"votes": "1000", "selection": "1", "revision": "9", "poll": str(poll.pk), "post": "yes"}).status_code == 403
    desk.post(TALLIES, {"action": "delete_selected", "_selected_action": tally.pk, "post": "yes"})

    assert "_save" not in text_of(desk.get(f"{TALLIES}{tally.pk}/change/"))
    assert list(Tally.objects.order_by("pk").values()) == before


def test_tallies_that_the_reader_may_not_read_have_no_row(make_staff, desk, make_poll):
    """That there is a row tells that somebody chose the option."""
    staff = make_staff("view_tally")
    polls = {visibility: make_poll(results_visibility=visibility) for visibility in ("always", "after_close", "owner", "sealed")}
    polls["by steps"] = make_poll(results_step=10)
    for poll in polls.values():
        count_votes([vote_of(poll, "alice")])

    def rows(browser):
        return {kind for kind, poll in polls.items() if 'field-chosen">' in text_of(browser.get(TALLIES, {"q": str(poll.pk)}))}

    assert rows(staff) == {"always"}
    assert rows(desk) == {"always", "after_close", "owner"}
    hidden = Tally.objects.filter(poll=polls["sealed"]).first()
    assert desk.get(f"{TALLIES}{hidden.pk}/change/").status_code == 302
    Poll.objects.filter(pk__in=[poll.pk for poll in polls.values()]).update(closes_at=now())
    assert rows(staff) == {"always", "after_close", "sealed"}
    Poll.objects.filter(pk=polls["by steps"].pk).update(finalised_at=now())
    assert rows(staff) == {"always", "after_close", "sealed", "by steps"}


def test_whose_results_are_readable_is_the_same_for_one_poll_and_for_many(make_poll):
    """`Actor.with_readable_results` is `reads_results` in SQL."""
    at = now()
    polls = []
    for visibility in ResultsVisibility.values:
        for fields in ({}, {"closes_at": at}, {"published_at": None}, {"archived_at": at}, {"published_at": None, "archived_at": at}):
            polls.append(make_poll(results_visibility=visibility, opens_in=-60, draft="published_at" in fields))
            Poll.objects.filter(pk=polls[-1].pk).update(**fields)
    mine = Poll.objects.filter(pk__in=[poll.pk for poll in polls])
    owner, other = polls[0].owner, get_user_model()(pk=0)
    readers = [roles.Actor(None, None, frozenset())]
    readers += [roles.Actor(user, None, frozenset(has)) for user in (owner, other) for has in ((), *([role] for role in roles.ROLES))]
    readers += [
        roles.Actor(owner, ApiClient(owner=owner, poll=poll, scopes=scopes), frozenset([roles.OWNER]))
        for poll in (None, polls[0])
        for scopes in ([], [Scope.RESULTS_READ])
    ]

    for reader in readers:
        assert set(reader.with_readable_results(mine, at)) == {poll for poll in mine if reader.reads_results(poll, at)}, reader


# --- API clients ------------------------------------------------------------------------------------------------------


def keys_in(page):
    return re.findall(r"nxs_[a-z0-9]{8}_[A-Za-z0-9]{43}", text_of(page))


def test_a_new_clients_key_is_shown_once_kept_as_a_hash_and_good_for_a_vote(desk, owner, api, poll):
    name = f"kiosk {uuid4()}"

    first = desk.post(f"{CLIENTS}add/", {"name": name, "owner": owner.pk, "scopes": ["votes:cast"]}, follow=True)

    [key] = keys_in(first)
    client = ApiClient.objects.get(name=name)
    assert (client.prefix, client.owner_id, client.revoked_at) == (voters.key_prefix(key), owner.pk, None)
    assert bytes(client.key_hash) == voters.key_hash(key)
    assert voters.is_key(key, bytes(client.key_hash))
    for path in (CLIENTS, f"{CLIENTS}{client.pk}/change/", f"{CLIENTS}{client.pk}/history/", "/admin/"):
        assert keys_in(desk.get(path)) == [], path
    assert not LogEntry.objects.filter(change_message__contains=key).exists()
    assert api.cast(poll, "alice", authorization=f"Api-Key {key}").status == 202


def test_a_new_clients_key_goes_by_no_cookie(desk, owner):
    """Cookies are kept by browsers, and by whatever is on the way."""
    answer = desk.post(f"{CLIENTS}add/", {"name": f"kiosk {uuid4()}", "owner": owner.pk, "scopes": ["votes:cast"]})
    assert answer.status_code == 302 and set(answer.cookies) <= {"sessionid", "csrftoken"}
    assert len(keys_in(desk.get(answer.headers["location"]))) == 1


def test_changing_a_client_keeps_its_key(desk, owner):
    client = ApiClient.objects.create(owner=owner, name="kiosk", prefix=uuid4().hex[:8], key_hash=b"hash")

    changed = desk.post(f"{CLIENTS}{client.pk}/change/", {"name": "counter", "owner": owner.pk, "scopes": ["votes:cast"]}, follow=True)

    assert keys_in(changed) == []
    assert ApiClient.objects.values("name", "prefix", "owner").get(pk=client.pk) == {
        "name": "counter",
        "prefix": client.prefix,
        "owner": owner.pk,
    }
    assert bytes(ApiClient.objects.get(pk=client.pk).key_hash) == b"hash"


@pytest.mark.parametrize(
    ("field", "text"), [("name", ""), ("name", "x" * 101), ("name", "a\x00b"), ("owner", ""), ("owner", "0"), ("owner", "x")]
)
def test_a_client_that_can_not_be_is_not_made_and_no_key_shown(desk, owner, field, text):
    clients = ApiClient.objects.count()

    page = desk.post(f"{CLIENTS}add/", {"name": "kiosk", "owner": owner.pk, "scopes": ["votes:cast"], field: text})

    assert list(complaints(page)) == [field]
    assert keys_in(page) == []
    assert ApiClient.objects.count() == clients


def test_revoking_takes_the_selected_keys_and_no_other_and_only_once(desk, owner):
    lost, stolen, other = (ApiClient.objects.create(owner=owner, name=name, prefix=uuid4().hex[:8], key_hash=b"") for name in "abc")
    before = now()

    def revoke(*clients):
        return says(desk.post(CLIENTS, {"action": "revoke", "_selected_action": [client.pk for client in clients]}, follow=True))

    assert revoke(lost, stolen) == ["Keys revoked: 2. Every web process knows within two seconds."]
    revoked_at = dict(ApiClient.objects.filter(pk__in=[lost.pk, stolen.pk]).values_list("pk", "revoked_at"))
    assert all(before <= at <= now() for at in revoked_at.values())
    assert ApiClient.objects.get(pk=other.pk).revoked_at is None

    assert revoke(lost, other)[0].startswith("Keys revoked: 1.")
    assert ApiClient.objects.get(pk=lost.pk).revoked_at == revoked_at[lost.pk]


# --- Dead letters -----------------------------------------------------------------------------------------------------


def test_without_dead_letters_the_page_says_so(desk, bury):
    page = text_of(desk.get(DEAD))
    assert "There are none" in page and "Replay all" not in page


def test_dead_letters_are_told_without_voter_key_and_choice(desk, poll, bury):
    vote = AcceptedVote(uuid4(), poll.pk, uuid4(), (9_876_543_210,), 1_800_000_000_000_000)
    headers, body = bundle_of(vote)
    bury(headers, body)
    bury({"id": "<i>"}, b"{not json")

    page = text_of(desk.get(DEAD))

    content = page.partition('id="content-main"')[2]
    cells = [re.sub(r"</?code>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", content)]
    button = '<button name="message_id" value="{}">Replay</button>'
    why = "Its header `task` is not votes.count.<br>It is no JSON of a task with a bundle."
    assert cells == [
        *(headers["id"], "delivery_limit", "", str(len(body)), "1", "1", "0", f"{poll.title}: 1", "", button.format(headers["id"])),
        *("&lt;i&gt;", "delivery_limit", "", "9", "no bundle", "0", "", "", why, button.format("&lt;i&gt;")),
    ]
    assert "2 messages could not be counted in full" in page
    for secret in (vote.vote_id, vote.voter_key):
        assert str(secret) not in page and secret.hex not in page
    assert "9876543210" not in page
    wait_until(lambda: deadletters.count() == 2)  # looking takes nothing


def test_of_many_dead_letters_the_oldest_hundred_are_shown(desk, bury):
    for _ in range(102):
        bury({}, b"{")

    page = text_of(desk.get(DEAD))

    assert "102 messages could not be counted in full" in page and "The oldest 100 are shown." in page
    assert page.count("no bundle") == 100


def test_the_button_replays_and_looking_does_not(desk, pipeline, poll, bury):
    bury(*bundle_of(vote_of(poll, "alice")))
    assert f'<form method="post" action="{reverse("admin:polls_deadletterdesk_replay")}">' in text_of(desk.get(DEAD))

    assert desk.get(REPLAY)["location"] == DEAD
    wait_until(lambda: deadletters.count() == 1)
    assert tallies(poll) == {}

    assert says(desk.post(REPLAY, follow=True)) == ["Dead letters replayed: 1. What still can't be counted comes back."]
    wait_until(lambda: tallies(poll) == {"soup": 1})
    wait_until(lambda: deadletters.count() == 0)


def test_the_button_of_a_row_replays_that_letter_alone(desk, pipeline, make_poll, bury):
    left, wanted = make_poll(), make_poll()
    for poll in (left, wanted):
        headers, body = bundle_of(vote_of(poll, "alice"))
        bury(headers, body)
    bury({}, b"{")  # without an id
    assert text_of(desk.get(DEAD)).count(">Replay</button>") == 2

    for replayed in (1, 0):
        said = says(desk.post(REPLAY, {"message_id": headers["id"]}, follow=True))
        assert said == [f"Dead letters replayed: {replayed}. What still can't be counted comes back."]
        wait_until(lambda: tallies(wanted) == {"soup": 1})

    wait_until(lambda: deadletters.count() == 2)
    assert tallies(left) == {}


def test_nothing_in_the_desk_drops_a_letter(desk, bury):
    bury({"id": "a"}, b"{")
    content = text_of(desk.get(DEAD)).partition('id="content-main"')[2].lower()
    assert not any(word in content for word in ("delete", "drop", "purge"))


def test_staff_who_may_look_can_not_replay(make_staff, poll, bury):
    staff = make_staff("view_deadletterdesk")
    bury(*bundle_of(vote_of(poll, "alice")))

    page = text_of(staff.get(DEAD))
    assert "1 message could not be counted in full" in page and "Replay all" not in page and "Replay</button>" not in page
    assert (staff.post(REPLAY).status_code, staff.get(REPLAY).status_code) == (403, 403)
    wait_until(lambda: deadletters.count() == 1)


def test_another_sites_form_can_not_replay(operator, poll, bury):
    bury(*bundle_of(vote_of(poll, "alice")))
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(operator)

    assert browser.post(REPLAY).status_code == 403
    wait_until(lambda: deadletters.count() == 1)


def test_dead_letters_have_no_other_pages(desk):
    for path in ("add/", "1/change/", "1/delete/", "1/history/", "x"):
        assert desk.get(DEAD + path).status_code == 404


def test_a_broker_that_is_away_is_told_in_a_sentence_and_soon(desk, broker_away):
    started = time.monotonic()

    page = text_of(desk.get(DEAD))
    assert "The broker does not answer. It keeps the dead letters; try again." in page
    assert "Replay all" not in page
    assert says(desk.post(REPLAY, follow=True)) == ["The broker does not answer. It keeps the dead letters; try again."]
    assert time.monotonic() - started < 3


def test_a_broker_that_hangs_is_waited_for_only_so_long(desk, monkeypatch):
    monkeypatch.setattr(deadletters, "PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}//")
        started = time.monotonic()
        page = text_of(desk.get(DEAD))
    assert "The broker does not answer." in page
    assert time.monotonic() - started < 3


def test_a_queue_that_was_never_declared_is_told_with_its_cure(desk, broker, settings):
    settings.DEAD_LETTER_QUEUE = f"{project.DEAD_LETTER_QUEUE}.none"
    assert f"The broker has no queue {settings.DEAD_LETTER_QUEUE}; `manage.py setup` makes it." in text_of(desk.get(DEAD))
