"""`make fuzz`: the running pipeline against its own schema, as schemathesis sees it: every operation, examples, edges, links.

Runs twice, as a superuser and as an API client with all scopes. Ends with 1 when an answer is none that the schema knows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import django
from django.conf import settings
from django.test.utils import setup_test_environment

# A request that is right in shape may still be refused for what it says: a poll that is not open, a choice that is none, a time
# that has passed. These answers are in the schema; their bodies are checked against it like all others.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 304, 400, 401, 403, 404, 406, 409, 412, 415, 422, 429]
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=25, help="generated requests for each operation")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")
    os.environ["QUEUE_PREFIX"] = f"fuzz-{os.getpid()}."
    django.setup()
    setup_test_environment()
    from tests import conftest

    with conftest.database(), tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> int:
    """Start the processes, and schemathesis once for each caller; return how many of its runs failed."""
    from rest_framework_simplejwt.tokens import AccessToken

    from tasks import queues
    from tests import conftest

    queues.declare()
    user = conftest.make_user("fuzzer", "owner")
    user.is_superuser = True
    user.save()
    token = AccessToken.for_user(user)
    token.set_exp(lifetime=timedelta(hours=2))
    # The key is made when its turn has come: the superuser's run revokes what it finds.
    callers = {"a superuser": lambda: f"Bearer {token}", "an API client": lambda: f"Api-Key {conftest.make_key(user)}"}
    port, config = conftest.free_port(), folder / "schemathesis.toml"
    config.write_text(CONFIG)
    with (
        conftest.web(port, folder / "web.log", CLIENT_VOTES_PER_MINUTE="0"),
        conftest.worker(",".join(settings.VOTES_QUEUES), folder / "worker.log"),
    ):
        conftest.wait_until(lambda: conftest.answers(port))
        failed = 0
        for caller, authorization in callers.items():
            sys.stdout.write(f"As {caller}:\n")
            sys.stdout.flush()
            command = ["schemathesis", "--config-file", str(config), "run", f"http://127.0.0.1:{port}/api/schema?format=json"]
            command += ["-H", f"Authorization: {authorization()}", "--max-examples", str(arguments.examples), "--seed", str(arguments.seed)]
            command += ["--checks", "all", "--exclude-checks", "ignored_auth,object_level_authorization", "--continue-on-failure"]
            command += ["--exclude-operation-id", "results_follow"]  # its answer has no end
            environment = {**os.environ, "PYTHONPATH": str(conftest.ROOT), "SCHEMATHESIS_HOOKS": "tests.fuzz_ndjson"}
            failed += (
                subprocess.run(
                    [Path(sys.executable).parent / command[0], *command[1:]], cwd=folder, env=environment, check=False
                ).returncode
                != 0
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
