"""Rows of the Kaggle format for tests."""

from __future__ import annotations

from pathlib import Path

from tally.generator import HEADER

_COLUMNS = HEADER.strip("\n").split(",")

_DEFAULTS = {
    "": "0",
    "trans_date_trans_time": "2024-03-01 10:00:00",
    "cc_num": "4000123412341234",
    "merchant": "fraud_Kirlin and Sons",
    "category": "personal_care",
    "amt": "2.86",
    "first": "Jo",
    "last": "Doe",
    "gender": "F",
    "street": "1 Elm Street",
    "city": "Columbia",
    "state": "SC",
    "zip": "09209",
    "lat": "33.9659",
    "long": "-80.9355",
    "city_pop": "333497",
    "job": "Chef",
    "dob": "1968-03-19",
    "trans_num": "t0",
    "unix_time": "0",
    "merch_lat": "33.986391",
    "merch_long": "-81.200714",
    "is_fraud": "0",
}


def row(**values: object) -> dict[str, str]:
    """A row, with some columns changed."""
    return _DEFAULTS | {name: str(value) for name, value in values.items()}


def line(values: dict[str, str], columns: list[str] = _COLUMNS) -> str:
    """A row as CSV."""
    cells = [values[name] for name in columns]
    return ",".join(f'"{cell}"' if "," in cell else cell for cell in cells)


def write(path: Path, rows: list[dict[str, str]], *, without: tuple[str, ...] = ()) -> Path:
    """A file of rows, without some columns."""
    columns = [name for name in _COLUMNS if name not in without]
    lines = [",".join(columns), *(line(values, columns) for values in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path
