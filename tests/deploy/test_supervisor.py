"""What the supervisor goes through: parts that hang, are slow or were killed, starts that are ended, a
full disk. Without the stream, whose own are elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import tally

from deploy import leftovers, logs, looks
from deploy.cli import _report
from deploy.stack import DataFolder
from stores.environment import chosen
from stores.unfailing import unfailing
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import load, new_card, new_id
from tests.commands import TALLY
from tests.conftest import Stack, of_living, run_tally, running, started, stopped_at_the_end

pytestmark = pytest.mark.budget(30, "most of these start a stack, or wait for parts that come back")
ONE_TRY = tally.ClientConfig(deadline_ms=1_000, retry=tally.RetryConfig(max_attempts=1))
WITHIN_S = 40.0
POLL_S = 0.02


def eventually(holds: Callable[[], Any], within_s: float = WITHIN_S) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


@pytest.fixture(scope="module")
def own_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that the tests here break and leave whole."""
    with running(tmp_path_factory.mktemp("supervised") / "data") as stack:
        yield stack


@pytest.fixture
def card(own_stack: Stack, tmp_path: Path) -> str:
    """A card of which the stack knows a payment."""
    made = new_card()
    load(own_stack, write(tmp_path / "card.csv", [row(cc_num=made, trans_num=new_id())]))
    return made


def description(stack: Stack) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((stack.data / "stack.json").read_text())
    return content


def part(stack: Stack, name: str) -> psutil.Process:
    return psutil.Process(description(stack)["processes"][name])


def is_answered(stack: Stack, card: str) -> bool:
    with tally.Client(stack.address, ONE_TRY) as client, suppress(tally.TallyError):
        answer = client.online([tally.Row(card=card)])
        return bool(answer.known[0]) and answer.complete_through_ms[0] > 0
    return False


def test_a_server_comes_back_while_postgres_is_slow_to(own_stack, card):
    supervisor = psutil.Process(description(own_stack)["supervisor_pid"])
    old, server = part(own_stack, "postgres"), part(own_stack, "server")
    old.kill()
    slow: list[psutil.Process] = []

    def comes_back() -> bool:
        slow[:] = [p for p in supervisor.children() if p.name() == "postgres" and p != old]
        return bool(slow)

    assert eventually(comes_back)
    slow[0].suspend()  # as one that brings back much
    try:
        kill_with_children(server)
        assert eventually(lambda: is_answered(own_stack, card))
        assert part(own_stack, "server") != server
        assert slow[0].status() == psutil.STATUS_STOPPED
    finally:
        slow[0].resume()
    assert eventually(lambda: b"postgres is up" in log_since(own_stack, slow[0].pid))


def kill_with_children(process: psutil.Process) -> None:
    """Kills a process and all that it has started: a worker goes on answering for a moment."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, 10)


def log_since(stack: Stack, pid: int) -> bytes:
    """The supervisor's line of a process that is up."""
    lines = (stack.data / "logs" / "supervisor.log").read_bytes().splitlines()
    return b"\n".join(line for line in lines if f"(pid {pid})".encode() in line)


PARTS = {"valkey": "online_store", "postgres": "offline_store", "server": "server"}


@contextmanager
def hanging(stack: Stack, *names: str) -> Iterator[None]:
    """Has parts of the stack hang, with all that they have started."""
    family = [part(stack, name) for name in names]
    family += [child for process in family for child in process.children(recursive=True)]
    of_living(family, psutil.Process.suspend)
    try:
        yield
    finally:
        of_living(family, psutil.Process.resume)


def looked_at(stack: Stack) -> dict[str, str]:
    """What status says of the server and both stores, within its limit. Of its own time, without that of
    importing."""
    begin_s = time.monotonic()
    report = _report(DataFolder(stack.data), description(stack))
    # Many times the limit, on a machine that is busy; one part that was waited for took 30 s.
    assert time.monotonic() - begin_s < 5 * looks.LOOK_TIMEOUT_S
    return {name: str(report.get(name)) for name in PARTS.values()}


@pytest.mark.parametrize("hung", PARTS)
def test_status_names_the_part_that_hangs_and_none_that_does_not(own_stack, hung):
    with hanging(own_stack, hung):
        # The server itself may be waiting for the store.
        answering = set(PARTS.values()) - {PARTS[hung], "server"}

        def is_named() -> bool:
            said = looked_at(own_stack)  # the server may say what it saw up to a second ago
            return "no answer" in said[PARTS[hung]] and not any(
                "no answer" in said[name] for name in answering
            )

        assert eventually(is_named)


