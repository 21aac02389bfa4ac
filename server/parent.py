"""The server's parent process: checks the settings, spawns workers, serves their metrics.

`python -m server`. Workers are spawned, not forked, since gRPC does not survive a fork; they share
the port by SO_REUSEPORT. A worker that ends is started again; SIGTERM drains them all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from server.logs import configure_logs
from server.settings import ServerSettings
from stores.errors import StoreError, StoreUnavailableError
from stores.postgres import OfflineStore
from stores.redis_store import OnlineStore
from stores.settings import SettingsError

WATCH_INTERVAL_S = 0.1
RESTART_PAUSE_S = 1.0
DRAIN_MARGIN_S = 5.0

log = structlog.get_logger()


def run_worker(settings: ServerSettings) -> None:
    """A worker's main function, in its own process."""
    from server.worker import serve
    from stores.lifeline import follow_parent

    follow_parent()
    serve(settings)


def check(settings: ServerSettings) -> None:
    """Refuses to start where answers would be wrong or open to anyone.

    Raises:
        SettingsError, CardKeyMismatchError.
    """
    if not settings.is_on_loopback and settings.token is None:
        raise SettingsError(
            f"TALLY_LISTEN={settings.listen} can be reached from other machines: set TALLY_TOKEN"
        )
    if (settings.tls_certificate_file is None) != (settings.tls_key_file is None):
        raise SettingsError("TLS needs both TALLY_TLS_CERTIFICATE_FILE and TALLY_TLS_KEY_FILE")
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


MEMORY_SETTINGS = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
"""Of a worker: what large batches took is given back, and not kept for each thread and each library."""


class Workers:
    """The worker processes."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self.stopping = False

    def run(self) -> None:
        """Keeps the workers running until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._processes = [self._spawn() for _ in range(self._settings.workers)]
        while not self.stopping:
            time.sleep(WATCH_INTERVAL_S)
            for i, process in enumerate(self._processes):
                if not process.is_alive() and not self.stopping:
                    log.error("a worker ended", pid=process.pid, status=process.exitcode)
                    mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
                    time.sleep(RESTART_PAUSE_S)
                    self._processes[i] = self._spawn()
        self._stop()

    def _spawn(self) -> BaseProcess:
        for name, value in MEMORY_SETTINGS.items():
            os.environ.setdefault(name, value)
        process = self._context.Process(target=run_worker, args=(self._settings,), daemon=True)
        process.start()
        return process

    def _on_signal(self, number: int, frame: object) -> None:
        self.stopping = True

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + self._settings.drain_s + DRAIN_MARGIN_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()


def main() -> int:
    """Runs the server until it is asked to stop."""
    configure_logs("info")
    try:
        settings = ServerSettings()
        configure_logs(settings.log_level)
        check(settings)
    except (SettingsError, StoreError) as error:
        log.error("refusing to start", error=str(error))
        return 2
    metrics_folder = tempfile.mkdtemp(prefix="tally-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_folder
    try:
        if settings.metrics_listen:
            host, _, port = settings.metrics_listen.rpartition(":")
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            start_http_server(int(port), addr=host, registry=registry)
        Workers(settings).run()
    finally:
        shutil.rmtree(metrics_folder, ignore_errors=True)
    return 0
