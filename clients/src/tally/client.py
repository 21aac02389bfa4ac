"""The client, once for threads and once for asyncio. What is sent and how answers are read is the
same code for both; only the waiting differs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from tally.config import ClientConfig, TlsConfig
from tally.errors import from_rpc_error
from tally.historical import Answers, Points, batches_of, in_order_of_cards, requests
from tally.results import OnlineFeatures
from tally.rows import Instant, Row, online_request
from tally.v1 import admin_service_pb2 as admin_pb
from tally.v1 import catalog_pb2
from tally.v1 import feature_service_pb2 as pb
from tally.v1.admin_service_pb2_grpc import AdminServiceStub
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

if TYPE_CHECKING:
    import pyarrow as pa

Response = TypeVar("Response")


def _credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        tls.server_root_ca, tls.client_private_key, tls.client_certificate
    )


@contextmanager
def _narrow_errors() -> Iterator[None]:
    """Turns the framework's one error into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def _narrowed(responses: Iterator[Response]) -> Iterator[Response]:
    """A stream whose errors are ours."""
    with _narrow_errors():
        yield from responses


class _Calls:
    """What both clients have in common: the stubs, and what every call carries."""

    def __init__(self, channel: Any, config: ClientConfig) -> None:
        self._features = FeatureServiceStub(channel)
        self._admin = AdminServiceStub(channel)
        metadata = (("authorization", f"Bearer {config.token}"),) if config.token else ()
        self._with: dict[str, Any] = {
            "timeout": config.deadline_ms / 1000,
            "metadata": metadata,
        }


class Client(_Calls):
    """Talks to the feature service from threads; safe to share between them."""

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """Connects when first used.

        Args:
            address: host:port.
            config: how; by default without TLS or token, for loopback.
        """
        config = config or ClientConfig()
        options = config.channel_options()
        self._channel = (
            grpc.secure_channel(address, _credentials(config.tls), options)
            if config.tls
            else grpc.insecure_channel(address, options)
        )
        super().__init__(self._channel, config)

    def online(
        self,
        rows: Iterable[Row],
        features: Sequence[str] = (),
        *,
        complete_through: Instant | None = None,
    ) -> OnlineFeatures:
        """Features of cards at instants, from the online store.

        Args:
            rows: 1 to 10,000 questions.
            features: names, in the order of the answer; by default the whole catalogue.
            complete_through: fail with StaleError unless the store is complete through this
                instant; by default, answer and flag.

        Raises:
            TallyError: one of its narrow classes.
        """
        request = online_request(rows, features, complete_through)
        with _narrow_errors():
            return OnlineFeatures.from_message(
                self._features.GetOnlineFeatures(request, **self._with)
            )

    def historical(self, points: Points, features: Sequence[str] = ()) -> pa.Table:
        """Features of many points, each exactly as of its instant, from the offline store.

        Args:
            points: a pyarrow Table, a pandas DataFrame, or the path of a CSV or Parquet file: see
                tally.historical.
            features: names, in the order of the answer; by default the whole catalogue.

        Returns:
            The points in their order, with a column for each feature (float64, NaN where there is
            no value), `statuses` (uint8 of FeatureStatus, one for each feature) and `known`.

        Raises:
            TallyError: one of its narrow classes.
        """
        import pyarrow as pa

        if isinstance(points, str | Path):
            answers = self.historical_batches(points, features)
            return pa.Table.from_batches(answers, answers.schema)
        table = points if isinstance(points, pa.Table) else pa.Table.from_pandas(points)
        ordered, back = in_order_of_cards(table)
        answers = self.historical_batches(ordered, features)
        answer = pa.Table.from_batches(answers, answers.schema)
        return answer if back is None else answer.take(back)

    def historical_batches(self, points: Points, features: Sequence[str] = ()) -> Answers:
        """As `historical`, batch by batch as they come: for more points than memory holds.

        Points that follow one another by card are answered fastest.
        """
        schema, batches = batches_of(points)
        call = self._features.GetHistoricalFeatures(
            requests(schema, batches, features), metadata=self._with["metadata"]
        )
        return Answers(_narrowed(call))

    def catalog(self) -> catalog_pb2.Catalog:
        """Every feature's definition."""
        with _narrow_errors():
            response: pb.GetCatalogResponse = self._features.GetCatalog(
                pb.GetCatalogRequest(), **self._with
            )
        return response.catalog

    def status(self) -> admin_pb.GetStatusResponse:
        """What the installation is doing."""
        with _narrow_errors():
            response: admin_pb.GetStatusResponse = self._admin.GetStatus(
                admin_pb.GetStatusRequest(), **self._with
            )
        return response

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient(_Calls):
    """Talks to the feature service from one event loop."""

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """Connects when first used; to be made on the loop that uses it. Arguments as Client's."""
        config = config or ClientConfig()
        options = config.channel_options()
        self._channel = (
            grpc.aio.secure_channel(address, _credentials(config.tls), options)
            if config.tls
            else grpc.aio.insecure_channel(address, options)
        )
        super().__init__(self._channel, config)

    async def online(
        self,
        rows: Iterable[Row],
        features: Sequence[str] = (),
        *,
        complete_through: Instant | None = None,
    ) -> OnlineFeatures:
        """As Client.online."""
        request = online_request(rows, features, complete_through)
        with _narrow_errors():
            return OnlineFeatures.from_message(
                await self._features.GetOnlineFeatures(request, **self._with)
            )

    async def catalog(self) -> catalog_pb2.Catalog:
        """As Client.catalog."""
        with _narrow_errors():
            response: pb.GetCatalogResponse = await self._features.GetCatalog(
                pb.GetCatalogRequest(), **self._with
            )
        return response.catalog

    async def status(self) -> admin_pb.GetStatusResponse:
        """As Client.status."""
        with _narrow_errors():
            response: admin_pb.GetStatusResponse = await self._admin.GetStatus(
                admin_pb.GetStatusRequest(), **self._with
            )
        return response

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
