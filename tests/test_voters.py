"""Who is one voter: addresses, proxies, keys."""

import hashlib
from uuid import UUID, uuid4

import pytest

from polls import voters


@pytest.mark.parametrize(
    ("address", "voter"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002/64"),
        ("2001:db8:1:2::", "20010db800010002/64"),
        ("fe80::1%eth0", "fe80000000000000/64"),
    ],
)
def test_an_address_is_one_voter_by_ipv4_or_the_64_of_ipv6(address, voter):
    assert voters.address_voter(address) == voter


@pytest.mark.parametrize(
    "address", ["", "localhost", "192.0.2", "192.0.2.7:80", "unknown", "192.0.02.7", "192.0.2.7\0", "192.0.2.\u0667", "::1::"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="does not appear to be"):
        voters.address_voter(address)


@pytest.mark.parametrize(
    ("forwarded_for", "trusted", "address"),
    [
        ("", 0, "192.0.2.1"),
        ("203.0.113.9", 0, "192.0.2.1"),  # nobody vouches for the header
        ("203.0.113.9", 1, "203.0.113.9"),
        ("6.6.6.6, 203.0.113.9", 1, "203.0.113.9"),  # forged by the client
        ("6.6.6.6,203.0.113.9 , 198.51.100.1", 2, "203.0.113.9"),
        ("6.6.6.6, 2001:db8::1", 1, "2001:db8::1"),
    ],
)
def test_the_address_is_the_one_that_the_outermost_trusted_proxy_saw(forwarded_for, trusted, address):
    assert voters.client_address("192.0.2.1", forwarded_for, trusted) == address


@pytest.mark.parametrize(("forwarded_for", "trusted"), [("", 1), ("203.0.113.9", 2), ("spam", 1), ("203.0.113.9, ,", 2)])
def test_a_header_that_is_too_short_or_no_address_is_refused(forwarded_for, trusted):
    with pytest.raises(ValueError, match=r"fewer entries|does not appear to be"):
        voters.client_address("192.0.2.1", forwarded_for, trusted)


def test_a_voter_has_one_key_per_poll_and_another_in_another_poll():
    poll, other = uuid4(), uuid4()

    assert voters.VoterKeys(poll, "ip", b"salt").of("192.0.2.7") == voters.VoterKeys(poll, "ip", b"salt").of("192.0.2.7")
    whos = [(poll, "ip", "a"), (poll, "client", "a"), (poll, "ip", "b"), (other, "ip", "a")]
    assert len({voters.VoterKeys(of, policy, salt).of(who) for of, policy, who in whos for salt in (b"salt", b"other", None)}) == 12


def test_polls_of_before_the_salt_keep_their_voters_keys(monkeypatch):
    monkeypatch.setattr(voters, "_SECRET", hashlib.blake2b(b"a secret").digest())

    key = voters.VoterKeys(UUID(int=7), "ip", None).of("192.0.2.7")

    assert key == UUID("ade67fe4-6789-9b5a-8055-0b426494b6cc")
    assert voters.VoterKeys(UUID(int=7), "ip", memoryview(b"\1" * 16)).of("192.0.2.7") == UUID("08df4126-283c-ed71-db80-a607e3b2cb83")


def test_an_api_key_is_known_by_its_prefix_and_checked_by_its_hash():
    key = voters.new_client_key()

    assert voters.key_prefix(key) == key[4:12]
    assert voters.is_key(key, voters.key_hash(key))
    assert not voters.is_key(key + "x", voters.key_hash(key))


@pytest.mark.parametrize("text", ["", "nxs_", "nxs__x", "nxs_abc_", "abc_abcdefgh_x", "nxs_a_b_c", "Bearer x"])
def test_what_is_no_api_key_has_no_prefix(text):
    assert voters.key_prefix(text) is None
