"""The programs of the product, as they run on one machine."""

import sys
from collections.abc import Mapping, Sequence

from stack import rabbitmq
from stack.program import Program, http_ok


def programs(env: Mapping[str, str]) -> list[Program]:
    """Web, worker, periodic, beat and Flower, for this environment. The first three tell Prometheus their figures from METRICS_PORT on."""
    core = [sys.executable, "-m", "core"]
    host, port, flower_port = env["HOST"], int(env["PORT"]), int(env["FLOWER_PORT"])

    def metrics(place: int) -> dict[str, str]:
        first = int(env.get("METRICS_PORT") or 0)
        return {"METRICS_PORT": str(first + place if first else 0)}

    def worker(name: str, queues: Sequence[str], place: int) -> Program:
        queues = [env.get("QUEUE_PREFIX", "") + queue for queue in queues]
        return Program(
            name=name,
            command=[*core, name, "-n", f"{name}@localhost"],
            answers=lambda: all(rabbitmq.consumers(env["CELERY_BROKER_URL"], queue) for queue in queues),
            stage=3,
            env=metrics(place),
        )

    web = [*core, "web", "--host", host, "--port", str(port), "--timeout-graceful-shutdown", "5"]
    return [
        Program("web", web, answers=lambda: http_ok(reachable(host), port, "/healthz"), stop_seconds=15, env=metrics(0)),
        worker("worker", queues=["votes.even", "votes.odd"], place=1),
        worker("periodic", queues=["periodic"], place=2),
        # Short, because beat misses a SIGTERM that comes while it starts, and has nothing to lose.
        Program("beat", [*core, "beat"], stop_seconds=5, env={"METRICS_PORT": "0"}),
        Program(
            name="flower",
            command=[*core, "flower", "--address=127.0.0.1", f"--port={flower_port}"],
            answers=lambda: http_ok("127.0.0.1", flower_port, "/healthcheck"),
            env={"METRICS_PORT": "0"},
        ),
    ]


def reachable(host: str) -> str:
    """An address that reaches a server which listens on host: "every address" is none to connect to."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
