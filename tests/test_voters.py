"""Who is one voter: addresses, proxies, keys."""

import hashlib
from uuid import UUID, uuid4

import pytest

from polls import voters
from polls.keys import Keys


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


def test_polls_of_before_the_salt_keep_their_voters_keys():
    of = Keys("a secret")

    key = voters.VoterKeys(UUID(int=7), "ip", None, of).of("192.0.2.7")

    assert key == UUID("ade67fe4-6789-9b5a-8055-0b426494b6cc")
    assert voters.VoterKeys(UUID(int=7), "ip", memoryview(b"\1" * 16), of).of("192.0.2.7") == UUID("08df4126-283c-ed71-db80-a607e3b2cb83")


def test_an_api_key_is_known_by_its_prefix_and_checked_by_its_hash():
    key = voters.new_client_key()

    assert voters.key_prefix(key) == key[4:12]
    assert voters.is_key(key, voters.key_hash(key))
    assert not voters.is_key(key + "x", voters.key_hash(key))


@pytest.mark.parametrize("text", ["", "nxs_", "nxs__x", "nxs_abc_", "abc_abcdefgh_x", "nxs_a_b_c", "Bearer x"])
def test_what_is_no_api_key_has_no_prefix(text):
    assert voters.key_prefix(text) is None


# --- Vote ids ---------------------------------------------------------------------------------------------------------

ALICE, BOB = uuid4(), uuid4()
SOUP, SALAD = (17,), (18,)


def test_a_vote_id_is_the_same_for_every_repeat_and_says_when_a_key_came_back_with_another_choice():
    ids = voters.VoteIds()
    first = ids.of(ALICE, "alice-1", SOUP)

    assert voters.VoteIds().of(ALICE, "alice-1", SOUP) == first
    other = ids.of(ALICE, "alice-1", SALAD)
    assert other != first and voters.request_name(other) == voters.request_name(first)
    names = {voters.request_name(ids.of(who, key, SOUP)) for who in (ALICE, BOB) for key in ("alice-1", "alice-2", None, None)}
    assert len(names) == 8


def test_equal_choices_of_two_voters_look_different():
    ids = voters.VoteIds()

    marks = {ids.of(uuid4(), "the same key", SOUP).bytes[12:] for _ in range(1000)}

    assert len(marks) == 1000


def test_without_the_secret_no_part_of_a_vote_id_can_be_tried_out():
    here, elsewhere = voters.VoteIds(Keys("a secret")), voters.VoteIds(Keys("another secret"))

    ours, theirs = here.of(ALICE, "alice-1", SOUP), elsewhere.of(ALICE, "alice-1", SOUP)

    assert ours.bytes[:12] != theirs.bytes[:12] and ours.bytes[12:] != theirs.bytes[12:]
    unkeyed = [
        hashlib.blake2b(text, digest_size=size).digest() for text in (repr(SOUP).encode(), ALICE.bytes + b"alice-1") for size in (4, 12)
    ]
    assert not any(part in ours.bytes for part in unkeyed)


def test_former_vote_ids_are_made_as_the_version_before_made_them_and_shown_otherwise():
    ids = voters.FormerVoteIds(Keys("a secret"))

    vote_id = ids.of(UUID(int=2), "alice-1", (17,))

    assert vote_id == UUID("61617291-b300-c748-d0d7-f32650b5fc0b")  # by that version
    assert ids.hidden(ids.shown(vote_id)) == vote_id
    assert not set(range(13)) & {start for start in range(13) if vote_id.bytes[start : start + 4] in ids.shown(vote_id).bytes}
    assert ids.shown(ids.of(ALICE, "k", SOUP)).bytes[12:] != ids.shown(ids.of(BOB, "k", SOUP)).bytes[12:]


def test_a_poll_whose_secret_is_not_here_has_no_ids():
    assert voters.vote_ids_known(b"8 bytes!", are_keyed=True) is None
