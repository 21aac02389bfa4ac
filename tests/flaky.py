"""Runs new and changed tests again and again: one that fails by chance is found before others pay for it.

`make flaky` compares with where the branch left main; BASE=<commit> names another. In a module where anything
but tests has changed, such as a fixture, all tests count as changed. They run in lanes, as `make test` has
them (LANES), so that they meet what else runs beside them. Stops at the first failure.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = 10
LANES = os.environ.get("LANES", "3")
_HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


def git(*arguments: str) -> str:
    """What git says.

    Raises:
        subprocess.CalledProcessError: it refuses.
    """
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def base(named: str | None) -> str:
    """The commit to compare with: the one that is named, or where this branch left main."""
    if named:
        return git("rev-parse", "--verify", f"{named}^{{commit}}").strip()
    main = "origin/main" if git("branch", "--remotes", "--list", "origin/main") else "main"
    return git("merge-base", main, "HEAD").strip()


def changed_lines(diff: str) -> set[int]:
    """The lines of the new file that a diff without context touches; around what it only takes away, both."""
    lines: set[int] = set()
    for first, count in _HUNK.findall(diff):
        begin, n = int(first), int(count or 1)
        lines |= set(range(begin, begin + n)) if n else {begin, begin + 1}
    return lines


def tests_in(source: str) -> dict[str, range]:
    """Tests of a module by name, with their lines, decorators included."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
            "test_"
        ):
            begin = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None  # of source text
            found[node.name] = range(begin, node.end_lineno + 1)
    return found


def chosen_of(source: str, lines: set[int]) -> list[str]:
    """The tests to run of a module with changed lines: those that changed, or all."""
    tests = tests_in(source)
    text = source.splitlines()
    changed = {n for n in lines if n <= len(text) and text[n - 1].strip()}
    inside = {n for span in tests.values() for n in span}
    if changed - inside:
        return list(tests)
    return [name for name, span in tests.items() if changed & set(span)]


def chosen(since: str) -> Iterator[str]:
    """Ids of new and changed tests."""
    names = git("diff", "--name-only", "--diff-filter=d", since, "--", "tests").split()
    names += git("ls-files", "--others", "--exclude-standard", "--", "tests").split()
    for name in sorted(set(names)):
        if not Path(name).name.startswith("test_") or not name.endswith(".py"):
            continue
        source = (ROOT / name).read_text()
        diff = git("diff", "--unified=0", since, "--", name)
        is_new = not git("ls-tree", "--name-only", since, "--", name)
        lines = set(range(1, source.count("\n") + 1)) if is_new else changed_lines(diff)
        for test in chosen_of(source, lines):
            yield f"{name}::{test}"


def main() -> int:
    """Exits with pytest's status at the first failure, 0 when all passed each time."""
    since = base(sys.argv[1] if len(sys.argv) > 1 else None)
    ids = list(chosen(since))
    if not ids:
        print(f"no test differs from {since[:12]}")
        return 0
    print(f"{len(ids)} tests differ from {since[:12]}: each runs {TIMES} times")
    for number in range(1, TIMES + 1):
        begin = time.monotonic()
        command = [sys.executable, "-m", "pytest", "--quiet", "--numprocesses", LANES, *ids]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            print(f"failed in run {number} of {TIMES}")
            return done.returncode
        print(f"run {number} of {TIMES}: passed in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