def test_status_of_a_stack_that_hangs_altogether_says_so_of_each_part(own_stack):
    with hanging(own_stack, *PARTS):
        assert set(looked_at(own_stack).values()) == {looks.NO_ANSWER}
        shown = own_stack.tally("status", "--json")
    assert json.loads(shown.stdout)["offline_store"] == looks.NO_ANSWER


def test_up_works_at_once_after_all_was_killed_beside_backends_of_postgres_that_hang(
    own_stack, card
):
    supervisor = psutil.Process(description(own_stack)["supervisor_pid"])
    with psycopg.connect(description(own_stack)["settings"]["postgres_url"]) as connection:
        backend = psutil.Process(connection.info.backend_pid)
        backend.suspend()
        everything = [supervisor, *supervisor.children(recursive=True)]
        for process in everything:
            if process != backend:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        psutil.wait_procs([p for p in everything if p != backend], 10)
        assert backend.status() == psutil.STATUS_STOPPED  # attached to the shared memory, as it was
        assert (own_stack.data / "postgres" / "postmaster.pid").exists()
        again = own_stack.tally("up", "--json")
        assert again.returncode == 0, again.stderr
        assert not backend.is_running() or backend.status() == psutil.STATUS_ZOMBIE
        with suppress(psycopg.Error):
            connection.close()
    object.__setattr__(own_stack, "address", json.loads(again.stdout)["grpc"])
    assert eventually(lambda: is_answered(own_stack, card))


def test_what_is_left_is_told_from_processes_of_others(own_stack, tmp_path):
    ours = leftovers.of_stack(own_stack.data)
    assert {
        p.pid for p in psutil.Process(description(own_stack)["supervisor_pid"]).children()
    } <= ours
    # A person who stands in the folder, and a stack of another folder, are not ours to end.
    (tmp_path / "other").mkdir()
    bystanders = [
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, **where)
        for where in (
            {"cwd": own_stack.data / "postgres"},
            {"env": chosen({}, tmp_path / "other")},
        )
    ]
    try:
        assert not {p.pid for p in bystanders} & leftovers.of_stack(own_stack.data)
        assert bystanders[1].pid in leftovers.of_stack(tmp_path / "other")
        assert leftovers.end({bystanders[1].pid}, wait_s=0.0) == {bystanders[1].pid}
        assert bystanders[1].wait(10) == -signal.SIGKILL
    finally:
        for process in bystanders:
            process.kill()
            process.communicate()


