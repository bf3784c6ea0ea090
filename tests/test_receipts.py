"""Receipts: genuine ones are read, all others are nothing."""

import base64
from uuid import uuid4

import pytest

from polls import receipts
from polls.moments import from_microseconds, iso, to_microseconds


def test_a_receipt_tells_what_was_written_into_it():
    poll_id, voter_key, vote_id = uuid4(), uuid4(), uuid4()

    receipt = receipts.read(receipts.write(poll_id, voter_key, vote_id, 1_800_000_000_123_456))

    assert receipt == receipts.Receipt(poll_id, voter_key, vote_id, from_microseconds(1_800_000_000_123_456))


def test_a_receipt_with_any_bit_changed_is_none_of_ours():
    raw = base64.urlsafe_b64decode(receipts.write(uuid4(), uuid4(), uuid4(), 1) + "=")

    for byte in range(len(raw)):
        changed = raw[:byte] + bytes([raw[byte] ^ 1]) + raw[byte + 1 :]
        assert receipts.read(base64.urlsafe_b64encode(changed).decode().rstrip("=")) is None


@pytest.mark.parametrize("text", ["", "x", "é", "A" * 91, "A" * 5000, "../../etc", "%00"])
def test_what_is_no_receipt_is_none_of_ours(text):
    assert receipts.read(text) is None


def test_moments_are_written_so_that_their_texts_compare_like_the_moments():
    """Without the zeros, a full second would come after its own fractions."""
    moments = [from_microseconds(1_800_000_000_000_000 + more) for more in (0, 1, 10, 412, 120_000, 999_999, 1_000_000)]

    assert sorted(moments, key=iso) == moments
    assert [from_microseconds(to_microseconds(moment)) for moment in moments] == moments
