"""Voter codes: made or taken, known again however they are typed, revoked before use, and never shown twice."""

import csv
import io
import threading
from datetime import datetime, timedelta
from uuid import uuid4

import msgspec
import pytest
from django.db import connection, transaction
from django.utils.timezone import now

from polls import codes, keys, problems, voters
from polls.codes import Row
from polls.counting import count_votes
from polls.editing import SHORTEST_NOTICE
from polls.journal import Act
from polls.keys import Keys
from polls.models import JournalEntry, Poll, Reason, VoteAside, VoterCode
from polls.problems import Refusal
from tests.conftest import Api, option, tallies, vote_of, wait_until
from tests.test_intake import assert_refused


@pytest.fixture
def election(make_poll):
    """A poll for holders of codes."""
    return make_poll(voter_policy="code")


def olga(at=None):
    return Act("olga", at or now())


def key_of(poll, code):
    return poll.pk, voters.VoterKeys(poll.pk, "code", poll.voter_salt).of(codes.normalise(code))


def upload(poll, *own, labels=()):
    """Upload these codes, labelled in turn."""
    rows = [Row(code, (*labels, *[""] * len(own))[index], f"Row {index + 1}") for index, code in enumerate(own)]
    return codes.upload(poll, rows, olga())


def use(poll, code):
    """Count a vote that came with this code."""
    count_votes([msgspec.structs.replace(vote_of(poll, "alice"), voter_key=key_of(poll, code)[1])])


def states(poll):
    """{label: state}, once the poll is final."""
    Poll.objects.filter(pk=poll.pk).update(finalised_at=now())
    return {code.label: code.state for code in codes.listing(Poll.objects.get(pk=poll.pk))}


# --- What a code is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        "7K0M-1XP1-9QRT",
        "7k0m1xp19qrt",
        " 7KOM LXPI 9QRT ",
        "7K0M\u20111XP1\u20139QRT",
        "7K0M\uff0d\uff11XP1\u30009QRT",
        "7-K-0-M-1-X-P-1-9-Q-R-T",
        "7K0M\t1XP1\n9QRT",
    ],
)
def test_a_code_is_known_however_it_is_typed(typed):
    assert codes.normalise(typed) == "7K0M1XP19QRT"


@pytest.mark.parametrize("typed", ["", " - ", "x" * 65, "x" * 100_000, "soup\x004711", "soup\x1b4711", "soup\u200b4711", "\ud800" * 8])
def test_what_can_not_be_a_code(typed):
    with pytest.raises(ValueError, match="A code ") as refused:
        codes.normalise(typed)
    assert "soup" not in str(refused.value)


def test_generated_codes_are_new_easy_to_read_and_accepted_at_once(election):
    issued = codes.generate(election, 500, olga(), labels=["alice", "bob"])

    assert len({code.code for code in issued}) == len({code.id for code in issued}) == 500
    assert [code.label for code in issued[:3]] == ["alice", "bob", ""]
    characters = {character for code in issued for character in code.code}
    assert characters == set("0123456789ABCDEFGHJKMNPQRSTVWXYZ-")  # all 32 of 6,000: 60 bits a code
    assert all([len(part) for part in code.code.split("-")] == [4, 4, 4] for code in issued)
    keys = {key_of(election, code.code.lower()) for code in issued}
    assert codes.valid(keys, now()) == keys


def test_a_code_is_not_readable_in_the_database(election):
    [issued] = codes.generate(election, 1, olga(), labels=["alice"])

    with connection.cursor() as cursor:
        cursor.execute("SELECT voter_codes::text FROM voter_codes WHERE poll_id = %s", [election.pk])
        [(stored,)] = cursor.fetchall()
    assert "alice" not in stored and b"alice".hex() not in stored
    assert issued.code not in stored and codes.normalise(issued.code) not in stored


def test_a_label_is_read_with_the_secret_alone_and_its_length_tells_nothing(election, monkeypatch):
    codes.generate(election, 2, olga(), labels=["bo", "a member with a rather long name, number 4711"])
    stored = list(VoterCode.objects.filter(poll=election).order_by("id"))

    assert {code.label for code in stored} == {"bo", "a member with a rather long name, number 4711"}
    assert len({len(code.sealed_label) for code in stored}) == 1 and {code.clear_label for code in stored} == {""}
    # Of another poll it is none.
    assert keys.unseal(stored[0].sealed_label, b"another poll") is None
    monkeypatch.setattr(keys, "KNOWN", (Keys("another secret"),))
    assert {code.label for code in stored} == {""}


