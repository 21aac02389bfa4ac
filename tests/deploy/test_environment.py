"""A stack in an environment, a folder and a umask that are as foreign as can be: one for all tests here,
with the stream, since each part goes by other variables."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tally

from deploy.processes import let_others_pass
from server.parent import METRICS, SHARED_MEMORY
from stores.environment import MORE, chosen, java_option, stack_id
from stores.settings import StoreSettings
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import load, new_card, new_id
from tests.commands import TALLY
from tests.conftest import Stack, of_living, run_tally
from tests.stream_job.watching import status, wait_for, wait_until_applied

PROXY = "http://127.0.0.1:9"
"""Nobody listens there."""
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY")
FOR_THE_STACK = {
    "GRPC_POLL_STRATEGY": "nonesuch",
    "PGHOST": "192.0.2.1",
    "PGPORT": "1",
    "PGDATABASE": "another",
    "PGSSLMODE": "require",
    "PGOPTIONS": "-c search_path=nowhere",
    "PGCLIENTENCODING": "LATIN1",
    "PGDATESTYLE": "German",
    "PGDATA": "/nonexistent",
    "PGTZ": "America/New_York",
}
FOREIGN = {
    **dict.fromkeys(PROXIES, PROXY),
    "GRPC_ADDRESS_HTTP_PROXY": "127.0.0.1:9",
    "GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES": "127.0.0.0/8",
    "JAVA_HOME": "/nonexistent",
    "JAVA_TOOL_OPTIONS": "-XX:+NoSuchOption",
    "_JAVA_OPTIONS": "-XX:+NoSuchOption",
    "JDK_JAVA_OPTIONS": "-XX:+NoSuchOption",
    "CLASSPATH": "/nonexistent",
    "KAFKA_OPTS": "-XX:+NoSuchOption",
    "FLINK_HOME": "/nonexistent",
    "FLINK_CONF_DIR": "/nonexistent",
    "FLINK_LIB_DIR": "/nonexistent",
    "PYFLINK_GATEWAY_DISABLED": "1",
    "PYFLINK_GATEWAY_PORT": "9",
    "SPARK_HOME": "/nonexistent",
    "HADOOP_CONF_DIR": "/nonexistent",
    "LANG": "tr_TR.ISO-8859-9",
    "LC_ALL": "no_SUCH.LOCALE",
    "TZ": "America/New_York",
    "PYTHONOPTIMIZE": "2",
    "PYTHONHASHSEED": "7",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "many",
    "NUMBA_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "many",
    "MALLOC_PERTURB_": "85",
    "ARROW_DEFAULT_MEMORY_POOL": "nonesuch",
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent",
    "TMPDIR": "/nonexistent",
    "XDG_CACHE_HOME": "/nonexistent",
    "SSL_CERT_FILE": "/nonexistent",
    "OPENSSL_CONF": "/nonexistent",
    "LD_LIBRARY_PATH": "/nonexistent",
    "BASH_ENV": "/nonexistent",
    "CDPATH": "/",
    "TALLY_ADDRESS": "192.0.2.1:1",
}
NAME = """it's "a" folder %20 $HOME `x` (é) & 金 #1"""
PACKAGES = ("deploy", "server", "stores", "stream_job", "features", "pyflink", "secrets")
"""What a person may have where the command is called, under the names of what the stack imports."""
READ_ONLY = """
mount --bind "$1" "$1" && mount --rbind /tmp /tmp && mount -o remount,ro,bind /tmp || exit
shift
exec "$@"
"""
STREAM = {"TALLY_STREAM_OFF": "false"}
pytestmark = pytest.mark.budget(90, "the first of them starts a stack with Kafka and Flink")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that was started there."""
    folder = tmp_path_factory.mktemp("foreign")
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('not this one')")
    data = folder / NAME / ("x" * 200) / ("y" * 200) / "data"
    data.mkdir(parents=True)
    (data / "open").touch(mode=0o666)
    (data / "logs").mkdir(mode=0o777)
    if os.geteuid() == 0:
        let_others_pass(data)  # the folders above cannot be changed from where it runs
    here, umask = os.getcwd(), os.umask(0)
    os.chdir(folder)
    try:
        up = subprocess.run(
            [*_without_tmp(data), TALLY, "up", "--json"],
            env={n: v for n, v in os.environ.items() if not n.startswith("TALLY_")}
            | {"TALLY_DATA": str(data), **FOREIGN, **FOR_THE_STACK},
            capture_output=True,
            text=True,
        )
        assert up.returncode == 0, up.stderr
        addresses = json.loads(up.stdout)
        stack = Stack(data, addresses["grpc"], addresses["metrics"], StoreSettings(data=data))
        yield stack
        assert stack.tally("down").returncode == 0
    finally:
        run_tally("down", data=data)
        os.umask(umask)
        os.chdir(here)


def _without_tmp(data: Path) -> list[str]:
    """A command that runs another where nothing but a folder can be written to in /tmp; none where this
    is not root, who alone may arrange that."""
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(data)]
    is_possible = os.geteuid() == 0 and shutil.which("unshare") is not None
    if not is_possible or subprocess.run([*command, "true"], capture_output=True).returncode:
        return []
    return command


def processes(stack: Stack) -> list[psutil.Process]:
    supervisor = psutil.Process(status(stack)["supervisor_pid"])
    return [supervisor, *supervisor.children(recursive=True)]


def test_an_event_is_applied_and_answered(foreign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = new_card()
    path = write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id())])
    published = foreign.tally("publish", "--json", path, **FOREIGN)
    assert published.returncode == 0, published.stderr
    wait_until_applied(foreign)
    answer = foreign.tally("get", card, "--address", foreign.address, "--json", **FOREIGN)
    assert '"known": true' in answer.stdout, answer.stderr


def test_a_file_is_loaded(foreign, tmp_path):
    path = write(tmp_path / "a.csv", [row(cc_num=new_card(), trans_num=new_id())])
    loaded = foreign.tally("load", "--json", path, **FOREIGN)
    assert '"loaded": 1' in loaded.stdout, loaded.stderr


def test_no_process_of_the_stack_has_a_variable_that_was_not_chosen(foreign):
    given = (FOREIGN | FOR_THE_STACK).items() - {("TALLY_ADDRESS", FOREIGN["TALLY_ADDRESS"])}
    looked_at = 0

    def seen(process: psutil.Process) -> tuple[str, dict[str, str]]:
        return process.name(), process.environ()

    for process, (name, environment) in of_living(processes(foreign), seen):
        if name == "postgres":  # it writes over its environment
            continue
        assert environment["TALLY_STACK_ID"], process
        assert not environment.items() & given, process
        looked_at += 1
    assert looked_at > 6  # supervisor, valkey, kafka, server, worker, job, java


def open_to_others(root: Path) -> dict[str, str]:
    """What is below a folder and not its owner's alone, with its mode. Parts of a running stack make and
    remove files meanwhile: those that are gone are passed over."""
    found = {}
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            with suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & 0o077:
                    found[str(path.relative_to(root))] = oct(stat.S_IMODE(mode))
    return found


def test_every_file_and_folder_is_its_owners_only_whatever_the_umask(foreign, tmp_path):
    rows = [row(cc_num=new_card(), trans_num=new_id()), row(amt="none", trans_num=new_id())]
    assert load(foreign, write(tmp_path / "a.csv", rows))["rejected"] == 1
    assert open_to_others(foreign.data) == {}
    assert {path.name for path in foreign.data.iterdir()} >= {
        *("postgres", "valkey", "kafka", "flink", "logs", "rejects", "stack.lock", "temporary")
    }
    # Root's Postgres is another user, whose group may pass and see no names.
    assert stat.S_IMODE(foreign.data.stat().st_mode) == (0o700 if os.geteuid() else 0o710)


def test_the_stack_runs_where_the_folder_for_temporary_files_cannot_be_written_to(foreign):
    if not _without_tmp(foreign.data):
        pytest.skip("/tmp cannot be made read-only here: this needs root, and leave to mount")

    def mounts_of(process: psutil.Process) -> list[str]:
        return Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()  # as it sees them

    for process, mounts in of_living(processes(foreign), mounts_of):
        (tmp,) = [line.split() for line in mounts if line.split()[4] == "/tmp"][-1:]
        assert "ro" in tmp[5].split(","), process


def test_nothing_is_written_outside_the_data_folder(foreign):
    open_files = {
        found.path
        for _, files in of_living(processes(foreign), psutil.Process.open_files)
        for found in files
        if found.mode != "r"
    }
    assert open_files
    metrics = (
        f"{SHARED_MEMORY}/{METRICS}{stack_id(foreign.data)}-"  # for as long as the server lives
    )
    assert {
        path
        for path in open_files
        if not Path(path).is_relative_to(foreign.data) and not path.startswith(metrics)
    } == set()


def has_checkpoint(folder: Path) -> bool:
    """Whether Flink has completed a checkpoint."""
    return any("_metadata" in files for _, _, files in os.walk(folder))


def test_a_stack_goes_on_in_its_folder_after_it_was_stopped(foreign, tmp_path):
    card = new_card()
    load(foreign, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id())]))
    wait_until_applied(foreign)
    wait_for("a checkpoint", lambda: has_checkpoint(foreign.data / "flink"))
    assert foreign.tally("down").returncode == 0
    again = foreign.tally("up", "--json", **STREAM, **FOREIGN, **FOR_THE_STACK)
    assert again.returncode == 0, again.stderr
    report = status(foreign)
    with tally.Client(report["grpc"]) as client:
        assert client.online([tally.Row(card=card)]).known[0]
    (log,) = (foreign.data / "logs").glob("flink-*.log")
    wait_for("its checkpoint", lambda: "Restoring job" in log.read_text())


def test_what_is_chosen_is_chosen_again(tmp_path):
    first = chosen(
        FOREIGN | FOR_THE_STACK | {"TALLY_TOKEN": "x", "TALLY_CONFIG": "here.toml"}, tmp_path
    )
    assert chosen(first, tmp_path) == first
    assert first["TALLY_TOKEN"] == "x"
    assert first["TALLY_CONFIG"] == str(Path("here.toml").absolute())
    assert first["TZ"] == "UTC"


def test_what_an_operator_names_is_passed_on(tmp_path):
    given = {"LD_LIBRARY_PATH": "/opt/lib", "SSL_CERT_FILE": "/etc/ca.pem", MORE: "LD_LIBRARY_PATH"}
    made = chosen(given, tmp_path)
    assert made["LD_LIBRARY_PATH"] == "/opt/lib"
    assert "SSL_CERT_FILE" not in made


def test_the_password_of_a_postgres_of_ones_own_is_passed_on_and_no_other(tmp_path):
    given = {"PGPASSWORD": "x", "PGPASSFILE": "/p", "PGOPTIONS": "-c x=y"}
    assert not chosen(given, tmp_path).keys() & given.keys()
    own = chosen(given | {"TALLY_POSTGRES_URL": "postgresql://me@db/tally"}, tmp_path)
    assert own.keys() & given.keys() == {"PGPASSWORD", "PGPASSFILE"}


def test_options_of_java_are_quoted_as_its_launcher_reads_them(tmp_path):
    from deploy.jars import java

    value = """-Dsaid=it's "a" path %20 $HOME \\ é"""
    shown = subprocess.run(
        [java(), "-XshowSettings:properties", "-version"],
        env={"JDK_JAVA_OPTIONS": java_option(value), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert f"said = {value.removeprefix('-Dsaid=')}" in shown
