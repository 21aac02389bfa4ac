"""Processes of a data folder's stack that have outlived their supervisor.

Each child of a supervisor gets a signal when that dies, but not each child of a child, and a signal is
no end: a Postgres that is killed leaves backends behind for a moment, which keep its shared memory, and
a new one refuses to start beside them. The holder of the folder's lock may end what is left.

A process is the stack's where its environment carries the folder's id, which nothing else sets, or,
since Postgres overwrites its environment, where it is our Postgres, at home in the cluster's folder.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from stores.environment import STACK, stack_id

WAIT_S = 3.0
"""How long they get to end by themselves, as most of them are about to."""
POLL_INTERVAL_S = 0.02
KILL_TIMEOUT_S = 5.0
DELETED = " (deleted)"
"""How the name of a program ends that has been replaced since, as by an upgrade."""


def of_stack(data: Path) -> set[int]:
    """Pids of a stack's processes, without this one."""
    mark = f"{STACK}={stack_id(data)}".encode()
    return {pid for pid in _pids() if mark in _environment(pid)} | of_postgres(data / "postgres")


def of_postgres(cluster: Path, programs: Path | None = None) -> set[int]:
    """Pids of the Postgres processes of a cluster.

    Args:
        cluster: its folder.
        programs: where its programs are; by default any program called postgres counts.
    """
    try:
        home = cluster.stat()
    except OSError:
        return set()
    return {pid for pid in _pids() if _is_postgres(pid, home, programs)}


def _pids() -> list[int]:
    own = os.getpid()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


def _is_postgres(pid: int, home: os.stat_result, programs: Path | None) -> bool:
    try:
        program = Path(os.readlink(f"/proc/{pid}/exe"))
        place = os.stat(f"/proc/{pid}/cwd")
    except OSError:
        return False
    is_program = program.name.removesuffix(DELETED) == "postgres" and programs in (
        None,
        program.parent,
    )
    return is_program and (place.st_dev, place.st_ino) == (home.st_dev, home.st_ino)


def _are_gone(pids: set[int], within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while any(_runs(pid) for pid in pids):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def end(pids: set[int], wait_s: float = WAIT_S) -> set[int]:
    """Waits for processes to end by themselves, then kills them; returns those that were killed."""
    if _are_gone(pids, wait_s):
        return set()
    killed = {pid for pid in pids if _runs(pid)}
    for pid in killed:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    _are_gone(killed, KILL_TIMEOUT_S)
    return killed
