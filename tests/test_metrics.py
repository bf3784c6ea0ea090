"""Metrics: each process tells what it did, killed ones included, on a port of its own; and nobody learns of a voter."""

import os
import shutil
import signal
from dataclasses import dataclass
from urllib.request import urlopen
from uuid import uuid4

import psutil
import pytest
from celery import current_app
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.utils.timezone import now
from prometheus_client.parser import text_string_to_metric_families

from polls import integrity, jobs, metrics, outbox, watching
from polls.models import OutboxBundle
from stack.product import programs
from tasks import queues
from tests.conftest import Api, answers, bundle_of, free_port, queues_of_their_own, vote_of, wait_until, web, worker
from tests.test_following import followed


@dataclass
class Scraped:
    """What one port tells."""

    port: int

    @property
    def text(self):
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            return answer.read().decode()

    def value(self, name, **labels):
        """The sample's value; 0 for one that nobody has told yet."""
        samples = [sample for family in text_string_to_metric_families(self.text) for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == f"nexus_{name}" and sample.labels == labels)

    @property
    def answers(self):
        try:
            return bool(self.text)
        except OSError:
            return False


@dataclass
class Processes:
    api: Api
    web: Scraped
    worker: Scraped
    periodic: Scraped
    worker_pid: int


def pool_of(port):
    """Where the processes of this port keep their figures."""
    [pool] = metrics._pool().parent.glob(f"{metrics.PREFIX}metrics_*_{port}")
    return pool


@pytest.fixture(scope="module")
def processes(broker, client_key, tmp_path_factory):
    """A web process and both workers that tell their figures."""
    logs, port = tmp_path_factory.mktemp("metrics"), free_port()
    scraped = [Scraped(free_port()) for _ in range(3)]
    ports = [{"METRICS_PORT": str(each.port)} for each in scraped]
    with (
        queues_of_their_own(),
        web(port, logs / "web.log", **ports[0]),
        worker(",".join(settings.VOTES_QUEUES), logs / "worker.log", **ports[1]) as worker_process,
        worker(settings.PERIODIC_QUEUE, logs / "periodic.log", concurrency=1, **ports[2]),
    ):
        wait_until(lambda: answers(port) and all(each.answers for each in scraped))
        api = Api(port, {"authorization": f"Api-Key {client_key}"})
        yield Processes(api, *scraped, worker_process.pid)
    for each in scraped:
        shutil.rmtree(pool_of(each.port))


def told_by_this_process(name, **labels):
    return metrics.registry.get_sample_value(f"nexus_{name}", labels)


# --- What is told -----------------------------------------------------------------------------------------------------


def test_a_votes_way_is_told_by_web_and_worker(processes, poll):
    before = processes.worker.value("votes_decided_total", outcome="counted", reason="")
    taken = processes.web.value("votes_accepted_total", way="queue")

    processes.api.cast(poll, "alice")
    wait_until(lambda: processes.worker.value("votes_decided_total", outcome="counted", reason="") == before + 1)

    assert processes.web.value("votes_accepted_total", way="queue") == taken + 1
    assert processes.web.value("bundles_published_total", result="confirmed") == processes.web.value("confirm_seconds_count")
    assert processes.web.value("bundle_votes_sum") == taken + 1
    assert processes.web.value("votes_waiting") == 0
    assert processes.web.value("publishers_connected") == processes.web.value("web_processes") == 1
    assert 0 < processes.worker.value("accept_to_count_seconds_sum") / processes.worker.value("accept_to_count_seconds_count") < 10
    assert processes.worker.value("count_seconds_count") >= 1


def test_a_duplicate_and_a_repeat_are_told_apart(processes, poll):
    def decided(outcome, reason):
        return processes.worker.value("votes_decided_total", outcome=outcome, reason=reason)

    repeats, duplicates = decided("repeat", ""), decided("rejected", "duplicate")

    for text, key in (("soup", "mine"), ("soup", "mine"), ("salad", "another")):
        assert processes.api.cast(poll, "bob", text, idempotency_key=key).status == 202

    wait_until(lambda: (decided("repeat", ""), decided("rejected", "duplicate")) == (repeats + 1, duplicates + 1))


def test_refusals_are_told_by_their_cause_whichever_door_they_came_by(processes, poll):
    def refused(cause):
        return processes.web.value("refusals_total", cause=cause)

    before = {cause: refused(cause) for cause in ("unknown-poll", "unauthenticated", "unknown-option", "not-found", "invalid")}

    processes.api.post(f"/api/v1/polls/{uuid4()}/votes", {"option": "1", "voter": "alice"})  # a hot route
    processes.api.get("/api/v1/auth/me", authorization=None)  # the REST framework
    processes.api.get("/api/v1/nothing-is-here")  # Django
    processes.api.post(f"/api/v1/polls/{poll.pk}/votes/batch", [{"option": "0", "voter": "alice"}])
    processes.api.post("/graphql", {"query": "{ nothing }"})

    assert {cause: refused(cause) - number for cause, number in before.items()} == dict.fromkeys(before, 1)


