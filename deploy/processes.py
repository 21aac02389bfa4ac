"""Child processes that do not outlive their parent, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

LAST_BYTES = 8_192
"""Of a log, what its last lines are looked for in."""
START_TIMEOUT_S = 60.0
"""Time that one process gets to become ready."""
STOP_TIMEOUT_S = 20.0
"""Time that one process gets to stop in order."""


CLIENT_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
CLIENT_PORTS_FROM = 32_768
SERVER_PORTS_FROM = 10_240
LISTENING = "0A"
"""The state of a socket that listens, in /proc/net/tcp."""


class StackError(Exception):
    """The stack cannot do what was asked; the message says why and what to do."""


def free_port() -> int:
    """A TCP port on loopback that is free now, at random.

    Below those that the system gives to clients: while a server is away, a client that tries to
    reach it again and again may be given its very port, and keep it.

    Raises:
        StackError: none is found.
    """
    try:
        above = int(CLIENT_PORTS.read_text().split()[0])
    except (OSError, ValueError):
        above = CLIENT_PORTS_FROM
    for port in random.sample(range(SERVER_PORTS_FROM, max(above, SERVER_PORTS_FROM + 1_000)), 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise StackError("no free TCP port was found on loopback")


def dies_with_parent(how: signal.Signals) -> Callable[[], None]:
    """What a child does before it is itself, so that the kernel sends it a signal when this thread is no
    more."""
    parent = os.getpid()

    def in_child() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(how))
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return in_child


def outlive_parent() -> None:
    """Takes back, for this process, what `dies_with_parent` did."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, 0)


def spawn(
    command: Sequence[str | Path],
    *,
    log: IO[bytes],
    on_parent_death: signal.Signals = signal.SIGKILL,
    env: dict[str, str] | None = None,
    user: str | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a child to which the kernel sends a signal when this process dies, even by SIGKILL.

    Linux only. Must be called on the main thread: the kernel watches the thread.
    """
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=env,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd=cwd,
        process_group=0,  # Ctrl-C in the terminal is the supervisor's to handle
        preexec_fn=dies_with_parent(on_parent_death),
    )


def last_lines(path: Path, count: int = 8) -> str:
    """The last lines of a log, for a message that ends with them."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return ""
    return f"; the last lines of {path}:\n" + "\n".join(f"    {line}" for line in lines)


def accepts_connections(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something listens on a port of this machine; where on all addresses, on loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def listens(pid: int, port: int) -> bool:
    """Whether a process itself listens on a TCP port: no password is shown to another that took it."""
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return False
    try:
        sockets = process.net_connections("tcp")
    except psutil.AccessDenied:
        # Root itself may not look at another user's descriptors, as in a container: its user must do.
        return process.uids().real in _users_listening(port)
    except psutil.Error:
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)


def _users_listening(port: int) -> set[int]:
    """Whose sockets listen on a TCP port, as the kernel tells everybody."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, user, *_ = line.split()
                if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                    found.add(int(user))
    return found


def let_others_pass(path: Path) -> None:
    """Lets other users walk through the folders above a path, and see no names in them.

    For root only, whose Postgres must run as another user.

    Raises:
        StackError: one of them cannot be changed.
    """
    for folder in path.absolute().parents:
        mode = folder.stat().st_mode
        if mode & stat.S_IXOTH:
            continue
        try:
            folder.chmod(mode | stat.S_IXOTH)
        except OSError as error:
            raise StackError(
                f"Postgres does not run as root, and another user cannot pass {folder}: {error.strerror}"
            ) from error


def stop(child: subprocess.Popen[bytes], how: signal.Signals, timeout_s: float) -> None:
    """Asks a child to stop, and kills it when it takes too long."""
    if child.poll() is None:
        child.send_signal(how)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
