"""PostgreSQL fails."""

import signal
import threading
import time
from contextlib import ExitStack, suppress

import psutil
import psycopg2

from chaos.scenario import scenario
from chaos.stage import Stage

# A tally of a small poll that somebody changed is put right so soon (seconds).
LONGEST_REPAIR = 60


@scenario("PostgreSQL ends at once (SIGQUIT, as pg_ctl stop -m immediate)")
def postgres_immediate(stage: Stage) -> None:
    for _ in range(4):
        stage.pause(1, 3)
        stage.kill("postgres", signal.SIGQUIT)
    stage.pause(1, 2)


@scenario("kill -9 of one of PostgreSQL's backends: it restarts as a whole")
def backend_killed(stage: Stage) -> None:
    for _ in range(4):
        stage.pause(1, 3)
        with suppress(psutil.NoSuchProcess, IndexError):
            backends = [process for process in stage.processes("postgres")[1:] if "nexus nexus" in " ".join(process.cmdline())]
            stage.dice.choice(backends).kill()
            stage.did()
        time.sleep(0.5)
        stage.stack.wait("postgres")
        stage.is_back("postgres")


@scenario("all connections to PostgreSQL are cut every two seconds")
def connections_cut(stage: Stage) -> None:
    for _ in range(6):
        stage.pause(1.5, 2.5)
        with suppress(psycopg2.Error):
            stage.query(_CUT)
            stage.did()


@scenario("PostgreSQL is away for a minute", crowd={"rate": 400})
def postgres_away(stage: Stage) -> None:
    stage.pause(1, 2)
    with stage.away("postgres"):
        stage.pause(60, 61)
    stage.pause(8, 9)


@scenario("PostgreSQL has no connection left, for ten seconds")
def no_connection_left(stage: Stage) -> None:
    stage.pause(1, 2)
    with ExitStack() as hogs:
        ours = psycopg2.connect(stage.stack.database_url, application_name="hog")
        hogs.callback(ours.close)
        over_at = time.monotonic() + 10
        while time.monotonic() < over_at:
            try:
                hogs.callback(psycopg2.connect(stage.stack.database_url, application_name="hog").close)
            except psycopg2.OperationalError:
                stage.did()
                with ours.cursor() as cursor:
                    cursor.execute(f"{_CUT} AND application_name <> 'hog'")
    stage.is_back("postgres")
    stage.pause(6, 8)


@scenario("somebody else holds the tallies' rows for ten seconds")
def tally_locked(stage: Stage) -> None:
    stage.pause(1, 2)
    with psycopg2.connect(stage.stack.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT FROM tallies FOR UPDATE")
        stage.did()
        stage.pause(10, 11)
    stage.pause(1, 2)


@scenario("somebody else changes the tallies in the other order: deadlocks")
def deadlocks(stage: Stage) -> None:
    before = _deadlocks(stage)
    enough = threading.Event()
    meddler = threading.Thread(target=_meddle, args=[stage, enough])
    meddler.start()
    stage.pause(15, 16)
    enough.set()
    meddler.join()
    stage.pause(2, 3)  # the figures come late
    stage.did(_deadlocks(stage) - before)


def _meddle(stage: Stage, enough: threading.Event) -> None:
    while not enough.is_set():
        with suppress(psycopg2.Error), psycopg2.connect(stage.stack.database_url) as connection, connection.cursor() as cursor:
            cursor.execute("SET deadlock_timeout = '10s'")  # the other side is to be the one that gives up
            cursor.execute("SELECT poll_id, selection FROM tallies ORDER BY poll_id DESC, selection DESC")
            for row in cursor.fetchall():
                cursor.execute("UPDATE tallies SET votes = votes WHERE (poll_id, selection) = (%s, %s::bigint[])", row)
                time.sleep(0.02)
        enough.wait(0.1)


def _deadlocks(stage: Stage) -> int:
    return int(stage.query("SELECT deadlocks FROM pg_stat_database WHERE datname = 'nexus'")[0][0])


@scenario("somebody changes tallies by hand", crowd={"rate": 300})
def tally_changed(stage: Stage) -> None:
    stage.pause(3, 4)
    tallies = stage.query("SELECT poll_id, selection[1] FROM tallies ORDER BY 1, 2")
    changes = (
        "UPDATE tallies SET votes = votes + 7",
        "UPDATE tallies SET votes = votes + 7, counted = counted + 7",
        "DELETE FROM tallies",
    )
    with stage.unwatched():
        began = time.monotonic()
        for change, (poll_id, option) in zip(changes, stage.dice.sample(tallies, len(changes)), strict=True):
            stage.execute(f"{change} WHERE poll_id = '{poll_id}' AND selection = ARRAY[{option}::bigint]")
            stage.did()
        while found := stage.drift():
            if time.monotonic() - began > LONGEST_REPAIR:
                stage.complaints.append(f"after {LONGEST_REPAIR} s {len(found)} tallies were still not the count of the votes")
                break
            stage.pause(0.5, 0.6)
    stage.notes.append(f"Three tallies that were changed by hand were found and repaired within {time.monotonic() - began:.0f} s.")
    stage.pause(2, 3)  # and stay so


_CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'nexus' AND pid <> pg_backend_pid()"
