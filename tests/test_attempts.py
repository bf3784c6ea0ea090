"""Attempts: who tries codes or collects voter tokens is noted, by poll, address and hour, and no vote waits for it."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from django.db import OperationalError
from django.utils.timezone import now

from polls import attempts, networks
from polls.accepting import Desk
from polls.attempts import Notes, Tries
from polls.models import Attempts
from polls.moments import to_microseconds
from tests.conftest import Api, answers, free_port, wait_until, web
from tests.test_networks import at_once
from tests.test_policies import ballot, votes_path

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
KEYS = (UUID(int=7), UUID(int=8))


def noted(poll_id):
    """[(address key, subnet key, hour, wrong codes, tokens)], by hour"""
    fields = ("address_key", "subnet_key", "hour", "wrong_codes", "tokens")
    return [*Attempts.objects.filter(poll_id=poll_id).order_by("hour", "address_key").values_list(*fields)]


def test_attempts_add_up_by_hour_and_over_processes():
    poll_id = uuid4()
    one, other = Notes(), Notes()
    for at in (NOON, NOON + timedelta(hours=1, microseconds=-1)):
        one.add(poll_id, KEYS, to_microseconds(at), wrong_codes=1)
    one.add(poll_id, KEYS, to_microseconds(NOON + timedelta(hours=1)), tokens=1)
    other.add(poll_id, KEYS, to_microseconds(NOON), tokens=1)

    for notes in (one, other, one):
        if seen := notes.take():
            attempts.write(seen)

    assert noted(poll_id) == [(*KEYS, NOON, 2, 1), (*KEYS, NOON + timedelta(hours=1), 0, 1)]


def test_processes_that_write_the_same_places_in_any_order_do_not_wait_for_each_other_for_ever():
    poll_id = uuid4()
    places = [(poll_id, UUID(int=n), UUID(int=0), NOON) for n in range(2000)]
    orders = [places, places[::-1]] * 4

    at_once(lambda: attempts.write({place: Tries(1, 2) for place in orders.pop()}), times=8)

    assert {row[3:] for row in noted(poll_id)} == {(8, 16)}


def test_memory_for_attempts_has_an_end(monkeypatch):
    monkeypatch.setattr(attempts, "MAX_PLACES", 2)
    notes = Notes()
    for n in (1, 2, 3, 1):
        notes.add(UUID(int=n), KEYS, 0, tokens=1)

    seen = notes.take()
    notes.add(UUID(int=3), KEYS, 0, tokens=1)
    notes.put_back(seen)

    assert {place[0].int: tries.tokens for place, tries in seen.items()} == {1: 2, 2: 1}
    assert {place[0].int: tries.tokens for place, tries in notes.take().items()} == {3: 1, 1: 2}


def test_while_postgresql_is_away_attempts_are_kept_and_written_later(monkeypatch):
    poll_id, write = uuid4(), attempts.write

    async def two_writes():
        desk = Desk()
        desk._attempts.add(poll_id, KEYS, to_microseconds(NOON), wrong_codes=1)
        monkeypatch.setattr(attempts, "write", lambda seen: (_ for _ in ()).throw(OperationalError))
        await desk._write_attempts()
        desk._attempts.add(poll_id, KEYS, to_microseconds(NOON), wrong_codes=1)
        monkeypatch.setattr(attempts, "write", write)
        await desk._write_attempts()
        await desk._write_attempts()
        desk.threads.shutdown()

    asyncio.run(two_writes())

    assert noted(poll_id) == [(*KEYS, NOON, 2, 0)]


def test_attempts_are_deleted_once_their_addresses_can_not_be_read(settings):
    poll_id = uuid4()
    attempts.write({(poll_id, *KEYS, NOON): Tries(1, 0)})
    end = NOON + timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS)

    attempts.purge(end)
    assert len(noted(poll_id)) == 1
    attempts.purge(end + timedelta(microseconds=1))
    assert noted(poll_id) == []


# --- Over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopping(broker, tmp_path):
    """A web process behind one trusted proxy that a test may stop."""
    port = free_port()
    with web(port, tmp_path / "web.log", TRUSTED_PROXIES="1") as process:
        wait_until(lambda: answers(port))
        yield Api(port, {}), process


def test_tokens_and_wrong_codes_are_noted_also_by_a_process_that_ends(stopping, make_poll):
    api, process = stopping
    with_codes, with_tokens = make_poll(voter_policy="code"), make_poll(voter_policy="session", allowed_networks=["198.51.100.0/24"])
    hours = {now().replace(minute=0, second=0, microsecond=0)}

    for code in ("0000-0000-0000", "x", "0000-0000-0001"):
        assert api.post(votes_path(with_codes), ballot(with_codes, code=code), x_forwarded_for="192.0.2.7").status == 403
    assert api.post(votes_path(with_codes), ballot(with_codes), x_forwarded_for="192.0.2.7").status == 400  # no attempt
    wait_until(lambda: sum(row[3] for row in noted(with_codes.pk)) == 3, seconds=10)
    for address in ("192.0.2.7", "2001:db8::1", "192.0.2.7", "198.51.100.7"):
        assert api.post("/api/v1/voters", {"poll": str(with_tokens.pk)}, x_forwarded_for=address).status == 201
    process.terminate()
    process.wait(10)

    hours.add(now().replace(minute=0, second=0, microsecond=0))
    keys = networks.cipher_for(with_codes).keys
    assert {row[:2] for row in noted(with_codes.pk)} == {keys("192.0.2.7")}
    totals = {key: sum(row[4] for row in noted(with_tokens.pk) if row[:2] == key) for key in {row[:2] for row in noted(with_tokens.pk)}}
    assert totals == {keys("192.0.2.7"): 2, keys("2001:db8::1"): 1}  # none from the allowed network
    assert {row[2] for row in [*noted(with_codes.pk), *noted(with_tokens.pk)]} <= hours
