"""Celery's app: the settings above CELERY_, the tasks, the queues, the schedule."""

import gc
import os
import sys
from typing import Any

from celery import Celery
from celery.signals import beat_init, celeryd_after_setup, celeryd_init, setup_logging, task_failure, task_postrun, worker_process_init
from django.conf import settings
from django.db import connection, reset_queries

from core import installation, logs
from tasks import queues

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "core.settings")

app = Celery("nexus", events="tasks.events:Events")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["tasks"], related_name="votes")
app.autodiscover_tasks(["tasks"], related_name="periodic")
app.autodiscover_tasks(["tasks"], related_name="mail")


@app.on_after_configure.connect
def add_queues(sender: Celery, **_: object) -> None:
    """Give the app its queues; their names come from the settings, which are read by now."""
    sender.conf.task_queues = queues.consumed()


@celeryd_init.connect
@beat_init.connect
def refuse_to_start_without_a_database(**_: object) -> None:
    """End before the broker is asked for anything: at the usual port, it may be anybody's."""
    if settings.DATABASES["default"]["ENGINE"] == "core.nowhere":
        sys.exit(installation.NOT_NAMED)


@setup_logging.connect
def log_like_django(**_: object) -> None:
    """Keep Celery from setting up its own loggers: one format for all processes."""
    logs.configure(settings.LOGGING)


@task_failure.connect
def drop_the_connection(**_: object) -> None:
    """Give the next task a new database connection: with CELERY_DB_REUSE_MAX a broken one would be kept for good."""
    connection.close()


@task_postrun.connect
def note_the_workers_clock(task: Any, **_: object) -> None:
    from core import noting

    noting.note_now_and_then("worker" if task.name == "votes.count" else "periodic")


@task_postrun.connect
def forget_what_was_asked(**_: object) -> None:
    """With DEBUG, Django keeps the last 9,000 statements of a connection, until a web request begins; some hold a thousand votes."""
    reset_queries()


@celeryd_after_setup.connect
def export_figures(instance: Any, **_: object) -> None:
    """Let Prometheus see the worker's figures, before its children are there; those of the whole installation are with the clock's jobs."""
    from core import exporting  # it needs Django's models, which are not there while this module is read

    exporting.start(watches=settings.PERIODIC_QUEUE in instance.app.amqp.queues.consume_from)


@beat_init.connect
def note_the_clock(**_: object) -> None:
    from core import noting

    noting.start("beat")


@worker_process_init.connect
def leave_what_stays_alone(**_: object) -> None:
    """Keep garbage collection from walking all of Django's objects: they live as long as the process, and a bundle makes thousands."""
    gc.freeze()
    gc.set_threshold(50_000)
