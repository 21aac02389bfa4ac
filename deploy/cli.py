"""`tally up`, `tally down`, `tally status`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
import tally
import typer
from rich.console import Console
from rich.table import Table
from tally.cli.exit_codes import NO_STACK
from tally.v1 import admin_service_pb2 as admin_pb

from deploy.processes import START_TIMEOUT_S, STOP_TIMEOUT_S, StackError
from deploy.stack import ALREADY_UP, DataFolder
from stores.errors import StoreError
from stores.redis_store import OnlineStore
from stores.settings import data_folder

POLL_INTERVAL_S = 0.05
UP_TIMEOUT_S = 4 * START_TIMEOUT_S
DOWN_TIMEOUT_S = 4 * STOP_TIMEOUT_S

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Data folder of the stack.  [default: $TALLY_DATA or .tally]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def _folder(data: Path | None) -> DataFolder:
    return DataFolder(data.absolute() if data else data_folder())


def up(
    data: DataOption = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Hold the terminal; Ctrl-C stops the stack.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start Postgres, Redis and the server in a data folder, and wait until they answer.

    TALLY_REDIS_URL and TALLY_POSTGRES_URL name stores of your own to use instead.
    """
    folder = _folder(data)
    running = folder.description()
    if running is not None and running.get("state") == "up":
        Console(stderr=True).print(f"a stack is already up in {folder.root}")
        _print_addresses(folder, running, as_json)
        return
    folder.prepare()
    command = [sys.executable, "-m", "deploy.supervisor", "--data", str(folder.root)]
    if foreground:
        os.execv(sys.executable, command)
    with folder.log("supervisor").open("ab") as log:
        begin = log.tell()
        supervisor = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        description = _await_up(folder, supervisor, begin)
    except KeyboardInterrupt:
        supervisor.terminate()
        supervisor.wait()
        raise
    _print_addresses(folder, description, as_json)


def _await_up(
    folder: DataFolder, supervisor: subprocess.Popen[bytes], log_begin: int
) -> dict[str, Any]:
    """What the stack says of itself once it is up.

    Raises:
        StackError: it does not come up.
    """
    deadline = time.monotonic() + UP_TIMEOUT_S
    while time.monotonic() < deadline:
        description = folder.description()
        if description is not None and description.get("state") == "up":
            return description
        if supervisor.poll() is not None:
            if supervisor.returncode == ALREADY_UP:
                time.sleep(POLL_INTERVAL_S)  # another `tally up` was faster: wait for its stack
                continue
            log = folder.log("supervisor").read_bytes()[log_begin:].decode(errors="replace")
            raise StackError(f"the stack did not come up:\n{log.strip()}")
        time.sleep(POLL_INTERVAL_S)
    raise StackError(
        f"the stack did not come up within {UP_TIMEOUT_S:.0f} s; see {folder.root}/logs"
    )


def down(data: DataOption = None) -> None:
    """Stop the stack of a data folder; its data stays."""
    folder = _folder(data)
    console = Console(stderr=True)
    description = folder.description()
    if description is None:
        console.print(f"no stack is up in {folder.root}")
        return
    supervisor = psutil.Process(description["supervisor_pid"])
    supervisor.terminate()
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            raise StackError(f"the stack did not stop within {DOWN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_INTERVAL_S)
    console.print(f"the stack in {folder.root} is down")


def status(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Say whether the stack is up, where, and what its stores are worth. Exits 3 when it is down."""
    folder = _folder(data)
    description = folder.description()
    if description is None:
        if as_json:
            typer.echo(json.dumps({"state": "down", "data": str(folder.root)}))
        else:
            Console().print(f"no stack is up in {folder.root}")
        raise typer.Exit(NO_STACK)
    report = _report(folder, description)
    if as_json:
        typer.echo(json.dumps(report))
        return
    table = Table(show_header=False, title=f"Stack in {folder.root}")
    for name, value in report.items():
        table.add_row(name, json.dumps(value) if isinstance(value, dict | list) else str(value))
    Console().print(table)


def _report(folder: DataFolder, description: dict[str, Any]) -> dict[str, Any]:
    report = _addresses(folder, description)
    report["stream"] = _stream(description["settings"])
    try:
        with tally.Client(
            description["grpc"], tally.ClientConfig(token=os.environ.get("TALLY_TOKEN"))
        ) as client:
            state = client.status()
    except tally.TallyError as error:
        return report | {"server": f"{type(error).__name__}: {error}"}
    return report | {
        "version": state.version,
        "catalog_fingerprint": state.catalog_fingerprint,
        "card_key_fingerprint": state.card_key_fingerprint,
        "online_store": _store(state.online_store),
        "offline_store": _store(state.offline_store),
        "complete_through": _instant(state.complete_through_ms),
        "merchants_through": _instant(state.merchants_through_ms),
        "unfinished_loads": list(state.unfinished_loads),
    }


def _instant(time_ms: int) -> str | None:
    """An instant as text; None for -1, which is none."""
    if time_ms < 0:
        return None
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def _stream(settings: dict[str, Any]) -> dict[str, Any] | str:
    """What is known of the stream."""
    if "kafka_servers" not in settings:
        return "off"
    online = OnlineStore(settings["redis_url"])
    try:
        state = online.stream_state()
    except StoreError as error:
        return f"unknown: {error}"
    finally:
        online.close()
    watched: dict[str, Any] | str = (
        "unknown: nobody watches it" if state is None else json.loads(state)
    )
    return watched


def _store(status: admin_pb.StoreStatus) -> str:
    name = admin_pb.StoreState.Name(status.state).removeprefix("STORE_STATE_").lower()
    return f"{name}: {status.detail}" if status.detail else name


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl()


def _addresses(folder: DataFolder, description: dict[str, Any]) -> dict[str, Any]:
    settings = description["settings"]
    return {
        "state": description["state"],
        "data": str(folder.root),
        "grpc": description["grpc"],
        "metrics": description["metrics"],
        "stream_metrics": description.get("stream_metrics"),
        "kafka": settings.get("kafka_servers"),
        "stream_format": settings.get("stream_format"),
        "redis": _without_password(settings["redis_url"]),
        "postgres": _without_password(settings["postgres_url"]),
        "supervisor_pid": description["supervisor_pid"],
        "processes": description["processes"],
    }


def _print_addresses(folder: DataFolder, description: dict[str, Any], as_json: bool) -> None:
    addresses = _addresses(folder, description)
    if as_json:
        typer.echo(json.dumps(addresses))
        return
    table = Table(show_header=False, title="The stack is up")
    for name in ("grpc", "metrics", "redis", "postgres", "kafka", "data"):
        if addresses[name] is not None:
            table.add_row(name, str(addresses[name]))
    Console().print(table)
