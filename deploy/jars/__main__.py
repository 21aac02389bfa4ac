"""`python -m deploy.jars`: fetches every program's jars."""

from __future__ import annotations

import sys

from deploy.jars import PROGRAMS, fetch
from deploy.processes import StackError

if __name__ == "__main__":
    try:
        for name in PROGRAMS:
            fetch(name)
    except StackError as error:
        sys.exit(f"error: {error}")
