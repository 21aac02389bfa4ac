"""The embedded online store's process."""

from __future__ import annotations

import subprocess
import time

from deploy import valkey
from deploy.processes import STOP_TIMEOUT_S, free_port


def test_a_store_that_does_not_listen_yet_is_ended_at_once():
    child = subprocess.Popen(["sleep", "60"])
    begin_s = time.monotonic()
    valkey.save_and_stop(child, free_port(), "secret", STOP_TIMEOUT_S)
    assert child.returncode is not None
    assert time.monotonic() - begin_s < STOP_TIMEOUT_S / 2
