"""Stops the stacks that a test session left running, however it ended.

`python -m tests.reaper FOLDER` waits until its standard input ends, which is when the session's process does, even
by SIGKILL. A stack's supervisor is a session of its own and would run on, with a gigabyte of memory and of disk.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.conftest import delete_stores, run_tally


def main() -> None:
    """Waits, and then stops what still runs below a folder; logs stay."""
    sys.stdin.read()
    # Found first, and by what passes over folders that vanish meanwhile, as those of a running stack do.
    stacks = [Path(folder) for folder, _, files in os.walk(sys.argv[1]) if "stack.json" in files]
    for data in stacks:
        run_tally("down", data=data)
        delete_stores(data)


if __name__ == "__main__":
    main()