def test_the_ids_of_codes_are_not_in_the_order_of_the_list(election):
    issued = codes.generate(election, 60, olga(), labels=[f"member {number:02}" for number in range(60)])

    ids = [code.id for code in issued]
    assert len(set(ids)) == 60 and ids != sorted(ids)
    assert {code.id: code.label for code in codes.listing(election)} == {code.id: code.label for code in issued}


def test_labels_that_the_version_before_stored_in_clear_are_sealed(election, monkeypatch):
    monkeypatch.setattr(codes, "SEALED_AT_ONCE", 2)
    VoterCode.objects.bulk_create(VoterCode(poll=election, voter_key=uuid4(), clear_label=label) for label in ("alice", "bob", "carol", ""))
    assert {code.label for code in codes.listing(election)} == {"alice", "bob", "carol", ""}

    assert codes.seal_labels() >= 3
    assert codes.seal_labels() == 0

    stored = VoterCode.objects.filter(poll=election)
    assert {code.label for code in stored} == {"alice", "bob", "carol", ""}
    assert not stored.exclude(clear_label="").exists()


def test_a_code_of_one_poll_is_none_in_another(election, make_poll):
    other = make_poll(voter_policy="code")
    upload(election, "SOUP-4711")

    assert codes.valid([key_of(election, "soup4711"), key_of(other, "soup4711"), key_of(election, "soup4712")], now()) == {
        key_of(election, "soup4711")
    }
    # Nor does the other poll take the hash of this one's code.
    assert codes.valid([(other.pk, key_of(election, "soup4711")[1])], now()) == set()
    assert codes.valid([], now()) == set()


# --- Uploading --------------------------------------------------------------------------------------------------------


def test_an_upload_can_be_repeated_and_changes_nothing(election):
    first = upload(election, "SOUP-4711", "SALAD-815", labels=["alice", "bob"])
    again = upload(election, "noodles99", "soup 4711", labels=["carol", "mallory"])

    assert [code.is_new for code in first + again] == [True, True, True, False]
    assert again[1].id == first[0].id
    assert states(election) == {"alice": "unused", "bob": "unused", "carol": "unused"}


def test_uploading_a_revoked_code_does_not_bring_it_back(election):
    [code] = upload(election, "SOUP-4711")
    codes.revoke(election, [code.id], olga())

    [again] = upload(election, "SOUP-4711")

    assert (again.id, again.is_new) == (code.id, False)
    assert [code.state for code in codes.listing(election)] == ["revoked"]


@pytest.mark.parametrize(
    ("own", "mistake"),
    [
        ("SOUP-47", "at least 8"),
        ("S-O-U-P-4-7", "at least 8"),
        ("", "not empty"),
        ("123456789", "at least 10"),
        ("I2345678O", "at least 10"),
        ("SSSSSSOOOOOO", "4 different"),
        ("SOUP\x004711", "visible"),
        ("S" * 65, "at most 64"),
    ],
)
def test_a_weak_code_is_refused_with_its_row_and_takes_the_others_with_it(election, own, mistake):
    with pytest.raises(Refusal) as refused:
        upload(election, "NOODLES-99", own, "SALAD-815")

    [error] = refused.value.errors
    assert error["pointer"] == "#/codes/1/code" and error["detail"].startswith("Row 2: ") and mistake in error["detail"]
    assert refused.value.problem is problems.INVALID
    assert not election.codes.exists()


@pytest.mark.parametrize("own", ["SOUP-4711", "1234567890", "ABCDABCD", "грибной-суп-7", "x" * 60 + "1234"])
def test_a_code_of_the_owners_own(election, own):
    upload(election, own)
    assert codes.valid([key_of(election, own.upper())], now())


def test_two_codes_that_read_alike_are_refused_with_both_rows(election):
    with pytest.raises(Refusal) as refused:
        upload(election, "SOUP-4711", "SALAD-815", "s0up 47ll", "NOODLES-1O", "NOODLES-10")

    assert [(error["pointer"], error["detail"]) for error in refused.value.errors] == [
        ("#/codes/2/code", "Row 3: This code reads like that of row 1."),
        ("#/codes/4/code", "Row 5: This code reads like that of row 4."),
    ]
    assert not election.codes.exists()


