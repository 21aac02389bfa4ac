"""Smaller shapes of the stream job, to be compared with the whole one. Runs in Flink's environment:
`python -m tests.bench.shapes parse`, or `redis`; starts at the topics' beginning.

    parse   reads Kafka and turns values into facts, and no more
    redis   and appends them to ledgers and computes all features, without Postgres
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import pandas as pd
import redis
from pyflink.table.udf import ScalarFunction

import stream_job.worker  # noqa: F401 (comes first: numba is imported as it has to be there)
from stream_job.pipeline import environment, run
from stream_job.settings import StreamSettings

COUNT_KEY = "bench events"


class Shape(ScalarFunction):  # type: ignore[misc]  # PyFlink is not here
    """Takes transactions of the contract's format, counts them in Redis, and writes no letters."""

    def __init__(self, with_redis: bool) -> None:
        self._with_redis = with_redis

    def open(self, function_context: Any) -> None:
        """Called once in the process that calls `eval`."""
        from ingest.events import decode_transactions
        from stores.redis_store import OnlineStore
        from stream_job.applier import append_and_compute

        settings = StreamSettings()
        self._online = OnlineStore(settings.store_urls()[0])
        self._form = settings.stream_format
        self._card_id = settings.load_card_key().card_id
        self._decode, self._compute = decode_transactions, append_and_compute

    def is_deterministic(self) -> bool:
        """As of the whole job."""
        return False

    def eval(
        self,
        topic: pd.Series,
        partition: pd.Series,
        offset: pd.Series,
        append_time: pd.Series,
        value: pd.Series,
    ) -> pd.Series:
        """None for each event (n,)."""
        facts, _ = self._decode(value.tolist(), self._form, self._card_id, datetime.now(UTC))
        if self._with_redis:
            self._compute(facts.transactions, self._online)
        client: redis.Redis = self._online.redis
        client.incrby(COUNT_KEY, len(value))
        return pd.Series([None] * len(value), dtype=object)


def main() -> None:
    """Runs the shape that is named."""
    run(environment(StreamSettings(), group=f"bench {sys.argv[1]}"), Shape(sys.argv[1] == "redis"))


if __name__ == "__main__":
    from tests.bench import shapes  # by this name workers find the class, and not as __main__

    shapes.main()
