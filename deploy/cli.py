"""`tally up`, `tally down`, `tally status`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table
from tally.cli.exit_codes import NO_STACK

from deploy.launch import become_supervisor, launch_supervisor
from deploy.processes import STOP_TIMEOUT_S, StackError, last_lines
from deploy.stack import FOLDER_MODE, LOCK_TIMEOUT_S, DataFolder
from deploy.tasks import Task
from stores.settings import data_folder, read_stack_file

if TYPE_CHECKING:
    from tally.v1 import admin_service_pb2 as admin_pb

POLL_INTERVAL_S = 0.05
SLOW_AFTER_S = 15.0
DOWN_TIMEOUT_S = 7 * STOP_TIMEOUT_S
"""Each of six parts may take its time to stop; then it is killed."""

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
    """Start the stack in a data folder, and wait until its stores, Kafka and the server answer.

    The stream job starts in the background. TALLY_REDIS_URL, TALLY_POSTGRES_URL and TALLY_KAFKA_SERVERS
    name services of your own to use in place of embedded ones; TALLY_STREAM_OFF=true starts neither Kafka
    nor the stream job.
    """
    folder = _folder(data)
    running = folder.description() if folder.root.is_dir() else None
    if running is not None and running.get("state") == "up":
        _say(f"a stack is already up in {folder.root}")
        _print_addresses(folder, running, as_json)
        return
    folder.make()
    os.umask(0o077)
    held = folder.lock(LOCK_TIMEOUT_S)
    if held is None:  # another `tally up` was faster: its stack is waited for
        _print_addresses(folder, _await_up(folder, None, 0), as_json)
        return
    (folder.root / "logs").mkdir(mode=FOLDER_MODE, exist_ok=True)
    if foreground:
        become_supervisor(folder, held)
    _print_addresses(folder, _start(folder, held), as_json)


def _start(folder: DataFolder, held: int) -> dict[str, Any]:
    """Starts a supervisor and waits until its stack is up. It ends when this process does, however that
    comes about, until then: a start whose caller has ended is stopped.

    Raises:
        StackError: it does not come up.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with folder.open_log("supervisor") as log:
        begin = os.fstat(log.fileno()).st_size
        supervisor = launch_supervisor(folder, held, log)
    try:
        return _await_up(folder, supervisor, begin)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _await_up(
    folder: DataFolder, supervisor: subprocess.Popen[bytes] | None, log_begin: int
) -> dict[str, Any]:
    """What the stack says of itself once it is up. As long as its supervisor lives, something is under
    way; from SLOW_AFTER_S on it is said what.

    Raises:
        StackError: it does not come up.
    """
    slow_at_s, said = time.monotonic() + SLOW_AFTER_S, ""
    while True:
        description = folder.description()
        if description is not None and description.get("state") == "up":
            return description
        if supervisor is None and not folder.is_locked():
            raise StackError(f"another start in {folder.root} ended: run `tally up` again")
        if supervisor is not None and supervisor.poll() is not None:
            with folder.log("supervisor").open("rb") as log:
                log.seek(log_begin)
                text = log.read().decode(errors="replace").strip()
            raise StackError(f"the stack did not come up:\n{text or 'its start was ended'}")
        if time.monotonic() > slow_at_s and said != (line := _last_line(folder)):
            _say(f"still starting: {line}")
            said = line
        time.sleep(POLL_INTERVAL_S)


def _last_line(folder: DataFolder) -> str:
    return last_lines(folder.log("supervisor"), 1).rpartition("\n")[2].strip()


def down(data: DataOption = None) -> None:
    """Stop the stack of a data folder, even one that is still starting; its data stays."""
    folder = _folder(data)
    if not folder.is_locked():
        _say(f"no stack is up in {folder.root}")
        return
    deadline_s = time.monotonic() + DOWN_TIMEOUT_S
    asked: int | None = None
    while folder.is_locked():
        # One of an earlier version has not written down that it holds the lock.
        holder = folder.holder() or read_stack_file(folder.root).get("supervisor_pid")
        if holder is not None and holder != asked and _is_supervisor(holder, folder.root):
            os.kill(holder, signal.SIGTERM)
            asked = holder
        if time.monotonic() > deadline_s:
            raise StackError(f"the stack did not stop within {DOWN_TIMEOUT_S:.0f} s")
        time.sleep(POLL_INTERVAL_S)
    _say(f"the stack in {folder.root} is down")


def _is_supervisor(pid: int, root: Path) -> bool:
    """Whether a process is the one of a folder; what was written down may be of one that is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"deploy.supervisor" in words and os.fsencode(root) in words
    except OSError:
        return False


def _say(text: str) -> None:
    """A line for people; paths in it are no markup."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


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
    """What each part says of itself. All are asked at once, and each has a limit of its own: one that
    hangs keeps nothing of the others back."""
    from deploy import looks  # slow to load: `tally up` does without

    settings = description["settings"]
    asked: dict[str, Task[Any]] = {
        "server": Task(lambda: looks.server_status(description["grpc"])),
        "stream": Task(lambda: looks.stream_state(settings)),
        "online_store": Task(lambda: looks.redis_state(settings["redis_url"])),
        "offline_store": Task(lambda: looks.postgres_state(settings["postgres_url"])),
    }
    found = looks.collected(asked)
    report = _addresses(folder, description) | {"stream": found["stream"]}
    state = found["server"]
    if isinstance(state, str):
        # Of the stores, at least whether they answer.
        stores = {name: found[name] for name in ("online_store", "offline_store")}
        return report | {"server": state} | stores
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


def _store(status: admin_pb.StoreStatus) -> str:
    from tally.v1 import admin_service_pb2 as admin_pb

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