@pytest.mark.parametrize("label", ["x" * 101, "a\x00b", "two\nlines", "\x1b[31m"])
def test_a_label_that_is_none(election, label):
    for attempt in (
        lambda: upload(election, "SOUP-4711", labels=[label]),
        lambda: codes.generate(election, 1, olga(), labels=[label]),
    ):
        with pytest.raises(Refusal) as refused:
            attempt()
        assert refused.value.errors[0]["pointer"] in ("#/codes/0/label", "#/labels/0")
    assert not election.codes.exists()


def test_of_many_mistakes_the_first_are_told(election):
    with pytest.raises(Refusal) as refused:
        upload(election, *["weak"] * 150)
    assert len(refused.value.errors) == 100 and "149 more" in refused.value.detail


def test_two_uploads_at_once_store_each_code_once(election):
    own = [f"SOUP-{number:06}-AB" for number in range(2000)]
    answers = []

    def send(order):
        try:
            answers.append(upload(election, *order))
        finally:
            connection.close()

    both = [threading.Thread(target=send, args=[order]) for order in (own, own[::-1])]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()

    assert election.codes.count() == 2000
    assert sorted(sum(code.is_new for code in issued) for issued in answers) == [0, 2000]
    assert [entry.changes for entry in JournalEntry.objects.filter(poll=election, action="codes_added")] == [{"codes": [0, 2000]}]


def test_codes_are_added_while_votes_are_being_counted(election):
    """Counting holds the poll with FOR KEY SHARE; an upload that waited for that would hold up every vote behind it."""
    held, done = threading.Event(), threading.Event()

    def count():
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SELECT id FROM polls WHERE id = %s FOR KEY SHARE", [election.pk])
                held.set()
                done.wait(10)
        finally:
            connection.close()

    counting = threading.Thread(target=count)
    counting.start()
    held.wait(10)
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET LOCAL lock_timeout = 200")  # ms
            upload(election, "SOUP-4711")
    finally:
        done.set()
        counting.join()
    assert election.codes.count() == 1


# --- When ---------------------------------------------------------------------------------------------------------------

# How far from now a poll's moments are in each stage; None: no such moment.
STAGES = {
    "draft": {"published_at": None},
    "scheduled": {"opens_at": timedelta(minutes=30)},
    "open": {},
    "closing": {"closes_at": timedelta()},
    "final": {"closes_at": timedelta(), "finalised_at": timedelta()},
    "archived": {"archived_at": timedelta()},
}


@pytest.mark.parametrize("stage", STAGES)
def test_codes_are_added_and_revoked_until_the_poll_is_closed(make_poll, stage):
    poll = make_poll(voter_policy="code", opens_in=-60, draft=True)
    [code] = upload(poll, "SOUP-4711")
    at = now()
    moments = {name: None if delta is None else at + delta for name, delta in STAGES[stage].items()}
    Poll.objects.filter(pk=poll.pk).update(**{"published_at": at, **moments})
    attempts = [
        lambda: upload(poll, "SALAD-815"),
        lambda: codes.generate(poll, 1, olga()),
        lambda: codes.revoke(poll, [code.id], olga()),
    ]

    for attempt in attempts:
        if stage in ("draft", "scheduled", "open"):
            attempt()
        else:
            with pytest.raises(Refusal) as refused:
                attempt()
            assert refused.value.problem is problems.POLL_IN_USE and stage in refused.value.detail
    assert poll.codes.count() == (3 if stage in ("draft", "scheduled", "open") else 1)


@pytest.mark.parametrize("policy", ["ip", "session", "account", "client"])
def test_only_a_poll_of_codes_has_any(make_poll, policy):
    poll = make_poll(voter_policy=policy)

    for attempt in (
        lambda: upload(poll, "SOUP-4711"),
        lambda: codes.generate(poll, 1, olga()),
        lambda: codes.revoke(poll, None, olga()),
        lambda: codes.listing(poll),
    ):
        with pytest.raises(Refusal) as refused:
            attempt()
        assert refused.value.problem is problems.NOT_OFFERED and policy in refused.value.detail
    assert not VoterCode.objects.filter(poll=poll).exists()


# --- Revoking ---------------------------------------------------------------------------------------------------------


def test_a_revoked_code_is_accepted_until_every_process_knows_and_never_after(election):
    [code, _] = upload(election, "SOUP-4711", "SALAD-815")
    at = now()

    revoked, revoked_at = codes.revoke(election, [code.id], olga(at))

    assert (revoked, revoked_at) == (1, at + SHORTEST_NOTICE)
    both = {key_of(election, "SOUP-4711"), key_of(election, "SALAD-815")}
    assert codes.valid(both, revoked_at - timedelta(microseconds=1)) == both
    assert codes.valid(both, revoked_at) == codes.valid(both, revoked_at + timedelta(days=1)) == {key_of(election, "SALAD-815")}


