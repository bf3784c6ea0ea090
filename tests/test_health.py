"""Health: a web process says whether it can accept votes, and programs that hang are told from those that wait."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from io import StringIO

import pytest
from celery import current_app
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection

from tasks import liveness, queues
from tests.conftest import ROOT, Api, answers, free_port, process, wait_until, web, worker
from tests.test_pipeline import proxy_to_database

FINE = {"database": "ok", "migrations": "ok", "broker": "ok", "queues": "ok"}


@contextmanager
def running(tmp_path, **environment):
    port = free_port()
    with web(port, tmp_path / "web.log", **environment):
        wait_until(lambda: answers(port))
        yield lambda: Api(port, {}).get("/readyz")


def nobody():
    return f"amqp://guest:guest@127.0.0.1:{free_port()}//"


# --- Ready ------------------------------------------------------------------------------------------------------------


def test_with_all_at_hand_a_web_process_is_ready(pipeline):
    answer = Api(pipeline, {}).get("/readyz")

    assert (answer.status, answer.json) == (200, {"status": "ready", "parts": FINE})
    assert answer.headers["cache-control"] == "no-store"


def test_without_the_broker_votes_are_accepted_all_the_same(broker, tmp_path):
    with running(tmp_path, CELERY_BROKER_URL=nobody()) as ready:
        answer = ready()

    assert (answer.status, answer.json["status"]) == (200, "degraded")
    assert answer.json["parts"] == {**FINE, "broker": "takes no messages", "queues": "not known"}


def test_queues_that_are_missing_are_named(pipeline):
    with current_app.connection_for_write() as broker:
        broker.default_channel.queue_delete(settings.DEAD_LETTER_QUEUE)
    time.sleep(1.1)  # what was found before is good for a second
    try:
        answer = Api(pipeline, {}).get("/readyz")
    finally:
        queues.declare()

    assert (answer.status, answer.json["status"]) == (200, "degraded")
    assert answer.json["parts"]["queues"] == f"manage.py setup makes what is missing: {settings.DEAD_LETTER_QUEUE}"


def test_without_a_database_nobody_knows_the_polls(broker, tmp_path):
    with running(tmp_path, DATABASE_URL=f"postgres://nobody@127.0.0.1:{free_port()}/nothing") as ready:
        answer = ready()

    assert (answer.status, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.json["detail"] == "This process can't accept votes: see database and migrations."
    assert answer.json["parts"] == {**FINE, "database": "does not answer", "migrations": "not known"}
    assert "nobody" not in answer.text and "127.0.0.1" not in answer.text


def test_a_database_that_is_older_than_the_program_is_none_to_work_with(broker, tmp_path):
    with connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE nexus_empty")
    try:
        at = connection.settings_dict
        with running(
            tmp_path, DATABASE_URL=f"postgres://{at['USER']}:{at['PASSWORD']}@{at['HOST']}:{at['PORT'] or 5432}/nexus_empty"
        ) as ready:
            answer = ready()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP DATABASE nexus_empty WITH (FORCE)")

    assert (answer.status, answer.json["parts"]["database"]) == (503, "ok")
    assert answer.json["parts"]["migrations"].startswith("manage.py setup applies what is missing: ")


def test_the_second_of_two_brokers_will_do_also_when_the_database_goes_away(broker, tmp_path):
    brokers = f"{nobody()};{settings.CELERY_BROKER_URL}"
    with proxy_to_database() as (url, cut), running(tmp_path, DATABASE_URL=url, CELERY_BROKER_URL=brokers) as ready:
        assert ready().json == {"status": "ready", "parts": FINE}
        cut()
        wait_until(lambda: ready().json["parts"]["database"] != "ok")
        answer = ready()

    assert (answer.status, answer.json["status"]) == (200, "degraded")


def test_what_never_answers_is_waited_for_two_seconds_at_most(broker, tmp_path):
    """Also by the second who asks while the first still waits; and /healthz does not wait at all."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = silent.getsockname()[1]
        with running(
            tmp_path, DATABASE_URL=f"postgres://nobody@127.0.0.1:{at}/nothing", CELERY_BROKER_URL=f"amqp://guest:guest@127.0.0.1:{at}//"
        ) as ready:
            for _ in range(2):
                asked_at = time.monotonic()
                answer = ready()
                assert time.monotonic() - asked_at < 2

    assert answer.status == 503
    assert [part for part, said in answer.json["parts"].items() if said != "ok"] == list(FINE)


# --- Alive ------------------------------------------------------------------------------------------------------------


def is_alive(program):
    try:
        call_command("alive", program, stdout=StringIO())
    except CommandError:
        return False
    return True


@pytest.fixture
def folder(settings, tmp_path, monkeypatch):
    settings.LIVENESS_FOLDER = tmp_path
    monkeypatch.setattr(liveness, "HANGS_AFTER_SECONDS", 4)
    return tmp_path


@contextmanager
def program(name, folder, **environment):
    environment = {"LIVENESS_FOLDER": str(folder), **environment}
    if name == "beat":
        with process("celery", "-A", "core", "beat", "--pidfile=", log=folder / "log", **environment) as started:
            yield started
    else:
        queue = settings.PERIODIC_QUEUE if name == "periodic" else ",".join(settings.VOTES_QUEUES)
        with worker(queue, folder / "log", concurrency=1, **environment) as started:
            yield started


@pytest.mark.parametrize("name", ["worker", "beat"])
def test_a_program_that_hangs_is_told_and_it_lives_when_it_goes_on(name, broker, folder):
    assert not is_alive(name)
    with program(name, folder) as started:
        wait_until(lambda: is_alive(name), seconds=40)
        os.kill(started.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: not is_alive(name))
        finally:
            os.kill(started.pid, signal.SIGCONT)
        wait_until(lambda: is_alive(name))


@pytest.mark.parametrize("name", ["periodic", "beat"])
def test_a_program_that_waits_for_the_broker_lives(name, broker, folder):
    with program(name, folder, CELERY_BROKER_URL=nobody()):
        wait_until(lambda: is_alive(name), seconds=40)
        noted_at = (folder / f"nexus-{settings.QUEUE_PREFIX}{name}.alive").stat().st_mtime
        wait_until(lambda: (folder / f"nexus-{settings.QUEUE_PREFIX}{name}.alive").stat().st_mtime > noted_at + 2)


def test_the_command_says_in_a_sentence_and_by_its_end_what_it_found(folder):
    command = [sys.executable, "manage.py", "alive", "beat"]
    env = {**os.environ, "LIVENESS_FOLDER": str(folder)}

    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "CommandError: beat has never noted that it lives, here.\n")

    liveness.note("beat")
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and re.fullmatch(r"beat lives, as of \d s ago\.\n", ended.stdout)

    an_hour_ago = time.time() - 3600
    os.utime(folder / f"nexus-{settings.QUEUE_PREFIX}beat.alive", (an_hour_ago, an_hour_ago))
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert re.fullmatch(r"CommandError: beat noted 36\d\d s ago that it lived, and should every 2 s\.\n", ended.stderr)


def test_a_folder_that_is_full_or_gone_stops_nobody(folder, settings, caplog):
    settings.LIVENESS_FOLDER = folder / "away"

    liveness.note("worker")

    assert "worker can't note in LIVENESS_FOLDER that it lives (FileNotFoundError)" in caplog.text
