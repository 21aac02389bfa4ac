"""`python -m deploy.jars`: fetches every program's jars, and makes the Java runtime start faster."""

from __future__ import annotations

import sys

from deploy.jars import PROGRAMS, archive_classes, fetch
from deploy.processes import StackError

if __name__ == "__main__":
    try:
        for name in PROGRAMS:
            fetch(name)
        archive_classes()
    except StackError as error:
        sys.exit(f"error: {error}")
