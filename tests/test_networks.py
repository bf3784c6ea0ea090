"""Networks: addresses are stored so that they group, and can be read while their secret lives and not a moment longer."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import close_old_connections, connection
from django.utils.timezone import now

from polls import attempts, networks
from polls.keys import Keys
from polls.models import Attempts, Block, NetworkSecret, Poll, SuspiciousIP
from polls.networks import NetworkCipher, cipher_of, reveal
from tasks import periodic
from tests.conftest import vote_of

MICROSECOND = timedelta(microseconds=1)


@pytest.fixture
def no_secrets(_database):
    """Begins without any, and leaves every poll one of today."""
    NetworkSecret.objects.all().delete()
    yield
    NetworkSecret.objects.all().delete()
    Poll.objects.update(network_secret=networks.current_secret(now()), network_secret_since=now())


@pytest.fixture
def cipher():
    return NetworkCipher(b"a secret")


def secret(made_at=None):
    return NetworkSecret(secret=uuid4().bytes * 2, made_at=made_at or now())


def case_of(poll, address, **fields):
    address_key, subnet_key = networks.cipher_for(poll).keys(address)
    at = now()
    return SuspiciousIP.objects.create(
        poll=poll,
        rule="test",
        kind="address",
        network_key=address_key,
        subnet_key=subnet_key,
        network_secret=poll.network_secret,
        score=1,
        votes=1,
        first_seen=at,
        last_seen=at,
        found_at=at,
        **fields,
    )


def at_once(work, times=4):
    def run(_):
        try:
            return work()
        finally:
            connection.close()

    close_old_connections()
    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(run, range(times)))


# --- Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same_address", "same_subnet"),
    [
        ("192.0.2.7", "192.0.2.7", True, True),
        ("192.0.2.7", "::ffff:192.0.2.7", True, True),
        ("192.0.2.0", "192.0.2.255", False, True),
        ("192.0.2.7", "192.0.3.7", False, False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", False, True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False, False),
        ("fe80::1%eth0", "fe80::1%eth1", True, True),
    ],
)
def test_keys_are_equal_where_address_or_subnet_is(cipher, one, other, same_address, same_subnet):
    (address, subnet), (other_address, other_subnet) = cipher.keys(one), cipher.keys(other)

    assert (address == other_address, subnet == other_subnet) == (same_address, same_subnet)
    assert address != subnet


@pytest.mark.parametrize("address", ["", "unix:", "192.0.2", "192.0.2.7:80", "example.org"])
def test_what_is_no_address_has_no_keys(cipher, address):
    with pytest.raises(ValueError, match="does not appear to be"):
        cipher.keys(address)


def test_two_secrets_have_no_key_and_no_signature_in_common(cipher):
    other = NetworkCipher(b"another")

    assert not {*cipher.keys("192.0.2.7")} & {*other.keys("192.0.2.7")}
    assert cipher.signature(b"Firefox") == NetworkCipher(b"a secret").signature(b"Firefox")
    assert len({of.signature(said) for of in (cipher, other) for said in (b"Firefox", b"Chrome", b"")}) == 6


def test_a_signature_fits_a_bigint(cipher):
    signatures = [cipher.signature(b"%d" % n) for n in range(100)]

    assert -(2**63) <= min(signatures) < 0 < max(signatures) < 2**63


# --- Reading them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "as_address", "as_subnet"),
    [
        ("192.0.2.7", "192.0.2.7/32", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.7/32", "192.0.2.0/24"),
        ("0.0.0.0", "0.0.0.0/32", "0.0.0.0/24"),
        ("255.255.255.255", "255.255.255.255/32", "255.255.255.0/24"),
        ("2001:db8::1", "2001:db8::1/128", "2001:db8::/64"),
        ("::1", "::1/128", "::/64"),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", "ffff:ffff:ffff:ffff::/64"),
    ],
)
def test_keys_can_be_turned_back_while_their_secret_lives(address, as_address, as_subnet):
    living = secret()
    address_key, subnet_key = cipher_of(living.secret).keys(address)

    assert reveal(living, "address", address_key) == reveal(living, "address", address_key, subnet_key) == as_address
    assert reveal(living, "subnet", subnet_key) == as_subnet
    assert reveal(None, "address", address_key, subnet_key) is reveal(None, "subnet", subnet_key) is None


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1"])
def test_a_key_of_another_secret_is_told_from_an_address(address):
    address_key, subnet_key = cipher_of(secret().secret).keys(address)

    for _ in range(100):
        other = secret()
        assert reveal(other, "subnet", subnet_key) is None
        assert reveal(other, "address", address_key, subnet_key) is None


def test_a_subnet_that_is_not_the_addresses_is_no_answer():
    living = secret()
    cipher = cipher_of(living.secret)

    assert reveal(living, "address", cipher.keys("192.0.2.7")[0], cipher.keys("192.0.3.7")[1]) is None


def test_a_copy_of_the_database_opens_nothing_without_the_voter_secret(monkeypatch):
    living = secret()
    address_key, subnet_key = NetworkCipher(living.secret).keys("192.0.2.7")
    monkeypatch.setattr(networks.keys, "KNOWN", (Keys("another installation's"),))
    cipher_of.cache_clear()

    assert reveal(living, "subnet", subnet_key) is None
    assert reveal(living, "address", address_key, subnet_key) is None


# --- Rotation ---------------------------------------------------------------------------------------------------------


def test_two_who_need_the_first_secret_at_once_get_the_same(no_secrets):
    got = at_once(lambda: networks.current_secret(now()).pk)

    assert [*set(got)] == [NetworkSecret.objects.get().pk]


def test_new_polls_get_another_secret_in_time_and_open_ones_keep_theirs(no_secrets, make_poll, settings):
    at = now()
    first = networks.current_secret(at)
    running = make_poll()
    scheduled, about_to_open, draft = make_poll(opens_in=7 * 86400, closes_in=8 * 86400), make_poll(opens_in=600), make_poll(draft=True)
    due = first.made_at + timedelta(days=settings.NETWORK_SECRET_ROTATE_DAYS)
    Poll.objects.filter(pk=scheduled.pk).update(opens_at=due + timedelta(seconds=10), closes_at=due + timedelta(days=1))
    Poll.objects.filter(pk=about_to_open.pk).update(opens_at=due + timedelta(seconds=1), closes_at=due + timedelta(days=1))

    assert networks.rotate(due - MICROSECOND) == networks.current_secret(due) == first
    second = networks.rotate(due)
    assert second != first and bytes(second.secret) != bytes(first.secret)
    assert networks.rotate(due) == networks.current_secret(due) == second

    for poll, its in ((running, first), (about_to_open, first), (scheduled, second), (draft, second)):
        since = poll.network_secret_since
        poll.refresh_from_db()
        assert (poll.network_secret, poll.network_secret_since) == (its, since if its == first else due)
    assert make_poll().network_secret == second
    assert NetworkSecret.objects.count() == 2


def test_two_that_rotate_at_once_make_one_secret(no_secrets, settings):
    later = networks.current_secret(now()).made_at + timedelta(days=settings.NETWORK_SECRET_ROTATE_DAYS)

    assert len(set(at_once(lambda: networks.rotate(later).pk))) == 1
    assert NetworkSecret.objects.count() == 2


# --- Purge ------------------------------------------------------------------------------------------------------------


def test_after_the_purge_no_older_address_can_be_read_and_polls_go_on(no_secrets, make_poll, settings):
    poll = make_poll()
    first, vote = poll.network_secret, vote_of(poll, "alice", address="192.0.2.7")
    case = case_of(poll, "192.0.2.7")
    end = first.made_at + timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS)

    assert networks.purge(end) == 0
    assert reveal(case.network_secret, "address", case.network_key, case.subnet_key) == "192.0.2.7/32"
    assert networks.purge(end + MICROSECOND) == 1
    assert networks.purge(end + MICROSECOND) == 0

    case.refresh_from_db()
    poll.refresh_from_db()
    assert not NetworkSecret.objects.filter(pk=first.pk).exists()
    assert case.network_secret is None
    assert poll.network_secret == networks.current_secret(end)
    assert timedelta(seconds=2) <= poll.network_secret_since - end <= timedelta(seconds=4)
    assert reveal(poll.network_secret, "address", vote.address_key, vote.subnet_key) is None
    assert vote_of(poll, "bob", address="192.0.2.7").address_key != vote.address_key


def test_a_secret_that_is_in_use_is_deleted_all_the_same_and_a_younger_one_stays(no_secrets, make_poll, settings):
    at = now()
    old, young = secret(at - timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS + 1)), secret(at - timedelta(days=1))
    old.save(), young.save()
    polls = [make_poll() for _ in range(3)]
    Poll.objects.filter(pk__in=[poll.pk for poll in polls[:2]]).update(network_secret=old)

    assert networks.purge(at) == 1

    assert [*NetworkSecret.objects.all()] == [young]
    assert {poll.network_secret for poll in Poll.objects.filter(pk__in=[poll.pk for poll in polls])} == {young}


def test_two_that_purge_at_once_do_it_once(no_secrets, make_poll, settings):
    poll = make_poll()
    later = poll.network_secret.made_at + timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS + 1)

    assert sorted(at_once(lambda: networks.purge(later))) == [0, 0, 0, 1]
    poll.refresh_from_db()
    assert poll.network_secret == NetworkSecret.objects.get()


def test_the_clocks_job_renews_and_cleans_up_and_may_run_twice(no_secrets, settings):
    at = now()
    aged = at - timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS + 1)
    secret(aged).save()
    place = (uuid4(), uuid4(), uuid4(), aged)
    attempts.write({place: attempts.Tries(1, 0)})
    Block.objects.create(network="192.0.2.7/32", until=at, made_at=aged, actor="olga", reason="ended")

    periodic.renew_networks()
    renewed = NetworkSecret.objects.get()
    periodic.renew_networks()

    assert renewed.made_at >= at and NetworkSecret.objects.get() == renewed
    assert not Attempts.objects.filter(poll_id=place[0]).exists()
    assert not Block.objects.filter(network="192.0.2.7/32").exists()


def test_the_salt_of_a_poll_goes_some_time_after_its_end_unless_it_may_take_votes_again(no_secrets, make_poll, settings):
    at = now()
    before = at - timedelta(days=settings.NETWORK_SECRET_KEEP_DAYS)
    closed_at = {"final": before - MICROSECOND, "final of late": before, "not final": before - MICROSECOND}
    polls = {name: make_poll(draft=True) for name in closed_at}
    for name, poll in polls.items():
        opens_at, finalised_at = before - timedelta(days=1), None if name == "not final" else closed_at[name]
        Poll.objects.filter(pk=poll.pk).update(
            published_at=opens_at, opens_at=opens_at, closes_at=closed_at[name], closed_at=closed_at[name], finalised_at=finalised_at
        )

    networks.purge(at)

    has_salt = {name: Poll.objects.get(pk=poll.pk).voter_salt is not None for name, poll in polls.items()}
    assert has_salt == {"final": False, "final of late": True, "not final": True}
