"""Flower: behind its login it shows queues, workers and bundles, changes nothing, and knows nothing of voters."""

import os
import re
import subprocess
import sys
from base64 import b64encode
from urllib.parse import urlencode
from uuid import uuid4

import pytest
from celery.events import EventDispatcher
from django.conf import settings
from django.db import transaction
from flower.urls import handlers
from tornado.web import RequestHandler

from polls import voters
from polls.models import ApiClient, Poll
from tasks import events
from tests.conftest import ROOT, Api, free_port, process, tallies, wait_until

COMMAND = ["celery", "-A", "core", "flower", "--conf=core/flower_config.py", "--address=127.0.0.1"]


@pytest.fixture(scope="module")
def flower(pipeline, tmp_path_factory):
    """A running Flower, as one sees it who is signed in, and the name of the worker that it watches."""
    port, login = free_port(), f"flower:{uuid4()}"
    with process(*COMMAND, f"--port={port}", log=tmp_path_factory.mktemp("flower") / "flower.log", FLOWER_BASIC_AUTH=login):
        signed_in = Api(port, {"authorization": f"Basic {b64encode(login.encode()).decode()}"})

        def sees_a_worker():
            try:
                return signed_in.get("/workers?json=1").json["data"]
            except OSError:
                return False

        wait_until(sees_a_worker)
        yield signed_in


@pytest.fixture(scope="module")
def worker_name(flower):
    """The worker of this test run; others may use the same broker."""
    names = []

    def is_seen():
        workers = flower.get("/api/workers?refresh=1").json
        names.extend(name for name, worker in workers.items() if settings.VOTES_QUEUES[0] in str(worker.get("active_queues")))
        return names

    wait_until(is_seen)
    return names[0]


def routes(method):
    """Every address of Flower that takes this method, some words in the place of the variable ones."""
    found = [(handler.regex.pattern if hasattr(handler, "regex") else handler[0], handler) for handler in handlers]
    for pattern, handler in found:
        handler_class = handler.handler_class if hasattr(handler, "regex") else handler[1]
        if getattr(handler_class, method) is not getattr(RequestHandler, method) and pattern != ".*":
            yield re.sub(r"\(\.[+*]\)", "votes.count", pattern.rstrip("$").replace("/?", ""))


def pages(flower, worker_name):
    """{address: text} of all that Flower shows of the pipeline."""
    table = {"draw": 1, "start": 0, "length": 1000, "order[0][column]": 0, "columns[0][data]": "received", "order[0][dir]": "desc"}
    paths = ["/", "/tasks", "/broker", "/metrics", "/api/tasks", "/api/task/types", f"/tasks/datatable?{urlencode(table)}"]
    paths += [f"/worker/{worker_name}", f"/api/workers?refresh=1&workername={worker_name}"]
    return {path: flower.get(path).text for path in paths}


# --- The login --------------------------------------------------------------------------------------------------------


def test_it_does_not_start_without_a_login():
    env = {name: value for name, value in os.environ.items() if name not in ("FLOWER_BASIC_AUTH", "FLOWER_AUTH")}
    command = [sys.executable, "-m", *COMMAND, f"--port={free_port()}"]

    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=20)

    assert ended.returncode != 0
    assert ended.stderr.splitlines()[-1] == "Flower needs a login: set FLOWER_BASIC_AUTH=user:password."


def test_without_the_login_only_liveness_metrics_and_pictures_are_shown(flower):
    assert len(list(routes("get"))) > 15
    for wrong in (None, "Basic " + b64encode(b"flower:guess").decode(), "Basic", "Bearer x"):
        nobody = Api(flower.port, {"authorization": wrong})
        answered = {path: nobody.get(path).status for path in routes("get")}
        open_to_all = {"/metrics", "/healthcheck", "/static/votes.count", "/logout"}
        assert {path for path, status in answered.items() if status != 401} == open_to_all


def test_nobody_controls_anything_with_or_without_the_login(flower, worker_name):
    """A bundle that was revoked here would be votes lost after their 202."""
    controls = [path for path in routes("post") if path.startswith("/api/")]
    assert {"/api/worker/shutdown/votes.count", "/api/task/revoke/votes.count", "/api/task/send-task/votes.count"} <= set(controls)
    controls += [path.replace("votes.count", worker_name) for path in controls if "/worker/" in path]

    for path in controls:
        for wrong in (None, "Basic " + b64encode(b"flower:guess").decode()):
            assert flower.post(path, {"args": [[]]}, authorization=wrong).status == 401, path
        refused = flower.post(path, {"args": [[]]})
        assert (refused.status, refused.text) == (403, "Read only mode is enabled"), path