def test_caches_tell_hits_and_misses(processes, poll):
    hits = processes.web.value("cache_hits_total", cache="polls")
    misses = processes.web.value("cache_misses_total", cache="polls")

    processes.api.cast(poll, "alice")
    assert processes.web.value("cache_misses_total", cache="polls") == misses + 1

    def told():  # hits are told with the next look at the database
        processes.api.cast(poll, "alice")
        return processes.web.value("cache_hits_total", cache="polls") > hits

    wait_until(told)


def test_followers_are_told_while_they_follow_and_what_is_sent_to_them(processes, poll):
    sent = processes.web.value("events_sent_total")
    path = f"/api/v1/polls/{poll.pk}/results/stream"

    with followed(processes.api.port, path) as one, followed(processes.api.port, path) as other:
        assert (one.next_results()["total_votes"], other.next_results()["total_votes"]) == (0, 0)
        assert processes.web.value("followers") == 2
        processes.api.cast(poll, "alice")
        assert (one.next_results()["total_votes"], other.next_results()["total_votes"]) == (1, 1)

    assert processes.web.value("events_sent_total") == sent + 4
    wait_until(lambda: processes.web.value("followers") == 0)


def test_nothing_told_names_a_poll_a_voter_or_an_address(processes, poll):
    processes.api.cast(poll, "alice")
    wait_until(lambda: processes.worker.value("votes_decided_total", outcome="counted", reason=""))

    for text in (processes.web.text, processes.worker.text, processes.periodic.text):
        for secret in (str(poll.pk), poll.title, "alice", "127.0.0.1", "salad"):
            assert secret not in text


# --- Where it is told -------------------------------------------------------------------------------------------------


def test_the_web_port_tells_nobody(processes):
    assert processes.api.get("/metrics").status == 404


def test_no_port_no_files():
    assert settings.METRICS_PORT == 0
    assert metrics.POOL is None


def test_killed_children_take_no_figure_with_them(processes, poll):
    def counted():
        return processes.worker.value("votes_decided_total", outcome="counted", reason="")

    before = counted()
    processes.api.cast(poll, "alice")
    wait_until(lambda: counted() == before + 1)
    children = psutil.Process(processes.worker_pid).children()

    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(psutil.pid_exists, [child.pid for child in children])))
    assert counted() == before + 1
    processes.api.cast(poll, "bob")
    wait_until(lambda: counted() == before + 2)

    left = {int(path.stem.rpartition("_")[2]) for path in pool_of(processes.worker.port).glob("*.db")}
    assert not left & {child.pid for child in children}


def test_web_processes_that_share_a_port_answer_for_each_other(processes, poll, client_key, tmp_path):
    metrics_port, ports = free_port(), [free_port(), free_port()]
    scraped = Scraped(metrics_port)
    with (
        web(ports[0], tmp_path / "first.log", METRICS_PORT=str(metrics_port)) as first,
        web(ports[1], tmp_path / "second.log", METRICS_PORT=str(metrics_port)) as second,
    ):
        wait_until(lambda: all(map(answers, ports)) and scraped.answers)
        for number, port in enumerate(ports):
            Api(port, processes.api.headers).cast(poll, f"voter {number}")
        wait_until(lambda: scraped.value("votes_accepted_total", way="queue") == 2)
        assert scraped.value("web_processes") == 2

        [holder] = [each for each in (first, second) if metrics_port in listening(each.pid)]
        holder.kill()
        holder.wait()

        wait_until(lambda: scraped.answers)
        assert scraped.value("votes_accepted_total", way="queue") == 2
        assert scraped.value("web_processes") == 1
    shutil.rmtree(pool_of(metrics_port))


def listening(pid):
    return {found.laddr.port for found in psutil.Process(pid).net_connections() if found.status == psutil.CONN_LISTEN}


def test_each_program_of_one_machine_gets_a_port_of_its_own():
    given = {"HOST": "127.0.0.1", "PORT": "8000", "FLOWER_PORT": "5555", "CELERY_BROKER_URL": ""}

    def ports(**environment):
        return {program.name: program.env.get("METRICS_PORT") for program in programs({**given, **environment})}

    assert ports(METRICS_PORT="9100") == {"web": "9100", "worker": "9101", "periodic": "9102", "beat": "0", "flower": "0"}
    assert set(ports().values()) == {"0"}


