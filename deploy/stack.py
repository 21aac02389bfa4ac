"""The data folder of an embedded stack: what is in it, and whether its stack runs.

card.key        the secret behind card ids          (owner only)
stack.secret    password of both stores             (owner only)
stack.json      what the running stack says of itself: addresses, settings (owner only)
stack.lock      held by the supervisor while it lives
postgres/       the database cluster
kafka/          the broker's settings and topics
flink/          the stream job's checkpoints
valkey/         settings and hand-over of the online store
logs/           one file per process
rejects/        rows that loads could not read
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deploy.processes import StackError
from stores.settings import CARD_KEY_FILE, STACK_FILE, make_card_key_file, read_stack_file

ALREADY_UP = 3
"""Exit status of a supervisor that finds the folder taken."""
LOCK_POLL_INTERVAL_S = 0.02


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

    def prepare(self) -> str:
        """Makes the folder and its secrets where they are missing; returns the stores' password."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise StackError(
                f"{self.root} is a file; TALLY_DATA or --data names a folder"
            ) from None
        (self.root / "logs").mkdir(mode=0o700, exist_ok=True)
        make_card_key_file(self.card_key)
        secret = self.root / "stack.secret"
        if not secret.exists():
            write_private(secret, secrets.token_urlsafe(24))
        return secret.read_text(encoding="utf-8").strip()

    def describe(self, content: dict[str, Any]) -> None:
        """Writes stack.json in one step, so that no reader sees half of it."""
        write_private(self.root / STACK_FILE, json.dumps(content, indent=2) + "\n")

    def description(self) -> dict[str, Any] | None:
        """What the running stack says of itself; None when none runs."""
        return read_stack_file(self.root) or None if self.is_locked() else None

    def forget(self) -> None:
        """Removes stack.json."""
        (self.root / STACK_FILE).unlink(missing_ok=True)

    def lock(self, timeout_s: float = 0.0) -> IO[str] | None:
        """Takes the folder for this process's life; None when another process keeps it."""
        deadline = time.monotonic() + timeout_s
        file = (self.root / "stack.lock").open("a+")
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.close()
                    return None
                time.sleep(LOCK_POLL_INTERVAL_S)
            else:
                return file

    def is_locked(self) -> bool:
        """Whether a supervisor lives."""
        if not (self.root / "stack.lock").exists():
            return False
        file = self.lock()
        if file is None:
            return True
        file.close()
        return False


def write_private(path: Path, text: str) -> None:
    """Replaces a file, readable by its owner only, in one step."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    draft.replace(path)
