"""Dead letters: events that could not be applied, each with where it was, why, and its bytes.

The bytes may hold a card number. They are sealed under a key that is derived from the card key, so
that the topic shows none, and whoever has the key can look at them and publish them again.

    {"topic": ..., "partition": ..., "offset": ..., "time": ..., "reason": ..., "detail": ...,
     "sealed": Fernet token of the bytes, null where there were none, "is_kept": ...}
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from dataclasses import asdict, dataclass
from datetime import datetime

import orjson
from cryptography.fernet import Fernet, InvalidToken

from features import CardKey
from ingest.masking import masked_digits
from stores.errors import StoreError

KEPT_BYTES_MAX = 2 << 20
"""Larger values are not kept in their letter: they are where they were, as long as the topic is."""
LETTER_BYTES_MAX = 4 << 20
"""A letter with so many bytes, sealed and in base 64, and all else."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One event that could not be applied."""

    topic: str
    partition: int
    offset: int
    time: str
    """When it was refused, in ISO 8601."""
    reason: str
    """A code, such as NOT_JSON."""
    detail: str
    """What is wrong, for a person; no card number."""
    sealed: str | None
    """Its bytes; None where it had none, or too many to be kept."""
    is_kept: bool = True
    """Whether its bytes are here; otherwise they are where it was, as long as the topic keeps them."""


class Sealer:
    """Seals bytes, and opens them again."""

    def __init__(self, card_key: CardKey) -> None:
        self._fernet = Fernet(urlsafe_b64encode(card_key.derive("dead letters")))

    def letter(
        self,
        where: tuple[str, int, int],
        value: bytes | None,
        reason: str,
        detail: str,
        now: datetime,
    ) -> str:
        """The dead letter of an event at (topic, partition, offset), as JSON."""
        is_kept = value is None or len(value) <= KEPT_BYTES_MAX
        sealed = self._fernet.encrypt(value).decode() if value is not None and is_kept else None
        time = now.isoformat(timespec="milliseconds")
        letter = DeadLetter(*where, time, reason, masked_digits(detail), sealed, is_kept)
        return orjson.dumps(asdict(letter)).decode()

    def open(self, letter: DeadLetter) -> bytes | None:
        """The bytes of a dead letter.

        Raises:
            StoreError: it was sealed under another card key, or its bytes were not kept.
        """
        if not letter.is_kept:
            raise StoreError(
                f"its bytes were too many to be kept: they are at offset {letter.offset} of partition "
                f"{letter.partition} of {letter.topic}, as long as the topic keeps them"
            )
        try:
            return None if letter.sealed is None else self._fernet.decrypt(letter.sealed)
        except InvalidToken:
            raise StoreError(
                "it was sealed under another card key: use the one that the stream had then"
            ) from None


def read_letter(value: bytes | None) -> DeadLetter | None:
    """A dead letter from its JSON; None of what is none: others may write to the topic too."""
    try:
        return DeadLetter(**orjson.loads(value or b""))
    except (ValueError, TypeError):
        return None