def test_revoking_again_does_not_put_it_off(election):
    [code] = upload(election, "SOUP-4711")
    _, revoked_at = codes.revoke(election, [code.id], olga())

    assert codes.revoke(election, [code.id, code.id], olga(now() + timedelta(minutes=1)))[0] == 0
    assert codes.revoke(election, None, olga(now() + timedelta(minutes=1)))[0] == 0

    assert election.codes.get().revoked_at == revoked_at


def refuse(poll, code):
    """Have a vote that came with this code set aside."""
    VoteAside.objects.create(
        poll_id=poll.pk,
        voter_key=key_of(poll, code)[1],
        vote_id=uuid4(),
        selection=[],
        accepted_at=now(),
        outcome="rejected",
        reason=Reason.ADDRESS_LIMIT,
        decided_at=now(),
    )


def test_revoking_a_used_code_looks_like_revoking_any_other_and_its_vote_counts(election):
    soup, salad, noodles = upload(election, "SOUP-4711", "SALAD-815", "NOODLES-99", labels=["alice", "bob", "carol"])
    use(election, "SALAD-815")
    refuse(election, "NOODLES-99")
    at = now()

    told = [codes.revoke(election, [code.id], olga(at)) for code in (soup, salad, noodles)]

    assert told == [(1, at + SHORTEST_NOTICE)] * 3
    shown = codes.listing(election).order_by("id").values_list("state", "revoked_at")
    assert list(shown) == [("revoked", at + SHORTEST_NOTICE)] * 3
    assert tallies(election) == {"soup": 1}
    assert states(election) == {"alice": "revoked", "bob": "used", "carol": "used"}


def test_all_codes_are_revoked_at_once_and_their_number_does_not_tell_how_many_were_used(election):
    upload(election, "SOUP-4711", "SALAD-815", "NOODLES-99", labels=["alice", "bob", "carol"])
    use(election, "SALAD-815")

    assert codes.revoke(election, None, olga())[0] == 3

    assert set(codes.listing(election).values_list("state", flat=True)) == {"revoked"}
    assert states(election) == {"alice": "revoked", "bob": "used", "carol": "revoked"}


@pytest.mark.parametrize("stage", ["open", "closing"])
def test_until_a_poll_is_final_its_used_codes_are_a_number(make_poll, stage):
    election = make_poll(voter_policy="code")
    upload(election, "SOUP-4711", "SALAD-815", "NOODLES-99", labels=["alice", "bob", "carol"])
    use(election, "SALAD-815")
    refuse(election, "NOODLES-99")
    if stage == "closing":
        Poll.objects.filter(pk=election.pk).update(closes_at=now())
        election.refresh_from_db()

    assert codes.count(election) == codes.Counts(codes=3, used=2, revoked=0)
    assert set(codes.listing(election).values_list("state", flat=True)) == {None}
    for state in ("used", "unused"):
        with pytest.raises(Refusal) as refused:
            codes.listing(election, state)
        assert refused.value.problem is problems.NOT_OFFERED
    assert not codes.listing(election, "revoked").exists()

    assert states(election) == {"alice": "unused", "bob": "used", "carol": "used"}


def test_counts_before_and_after_a_revocation_do_not_tell_whether_the_code_was_used(election):
    soup, salad = upload(election, "SOUP-4711", "SALAD-815")
    use(election, "SALAD-815")

    seen = [codes.count(election)]
    for code in (soup, salad):
        codes.revoke(election, [code.id], olga())
        seen.append(codes.count(election))

    assert [(counts.codes, counts.used, counts.revoked) for counts in seen] == [(2, 1, 0), (2, 1, 1), (2, 1, 2)]


def test_a_vote_that_was_under_way_while_its_code_was_revoked_counts(election):
    [code] = upload(election, "SOUP-4711", labels=["alice"])
    codes.revoke(election, [code.id], olga())

    use(election, "SOUP-4711")

    assert states(election) == {"alice": "used"}
    assert tallies(election) == {"soup": 1}


def test_an_id_of_another_polls_code_is_unknown(election, make_poll):
    other = make_poll(voter_policy="code")
    [mine], [theirs] = upload(election, "SOUP-4711"), upload(other, "SOUP-4711")

    with pytest.raises(Refusal) as refused:
        codes.revoke(election, [mine.id, theirs.id], olga())

    assert [error["pointer"] for error in refused.value.errors] == ["#/ids/1"]
    assert not VoterCode.objects.filter(pk__in=[mine.id, theirs.id], revoked_at__isnull=False).exists()


