"""One stack for the whole run, in a folder of its own, on free ports, stopped at the end."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import structlog
import tally
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from deploy import postgres
from deploy.processes import let_others_pass
from deploy.stack import write_private
from features import CardKey
from stores.postgres import OfflineStore
from stores.redis_store import OnlineStore
from stores.settings import StoreSettings
from tests import commands

hypothesis_settings.register_profile(
    "tally", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("tally")

pytest_plugins = ["tests.budgets", "tests.lanes", "tests.slices"]

Seen = TypeVar("Seen")

ROOT = Path(__file__).resolve().parent.parent
KAGGLE = ROOT.parent / "shared" / "data" / "kaggle_sample"


def run_tally(
    *arguments: str | Path, data: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command as a person would, in a process of its own."""
    return commands.run(arguments, data, environment)


@dataclass(frozen=True)
class Stack:
    """A running stack."""

    data: Path
    address: str
    metrics: str
    settings: StoreSettings

    @property
    def card_key(self) -> CardKey:
        return self.settings.load_card_key()

    def tally(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Has the command do something, in this process where that makes no difference."""
        return commands.call(arguments, self.data, environment)

    def offline(self) -> OfflineStore:
        return OfflineStore(self.settings.store_urls()[1])

    def online(self) -> OnlineStore:
        return OnlineStore(self.settings.store_urls()[0])


def with_database(data: Path) -> None:
    """Gives a data folder the database cluster that its stack would make: a copy, which takes a tenth of
    the time. The session's first stack of each lane makes its own, as a person's does."""
    template = _database_template()
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy2(template / "stack.secret", data / "stack.secret")
    # With its owner, which is another user where tests run as root.
    copy: list[str | Path] = ["cp", "--archive", "--reflink=auto"]
    subprocess.run([*copy, template / "postgres", data / "postgres"], check=True)
    if os.geteuid() == 0:
        let_others_pass(data / "postgres")


@cache
def _database_template() -> Path:
    """A folder with a database cluster and its password, made once for all lanes of a session."""
    folder = _session[0] / "database"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        secret = folder / "stack.secret"
        if not secret.exists():
            chosen = secrets.token_urlsafe(24)
            postgres.prepare(folder / "postgres", chosen)
            write_private(secret, chosen)  # last: it says that all of it is there
    return folder


_REAPER = pytest.StashKey[subprocess.Popen[bytes]]()
_session: list[Path] = []
"""The folder of all lanes together; none outside of pytest, as in benches."""


def session_folder(config: pytest.Config) -> Path:
    """The temporary folder of all lanes together."""
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]
    base = factory.getbasetemp()
    return base.parent if hasattr(config, "workerinput") else base


@pytest.hookimpl(trylast=True)  # the folder must have been chosen
def pytest_configure(config: pytest.Config) -> None:
    _session[:] = [session_folder(config)]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As in the background of a shell: what tests start would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        return
    # Its standard input ends with this process.
    command = [sys.executable, "-m", "tests.reaper", str(_session[0])]
    config.stash[_REAPER] = subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    reaper = config.stash.get(_REAPER, None)
    if reaper is not None:
        reaper.communicate()


def started(data: Path, **environment: str) -> Stack:
    """Starts a stack in a folder."""
    up = run_tally("up", "--json", data=data, **environment)
    assert up.returncode == 0, up.stderr
    addresses = json.loads(up.stdout)
    return Stack(data, addresses["grpc"], addresses["metrics"], StoreSettings(data=data))


@contextmanager
def stopped_at_the_end(data: Path) -> Iterator[None]:
    """Stops the stack in a folder at the end, and deletes its stores, unless the body fails: all of a run's
    together are more than ten gigabytes. Its logs stay for as long as pytest keeps the folder."""
    try:
        yield
    finally:
        down = run_tally("down", data=data)
    assert down.returncode == 0, down.stderr
    delete_stores(data)


@contextmanager
def running(data: Path, **environment: str) -> Iterator[Stack]:
    """A new stack in a folder, until the end."""
    if _session:
        with_database(data)
    with stopped_at_the_end(data):
        yield started(data, **environment)


@contextmanager
def loaded(folder: Path, *size: str, **environment: str) -> Iterator[Stack]:
    """A stack in a folder with generated payments, such as of size ("--rows", "1000"); stopped at the
    end."""
    path = folder / "rows.csv"
    with running(folder / "data", **environment) as stack:
        made = stack.tally("synth", "-o", path, *size)
        assert made.returncode == 0, made.stderr
        done = stack.tally("load", path)
        assert done.returncode == 0, done.stderr
        yield stack


def of_living(
    processes: Iterable[psutil.Process], look: Callable[[psutil.Process], Seen]
) -> list[tuple[psutil.Process, Seen]]:
    """What a look at each process finds; those that end meanwhile, as Postgres's own do, are left out."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            found.append((process, look(process)))
    return found


def delete_stores(data: Path) -> None:
    """Deletes what a stack stored; its logs stay."""
    for store in ("postgres", "valkey", "kafka", "flink"):
        shutil.rmtree(data / store, ignore_errors=True)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """What a test says of logs, and the captured stream that they go to, end with it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack that tests share; each test uses cards of its own."""
    data = tmp_path_factory.mktemp("stack")
    with stopped_at_the_end(data):
        yield started(data)  # as a person's, without `with_database`


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[tally.Client]:
    """A client of the shared stack."""
    with tally.Client(stack.address) as client:
        yield client


@pytest.fixture(scope="session")
def kaggle_files() -> list[Path]:
    """The genuine Kaggle rows, where this machine has them."""
    files = [KAGGLE / "fraudTrain.csv", KAGGLE / "fraudTest.csv"]
    if not all(path.exists() for path in files):
        pytest.skip(
            f"the Kaggle sample is not on this machine: no {KAGGLE.name} beside the checkout"
        )
    return files
