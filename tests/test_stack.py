"""`make up`, for real, in a folder of its own: what it says, what it survives, and that nothing of it stays behind."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stack import Program, Stack
from stack.folder import Folder, is_free
from stack.program import http_ok
from stack.stack import OWN
from stack.supervisor import Supervisor, leftovers
from tests.conftest import free_port, wait_until


def stack_command(folder, *arguments):
    return [sys.executable, "-m", "stack", "--folder", str(folder), *arguments]


def clean_env(**given):
    """Without the servers that this test run itself uses."""
    return {name: value for name, value in os.environ.items() if name not in OWN} | given


def call(folder, *arguments, **env):
    return subprocess.run(stack_command(folder, *arguments), env=clean_env(**env), capture_output=True, text=True, timeout=30)


def pid_of(folder, name):
    return Supervisor(Folder(folder)).processes()[name]["pid"]


class Up:
    """A `make up` that runs."""

    def __init__(self, folder):
        self.folder = folder
        self.log = folder.with_suffix(".out")
        env = clean_env(PORT=str(free_port()), FLOWER_PORT=str(free_port()))
        with self.log.open("w") as out:
            self.process = subprocess.Popen(stack_command(folder, "up"), env=env, stdout=out, stderr=out)

    def said(self):
        return self.log.read_text()

    def dev(self):
        return json.loads((self.folder / "dev.json").read_text())


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    # A space, and longer than the path of a unix socket may be.
    up = Up(tmp_path_factory.mktemp("a checkout in a folder of a folder with a long name") / ("x" * 60))
    try:
        wait_until(lambda: (up.folder / "dev.json").exists() or up.process.poll() is not None, seconds=55)
        assert up.process.poll() is None, up.said()
        yield up
    finally:
        up.process.terminate()
        up.process.wait(timeout=50)
        Stack(up.folder).destroy()


def test_up_says_what_it_chose_and_where_everything_is(up):
    said = up.said()

    assert "PostgreSQL: " in said
    assert "(DATABASE_URL is not set; " in said
    assert "(CELERY_BROKER_URL is not set; " in said
    assert f"{up.dev()['base_url']}/api/docs" in said
    assert up.dev()["admin_password"] not in said
    assert http_ok("127.0.0.1", int(up.dev()["base_url"].rpartition(":")[2]), "/healthz")


def test_its_secrets_are_its_owners_alone(up):
    for name in ("dev.json", "state.json", "supervisord.conf", "rabbitmq/rabbitmq.conf"):
        assert stat.S_IMODE((up.folder / name).stat().st_mode) == 0o600
    assert up.dev()["client_key"].count("_") == 2
    for pid in up.dev()["pids"].values():
        assert up.dev()["database_url"].encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_second_up_says_that_one_runs(up):
    second = call(up.folder, "up")

    assert second.returncode == 1
    assert f"Nexus runs already: {up.dev()['base_url']}" in second.stdout


def test_a_command_shares_the_servers_that_run(up):
    command = call(up.folder, "run", "--", "python", "-c", "import os; print(os.environ['DATABASE_URL']); raise SystemExit(7)")

    assert command.stdout.strip() == up.dev()["database_url"]
    assert command.returncode == 7
    assert pid_of(up.folder, "postgres")


@pytest.mark.parametrize("name", ["worker", "web", "postgres", "rabbitmq"])
def test_what_is_killed_runs_again_within_two_seconds(up, name):
    old_pid = pid_of(up.folder, name)

    os.kill(old_pid, signal.SIGKILL)

    wait_until(lambda: pid_of(up.folder, name) not in (0, old_pid), seconds=2)
    new_pid = pid_of(up.folder, name)
    wait_until(lambda: f"{name} died (pid {old_pid}, terminated by SIGKILL); running again as pid {new_pid} after" in up.said(), seconds=2)
    if name in up.dev()["pids"]:
        wait_until(lambda: up.dev()["pids"][name] == new_pid, seconds=2)


def test_down_ends_all_of_it_and_tells_up(up):
    down = call(up.folder, "down")

    assert down.returncode == 0
    assert "worker" in down.stdout
    assert up.process.wait(timeout=10) == 0
    assert up.said().endswith("Stopped by `make down`.\n")
    assert leftovers(Folder(up.folder)) == []
    assert not (up.folder / "dev.json").exists()
    assert call(up.folder, "down").stdout == "Nothing was running.\n"


def test_a_taken_port_is_refused_by_the_name_of_its_variable(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        up = call(tmp_path, "up", FLOWER_PORT=str(port), PORT=str(free_port()))

    assert up.returncode == 1
    assert f"Port {port} is taken by another program. Choose another one: `make up FLOWER_PORT={port + 1}`" in up.stdout
    assert not (tmp_path / "postgres").exists()


@pytest.mark.parametrize(("name", "scheme"), [("DATABASE_URL", "postgres"), ("CELERY_BROKER_URL", "amqp")])
def test_a_server_that_does_not_answer_is_told_by_its_variable_without_its_password(tmp_path, name, scheme):
    url = f"{scheme}://nexus:terces@127.0.0.1:{free_port()}/nexus"
    command = call(tmp_path, "run", "--", "true", **{"DATABASE_URL": os.environ["DATABASE_URL"], name: url})

    assert command.returncode == 1
    assert f"Failed: {name} is set, but" in command.stderr
    assert "terces" not in command.stderr


@pytest.fixture
def small_stack(tmp_path):
    """A stack of one program, on the servers of this test run."""
    port = free_port()
    program = Program(
        name="files",
        command=[sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)],
        answers=lambda: http_ok("127.0.0.1", port, "/"),
        directory=tmp_path,
    )
    servers = {name: os.environ[name] for name in ("DATABASE_URL", "CELERY_BROKER_URL")}
    return lambda: Stack(tmp_path, servers, programs=lambda env: [program])


def test_a_program_is_started_stopped_and_started_again(small_stack):
    with small_stack() as stack:
        stack.start("files")
        old_pid = stack.kill("files")
        new_pid = stack.wait_until_back("files", old_pid)
        assert new_pid != old_pid

        stack.stop("files")
        assert stack.pid("files") == 0
        stack.restart("files")
        assert stack.pid("files") != 0

    assert leftovers(stack.folder) == []


def test_what_a_killed_supervisor_left_is_ended_before_the_next_start(small_stack):
    with small_stack() as stack:
        stack.start("files")
        left = stack.pid("files")
        os.kill(int((stack.folder / "supervisord.pid").read_text()), signal.SIGKILL)
        stack.folder.unlock()  # as when its owner was killed too

        with small_stack() as next_stack:
            next_stack.start("files")
            assert next_stack.pid("files") != left
            assert left not in leftovers(stack.folder)


def test_a_program_that_ends_at_once_is_told_with_its_log(tmp_path):
    servers = {name: os.environ[name] for name in ("DATABASE_URL", "CELERY_BROKER_URL")}
    program = Program("broken", [sys.executable, "-c", "print('no such thing')"], answers=lambda: False)
    with (
        Stack(tmp_path, servers, programs=lambda env: [program]) as stack,
        pytest.raises(Exception, match="broken ends as soon as") as failed,
    ):
        stack.start("broken")

    assert "no such thing" in failed.value.log.read_text()


def test_ports_are_kept_while_they_are_free(tmp_path):
    port = Folder(tmp_path).port("postgres")
    assert Folder(tmp_path).port("postgres") == port

    with socket.create_server(("127.0.0.1", port)):
        other = Folder(tmp_path).port("postgres")
    assert other != port
    assert is_free(other)


def test_secrets_are_made_once(tmp_path):
    secret = Folder(tmp_path).secret("SECRET_KEY")

    assert Folder(tmp_path).secret("SECRET_KEY") == secret
    assert len(secret) >= 32
