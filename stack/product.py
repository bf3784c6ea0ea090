"""The programs of the product, as they run on one machine."""

import sys
from collections.abc import Mapping

from stack import rabbitmq
from stack.program import Program, http_ok


def programs(env: Mapping[str, str]) -> list[Program]:
    """Web, worker, periodic, beat and Flower, for this environment."""
    celery = [sys.executable, "-m", "celery", "-A", "core"]
    host, port, flower_port = env["HOST"], int(env["PORT"]), int(env["FLOWER_PORT"])

    def worker(name: str, queue: str, concurrency: int) -> Program:
        queue_name = env.get("QUEUE_PREFIX", "") + queue
        options = ["-P", "prefork", "-O", "fair", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        return Program(
            name=name,
            command=[*celery, "worker", "-n", f"{queue}@localhost", "-Q", queue_name, "--concurrency", str(concurrency), *options],
            answers=lambda: rabbitmq.consumers(env["CELERY_BROKER_URL"], queue_name) > 0,
            stage=3,
        )

    web = [sys.executable, "-m", "uvicorn", "core.asgi:application", "--host", host, "--port", str(port)]
    web += ["--loop", "uvloop", "--http", "httptools", "--lifespan", "on", "--timeout-graceful-shutdown", "5"]
    web += ["--no-access-log", "--no-server-header", "--no-proxy-headers"]
    return [
        Program("web", web, answers=lambda: http_ok(reachable(host), port, "/healthz"), stop_seconds=15),
        worker("worker", queue="votes", concurrency=2),
        worker("periodic", queue="periodic", concurrency=1),
        # Short, because beat misses a SIGTERM that comes while it starts, and has nothing to lose.
        Program("beat", [*celery, "beat", "--loglevel", "INFO", "--pidfile="], stop_seconds=5),
        Program(
            name="flower",
            command=[*celery, "flower", "--conf=core/flower_config.py", "--address=127.0.0.1", f"--port={flower_port}"],
            answers=lambda: http_ok("127.0.0.1", flower_port, "/healthcheck"),
        ),
    ]


def reachable(host: str) -> str:
    """An address that reaches a server which listens on host: "every address" is none to connect to."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
