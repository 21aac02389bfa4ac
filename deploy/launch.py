"""How a supervisor is started: on a lock that is held already, in an environment that is chosen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import IO, NoReturn

from deploy.processes import dies_with_parent
from deploy.stack import DataFolder
from stores.environment import chosen


def become_supervisor(data: DataFolder, held: int) -> NoReturn:
    """Makes this process a supervisor; `held` holds the folder's lock."""
    os.set_inheritable(held, True)
    os.execve(sys.executable, _command(data, held), chosen(os.environ, data.root))


def launch_supervisor(data: DataFolder, held: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts one, which gets SIGTERM when this process dies before its stack is up.

    Args:
        data: the stack's folder.
        held: holds its lock; the supervisor gets a copy, and this one is closed.
        log: takes its output.
    """
    supervisor = subprocess.Popen(
        _command(data, held),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        pass_fds=[held],
        env=chosen(os.environ, data.root),
        preexec_fn=dies_with_parent(signal.SIGTERM),
    )
    data.name_holder(held, supervisor.pid)
    os.close(held)
    return supervisor


def _command(data: DataFolder, held: int) -> list[str]:
    return [
        *(sys.executable, "-m", "deploy.supervisor"),
        *("--data", str(data.root), "--lock", str(held)),
    ]
