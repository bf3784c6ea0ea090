"""Monitoring: dashboards and alerts ask for figures that there are, alerts fire when they should, and each has its paragraph."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from django.utils.timezone import now
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from polls import metrics, watching
from tests.conftest import ROOT

PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARDS = sorted(path.name for path in (GRAFANA / "dashboards").glob("*.json"))
# What RabbitMQ's own endpoint, Flower's, and the Prometheus library tell; as they were told by RabbitMQ 3.10 and Flower 2.2.
OTHERS = {
    *("up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total", "flower_worker_online", "flower_events_total"),
    *("rabbitmq_connections", "rabbitmq_channels", "rabbitmq_process_resident_memory_bytes", "rabbitmq_resident_memory_limit_bytes"),
    *("rabbitmq_disk_space_available_bytes", "rabbitmq_disk_space_available_limit_bytes", "rabbitmq_alarms_memory_used_watermark"),
    *("rabbitmq_alarms_free_disk_space_watermark", "rabbitmq_alarms_file_descriptor_limit", "rabbitmq_detailed_queue_messages"),
    *("rabbitmq_detailed_queue_messages_unacked", "rabbitmq_global_messages_received_total", "rabbitmq_global_messages_confirmed_total"),
    *("rabbitmq_global_messages_acknowledged_total", "rabbitmq_global_messages_redelivered_total"),
}
WORDS = {
    "and",
    "or",
    "by",
    "on",
    "sum",
    "max",
    "min",
    "count",
    "vector",
    "time",
    "absent",
    "deriv",
    "rate",
    "increase",
    "histogram_quantile",
    "abs",
}


def expressions(dashboard):
    found = json.loads((GRAFANA / "dashboards" / dashboard).read_text())
    yield from (annotation["expr"] for annotation in found["annotations"]["list"])
    yield from (target["expr"] for panel in found["panels"] for target in panel["targets"])


def names_in(expression):
    """The metrics that an expression asks for, and the labels that it asks of them: [(metric, labels)]."""
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)", "", expression)
    for name, labels in re.findall(r"([a-zA-Z_]\w*)(\{[^}]*\})?", re.sub(r"\[[^\]]*\]", "", re.sub(r'"[^"]*"', '""', bare))):
        if name not in WORDS and not re.search(rf"\b{name}\s*(=|!)", bare):
            yield name, set(re.findall(r"(\w+)\s*(?:=|!)", labels))


@pytest.fixture(scope="module")
def told(broker):
    """{sample: its labels} of all that the product tells."""
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    families += [*watching.look(at=now()), *watching.redis_metrics(hits=1, misses=1)]
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize(
    "asking", ["alerts", "nexus-broker.json", "nexus-clock.json", "nexus-pipeline.json", "nexus-web.json", "nexus-workers.json"]
)
def test_whatever_is_asked_for_is_told(told, asking):
    asked = [rule["expr"] for rule in ALERTS] if asking == "alerts" else list(expressions(asking))

    names = [found for expression in asked for found in names_in(expression)]

    assert len(names) >= len(asked)
    assert {name for name, _ in names} <= set(told) | OTHERS
    # Prometheus itself adds job and instance.
    assert [(name, labels) for name, labels in names if name in told and not labels <= told[name] | {"job", "instance"}] == []
    for expression in asked:
        known = {label for name, _ in names_in(expression) for label in told.get(name, {"queue", "worker", "type"})} | {"job", "instance"}
        assert {label for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression) for label in re.findall(r"\w+", labels)} <= known


def test_every_figure_is_on_a_dashboard(told):
    shown = {name for dashboard in DASHBOARDS for expression in expressions(dashboard) for name, _ in names_in(expression)}

    figures = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told if not name.endswith("_created")}
    assert figures - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_every_dashboard_is_tested_here_and_fits_its_grid():
    marks = test_whatever_is_asked_for_is_told.pytestmark[0].args[1]
    assert set(DASHBOARDS) == set(marks) - {"alerts"}
    for name in DASHBOARDS:
        found = json.loads((GRAFANA / "dashboards" / name).read_text())
        assert name == f"{found['uid']}.json"
        taken = set()
        for panel in found["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & taken, panel["title"]
            taken |= cells
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {data_source()}


def data_source():
    [source] = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    return source["uid"]


def test_every_alert_has_its_paragraph_and_every_paragraph_its_alert():
    section = (ROOT / "docs" / "operations.md").read_text().split("\n## Alerts\n")[1].split("\n## ")[0]

    assert re.findall(r"^\*\*(\w+)\*\*", section, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_alerts_fire_when_they_should():
    """With promtool, which Debian has in the package prometheus."""
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *command], cwd=PROMETHEUS, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_among_what_promtool_tries():
    tests = (PROMETHEUS / "alerts_test.yml").read_text()

    assert [rule["alert"] for rule in ALERTS if not fires(tests, rule["alert"])] == []


def fires(tests, alert):
    names = re.findall(r'alertname=~?"([^"]+)"', tests) + re.findall(r"alertname: (\w+)", tests)
    return any(re.fullmatch(name, alert) for name in names)
