"""Child processes that do not outlive their parent, whatever ends it."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

POLL_INTERVAL_S = 0.02
START_TIMEOUT_S = 60.0
"""Time that one process gets to become ready."""
STOP_TIMEOUT_S = 20.0
"""Time that one process gets to stop in order."""


CLIENT_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
CLIENT_PORTS_FROM = 32_768
SERVER_PORTS_FROM = 10_240


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
    parent = os.getpid()

    def in_child() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(on_parent_death))
        if os.getppid() != parent:  # it died in between
            os._exit(1)

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
        preexec_fn=in_child,
    )


def wait_until(
    ready: Callable[[], bool],
    what: str,
    *,
    timeout_s: float,
    child: subprocess.Popen[bytes] | None = None,
    log_path: Path | None = None,
) -> None:
    """Waits until something holds.

    Raises:
        StackError: it does not in time, or the child that was to bring it about has ended.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        ended = child is not None and child.poll() is not None
        if ended or time.monotonic() > deadline:
            reason = f"ended with status {child.returncode}" if ended and child else "took too long"
            raise StackError(f"{what} {reason}{_last_lines(log_path)}")
        time.sleep(POLL_INTERVAL_S)


def _last_lines(path: Path | None, count: int = 8) -> str:
    if path is None or not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()[-count:]
    return f"; the last lines of {path}:\n" + "\n".join(f"    {line}" for line in lines)


def accepts_connections(port: int) -> bool:
    """Whether something listens on a loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def let_others_pass(path: Path) -> None:
    """Lets other users walk through the folders above a path, and see no names in them.

    For root only, whose Postgres must run as another user.
    """
    for folder in path.absolute().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def stop(child: subprocess.Popen[bytes], how: signal.Signals, timeout_s: float) -> None:
    """Asks a child to stop, and kills it when it takes too long."""
    if child.poll() is None:
        child.send_signal(how)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
