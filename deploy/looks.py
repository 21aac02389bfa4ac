"""What `tally status` asks the parts of a stack, each within LOOK_TIMEOUT_S."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psycopg
import redis
from tally.cli.connection import config_from_environment
from tally.client import Client  # by its module: loaded here, and not within the time of an answer
from tally.errors import DeadlineError
from tally.v1 import admin_service_pb2 as admin_pb

from deploy.tasks import Task
from stores.connections import stated
from stores.redis_store import STREAM_KEY

LOOK_TIMEOUT_S = 0.9
LIBPQ_TIMEOUT_S_MIN = 2
GRACE_S = 0.05
"""For what a part says of itself at the very end of its time."""
NO_ANSWER = f"no answer within {LOOK_TIMEOUT_S * 1000:.0f} ms"


def collected(asked: Mapping[str, Task[Any]]) -> dict[str, Any]:
    """What each part has said, or why nothing; all together take no longer than one."""
    deadline_s = time.monotonic() + LOOK_TIMEOUT_S + GRACE_S
    found: dict[str, Any] = {}
    for name, task in asked.items():
        if not task.is_done(max(0.0, deadline_s - time.monotonic())):
            found[name] = NO_ANSWER
            continue
        try:
            found[name] = task.result()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what there is to say)
            found[name] = _sentence(error)
    return found


def _sentence(error: Exception) -> str:
    if isinstance(error, DeadlineError | redis.TimeoutError):
        return NO_ANSWER
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def server_status(address: str) -> admin_pb.GetStatusResponse:
    """What the server says of the installation."""
    config = replace(config_from_environment(), deadline_ms=int(LOOK_TIMEOUT_S * 1000))
    with Client(address, config) as client:
        return client.status()


def _redis(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=LOOK_TIMEOUT_S, socket_connect_timeout=LOOK_TIMEOUT_S
    )


def redis_state(url: str) -> str:
    """Whether Redis answers."""
    with _redis(url) as client:
        client.ping()
    return "it answers; what it is worth, only the server can say"


def postgres_state(url: str) -> str:
    """Whether Postgres answers. It is left behind before libpq's own shortest limit."""
    with psycopg.connect(stated(url, LIBPQ_TIMEOUT_S_MIN)) as connection:
        connection.execute("SELECT 1")
    return "it answers; what it is worth, only the server can say"


def stream_state(settings: Mapping[str, Any]) -> dict[str, Any] | str:
    """What is known of the stream."""
    if "kafka_servers" not in settings:
        return "off"
    with _redis(settings["redis_url"]) as client:
        state: Any = client.get(STREAM_KEY)
    watched: dict[str, Any] | str = (
        "unknown: nobody watches it" if state is None else json.loads(state)
    )
    return watched
