"""manage.py import_votes: a file's votes count once, however often it is stopped and run again."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils.timezone import now

from polls import closing, codes, importing, roles, voters
from polls.models import ApiClient, Poll, VoterCode
from tests.conftest import ROOT, Api, assert_tallies_equal_votes, database_url, free_port, make_user, option, standing, tallies, wait_until


@pytest.fixture
def prefix(client_key):
    return voters.key_prefix(client_key)


@pytest.fixture
def run(tmp_path, prefix):
    """Imports a file; returns what the summary says, and keeps the refused rows."""

    def run(poll, content, *more, name="votes.csv", client=prefix):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        out = io.StringIO()
        try:
            call_command("import_votes", str(path), "--poll", str(poll.pk), *(["--client", client] if client else []), *more, stdout=out)
        except CommandError as exc:
            if exc.returncode != 2:
                raise
        return summary(out.getvalue())

    return run


def summary(printed):
    """What the last line says, without the zeros."""
    rows, outcomes = printed.splitlines()[-1].split(" rows: ")
    said = {word: int(number) for number, word in (part.split(" ", 1) for part in outcomes.split(", "))}
    return {"rows": int(rows), **{word: number for word, number in said.items() if number}}


def refused(tmp_path, name="votes.csv.refused.csv"):
    """{line: problem}"""
    with (tmp_path / name).open(newline="") as report:
        return {int(row["line"]): row["problem"] for row in csv.DictReader(report)}


def rows(count, first=0):
    return "voter,option\n" + "".join(f"voter {n},{('soup', 'salad')[n % 2]}\n" for n in range(first, first + count))


def ndjson(*items):
    return "".join(json.dumps(item) + "\n" for item in items)


# --- What it takes ----------------------------------------------------------------------------------------------------


def test_a_file_counts_and_a_second_time_changes_nothing(run, poll, tmp_path):
    content = f"voter,option\nalice,soup\nbob,{option(poll, 'salad')}\ncarol, soup \n"

    assert run(poll, content) == {"rows": 3, "counted": 3}
    before = standing(poll)
    for more in ([], ["--restart"]):
        assert run(poll, content, *more) == {"rows": 3, "taken before": 3}

    assert tallies(poll) == {"soup": 2, "salad": 1}
    assert standing(poll) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["votes.csv", "votes.csv.refused.csv"]
    assert refused(tmp_path) == {}
    assert_tallies_equal_votes()


def client_of(key):
    return ApiClient.objects.get(prefix=voters.key_prefix(key)).pk


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffvoter,option\nalice,soup\n",
        "voter,option\r\nalice,soup\r\n\r\n",
        "voter,option\ralice,soup\r",
        '"Voter","Option"\n"alice","soup"',
        "voter,option,options,idempotency_key\nalice,soup,,\n,,,\n",
        "option,code,voter\nsoup,,alice\n",
        "voter,options\nalice,soup\n",
    ],
)
def test_however_a_spreadsheet_writes_it(run, poll, client_key, content):
    assert run(poll, content) == {"rows": 1, "counted": 1}
    assert set(standing(poll)) == {voters.VoterKeys(poll.pk, "client", poll.voter_salt).of(f"{client_of(client_key)}:alice")}


def test_a_voter_of_the_file_is_the_same_voter_as_at_the_api_by_key_too(api, run, poll):
    vote = {"option": str(option(poll, "soup")), "idempotency_key": "kiosk-7"}
    api.post(f"/api/v1/polls/{poll.pk}/votes/batch", [{**vote, "voter": "alice"}, {**vote, "voter": "bob"}])
    wait_until(lambda: tallies(poll) == {"soup": 2})

    done = run(poll, "voter,option,idempotency_key\nalice,soup,kiosk-7\nbob,salad,\n")

    assert done == {"rows": 2, "taken before": 1, "rejected": 1}
    assert tallies(poll) == {"soup": 2}


def test_ndjson_has_the_items_of_a_batch(run, make_poll, tmp_path):
    poll = make_poll(method="approval")
    both = [str(option(poll, text)) for text in ("soup", "salad")]
    content = ndjson({"voter": "alice", "options": both}, {"voter": "bob", "option": both[0], "idempotency_key": "b"})

    assert run(poll, "\n" + content + "\n", name="votes.NDJSON") == {"rows": 2, "counted": 2}
    assert tallies(poll) == {"ballots": 2, "soup": 2, "salad": 1}
    assert run(poll, ndjson({"voter": "carol", "option": "soup"}), name="texts.ndjson") == {"rows": 1, "refused": 1}
    assert refused(tmp_path, "texts.ndjson.refused.csv") == {1: "unknown-option"}


def test_an_approval_ballot_has_its_options_in_one_cell(run, make_poll):
    poll = make_poll(method="approval")

    assert run(poll, f"voter,options\nalice,soup|{option(poll, 'salad')}\nbob, salad\n") == {"rows": 2, "counted": 2}
    assert tallies(poll) == {"ballots": 2, "soup": 1, "salad": 2}


def test_the_last_row_of_a_voter_stands_where_votes_may_change_also_after_a_change_back(run, make_poll):
    poll = make_poll(allow_change=True)
    content = "voter,option\nalice,soup\nalice,salad\nalice,soup\nbob,salad\n"

    assert run(poll, content) == {"rows": 4, "counted": 2, "superseded": 2}
    assert tallies(poll) == {"soup": 1, "salad": 1}
    assert run(poll, content, "--restart") == {"rows": 4, "taken before": 4}
    assert tallies(poll) == {"soup": 1, "salad": 1}


def test_a_repeat_does_not_beat_what_the_voter_chose_meanwhile(api, run, make_poll):
    poll = make_poll(allow_change=True)
    run(poll, "voter,option\nalice,soup\n")
    api.cast(poll, "alice", "salad")
    wait_until(lambda: tallies(poll) == {"salad": 1})

    # A line before it, as when the file was put right: the row is known by what it says, not by where it stands.
    assert run(poll, "voter,option\nbob,soup\nalice,soup\n") == {"rows": 2, "counted": 1, "taken before": 1}
    assert tallies(poll) == {"salad": 1, "soup": 1}


def test_codes_vote_unless_they_are_unknown_or_revoked(run, make_poll, tmp_path):
    poll, other = make_poll(voter_policy="code"), make_poll(voter_policy="code")
    known = [(poll, "7KXF-20PM-Q9RT", None), (poll, "8KXF-20PM-Q9RT", now() - timedelta(1)), (other, "9KXF-20PM-Q9RT", None)]
    for of, code, revoked_at in known:
        voter_key = voters.VoterKeys(of.pk, "code", of.voter_salt).of(codes.normalise(code))
        VoterCode.objects.create(poll=of, voter_key=voter_key, revoked_at=revoked_at)
    said = ["7kxf 20pm q9rt", "8KXF-20PM-Q9RT", "9KXF-20PM-Q9RT", "nonsense", ""]

    done = run(poll, "code,option\n" + "".join(f"{code},soup\n" for code in said), client=None)

    assert done == {"rows": 5, "counted": 1, "refused": 4}
    assert refused(tmp_path) == {3: "unknown-code", 4: "unknown-code", 5: "unknown-code", 6: "invalid"}
    assert tallies(poll) == {"soup": 1}


# --- What it refuses, by row ------------------------------------------------------------------------------------------


def test_bad_rows_are_told_by_line_and_their_neighbours_count(run, make_poll, tmp_path):
    poll, stray = make_poll(), str(option(make_poll(), "soup"))
    content = "\n".join(
        [
            "voter,code,option,options,idempotency_key",
            "alice,,soup,,",
            ",,soup,,",
            "terces,,pizza,,",
            f"terces,,{stray},,",
            "terces,,,,",
            "terces,,soup,salad,",
            "terces,,,soup|salad,",
            "terces,,soup",
            "terces,,soup,,,",
            '"terces,,soup,,',
            '"ter"ces,,soup,,',
            "",
            "terces,SECRETCODE1,soup,,",
            "terces,,soup,,two words",
            f"{'x' * 201},,soup,,",
            f"{'x' * 140_000},,soup,,",
            "bob,,salad,,",
        ]
    )

    done = run(poll, content)

    assert done == {"rows": 16, "counted": 2, "refused": 14}
    expected = {"invalid": [3, 6, 7, 14, 15, 16], "unknown-option": [4, 5], "wrong-choices": [8], "malformed": [9, 10, 11, 12, 17]}
    assert refused(tmp_path) == {line: problem for problem, lines in expected.items() for line in lines}
    assert tallies(poll) == {"soup": 1, "salad": 1}
    report = (tmp_path / "votes.csv.refused.csv").read_text()
    assert not any(said in report for said in ("terces", "soup", "salad", "pizza", stray, "SECRETCODE1", "two words", "xxx"))


def test_bad_lines_of_ndjson_are_told_without_what_they_say(run, poll, tmp_path):
    good = {"voter": "alice", "option": str(option(poll, "soup"))}
    lines = ["{broken", "7", "[]", "{}", '{"terces": "soup"}', json.dumps({**good, "option": 7}), "[" * 5000, '{"voter": "\\ud800"}', ","]

    done = run(poll, "\n".join([*lines, json.dumps(good)]), name="votes.ndjson")

    assert done == {"rows": 10, "counted": 1, "refused": 9}
    report = refused(tmp_path, "votes.ndjson.refused.csv")
    assert [report[line] for line in range(1, 10)] == ["malformed", *["invalid"] * 6, "malformed", "malformed"]
    assert "terces" not in (tmp_path / "votes.ndjson.refused.csv").read_text()


def test_a_poll_that_is_not_open_refuses_every_row(run, make_poll, tmp_path):
    assert run(make_poll(opens_in=-20, closes_in=-10), rows(3)) == {"rows": 3, "refused": 3}
    assert refused(tmp_path) == {2: "poll-closed", 3: "poll-closed", 4: "poll-closed"}
    assert run(make_poll(opens_in=600), rows(1)) == {"rows": 1, "refused": 1}
    assert refused(tmp_path) == {2: "poll-not-open"}


def test_a_poll_that_closes_meanwhile_refuses_the_rest(poll, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "ROWS_AT_ONCE", 10)
    (tmp_path / "votes.csv").write_text(rows(30))

    for progress in importing.import_votes(importing.VoteFile(tmp_path / "votes.csv"), poll.pk, prefix, tmp_path / "refused.csv"):
        if progress.rows == 20:
            Poll.objects.filter(pk=poll.pk).update(closes_at=now())

    assert (progress.outcomes, progress.refused) == ({"counted": 20}, 10)
    assert refused(tmp_path, "refused.csv") == dict.fromkeys(range(22, 32), "poll-closed")
    assert sum(tallies(poll).values()) == 20


def test_a_poll_does_not_become_final_while_a_batch_is_being_counted(poll, prefix, tmp_path, monkeypatch):
    (tmp_path / "votes.csv").write_text(rows(3))
    count_votes, finalised = importing.counting.count_votes, []

    def end_the_poll():
        try:
            Poll.objects.filter(pk=poll.pk).update(closes_at=now(), closed_at=now())
            closing.finalise_polls(now() + timedelta(minutes=5), [poll.pk])
            finalised.append(Poll.objects.get(pk=poll.pk).finalised_at)
        finally:
            connection.close()

    def count_at_last(votes):
        thread = threading.Thread(target=end_the_poll)
        thread.start()
        thread.join()
        return count_votes(votes)

    monkeypatch.setattr(importing.counting, "count_votes", count_at_last)
    *_, last = importing.import_votes(importing.VoteFile(tmp_path / "votes.csv"), poll.pk, prefix, tmp_path / "refused.csv")

    assert (finalised, last.outcomes) == ([None], {"counted": 3})
    closing.finalise_polls(now() + timedelta(minutes=5), [poll.pk])
    assert Poll.objects.get(pk=poll.pk).finalised_at is not None


def test_what_is_one_options_id_and_anothers_text_is_refused(run, make_poll, client_key, tmp_path):
    poll = make_poll(opens_in=60)
    soup, salad = option(poll, "soup"), option(poll, "salad")
    poll.options.filter(pk=salad).update(text=str(soup))
    Poll.objects.filter(pk=poll.pk).update(opens_at=now())

    assert run(poll, f"voter,option\nalice,{soup}\nbob,{salad}\n") == {"rows": 2, "counted": 1, "refused": 1}
    assert refused(tmp_path) == {2: "unknown-option"}
    assert set(standing(poll)) == {voters.VoterKeys(poll.pk, "client", poll.voter_salt).of(f"{client_of(client_key)}:bob")}


def test_the_command_ends_with_2_when_rows_were_refused(poll, prefix, tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("voter,option\nalice,soup\nbob,pizza\n")

    with pytest.raises(CommandError, match=r"^1 of 2 rows were refused: .*mine.csv says which and why\.$") as ended:
        call_command("import_votes", str(path), "--poll", str(poll.pk), "--client", prefix, "--report", str(tmp_path / "mine.csv"))

    assert ended.value.returncode == 2
    assert refused(tmp_path, "mine.csv") == {3: "unknown-option"}


# --- What it refuses as a whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("votes.csv", rows(3).encode() + "josé,soup\n".encode("latin-1"), r"Line 5 is not UTF-8\. Save the file as UTF-8"),
        ("votes.csv", rows(3).encode("utf-16"), "Line 1 is not UTF-8"),
        ("votes.csv", rows(3).encode("utf-16-le"), "The first line must name the columns"),
        ("votes.csv", rows(3).encode() + b"\xc3", "Line 5 is not UTF-8"),
        ("votes.ndjson", b'{"voter": "a"}\n\xff\n', "Line 2 is not UTF-8"),
        ("votes.csv", "", "The first line must name the columns"),
        (
            "votes.csv",
            "alice,soup\nbob,soup\n",
            "must name the columns, each once, with commas between them: of voter, code, option, options",
        ),
        ("votes.csv", "voter;option\nalice;soup\n", "The first line must name the columns"),
        ("votes.csv", "voter,option,voter\na,soup,b\n", "The first line must name the columns"),
        ("votes.csv", "voter,option,colour\na,soup,red\n", "The first line must name the columns"),
        ("votes.xlsx", b"PK", r"must end in \.csv or \.ndjson"),
    ],
)
def test_a_file_that_is_no_such_file_is_refused_and_nothing_of_it_counts(run, poll, name, content, sentence):
    with pytest.raises(CommandError, match=sentence) as refusal:
        run(poll, content, name=name)

    assert refusal.value.returncode == 1
    assert "alice" not in str(refusal.value)
    assert tallies(poll) == {}


def test_who_can_not_cast_votes_in_the_poll_can_not_import_them(run, make_poll, owner, tmp_path):
    poll, other = make_poll(), make_poll()

    def client(**fields):
        prefix = uuid4().hex[:8]
        ApiClient.objects.create(**{"owner": owner, "name": "x", "scopes": ["votes:cast"], "prefix": prefix, "key_hash": b"x", **fields})
        return prefix

    stranger = make_user(uuid4().hex, roles.OWNER)
    for wrong, sentence in (
        (None, "Say with --client whose"),
        ("nothere", "No API client has a key with this prefix, or it was revoked"),
        (client(revoked_at=now()), "No API client has a key with this prefix, or it was revoked"),
        (client(scopes=["results:read"]), "lacks the scope votes:cast"),
        (client(poll=other), "not for this poll"),
        (client(owner=stranger), "not for this poll"),
    ):
        with pytest.raises(CommandError, match=sentence):
            run(poll, rows(3), client=wrong)
    with pytest.raises(CommandError, match="Leave --client out"):
        run(make_poll(voter_policy="code"), "code,option\nSOUP-SOUP-47,soup\n")

    assert tallies(poll) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["votes.csv"]
    assert run(poll, rows(3), client=client(poll=poll)) == {"rows": 3, "counted": 3}


def test_a_client_that_is_revoked_meanwhile_stops_it(poll, owner, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "ROWS_AT_ONCE", 10)
    (tmp_path / "votes.csv").write_text(rows(30))
    client = ApiClient.objects.create(owner=owner, name="x", scopes=["votes:cast"], prefix=uuid4().hex[:8], key_hash=b"x")
    going = importing.import_votes(importing.VoteFile(tmp_path / "votes.csv"), poll.pk, client.prefix, tmp_path / "refused.csv")
    next(going)
    next(going)

    ApiClient.objects.filter(pk=client.pk).update(revoked_at=now())

    with pytest.raises(importing.Refusal, match="it was revoked"):
        next(going)
    assert sum(tallies(poll).values()) == 10


def test_polls_that_take_no_imports(run, make_poll):
    for policy in ("ip", "session", "account"):
        with pytest.raises(CommandError, match="whose voter_policy is `client` or `code`"):
            run(make_poll(voter_policy=policy), rows(1))
    with pytest.raises(CommandError, match=r"The poll is a draft\. Publish it first"):
        run(make_poll(draft=True), rows(1))
    with pytest.raises(CommandError, match="No poll has this id"):
        run(Poll(), rows(1))


def test_files_that_can_not_be_read_or_written_are_told_in_a_sentence(run, poll, tmp_path):
    with pytest.raises(CommandError, match=r"votes\.csv: No such file or directory\.$"):
        run(poll, None)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(CommandError, match=r"folder\.csv: Is a directory\.$"):
        run(poll, None, name="folder.csv")
    with pytest.raises(CommandError, match=r"nowhere/report\.csv: No such file or directory\.$"):
        run(poll, rows(1), "--report", str(tmp_path / "nowhere" / "report.csv"))
    assert tallies(poll) == {}


def test_a_report_never_takes_another_files_place(run, poll, tmp_path):
    (tmp_path / "other.csv").write_text(rows(2))

    with pytest.raises(CommandError, match=r"there already and is none\. Name another one with --report"):
        run(poll, rows(1), "--report", str(tmp_path / "other.csv"))
    with pytest.raises(CommandError, match="The report needs a file of its own"):
        run(poll, rows(1), "--report", str(tmp_path / "votes.csv"))

    assert (tmp_path / "other.csv").read_text() == rows(2)
    assert (tmp_path / "votes.csv").read_text() == rows(1)


def test_without_a_database_it_ends_with_one_line(poll, prefix, tmp_path):
    (tmp_path / "votes.csv").write_text(rows(1))
    nowhere = f"postgres://nexus:terces@127.0.0.1:{free_port()}/nexus"

    with importer(poll, prefix, tmp_path, DATABASE_URL=nowhere) as running:
        said = running.communicate(timeout=30)[1].decode()

    assert running.returncode == 1
    assert (
        said == "CommandError: The database of DATABASE_URL does not let us in. Run the same command again: it goes on where it stopped.\n"
    )


# --- Stopped and run again --------------------------------------------------------------------------------------------


@contextmanager
def importer(poll, prefix, tmp_path, *more, **environment):
    """A process that imports votes.csv."""
    command = [sys.executable, "manage.py", "import_votes", tmp_path / "votes.csv", "--poll", poll.pk, "--client", prefix, *more]
    env = {**os.environ, "DATABASE_URL": database_url(), **environment}
    running = subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def lines_done(tmp_path):
    path = tmp_path / "votes.csv.progress"
    return json.loads(path.read_bytes())["line"] if path.exists() else 0


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)])
def test_stopped_in_the_middle_and_run_again_it_ends_as_if_it_had_not_been(make_poll, prefix, tmp_path, how, code):
    poll, votes = make_poll(), 30_000
    # Every thousandth row is bad, so that the report is in pieces, too.
    content = rows(votes).splitlines(keepends=True)
    bad = range(500, votes, 1000)
    for line in bad:
        content[line - 1] = "nobody,pizza\n"
    (tmp_path / "votes.csv").write_text("".join(content))

    for line in (2_000, 8_000):
        with importer(poll, prefix, tmp_path) as running:
            wait_until(lambda line=line, running=running: lines_done(tmp_path) > line or running.poll() is not None)
            running.send_signal(how)
            said = running.communicate(timeout=30)[1].decode()
        assert running.returncode == code, said
        assert "Traceback" not in said
        assert line - len(bad) <= sum(tallies(poll).values()) < votes - len(bad)
    with importer(poll, prefix, tmp_path) as running:
        out, said = running.communicate(timeout=60)

    assert running.returncode == 2, said
    done = summary(out.decode())
    assert (done["rows"], done["refused"]) == (votes, len(bad))
    assert done["counted"] + done.get("taken before", 0) == votes - len(bad)
    assert sum(tallies(poll).values()) == votes - len(bad)
    assert refused(tmp_path) == dict.fromkeys(bad, "unknown-option")
    assert (tmp_path / "votes.csv.refused.csv").read_text().count("\n") == len(bad) + 1
    assert_tallies_equal_votes()


def test_killed_between_the_commit_and_the_note_of_it_nothing_counts_twice_nor_is_told_twice(make_poll, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "ROWS_AT_ONCE", 10)
    poll = make_poll(allow_change=True)
    file, report = tmp_path / "votes.csv", tmp_path / "refused.csv"
    file.write_text(rows(14) + "voter 0,salad\nvoter 2,pizza\nvoter 0,soup\n" + rows(10, first=20).partition("\n")[2])

    def go():
        return importing.import_votes(importing.VoteFile(file), poll.pk, prefix, report)

    going = go()
    assert [next(going).line for _ in range(2)] == [0, 11]
    shutil.copy(tmp_path / "votes.csv.progress", tmp_path / "kept")
    assert next(going).line == 21
    going.close()
    shutil.copy(tmp_path / "kept", tmp_path / "votes.csv.progress")
    told = report.read_text()
    *_, last = go()

    assert refused(tmp_path, "refused.csv") == {17: "unknown-option"}
    assert report.read_text() == told
    assert last.rows == 27
    assert last.outcomes == {"counted": 10 + 7, "repeat": 9}
    assert tallies(poll) == {"soup": 12, "salad": 12}
    assert_tallies_equal_votes()


def test_a_changed_file_or_another_poll_does_not_go_on_where_the_first_stopped(run, make_poll, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "ROWS_AT_ONCE", 10)
    poll, other = make_poll(), make_poll()
    path = tmp_path / "votes.csv"
    path.write_text(rows(30))
    going = importing.import_votes(importing.VoteFile(path), poll.pk, prefix, tmp_path / "votes.csv.refused.csv")
    assert [next(going).line for _ in range(2)] == [0, 11]
    going.close()

    with pytest.raises(CommandError, match=r"The poll is another one since the import stopped at line 11\. Start over with --restart"):
        run(other, None)
    with pytest.raises(CommandError, match="The report that this import began is not there"):
        run(poll, None, "--report", str(tmp_path / "mine.csv"))
    changed = rows(30).replace("voter 29,", "voter 30,")
    with pytest.raises(CommandError, match=r"The file has changed since the import stopped at line 11\. Start over with --restart"):
        run(poll, changed)
    assert sum(tallies(poll).values()) == 10
    assert run(poll, changed, "--restart") == {"rows": 30, "taken before": 10, "counted": 20}
    assert tallies(other) == {}
    (tmp_path / "votes.csv.progress").write_text("{")
    with pytest.raises(CommandError, match=r"What votes\.csv\.progress says can't be read\. Start over with --restart"):
        run(poll, None)


def test_a_file_that_was_refused_before_its_first_row_can_be_put_right(run, poll):
    with pytest.raises(CommandError, match="The first line"):
        run(poll, "name,option\nalice,soup\n")

    assert run(poll, "voter,option\nalice,soup\n") == {"rows": 1, "counted": 1}


def test_two_imports_do_not_write_one_report(poll, prefix, tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text(rows(3))
    first, second = (importing.import_votes(importing.VoteFile(path), poll.pk, prefix, tmp_path / "refused.csv") for _ in range(2))
    next(first)

    with pytest.raises(importing.Refusal, match="Another import writes this report"):
        next(second)
    first.close()


def test_votes_that_come_by_the_api_meanwhile_count_beside_it(api: Api, run, poll, tmp_path):
    (tmp_path / "votes.csv").write_text(rows(5000))
    batch = [{"voter": f"voter {n}", "option": str(option(poll, ("soup", "salad")[n % 2]))} for n in range(4500, 5500)]

    answer = api.post(f"/api/v1/polls/{poll.pk}/votes/batch", batch)
    done = run(poll, None)

    assert answer.json["accepted"] == 1000
    assert done["counted"] + done["rejected"] + done.get("superseded", 0) == 5000
    wait_until(lambda: sum(tallies(poll).values()) == 5500)
    assert_tallies_equal_votes()
