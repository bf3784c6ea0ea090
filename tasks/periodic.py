"""The jobs that the clock starts. Each works from the database's state, so a missed run is caught up by the next."""

from datetime import datetime
from typing import Any

from celery import shared_task
from celery.signals import task_prerun, task_success
from django.utils.timezone import now

from polls import accounts, attempts, blocks, clocks, closing, codes, finality, fraud, integrity, jobs, networks, outbox, review, stamps


@task_prerun.connect
def note_beginning(task: Any, **_: object) -> None:
    if jobs.is_seldom(task.name):
        jobs.note_beginning(task.name, at=stamps.clock())


@task_success.connect
def note_success(sender: Any, **_: object) -> None:
    if sender.name in jobs.intervals():
        jobs.note_success(sender.name, at=stamps.clock())


def moment() -> datetime:
    """Return now, by this worker's clock or PostgreSQL's, whichever is behind the other: a clock that is ahead ends no poll early."""
    return min(now(), stamps.clock())


@shared_task(name="polls.open_and_close", acks_late=False)
def open_and_close_polls() -> None:
    closing.open_due_polls(at=moment())
    closing.close_expired_polls(at=moment())


@shared_task(name="polls.finalise", acks_late=False)
def finalise_polls() -> None:
    finality.finalise_polls(at=moment())


@shared_task(name="outbox.drain", acks_late=False)
def drain_outbox() -> None:
    outbox.drain()


@shared_task(name="integrity.check_soon", acks_late=False)
def check_tallies_soon() -> None:
    integrity.check_soon(at=moment())


@shared_task(name="integrity.check", acks_late=False)
def check_tallies() -> None:
    integrity.check(at=moment())


@shared_task(name="networks.renew", acks_late=False)
def renew_networks() -> None:
    networks.purge(at=moment())
    attempts.purge(at=moment())
    blocks.purge(at=moment())
    clocks.purge()
    codes.seal_labels()


@shared_task(name="fraud.find_fast", acks_late=False)
def find_suspicious_fast() -> None:
    fraud.find_suspicious(at=moment(), fast=True)


@shared_task(name="fraud.find", acks_late=False)
def find_suspicious() -> None:
    fraud.find_suspicious(at=moment())


@shared_task(name="cases.expire", acks_late=False)
def expire_cases() -> None:
    fraud.expire_cases(at=moment())


@shared_task(name="review.settle", acks_late=False)
def settle_unfinished_rulings() -> None:
    review.settle_unfinished(at=moment())


@shared_task(name="outcomes.purge", acks_late=False)
def purge_outcomes() -> None:
    closing.purge_outcomes(at=moment())


@shared_task(name="tokens.purge", acks_late=False)
def purge_expired_tokens() -> None:
    accounts.purge_expired_tokens(at=moment())
