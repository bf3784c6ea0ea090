"""Least privilege in PostgreSQL: web processes and workers log in as roles that can do their work, and nothing beyond it.

That the rights suffice is what all other tests show: their processes have these roles (conftest.py).
"""

import re
from contextlib import contextmanager

import psycopg2
import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from psycopg2.errors import InsufficientPrivilege

from polls import privileges
from polls.models import JournalEntry
from tests.conftest import WEB_ROLE, WORKER_ROLE, database_url


@contextmanager
def cursor_of(role):
    """What somebody can do who has this role's login, outside of our code."""
    session = psycopg2.connect(database_url(role).replace("postgres://", "postgresql://"))
    session.autocommit = True
    try:
        yield session.cursor()
    finally:
        session.close()


def test_every_table_says_who_may_do_what_with_it():
    assert set(privileges.RIGHTS) == set(connection.introspection.table_names())


@pytest.mark.parametrize("who", ["web", "worker"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE journal SET actor = 'nobody'",
        "DELETE FROM journal",
        "UPDATE decisions SET actor = 'nobody'",
        "DELETE FROM decisions",
        "DELETE FROM polls",
        "DELETE FROM tallies",
        "TRUNCATE votes",
        "DROP TABLE votes",
        "ALTER TABLE votes ADD COLUMN voter text",
        "ALTER TABLE decisions DISABLE TRIGGER ALL",
        "CREATE TABLE anything (id int)",
        "CREATE SCHEMA anything",
        "INSERT INTO django_migrations (app, name, applied) VALUES ('polls', 'x', now())",
        "UPDATE django_admin_log SET change_message = ''",
        "SET ROLE pg_write_all_data",
        "COPY polls TO PROGRAM 'cat'",
    ],
    ids=lambda statement: re.sub(r"\W+", "_", statement),
)
def test_what_neither_web_processes_nor_workers_may(who, statement):
    with cursor_of({"web": WEB_ROLE, "worker": WORKER_ROLE}[who]) as cursor, pytest.raises(InsufficientPrivilege):
        cursor.execute(statement)


@pytest.mark.parametrize("table", ["outbox", "network_secrets", "polls"])
def test_a_web_process_takes_nothing_out_of_what_it_took_in(table):
    with cursor_of(WEB_ROLE) as cursor, pytest.raises(InsufficientPrivilege):
        cursor.execute(f"DELETE FROM {table}")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE polls SET closes_at = now()",
        "UPDATE options SET text = 'salad'",
        "UPDATE auth_user SET is_superuser = true",
        "SELECT session_data FROM django_session",
        "INSERT INTO api_clients DEFAULT VALUES",
        "SELECT delete_draft('00000000-0000-0000-0000-000000000000')",
    ],
    ids=lambda statement: re.sub(r"\W+", "_", statement),
)
def test_a_worker_changes_no_poll_and_no_account(statement):
    with cursor_of(WORKER_ROLE) as cursor, pytest.raises(InsufficientPrivilege):
        cursor.execute(statement)


def test_a_poll_that_was_published_can_not_be_deleted_by_a_web_process(poll, make_poll):
    draft = make_poll(draft=True)
    with cursor_of(WEB_ROLE) as cursor:
        found = []
        for each in (poll, draft):
            cursor.execute("SELECT delete_draft(%s)", [str(each.pk)])
            found += cursor.fetchone()
    assert found == [False, True]
    assert JournalEntry.objects.filter(poll=poll).exists()
    assert not JournalEntry.objects.filter(poll_id=draft.pk).exists()


def test_setup_takes_back_what_a_role_must_not_have(broker, settings):
    with connection.cursor() as cursor:
        cursor.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {WEB_ROLE}")
    settings.WEB_DATABASE_ROLE, settings.WORKER_DATABASE_ROLE = WEB_ROLE, WORKER_ROLE
    call_command("setup", verbosity=0)
    with cursor_of(WEB_ROLE) as cursor, pytest.raises(InsufficientPrivilege):
        cursor.execute("DELETE FROM journal")


def test_setup_names_a_role_that_is_not_there(settings):
    settings.WEB_DATABASE_ROLE = "nobody_made_it"
    with pytest.raises(CommandError, match='WEB_DATABASE_ROLE and WORKER_DATABASE_ROLE name roles that are there: role "nobody_made_it"'):
        call_command("setup", verbosity=0)
