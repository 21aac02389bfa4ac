"""Files as they come: compressed or not, named or piped, alone or in folders. Each is opened once.

What a file is, its first bytes tell: Parquet, gzip, zstd, or else text. Names do not matter.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

STDIN = "-"
"""Names standard input where a file is asked for."""
HEAD_BYTES = 1 << 16
"""What is looked at before a file is read."""
PIECE_BYTES = 1 << 16
"""What is decompressed at a time: of a file that is cut off, at most so much is lost before the cut."""
SEPARATORS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
"""Between the columns of a line of CSV: each with its name for people."""
FILES_MAX = 100_000
"""Files that a folder or a pattern may mean."""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""A partition's name where its column has no value."""

_PARQUET = b"PAR1"
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""Bytes 2 to 4 of a frame that some zstd programs begin with; its first byte is 0x50 to 0x5f."""
_REFUSED = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"BZh": "compressed with bzip2: unpack it, or compress it with gzip or zstd",
    b"\xfd7zXZ": "compressed with xz: unpack it, or compress it with gzip or zstd",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8",
}
_IN_FOLDERS = (".parquet", ".csv")
"""Endings of the files of a folder that are read, also before .gz or .zst."""
_PIPE_NAMES = ("/dev/fd/", "/proc/self/fd/")


class SourceError(ValueError):
    """A file that cannot be read, or not to its end; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file that is there, and not opened yet."""

    path: Path
    """`-` is standard input."""
    name: str
    """By which a load of it is recorded. A file of a folder has the folder's name first."""
    partitions: tuple[tuple[str, str | None], ...] = ()
    """Columns that folders above it name, such as ("year", "2024") by year=2024."""

    @property
    def size_bytes(self) -> int | None:
        """On disk; None where it is a pipe."""
        if str(self.path) == STDIN:
            return None
        status = self.path.stat()
        return status.st_size if stat.S_ISREG(status.st_mode) else None


def find(path: str | Path) -> list[Place]:
    """The files that a path means: itself, those of a folder, or those that fit a pattern.

    Args:
        path: a file or pipe, `-` for standard input, a folder, or a pattern with `*`, `?` or `[`,
            in which `**` stands for folders of any depth.

    Returns:
        The files in order of their paths. Of a folder those that end in .parquet or .csv, also compressed;
        names that begin with `_` or `.` are left out.

    Raises:
        FileNotFoundError: there is none.
        SourceError: a folder without such files, or more than FILES_MAX.
    """
    places = _find(os.fspath(path))
    if len(places) > FILES_MAX:
        raise SourceError(f"{path}: it has more than {FILES_MAX:,} files: name fewer at a time")
    return places


def _find(text: str) -> list[Place]:
    if text == STDIN:
        return [Place(Path(text), "stdin")]
    if os.path.isdir(text):
        return _of_folder(Path(text))
    if os.path.exists(text):
        name = "pipe" if text.startswith(_PIPE_NAMES) else _name(Path(Path(text).name))
        return [Place(Path(text), name, _partitions(Path(text)))]
    matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
    if not matches:
        what = "no file fits this pattern" if glob.has_magic(text) else os.strerror(errno.ENOENT)
        raise FileNotFoundError(errno.ENOENT, what, text)
    any_file = Path(text).name == "**"  # which also fits what is no data
    files = [
        path
        for path in map(Path, matches)
        if path.is_file() and not _is_hidden(path) and (_is_data(path) or not any_file)
    ]
    places = [Place(file, _name_with_columns(file), _partitions(file)) for file in files]
    for folder in map(Path, matches):
        if folder.is_dir() and not any(folder in file.parents for file in files):
            places += _of_folder(folder)
    return sorted(set(places), key=lambda place: place.path)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(("_", "."))


def _is_data(path: Path) -> bool:
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith(_IN_FOLDERS)


def _of_folder(folder: Path) -> list[Place]:
    places = []
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        is_hidden = any(map(_is_hidden, (below, *below.parents)))
        if path.is_file() and _is_data(path) and not is_hidden:
            name = _name(Path(folder.absolute().name) / below)
            places.append(Place(path, name, _partitions(path)))
    if not places:
        raise SourceError(f"{folder}: the folder has no file that ends in .parquet or .csv")
    return places


def _name(path: Path) -> str:
    """A path as text that can be written anywhere: names of files are bytes of any kind."""
    return os.fsencode(path).decode(errors="replace")


def _name_with_columns(file: Path) -> str:
    """The name of a file that a pattern found: with the folders that are columns."""
    return _name(Path(*(part for part in file.parts[:-1] if "=" in part), file.name))


def _partitions(path: Path) -> tuple[tuple[str, str | None], ...]:
    pairs = (part.partition("=") for part in path.parts[:-1])
    return tuple(
        (unquote(name), None if value == NO_VALUE else unquote(value))
        for name, equals, value in pairs
        if name and equals
    )


