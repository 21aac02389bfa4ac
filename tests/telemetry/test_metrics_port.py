"""A metrics port that slow and silent callers cannot hold up."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, Counter

from deploy.processes import free_port
from telemetry import metrics_port
from telemetry.metrics_port import CONNECTIONS_MAX, REQUEST_BYTES_MAX, MetricsPort


@dataclass(frozen=True)
class Port:
    where: tuple[str, int]

    def get(self, path: str = "/metrics", **headers: str) -> tuple[str, str]:
        """Content and its type."""
        url = f"http://{self.where[0]}:{self.where[1]}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as got:
            return got.read().decode(), got.headers["Content-Type"]


@pytest.fixture
def port(monkeypatch) -> Iterator[Port]:
    """A port with a counter, whose callers get half a second."""
    monkeypatch.setattr(metrics_port, "REQUEST_TIMEOUT_S", 0.5)
    registry = CollectorRegistry()
    Counter("tally_tests_total", "Tests.", registry=registry).inc(3)
    where = "127.0.0.1", free_port()
    served = MetricsPort(f"{where[0]}:{where[1]}", registry)
    yield Port(where)
    served.close()


def test_metrics_are_served_in_the_format_that_is_asked_for(port):
    text, kind = port.get()
    assert "tally_tests_total 3.0" in text
    assert kind.startswith("text/plain")
    text, kind = port.get(Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert kind.startswith("application/openmetrics-text")


def test_other_paths_and_methods_are_refused(port):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        port.get("/admin")
    with socket.create_connection(port.where, timeout=5) as line:
        line.sendall(b"POST /metrics HTTP/1.1\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 405 ")


def test_silent_connections_take_no_threads_and_keep_nobody_out(port):
    threads = threading.active_count()
    with ExitStack() as stack:
        for _ in range(3 * CONNECTIONS_MAX):
            stack.enter_context(socket.create_connection(port.where, timeout=5))
        assert "tally_tests_total" in port.get()[0]
        assert threading.active_count() <= threads


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: a"])
def test_a_connection_that_sends_no_request_in_time_is_closed(port, sent):
    began = time.monotonic()
    with socket.create_connection(port.where, timeout=5) as line:
        line.sendall(sent)
        assert is_closed(line)
    assert 0.4 < time.monotonic() - began < 3


def test_a_request_that_comes_byte_by_byte_gets_no_more_time(port):
    began = time.monotonic()
    with socket.create_connection(port.where, timeout=0.05) as line:
        while not is_closed(line):
            with suppress(OSError):
                line.sendall(b"x")
            assert time.monotonic() - began < 3


def test_a_request_without_end_is_cut_off(port):
    with socket.create_connection(port.where, timeout=5) as line:
        line.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (2 * REQUEST_BYTES_MAX))
        assert is_closed(line)


def test_an_address_in_use_is_said_at_once(port):
    with pytest.raises(OSError, match="in use"):
        MetricsPort(f"{port.where[0]}:{port.where[1]}", CollectorRegistry())


def is_closed(line: socket.socket) -> bool:
    try:
        return not line.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True
