"""What runs in containers: programs, compose files, Kubernetes manifests and workflows fit the product and each other."""

import re
import signal
from io import StringIO
from itertools import chain

import pytest
import yaml
from django.conf import settings
from django.core.management import call_command, get_commands

from core.__main__ import KEEP_ALIVE_SECONDS, STOP_SECONDS, command
from stack.program import http_ok
from tests.conftest import ROOT, free_port, process, wait_until
from tests.test_settings import settings_read

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
MONITORING = yaml.safe_load((ROOT / "deploy" / "compose.monitoring.yml").read_text())
SERVICES = COMPOSE["services"] | MONITORING["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].endswith("nexus}")}
NGINX = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
MANIFESTS = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))}
PODS = {
    manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"]
    for manifest in chain.from_iterable(MANIFESTS.values())
    if manifest["kind"] in ("Deployment", "Job")
}
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
PROGRAMS = ("web", "worker", "periodic", "beat", "flower", "setup")
# Read by Flower and by OpenSSL.
NOT_OURS = {"FLOWER_BASIC_AUTH", "FLOWER_BASIC_AUTH_FILE", "SSL_CERT_FILE"}


def seconds(text):
    return int(text.removesuffix("s"))


def manifest(kind, name):
    [found] = [m for m in chain.from_iterable(MANIFESTS.values()) if m["kind"] == kind and m["metadata"].get("name") == name]
    return found


# --- The programs -----------------------------------------------------------------------------------------------------


def test_the_image_knows_every_program_by_its_name():
    for name in PROGRAMS:
        assert command(name) or name in get_commands(), name


def test_what_is_no_program_is_said_to_be_none(tmp_path):
    with process("core", "wroker", log=tmp_path / "log") as wroker:
        assert wroker.wait(30) != 0

    assert "Unknown command: 'wroker'" in (tmp_path / "log").read_text()


def test_web_starts_by_its_name_and_a_signal_ends_it(tmp_path):
    port = free_port()
    with process("core", "web", f"--port={port}", log=tmp_path / "log") as web:
        wait_until(lambda: http_ok("127.0.0.1", port, "/healthz"))
        web.send_signal(signal.SIGTERM)

        web.wait(10)

    assert "Application shutdown complete" in (tmp_path / "log").read_text()


def test_workers_take_from_the_queues_that_web_fills():
    assert ",".join(settings.VOTES_QUEUES) in command("worker")
    assert settings.PERIODIC_QUEUE in command("periodic")


# --- docker-compose.yml -----------------------------------------------------------------------------------------------


def test_compose_has_each_program_once_and_by_its_name():
    assert {name: service["command"] for name, service in OURS.items()} == {name: [name] for name in PROGRAMS}


