"""The two services: what each method does once its request is valid."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

import grpc
from tally.v1 import admin_service_pb2 as admin_pb
from tally.v1 import catalog_pb2
from tally.v1 import feature_service_pb2 as pb

from features import CATALOG, CATALOG_FINGERPRINT, CATEGORIES, RETENTION_MS, CardKey
from features.catalog import DAY_DELAY_MS, Source
from server.errors import CallError
from server.exports import ExportAnswers, validate_export
from server.historical import HistoricalAnswers
from server.intake import SIDE_MESSAGE_BYTES_MAX, bounded_parser, plan_of
from server.interceptors import Context, LayeredServer, Parser, ParserOf
from server.metrics import Metrics
from server.online import OnlineAnswers
from server.query import OnlineQuery, parse_online
from server.resp import RedisReader
from server.settings import ServerSettings
from server.status import OfflineLook
from server.sync import SyncAnswers, validate_sync
from stores.errors import StoreUnavailableError
from stores.redis_store import LOADS_KEY

FEATURE_SERVICE = "tally.v1.FeatureService"
ADMIN_SERVICE = "tally.v1.AdminService"
ONLINE_STATUS_TIMEOUT_S = 0.85
"""Of what Redis is asked for; with what Postgres has to say, a call takes less than a second."""

_SOURCES = {
    Source.LEDGER: catalog_pb2.FEATURE_SOURCE_LEDGER,
    Source.REQUEST: catalog_pb2.FEATURE_SOURCE_REQUEST,
    Source.LEDGER_AND_REQUEST: catalog_pb2.FEATURE_SOURCE_LEDGER_AND_REQUEST,
    Source.PROFILE: catalog_pb2.FEATURE_SOURCE_PROFILE,
    Source.PROFILE_AND_REQUEST: catalog_pb2.FEATURE_SOURCE_PROFILE_AND_REQUEST,
    Source.MERCHANT: catalog_pb2.FEATURE_SOURCE_MERCHANT,
}


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000_000


def catalog_message() -> catalog_pb2.Catalog:
    """The catalogue as the contract has it."""
    return catalog_pb2.Catalog(
        fingerprint=CATALOG_FINGERPRINT,
        features=[
            catalog_pb2.Feature(
                name=feature.name,
                description=feature.description,
                unit=feature.unit,
                source=_SOURCES[feature.source],
                aggregate=feature.aggregate if feature.window_ms else "",
                window_ms=feature.window_ms,
                needs=feature.needs,
                delay_ms=feature.delay_ms,
                fingerprint=feature.fingerprint,
            )
            for feature in CATALOG
        ],
        categories=CATEGORIES,
        retention_ms=RETENTION_MS,
        day_delay_ms=DAY_DELAY_MS,
    )


class FeatureService:
    """tally.v1.FeatureService."""

    def __init__(
        self,
        online: OnlineAnswers,
        historical: HistoricalAnswers,
        exports: ExportAnswers,
        syncs: SyncAnswers,
        metrics: Metrics,
    ) -> None:
        self._online = online
        self._historical = historical
        self._exports = exports
        self._syncs = syncs
        self._metrics = metrics
        self._catalog = pb.GetCatalogResponse(catalog=catalog_message())

    async def get_online_features(self, query: OnlineQuery, context: Context) -> bytes:
        """GetOnlineFeatures; the response is serialised already."""
        response = await self._online.answer(query)
        self._metrics.count_rows(len(query))
        return response

    def get_historical_features(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[bytes]:
        """GetHistoricalFeatures; the responses are serialised already."""
        return self._historical.serve(requests, context)

    def export(self, request: pb.ExportRequest, context: Context) -> AsyncIterator[bytes]:
        """Export; the responses are serialised already."""
        return self._exports.serve(request, context)

    def sync(self, request: pb.SyncRequest, context: Context) -> AsyncIterator[pb.SyncResponse]:
        """Sync."""
        return self._syncs.serve(request, context)

    async def get_catalog(
        self, request: pb.GetCatalogRequest, context: Context
    ) -> pb.GetCatalogResponse:
        """GetCatalog."""
        return self._catalog


class AdminService:
    """tally.v1.AdminService."""

    def __init__(
        self, settings: ServerSettings, card_key: CardKey, redis: RedisReader, online: OnlineAnswers
    ) -> None:
        self._card_key = card_key
        self._redis = redis
        self._online = online
        self._offline = OfflineLook(settings.store_urls()[1], card_key.fingerprint)
        self._began_s = time.monotonic()

    async def get_status(
        self, request: admin_pb.GetStatusRequest, context: Context
    ) -> admin_pb.GetStatusResponse:
        """GetStatus."""
        (online, through, loads, merchants), offline = await asyncio.gather(
            self._online_status(), self._offline.status()
        )
        return admin_pb.GetStatusResponse(
            version=version("tally-store"),
            catalog_fingerprint=CATALOG_FINGERPRINT,
            card_key_fingerprint=self._card_key.fingerprint[:8],
            worker_pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._began_s,
            online_store=online,
            offline_store=offline,
            complete_through_ms=through,
            unfinished_loads=loads,
            merchants_through_ms=merchants,
        )

    async def _online_status(self) -> tuple[admin_pb.StoreStatus, int, list[str], int]:
        """Redis: its state, through when it is complete, unfinished loads, and through when features of
        merchants are computed."""
        try:
            async with asyncio.timeout(ONLINE_STATUS_TIMEOUT_S):
                progress, merchants = await self._online.read_state()
                loads = [value.decode() for value in await self._redis.hvals(LOADS_KEY)]
        except TimeoutError:
            state = admin_pb.STORE_STATE_UNREACHABLE
            detail = f"no answer within {ONLINE_STATUS_TIMEOUT_S * 1000:.0f} ms"
            return admin_pb.StoreStatus(state=state, detail=detail), -1, [], -1
        except StoreUnavailableError as error:
            state = admin_pb.STORE_STATE_UNREACHABLE
            return admin_pb.StoreStatus(state=state, detail=str(error)), -1, [], -1
        except CallError as error:
            state = (
                admin_pb.STORE_STATE_KEY_MISMATCH
                if error.reason == "CARD_KEY_MISMATCH"
                else admin_pb.STORE_STATE_UNREACHABLE
            )
            return admin_pb.StoreStatus(state=state, detail=error.message), -1, [], -1
        if progress is None:
            detail = "it lost its data, or never had any"
            state = admin_pb.STORE_STATE_INCOMPLETE
            return admin_pb.StoreStatus(state=state, detail=detail), -1, loads, merchants
        state = admin_pb.STORE_STATE_SERVING
        status = admin_pb.StoreStatus(state=state)
        return status, progress.complete_through_ms, sorted(loads), merchants


def register_services(server: LayeredServer, features: FeatureService, admin: AdminService) -> None:
    """Registers both services' methods."""

    def method(make: Any, behaviour: Any, request: Any, serialise: Any = None) -> Any:
        return make(
            behaviour, request_deserializer=request.FromString, response_serializer=serialise
        )

    unary = grpc.unary_unary_rpc_method_handler
    stream = grpc.unary_stream_rpc_method_handler
    both = grpc.stream_stream_rpc_method_handler
    # Without a serialiser, the behaviour returns the bytes of its answers.
    feature_methods = {
        "GetOnlineFeatures": method(
            unary, features.get_online_features, pb.GetOnlineFeaturesRequest
        ),
        "GetCatalog": method(
            *(unary, features.get_catalog, pb.GetCatalogRequest),
            pb.GetCatalogResponse.SerializeToString,
        ),
        "GetHistoricalFeatures": method(
            both, features.get_historical_features, pb.GetHistoricalFeaturesRequest
        ),
        "Sync": method(stream, features.sync, pb.SyncRequest, pb.SyncResponse.SerializeToString),
        "Export": method(stream, features.export, pb.ExportRequest),
    }
    admin_methods = {
        "GetStatus": method(
            *(unary, admin.get_status, admin_pb.GetStatusRequest),
            admin_pb.GetStatusResponse.SerializeToString,
        ),
    }
    server.add_registered_method_handlers(FEATURE_SERVICE, feature_methods)
    server.add_registered_method_handlers(ADMIN_SERVICE, admin_methods)