def test_the_journal_says_who_changed_how_many_and_no_code(election):
    at = now()
    [code] = upload(election, "SOUP-4711", labels=["alice"])
    codes.generate(election, 2, olga(at))
    codes.revoke(election, [code.id], olga(at))
    codes.revoke(election, None, olga(at))
    upload(election, "SOUP-4711")  # has it: no change

    entries = JournalEntry.objects.filter(poll=election).exclude(action="created").order_by("pk")
    assert [(entry.actor, entry.action, entry.changes) for entry in entries] == [
        ("olga", "codes_added", {"codes": [0, 1]}),
        ("olga", "codes_added", {"codes": [1, 3]}),
        ("olga", "codes_revoked", {"revoked_codes": [0, 1]}),
        ("olga", "codes_revoked", {"revoked_codes": [1, 3]}),
    ]


# --- Through the API --------------------------------------------------------------------------------------------------


def path_of(poll):
    return f"/api/v1/polls/{poll.pk}/codes"


def rows_of(answer):
    """What a CSV answer holds, the columns' names first."""
    assert answer.headers["content-type"] == "text/csv; charset=utf-8", answer.text
    return list(csv.reader(io.StringIO(answer.text)))


def send_csv(api, poll, text, **headers):
    return api.send("POST", path_of(poll), text if isinstance(text, bytes) else text.encode(), content_type="text/csv", **headers)


def test_made_codes_are_shown_in_one_answer_and_never_again(owners_api, election):
    answer = owners_api.post(path_of(election), {"generate": 3, "labels": ["alice", "bob"]})

    assert answer.status == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json
    assert (made["created"], made["existing"]) == (3, 0)
    assert [(code["label"], code["existing"]) for code in made["codes"]] == [("alice", False), ("bob", False), ("", False)]
    assert codes.valid([key_of(election, code["code"]) for code in made["codes"]], now()) == {
        key_of(election, code["code"]) for code in made["codes"]
    }
    listed = owners_api.get(path_of(election))
    assert (listed.status, listed.headers["cache-control"]) == (200, "no-store")
    assert {(code["id"], code["label"]) for code in listed.json["results"]} == {(code["id"], code["label"]) for code in made["codes"]}
    assert set(listed.json["results"][0]) == {"id", "label", "state", "created_at", "revoked_at"}
    for later in (listed, owners_api.get(path_of(election), accept="text/csv")):
        for code in made["codes"]:
            assert code["code"] not in later.text and str(key_of(election, code["code"])[1]) not in later.text


def test_own_codes_are_taken_in_their_order(owners_api, election):
    own = {"codes": [{"code": "SOUP-4711", "label": "alice"}, {"code": "salad 815"}]}
    first, again = owners_api.post(path_of(election), own), owners_api.post(path_of(election), own)

    assert (first.status, again.status) == (201, 201), first.text
    assert [(code["code"], code["label"], code["existing"]) for code in first.json["codes"]] == [
        ("SOUP-4711", "alice", False),
        ("salad 815", "", False),
    ]
    assert (again.json["created"], again.json["existing"]) == (0, 2)
    assert [code["id"] for code in again.json["codes"]] == [code["id"] for code in first.json["codes"]]


@pytest.mark.parametrize("how", [{"accept": "text/csv"}, {}])
def test_made_codes_come_as_csv_too(owners_api, election, how):
    answer = owners_api.send("POST", path_of(election) + ("" if how else "?format=csv"), {"generate": 2, "labels": ["alice"]}, **how)

    assert answer.status == 201, answer.text
    assert answer.headers["content-disposition"] == 'attachment; filename="codes.csv"'
    columns, alice, other = rows_of(answer)
    assert columns == ["id", "code", "label", "existing"]
    assert (alice[2:], other[2:]) == (["alice", "false"], ["", "false"])
    assert codes.valid([key_of(election, alice[1])], now())


@pytest.mark.parametrize(
    "text",
    [
        "code,label\nSOUP-4711,alice\nSALAD-815,bob\n",
        "code,label\r\nSOUP-4711,alice\r\nSALAD-815,bob",
        "\ufeffcode,label\nSOUP-4711,alice\n\nSALAD-815,bob\n\n",
        'Label ,"CODE"\n"alice","SOUP-4711"\nbob,SALAD-815\n',
    ],
)
def test_a_list_in_csv(owners_api, election, text):
    answer = send_csv(owners_api, election, text)

    assert answer.status == 201, answer.text
    assert [(code["code"], code["label"]) for code in answer.json["codes"]] == [("SOUP-4711", "alice"), ("SALAD-815", "bob")]
    assert states(election) == {"alice": "unused", "bob": "unused"}


