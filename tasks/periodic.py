"""The jobs that the clock starts. Each works from the database's state, so a missed run is caught up by the next."""

from typing import Any

from celery import shared_task
from celery.signals import task_success
from django.utils.timezone import now

from polls import accounts, attempts, blocks, closing, codes, finality, fraud, integrity, jobs, networks, outbox, review


@task_success.connect
def note_success(sender: Any, **_: object) -> None:
    jobs.note_success(sender.name, at=now())


@shared_task(name="polls.open_and_close", acks_late=False)
def open_and_close_polls() -> None:
    closing.open_due_polls(at=now())
    closing.close_expired_polls(at=now())


@shared_task(name="polls.finalise", acks_late=False)
def finalise_polls() -> None:
    finality.finalise_polls(at=now())


@shared_task(name="outbox.drain", acks_late=False)
def drain_outbox() -> None:
    outbox.drain()


@shared_task(name="integrity.check_soon", acks_late=False)
def check_tallies_soon() -> None:
    integrity.check_soon(at=now())


@shared_task(name="integrity.check", acks_late=False)
def check_tallies() -> None:
    integrity.check(at=now())


@shared_task(name="networks.renew", acks_late=False)
def renew_networks() -> None:
    networks.purge(at=now())
    codes.seal_labels()
    attempts.purge(at=now())
    blocks.purge(at=now())


@shared_task(name="fraud.find_fast", acks_late=False)
def find_suspicious_fast() -> None:
    fraud.find_suspicious(at=now(), fast=True)


@shared_task(name="fraud.find", acks_late=False)
def find_suspicious() -> None:
    fraud.find_suspicious(at=now())


@shared_task(name="cases.expire", acks_late=False)
def expire_cases() -> None:
    fraud.expire_cases(at=now())


@shared_task(name="review.settle", acks_late=False)
def settle_unfinished_rulings() -> None:
    review.settle_unfinished(at=now())


@shared_task(name="outcomes.purge", acks_late=False)
def purge_outcomes() -> None:
    closing.purge_outcomes(at=now())


@shared_task(name="tokens.purge", acks_late=False)
def purge_expired_tokens() -> None:
    accounts.purge_expired_tokens(at=now())
