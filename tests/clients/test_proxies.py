"""Proxies of the environment, which gRPC takes for every address."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import tally
from tally import proxies

CARD = "4111111111111111"
QUICK = tally.ClientConfig(deadline_ms=3_000, retry=tally.RetryConfig(max_attempts=1))


class Proxy:
    """A proxy that refuses everything, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                said = connection.recv(4096)
                if said == b"end":
                    return
                self.asked.append(said.splitlines()[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def close(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"end")
        self._thread.join()
        self._listening.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Takes what gRPC sends elsewhere."""
    for name in (*proxies.VARIABLES, *proxies.EXCEPTIONS):
        monkeypatch.delenv(name, raising=False)
    made = Proxy()
    yield made
    made.close()


@pytest.mark.parametrize("variable", [*proxies.VARIABLES, "GRPC_ADDRESS_HTTP_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_reached_without_the_proxy_of_the_environment(
    stack, proxy, monkeypatch, variable, host
):
    scheme = "" if variable == "GRPC_ADDRESS_HTTP_PROXY" else "http://"
    monkeypatch.setenv(variable, f"{scheme}127.0.0.1:{proxy.port}")
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8,::1/128")
    port = stack.address.rpartition(":")[2]
    with tally.Client(f"{host}:{port}", QUICK) as client:
        assert client.online([tally.Row(card=CARD)]).known.shape == (1,)
    assert proxy.asked == []


async def _asked_later(address: str) -> None:
    async with tally.AsyncClient(address, QUICK) as client:
        await client.online([tally.Row(card=CARD)])


def test_the_client_of_an_event_loop_does_without_it_too(stack, proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    asyncio.run(_asked_later(stack.address))
    assert proxy.asked == []


@pytest.mark.parametrize("variable", proxies.VARIABLES)
def test_a_server_that_a_proxy_keeps_away_is_unavailable_by_the_name_of_the_variable(
    proxy, monkeypatch, variable
):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
    with (
        tally.Client("192.0.2.1:7", QUICK) as client,
        pytest.raises(tally.UnavailableError, match=f"{variable} is set: .*no_proxy") as caught,
    ):
        client.online([tally.Row(card=CARD)])
    assert proxy.asked[0].startswith(b"CONNECT 192.0.2.1:7")
    assert caught.value.reason == ""


def test_a_stream_of_answers_names_the_variable_too(proxy, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
    with (
        tally.Client("192.0.2.1:7", QUICK) as client,
        pytest.raises(tally.UnavailableError, match="https_proxy is set"),
    ):
        list(client.export("transactions"))


def test_a_server_that_is_down_says_nothing_of_a_proxy_that_does_not_apply(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with (
        tally.Client("127.0.0.1:9", QUICK) as client,
        pytest.raises(tally.UnavailableError) as caught,
    ):
        client.online([tally.Row(card=CARD)])
    assert "proxy" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("tally.localhost:1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("unix:/run/tally.sock", True),
        ("0.0.0.0:1", True),
        ("128.0.0.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("[2001:db8::1]:1", False),
        ("dns:///features.bank.example:443", False),
    ],
)
def test_loopback_is_told_by_the_address(address, expected):
    assert proxies.is_loopback(address) is expected


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, None),
        ({"http_proxy": ""}, None),
        ({"HTTP_PROXY": "http://p:1"}, None),  # gRPC reads the small ones
        ({"http_proxy": "http://p:1"}, "http_proxy"),
        ({"http_proxy": "http://p:1", "grpc_proxy": "http://q:1"}, "grpc_proxy"),
        ({"http_proxy": "http://p:1", "no_proxy": "a.example,bank.example"}, None),
        ({"http_proxy": "http://p:1", "no_proxy": ".bank.example"}, None),
        ({"http_proxy": "http://p:1", "no_proxy": "store.example"}, "http_proxy"),
        (
            {"http_proxy": "http://p:1", "no_grpc_proxy": "x", "no_proxy": "bank.example"},
            "http_proxy",
        ),
    ],
)
def test_the_variable_that_applies_is_the_one_that_grpc_goes_by(environment, variable):
    assert proxies.variable_for("features.bank.example:443", environment) == variable
