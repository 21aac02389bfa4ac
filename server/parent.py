"""The server's parent process: checks the settings, spawns workers, watches them, serves their metrics.

`python -m server`. Workers are spawned, not forked, since gRPC does not survive a fork; they share
the port by SO_REUSEPORT. A worker that ends, or gives no sign of life, is replaced; SIGTERM drains
them all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from server.doors import check_doors, hold_port, is_loopback
from server.logs import configure_logs
from server.settings import ServerSettings
from server.workers import Workers, WorkersError
from stores.environment import STACK
from stores.errors import StoreError, StoreUnavailableError
from stores.postgres import OfflineStore
from stores.redis_store import OnlineStore
from stores.settings import SettingsError
from telemetry.metrics_port import MetricsPort

SHARED_MEMORY, METRICS = "/dev/shm", "tally-metrics-"

log = structlog.get_logger()


def check(settings: ServerSettings) -> None:
    """Refuses to start where answers would be wrong or open to anyone.

    Raises:
        SettingsError, CardKeyMismatchError.
    """
    check_doors(settings)
    fingerprint = settings.load_card_key().fingerprint
    redis_url, postgres_url = settings.store_urls()
    online = OnlineStore(redis_url)
    try:
        online.check_card_key(fingerprint)
    except StoreUnavailableError as error:
        log.warning("serving without the online store until it is back", error=str(error))
    finally:
        online.close()
    try:
        offline = OfflineStore(postgres_url)
    except StoreUnavailableError as error:
        log.warning("serving without the offline store until it is back", error=str(error))
        return
    try:
        offline.check_card_key(fingerprint)
    finally:
        offline.close()


def _serve_metrics(address: str) -> None:
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    try:
        MetricsPort(address, registry)
    except OSError as error:
        raise SettingsError(
            f"TALLY_METRICS_LISTEN={address} cannot be listened on: {error.strerror or error}"
        ) from error
    if not is_loopback(address):
        log.warning("metrics can be read from other machines, without a token", listen=address)


def _metrics_folder() -> str:
    """A new folder for the files that workers count in. They are mapped, and on a full disk the kernel ends
    who writes to such a file: where there is memory with a folder's face, it is there. What a server of the
    same stack has left that was killed is deleted."""
    stack = os.environ.get(STACK, "")
    prefix = f"{METRICS}{stack}-" if stack else METRICS
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return tempfile.mkdtemp(prefix=prefix)
    if stack:
        for left in Path(SHARED_MEMORY).glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=prefix, dir=SHARED_MEMORY)


def main() -> int:
    """Runs the server until it is asked to stop."""
    configure_logs("info")
    metrics_folder = _metrics_folder()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_folder
    try:
        settings = ServerSettings()
        configure_logs(settings.log_level)
        check(settings)
        held = hold_port("TALLY_LISTEN", settings.listen)
        if settings.metrics_listen:
            _serve_metrics(settings.metrics_listen)
        Workers(settings).run()
        for port in held:
            port.close()
    except (SettingsError, StoreError, WorkersError) as error:
        log.error("refusing to start", error=str(error))
        return 2
    finally:
        shutil.rmtree(metrics_folder, ignore_errors=True)
    return 0