def test_a_list_in_csv_without_labels_and_with_any_letters(owners_api, election):
    assert send_csv(owners_api, election, "code\nSOUP-4711\n").status == 201
    assert send_csv(owners_api, election, 'code,label\nSALAD-815,"Zoë, 2. Stock; ""Süd"""\n').status == 201
    assert [code.label for code in codes.listing(election).order_by("id")] == ["", 'Zoë, 2. Stock; "Süd"']


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "either `generate` or `codes`"),
        ("\n", "Line 1"),
        ("SOUP-4711,alice\n", "Line 1"),
        ("code;label\nSOUP-4711;alice\n", "Line 1"),
        ("code,label,weight\nSOUP-4711,alice,5\n", "Line 1"),
        ("code,code\nSOUP-4711,SOUP-4711\n", "Line 1"),
        ("label\nalice\n", "Line 1"),
        ("code,label\n", "at least one"),
        ("code,label\nSOUP-4711,alice\nSALAD-815\n", "Line 3"),
        ("code,label\nSOUP-4711,alice,soup\n", "Line 2"),
        ("code,label\nSOUP-4711,alice\n\nweak,bob\n", "Line 4"),
        ('code,label\nSOUP-4711,"two\nlines"\nSALAD-815,bob\n', "Line 2"),
        ('code,label\nSOUP-4711,"two\nlines"\nweak,bob\n', "Line 2"),
        ('code,label\nSOUP-4711,alice\nSALAD-815,"bob\n', "Line 3"),
        ("code,label\nSOUP-4711,alice\nsoup 4711,bob\n", "Line 3"),
        ("code,label\nSOUP\x004711,alice\n", "Line 2"),
        ("code,label\nSOUP-4711,\x00\n", "Line 2"),
        ("code\n" + "x" * 200_000, "Line 2"),
        (b"code,label\nSOUP-4711,Zo\xeb\n", "Line 2"),
        ("code,label\nSOUP-4711,alice\n".encode("utf-16"), "Line 1"),
    ],
)
def test_a_list_in_csv_with_a_mistake_names_the_line_and_stores_nothing(owners_api, election, text, line):
    answer = send_csv(owners_api, election, text, accept="text/csv")

    assert (answer.status, answer.headers["content-type"]) == (400, problems.CONTENT_TYPE), answer.text
    assert answer.json["type"] == problems.INVALID.type and line in answer.json["detail"], answer.text
    assert not election.codes.exists()


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, None),
        ([], None),
        ("code,label", None),
        (7, None),
        ({"generate": 1, "codes": [{"code": "SOUP-4711"}]}, None),
        ({"generate": 0}, "/generate"),
        ({"generate": -1}, "/generate"),
        ({"generate": 100_001}, "/generate"),
        ({"generate": "many"}, "/generate"),
        ({"generate": None}, "/generate"),
        ({"generate": 1, "labels": ["alice", "bob"]}, "/labels"),
        ({"generate": 1, "labels": "alice"}, "/labels"),
        ({"generate": 1, "labels": ["\x00"]}, "/labels/0"),
        ({"codes": [{"code": "SOUP-4711"}], "labels": ["alice"]}, "/labels"),
        ({"codes": []}, "/codes"),
        ({"codes": "SOUP-4711"}, "/codes"),
        ({"codes": ["SOUP-4711"]}, "/codes/0"),
        ({"codes": [{"code": "SOUP-4711"}, {}]}, "/codes/1/code"),
        ({"codes": [{"code": 4711471147}]}, "/codes/0/code"),
        ({"codes": [{"code": None}]}, "/codes/0/code"),
        ({"codes": [{"code": "SOUP-4711", "label": 5}]}, "/codes/0/label"),
        ({"codes": [{"code": "SOUP-4711", "weight": 5}]}, "/codes/0/weight"),
        ({"codes": [{"code": "SOUP-4711", "label": "x" * 101}]}, "/codes/0/label"),
        ({"codes": [{"code": "SOUP-4711", "label": "\ud800"}]}, "/codes/0/label"),
        ({"codes": [{"code": "SOUP-4711"}, {"code": "weak"}]}, "/codes/1/code"),
        ({"generate": 1, "lables": ["alice"]}, "/lables"),
    ],
)
def test_a_body_that_is_no_list_of_codes(owners_api, election, body, pointer):
    assert_refused(owners_api.post(path_of(election), body), problems.INVALID, pointer=pointer)
    assert not election.codes.exists()


