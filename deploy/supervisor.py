"""The supervisor: starts the stack, keeps it running, stops it. `python -m deploy.supervisor`.

It holds the data folder's lock for as long as it lives. Its children get a signal from the kernel
when it dies, so that none survives it, whatever ended it. A child that ends by itself is started
again; an online store that comes back empty is rebuilt from Postgres.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import flink, kafka, postgres, valkey
from deploy.processes import (
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    StackError,
    accepts_connections,
    free_port,
    spawn,
    stop,
    wait_until,
)
from deploy.stack import ALREADY_UP, DataFolder
from server.settings import ServerSettings
from stores.errors import StoreError
from stores.prepare import opened_stores
from stores.redis_store import OnlineStore
from stores.settings import SettingsError, StoreSettings
from stream_job.settings import StreamSettings
from stream_job.topics import make_topics

WATCH_INTERVAL_S = 0.2
RESTART_PAUSE_S = 1.0
LOCK_TIMEOUT_S = 1.0
"""Whoever asks whether a stack is up holds the lock for a moment."""
STUCK_RESTART_S = 30.0
"""A stream that is stuck for so long, while both stores and Kafka answer, is started again: Flink's
mini-cluster does not start a task manager again that ended with an error of Flink's own."""
STUCK_LOOK_INTERVAL_S = 2.0
STREAM_GRACE_S = 60.0
"""How long it is let alone after it was started, or after the stores were rebuilt."""
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
"""A child that ends more than RESTARTS_MAX times within this is given up, and the stack stops."""


