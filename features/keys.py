"""Identities: the card id that replaces a card number, and the keys that ledgers hold."""

from __future__ import annotations

import hashlib
import hmac
import re

CARD_ID_BYTES = 16
CARD_DIGITS = re.compile(r"[0-9]{8,19}\Z", re.ASCII)
"""A card number: 8 to 19 digits (ISO/IEC 7812), as text, since 19 digits fit no float."""

CARD_KEY_BYTES_MIN = 16
_BLOCK_BYTES = 64


class CardKey:
    """The deployment's secret, under which card numbers become card ids.

    The id is the first 128 bits of HMAC-SHA256(key, number). Neither `repr` nor any error shows
    the key.
    """

    __slots__ = ("_inner", "_outer", "fingerprint")

    def __init__(self, secret: bytes) -> None:
        """Takes the secret.

        Raises:
            ValueError: it is shorter than CARD_KEY_BYTES_MIN.
        """
        if len(secret) < CARD_KEY_BYTES_MIN:
            raise ValueError(
                f"the card key has {len(secret)} bytes; at least {CARD_KEY_BYTES_MIN} are needed"
            )
        # HMAC by RFC 2104 from two prepared states: half the time of the module's own copy.
        block = hashlib.sha256(secret).digest() if len(secret) > _BLOCK_BYTES else secret
        block = block.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))
        self.fingerprint = hmac.new(secret, b"tally card key fingerprint", "sha256").hexdigest()[
            :32
        ]
        """Tells keys apart without giving them away; stored beside the data."""

    def card_id(self, card: str) -> bytes:
        """The id (16 bytes) of a card number, which must match CARD_DIGITS."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(card.encode("ascii"))
        outer.update(inner.digest())
        return outer.digest()[:CARD_ID_BYTES]

    def derive(self, purpose: str) -> bytes:
        """A key (32 bytes) of its own for another purpose; no card id is one, nor leads to one."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(f"tally key: {purpose}".encode())
        outer.update(inner.digest())
        return outer.digest()

    @property
    def probe_id(self) -> bytes:
        """The id (16 bytes) of the card that freshness probes are of: nobody's, as of no number."""
        return self.derive("freshness probe")[:CARD_ID_BYTES]

    def __repr__(self) -> str:
        return f"CardKey(fingerprint={self.fingerprint[:8]}…)"


def transaction_key(transaction_id: str) -> int:
    """The 64-bit key of a transaction id within its card's ledger.

    Two ids of one card's at most 10,000 retained transactions share a key with a chance below
    3e-12; whether an id is known at all is decided by its full text, in Postgres.
    """
    return int.from_bytes(
        hashlib.blake2b(transaction_id.encode(), digest_size=8).digest(), "little"
    )


MERCHANT_KEY_BYTES = 8


def merchant_key_bytes(key: int) -> bytes:
    """A merchant's key (8 bytes) as records and stores have it."""
    return key.to_bytes(MERCHANT_KEY_BYTES, "little")


def merchant_key(merchant: str) -> int:
    """The 64-bit key of a merchant's name, by which distinct merchants are counted."""
    digest = hashlib.blake2b(merchant.encode(), digest_size=8, person=b"merchant").digest()
    return int.from_bytes(digest, "little")
