"""What is asked about: a card at an instant, and what is known of the payment being scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tally.instants import Instant, to_ms
from tally.v1 import feature_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Row:
    """One question. Give the card's number or its id."""

    card: str | None = field(default=None, repr=False)
    """The card's number, 8 to 19 digits as text."""
    card_id: bytes | None = None
    """The card's id, 16 bytes, where the number is not at hand."""
    at: Instant | None = None
    """The instant asked about. Default: now, by the server's clock."""
    amount: float | None = None
    """Amount of the payment in currency units, a whole number of hundredths."""
    merchant: str | None = None
    """Its merchant."""
    category: str | None = None
    """Its category; the vocabulary is in the catalogue."""
    merchant_latitude: float | None = None
    """Degrees, -90 to 90."""
    merchant_longitude: float | None = None
    """Degrees, -180 to 180."""

    def to_message(self) -> pb.FeatureRow:
        """The row as the contract has it."""
        # A oneof's constructor arguments are typed as if both were always there.
        return pb.FeatureRow(
            card=self.card,  # type: ignore[arg-type]
            card_id=self.card_id,  # type: ignore[arg-type]
            event_time_ms=None if self.at is None else to_ms(self.at),
            amount=self.amount,
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
    """The request for features of rows."""
    request = pb.GetOnlineFeaturesRequest(
        rows=[row.to_message() for row in rows], features=features
    )
    if complete_through is not None:
        request.freshness.complete_through_at_least_ms = to_ms(complete_through)
    return request