# --- starts that are ended ------------------------------------------------------------------


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A folder, and a `tally up` that has not come to its end."""
    data = tmp_path / "data"
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("TALLY_")}
    process = subprocess.Popen(
        [TALLY, "up"],
        env=inherited | {"TALLY_DATA": str(data), "TALLY_STREAM_OFF": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert eventually(lambda: DataFolder(data).holder() if data.exists() else None)
    yield data, process
    process.kill()
    process.communicate()
    run_tally("down", data=data)


def nothing_runs(data: Path) -> bool:
    return not DataFolder(data).is_locked() and not leftovers.of_stack(data)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_start_ends_with_the_command_that_waits_for_it(starting, how, when):
    data, process = starting
    if when == "later":
        assert eventually((data / "stack.json").exists)
    process.send_signal(getattr(signal, how))
    process.wait(30)
    assert eventually(lambda: nothing_runs(data))
    assert process.returncode != 0
    assert not (data / "stack.json").exists() or how == "SIGKILL"


@pytest.mark.parametrize("when", ["at once", "later"])
def test_down_ends_a_stack_that_is_still_starting(starting, when):
    data, process = starting
    if when == "later":
        assert eventually((data / "stack.json").exists)
    down = run_tally("down", data=data)
    assert down.returncode == 0
    assert "is down" in down.stderr
    assert nothing_runs(data)
    assert "did not come up" in process.communicate()[1]
    assert process.returncode == 1


def test_a_cluster_that_was_killed_while_it_was_made_is_made_again(tmp_path):
    data = tmp_path / "data"
    half = data / "postgres.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with stopped_at_the_end(data):
        stack = started(data)
        assert json.loads(stack.tally("status", "--json").stdout)["offline_store"] == "serving"
    assert not half.exists()


# --- a full disk ----------------------------------------------------------------------------

DISK_MB = 400


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={DISK_MB}m,mode=0755",
        "tally-test",
        str(folder),
    ]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: this needs root, and leave to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: Path) -> None:
    """Takes what is left of a disk, to the last byte."""
    with path.open("ab", buffering=0) as file, suppress(OSError):
        for size in (1 << 20, 4_096, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)


@pytest.mark.budget(45, "a stack of its own, on a disk of its own; Postgres comes back twice")
def test_answers_go_on_while_the_disk_is_full_and_all_comes_back_when_it_is_not(
    small_disk, tmp_path
):
    card = new_card()
    with running(small_disk / "data") as stack:
        load(stack, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id())]))
        before = description(stack)
        server, postgres = part(stack, "server"), part(stack, "postgres")
        supervisor = psutil.Process(before["supervisor_pid"])
        fill(small_disk / "filling")
        assert is_answered(stack, card)
        postgres.kill()
        kill_with_children(server)

        def is_answered_still() -> bool:
            fill(small_disk / "filling")  # what has ended has left room
            return is_answered(stack, card)

        assert eventually(is_answered_still)
        again = [p.pid for p in supervisor.children() if "server" in p.cmdline()]
        # It could not be written down that the server is another, nor said; and nothing ended by it.
        assert again != [server.pid]
        assert supervisor.is_running()
        (small_disk / "filling").unlink()
        assert eventually(lambda: description(stack)["processes"]["server"] == again[0])
        assert eventually(
            lambda: (
                json.loads(stack.tally("status", "--json").stdout).get("offline_store") == "serving"
            )
        )


def test_a_log_on_a_full_disk_swallows_what_is_said(small_disk):
    fill(small_disk / "filling")
    with (small_disk / "log").open("w") as full:
        log = unfailing(full)
        for number in range(10_000):
            log.write(f"{number:099}\n")
            log.flush()
        (small_disk / "filling").unlink()
        log.write("the last\n")
        log.flush()
        assert (small_disk / "log").read_text().endswith("the last\n")


# --- logs -----------------------------------------------------------------------------------


def test_a_log_is_bounded_while_its_writer_goes_on(tmp_path):
    path = tmp_path / "part.log"
    script = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    with path.open("ab") as log:
        writer = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=log, text=True, bufsize=1
        )
    assert writer.stdin is not None
    for number in range(40):
        writer.stdin.write(f"{number:099}\n")
        assert eventually(lambda: path.read_text().endswith(f"{number:099}\n"))  # noqa: B023
        logs.rotate(tmp_path, bytes_max=1_000)
    writer.stdin.close()
    assert writer.wait(10) == 0
    kept = sorted(tmp_path.iterdir())
    assert [p.name for p in kept] == ["part.log", "part.log.1", "part.log.2"]
    assert sum(p.stat().st_size for p in kept) < 3 * 1_200
    lines = [int(text) for p in reversed(kept) for text in p.read_text().split()]
    assert lines == list(range(lines[0], 40))  # the newest, each once


def test_a_log_that_cannot_be_set_aside_is_emptied(tmp_path):
    path = tmp_path / "part.log"
    path.write_bytes(b"x" * 2_000)
    (tmp_path / "part.log.1").mkdir()
    (tmp_path / "part.log.1" / "full").touch()
    (tmp_path / "part.log.2").mkdir()
    (tmp_path / "part.log.2" / "full").touch()
    logs.rotate(tmp_path, bytes_max=1_000)
    assert path.stat().st_size == 0


def test_what_is_done_often_writes_nothing_into_the_log_of_postgres(own_stack, tmp_path):
    log = own_stack.data / "logs" / "postgres.log"
    rows = [row(cc_num=new_card(), trans_num=new_id()) for _ in range(20)]
    load(own_stack, write(tmp_path / "a.csv", rows))
    assert own_stack.tally("batch", "run").returncode == 0
    load(own_stack, write(tmp_path / "a.csv", rows))
    assert "WARNING" not in log.read_text()
    assert "already a transaction" not in log.read_text()
    assert rows[0]["trans_num"] not in log.read_text()


def test_an_error_that_a_row_causes_does_not_put_the_row_into_the_log_of_postgres(own_stack):
    with psycopg.connect(description(own_stack)["settings"]["postgres_url"]) as connection:
        connection.execute("CREATE TEMP TABLE t (x text PRIMARY KEY)")
        with (
            pytest.raises(psycopg.errors.UniqueViolation, match="Jane"),
            connection.cursor().copy("COPY t FROM STDIN") as copy,
        ):
            copy.write("4000123412341234 Jane Doe\n" * 2)
    log = (own_stack.data / "logs" / "postgres.log").read_text()
    assert "duplicate key" in log
    assert "Jane" not in log


def test_a_second_start_waits_for_the_first(tmp_path):
    data = tmp_path / "data"
    with running(data) as stack:
        again = run_tally("up", "--json", data=data)
        assert json.loads(again.stdout)["grpc"] == stack.address
        assert started(data).address == stack.address
