"""What is asked about: a card at an instant, and what is known of the payment being scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from tally import taking
from tally.instants import Instant, to_ms
from tally.v1 import feature_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Row:
    """One question. Give the card's number or its id.

    Fields take what they say, and numpy's own numbers and instants; anything else is a TypeError.
    """

    card: str | None = field(default=None, repr=False)
    """The card's number, 8 to 19 digits as text."""
    card_id: bytes | None = None
    """The card's id, 16 bytes, where the number is not at hand."""
    at: Instant | None = None
    """The instant asked about. Default: now, by the server's clock."""
    amount: float | Decimal | None = None
    """Amount of the payment in currency units, a whole number of hundredths. A Decimal is taken exactly."""
    merchant: str | None = None
    """Its merchant."""
    category: str | None = None
    """Its category; the vocabulary is in the catalogue."""
    merchant_latitude: float | None = None
    """Degrees, -90 to 90."""
    merchant_longitude: float | None = None
    """Degrees, -180 to 180."""

    def __post_init__(self) -> None:
        # What most rows have is taken as it is: scoring makes thousands of them.
        put = object.__setattr__
        if self.card is not None and type(self.card) is not str:
            put(self, "card", taking.card(self.card))
        if self.card_id is not None:
            put(self, "card_id", taking.card_id(self.card_id))
        if self.at is not None and type(self.at) is not int:
            taking.micros("at", self.at)
        if self.amount is not None and type(self.amount) is not float:
            put(self, "amount", taking.amount(self.amount))
        if self.merchant is not None and type(self.merchant) is not str:
            put(self, "merchant", taking.text("merchant", self.merchant))
        if self.category is not None and type(self.category) is not str:
            put(self, "category", taking.text("category", self.category))
        for name in ("merchant_latitude", "merchant_longitude"):
            value = getattr(self, name)
            if value is not None and type(value) is not float:
                put(self, name, taking.number(name, value))

    def to_message(self) -> pb.FeatureRow:
        """The row as the contract has it."""
        # A oneof's constructor arguments are typed as if both were always there.
        return pb.FeatureRow(
            card=self.card,  # type: ignore[arg-type]
            card_id=self.card_id,  # type: ignore[arg-type]
            event_time_ms=None if self.at is None else to_ms(self.at, "at"),
            amount=self.amount,  # type: ignore[arg-type]  # a float by now
            merchant=self.merchant,
            category=self.category,
            merchant_latitude=self.merchant_latitude,
            merchant_longitude=self.merchant_longitude,
        )


def online_request(
    rows: Iterable[Row],
    features: Sequence[str] = (),
    complete_through: Instant | None = None,
) -> pb.GetOnlineFeaturesRequest:
    """The request for features of rows.

    Raises:
        TypeError: an argument of another type.
        ValueError: as `to_ms`.
    """
    if isinstance(rows, Row) or not isinstance(rows, Iterable):
        hint = "[row]" if isinstance(rows, Row) else ""
        raise taking.refused("rows", "several rows (tally.Row)", rows, hint)
    messages = []
    for i, row in enumerate(rows):
        if not isinstance(row, Row):
            raise taking.refused(f"rows[{i}]", "a row (tally.Row)", row)
        messages.append(row.to_message())
    request = pb.GetOnlineFeaturesRequest(
        rows=messages, features=taking.names("features", features)
    )
    if complete_through is not None:
        through_ms = to_ms(complete_through, "complete_through")
        request.freshness.complete_through_at_least_ms = through_ms
    return request
