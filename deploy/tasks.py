"""Calls that may take long, on threads of their own, so that the supervisor's loop waits for none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Task(Generic[Result]):
    """A call on a daemon thread: it neither holds up the loop nor the end of the process."""

    def __init__(self, call: Callable[[], Result]) -> None:
        """Begins the call."""
        self._call = call
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="task", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # noqa: BLE001 (raised where the result is asked for)
            self._error = error
        finally:
            self._ended.set()

    def is_done(self, within_s: float = 0.0) -> bool:
        """Whether the call has returned or failed; waits for it for so long."""
        return self._ended.wait(within_s)

    def result(self) -> Result:
        """What the call returned; raises what it raised. Only once it is done."""
        if self._error is not None:
            raise self._error
        return self._result[0]
