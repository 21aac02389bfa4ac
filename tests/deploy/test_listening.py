"""A store's password is shown to the store's own process, and to no other that took its port."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from deploy import postgres, valkey
from deploy.children import Readiness
from deploy.processes import STOP_TIMEOUT_S, StackError, listens

SECRET = "of the stack"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens nowhere, as a store that has only just been started."""
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def other() -> Iterator[socket.socket]:
    """What another process could do in the meantime: it listens on the store's port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize("store", [valkey, postgres])
def test_a_look_at_a_store_shows_its_password_to_no_other_process(child, other, store):
    port = other.getsockname()[1]
    found = Readiness.NOT_YET
    with suppress(StackError):
        found = store.look(child, port, SECRET)
    assert found is Readiness.NOT_YET
    with pytest.raises(BlockingIOError):  # no connection came
        other.accept()


def test_the_end_of_an_online_store_shows_its_password_to_no_other_process(child, other):
    valkey.save_and_stop(child, other.getsockname()[1], SECRET, STOP_TIMEOUT_S)
    assert child.returncode is not None
    with pytest.raises(BlockingIOError):
        other.accept()


def refused(self: psutil.Process, kind: str) -> None:
    raise psutil.AccessDenied(self.pid)


def test_a_process_listens_where_it_does_itself(child, other, monkeypatch):
    port = other.getsockname()[1]
    assert listens(os.getpid(), port)
    assert not listens(child.pid, port)
    # In a container, root may not look at another user's descriptors.
    monkeypatch.setattr(psutil.Process, "net_connections", refused)
    assert listens(os.getpid(), port)
    other.close()
    assert not listens(os.getpid(), port)
