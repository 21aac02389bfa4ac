"""Answers, and the way from them to numpy, pandas, Arrow and torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tally.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import torch

PRESENT = pb.FEATURE_STATUS_PRESENT
_PREFIX = "FEATURE_STATUS_"


def status_name(status: int) -> str:
    """The name of a status without its prefix, such as EMPTY_WINDOW."""
    try:
        return pb.FeatureStatus.Name(pb.FeatureStatus.ValueType(status)).removeprefix(_PREFIX)
    except ValueError:  # of a newer server
        return f"STATUS_{status}"


def to_datetime(ms: int) -> datetime | None:
    """An instant of an answer; None where the store cannot say."""
    return (
        None
        if ms < 0
        else datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    )


@dataclass(frozen=True, slots=True)
class OnlineFeatures:
    """Features of n rows, in the order of the question."""

    names: tuple[str, ...]
    """The features' names."""
    values: npt.NDArray[np.float64]
    """(n, features); NaN where the status is not PRESENT."""
    statuses: npt.NDArray[np.uint8]
    """(n, features) of tally.v1.FeatureStatus."""
    known: npt.NDArray[np.bool_]
    """(n,) whether the store has a transaction of the card before the instant."""
    complete_through_ms: npt.NDArray[np.int64]
    """(n,) the instant through which all that was published is applied; -1 if unknown."""
    as_of_ms: npt.NDArray[np.int64]
    """(n,) the instant that the features are as of."""
    catalog_fingerprint: str
    """Which definitions the values follow."""

    def __len__(self) -> int:
        return len(self.known)

    @classmethod
    def from_message(cls, message: pb.GetOnlineFeaturesResponse) -> OnlineFeatures:
        """Takes a response in."""
        shape = (len(message.known), len(message.features))
        statuses = np.full(shape[0] * shape[1], PRESENT, dtype=np.uint8)
        statuses[np.array(message.exception_indexes, dtype=np.int64)] = message.exception_statuses
        return cls(
            names=tuple(message.features),
            values=np.array(message.values, dtype=np.float64).reshape(shape),
            statuses=statuses.reshape(shape),
            known=np.array(message.known, dtype=bool),
            complete_through_ms=np.array(message.complete_through_ms, dtype=np.int64),
            as_of_ms=np.array(message.as_of_ms, dtype=np.int64),
            catalog_fingerprint=message.catalog_fingerprint,
        )

    def to_dicts(self) -> list[dict[str, float | None]]:
        """A dict for each row: name -> value, None where there is none."""
        return [
            {
                name: value if status == PRESENT else None
                for name, value, status in zip(self.names, values, statuses, strict=True)
            }
            for values, statuses in zip(self.values.tolist(), self.statuses.tolist(), strict=True)
        ]

    def exceptions(self, row: int) -> dict[str, str]:
        """The statuses of one row that are not PRESENT: name -> status."""
        return {
            name: status_name(status)
            for name, status in zip(self.names, self.statuses[row].tolist(), strict=True)
            if status != PRESENT
        }

    def to_pandas(self) -> pd.DataFrame:
        """A DataFrame with a float64 column for each feature; needs pandas."""
        import pandas as pd

        return pd.DataFrame(self.values, columns=list(self.names))

    def to_arrow(self) -> pa.Table:
        """A table with a float64 column for each feature, null where there is no value; needs
        pyarrow."""
        import pyarrow as pa

        return pa.table(
            {
                name: pa.array(self.values[:, i], mask=self.statuses[:, i] != PRESENT)
                for i, name in enumerate(self.names)
            }
        )

    def to_torch(self) -> torch.Tensor:
        """A float64 tensor (n, features), NaN where there is no value; needs torch."""
        import torch

        return torch.from_numpy(self.values)

    def to_json_rows(self, cards: list[str]) -> list[dict[str, Any]]:
        """One object for each row, as `tally get --json` prints them."""
        rows = []
        for i, (card, features) in enumerate(zip(cards, self.to_dicts(), strict=True)):
            through = to_datetime(int(self.complete_through_ms[i]))
            rows.append(
                {
                    "card": card,
                    "known": bool(self.known[i]),
                    "complete_through": through and through.isoformat(timespec="milliseconds"),
                    "features": features,
                    "statuses": self.exceptions(i),
                }
            )
        return rows
