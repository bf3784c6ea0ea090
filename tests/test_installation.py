"""What is started by hand finds the installation of its checkout, or says how to name one, and asks no stranger's server."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from django.conf import settings

from core import installation
from tests.conftest import ROOT, database_url, free_port
from tests.test_settings import settings_read

CHOSEN = {
    "DATABASE_URL": "postgres://nexus:secret@127.0.0.1:{port}/nexus",
    "CELERY_BROKER_URL": "amqp://nexus:secret@127.0.0.1:{port}//",
    "VOTER_SECRET": "of the installation",
    "DEBUG": "true",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the product, beside which nothing was ever started."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("core", "polls", "tasks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "manage.py", copy)
    return copy


@pytest.fixture
def made(checkout):
    """`make up` was here; returns a function that says what it chose."""
    (checkout / ".local").mkdir()

    def made(**chosen):
        (checkout / ".local/state.json").write_text(json.dumps({"secrets": {}, "ports": {}, "environment": chosen}))

    yield made
    shutil.rmtree(checkout / ".local")


def run(checkout, *command, python=sys.executable, **environment):
    """Run the command as a person does in a fresh shell."""
    around = {name: value for name, value in os.environ.items() if name not in (*settings_read(), "DJANGO_SETTINGS_MODULE")}
    return subprocess.run(
        [python, *command], cwd=checkout, env={**around, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


PRINT = "from django.conf import settings as s; print(s.DATABASES['default'].get('PORT'), s.CELERY_BROKER_URL, s.VOTER_SECRET)"


def told(checkout, **environment):
    """What a command of manage.py takes for its installation."""
    ended = run(checkout, "manage.py", "shell", "--no-imports", "-c", PRINT, **environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_command_by_itself_is_of_the_installation_that_make_up_made(checkout, made):
    made(**{name: value.format(port=25001) for name, value in CHOSEN.items()})
    assert told(checkout) == "25001 amqp://nexus:secret@127.0.0.1:25001// of the installation"


def test_with_the_installations_database_come_its_secrets(checkout, made):
    """What dev.json shows of it is enough: else it would turn voters into other keys, and count people twice."""
    made(**{name: value.format(port=25001) for name, value in CHOSEN.items()})
    url = CHOSEN["DATABASE_URL"].format(port=25001)
    assert told(checkout, DATABASE_URL=url) == "25001 amqp://nexus:secret@127.0.0.1:25001// of the installation"


@pytest.mark.parametrize("named", [{"DATABASE_URL": "postgres://nexus@db.example.org:5433/nexus"}, {"DEBUG": "false"}])
def test_nothing_of_it_goes_to_another_installation(checkout, made, named):
    made(**{name: value.format(port=25001) for name, value in CHOSEN.items()})
    secrets = {"VOTER_SECRET": "x" * 50, "SECRET_KEY": "y" * 50}
    assert "25001" not in told(checkout, **secrets, **named)


def test_what_the_environment_says_wins(checkout, made):
    made(**{name: value.format(port=25001) for name, value in CHOSEN.items()})
    assert told(checkout, VOTER_SECRET="of the shell").endswith(" of the shell")


@pytest.mark.parametrize("state", ["", "nonsense", "[]", "{}", '{"environment": {}}', '{"environment": null}'])
def test_a_state_that_can_not_be_read_is_none(checkout, made, state):
    made()
    (checkout / ".local/state.json").write_text(state)
    assert run(checkout, "manage.py", "audit").stderr.strip() == installation.NOT_NAMED


@pytest.mark.parametrize(
    "command",
    [
        *(["manage.py", name] for name in ("audit", "setup", "replay_dead_letters", "recount", "migrate", "dbshell")),
        ["manage.py", "alive", "worker"],
        *(["-m", "core", program] for program in ("web", "worker", "periodic", "beat", "flower", "audit")),
        *(["-m", "celery", "-A", "core", program] for program in ("worker", "beat")),
    ],
    ids=" ".join,
)
def test_without_an_installation_everything_that_needs_one_says_how_to_name_it(checkout, command):
    ended = run(checkout, *command)
    assert ended.returncode != 0
    assert installation.NOT_NAMED in ended.stderr


@pytest.mark.parametrize("command", ["check", "makemigrations --check", "help", "help audit", "version", "compose_secrets --help"])
def test_what_needs_no_installation_works_without_one(checkout, command):
    assert run(checkout, "-W", "ignore", "manage.py", *command.split()).returncode == 0


@pytest.mark.parametrize("usual_port", [5432, 5672])
def test_no_server_at_a_usual_port_is_asked(usual_port):
    """By what a process takes for its servers, where nothing is named; a stranger may have the ports themselves."""
    at_default = run(ROOT, "-c", "import core.settings as s; print(s.DATABASES, s.CELERY_BROKER_URL)", DEBUG="true")
    assert at_default.returncode == 0 and f":{usual_port}" not in at_default.stdout and f"{usual_port}" not in at_default.stdout


def test_a_database_that_does_not_answer_is_told_in_a_sentence(checkout, made):
    port = free_port()
    made(**{name: value.format(port=port) for name, value in CHOSEN.items()})

    ended = run(checkout, "manage.py", "audit")

    assert ended.returncode == 1
    assert ended.stderr.startswith(f"PostgreSQL at 127.0.0.1:{port} does not do as asked: ")
    assert ended.stderr.endswith("Is `make up` running?\n")
    assert "Traceback" not in ended.stderr


def test_manage_py_takes_the_environment_of_its_checkout_where_python_has_no_django(checkout):
    bare = checkout / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    python = str(bare / "bin/python")

    ended = run(checkout, "manage.py", "check", python=python)
    assert ended.returncode == 1 and "`make up` makes an environment that has it, in .venv." in ended.stderr

    (checkout / ".venv").symlink_to(ROOT / ".venv" if (ROOT / ".venv").exists() else sys.prefix)
    try:
        assert run(checkout, "manage.py", "check", python=python).returncode == 0
    finally:
        (checkout / ".venv").unlink()


# --- Files of one installation ----------------------------------------------------------------------------------------


def places(**environment):
    """Where a process of this installation has its files, outside of its checkout."""
    show = "import core.settings as s; from pathlib import Path; print(s.LIVENESS_FOLDER)"
    from_settings = run(ROOT, "-c", show, **environment)
    metrics = "import django; django.setup(); from polls import metrics; print(metrics._pool())"
    from_metrics = run(ROOT, "-c", metrics, DJANGO_SETTINGS_MODULE="core.settings", **environment)
    assert from_settings.returncode == from_metrics.returncode == 0, from_settings.stderr + from_metrics.stderr
    return {from_settings.stdout.strip(), from_metrics.stdout.strip()}


def test_two_installations_share_no_file():
    one = {"DATABASE_URL": database_url(), "QUEUE_PREFIX": settings.QUEUE_PREFIX}
    others = [
        {**one, "QUEUE_PREFIX": "other."},
        {**one, "DATABASE_URL": "postgres://nexus@127.0.0.1:25001/nexus"},
        {**one, "DATABASE_URL": "postgres://nexus@127.0.0.1:25002/nexus"},
        {**one, "DATABASE_URL": "postgres://nexus@127.0.0.1:25002/other"},
    ]
    found = [places(**each) for each in (one, *others)]
    assert len(set.union(*found)) == 2 * len(found)


def test_the_processes_of_one_installation_find_each_others_files():
    """Though each logs in as a role of its own."""
    urls = [f"postgres://{login}@127.0.0.1:25001/nexus" for login in ("nexus_web:one", "nexus_worker:another")]
    assert places(DATABASE_URL=urls[0]) == places(DATABASE_URL=urls[1]) == places(DATABASE_URL=urls[0].replace("nexus_web:one@", ""))
