"""Identities are what the contract says they are."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import CardKey, merchant_key, transaction_key

SECRET = b"a deployment's secret, kept well"


@given(st.binary(min_size=16, max_size=100), st.from_regex(r"[0-9]{8,19}", fullmatch=True))
def test_a_card_id_is_128_bits_of_hmac_sha256(secret, card):
    assert CardKey(secret).card_id(card) == hmac.digest(secret, card.encode(), "sha256")[:16]


def test_another_key_gives_other_ids_and_another_fingerprint():
    ours, theirs = CardKey(SECRET), CardKey(SECRET + b"!")
    assert ours.card_id("4111111111111111") != theirs.card_id("4111111111111111")
    assert ours.fingerprint != theirs.fingerprint


def test_the_key_is_never_shown():
    shown = repr(CardKey(SECRET)) + str(vars(CardKey).keys())
    assert SECRET.decode() not in shown


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        CardKey(b"short")


def test_ledger_keys_never_change():
    # Stored ledgers hold these.
    assert transaction_key("t1") == int.from_bytes(
        hashlib.blake2b(b"t1", digest_size=8).digest(), "little"
    )
    assert merchant_key("m") != transaction_key("m")
