"""What can go wrong with a store, said so that a person knows what to do.

Errors keep what they are made of as their `args`, so that they come whole out of another process.
"""

from __future__ import annotations


class StoreError(Exception):
    """A store cannot be used as asked."""


class StoreUnavailableError(StoreError):
    """A store cannot be reached.

    Attributes:
        store: "redis", "postgres" or "kafka".
    """

    def __init__(self, store: str, detail: str) -> None:
        super().__init__(store, detail)
        self.store = store

    def __str__(self) -> str:
        store, detail = self.args
        return f"{store} cannot be reached: {detail}"


class NotReadyError(StoreError):
    """A store is not in the state that this needs; the message says what to do.

    Attributes:
        store: "redis" or "postgres".
    """

    def __init__(self, store: str, detail: str) -> None:
        super().__init__(store, detail)
        self.store = store

    def __str__(self) -> str:
        return str(self.args[1])


class DataRefusedError(StoreError):
    """A store does not take these data, and will not the next time: something of them is at fault."""


class LockedError(StoreError):
    """Somebody else holds what is needed alone, or alone what is needed: trying again may help."""

    def __init__(self, name: str, waited_s: float) -> None:
        super().__init__(name, waited_s)

    def __str__(self) -> str:
        name, waited_s = self.args
        return f"others have been using the {name} for {waited_s:.0f} s"


class CardKeyMismatchError(StoreError):
    """A store was written under another card key, so that every card would look unknown.

    Attributes:
        store: "redis" or "postgres".
    """

    def __init__(self, store: str, stored: str, ours: str) -> None:
        super().__init__(store, stored, ours)
        self.store = store

    def __str__(self) -> str:
        store, stored, ours = self.args
        return (
            f"{store} was written under the card key {stored[:8]}…, and this process has "
            f"{ours[:8]}…; use the key that the data was loaded with (TALLY_CARD_KEY_FILE)"
        )
