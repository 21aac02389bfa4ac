"""The supervisor: starts the stack, keeps it running, stops it. `python -m deploy.supervisor`.

It holds the data folder's lock for as long as it lives. Its children get a signal from the kernel
when it dies, so that none survives it, whatever ended it.

Its loop waits for nothing: each round looks at every child by itself, starts what may be started, and
goes on. What may take long, a look at a child that starts, a topic that is made, stores that are
rebuilt, is on a thread of its own. So a child that is slow to come back keeps no other away. Once the
stack was up nothing that happens to a child or to the disk ends it: what does not work is tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from deploy import flink, kafka, leftovers, logs, postgres, valkey
from deploy.children import PROBE_PAUSE_S, Child, Readiness
from deploy.launch import become_supervisor
from deploy.processes import (
    STOP_TIMEOUT_S,
    StackError,
    accepts_connections,
    free_port,
    last_lines,
    outlive_parent,
    spawn,
    stop,
)
from deploy.stack import ALREADY_UP, LOCK_TIMEOUT_S, DataFolder
from deploy.tasks import Task
from server.settings import ServerSettings
from stores.environment import chosen
from stores.errors import StoreError
from stores.prepare import opened_stores
from stores.redis_store import OnlineStore
from stores.settings import SettingsError, StoreSettings
from stream_job.settings import StreamSettings
from stream_job.topics import make_topics

WATCH_INTERVAL_S = 0.1
START_INTERVAL_S = 0.02
"""Between rounds, while something is starting."""
PREPARE_PAUSE_S = 1.0
LOG_LOOK_INTERVAL_S = 5.0
STUCK_RESTART_S = 30.0
"""A stream that is stuck for so long, while both stores and Kafka answer, is started again: Flink's
mini-cluster does not start a task manager again that ended with an error of Flink's own."""
STUCK_LOOK_INTERVAL_S = 2.0
STREAM_GRACE_S, STREAM_GRACE_S_MAX = 120.0, 480.0
"""How long it is let alone after it was started, or after the stores were rebuilt. Twice as long after each
time that it was ended for being stuck: on a machine that is busy enough it takes minutes to start."""
FAILURES = (StackError, StoreError, SettingsError, OSError)
"""What passes: a part that does not start, a store that is away, a disk that is full."""


