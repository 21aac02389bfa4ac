"""How many rejected rows a load may have before its command fails."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LIMIT = re.compile(r"(?P<rows>[0-9]{1,18})|(?P<percent>[0-9]{1,3}(\.[0-9]{1,6})?)%", re.ASCII)


@dataclass(frozen=True, slots=True)
class RejectLimit:
    """A number of rows, or a share of those that were read."""

    text: str
    """As it was given."""
    rows: int | None
    share: Fraction | None
    """From 0 to 1, exactly as it was given."""

    @classmethod
    def parse(cls, text: str) -> RejectLimit:
        """Takes `100` or `0.5%`.

        Raises:
            ValueError: it is neither, or more than 100%.
        """
        found = _LIMIT.fullmatch(text)
        percent = Fraction(found["percent"]) if found and found["percent"] else None
        if found is None or (percent is not None and percent > 100):
            raise ValueError(
                f"{text!r} is no limit of rejects: a number of rows, or a share from 0% to 100%"
            )
        if percent is None:
            return cls(text, int(found["rows"]), None)
        return cls(text, None, percent / 100)

    def allows(self, rejected: int, read: int) -> bool:
        """Whether so many rejected rows, of so many that were read, are within it."""
        return rejected <= (self.rows if self.share is None else self.share * read)  # type: ignore[operator]
