"""The client, once for threads and once for asyncio. What is sent and how answers are read is the
same code for both; only the waiting differs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Never, TypeVar

import grpc
import grpc.aio

from tally import proxies, taking
from tally.config import ClientConfig, TlsConfig
from tally.errors import CLOSED, ClientStateError, from_rpc_error
from tally.exports import Export, What, export_request
from tally.historical import Answers, AsyncAnswers, Points, Question
from tally.instants import Instant, TimeRange, to_timestamp
from tally.ordering import ROWS_TOGETHER
from tally.results import OnlineFeatures
from tally.rows import Row, online_request
from tally.v1 import admin_service_pb2 as admin_pb
from tally.v1 import catalog_pb2
from tally.v1 import feature_service_pb2 as pb
from tally.v1.admin_service_pb2_grpc import AdminServiceStub
from tally.v1.feature_service_pb2_grpc import FeatureServiceStub

if TYPE_CHECKING:
    import pyarrow as pa

Response = TypeVar("Response")

_OTHER_LOOP = "the client belongs to another event loop, which used it first: make one on each loop"


def _credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        tls.server_root_ca, tls.client_private_key, tls.client_certificate
    )


@contextmanager
def _narrow_errors(address: str) -> Iterator[None]:
    """Turns the framework's one error into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, proxies.variable_for(address)) from error


def _narrowed(responses: Iterator[Response], address: str) -> Iterator[Response]:
    """A stream whose errors are ours."""
    with _narrow_errors(address):
        yield from responses


class _Calls:
    """What both clients have in common: the stubs, and what every call carries."""

    def __init__(self, address: str, config: ClientConfig | None) -> None:
        if not isinstance(address, str):
            raise taking.refused("address", "host:port as text (str)", address)
        if not isinstance(config, ClientConfig | None):
            raise taking.refused("config", "a tally.ClientConfig", config)
        self._address, self._config = address, config or ClientConfig()
        self._is_closed = False
        token = self._config.token
        self._with: dict[str, Any] = {
            "timeout": self._config.deadline_ms / 1000,
            "metadata": (("authorization", f"Bearer {token}"),) if token else (),
        }

    def _channel_options(self) -> list[tuple[str, int | str]]:
        return [*self._config.channel_options(), *proxies.channel_options(self._address)]

    def __reduce__(self) -> Never:
        # Also of copy: a connection has threads and a socket, which no copy has.
        raise TypeError(
            f"a {type(self).__name__} is neither pickled nor copied: make one in each process"
        )


