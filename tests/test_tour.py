"""The tours of docs/api.md work when they are pasted, and say what comes out; its tables are complete."""

import json
import os
import re
import subprocess

import pytest
from django.conf import settings

from polls import problems, roles
from polls.models import PollStatus, Scope, VoterPolicy
from tests.conftest import ROOT, process, worker

TOUR = (ROOT / "docs" / "api.md").read_text()
# Each block of commands with what the text says comes out, if it says it.
STEPS = re.findall(r"```bash\n(.*?)```\n(?:```text\n(.*?)```)?", TOUR, re.DOTALL)
MARK = "=== next step ==="


@pytest.fixture
def clock(broker, tmp_path):
    """What closes polls and makes them final, sooner than the minute that the text speaks of."""
    beat = ["celery", "-A", "core", "beat", "--pidfile="]
    with (
        worker(settings.PERIODIC_QUEUE, tmp_path / "periodic.log", concurrency=1, FINAL_AFTER_SECONDS="6"),
        process(*beat, log=tmp_path / "beat.log"),
    ):
        yield


@pytest.mark.skipif("BROKER_API_URL" not in os.environ, reason="no poll becomes final without RabbitMQ's management")
def test_what_the_tours_say_comes_out_when_they_are_pasted(pipeline, clock, tmp_path):
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "dev.json").write_text(json.dumps({"base_url": f"http://127.0.0.1:{pipeline}"}))
    pasted = f"echo '{MARK}'\n".join(commands for commands, _ in STEPS)

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", pasted], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )

    assert (TOUR.count("```bash"), TOUR.count("```text")) == (len(STEPS), sum(said != "" for _, said in STEPS))
    came_out = done.stdout.split(f"{MARK}\n")
    for (commands, said), printed in zip(STEPS, came_out, strict=False):
        assert re.fullmatch(re.escape(said).replace("…", ".+"), printed), f"{commands}\nprinted:\n{printed}\n{done.stderr}"
    assert (done.returncode, done.stderr, len(came_out)) == (0, "", len(STEPS))


def table(heading, columns=1):
    """The first cells of the rows below a heading, without marks."""
    section = TOUR.partition(f"### {heading}")[2].partition("\n###")[0]
    rows = [line.strip("| ").split(" | ")[:columns] for line in section.splitlines() if line.startswith("| ")]
    return [tuple(cell.replace("`", "") for cell in row) for row in rows if set(row[0]) != {"-"}][1:]


def test_the_tables_have_every_policy_stage_role_scope_and_problem():
    known = [(name, status) for names, statuses in table("Problems", columns=2) for name, status in _pairs(names, statuses)]

    assert [policy for (policy,) in table("Who is one voter")] == VoterPolicy.values
    assert [status for (status,) in table("The stages of a poll")] == PollStatus.values
    assert [who for (who,) in table("Roles and scopes")[1:]] == [*roles.ROLES, *(f"API client, {scope}" for scope in Scope.values)]
    assert sorted(known) == sorted((problem.slug, str(problem.status)) for problem in problems.ALL)


def _pairs(names, statuses):
    """Each name with its status, of a row that has several names, and one status or as many."""
    names, statuses = names.split(", "), statuses.split(", ")
    return zip(names, statuses * len(names) if len(statuses) == 1 else statuses, strict=True)
