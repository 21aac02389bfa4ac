"""The environment of the processes that Tally starts: chosen, not inherited.

Programs read far more variables than their own: Postgres and libpq PG*, Java JAVA_TOOL_OPTIONS and
CLASSPATH, Python PYTHONPATH and PYTHONWARNINGS, gRPC and Java proxies, every C library LD_PRELOAD,
locales, time zones and allocators' settings. A variable that is right for the shell of a person can
end a part of the stack, or change what it stores. So a process of the stack gets what is listed here
and nothing else; TALLY_PASS_ENVIRONMENT names what a machine needs besides, such as LD_LIBRARY_PATH
for a Python that is found by it.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Mapping
from pathlib import Path

PASSED = ("HOME", "USER", "LOGNAME")
PASSWORDS = ("PGPASSWORD", "PGPASSFILE")
OURS = "TALLY_"
MORE = "TALLY_PASS_ENVIRONMENT"
"""Names, with commas between them, of further variables that are passed on as they are."""
STACK = "TALLY_STACK_ID"
"""In every process of a stack: whose it is (`stack_id`)."""
PATHS = ("TALLY_CONFIG",)
PATH_SUFFIX = "_FILE"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TEMPORARY = "temporary"
CACHE = "cache"


def stack_id(data: Path) -> str:
    """An identifier of a data folder, unique on this machine, whatever the folder is called."""
    found = data.stat()
    return f"{found.st_dev}:{found.st_ino}"


def chosen(inherited: Mapping[str, str], data: Path) -> dict[str, str]:
    """The environment of a stack's processes; of itself, the same again.

    Args:
        inherited: the environment of this process.
        data: the stack's data folder, which exists.
    """
    made = {
        "TALLY_DATA": str(data),
        STACK: stack_id(data),
        "XDG_CACHE_HOME": str(data / CACHE),  # of what numba compiles, where sources are read-only
    }
    return chosen_for(inherited, data / TEMPORARY) | made | _more(inherited)


def chosen_for(inherited: Mapping[str, str], temporary: Path) -> dict[str, str]:
    """The environment of processes that are of no stack.

    Args:
        inherited: the environment of this process.
        temporary: the folder for their temporary files.
    """
    # A Postgres of one's own may have its password there; the embedded one has no use for it.
    names = PASSED + (PASSWORDS if inherited.get("TALLY_POSTGRES_URL") else ())
    passed = [name for name in inherited if name in names or name.startswith(OURS)]
    made = {name: inherited[name] for name in passed}
    made.setdefault("HOME", _home())
    for name, value in made.items():
        if value and (name in PATHS or (name.startswith(OURS) and name.endswith(PATH_SUFFIX))):
            made[name] = os.path.abspath(value)
    made |= {
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "TMPDIR": str(temporary),
        "PYTHONSAFEPATH": "1",  # a folder `server` where a person stands is not this project's
        "PYTHONUTF8": "1",
        "JDK_JAVA_OPTIONS": f"-XX:-UsePerfData {java_option(f'-Djava.io.tmpdir={temporary}')}",
    }
    return made | _more(inherited)


def _more(inherited: Mapping[str, str]) -> dict[str, str]:
    """What an operator has named besides."""
    names = inherited.get(MORE, "").replace(" ", "").split(",")
    return {name: inherited[name] for name in names if name in inherited}


def _home() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:  # a number without a user, as containers have
        return "/"


def java_option(option: str) -> str:
    """An option as JDK_JAVA_OPTIONS takes it: quoted, so that spaces and quotes stay what they are."""
    return '"' + option.replace('"', '"\'"\'"') + '"'