def request_parsers(card_key: CardKey, online: OnlineAnswers, message_bytes_max: int) -> ParserOf:
    """What checks, parses and validates the requests of each method."""

    def query(request: pb.GetOnlineFeaturesRequest) -> OnlineQuery:
        return parse_online(request, card_key, now_ms())

    def admitted(parse: Parser) -> Parser:
        """Refuses before it parses: a call that is refused is to cost little."""

        def parsed(data: bytes) -> Any:
            online.check_room()
            return parse(data)

        return parsed

    validators: dict[str, Callable[[Any], Any]] = {
        f"/{FEATURE_SERVICE}/GetOnlineFeatures": query,
        f"/{FEATURE_SERVICE}/Export": validate_export,
        f"/{FEATURE_SERVICE}/Sync": validate_sync,
    }

    def parser_of(method: str, parse: Parser) -> Parser:
        is_ours = method.startswith((f"/{FEATURE_SERVICE}/", f"/{ADMIN_SERVICE}/"))
        bytes_max = message_bytes_max if is_ours else SIDE_MESSAGE_BYTES_MAX
        bounded = bounded_parser(parse, bytes_max, plan_of(method))
        validate = validators.get(method)
        if validate is None:
            return bounded
        if validate is query:
            return admitted(lambda data: query(bounded(data)))
        return lambda data: validate(bounded(data))

    return parser_of
