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
from grpc_health.v1 import health_pb2_grpc

from features import CardKey
from server.exports import ExportAnswers
from server.health import SERVICE as HEALTH_SERVICE
from server.health import Health
from server.historical import HistoricalAnswers
from server.interceptors import (
    AuthLayer,
    DeadlineLayer,
    ErrorLayer,
    Layer,
    LayeredServer,
    MetricsLayer,
)
from server.logs import configure_logs
from server.metrics import FLUSH_INTERVAL_S, Metrics
from server.online import OnlineAnswers
from server.reflection import V1_SERVICE, V1ALPHA_SERVICE, register_reflection
from server.resp import RedisReader
from server.service import (
    ADMIN_SERVICE,
    FEATURE_SERVICE,
    AdminService,
    FeatureService,
    register_services,
    request_parsers,
)
from server.settings import ServerSettings
from server.streams import StreamLayer, StreamLimits
from server.sync import SyncAnswers
from server.workers import BEAT_INTERVAL_S

log = structlog.get_logger()

MESSAGE_HARD_LIMIT_FACTOR = 4
"""Messages beyond this many times message_bytes_max are cut off unread by the framework."""
GC_ALLOCATIONS = 50_000
"""New objects between two looks of the collector; a call of 100 rows makes a thousand, and few of them
are in cycles."""
PENDING_CALLS_MAX = 32_768
"""About 190 MB. HTTP/2's own bound of a connection is left out: a caller who sends before it has heard
of it is refused without a reason, too."""
PING_INTERVAL_MS_MIN = 5_000
HEALTH_INTERVAL_S = 0.5
WATCH_LIMITS = StreamLimits(4_096, untaken_s=60.0)
"""Of watches of health, which end with their connection."""
REFLECTION_LIMITS = StreamLimits(
    64, whole_s=600.0, first_message_s=10.0, idle_s=60.0, untaken_s=60.0
)
QUIET_S_MAX = 2.0
"""How long a worker that is to stop goes on taking calls in, while they keep coming."""


def serve(settings: ServerSettings, beats: Any) -> None:
    """Runs a worker until SIGTERM or SIGINT; its event loop counts `beats.value` up as it turns."""
    configure_logs(settings.log_level)
    uvloop.run(_serve(settings, settings.load_card_key(), beats))


async def _beat(beats: Any) -> None:
    """Gives signs of life."""
    while True:
        beats.value += 1
        await asyncio.sleep(BEAT_INTERVAL_S)


async def _serve(settings: ServerSettings, card_key: CardKey, beats: Any) -> None:
    heart = asyncio.create_task(_beat(beats))
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
            # Calls that have arrived and are not handed over yet. Beyond, the framework cancels calls
            # without a reason, and begins with it at random at the first of the two.
            ("grpc.server.max_pending_requests", PENDING_CALLS_MAX),
            ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS_MAX),
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
    parser_of = request_parsers(card_key, online, settings.message_bytes_max)
    layered = LayeredServer(server, _layers(settings, metrics), parser_of)
    register_services(
        layered,
        FeatureService(
            online,
            HistoricalAnswers(postgres_url, card_key, online),
            ExportAnswers(postgres_url, card_key, online),
            SyncAnswers(redis_url, postgres_url, card_key),
            metrics,
        ),
        AdminService(settings, card_key, redis, online),
    )
    health = Health(["", FEATURE_SERVICE, ADMIN_SERVICE])
    health_pb2_grpc.add_HealthServicer_to_server(health, layered)
    register_reflection(layered, [FEATURE_SERVICE, ADMIN_SERVICE, HEALTH_SERVICE])
    _bind(server, settings)
    await redis.start()
    online.warm_up()
    # What is here now stays: the collector need not look at it again, in the middle of a call.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    await server.start()
    watcher = asyncio.create_task(_watch(health, online, metrics))
    flusher = asyncio.create_task(_flush(metrics))
    log.info("serving", listen=settings.listen)

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()

    log.info("draining", seconds=settings.drain_s)
    watcher.cancel()
    health.stop()
    # Stopping cancels calls that wait inside the framework: they are taken in first, if they end.
    with suppress(TimeoutError):
        async with asyncio.timeout(min(QUIET_S_MAX, settings.drain_s)):
            await online.wait_until_quiet()
    await server.stop(settings.drain_s)
    await redis.stop()
    flusher.cancel()
    heart.cancel()
    metrics.flush()
    log.info("stopped")


def _layers(settings: ServerSettings, metrics: Metrics) -> list[Layer]:
    token = settings.token
    ours = StreamLimits(
        settings.bulk_calls_max,
        whole_s=settings.bulk_deadline_s,
        first_message_s=settings.bulk_first_message_s,
        idle_s=settings.bulk_idle_s,
        untaken_s=settings.bulk_untaken_s,
    )
    return [
        MetricsLayer(metrics),
        ErrorLayer(),
        *([AuthLayer(token.get_secret_value())] if token else []),
        DeadlineLayer(settings.deadline_ms_max),
        StreamLayer(
            {
                FEATURE_SERVICE: ours,
                HEALTH_SERVICE: WATCH_LIMITS,
                V1_SERVICE: REFLECTION_LIMITS,
                V1ALPHA_SERVICE: REFLECTION_LIMITS,
            }
        ),
    ]


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> None:
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    if certificate is None or key is None:
        server.add_insecure_port(settings.listen)
        return
    authorities = settings.tls_client_ca_file
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=authorities.read_bytes() if authorities else None,
        require_client_auth=authorities is not None,
    )
    server.add_secure_port(settings.listen, credentials)


async def _flush(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(FLUSH_INTERVAL_S)
        metrics.flush()


async def _watch(health: Health, online: OnlineAnswers, metrics: Metrics) -> None:
    """Keeps health and gauges true: features can be served while Redis answers."""
    health.set(ADMIN_SERVICE, serving=True)
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
            health.set(service, serving=up)
        await asyncio.sleep(HEALTH_INTERVAL_S)
