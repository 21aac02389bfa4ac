"""What runs in Flink's Python workers: it hands Arrow batches to an Applier."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import structlog
from pyflink.table.udf import FunctionContext, ScalarFunction


@contextmanager
def _print_as_it_was() -> Iterator[None]:
    """PyFlink's workers replace `print` by a method; numba, while it is imported, looks `print` up
    in the module that it says it is of, and fails."""
    replaced = builtins.print
    builtins.print = getattr(getattr(replaced, "__self__", None), "_print", replaced)
    try:
        yield
    finally:
        builtins.print = replaced


with _print_as_it_was():
    from stream_job.applier import Applier, Batch
    from stream_job.settings import StreamSettings

# To Flink's log: that `print` does not take what structlog's own logger gives it.
structlog.configure(
    processors=[
        structlog.stdlib.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=["event"]),
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)


class ApplyEvents(ScalarFunction):  # type: ignore[misc]  # PyFlink is not here
    """A pandas function of events; an Applier of its own for each parallel instance."""

    def open(self, function_context: FunctionContext) -> None:
        """Called once in the process that calls `eval`."""
        self._applier = Applier(StreamSettings())

    def close(self) -> None:
        """Called at the end."""
        self._applier.close()

    def is_deterministic(self) -> bool:
        """It writes: the planner must neither repeat it nor leave it out."""
        return False

    def eval(
        self,
        topic: pd.Series,
        partition: pd.Series,
        offset: pd.Series,
        append_time: pd.Series,
        value: pd.Series,
    ) -> pd.Series:
        """The letter of each event (n,); None where it was applied."""
        append_ms = append_time.dt.as_unit("ms").astype("int64")
        batch = Batch(
            topic.tolist(), partition.tolist(), offset.tolist(), append_ms.tolist(), value.tolist()
        )
        return pd.Series(self._applier.apply(batch), dtype=object)