class Client(_Calls):
    """Talks to the feature service from threads; safe to share between them."""

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """Connects when first used.

        Args:
            address: host:port.
            config: how; by default without TLS or token, for loopback.
        """
        super().__init__(address, config)
        tls, options = self._config.tls, self._channel_options()
        self._channel = (
            grpc.secure_channel(address, _credentials(tls), options)
            if tls
            else grpc.insecure_channel(address, options)
        )
        self._stubs = FeatureServiceStub(self._channel), AdminServiceStub(self._channel)

    @property
    def _features(self) -> FeatureServiceStub:
        self._check_open()
        return self._stubs[0]

    @property
    def _admin(self) -> AdminServiceStub:
        self._check_open()
        return self._stubs[1]

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientStateError(CLOSED)

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
        with _narrow_errors(self._address):
            return OnlineFeatures.from_message(
                self._features.GetOnlineFeatures(request, **self._with)
            )

    def historical(
        self,
        points: Points | TimeRange,
        features: Sequence[str] = (),
        *,
        labels_as_of: Instant | None = None,
        separator: str = ",",
    ) -> pa.Table:
        """Features of many points, each exactly as of its instant, from the offline store.

        Args:
            points: a pyarrow Table, a pandas DataFrame, or the path of CSV or Parquet, in one file or in
                a folder: see tally.historical. Or a TimeRange: every transaction in it.
            features: names, in the order of the answer; by default the whole catalogue.
            labels_as_of: adds the label of each row's transaction, by its `transaction_id`, as it
                was known at this instant.
            separator: of columns, where points are of CSV.

        Returns:
            The points in their order, or the transactions by card and time, with a column for each
            feature (float64, NaN where there is no value), `statuses` (uint8 of FeatureStatus, one
            for each feature), `known` and, where labels are asked for, `is_fraud` and `label_time`,
            null where none was known.

        Raises:
            TallyError: one of its narrow classes.
        """
        import pyarrow as pa

        answers = self.historical_batches(
            points,
            features,
            labels_as_of=labels_as_of,
            rows_together=sys.maxsize,
            separator=separator,
        )
        return pa.Table.from_batches(answers, answers.schema)

    def historical_batches(
        self,
        points: Points | TimeRange,
        features: Sequence[str] = (),
        *,
        labels_as_of: Instant | None = None,
        rows_together: int = ROWS_TOGETHER,
        separator: str = ",",
    ) -> Answers:
        """As `historical`, batch by batch: for more points than memory holds.

        Args:
            points: as for `historical`.
            features: as there.
            labels_as_of: as there.
            rows_together: so many points are put in order by card, which has each card's history read
                once for all of them; their answers are held until they are put back in the points'
                order. Where cards follow one another already, nothing is held but the points.
            separator: as there.

        Raises:
            TallyError: one of its narrow classes. What is wrong with a value of the points is told by
                column and row, counted from 0, such as card[7].
        """
        question = Question.about(points, features, labels_as_of, rows_together, separator)
        call = self._features.GetHistoricalFeatures(
            question.messages(), metadata=self._with["metadata"]
        )
        return Answers(question, _narrowed(call, self._address))

    def export(
        self,
        what: What,
        *,
        event_time: TimeRange | None = None,
        card_ids: Sequence[bytes] = (),
        zstd: bool = False,
        batch_rows: int | None = None,
    ) -> Export:
        """Everything of a kind, as one snapshot sees it: iterate over (record batch, cursor).

        Args:
            what: "transactions", "labels", "features" or "ledgers".
            event_time: only rows whose transaction's event time is in this range; of ledgers, those
                of cards with one.
            card_ids: only these cards, at most 10,000.
            zstd: compress what is sent.
            batch_rows: rows that come together at the most, up to 65,536; by default 16,384.

        Raises:
            TallyError: one of its narrow classes.
        """
        return self.export_from(
            export_request(what, event_time, card_ids, zstd=zstd, batch_rows=batch_rows)
        )

    def resume_export(self, cursor: bytes) -> Export:
        """The rows of an export that come behind a cursor.

        Raises:
            CursorExpiredError: its snapshot is gone.
            TallyError: another of its narrow classes.
        """
        if not isinstance(cursor, bytes):
            raise taking.refused("cursor", "what an export gave (bytes)", cursor)
        return self.export_from(pb.ExportRequest(cursor=cursor))

    def export_from(self, request: pb.ExportRequest) -> Export:
        """As `export` or `resume_export`, by the contract's own request."""
        call = self._features.Export(request, metadata=self._with["metadata"])
        return Export(_narrowed(call, self._address))

    def sync(
        self,
        source: Literal["postgres", "redis"] = "postgres",
        *,
        card_id: bytes | None = None,
        changed_since: Instant | None = None,
        dry_run: bool = False,
    ) -> Iterator[pb.SyncResponse]:
        """Brings the stores in line: iterate over its progress, the last of which has `done`.

        Args:
            source: "postgres" writes to Redis what Postgres says; "redis" counts the cards of which
                Redis holds transactions that Postgres lacks.
            card_id: this card alone.
            changed_since: cards with a transaction ingested since.
            dry_run: compare and count, and write nothing.

        Raises:
            TallyError: one of its narrow classes.
        """
        if source not in ("postgres", "redis"):
            raise ValueError(f"source is postgres or redis, not {source!r}")
        direction = (
            pb.SYNC_DIRECTION_POSTGRES_TO_REDIS
            if source == "postgres"
            else pb.SYNC_DIRECTION_REDIS_TO_POSTGRES
        )
        request = pb.SyncRequest(direction=direction, dry_run=dry_run)
        if card_id is not None:
            request.card_id = taking.card_id(card_id) or b""
        elif changed_since is not None:
            request.changed_since.CopyFrom(to_timestamp(changed_since, "changed_since"))
        call = self._features.Sync(request, metadata=self._with["metadata"])
        return _narrowed(call, self._address)

    def catalog(self) -> catalog_pb2.Catalog:
        """Every feature's definition."""
        with _narrow_errors(self._address):
            response: pb.GetCatalogResponse = self._features.GetCatalog(
                pb.GetCatalogRequest(), **self._with
            )
        return response.catalog

    def status(self) -> admin_pb.GetStatusResponse:
        """What the installation is doing."""
        with _narrow_errors(self._address):
            response: admin_pb.GetStatusResponse = self._admin.GetStatus(
                admin_pb.GetStatusRequest(), **self._with
            )
        return response

    def close(self) -> None:
        """Closes the connection: calls under way, and later ones, end with ClientStateError."""
        self._is_closed = True
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
    """Talks to the feature service from one event loop: the one that uses it first."""

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """Connects when first used. Arguments as Client's."""
        super().__init__(address, config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: Any = None
        self._stubs: tuple[Any, Any] = (None, None)

    @property
    def _features(self) -> Any:
        self._connect()
        return self._stubs[0]

    @property
    def _admin(self) -> Any:
        self._connect()
        return self._stubs[1]

    def _connect(self) -> None:
        """Has a channel on the running loop."""
        if self._is_closed:
            raise ClientStateError(CLOSED)
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            tls, options = self._config.tls, self._channel_options()
            self._channel = (
                grpc.aio.secure_channel(self._address, _credentials(tls), options)
                if tls
                else grpc.aio.insecure_channel(self._address, options)
            )
            self._stubs = FeatureServiceStub(self._channel), AdminServiceStub(self._channel)
        elif self._loop is not loop:
            raise ClientStateError(_OTHER_LOOP)

    @contextmanager
    def _narrow_errors(self) -> Iterator[None]:
        """As the function, and a call that `close` ended is no cancelled task."""
        try:
            with _narrow_errors(self._address):
                yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and not (task and task.cancelling()):
                raise ClientStateError(CLOSED) from None
            raise

    async def _narrowed(self, responses: AsyncIterator[Response]) -> AsyncIterator[Response]:
        """A stream whose errors are ours."""
        with self._narrow_errors():
            async for response in responses:
                yield response

    async def online(
        self,
        rows: Iterable[Row],
        features: Sequence[str] = (),
        *,
        complete_through: Instant | None = None,
    ) -> OnlineFeatures:
        """As Client.online."""
        request = online_request(rows, features, complete_through)
        with self._narrow_errors():
            return OnlineFeatures.from_message(
                await self._features.GetOnlineFeatures(request, **self._with)
            )

    async def historical_batches(
        self,
        points: Points | TimeRange,
        features: Sequence[str] = (),
        *,
        labels_as_of: Instant | None = None,
        rows_together: int = ROWS_TOGETHER,
        separator: str = ",",
    ) -> AsyncAnswers:
        """As Client.historical_batches: `async for` over what is returned."""
        question = Question.about(points, features, labels_as_of, rows_together, separator)
        call = self._features.GetHistoricalFeatures(
            question.messages_later(), metadata=self._with["metadata"]
        )
        responses = self._narrowed(call)
        try:
            with question.errors():
                header = (await anext(responses)).header
        except BaseException:
            await asyncio.to_thread(question.close)
            raise
        return AsyncAnswers(question, responses, header)

    async def catalog(self) -> catalog_pb2.Catalog:
        """As Client.catalog."""
        with self._narrow_errors():
            response: pb.GetCatalogResponse = await self._features.GetCatalog(
                pb.GetCatalogRequest(), **self._with
            )
        return response.catalog

    async def status(self) -> admin_pb.GetStatusResponse:
        """As Client.status."""
        with self._narrow_errors():
            response: admin_pb.GetStatusResponse = await self._admin.GetStatus(
                admin_pb.GetStatusRequest(), **self._with
            )
        return response

    async def close(self) -> None:
        """Closes the connection: calls under way, and later ones, end with ClientStateError.

        Raises:
            ClientStateError: another event loop, which still runs, uses it.
        """
        if self._loop not in (None, asyncio.get_running_loop()) and not self._loop.is_closed():
            raise ClientStateError(_OTHER_LOOP)
        self._is_closed = True
        if self._loop is asyncio.get_running_loop():
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
