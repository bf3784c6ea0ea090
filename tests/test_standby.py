"""A PostgreSQL and its standby, for real: where results are read, and who takes over."""

import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psutil
import psycopg2
import pytest
from django.conf import settings
from django.db import connection, connections
from django.utils.timezone import now
from psycopg2.extensions import make_dsn, parse_dsn

from chaos import hosts
from core.settings import database
from polls import replica, results
from polls.counting import count_votes
from stack import backup
from stack.stack import Stack
from tests.conftest import database_url, vote_of, wait_until


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    stack = Stack(
        tmp_path_factory.mktemp("pair") / "stack", {"CELERY_BROKER_URL": settings.CELERY_BROKER_URL}, programs=lambda _: [], standby=True
    )
    try:
        with stack:
            yield stack
    finally:
        stack.destroy()


@pytest.fixture
def use_replica(monkeypatch):
    """Have this URL's server be the replica, with nothing known of it yet."""
    monkeypatch.setattr(replica, "_threads", ThreadPoolExecutor(4))
    monkeypatch.setattr(replica, "_asked_again_at", 0.0)

    def use_replica(url):
        given = {"default": connections.settings["default"], replica.ALIAS: database("REPLICA_URL", url, writes=False)}
        monkeypatch.setitem(connections.settings, replica.ALIAS, connections.configure_settings(given)[replica.ALIAS])

    return use_replica


def one(url, query):
    with closing(psycopg2.connect(url, connect_timeout=3)) as asking, asking.cursor() as cursor:
        asking.autocommit = True
        cursor.execute(query)
        return cursor.fetchone() if cursor.description else None


def is_standby():
    """Whether a read goes to a standby now."""

    def ask(cursor):
        cursor.execute("SELECT pg_is_in_recovery()")
        return cursor.fetchone()[0]

    return replica.read(ask)[0]


