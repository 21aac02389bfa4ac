"""The data folder of an embedded stack: what is in it, and whether its stack runs.

card.key        the secret behind card ids          (owner only)
stack.secret    password of both stores             (owner only)
stack.json      what the running stack says of itself: addresses, settings (owner only)
stack.lock      held by the supervisor while it lives, with its pid (owner only)
postgres/       the database cluster
kafka/          the broker's settings and topics
flink/          the stream job's checkpoints
valkey/         settings and hand-over of the online store
logs/           one file per process
rejects/        rows that loads could not read
temporary/      of the running stack's processes; emptied at each start
cache/          compiled code, where the sources' folder cannot be written to

Folders and files are their owner's only, whatever the umask. As root, Postgres runs as a user of its
own: its folder belongs to that user, and the data folder lets that user's group through.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deploy.processes import StackError
from stores.environment import CACHE, TEMPORARY
from stores.settings import CARD_KEY_FILE, STACK_FILE, make_card_key_file, read_stack_file

ALREADY_UP = 3
"""Exit status of a supervisor that finds the folder taken."""
LOCK_FILE = "stack.lock"
LOCK_TIMEOUT_S = 1.0
"""A process that checks whether a stack is up holds the lock for a moment."""
LOCK_POLL_INTERVAL_S = 0.02
FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = 0o077
"""The bits of a mode that are of group and others."""
SEPARATORS = (",", ":", "\n")
PATH_BYTES_MAX = 900
"""Of the data folder's path: Postgres holds 1,024 bytes, its own files' names included."""


@dataclass(frozen=True, slots=True)
class DataFolder:
    """Paths within a data folder."""

    root: Path

    @property
    def postgres(self) -> Path:
        """The database cluster."""
        return self.root / "postgres"

    @property
    def valkey(self) -> Path:
        """The online store's folder."""
        return self.root / "valkey"

    @property
    def kafka(self) -> Path:
        """The broker's folder."""
        return self.root / "kafka"

    @property
    def card_key(self) -> Path:
        """The card key's file."""
        return self.root / CARD_KEY_FILE

    def log(self, name: str) -> Path:
        """The log of one process."""
        return self.root / "logs" / f"{name}.log"

    @property
    def temporary(self) -> Path:
        """The temporary files of the stack's processes."""
        return self.root / TEMPORARY

    def open_log(self, name: str) -> IO[bytes]:
        """The log of one process, to append to: it may be emptied beside its writer."""
        return os.fdopen(
            os.open(self.log(name), os.O_CREAT | os.O_APPEND | os.O_WRONLY, FILE_MODE), "ab"
        )

    def make(self) -> None:
        """Makes the folder where it is missing.

        Raises:
            StackError: it is a file, or its path is one that a part cannot take.
        """
        _check_path(self.root)
        try:
            self.root.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        except FileExistsError:
            raise StackError(
                f"{self.root} is a file; TALLY_DATA or --data names a folder"
            ) from None

    def prepare(self) -> str:
        """Makes what is missing in the folder, and closes to others what is open to them, as by an
        earlier version; returns the stores' password. Only for the holder of the lock."""
        tighten(self.root)
        for folder in (self.root / "logs", self.temporary, self.root / CACHE):
            folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        make_card_key_file(self.card_key)
        secret = self.root / "stack.secret"
        if not secret.exists():
            write_private(secret, secrets.token_urlsafe(24))
        return secret.read_text(encoding="utf-8").strip()

    def clear_temporary(self) -> None:
        """Deletes what an earlier stack left; for the supervisor, before it starts anything."""
        for path in self.temporary.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def describe(self, content: dict[str, Any]) -> None:
        """Writes stack.json in one step, so that no reader sees half of it."""
        write_private(self.root / STACK_FILE, json.dumps(content, indent=2) + "\n")

    def description(self) -> dict[str, Any] | None:
        """What the running stack says of itself; None when none runs, whatever one that was killed has
        left."""
        found, holder = read_stack_file(self.root), self.holder()
        return found if holder is not None and found.get("supervisor_pid") == holder else None

    def forget(self) -> None:
        """Removes stack.json."""
        (self.root / STACK_FILE).unlink(missing_ok=True)

    def lock(self, timeout_s: float = 0.0) -> int | None:
        """A descriptor that holds the folder until the last copy of it is closed; None when another
        process keeps the folder."""
        deadline_s = time.monotonic() + timeout_s
        while not self._takes(held := self._open_lock(), fcntl.LOCK_EX):
            os.close(held)
            if time.monotonic() >= deadline_s:
                return None
            time.sleep(LOCK_POLL_INTERVAL_S)
        os.ftruncate(held, 0)
        return held

    def _open_lock(self) -> int:
        held = os.open(self.root / LOCK_FILE, os.O_CREAT | os.O_RDWR, FILE_MODE)
        # Who can open a file can lock it: an earlier version's could be opened by all.
        with suppress(PermissionError):
            os.fchmod(held, FILE_MODE)
        return held

    @staticmethod
    def _takes(held: int, how: int) -> bool:
        try:
            fcntl.flock(held, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_locked(self) -> bool:
        """Whether a supervisor lives, or is being started."""
        if not (self.root / LOCK_FILE).exists():
            return False
        held = self._open_lock()
        try:
            return not self._takes(held, fcntl.LOCK_SH)
        finally:
            os.close(held)

    def name_holder(self, held: int, pid: int) -> None:
        """Writes into a lock that is held whom to ask to end."""
        os.pwrite(held, f"{pid}\n".encode(), 0)

    def holder(self) -> int | None:
        """The pid of the supervisor; None where none lives, or is not known yet."""
        if not self.is_locked():
            return None
        text = (self.root / LOCK_FILE).read_text().strip()
        return int(text) if text.isdigit() else None


def tighten(root: Path) -> None:
    """Closes a folder and all that is in it to everybody but its owners.

    What is another user's stays as it is, unless this is root. Links are not followed.
    """
    for folder, folders, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in (*folders, *files))):
            with suppress(OSError):
                _close_to_others(path)


def _close_to_others(path: str) -> None:
    """By a descriptor: what has this name now may have been put there by others, as a link elsewhere."""
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        mode = os.fstat(found).st_mode
        if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & OTHERS:
            os.chmod(f"/proc/self/fd/{found}", stat.S_IMODE(mode) & ~OTHERS)
    finally:
        os.close(found)


def _check_path(root: Path) -> None:
    """Refuses a path that some part of the stack would take for several, or cannot hold.

    Raises:
        StackError: it is one.
    """
    found = [c for c in SEPARATORS if c in str(root)]
    if found:
        raise StackError(
            f"the data folder's path {str(root)!r} has {found[0]!r} in it, which Flink takes for the end "
            "of a path: choose another by --data or TALLY_DATA"
        )
    if len(os.fsencode(root)) > PATH_BYTES_MAX:
        raise StackError(
            f"the data folder's path has {len(os.fsencode(root)):,} bytes, and Postgres takes "
            f"{PATH_BYTES_MAX} at the most: choose another by --data or TALLY_DATA"
        )


def write_private(path: Path, text: str) -> None:
    """Replaces a file, readable by its owner only, in one step; leaves one that has the same text.

    Raises:
        OSError: it cannot be written; then the file is what it was.
    """
    with suppress(OSError):
        if path.read_text() == text and not stat.S_IMODE(path.stat().st_mode) & OTHERS:
            return
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        handle = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, FILE_MODE)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
