"""How a client connects. Units are in the names; every default is stated."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tally import taking


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Transport security."""

    server_root_ca: bytes | None = None
    """PEM of the authority that signed the server's certificate. Default: the system's own."""

    client_certificate: bytes | None = None
    """PEM of this client's certificate, for mutual TLS. Default: none."""

    client_private_key: bytes | None = None
    """PEM of this client's key, for mutual TLS. Default: none."""

    def __post_init__(self) -> None:
        for name in ("server_root_ca", "client_certificate", "client_private_key"):
            value = getattr(self, name)
            if not isinstance(value, bytes | None):
                raise taking.refused(name, "PEM (bytes)", value, "Path(...).read_bytes()")


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """Trying a call that is one question and one answer again, when it fails for a reason that passes."""

    max_attempts: int = 4
    """Attempts in all, 1 to 5; 1 turns retries off."""

    initial_backoff_ms: int = 20
    """Pause before the second attempt, randomised; the server's RetryInfo is for people."""

    max_backoff_ms: int = 500
    """Longest pause between attempts."""

    backoff_multiplier: float = 2.0
    """Factor from one pause to the next."""


@dataclass(frozen=True, slots=True)
class KeepAliveConfig:
    """Detecting a dead connection."""

    interval_ms: int = 30_000
    """Time without traffic after which the server is asked for a sign of life."""

    timeout_ms: int = 10_000
    """Time it has to give one."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Everything about a connection but the address."""

    tls: TlsConfig | None = None
    """Transport security. Default: none, for loopback."""

    token: str | None = field(default=None, repr=False)
    """Bearer token. Default: none."""

    deadline_ms: int = 2_000
    """Longest time a unary call may take, retries included."""

    retry: RetryConfig = RetryConfig()
    """Trying again."""

    keep_alive: KeepAliveConfig = KeepAliveConfig()
    """Detecting a dead connection."""

    max_message_bytes: int = 64 * 1024 * 1024
    """Largest answer that is accepted."""

    def __post_init__(self) -> None:
        for name, takes, kinds in (
            ("tls", "a tally.TlsConfig", TlsConfig | None),
            ("token", "text (str)", str | None),
            ("deadline_ms", "whole milliseconds (int)", int | float),
            ("retry", "a tally.RetryConfig", RetryConfig),
            ("keep_alive", "a tally.KeepAliveConfig", KeepAliveConfig),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise taking.refused(name, takes, value)

    def channel_options(self) -> list[tuple[str, int | str]]:
        """These settings as gRPC channel arguments."""
        retry = self.retry
        options: list[tuple[str, int | str]] = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", self.keep_alive.interval_ms),
            ("grpc.keepalive_timeout_ms", self.keep_alive.timeout_ms),
        ]
        if retry.max_attempts > 1:
            policy = {
                "maxAttempts": retry.max_attempts,
                "initialBackoff": f"{retry.initial_backoff_ms / 1000}s",
                "maxBackoff": f"{retry.max_backoff_ms / 1000}s",
                "backoffMultiplier": retry.backoff_multiplier,
                # CANCELLED by the server: a call that it had not begun when it was stopped.
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
            }
            # Not of streams: the library's own retry leaves one waiting for ever whose server dies
            # before it answers.
            methods = [
                {"service": "tally.v1.FeatureService", "method": "GetOnlineFeatures"},
                {"service": "tally.v1.FeatureService", "method": "GetCatalog"},
                {"service": "tally.v1.AdminService", "method": "GetStatus"},
            ]
            config = {"methodConfig": [{"name": methods, "retryPolicy": policy}]}
            options.append(("grpc.service_config", json.dumps(config)))
        return options
