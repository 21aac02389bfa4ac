"""What an operator can set; `tally config` lists it. Units are in the names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from stores.settings import Address, OptionalAddress, StoreSettings

ROWS_MAX = 10_000
"""Rows in one request; part of the contract."""
FEATURES_MAX = 1_000
"""Feature names in one request; part of the contract."""
CARDS_MAX = 10_000
"""Cards that one export chooses; part of the contract."""


class ServerSettings(StoreSettings):
    """The server's settings."""

    listen: Address = Field("127.0.0.1:7600", description="Address of the gRPC port.")
    metrics_listen: OptionalAddress = Field(
        "127.0.0.1:7601",
        description="Address of the Prometheus port, which asks for no token; empty for none.",
    )
    workers: int = Field(1, ge=1, le=256, description="Worker processes that share the port.")
    token: SecretStr | None = Field(
        None,
        min_length=1,
        description="Bearer token that every call must carry; off loopback, this or client certificates.",
    )
    tls_certificate_file: Path | None = Field(
        None, description="PEM certificate chain; with the key, the port speaks TLS only."
    )
    tls_key_file: Path | None = Field(None, description="PEM private key.")
    tls_client_ca_file: Path | None = Field(
        None,
        description="PEM authorities of clients' certificates; with it, every client must show one.",
    )
    tls_terminated: bool = Field(
        False,
        description="Whether something before the server, such as a proxy or a mesh, encrypts: off "
        "loopback, the server without TLS of its own starts only then.",
    )
    message_bytes_max: int = Field(
        4 * 1024 * 1024, ge=1024, description="Largest request that is answered."
    )
    queued_calls_max: int = Field(
        1_024, ge=1, description="Calls that may wait for the online store; more are refused."
    )
    bulk_calls_max: int = Field(
        4, ge=1, description="Historical calls, exports and syncs that a worker serves at once."
    )
    bulk_deadline_s: float = Field(
        3_600.0, gt=0, description="Longest time that such a call may take."
    )
    bulk_first_message_s: float = Field(
        10.0, gt=0, description="Longest time that such a call may take to send its first message."
    )
    bulk_idle_s: float = Field(
        60.0, gt=0, description="Longest time that its caller may leave it without the next one."
    )
    bulk_untaken_s: float = Field(
        600.0, gt=0, description="Longest time that its caller may leave an answer untaken."
    )
    deadline_ms_max: int = Field(
        10_000, ge=1, description="Longest time a unary call may take, whatever it asks for."
    )
    redis_timeout_ms: int = Field(
        1_000, ge=1, description="Longest time one read of the online store may take."
    )
    gather_wait_us: int = Field(
        3_000,
        ge=0,
        description="Longest time a call waits for others to share its read, under load.",
    )
    drain_s: float = Field(10.0, ge=0, description="Time that running calls get on SIGTERM.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error."
    )