@dataclass
class Child:
    """One process of the stack."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    """Starts it and waits until it is ready."""
    halt: Callable[[subprocess.Popen[bytes]], None]
    holds_data: bool = False
    """Whether the stores must be looked at when it was away."""
    process: subprocess.Popen[bytes] | None = None
    ended_at_s: tuple[float, ...] = ()
    is_ended: bool = False
    """Whether its end is known and counted; a start that failed is no further end."""


class Supervisor:
    """One stack in one data folder."""

    def __init__(self, data: DataFolder, secret: str) -> None:
        self.data = data
        self.secret = secret
        self.stopping = False
        self.settings = StoreSettings(data=data.root)
        server = ServerSettings(data=data.root)
        chosen = server.model_fields_set
        self.grpc = server.listen if "listen" in chosen else f"127.0.0.1:{free_port()}"
        self.metrics = (
            server.metrics_listen if "metrics_listen" in chosen else f"127.0.0.1:{free_port()}"
        )
        self.is_prepared = False
        self.was_up = False
        """Whether everything was up once: from then on the server starts whatever the stores do."""
        self.children: list[Child] = []
        self.stream: Child | None = None
        self.next_look_s = 0.0
        self.redis_url = self._external("redis_url") or self._add_valkey()
        self.postgres_url = self._external("postgres_url") or self._add_postgres()
        stream = self.stream_settings = StreamSettings(data=data.root)
        self.kafka = stream.kafka_servers
        if self.kafka is None and not stream.stream_off:
            self.kafka = self._add_kafka()
        # The server comes when the stores are there, the stream when its topics are.
        self.children.append(
            Child("server", self._start_server, lambda p: stop(p, signal.SIGTERM, STOP_TIMEOUT_S))
        )
        self.stream_metrics = stream.stream_metrics_listen or f"127.0.0.1:{free_port()}"
        if self.kafka is not None and not stream.stream_off:
            self._add_stream()

    def _external(self, name: str) -> str | None:
        url = getattr(self.settings, name)
        return None if url is None else str(url.get_secret_value())

    # --- children ---------------------------------------------------------------------------

    def _add_valkey(self) -> str:
        port = free_port()

        def start() -> subprocess.Popen[bytes]:
            path = valkey.write_settings(self.data.valkey, port, self.secret)
            with self.data.log("valkey").open("ab") as log:
                child = valkey.start(path, log)
            self._await(lambda: valkey.is_ready(port, self.secret), "valkey", child)
            (self.data.valkey / valkey.HANDOVER).unlink(missing_ok=True)
            return child

        self.children.append(
            Child(
                "valkey",
                start,
                lambda p: valkey.save_and_stop(p, port, self.secret, STOP_TIMEOUT_S),
                holds_data=True,
            )
        )
        return valkey.url(port, self.secret)

    def _add_postgres(self) -> str:
        port = free_port()

        def start() -> subprocess.Popen[bytes]:
            postgres.prepare(self.data.postgres, self.secret)
            with self.data.log("postgres").open("ab") as log:
                child = postgres.start(self.data.postgres, port, log)
            self._await(lambda: postgres.is_ready(port, self.secret), "postgres", child)
            return child

        self.children.append(
            Child(
                "postgres",
                start,
                lambda p: stop(p, postgres.STOP_SIGNAL, STOP_TIMEOUT_S),
                holds_data=True,
            )
        )
        return postgres.url(port, self.secret)

    def _add_kafka(self) -> str:
        port = free_port()

        def start() -> subprocess.Popen[bytes]:
            settings = kafka.write_settings(self.data.kafka, port, free_port())
            kafka.prepare(settings)
            with self.data.log("kafka").open("ab") as log:
                child = kafka.start(settings, log)
            self._await(lambda: kafka.is_ready(port), "kafka", child)
            return child

        self.children.append(
            Child("kafka", start, lambda p: stop(p, kafka.STOP_SIGNAL, STOP_TIMEOUT_S))
        )
        return f"127.0.0.1:{port}"

    def _add_stream(self) -> None:
        def start() -> subprocess.Popen[bytes]:
            make_topics(StreamSettings(data=self.data.root, kafka_servers=self.kafka))
            self.next_look_s = time.monotonic() + STREAM_GRACE_S
            with self.data.log("stream").open("ab") as log:
                return flink.start(self.data.root, log)

        def watch() -> subprocess.Popen[bytes]:
            with self.data.log("watch").open("ab") as log:
                return spawn(
                    [sys.executable, "-m", "stream_job.watch"],
                    log=log,
                    on_parent_death=signal.SIGTERM,
                    env=os.environ
                    | {
                        "TALLY_DATA": str(self.data.root),
                        "TALLY_STREAM_METRICS_LISTEN": self.stream_metrics,
                        "TALLY_ADDRESS": self.grpc,  # whatever the shell says of another
                    },
                )

        self.stream = Child("stream", start, lambda p: flink.stop(p, STOP_TIMEOUT_S))
        self.children.append(self.stream)
        self.children.append(
            Child("watch", watch, lambda p: stop(p, signal.SIGTERM, STOP_TIMEOUT_S))
        )

    def _start_server(self) -> subprocess.Popen[bytes]:
        if not self.was_up:
            self._prepare_stores()
        environment = os.environ | {
            "TALLY_DATA": str(self.data.root),
            "TALLY_LISTEN": self.grpc,
            "TALLY_METRICS_LISTEN": self.metrics,
        }
        self._describe("starting")  # the server finds its stores there
        with self.data.log("server").open("ab") as log:
            child = spawn(
                [sys.executable, "-m", "server"],
                log=log,
                on_parent_death=signal.SIGTERM,
                env=environment,
            )
        self._await(lambda: accepts_connections(int(self.grpc.rpartition(":")[2])), "server", child)
        return child

    def _await(self, ready: Callable[[], bool], name: str, child: subprocess.Popen[bytes]) -> None:
        try:
            wait_until(
                lambda: self.stopping or ready(),
                name,
                timeout_s=START_TIMEOUT_S,
                child=child,
                log_path=self.data.log(name),
            )
        except BaseException:
            stop(child, signal.SIGKILL, STOP_TIMEOUT_S)
            raise

    def _prepare_stores(self) -> None:
        """Brings the schema up to date and the online store back, where it lost its data."""
        settings = StoreSettings(
            data=self.data.root,
            card_key_file=self.settings.card_key_file or self.data.card_key,
        )
        fingerprint = settings.load_card_key().fingerprint
        with opened_stores(self.redis_url, self.postgres_url, fingerprint, say) as (_, online):
            if self.kafka is None:
                online.forget_stream()
            self.is_prepared = True
        self.next_look_s = time.monotonic() + STREAM_GRACE_S

    # --- the stack --------------------------------------------------------------------------

    def _describe(self, state: str) -> None:
        settings: dict[str, Any] = {
            "redis_url": self.redis_url,
            "postgres_url": self.postgres_url,
            "card_key_file": str(self.settings.card_key_file or self.data.card_key),
        }
        if self.kafka is not None:
            # Whoever publishes goes by what the job was started with.
            settings["kafka_servers"] = self.kafka
            settings |= {
                "stream_format": str(self.stream_settings.stream_format),
                "transactions_topic": self.stream_settings.transactions_topic,
                "labels_topic": self.stream_settings.labels_topic,
                "dead_letter_topic": self.stream_settings.dead_letter_topic,
            }
        self.data.describe(
            {
                "state": state,
                "supervisor_pid": os.getpid(),
                "grpc": self.grpc,
                "metrics": f"http://{self.metrics}/metrics",
                "stream_metrics": f"http://{self.stream_metrics}/metrics" if self.kafka else None,
                "processes": {c.name: c.process.pid for c in self.children if c.process},
                "settings": settings,
            }
        )

    def run(self) -> None:
        """Starts everything, watches, and stops everything when asked to.

        Raises:
            StackError: a part does not start, or does not stay up.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            for child in self.children:
                if self.stopping:
                    return
                child.process = child.start()
                say(f"{child.name} is up (pid {child.process.pid})")
            self._describe("up")
            self.was_up = True
            while not self.stopping:
                self._revive()
                self._unstick()
                time.sleep(WATCH_INTERVAL_S)
        finally:
            self.data.forget()
            for child in reversed(self.children):
                if child.process is not None:
                    child.halt(child.process)
                    say(f"{child.name} is down")

    def _on_signal(self, number: int, frame: object) -> None:
        self.stopping = True

    def _revive(self) -> None:
        """Starts again what ended, and then brings the stores back in line; what does not work yet
        is tried again at the next call."""
        for child in self.children:
            assert child.process is not None
            if child.process.poll() is None or self.stopping:
                continue
            if not child.is_ended:
                self._count_end(child)
            try:
                child.process = child.start()
                child.is_ended = False
            except (StackError, StoreError) as error:
                say(f"{child.name} does not start yet: {error}")
                time.sleep(RESTART_PAUSE_S)
                continue
            self._describe("up")
        if not self.is_prepared and not self.stopping:
            try:
                self._prepare_stores()
            except StoreError as error:
                say(f"the stores are not ready yet: {error}")
                time.sleep(RESTART_PAUSE_S)

    def _unstick(self) -> None:
        """Ends a stream job that is stuck; `_revive` then starts it again."""
        now = time.monotonic()
        if self.stream is None or now < self.next_look_s:
            return
        self.next_look_s = now + STUCK_LOOK_INTERVAL_S
        online = OnlineStore(self.redis_url)
        try:
            state = json.loads(online.stream_state() or "{}")
        except StoreError:
            return
        finally:
            online.close()
        process = self.stream.process
        if state.get("unmoved_s", 0.0) > STUCK_RESTART_S and process and process.poll() is None:
            say(f"the stream has been stuck for {state['unmoved_s']:.0f} s: it is ended")
            flink.end_group(process, signal.SIGKILL)

    def _count_end(self, child: Child) -> None:
        """Takes note that a child ended.

        Raises:
            StackError: it does so all the time.
        """
        assert child.process is not None
        child.is_ended = True
        now = time.monotonic()
        recent = [at for at in child.ended_at_s if now - at < RESTART_WINDOW_S]
        child.ended_at_s = (*recent, now)
        say(f"{child.name} ended with status {child.process.returncode}: starting it again")
        if len(child.ended_at_s) > RESTARTS_MAX:
            raise StackError(f"{child.name} ended {len(child.ended_at_s)} times in a minute")
        if child.holds_data:
            self.is_prepared = False


def say(text: str) -> None:
    """A line in the supervisor's log."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)  # noqa: T201 (stdout is the log)


def main() -> int:
    """Runs a stack in the foreground until it is asked to stop."""
    parser = argparse.ArgumentParser(description="Runs an embedded stack.")
    parser.add_argument("--data", type=Path, required=True)
    data = DataFolder(parser.parse_args().data.absolute())
    secret = data.prepare()
    held = data.lock(LOCK_TIMEOUT_S)
    if held is None:
        say(f"a stack is already up in {data.root}")
        return ALREADY_UP
    try:
        data.forget()  # of a stack that was killed: its stores are not ours
        Supervisor(data, secret).run()
    except (StackError, StoreError, SettingsError) as error:
        say(f"error: {error}")
        return 1
    finally:
        held.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
