"""The README's walk-through works when it is pasted, and its settings are the ones there are."""

import json
import re
import subprocess

import pytest
from django.contrib.auth import get_user_model
from django.utils.timezone import now

from polls import voters
from polls.models import ApiClient
from tests.conftest import PASSWORD, ROOT

README = (ROOT / "README.md").read_text()


def test_the_walk_through_works_when_pasted(pipeline, tmp_path):
    admin = get_user_model().objects.create_superuser(f"admin-{now():%s%f}", password=PASSWORD)
    key = voters.new_client_key()
    ApiClient.objects.create(
        owner=admin, name="readme", scopes=["votes:cast"], prefix=voters.key_prefix(key), key_hash=voters.key_hash(key)
    )
    dev = {"base_url": f"http://127.0.0.1:{pipeline}", "admin_user": admin.username, "admin_password": PASSWORD, "client_key": key}
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "dev.json").write_text(json.dumps(dev))
    [walk] = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)

    done = subprocess.run(["bash", "-euo", "pipefail", "-c", walk], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 0, done.stderr
    poll, vote, statuses, results = map(json.loads, done.stdout.splitlines())
    [status] = statuses["votes"]
    assert (poll["title"], vote["status"], status["status"], results["total_votes"]) == ("Lunch", "pending", "counted", 1)


def test_every_setting_has_its_row_and_every_row_its_setting():
    readers = r"(?:env\.\w+|secret|earlier|confidential|number|whole|switch|words)"
    read = set(re.findall(readers + r'\(\s*"([A-Z_]+)"', (ROOT / "core" / "settings.py").read_text()))
    rows = {name for row in re.findall(r"^\| (`.+?) \|", README, re.MULTILINE) for name in re.findall(r"`([A-Z_]+)`", row)}

    assert rows - read == {"PORT", "FLOWER_PORT", "HOST"}  # of `make up`
    assert read - rows == set()


@pytest.mark.parametrize("command", ["up", "test", "demo", "help", "bench"])
def test_every_command_it_names_is_there(command):
    assert f"`make {command}`" in README or f"make {command} " in README
    assert subprocess.run(["make", "-n", command], cwd=ROOT, capture_output=True, check=False).returncode == 0
