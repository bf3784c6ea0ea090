"""Receipts: genuine ones are read, all others are nothing."""

import base64
from uuid import UUID, uuid4

import pytest

from polls import keys, receipts
from polls.bundles import AcceptedVote
from polls.keys import Keys
from polls.moments import from_microseconds, iso, to_microseconds
from polls.voters import FormerVoteIds, VoteIds

POLL, VOTER, VOTE = uuid4(), uuid4(), uuid4()
AT = 1_800_000_000_123_456


def written(ids, of=keys.OWN):
    return receipts.writer(POLL, ids, of)(AcceptedVote(VOTE, POLL, VOTER, (17,), AT))[1]


def test_a_receipt_tells_what_was_written_into_it():
    text = written(VoteIds())

    assert receipts.read(text) == receipts.Receipt(POLL, VOTER, VOTE, from_microseconds(AT), VOTE)


def test_a_receipt_of_a_poll_with_former_ids_shows_none_and_means_it_all_the_same():
    ids = FormerVoteIds()
    shown = ids.shown(VOTE)

    text = written(ids)

    assert receipts.read(text) == receipts.Receipt(POLL, VOTER, VOTE, from_microseconds(AT), shown)
    raw = base64.urlsafe_b64decode(text + "=")
    assert all(VOTE.bytes[start : start + 4] not in raw for start in range(13))


def test_a_receipt_that_the_version_before_wrote_is_read(monkeypatch):
    """Written at that version with this secret."""
    before = Keys("a secret of fifty characters or more, for the receipts of before")
    poll, voter, vote = UUID(int=1), UUID(int=2), UUID(int=3)
    text = "AAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAIAAAAAAAAAAAAAAAAAAAADAAZlFyiaYkDFAd7v_SHnraqKjWk"
    monkeypatch.setattr(keys, "KNOWN", (before,))

    assert receipts.read(text) == receipts.Receipt(poll, voter, vote, from_microseconds(AT), vote)


def test_a_receipt_is_read_after_the_secret_was_changed_and_not_when_it_is_gone(monkeypatch):
    before, after = Keys("the one before"), Keys("the one after")
    text = written(VoteIds(), before)

    monkeypatch.setattr(keys, "KNOWN", (after, before))
    assert receipts.read(text).vote_id == VOTE
    monkeypatch.setattr(keys, "KNOWN", (after,))
    assert receipts.read(text) is None


def test_a_receipt_has_one_spelling():
    text = written(VoteIds())
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

    assert [last for last in alphabet if receipts.read(text[:-1] + last)] == [text[-1]]
    assert receipts.read(text + "=") is None
    assert receipts.read(text.translate(str.maketrans("-_", "+/"))) is None or not set(text) & set("-_")


def test_a_receipt_with_any_bit_changed_is_none_of_ours():
    raw = base64.urlsafe_b64decode(written(VoteIds()) + "=")

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
