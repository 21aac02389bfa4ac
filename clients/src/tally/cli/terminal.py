"""Output on terminals of any encoding: what one cannot show becomes a question mark, and no error."""

from __future__ import annotations

import io
import sys


def show_what_can_be_shown() -> None:
    """Has standard output and standard error replace characters that their encoding lacks, such as `…` in
    ASCII, and parts of file names that are no text in any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