def test_bodies_that_are_not_even_that(owners_api, election):
    for body in (b"{", b"\xff", b"[" * 100_000):
        assert_refused(owners_api.post(path_of(election), body), problems.MALFORMED)
    assert_refused(owners_api.post(path_of(election), b"a=b", content_type="application/x-www-form-urlencoded"), problems.NOT_JSON)
    assert_refused(send_csv(owners_api, election, b"code\n" + b" " * 25_000_000), problems.TOO_LARGE)
    assert_refused(send_csv(owners_api, election, "code\n" + "SOUP-4711\n" * 100_001), problems.INVALID, pointer="/codes")
    assert not election.codes.exists()


def test_a_label_is_never_a_formula_to_a_spreadsheet(owners_api, election):
    labels = ["=1+1", "+1", "-1", "@SUM(A1)", "a=1"]
    made = owners_api.post(path_of(election) + "?format=csv", {"generate": 5, "labels": labels})

    for answer in (made, owners_api.get(path_of(election), accept="text/csv")):
        columns, *rows = rows_of(answer)
        assert {row[columns.index("label")] for row in rows} == {"'=1+1", "'+1", "'-1", "'@SUM(A1)", "a=1"}
    assert {code["label"] for code in owners_api.get(path_of(election)).json["results"]} == set(labels)


def test_the_list_is_filtered_paged_and_whole_as_csv(owners_api, election):
    made = owners_api.post(path_of(election), {"generate": 7, "labels": list("abcdefg")}).json["codes"]
    use(election, made[2]["code"])
    assert owners_api.send("DELETE", f"{path_of(election)}/{made[4]['id']}").status == 200

    def listed():
        seen, path = [], path_of(election) + "?page_size=3"
        while path:
            page = owners_api.get(path).json
            seen += [(code["label"], code["state"]) for code in page["results"]]
            path = page["next"] and page["next"].split(str(owners_api.port))[1]
        return seen

    def assert_listed(expected, *states):
        assert sorted(listed()) == list(expected.items())
        for state in states:
            wanted = [label for label, its_state in expected.items() if its_state == state]
            assert sorted(code["label"] for code in owners_api.get(f"{path_of(election)}?state={state}").json["results"]) == wanted
            columns, *rows = rows_of(owners_api.get(f"{path_of(election)}?state={state}&format=csv&page_size=1"))
            assert columns == ["id", "label", "state", "created_at", "revoked_at"]
            assert sorted((row[1], row[2], bool(row[4])) for row in rows) == [(label, state, state == "revoked") for label in wanted]

    assert_listed({**dict.fromkeys("abcdefg"), "e": "revoked"}, "revoked")
    _, *rows = rows_of(owners_api.get(path_of(election) + "?format=csv"))
    assert sorted(row[2] for row in rows) == ["", "", "", "", "", "", "revoked"]
    for form in ("json", "csv"):
        for state in ("used", "unused"):
            assert_refused(owners_api.get(f"{path_of(election)}?state={state}&format={form}"), problems.NOT_OFFERED)
    Poll.objects.filter(pk=election.pk).update(finalised_at=now())
    assert_listed({**dict.fromkeys("abcdefg", "unused"), "c": "used", "e": "revoked"}, "unused", "used", "revoked")

    assert_refused(owners_api.get(path_of(election) + "?state=lost"), problems.INVALID)
    for form in ("json", "csv"):
        assert_refused(owners_api.get(f"{path_of(election)}?format={form}&page_size=many"), problems.INVALID, pointer="/page_size")


def test_a_code_is_revoked_and_the_answer_does_not_tell_whether_it_was_used(owners_api, election):
    soup, salad = owners_api.post(path_of(election), {"generate": 2}).json["codes"]
    use(election, salad["code"])

    revoked, again, used = (owners_api.send("DELETE", f"{path_of(election)}/{code['id']}") for code in (soup, soup, salad))

    assert (revoked.status, revoked.json["state"], again.status, again.json) == (200, "revoked", 200, revoked.json)
    assert (used.status, used.json["state"]) == (200, "revoked")
    assert owners_api.get(path_of(election) + "/counts").json == {"codes": 2, "used": 1, "revoked": 2}
    for unknown in ("0", "9" * 40):
        assert_refused(owners_api.send("DELETE", f"{path_of(election)}/{unknown}"), problems.NOT_FOUND)