class Supervisor:
    """One stack in one data folder."""

    def __init__(self, data: DataFolder, secret: str) -> None:
        self.data = data
        self.secret = secret
        self.stopping = False
        self.settings = StoreSettings(data=data.root)
        server = ServerSettings(data=data.root)
        given = server.model_fields_set
        self.grpc = server.listen if "listen" in given else f"127.0.0.1:{free_port()}"
        self.metrics = (
            server.metrics_listen if "metrics_listen" in given else f"127.0.0.1:{free_port()}"
        )
        self.is_prepared = False
        self.was_up = False
        """Whether everything was up once: from then on each child starts whatever the others do."""
        self.children: list[Child] = []
        self.broker: Child | None = None
        self.stream: Child | None = None
        self.next_look_s = 0.0
        self.stream_grace_s = STREAM_GRACE_S
        self.redis_url = self._external("redis_url") or self._add_valkey()
        self.postgres_url = self._external("postgres_url") or self._add_postgres()
        stream = self.stream_settings = StreamSettings(data=data.root)
        self.kafka = stream.kafka_servers
        self.kafka_login = stream.kafka_login()
        if self.kafka is None and not stream.stream_off:
            self.kafka = self._add_kafka()
        self._add_server()
        self.stream_metrics = stream.stream_metrics_listen or f"127.0.0.1:{free_port()}"
        if self.kafka is not None and not stream.stream_off:
            self._add_stream()
        self.described: dict[str, Any] | None = None
        """What stack.json says."""
        self.preparing: Task[int] | None = None
        self.prepare_at_s = 0.0
        self.data_ends = 0
        """How often a child that holds data has ended."""
        self.looking: Task[float] | None = None
        self.rotating: Task[None] | None = None
        self.rotate_at_s = 0.0

    def _external(self, name: str) -> str | None:
        url = getattr(self.settings, name)
        return None if url is None else str(url.get_secret_value())

    # --- children ---------------------------------------------------------------------------

    def _add_valkey(self) -> str:
        port = free_port()

        def spawn_it() -> subprocess.Popen[bytes]:
            path = valkey.write_settings(self.data.valkey, port, self.secret)
            with self.data.open_log("valkey") as log:
                return valkey.start(path, log)

        def look(process: subprocess.Popen[bytes]) -> Readiness:
            found = valkey.look(process, port, self.secret)
            if found is Readiness.READY:
                (self.data.valkey / valkey.HANDOVER).unlink(missing_ok=True)
            return found

        self.children.append(
            Child(
                "valkey",
                spawn_it,
                lambda p: valkey.save_and_stop(p, port, self.secret, STOP_TIMEOUT_S),
                probe=look,
                holds_data=True,
            )
        )
        return valkey.url(port, self.secret)

    def _add_postgres(self) -> str:
        port = free_port()

        def spawn_it() -> subprocess.Popen[bytes]:
            with self.data.open_log("postgres") as log:
                return postgres.start(self.data.postgres, port, log)

        self.children.append(
            Child(
                "postgres",
                spawn_it,
                lambda p: stop(p, postgres.STOP_SIGNAL, STOP_TIMEOUT_S),
                prepare=lambda: postgres.prepare(self.data.postgres, self.secret),
                probe=lambda p: postgres.look(p, port, self.secret),
                holds_data=True,
            )
        )
        return postgres.url(port, self.secret)

    def _add_kafka(self) -> str:
        port, controller_port = free_port(), free_port()

        password = ""

        def prepare() -> None:
            nonlocal password
            password = secrets.token_urlsafe(24)  # of this start of the broker, and no other
            settings = kafka.write_settings(self.data.kafka, port, controller_port, password)
            kafka.prepare(settings)

        def spawn_it() -> subprocess.Popen[bytes]:
            with self.data.open_log("kafka") as log:
                return kafka.start(self.data.kafka / kafka.SETTINGS_FILE, log)

        def probe(process: subprocess.Popen[bytes]) -> Readiness:
            is_ready = kafka.is_ready(process, port, password, self.secret)
            return Readiness.READY if is_ready else Readiness.NOT_YET

        self.kafka_login = kafka.login(self.secret)
        self.broker = Child(
            "kafka",
            spawn_it,
            lambda p: stop(p, kafka.STOP_SIGNAL, STOP_TIMEOUT_S),
            prepare=prepare,
            probe=probe,
        )
        self.children.append(self.broker)
        return f"127.0.0.1:{port}"

    def _add_server(self) -> None:
        name, _, number = self.grpc.rpartition(":")
        host, port = name.strip("[]"), int(number)

        def spawn_it() -> subprocess.Popen[bytes]:
            settings = {"TALLY_LISTEN": self.grpc, "TALLY_METRICS_LISTEN": self.metrics}
            with self.data.open_log("server") as log:
                return spawn(
                    [sys.executable, "-m", "server"],
                    log=log,
                    on_parent_death=signal.SIGTERM,
                    env=os.environ | settings,
                )

        self.server = Child(
            "server",
            spawn_it,
            lambda p: stop(p, signal.SIGTERM, STOP_TIMEOUT_S),
            probe=lambda p: (
                Readiness.READY if accepts_connections(port, host) else Readiness.NOT_YET
            ),
            needs=lambda: self.was_up or self.is_prepared,
        )
        self.children.append(self.server)

    def _add_stream(self) -> None:
        def spawn_job() -> subprocess.Popen[bytes]:
            self.next_look_s = time.monotonic() + self.stream_grace_s
            with self.data.open_log("stream") as log:
                return flink.start(self.data.root, log)

        def spawn_watch() -> subprocess.Popen[bytes]:
            settings = {
                "TALLY_STREAM_METRICS_LISTEN": self.stream_metrics,
                "TALLY_ADDRESS": self.grpc,  # whatever the shell says of another
            }
            with self.data.open_log("watch") as log:
                return spawn(
                    [sys.executable, "-m", "stream_job.watch"],
                    log=log,
                    on_parent_death=signal.SIGTERM,
                    env=os.environ | settings,
                )

        self.stream = Child(
            "stream",
            spawn_job,
            lambda p: flink.stop(p, STOP_TIMEOUT_S),
            prepare=lambda: make_topics(
                StreamSettings(data=self.data.root, kafka_servers=self.kafka, **self.kafka_login)
            ),
            needs=lambda: self._serves() and (self.broker is None or self.broker.is_up),
            clean_up=lambda p: flink.end_group(p, signal.SIGKILL),
        )
        watch = Child(
            "watch",
            spawn_watch,
            lambda p: stop(p, signal.SIGTERM, STOP_TIMEOUT_S),
            needs=self._serves,
        )
        self.children += [self.stream, watch]

    def _serves(self) -> bool:
        """Whether the stores and the server were ready once."""
        return self.was_up or self.server.is_up

    # --- one round --------------------------------------------------------------------------

    def run(self) -> None:
        """Starts everything, watches, and stops everything when asked to.

        Raises:
            StackError: a part does not start at first.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            while not self.stopping:
                try:
                    self._round(time.monotonic())
                except Exception as error:
                    if not self.was_up:
                        raise
                    say(f"this is tried again: {type(error).__name__}: {error}")
                    time.sleep(PREPARE_PAUSE_S)
                is_steady = self.is_prepared and all(child.is_up for child in self.children)
                time.sleep(WATCH_INTERVAL_S if is_steady else START_INTERVAL_S)
        finally:
            self._stop()

    def _round(self, now_s: float) -> None:
        for child in self.children:
            try:
                self._look_after(child, now_s)
            except Exception as error:
                # One child's failure, whatever it is, keeps none of the others from being looked after.
                if not self.was_up:
                    raise
                say(f"{child.name}: {type(error).__name__}: {error}")
        self._look_after_stores(now_s)
        self._unstick(now_s)
        self._rotate(now_s)
        if not self.was_up and self.is_prepared and all(child.is_up for child in self.children):
            self.was_up = True
            outlive_parent()  # `tally up` may end from here on
        self._describe()

    def _look_after(self, child: Child, now_s: float) -> None:
        """Takes a child on by what there is to do at once."""
        if child.has_ended():
            self._note_end(child, now_s)
        elif child.probing is not None and child.probing.is_done():
            self._note_look(child, child.probing.result(), now_s)
        if child.life.is_overdue(now_s) and child.process is not None:
            child.process.kill()
            self._fail(
                child,
                StackError(f"{child.name} took too long{child.last_answer}{self._lines(child)}"),
            )
        if child.life.may_start(now_s) and child.needs():
            self._start(child, now_s)

    def _start(self, child: Child, now_s: float) -> None:
        """Has a child made ready, and once it is, started."""
        if child.preparing is None:
            child.preparing = Task(child.prepare)
        if not child.preparing.is_done():
            return
        prepared, child.preparing = child.preparing, None
        try:
            prepared.result()
            child.process = child.spawn()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is tried again)
            child.life.ended(now_s)
            self._fail(child, error)
        else:
            child.life.started(now_s)
            child.probing = Task(partial(self._probe, child, child.process, 0.0))

    def _note_look(self, child: Child, found: Readiness, now_s: float) -> None:
        child.probing = None
        child.life.looked_at(found, now_s)
        assert child.process is not None
        if not child.is_up:
            child.probing = Task(partial(self._probe, child, child.process, PROBE_PAUSE_S))
            return
        child.complaint = ""
        say(f"{child.name} is up (pid {child.process.pid})")

    @staticmethod
    def _probe(child: Child, process: subprocess.Popen[bytes], pause_s: float) -> Readiness:
        """What a look at a child finds; one that fails finds nothing yet."""
        time.sleep(pause_s)
        try:
            return child.probe(process)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is not ready)
            child.last_answer = f": {error}"
            return Readiness.NOT_YET

    def _note_end(self, child: Child, now_s: float) -> None:
        """Takes note that a child has ended by itself.

        Raises:
            StackError: the stack was not up yet.
        """
        assert child.process is not None
        was_up = child.is_up
        child.life.ended(now_s)
        child.probing = None
        child.clean_up(child.process)
        if child.holds_data:
            self.is_prepared = False
            self.data_ends += 1
        ended = f"{child.name} ended with status {child.process.returncode}"
        if was_up and self.was_up:
            say(f"{ended}: starting it again")
        else:
            self._fail(child, StackError(f"{ended}{self._lines(child)}"))

    def _lines(self, child: Child) -> str:
        return last_lines(self.data.log(child.name))

    def _fail(self, child: Child, error: Exception) -> None:
        """Says that a child does not start yet, once; raises it where the stack was not up yet."""
        if not self.was_up:
            raise error
        if child.complaint != str(error):
            child.complaint = str(error)
            say(f"{child.name} does not start yet: {error}")

    # --- the stores -------------------------------------------------------------------------

    def _look_after_stores(self, now_s: float) -> None:
        """Brings the stores back in line after one of them was away, once both are there."""
        if self.preparing is not None and self.preparing.is_done():
            preparing, self.preparing = self.preparing, None
            try:
                # What ended meanwhile is looked after again.
                self.is_prepared = preparing.result() == self.data_ends
                say("the stores are ready")
                self.next_look_s = time.monotonic() + STREAM_GRACE_S
            except Exception as error:
                if not self.was_up:
                    raise
                say(f"the stores are not ready yet: {error}")
                self.prepare_at_s = now_s + PREPARE_PAUSE_S
        are_there = all(child.is_up for child in self.children if child.holds_data)
        if self.is_prepared or self.preparing is not None or not are_there:
            return
        if now_s >= self.prepare_at_s:
            count = self.data_ends
            self.preparing = Task(lambda: self._prepare_stores(count))

    def _prepare_stores(self, count: int) -> int:
        """Brings the schema up to date and the online store back, where it lost its data; returns the
        count that it was given."""
        settings = StoreSettings(
            data=self.data.root,
            card_key_file=self.settings.card_key_file or self.data.card_key,
        )
        fingerprint = settings.load_card_key().fingerprint
        with opened_stores(self.redis_url, self.postgres_url, fingerprint, say) as (_, online):
            if self.kafka is None:
                online.forget_stream()
        return count

    def _unstick(self, now_s: float) -> None:
        """Ends a stream job that is stuck; it is then started again."""
        if self.stream is None or self.stream.process is None or not self.stream.is_up:
            return
        if self.looking is not None and self.looking.is_done():
            looking, self.looking = self.looking, None
            unmoved_s = looking.result()
            if not unmoved_s:
                self.stream_grace_s = STREAM_GRACE_S
            if unmoved_s > STUCK_RESTART_S and now_s >= self.next_look_s - STUCK_LOOK_INTERVAL_S:
                say(f"the stream has been stuck for {unmoved_s:.0f} s: it is ended")
                self.stream_grace_s = min(2 * self.stream_grace_s, STREAM_GRACE_S_MAX)
                flink.end_group(self.stream.process, signal.SIGKILL)
        if self.looking is None and now_s >= self.next_look_s:
            self.next_look_s = now_s + STUCK_LOOK_INTERVAL_S
            self.looking = Task(self._unmoved_s)

    def _unmoved_s(self) -> float:
        """How long the stream has stood still, as its watcher reports; 0 where that is unknown."""
        online = OnlineStore(self.redis_url)
        try:
            return float(json.loads(online.stream_state() or "{}").get("unmoved_s", 0.0))
        except StoreError:
            return 0.0
        finally:
            online.close()

    # --- what it writes ---------------------------------------------------------------------

    def _rotate(self, now_s: float) -> None:
        if now_s >= self.rotate_at_s and (self.rotating is None or self.rotating.is_done()):
            self.rotate_at_s = now_s + LOG_LOOK_INTERVAL_S
            self.rotating = Task(lambda: logs.rotate(self.data.root / "logs"))

    def _describe(self) -> None:
        """Has stack.json say what is; on a full disk that is tried again in the next round."""
        content = self._description()
        if content == self.described:
            return
        try:
            self.data.describe(content)
        except OSError as error:
            if self.was_up and self.described is not None:
                say(f"stack.json cannot be written yet: {error}")
                self.described = None
        else:
            self.described = content

    def _description(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "redis_url": self.redis_url,
            "postgres_url": self.postgres_url,
            "card_key_file": str(self.settings.card_key_file or self.data.card_key),
        }
        if self.kafka is not None:
            # Whoever publishes goes by what the job was started with.
            settings |= {"kafka_servers": self.kafka, **self.kafka_login}
            settings |= {
                "stream_format": str(self.stream_settings.stream_format),
                "transactions_topic": self.stream_settings.transactions_topic,
                "labels_topic": self.stream_settings.labels_topic,
                "dead_letter_topic": self.stream_settings.dead_letter_topic,
            }
        return {
            "state": "up" if self.was_up else "starting",
            "supervisor_pid": os.getpid(),
            "grpc": self.grpc,
            "metrics": f"http://{self.metrics}/metrics" if self.metrics else None,
            "stream_metrics": f"http://{self.stream_metrics}/metrics" if self.kafka else None,
            "processes": {c.name: c.process.pid for c in self.children if c.process},
            "settings": settings,
        }

    # --- the end ----------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: object) -> None:
        self.stopping = True

    def _stop(self) -> None:
        """Ends the children, last things first, and what they may have left."""
        try:
            self.data.forget()
        except OSError as error:
            say(f"stack.json stays: {error}")
        for child in reversed(self.children):
            if child.process is not None and child.process.poll() is None:
                child.halt(child.process)
                say(f"{child.name} is down")
        leftovers.end(leftovers.of_stack(self.data.root), wait_s=0.0)


def say(text: str) -> None:
    """A line in the supervisor's log, where it can be written: a full disk ends nothing."""
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n"
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), line.encode(errors="replace"))


