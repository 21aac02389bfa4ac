"""Stops the stacks that a test session left running, however it ended.

`python -m tests.reaper FOLDER` waits until its standard input ends, which is when the session's process does, even
by SIGKILL. A stack's supervisor is a session of its own and would run on, with a gigabyte of memory and of disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.conftest import delete_stores, run_tally


def main() -> None:
    """Waits, and then stops what still runs below a folder; logs stay."""
    sys.stdin.read()
    for description in Path(sys.argv[1]).rglob("stack.json"):
        run_tally("down", data=description.parent)
        delete_stores(description.parent)


if __name__ == "__main__":
    main()