# --- What database, broker and cache know -----------------------------------------------------------------------------


def seen():
    """{(name, labels): value} of one look."""
    samples = [sample for family in watching.look(at=now()) for sample in family.samples]
    return {(sample.name.removeprefix("nexus_"), *sample.labels.values()): sample.value for sample in samples}


def test_the_worker_of_the_clocks_jobs_tells_what_waits(processes):
    wait_until(lambda: processes.periodic.value("reached", part="database") == 1)

    assert processes.periodic.value("reached", part="broker") == 1
    assert 'nexus_queue_consumers{queue="votes.even"}' in processes.periodic.text
    wait_until(lambda: seen()["queue_consumers", "votes.even"] == 1)
    assert "nexus_reached" not in processes.worker.text


def test_outbox_and_dead_letters(poll, broker, bury):
    bury(*bundle_of(vote_of(poll, "alice")))
    outbox.keep(b"not a bundle")
    try:
        found = seen()
        assert (found["outbox_bundles",], found["dead_letters",], found["queue_ready", "votes.dead"]) == (1, 1, 1)
        assert 0 <= found["outbox_oldest_age_seconds",] < 10
    finally:
        OutboxBundle.objects.all().delete()
    assert seen()["outbox_oldest_age_seconds",] == 0


def test_a_poll_that_should_be_final_and_is_not(make_poll, broker):
    make_poll(closes_in=-7200)

    found = seen()

    assert found["finalisation_delay_seconds",] == pytest.approx(7200 - settings.FINAL_AFTER_SECONDS, abs=30)
    assert found["polls_closing",] >= 1


def test_when_a_job_last_succeeded_is_known(processes):
    before = now()

    current_app.send_task("cases.expire", queue=queues.consumed()[-1])

    wait_until(lambda: (jobs.successes()["cases.expire"] or before) > before)
    assert set(jobs.successes()) == {entry["task"] for entry in settings.CELERY_BEAT_SCHEDULE.values()}
    assert seen()["job_success_timestamp_seconds", "cases.expire"] > before.timestamp()
    assert seen()["job_interval_seconds", "cases.expire"] == 86_400


def test_a_database_that_is_away_hides_nothing_else(broker, monkeypatch):
    monkeypatch.setitem(connections["default"].settings_dict, "PORT", str(free_port()))
    connection.close()

    found = seen()

    assert (found["reached", "database"], found["reached", "broker"]) == (0, 1)
    assert ("outbox_bundles",) not in found
    assert ("dead_letters",) in found


def test_a_broker_that_is_away_hides_nothing_else(broker_away):
    found = seen()

    assert (found["reached", "database"], found["reached", "broker"]) == (1, 0)
    assert ("outbox_bundles",) in found


def test_a_tally_that_was_repaired_is_told(poll):
    before = told_by_this_process("integrity_mismatches_total")
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO tallies (poll_id, selection, votes, counted, revision) VALUES (%s, '{}', 7, 7, 1)", [poll.pk])

    integrity.check_soon(at=now())

    assert told_by_this_process("integrity_mismatches_total") == before + 1


# --- Redis ------------------------------------------------------------------------------------------------------------


def test_a_cache_in_memory_keeps_no_figures():
    with pytest.raises(CommandError, match="The cache is in each process's own memory"):
        call_command("cache_stats")


def test_a_redis_that_is_away_is_told_without_its_password(settings):
    settings.CACHES = redis_at(f"redis://:terces@127.0.0.1:{free_port()}/0")

    with pytest.raises(CommandError, match=r"^Redis does not answer \(ConnectionError\)\.$"):
        call_command("cache_stats")
    assert seen()["reached", "cache"] == 0


def redis_at(url):
    return {"default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": url}}


@pytest.fixture
def redis(settings):
    """A Redis at its usual port; without one there is nothing to test."""
    settings.CACHES = redis_at("redis://127.0.0.1:6379/0")
    try:
        watching.keyspace()
    except OSError:
        pytest.skip("no Redis at 127.0.0.1:6379")
    except Exception as exc:
        pytest.skip(f"no Redis at 127.0.0.1:6379 ({type(exc).__name__})")


def test_redis_tells_hits_and_misses(redis, capsys):
    from django.core.cache import cache

    before = watching.keyspace()

    assert cache.get(f"nobody-has-set-{uuid4()}") is None

    hits, misses = watching.keyspace()
    assert hits >= before[0]
    assert misses > before[1]
    assert seen()["redis_keyspace_misses_total",] >= misses
    call_command("cache_stats")
    assert "hit ratio" in capsys.readouterr().out