class Source:
    """An open file. Text is read in pieces, decompressed; Parquet by `file`."""

    def __init__(self, place: Place) -> None:
        """Opens it, and looks at its first bytes.

        Raises:
            SourceError: it is of a kind that is not read; or Parquet that cannot be read, since it is
                compressed as a whole or comes through a pipe.
            OSError: it cannot be opened.
        """
        self.place, self.name = place, place.name
        self.label = place.name if str(place.path) == STDIN else str(place.path)
        """In messages."""
        self.size_bytes = place.size_bytes
        self._bytes_reported = 0
        self.file = _Raw(place.path)
        self._content: Any = self.file
        self._failure: SourceError | None = None
        self.codec: str | None = None
        """How the file is compressed as a whole; None where it is not."""
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        first = self.file.peek(8)
        for magic, what in _REFUSED.items():
            if first.startswith(magic):
                raise SourceError(f"{self.label}: it is {what}")
        self.codec = _codec(first)
        if self.codec:
            import pyarrow as pa

            raw = pa.PythonFile(self.file, mode="r")
            self._content = pa.CompressedInputStream(raw, self.codec)
        self.head = self.read(HEAD_BYTES)
        """The first bytes, decompressed; they are read again."""
        self.is_parquet = self.head.startswith(_PARQUET)
        self._pending = self.head
        if self.is_parquet and self.codec:
            raise SourceError(
                f"{self.label}: Parquet is not read out of {self.codec}: unpack it first"
            )
        if self.is_parquet and not self.file.seekable():
            raise SourceError(
                f"{self.label}: Parquet has its index at its end, and is not read from a pipe: name the file"
            )

    _pending = b""

    def read(self, n: int) -> bytes:
        """The next n bytes of text; fewer only at the end, none behind it.

        Raises:
            SourceError: it is damaged or cut off. What was readable before has been returned.
        """
        pieces = [self._pending[:n]]
        self._pending, size = self._pending[n:], len(pieces[0])
        while size < n and self._failure is None:
            try:
                piece = self._content.read(min(n - size, PIECE_BYTES))
            except OSError as error:  # also the library's own
                self._failure = SourceError(f"{self.label}: {_why(error, self.codec)}")
                break
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        if not size and self._failure is not None:
            raise self._failure
        return b"".join(pieces)

    def taken_bytes(self) -> int:
        """How much of the file on disk was read since this was last asked."""
        taken, self._bytes_reported = (
            self.file.bytes_read - self._bytes_reported,
            self.file.bytes_read,
        )
        return taken

    def close(self) -> None:
        """Closes it; not standard input, which is not ours."""
        if self._content is not self.file:
            self._content.close()
        self.file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _codec(first: bytes) -> str | None:
    if len(first) >= 4 and 0x50 <= first[0] <= 0x5F and first[1:4] == _ZSTD_SKIPPABLE:
        return "zstd"
    return next((codec for magic, codec in _CODECS.items() if first.startswith(magic)), None)


def _why(error: OSError, codec: str | None) -> str:
    if codec is None or error.errno:
        return str(error)
    if "runcated" in str(error):
        return f"the file is cut off: its {codec} stream has no end"
    return f"the file is damaged: {error}"


class _Raw(io.RawIOBase):
    """A file of which the first bytes can be looked at, and that counts what was read of it."""

    def __init__(self, path: Path) -> None:
        is_stdin = str(path) == STDIN
        self._handle = sys.stdin.fileno() if is_stdin else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._is_ours = not is_stdin
        self._peeked = b""
        self.bytes_read = 0

    def peek(self, n: int) -> bytes:
        """The first n bytes, fewer only where there are no more. Nothing was read before."""
        while len(self._peeked) < n:
            piece = os.read(self._handle, n - len(self._peeked))
            if not piece:
                break
            self._peeked += piece
        return self._peeked

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, n: int = -1, /) -> bytes:
        """The next n bytes; fewer where no more are there yet. All that follow for -1."""
        if n < 0:
            return b"".join(iter(lambda: self.read(PIECE_BYTES), b""))
        if self._peeked:
            piece, self._peeked = self._peeked[:n], self._peeked[n:]
        else:
            piece = os.read(self._handle, n)
        self.bytes_read += len(piece)
        return piece

    def seekable(self) -> bool:
        """Whether it is no pipe."""
        try:
            os.lseek(self._handle, 0, os.SEEK_CUR)
        except OSError:
            return False
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Goes to a place in the file."""
        if self._peeked and whence == os.SEEK_CUR:
            offset -= len(self._peeked)
        self._peeked = b""
        return os.lseek(self._handle, offset, whence)

    def tell(self) -> int:
        """Where it is."""
        return os.lseek(self._handle, 0, os.SEEK_CUR) - len(self._peeked)

    def close(self) -> None:
        """Closes the file; not standard input, which is not ours."""
        if self._is_ours and not self.closed:
            os.close(self._handle)
        super().close()


def parse_separator(text: str) -> str:
    """What separates columns, as people write it: a character, or `tab`.

    Raises:
        ValueError: it is none of SEPARATORS.
    """
    separator = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if separator not in SEPARATORS:
        names = ", ".join(SEPARATORS.values())
        raise ValueError(f"{text!r} is no separator of columns: one of {names}")
    return separator


def other_separator(line: str, separator: str) -> str | None:
    """What to say of a header that has other columns, or more of them, by another separator.

    Args:
        line: the header.
        separator: by which it was read.
    """
    counts = {other: line.count(other) for other in SEPARATORS}
    best = max(counts, key=lambda other: counts[other])
    if best == separator or counts[best] <= counts[separator]:
        return None
    name = SEPARATORS[best]
    return f"its columns are separated by {name}: give --separator {name}"