@contextmanager
def hanging(pid):
    """SIGSTOP to the program and its children."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children()]
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


# --- Where results are read -------------------------------------------------------------------------------------------


def test_public_results_are_read_from_the_replica(make_poll, use_replica):
    poll = make_poll()
    count_votes([vote_of(poll, "alice")])
    use_replica(f"{database_url()}?application_name=the-replica")

    shown = results.read_public_results([poll.pk], now())[poll.pk]

    assert (shown["total_votes"], shown["revision"]) == (1, 1)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'the-replica' AND query LIKE '%tallies%'")
        assert cursor.fetchone() == (1,)


def test_what_a_replica_does_not_have_yet_is_read_from_the_primary(make_poll, use_replica, pair):
    poll = make_poll()
    count_votes([vote_of(poll, "alice")])
    use_replica(pair.env["REPLICA_URL"])  # which has no tables at all

    assert results.read_public_results([poll.pk], now())[poll.pk]["total_votes"] == 1


def test_a_poll_that_is_too_new_for_the_replica(make_poll, use_replica, pair):
    """The replica has the tables, and not the poll."""
    poll = make_poll()
    tables = ["polls", "options", "tallies", "comparisons", "shown_results"]
    with connection.cursor() as cursor:
        for table in tables:
            cursor.execute("SELECT column_name, udt_name FROM information_schema.columns WHERE table_name = %s", [table])
            one(pair.database_url, f"CREATE TABLE {table} ({', '.join(f'{name} {type_}' for name, type_ in cursor)})")
    use_replica(pair.env["REPLICA_URL"])
    # Not behind means: all it received is replayed. What the primary committed a moment ago may still be on its way to it.
    wait_until(lambda: is_standby() and one(pair.env["REPLICA_URL"], f"SELECT to_regclass('{tables[-1]}')") != (None,))
    try:
        assert results.read_public_results([poll.pk], now())[poll.pk]["total_votes"] == 0
        assert is_standby()  # it did not fail
    finally:
        for table in tables:
            one(pair.database_url, f"DROP TABLE {table}")


def test_a_standby_that_has_all_is_read_and_is_not_behind(use_replica, pair):
    use_replica(pair.env["REPLICA_URL"])
    one(pair.database_url, "CREATE TABLE IF NOT EXISTS written (at timestamptz DEFAULT now())")

    wait_until(is_standby)
    wait_until(lambda: replica.read(lambda _: None)[1].total_seconds() == 0)


def test_a_standby_that_is_behind_says_by_how_much_until_it_is_too_much(use_replica, pair, monkeypatch):
    use_replica(pair.env["REPLICA_URL"])
    monkeypatch.setattr(replica, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(replica, "MAX_LAG_SECONDS", 1000)
    standby = pair.env["REPLICA_URL"]
    wait_until(is_standby)
    one(standby, "SELECT pg_wal_replay_pause()")
    try:
        one(pair.database_url, "CREATE TABLE IF NOT EXISTS written_later (at timestamptz)")
        wait_until(lambda: replica.read(lambda _: None)[1].total_seconds() > 0.1)
        assert is_standby()

        monkeypatch.setattr(replica, "MAX_LAG_SECONDS", 0.1)
        assert not is_standby()
    finally:
        one(standby, "SELECT pg_wal_replay_resume()")
    wait_until(is_standby)


def test_a_standby_that_hangs_keeps_nobody_waiting_and_is_left_alone_for_a_while(use_replica, pair, monkeypatch):
    use_replica(pair.env["REPLICA_URL"])
    monkeypatch.setattr(replica, "ANSWER_SECONDS", 0.2)
    wait_until(is_standby)
    with hanging(pair.pid("postgres2")):
        assert not is_standby()
        monkeypatch.setattr(replica, "ANSWER_SECONDS", 1000)  # whoever asks it now waits
        assert not is_standby()
    assert not is_standby()

    monkeypatch.setattr(replica, "_asked_again_at", 0.001)  # the pause is over
    assert is_standby()


def test_a_standby_that_is_away(use_replica, pair, monkeypatch):
    monkeypatch.setattr(replica, "PAUSE_SECONDS", 0)
    standby = parse_dsn(pair.env["REPLICA_URL"])
    port = standby["port"].split(",")[1]
    use_replica(f"postgres://nexus:{standby['password']}@127.0.0.1:{port}/nexus")
    wait_until(is_standby)
    pair.stop("postgres2")
    try:
        assert not is_standby()
    finally:
        pair.start("postgres2")
    wait_until(is_standby)


# --- Who takes over ---------------------------------------------------------------------------------------------------


def test_a_connection_gives_up_a_host_that_has_vanished():
    connection.ensure_connection()
    with socket.socket(fileno=os.dup(connection.connection.fileno())) as ours:
        kept = [ours.getsockopt(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert kept == [5, 2, 3]
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000


def test_backup_and_restore_find_the_primary_among_several_hosts(pair, monkeypatch):
    given = parse_dsn(pair.database_url)
    hosts_in_reverse = ",".join(f"127.0.0.1:{port}" for port in reversed(given["port"].split(",")))
    url = f"postgres://nexus:{given['password']}@{hosts_in_reverse}/nexus?target_session_attrs=read-write"
    monkeypatch.setenv("DATABASE_URL", url)
    psql = [backup.find_tools(0) / "psql", "-Atc", "SELECT pg_is_in_recovery()"]

    assert subprocess.run(psql, env=backup.libpq_environment(), capture_output=True, text=True, check=True).stdout == "f\n"


def test_the_primary_dies_and_its_standby_takes_over_with_all_that_was_committed(pair, monkeypatch):
    monkeypatch.setattr(hosts, "GIVE_UP_SECONDS", 0.5)
    given = parse_dsn(pair.database_url)
    del given["target_session_attrs"]
    ports = dict(zip(("postgres", "postgres2"), given["port"].split(","), strict=True))
    keeper = hosts.Keeper({name: make_dsn(**{**given, "host": "127.0.0.1", "port": port}) for name, port in ports.items()})
    keeper.start()
    try:
        wait_until(lambda: keeper.is_synchronous)
        one(pair.database_url, "CREATE TABLE committed AS SELECT 7 AS number")
        pid = pair.pid("postgres")
        doomed = [psutil.Process(pid), *psutil.Process(pid).children()]
        for process in doomed:
            process.suspend()
        with ThreadPoolExecutor(1) as stopping:  # so that supervisord does not start it again
            stopped = stopping.submit(pair.stop, "postgres")
            wait_until(lambda: pair.supervisor.processes()["postgres"]["statename"] != "RUNNING")
            for process in doomed:
                process.kill()
            stopped.result()

        wait_until(lambda: keeper.primary == "postgres2")
        assert one(pair.database_url, "SELECT number, inet_server_port() FROM committed") == (7, int(ports["postgres2"]))

        pair.start("postgres")
        wait_until(lambda: keeper.is_synchronous)
        assert one(f"{pair.database_url}", "SELECT application_name, sync_state FROM pg_stat_replication") == ("postgres", "sync")
        assert one(pair.env["REPLICA_URL"], "SELECT inet_server_port(), pg_is_in_recovery()") == (int(ports["postgres"]), True)

        # While the only standby is away commits wait for nobody; then it may lack something, and nobody promotes it.
        pair.stop("postgres")
        one(pair.database_url, "INSERT INTO committed VALUES (8)")
        assert not keeper.is_synchronous
    finally:
        keeper.end()
