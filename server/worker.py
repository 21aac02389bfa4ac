"""One worker: an event loop, a gRPC server on the shared port, a connection to Redis."""

from __future__ import annotations

import asyncio
import gc
import signal
from contextlib import suppress
from typing import Any

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from tally.v1 import admin_service_pb2, feature_service_pb2

from features import CardKey
from server.exports import ExportAnswers
from server.historical import HistoricalAnswers
from server.interceptors import (
    AuthLayer,
    BulkLayer,
    DeadlineLayer,
    ErrorLayer,
    LayeredServer,
    MetricsLayer,
    ValidationLayer,
)
from server.logs import configure_logs
from server.metrics import FLUSH_INTERVAL_S, Metrics
from server.online import OnlineAnswers
from server.resp import RedisReader
from server.service import (
    ADMIN_SERVICE,
    FEATURE_SERVICE,
    AdminService,
    FeatureService,
    register_services,
    validators,
)
from server.settings import ServerSettings
from server.sync import SyncAnswers

log = structlog.get_logger()

MESSAGE_HARD_LIMIT_FACTOR = 4
"""Messages beyond this many times message_bytes_max are cut off unread by the framework."""
GC_ALLOCATIONS = 50_000
"""New objects between two looks of the collector; a call of 100 rows makes a thousand, and few of them
are in cycles."""
PING_INTERVAL_MS_MIN = 5_000
HEALTH_INTERVAL_S = 0.5
QUIET_S_MAX = 2.0
"""How long a worker that is to stop goes on taking calls in, while they keep coming."""


def serve(settings: ServerSettings) -> None:
    """Runs a worker until SIGTERM or SIGINT."""
    configure_logs(settings.log_level)
    uvloop.run(_serve(settings, settings.load_card_key()))


async def _serve(settings: ServerSettings, card_key: CardKey) -> None:
    redis_url, postgres_url = settings.store_urls()
    metrics = Metrics()
    redis = RedisReader(redis_url, settings.redis_timeout_ms)
    online = OnlineAnswers(
        redis,
        card_key.fingerprint,
        gather_wait_us=settings.gather_wait_us,
        queued_calls_max=settings.queued_calls_max,
    )
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 1),
            (
                "grpc.max_receive_message_length",
                settings.message_bytes_max * MESSAGE_HARD_LIMIT_FACTOR,
            ),
            ("grpc.max_send_message_length", -1),
            # A caller who takes nothing at all cannot be told that its time is over: its connection is
            # closed in the end. Whoever calls makes a new one.
            ("grpc.max_connection_age_ms", round(settings.bulk_deadline_s * 1000)),
            ("grpc.max_connection_age_grace_ms", round(settings.bulk_deadline_s * 1000)),
            # A client may ask for signs of life while it waits for a long answer.
            ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
        ],
    )
    layered = _layered(server, settings, card_key, metrics)
    register_services(
        layered,
        settings,
        FeatureService(
            online,
            HistoricalAnswers(postgres_url, card_key, online),
            ExportAnswers(postgres_url, card_key, online),
            SyncAnswers(redis_url, postgres_url, card_key),
            metrics,
        ),
        AdminService(settings, card_key, redis, online),
    )
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, layered)
    names = [descriptor.services_by_name[name].full_name for descriptor, name in _SERVICES]
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
        reflection.aio.ReflectionServicer([*names, health.SERVICE_NAME, reflection.SERVICE_NAME]),
        layered,
    )
    _bind(server, settings)
    await redis.start()
    online.warm_up()
    # What is here now stays: the collector need not look at it again, in the middle of a call.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    await server.start()
    watcher = asyncio.create_task(_watch(servicer, redis, online, metrics))
    flusher = asyncio.create_task(_flush(metrics))
    log.info("serving", listen=settings.listen)

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()

    log.info("draining", seconds=settings.drain_s)
    watcher.cancel()
    await servicer.enter_graceful_shutdown()
    # Stopping cancels calls that wait inside the framework: they are taken in first, if they end.
    with suppress(TimeoutError):
        async with asyncio.timeout(min(QUIET_S_MAX, settings.drain_s)):
            await online.wait_until_quiet()
    await server.stop(settings.drain_s)
    await redis.stop()
    flusher.cancel()
    metrics.flush()
    log.info("stopped")


_SERVICES: tuple[tuple[Any, str], ...] = (
    (feature_service_pb2.DESCRIPTOR, "FeatureService"),
    (admin_service_pb2.DESCRIPTOR, "AdminService"),
)


def _layered(
    server: grpc.aio.Server, settings: ServerSettings, card_key: CardKey, metrics: Metrics
) -> LayeredServer:
    token = settings.token
    return LayeredServer(
        server,
        [
            MetricsLayer(metrics),
            ErrorLayer(),
            *([AuthLayer(token.get_secret_value())] if token else []),
            DeadlineLayer(settings.deadline_ms_max),
            BulkLayer(FEATURE_SERVICE, settings.bulk_calls_max, settings.bulk_deadline_s),
            ValidationLayer(validators(card_key)),
        ],
    )


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> None:
    if settings.tls_certificate_file and settings.tls_key_file:
        credentials = grpc.ssl_server_credentials(
            [(settings.tls_key_file.read_bytes(), settings.tls_certificate_file.read_bytes())]
        )
        server.add_secure_port(settings.listen, credentials)
    else:
        server.add_insecure_port(settings.listen)


async def _flush(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(FLUSH_INTERVAL_S)
        metrics.flush()


async def _watch(
    servicer: health.aio.HealthServicer,
    redis: RedisReader,
    online: OnlineAnswers,
    metrics: Metrics,
) -> None:
    """Keeps health and gauges true: features can be served while Redis answers."""
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    await servicer.set(ADMIN_SERVICE, serving)
    while True:
        try:
            progress, merchants_through_ms = await online.read_state()
            up = True
            metrics.complete_through.set(
                progress.complete_through_ms / 1000 if progress else -0.001
            )
            metrics.merchants_through.set(merchants_through_ms / 1000)
        except Exception as error:  # noqa: BLE001 (whatever it is, the service cannot serve)
            log.debug("the online store does not answer", error=str(error))
            up = False
        metrics.online_store_up.set(up)
        for service in (FEATURE_SERVICE, ""):
            await servicer.set(service, serving if up else not_serving)
        await asyncio.sleep(HEALTH_INTERVAL_S)
