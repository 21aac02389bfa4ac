"""What several commands take: instants and card ids as text, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from tally.sources import Place, SourceError, find, parse_separator

SeparatorOption = Annotated[
    str,
    typer.Option(metavar="CHARACTER", help="Between columns of CSV: ',', ';', '|' or tab."),
]


def places_of(paths: Sequence[Path]) -> list[Place]:
    """The files that arguments mean: files, `-`, folders, patterns.

    Raises:
        typer.BadParameter: one of them means none.
    """
    try:
        return [place for path in paths for place in find(path)]
    except (SourceError, OSError) as error:
        raise typer.BadParameter(str(error)) from None


def separator_of(text: str) -> str:
    """What separates columns.

    Raises:
        typer.BadParameter: it is no separator.
    """
    try:
        return parse_separator(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_instant(text: str) -> datetime:
    """An ISO 8601 instant; without an offset it is UTC, like everything here.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no ISO 8601 time, such as 2020-06-21T12:14:25Z"
        ) from None
    return instant if instant.tzinfo else datetime.fromisoformat(f"{instant.isoformat()}+00:00")


def parse_card_id(text: str) -> bytes:
    """A card id in hexadecimal digits.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        card_id = bytes.fromhex(text)
    except ValueError:
        card_id = b""
    if len(card_id) != 16:
        raise typer.BadParameter(f"{text!r} is no card id: 32 hexadecimal digits")
    return card_id


def draft_of(output: Path) -> Path:
    """Where a file is written until it is whole; others who write the same one have their own."""
    return output.with_name(f".{output.name}.{os.getpid()}.part")
