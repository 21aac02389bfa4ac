"""Exports into a folder of Parquet files.

A folder that is being written has

    part-00000.parquet …   complete parts, each put there in one step
    export.json            what is exported, the parts so far, and the cursor behind them
    manifest.json          at the end, in place of export.json: rows, snapshot, fingerprint, hashes

Whatever is killed, the client, the server or the machine, what is there is whole and stays: the export
goes on behind the last part, in the same snapshot.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

from google.protobuf.message import DecodeError

from tally.client import Client
from tally.errors import CorruptedError, DeadlineError, OverloadedError, UnavailableError
from tally.exports import Export, What
from tally.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    import pyarrow as pa

STATE_FILE, MANIFEST_FILE = "export.json", "manifest.json"
LOCK_FILE = ".export.lock"
UNFINISHED = ".unfinished"
"""Ends the names of files that are being written; whatever is left of them counts for nothing."""
PART_ROWS = 1_000_000
"""Rows in a part, about; a part is what is done again, at the most, when this process is killed."""
PATIENCE_S = 60.0
"""How long a server that does not answer is asked again."""
RETRY_S = 0.5


class ExportFolderError(ValueError):
    """A folder holds something that an export cannot be written to, or gone on with."""


@dataclass(slots=True)
class Part:
    """One file."""

    file: str
    rows: int
    sha256: str


@dataclass(slots=True)
class State:
    """What is known of a folder's export."""

    what: str
    request: str
    """The request that began it, in base64."""
    snapshot: str = ""
    catalog_fingerprint: str = ""
    complete_through_ms: int = -1
    cursor: str = ""
    """Behind the last part, in base64."""
    parts: list[Part] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows in all parts."""
        return sum(part.rows for part in self.parts)

    @classmethod
    def read(cls, path: Path) -> State:
        """What a file says.

        Raises:
            ExportFolderError: it is no such file.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            parts = [Part(**part) for part in content.pop("parts")]
            return cls(**content, parts=parts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExportFolderError(f"{path} is damaged: export into another folder") from error


class FolderExport:
    """Writes one export into a folder."""

    def __init__(
        self,
        client: Client,
        folder: Path,
        request: pb.ExportRequest,
        what: What,
        *,
        resume: bool = False,
        part_rows: int = PART_ROWS,
        patience_s: float = PATIENCE_S,
        report: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Looks at the folder.

        Args:
            client: of the server.
            folder: made where it is missing.
            request: what to export; see `export_request`.
            what: its kind.
            resume: go on with the export that is there.
            part_rows: rows in a part, about.
            patience_s: how long a server that does not answer is asked again.
            report: told how many rows have come in all.

        Raises:
            ExportFolderError: the folder holds another export, or one and `resume` is not given, or
                somebody else is writing it.
            OSError: it cannot be written to.
        """
        self._client, self._folder = client, folder
        self._part_rows, self._patience_s, self._report = part_rows, patience_s, report
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / LOCK_FILE
        self._release = finalize(self, _released, lock, _held(lock))
        self._request = request
        try:
            self._state = self._begun(what, resume)
        except BaseException:
            self._release()
            raise
        self._cursor = b64decode(self._state.cursor)
        """Behind the last batch that came."""

    def _begun(self, what: What, resume: bool) -> State:
        """What the folder holds, or of a new export what is noted there."""
        folder, state_file = self._folder, self._folder / STATE_FILE
        encoded = b64encode(self._request.SerializeToString(deterministic=True)).decode()
        state = State(what, encoded)
        if (folder / MANIFEST_FILE).exists():
            raise ExportFolderError(f"{folder} holds a complete export: choose another folder")
        if state_file.exists():
            if not resume:
                raise ExportFolderError(
                    f"{folder} holds an unfinished export: --resume goes on with it"
                )
            state = State.read(state_file)
            if _asked(state.request) != _asked(encoded):
                raise ExportFolderError(
                    f"{folder} holds an unfinished export of something else "
                    f"({state.what}, or other instants or cards)"
                )
        elif any(not _is_of_no_account(path.name) for path in folder.iterdir()):
            raise ExportFolderError(f"{folder} holds other files: choose another folder")
        _write(state_file, asdict(state))
        return state

    def run(self) -> Path:
        """Writes what is missing, once; returns the manifest's path.

        Raises:
            CursorExpiredError: the snapshot is gone; begin anew in another folder.
            TallyError, OSError: something else; what came is there, and can be gone on with.
        """
        try:
            return self._run()
        finally:
            self._release()

    def _run(self) -> Path:
        with _PartWriter(self._folder, len(self._state.parts)) as writer:
            row_count = self._receive(writer)
            if writer.rows or not self._state.parts:
                self._keep(writer)
        if self._state.rows != row_count:
            raise CorruptedError(
                f"{self._state.rows:,} rows came, and the export has {row_count:,}: begin it anew"
            )
        return self._finish()

    def _receive(self, writer: _PartWriter) -> int:
        """Takes all batches in, from as many calls as it takes; returns the export's rows."""
        came_s = time.monotonic()
        while True:
            try:
                export = self._client.export_from(self._call())
                self._note(export)
                writer.schema = export.schema
                for batch, cursor in export:
                    came_s = time.monotonic()
                    writer.write(batch)
                    self._cursor = cursor
                    self._report(self._state.rows + writer.rows)
                    if writer.rows >= self._part_rows:
                        self._keep(writer)
            except _PASSING:
                if time.monotonic() - came_s > self._patience_s:
                    raise
                time.sleep(RETRY_S)
            else:
                assert export.row_count is not None  # an export that ends has its summary
                return export.row_count

    def _call(self) -> pb.ExportRequest:
        """The request for what is missing."""
        return pb.ExportRequest(cursor=self._cursor) if self._cursor else self._request

    def _note(self, export: Export) -> None:
        """Takes the header in: an export that goes on is in its own snapshot."""
        state = self._state
        if self._cursor and state.snapshot != export.snapshot:
            raise CorruptedError(f"snapshot {export.snapshot} answers for {state.snapshot}")
        state.snapshot = export.snapshot
        state.catalog_fingerprint = export.catalog_fingerprint
        state.complete_through_ms = export.complete_through_ms

    def _keep(self, writer: _PartWriter) -> None:
        """Puts the part that is being written in its place, and notes how far that is."""
        self._state.parts.append(writer.finish())
        self._state.cursor = b64encode(self._cursor).decode()
        _write(self._folder / STATE_FILE, asdict(self._state))

    def _finish(self) -> Path:
        state = self._state
        manifest = self._folder / MANIFEST_FILE
        through_ms = state.complete_through_ms
        content = {
            "what": state.what,
            "rows": state.rows,
            "snapshot": state.snapshot,
            "catalog_fingerprint": state.catalog_fingerprint,
            "complete_through": None
            if through_ms < 0
            else datetime.fromtimestamp(through_ms / 1000, UTC).isoformat(timespec="milliseconds"),
            "parts": [asdict(part) for part in state.parts],
        }
        _write(manifest, content)
        (self._folder / STATE_FILE).unlink()
        return manifest


_PASSING = (UnavailableError, OverloadedError, DeadlineError, CorruptedError)
"""What may be over in a moment."""


class _PartWriter:
    """Writes parts, one after the other; one that is not finished leaves nothing."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._writer: Any = None
        self._file: Any = None
        self.schema: pa.Schema | None = None
        self.rows = 0

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._draft.unlink(missing_ok=True)

    @property
    def _draft(self) -> Path:
        return self._folder / f".part-{self._number:05}{UNFINISHED}"

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows to the part."""
        self._open().write_batch(batch)
        self.rows += len(batch)

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        if self._writer is None:
            # Arrow opens no file whose name is no text: it gets an open one.
            self._file = self._draft.open("wb")
            self._writer = pq.ParquetWriter(self._file, self.schema, compression="zstd")
        return self._writer

    def finish(self) -> Part:
        """Puts the part in its place, on the disk, and begins the next."""
        self._open().close()
        self._file.close()
        self._writer = None
        path = self._folder / f"part-{self._number:05}.parquet"
        with self._draft.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(self._draft, path)
        part = Part(path.name, self.rows, digest)
        self._number, self.rows = self._number + 1, 0
        return part


def _is_of_no_account(name: str) -> bool:
    """Whether a file of this name counts for nothing: an export leaves it while it begins."""
    return name == LOCK_FILE or name.endswith(UNFINISHED)


def _held(lock: Path) -> int:
    """Locks a file exclusively, until it is released or this process ends; returns its descriptor.

    Only its owner can open the file: any process that can open a file can lock it, and another user who may
    read the folder must not be able to keep its owner out.

    Raises:
        ExportFolderError: somebody else does.
    """
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ExportFolderError(f"somebody else exports into {lock.parent}") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # it was released, and deleted, in between


def _released(lock: Path, descriptor: int) -> None:
    """Deletes a lock that is held, and lets it go."""
    lock.unlink(missing_ok=True)
    os.close(descriptor)


def _asked(encoded: str) -> pb.ExportSpec | None:
    """What a request is about, however it is sent; None where it is none."""
    try:
        spec = pb.ExportRequest.FromString(b64decode(encoded)).spec
    except (ValueError, DecodeError):
        return None
    spec.ClearField("batch_rows")
    spec.ClearField("compression")
    return spec


def _write(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file in one step, on the disk."""
    draft = path.with_name(f".{path.name}{UNFINISHED}")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
