"""A server of a test's own over the stores of the shared stack, and what stands between it and them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.processes import accepts_connections, free_port
from tests.conftest import Stack

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class OwnServer:
    """A running server."""

    address: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def own_server(stack: Stack, folder: Path, **environment: str) -> Iterator[OwnServer]:
    """A server over the stack's stores, with settings of its own; stopped at the end."""
    address, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    log = folder / "server.log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}
    settings = {
        "TALLY_DATA": str(stack.data),
        "TALLY_LISTEN": address,
        "TALLY_METRICS_LISTEN": metrics,
        "TALLY_DRAIN_S": "1",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "server"],
            env=inherited | settings | environment,
            stdout=file,
            stderr=file,
        )
    try:
        await_port(address, process, log)
        yield OwnServer(address, metrics, process, log)
    finally:
        process.terminate()
        process.wait(30)


def await_port(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not accepts_connections(int(address.rpartition(":")[2])):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


class Relay:
    """A TCP line to a server that can be made to hang: what is sent stays on the way."""

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self.port = 0
        self.connections = 0
        """That were ever made."""
        self._is_listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="relay")
        self._thread.start()
        assert self._is_listening.wait(10)

    def hang(self) -> None:
        self._loop.call_soon_threadsafe(self._flows.clear)

    def flow(self) -> None:
        self._loop.call_soon_threadsafe(self._flows.set)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._flows, self._is_over = asyncio.Event(), asyncio.Event()
        self._flows.set()
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._is_listening.set()
        await self._is_over.wait()
        server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection(*self._to)
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except asyncio.CancelledError:
            writer.transport.abort()
            back.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is stopped, as by Ctrl-Z; continued at the end, where it still is."""
    os.kill(pid, signal.SIGSTOP)
    process = psutil.Process(pid)
    while process.status() != psutil.STATUS_STOPPED:  # the signal is on its way
        time.sleep(0.01)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