def main() -> int:
    """Runs a stack in the foreground until it is asked to stop."""
    parser = argparse.ArgumentParser(description="Runs an embedded stack.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lock", type=int, help="Descriptor that holds the folder's lock.")
    arguments = parser.parse_args()
    os.umask(0o077)
    data = DataFolder(arguments.data.absolute())
    data.make()
    held = data.lock(LOCK_TIMEOUT_S) if arguments.lock is None else arguments.lock
    if held is None:
        say(f"a stack is already up in {data.root}")
        return ALREADY_UP
    _choose_environment(data, held)
    os.set_inheritable(held, False)
    try:
        data.name_holder(held, os.getpid())
        secret = data.prepare()
        data.forget()  # of a stack that was killed: its stores are not ours
        killed = leftovers.end(leftovers.of_stack(data.root))
        if killed:
            say(f"ended {len(killed)} processes that an earlier stack had left")
        data.clear_temporary()
        Supervisor(data, secret).run()
    except FAILURES as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:  # before there was anything to stop
        return 130
    return 0  # the lock goes with the process


def _choose_environment(data: DataFolder, held: int) -> None:
    """Begins again, with the lock, in an environment that is chosen, unless this one is: all that the
    supervisor starts has it from there. The interpreter itself goes by it from its start."""
    if dict(os.environ) != chosen(os.environ, data.root):
        become_supervisor(data, held)


if __name__ == "__main__":
    sys.exit(main())
