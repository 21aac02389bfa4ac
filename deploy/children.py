"""What a supervisor knows of one child, and when it does what: states and instants, no waiting.

    DOWN ──start──▶ STARTING ──ready──▶ UP
     ▲  ◀──failed──┘   │                 │
     └────ended────────┴─────ended───────┘

A child that ends is started again at once, and after pauses that grow where it goes on ending. No
transition depends on another child: what a child needs before it starts is for its own `needs` to say.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from deploy.processes import START_TIMEOUT_S
from deploy.tasks import Task

PAUSE_S_FIRST, PAUSE_S_MAX = 1.0, 30.0
DOUBLED_MAX = 10
STEADY_S = 60.0
"""A child that was up for so long has recovered: its next end is a first one."""
PROBE_PAUSE_S = 0.02


class Phase(Enum):
    """Where a child is in its life."""

    DOWN = auto()
    STARTING = auto()
    UP = auto()


class Readiness(Enum):
    """What a look at a child that starts has found."""

    NOT_YET = auto()
    RECOVERING = auto()
    """It answers that it brings its data back: it gets more time."""
    READY = auto()


@dataclass
class Life:
    """The state of one child. Instants are seconds of one monotonic clock."""

    phase: Phase = Phase.DOWN
    start_at_s: float = 0.0
    """When it may be started, while it is down."""
    overdue_at_s: float = 0.0
    """When a start has taken too long, while it is starting."""
    up_since_s: float = 0.0
    failures: int = 0
    """Ends and failed starts since it last was up for STEADY_S."""

    def may_start(self, now_s: float) -> bool:
        """Whether its pause is over."""
        return self.phase is Phase.DOWN and now_s >= self.start_at_s

    def started(self, now_s: float) -> None:
        """Its process was started."""
        self.phase = Phase.STARTING
        self.overdue_at_s = now_s + START_TIMEOUT_S

    def looked_at(self, found: Readiness, now_s: float) -> None:
        """A look at it, while it is starting, has found something."""
        if found is Readiness.READY:
            self.phase, self.up_since_s = Phase.UP, now_s
        elif found is Readiness.RECOVERING:
            self.overdue_at_s = now_s + START_TIMEOUT_S

    def is_overdue(self, now_s: float) -> bool:
        """Whether its start has taken too long."""
        return self.phase is Phase.STARTING and now_s >= self.overdue_at_s

    def ended(self, now_s: float) -> None:
        """Its process has ended, or could not be started."""
        if self.phase is Phase.UP and now_s - self.up_since_s >= STEADY_S:
            self.failures = 0
        was_up = self.phase is Phase.UP
        self.phase = Phase.DOWN
        self.failures += 1
        is_first = was_up and self.failures == 1
        doubled = min(max(0, self.failures - 2), DOUBLED_MAX)
        pause_s = 0.0 if is_first else min(PAUSE_S_FIRST * 2**doubled, PAUSE_S_MAX)
        self.start_at_s = now_s + pause_s


@dataclass
class Child:
    """One process of the stack, and how it is started, looked at and ended."""

    name: str
    spawn: Callable[[], subprocess.Popen[bytes]]
    """Starts its process and returns at once. On the main thread."""
    halt: Callable[[subprocess.Popen[bytes]], None]
    """Ends its process in order."""
    probe: Callable[[subprocess.Popen[bytes]], Readiness] = lambda process: Readiness.READY
    """Looks at what was started. On a thread of its own; may take long."""
    prepare: Callable[[], None] = lambda: None
    """Makes ready what it needs on disk or elsewhere. On a thread of its own; may take long."""
    needs: Callable[[], bool] = lambda: True
    """Whether what it cannot do without is there."""
    clean_up: Callable[[subprocess.Popen[bytes]], None] = lambda process: None
    """Ends what a process of its that has ended by itself may have left."""
    holds_data: bool = False
    """Whether the stores must be looked at when it was away."""
    process: subprocess.Popen[bytes] | None = None
    life: Life = field(default_factory=Life)
    preparing: Task[None] | None = None
    probing: Task[Readiness] | None = None
    last_answer: str = ""
    """What a look at it has failed by last, behind a colon."""
    complaint: str = ""
    """Why it does not start, as was said last."""

    @property
    def is_up(self) -> bool:
        """Whether it is ready."""
        return self.life.phase is Phase.UP

    def has_ended(self) -> bool:
        """Whether a process of its was started and is no more."""
        return self.life.phase is not Phase.DOWN and (
            self.process is None or self.process.poll() is not None
        )