def test_every_image_is_pinned_by_its_digest():
    dockerfile = re.findall(r"^(?:ARG \w+=|FROM )(\S+:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    others = [service["image"] for name, service in SERVICES.items() if name not in OURS]

    for image in dockerfile + others:
        assert re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image
    assert dockerfile


def test_only_the_front_is_reached_from_outside():
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert len(ports.pop("front")) == 2
    assert ports.keys() == {"flower", "prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for port in chain.from_iterable(ports.values()))
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert all("inside" in service["networks"] for service in SERVICES.values())
    assert {name for name in ("postgres", "rabbitmq", "redis", "beat", "setup") if SERVICES[name]["networks"] != ["inside"]} == set()


@pytest.mark.parametrize("name", ["web", "worker", "periodic"])
def test_what_scales_has_no_name_and_no_port_of_its_own(name):
    assert not {"container_name", "hostname", "ports"} & SERVICES[name].keys()


@pytest.mark.parametrize("name", [*PROGRAMS, "front", "redis"])
def test_containers_may_little(name):
    service = SERVICES[name]

    assert (service["read_only"], service["cap_drop"], service["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])


def test_settings_in_compose_and_kubernetes_are_settings():
    told = set(chain.from_iterable(service["environment"] for service in OURS.values()))
    told |= set(manifest("ConfigMap", "nexus")["data"]) | set(
        chain.from_iterable(s["stringData"] for s in MANIFESTS["secret.example.yaml"])
    )
    told |= {variable["name"] for pod in PODS.values() for variable in pod["containers"][0].get("env", [])}

    assert {name.removesuffix("_FILE") for name in told - NOT_OURS} - set(settings_read()) == set()


def test_the_secrets_that_compose_mounts_are_made_once_and_each_process_gets_its_own(tmp_path):
    call_command("compose_secrets", tmp_path, stdout=StringIO())
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    call_command("compose_secrets", tmp_path, stdout=StringIO())

    files = [secret["file"] for secret in (COMPOSE["secrets"] | MONITORING["secrets"]).values()]
    files += [mount.split(":/")[0] for mount in SERVICES["rabbitmq"]["volumes"] if "SECRETS_FOLDER" in mount]
    assert {re.sub(r".*\}/", "", file) for file in files} <= made.keys()
    again = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {name for name in made if made[name] != again[name]} == {"rabbitmq_definitions.json"}  # salts
    for name, service in OURS.items():
        mounted = {given if isinstance(given, str) else given["target"] for given in service["secrets"]}
        asked = {path.removeprefix("/run/secrets/") for path in service["environment"].values() if str(path).startswith("/run/secrets/")}
        assert asked == mounted, name
        logins = {given["source"] for given in service["secrets"] if isinstance(given, dict)}
        role = {"periodic": "worker", "beat": "worker"}.get(name, name)
        user = {"periodic": "worker"}.get(name, name)
        assert logins == {f"broker_url_{user}"} | ({f"database_url_{role}"} if name != "flower" else set()), name


def test_programs_wait_for_setup_and_setup_for_servers():
    for name in PROGRAMS[:-1]:
        assert OURS[name]["depends_on"] == {"setup": {"condition": "service_completed_successfully"}}, name
    assert {name: on["condition"] for name, on in OURS["setup"]["depends_on"].items()} == dict.fromkeys(
        ("postgres", "rabbitmq", "redis"), "service_healthy"
    )


def test_who_is_asked_to_stop_has_the_time_for_it():
    worker_seconds = settings.CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT

    assert seconds(SERVICES["web"]["stop_grace_period"]) > STOP_SECONDS
    assert PODS["web"]["terminationGracePeriodSeconds"] > STOP_SECONDS + 5  # preStop
    for name in ("worker", "periodic"):
        assert seconds(SERVICES[name]["stop_grace_period"]) > worker_seconds
        assert PODS[name]["terminationGracePeriodSeconds"] > worker_seconds


def test_what_is_mounted_is_there():
    mounts = [mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", []) if mount.startswith("./")]

    assert len(mounts) >= 4
    assert [mount for mount in mounts if not (ROOT / mount).exists()] == []


def test_prometheus_asks_services_that_there_are():
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    asked = {name for job in jobs for found in job.get("dns_sd_configs", []) for name in found["names"]}
    asked |= {target.split(":")[0] for job in jobs for found in job.get("static_configs", []) for target in found["targets"]}

    assert asked <= SERVICES.keys()
    assert {name for name, service in OURS.items() if "METRICS_PORT" in service["environment"]} == {"web", "worker", "periodic"}


# --- The front --------------------------------------------------------------------------------------------------------


def test_the_front_waits_longer_than_web_and_drops_connections_sooner():
    """Else it cuts off who still gets an answer, or sends a vote into a connection that web is closing."""
    [_, to_web] = re.findall(r"^ +keepalive_timeout (\d+)s;", NGINX, re.MULTILINE)
    [read] = re.findall(r"proxy_read_timeout (\d+)s;", NGINX)

    assert int(to_web) < KEEP_ALIVE_SECONDS
    assert int(read) > STOP_SECONDS + settings.CONFIRM_SECONDS + settings.OUTBOX_SECONDS


def test_the_front_says_who_the_client_is_and_logs_nobody():
    assert "proxy_set_header X-Forwarded-For $remote_addr;" in NGINX
    assert OURS["web"]["environment"]["TRUSTED_PROXIES"] == "1"
    assert "access_log off;" in NGINX
    assert "error_log stderr crit;" in NGINX


def test_only_votes_with_a_key_are_sent_again():
    """nginx takes no variable there, so it is a location of its own."""
    repeatable = re.findall(r"location (\S+) \{\s+proxy_next_upstream [^;]*non_idempotent", NGINX)

    assert repeatable == ["@repeatable"]
    [guard] = re.findall(r"error_page (\d+) = @repeatable;\s+if \(\$http_idempotency_key\) \{\s+return (\d+);", NGINX)
    assert guard[0] == guard[1]


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def test_kubernetes_has_each_program_as_one_image_and_the_same_limits():
    assert PODS.keys() == set(PROGRAMS)
    for name, pod in PODS.items():
        [container] = pod["containers"]
        assert (container["name"], container["args"]) == (name, [name])
        assert container["image"] == ("nexus" if name != "setup" else "ghcr.io/example/nexus:0.0.0")
        assert (pod["securityContext"]["runAsNonRoot"], container["securityContext"]["readOnlyRootFilesystem"]) == (True, True)
        assert "memory" in container["resources"]["limits"]
        given = [source["secretRef"]["name"] for source in container["envFrom"] if "secretRef" in source]
        assert given == ["nexus", f"nexus-{name if name != 'periodic' else 'worker'}"]
        assert all(manifest("Secret", secret) for secret in given)


def test_kustomize_is_told_of_every_manifest():
    [kustomization] = MANIFESTS["kustomization.yaml"]
    [image] = kustomization["images"]

    assert set(kustomization["resources"]) == MANIFESTS.keys() - {"kustomization.yaml", "secret.example.yaml", "setup.yaml"}
    assert f"{image['newName']}:{image['newTag']}" == PODS["setup"]["containers"][0]["image"]


def test_selectors_find_the_pods_that_they_mean():
    for found in chain.from_iterable(MANIFESTS.values()):
        name = found["metadata"].get("name") if "metadata" in found else None
        if found["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert found["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        elif found["kind"] == "Service":
            assert found["spec"]["selector"] == {"app.kubernetes.io/name": name}
            named = {port["name"] for port in PODS[name]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in found["spec"]["ports"]} <= named
        elif found["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = manifest("Deployment", found["spec"]["scaleTargetRef"]["name"])
            assert "replicas" not in target["spec"], "each deploy would undo what the scaler did"


def test_workers_scale_by_the_queues_of_votes():
    queues = {trigger["metadata"]["queueName"] for trigger in manifest("ScaledObject", "worker")["spec"]["triggers"]}

    assert queues == {queue.removeprefix(settings.QUEUE_PREFIX) for queue in settings.VOTES_QUEUES}


def test_there_is_never_a_second_beat():
    beat = manifest("Deployment", "beat")["spec"]

    assert (beat["replicas"], beat["strategy"]) == (1, {"type": "Recreate"})


# --- Workflows --------------------------------------------------------------------------------------------------------


def test_actions_are_pinned_by_their_hash_and_may_nothing_by_default():
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {}, name
        for job in workflow["jobs"].values():
            assert "permissions" in job, name
            for step in job["steps"]:
                assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40)), step


def test_workflows_run_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = [step["run"] for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(runs)))

    assert named >= {"lint", "test", "chaos", "fuzz", "api-docs", "lint-deploy", "sbom", "audit"}
    assert named <= targets
