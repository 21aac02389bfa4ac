"""How commands end, for scripts. docs/commands.md has the same table, which a test holds to this one."""

from __future__ import annotations

DONE = 0
FAILED = 1
USAGE = 2
NO_STACK = 3
INTERRUPTED = 130

MEANINGS = {
    DONE: "done",
    FAILED: "failed, or what was checked does not hold",
    USAGE: "wrong usage, and nothing was begun",
    NO_STACK: "`tally status`: no stack is up",
    INTERRUPTED: "interrupted by Ctrl-C",
}
EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."
