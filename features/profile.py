"""The card profile: slow facts of a card holder, kept with the instant from which they hold.

A card has one record for each different content seen, from the earliest instant at which that
content was seen, so that any order of arrival leaves the same bytes. As of t the record with the
latest `valid_from_ms` at or before t holds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PROFILE_VERSION = 1
PROFILE_RECORDS_MAX = 1_024
"""Versions of one card's profile that are kept; the newest stay. Up to here the bytes are a function of
the set of versions; a card that has had more keeps what it saw last."""

PROFILE_RECORD = np.dtype(
    [
        ("valid_from_ms", "<i8"),
        ("latitude_udeg", "<i4"),
        ("longitude_udeg", "<i4"),
        ("birth_date_days", "<i4"),
        ("city_pop", "<i4"),
        ("gender", "u1"),
        ("zero", "V7"),
    ]
)
"""Home in micro-degrees; birth date in days since 1970-01-01 and population, both NUMBER_MISSING
where unknown; gender 0 unknown, 1 F, 2 M."""

PROFILE_FIELDS = PROFILE_RECORD[
    [
        *("valid_from_ms", "latitude_udeg", "longitude_udeg", "birth_date_days", "city_pop"),
        "gender",
    ]
]
"""The same bytes, seen as what features are computed from."""

NUMBER_MISSING = -(2**31)
DAYS_PER_YEAR = 365.2425
"""The mean year of the Gregorian calendar."""
GENDERS = ("", "F", "M")

HEADER = struct.Struct("<BB6x")

_NO_PROFILE = HEADER.pack(PROFILE_VERSION, PROFILE_RECORD.itemsize)

ProfileRecords = npt.NDArray[np.void]


def encode_profile(records: ProfileRecords) -> bytes:
    """The profile of records in any order, at least one, after keeping the newest."""
    body = records.view("V32")
    content = [bytes(item)[8:] for item in body.tolist()]
    first: dict[bytes, int] = {}
    for valid_from_ms, key in zip(records["valid_from_ms"].tolist(), content, strict=True):
        first[key] = min(valid_from_ms, first.get(key, valid_from_ms))
    ordered = sorted((valid_from_ms, key) for key, valid_from_ms in first.items())
    packed = b"".join(
        struct.pack("<q", valid_from_ms) + key
        for valid_from_ms, key in ordered[-PROFILE_RECORDS_MAX:]
    )
    return HEADER.pack(PROFILE_VERSION, PROFILE_RECORD.itemsize) + packed


@dataclass(frozen=True, slots=True)
class Profiles:
    """Many cards' profiles, concatenated."""

    records: ProfileRecords
    """(n_records,) of PROFILE_RECORD, by card and then by valid_from_ms."""
    offsets: npt.NDArray[np.int64]
    """(n_cards + 1,): card i has records[offsets[i]:offsets[i + 1]]."""

    @classmethod
    def empty(cls, n_cards: int) -> Profiles:
        """No profile for any card."""
        return cls(np.empty(0, dtype=PROFILE_RECORD), np.zeros(n_cards + 1, dtype=np.int64))

    @classmethod
    def from_bytes(cls, profiles: Sequence[bytes | None]) -> Profiles:
        """Concatenates profiles as stored; None stands for a card without one.

        Raises:
            ValueError: a profile of an unknown version.
        """
        stored = [_NO_PROFILE if profile is None else profile for profile in profiles]
        if not {profile[: HEADER.size] for profile in stored} <= {_NO_PROFILE}:
            i = next(i for i, p in enumerate(stored) if p[: HEADER.size] != _NO_PROFILE)
            raise ValueError(f"profile {i} begins with {stored[i][:2]!r}: not a known version")
        sizes = np.array([0, *[len(profile) - HEADER.size for profile in stored]], np.int64)
        bodies = [memoryview(profile)[HEADER.size :] for profile in stored]
        offsets = sizes.cumsum() // PROFILE_RECORD.itemsize
        return cls(np.frombuffer(b"".join(bodies), dtype=PROFILE_RECORD), offsets)
