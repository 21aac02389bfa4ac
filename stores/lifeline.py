"""Ends a worker when its parent is gone, however it went."""

from __future__ import annotations

import os
import signal
import threading
import time

CHECK_INTERVAL_S = 0.5


def follow_parent(parent_pid: int) -> None:
    """Sends this process SIGTERM once its parent is no longer parent_pid."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(CHECK_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