def test_codes_are_revoked_by_their_ids_or_all(owners_api, election):
    made = owners_api.post(path_of(election), {"generate": 5}).json["codes"]
    use(election, made[0]["code"])
    path = path_of(election) + "/revoke"

    some = owners_api.post(path, {"ids": [made[0]["id"], made[2]["id"]]})
    the_rest = owners_api.post(path, {"all_unused": True})

    assert (some.status, some.json["revoked"], the_rest.status, the_rest.json["revoked"]) == (200, 2, 200, 3), some.text
    assert election.codes.filter(revoked_at=None).count() == 0


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, None),
        ({"ids": ["1"], "all_unused": True}, None),
        ({"all_unused": False}, None),
        ({"ids": []}, "/ids"),
        ({"ids": ["one"]}, "/ids/0"),
        ({"ids": ["-1"]}, "/ids/0"),
        ({"ids": ["9" * 19]}, "/ids/0"),
        ({"ids": ["9" * 18]}, "/ids/0"),
        ({"ids": "1"}, "/ids"),
        ({"all_unused": "perhaps"}, "/all_unused"),
        ({"all": True}, "/all"),
    ],
)
def test_a_revocation_that_says_not_what(owners_api, election, body, pointer):
    owners_api.post(path_of(election), {"generate": 1})
    assert_refused(owners_api.post(path_of(election) + "/revoke", body), problems.INVALID, pointer=pointer)
    assert election.codes.filter(revoked_at=None).count() == 1


def test_a_poll_of_another_policy_offers_no_codes(owners_api, make_poll):
    poll = make_poll()

    for answer in (
        owners_api.get(path_of(poll)),
        owners_api.get(path_of(poll) + "/counts"),
        owners_api.post(path_of(poll), {"generate": 1}),
        owners_api.post(path_of(poll) + "/revoke", {"all_unused": True}),
        owners_api.send("DELETE", f"{path_of(poll)}/1"),
    ):
        assert_refused(answer, problems.NOT_OFFERED)


def test_a_code_votes_once_and_is_used_then(owners_api, election):
    [code] = owners_api.post(path_of(election), {"generate": 1}).json["codes"]
    nobody = Api(owners_api.port, {})
    votes, ballot = f"/api/v1/polls/{election.pk}/votes", {"option": str(option(election, "soup"))}

    first = nobody.post(votes, {**ballot, "code": code["code"].lower().replace("-", " ")})
    second = nobody.post(votes, {**ballot, "code": code["code"]})

    assert (first.status, second.status) == (202, 202), first.text
    wait_until(lambda: nobody.get(second.headers["location"]).json["reason"] == "duplicate")
    assert tallies(election) == {"soup": 1}
    assert owners_api.get(path_of(election) + "/counts").json == {"codes": 1, "used": 1, "revoked": 0}
    assert states(election) == {"": "used"}
    for unknown in ("7K0M-1XP1-9QRT", "", "x" * 100, "\x00", "\u200b"):
        assert_refused(nobody.post(votes, {**ballot, "code": unknown}), problems.UNKNOWN_CODE)


def test_a_vote_with_a_code_counts_until_the_code_is_revoked_and_is_refused_from_that_moment_on(owners_api, election):
    [early, late] = owners_api.post(path_of(election), {"generate": 2}).json["codes"]
    nobody = Api(owners_api.port, {})
    votes, ballot = f"/api/v1/polls/{election.pk}/votes", {"option": str(option(election, "soup"))}

    revoked_at = datetime.fromisoformat(owners_api.post(path_of(election) + "/revoke", {"all_unused": True}).json["revoked_at"])
    in_time = nobody.post(votes, {**ballot, "code": early["code"]})
    wait_until(lambda: now() >= revoked_at)
    too_late = nobody.post(votes, {**ballot, "code": late["code"]})

    assert in_time.status == 202
    assert_refused(too_late, problems.UNKNOWN_CODE)
    wait_until(lambda: nobody.get(in_time.headers["location"]).json["status"] == "counted")


def test_a_hundred_thousand_codes_come_in_one_request(owners_api, election):
    """In about three seconds; the test's own patience with an answer is ten."""
    lines = "\n".join(f"SOUP-{number:06}-ABC,{number}" for number in range(100_000))

    answer = send_csv(owners_api, election, f"code,label\n{lines}", accept="text/csv")

    assert answer.status == 201, answer.text
    assert len(rows_of(answer)) == 100_001 and election.codes.count() == 100_000
