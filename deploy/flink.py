"""The stream job on a Flink of its own: a mini-cluster in one JVM, with Python workers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from deploy.jars import jars, java_home
from deploy.processes import StackError, spawn
from stores.environment import java_option

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-stream"
"""PyFlink's pins want an environment of their own."""
HEAP_MB_MAX = 768
JAVA_OPTIONS = (
    f"-Xmx{HEAP_MB_MAX}m",
    "-XX:+UseSerialGC",
    # What Flink, Arrow and Kryo reach into; Flink's own settings have the same list.
    *(
        f"--add-opens=java.base/{package}=ALL-UNNAMED"
        for package in (
            *("java.lang", "java.lang.reflect", "java.net", "java.io", "java.nio", "java.text"),
            *("java.time", "java.util", "java.util.concurrent", "java.util.concurrent.atomic"),
            *("java.util.concurrent.locks", "sun.nio.ch"),
        )
    ),
    *(
        f"--add-exports={package}=ALL-UNNAMED"
        for package in ("java.rmi/sun.rmi.registry", "java.security.jgss/sun.security.krb5")
    ),
)


JOB = ("stream_job.pipeline",)
TEMPORARY = "temporary-"
"""How folders begin that are one start's own."""


def start(
    data: Path, log: IO[bytes], job: Sequence[str] = JOB, **settings: str
) -> subprocess.Popen[bytes]:
    """Starts the job's process, which starts Java, which starts Python workers.

    Args:
        data: the stack's folder.
        log: takes its output.
        job: the module to run, and its arguments.
        settings: of its environment, besides.

    Raises:
        StackError: Flink's environment is not here.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise StackError(f"{ENVIRONMENT} is not here: `make setup` makes it")
    checkpoints = data / "flink" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in (data / "flink").glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)  # another's, which may not have died altogether
    temporary = tempfile.mkdtemp(prefix=TEMPORARY, dir=data / "flink")
    java_options = (
        os.environ.get("JDK_JAVA_OPTIONS", ""),
        java_option(f"-Djava.io.tmpdir={temporary}"),
    )
    environment = os.environ | {
        "TALLY_DATA": str(data),
        "TALLY_FLINK_JARS": ":".join(map(str, jars("flink"))),
        "TALLY_CHECKPOINTS": str(checkpoints),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'src'}",
        "PATH": f"{python.parent}:{java_home() / 'bin'}:{os.environ.get('PATH', '')}",
        "JAVA_HOME": str(java_home()),
        "FLINK_ENV_JAVA_OPTS": " ".join(JAVA_OPTIONS),
        "FLINK_LOG_DIR": str(data / "logs"),
        # Flink leaves files behind, even where it ends in order: here they are found and deleted.
        # Its own variable for Java's options knows no quotes.
        "JDK_JAVA_OPTIONS": " ".join(java_options).strip(),
        "TMPDIR": temporary,
        # Processes of their own, as on any other Flink, instead of threads of the job's client.
        "_python_worker_execution_mode": "process",
    }
    return spawn(
        [python, "-m", *job],
        log=log,
        on_parent_death=signal.SIGTERM,
        env=environment | settings,
        cwd=data,
    )


def stop(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ends the job with all that belongs to it. Where it had come to is in its last checkpoint."""
    end_group(child, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout_s)
    end_group(child, signal.SIGKILL)
    child.wait()


def end_group(child: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Sends a signal to a child and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, how)
