"""Logging that never fails: a full disk must not end a process that logs."""

from __future__ import annotations

from contextlib import suppress
from typing import TextIO, cast


class _Unfailing:
    """What logs need of a file; what cannot be written is lost, and the writer goes on."""

    def __init__(self, file: TextIO) -> None:
        """Takes the file."""
        self._file = file

    def write(self, text: str) -> int:
        """Writes, if it can."""
        with suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, if it can."""
        with suppress(OSError):
            self._file.flush()


def unfailing(file: TextIO) -> TextIO:
    """A file to log to, which swallows what the one that it is made of refuses."""
    return cast("TextIO", _Unfailing(file))