def test_another_sites_page_can_not_use_the_login(flower):
    for header in ({"sec_fetch_site": "cross-site"}, {"origin": "http://evil.example.org"}):
        assert flower.post("/api/task/revoke/x", {}, **header).status == 403
    assert flower.get("/api/tasks").headers["access-control-allow-origin"] is None


# --- What it shows ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("BROKER_API_URL" not in os.environ, reason="this RabbitMQ's management API is not known")
def test_its_broker_page_lists_the_queues_the_dead_letters_too(flower):
    wanted = {*settings.VOTES_QUEUES, settings.DEAD_LETTER_QUEUE, settings.PERIODIC_QUEUE}

    wait_until(lambda: wanted <= set(re.findall(r">\s*([\w.-]+)\s*</td>", flower.get("/broker").text)))
    assert {queue["name"] for queue in flower.get("/api/queues/length").json["active_queues"]} == wanted


def test_it_shows_bundles_by_their_size_and_nothing_of_a_voter(flower, worker_name, api, client_key, make_poll):
    """Also of bundles that a worker holds: two are being counted, others wait in its memory."""
    poll, names = make_poll(), [f"alice-{uuid4()}" for _ in range(6)]
    client = ApiClient.objects.get(prefix=voters.key_prefix(client_key))
    with transaction.atomic():
        Poll.objects.select_for_update().get(pk=poll.pk)  # what counts a vote of it waits
        accepted = [api.cast(poll, name).json for name in names]
        wait_until(lambda: "<1 votes>" in flower.get(f"/api/workers?refresh=1&workername={worker_name}").text)
        seen = pages(flower, worker_name)
    wait_until(lambda: tallies(poll) == {"soup": 6})
    wait_until(lambda: flower.get("/api/tasks?taskname=votes.count&state=SUCCESS&limit=1").json)
    seen |= {f"afterwards {path}": text for path, text in pages(flower, worker_name).items()}

    assert "<1 votes>" in seen["/api/tasks"] and "args" in seen["/tasks"]
    secrets = [*names, *(vote[key] for vote in accepted for key in ("id", "receipt"))]
    secrets += [str(voters.VoterKeys(poll.pk, "client", poll.voter_salt).of(f"{client.id}:{name}")) for name in names]
    for path, text in seen.items():
        for secret in secrets:
            assert secret not in text and secret.replace("-", "") not in text, path


def test_it_is_told_of_some_bundles_where_there_are_many_and_of_each_failure(monkeypatch):
    """All of them would take a fifth of a worker's time; and whoever is told that a task began is told how it ended."""
    told = []
    monkeypatch.setattr(EventDispatcher, "send", lambda self, type, **fields: told.append((type, fields["uuid"])))
    monkeypatch.setattr(events.time, "monotonic", lambda: 7.0)
    dispatcher = events.Dispatcher(None, enabled=False)
    bundles = [str(number) for number in range(events.TOLD_PER_SECOND + 2)]
    mail, (*shown, fails, quiet) = "mail", bundles

    for task in [*bundles, mail]:
        dispatcher.send("task-received", uuid=task, name="mail.send" if task == mail else "votes.count")
        dispatcher.send("task-started", uuid=task)
    for task in [*bundles, mail]:
        dispatcher.send("task-failed" if task == fails else "task-succeeded", uuid=task)

    begun = [(what, task) for task in [*shown, mail] for what in ("task-received", "task-started")]
    ended = [*(("task-succeeded", task) for task in shown), ("task-failed", fails), ("task-succeeded", mail)]
    assert told == begun + ended
    assert quiet not in {task for _, task in told}
    monkeypatch.setattr(events.time, "monotonic", lambda: 8.0)
    dispatcher.send("task-received", uuid=quiet, name="votes.count")
    assert told[-1] == ("task-received", quiet)


def test_it_shows_no_setting(flower, worker_name):
    for path, text in pages(flower, worker_name).items():
        assert "CELERY_BROKER_URL" not in text and "SECRET_KEY" not in text and "DATABASES" not in text, path
