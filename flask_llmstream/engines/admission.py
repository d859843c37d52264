"""Who waits, in which order, and who has to go when the queue is full."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from enum import Enum
from typing import TYPE_CHECKING

from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from .run import Run

__all__ = ["BackpressurePolicy", "PriorityQueue", "QueueShares", "ServiceRate"]


class BackpressurePolicy(Enum):
    """
    What a full queue does to a new request.

    It drops or refuses a *queued request*, never a token: a missing token would silently
    corrupt text.
    """

    BLOCK = "block"
    """The submitter waits for a place, in priority order."""
    DROP_OLDEST = "drop_oldest"
    """The oldest of the lowest priority makes room; a newcomer below it is refused."""
    REJECT = "reject"
    """`QueueFullError`, with `retry_after` from the measured service rate."""


class PriorityQueue:
    """
    Runs by priority, first come first served within one.

    A level is an `OrderedDict`, so that taking, removing from the middle and finding the
    oldest of the lowest level are all constant time; the few distinct priorities in use
    are kept sorted.

    Thread safety: none of its own; the engine's lock guards it.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Run, None]] = {}
        self._priorities: list[int] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, run: Run) -> None:
        level = self._levels.get(run.priority)
        if level is None:
            level = self._levels[run.priority] = OrderedDict()
            insort(self._priorities, run.priority)
        level[run] = None
        self._length += 1

    def pop(self) -> Run | None:
        """The oldest of the highest priority."""
        run = self.peek()
        if run is not None:
            self.remove(run)
        return run

    def peek(self) -> Run | None:
        """The oldest of the highest priority, left in its place."""
        return next(iter(self._levels[self._priorities[-1]])) if self._priorities else None

    def oldest_of_lowest(self) -> Run | None:
        return next(iter(self._levels[self._priorities[0]])) if self._priorities else None

    def remove(self, run: Run) -> bool:
        """Take *run* out; False where it is not in."""
        level = self._levels.get(run.priority)
        if level is None or run not in level:
            return False
        del level[run]
        self._length -= 1
        if not level:
            del self._levels[run.priority]
            del self._priorities[bisect_left(self._priorities, run.priority)]
        return True


class QueueShares:
    """
    How many requests of each caller wait, where none of them may fill the whole queue.

    Args:
        share: Which part one caller may fill, one request at least; 1 is no limit.
        queue_size: The whole.

    Attributes:
        most: Requests that one caller may have waiting; None is no limit.

    Raises:
        ConfigurationError: *share* is out of range.

    Thread safety: none of its own; the engine's lock guards it.
    """

    def __init__(self, share: float, queue_size: int) -> None:
        if not 0 < share <= 1:
            raise ConfigurationError(
                f"identity_queue_share must be above 0 and at most 1, not {share!r}."
            )
        # A little more, since 0.29 * 100 is less than 29.
        self.most = None if share == 1 else max(1, int(share * queue_size + 1e-6))
        self._waiting: dict[bytes, int] = {}

    def waiting_of(self, caller: bytes) -> int:
        """How many of *caller*'s wait."""
        return self._waiting.get(caller, 0)

    def enter(self, run: Run, caller: bytes) -> bool:
        """Count *run* among *caller*'s; False where these are as many as may be."""
        waiting = self.waiting_of(caller)
        if self.most is not None and waiting >= self.most:
            return False
        self._waiting[caller] = waiting + 1
        run.caller = caller
        return True

    def leave(self, run: Run) -> None:
        """*run* waits no more. Idempotent; no effect where it was not counted."""
        caller, run.caller = run.caller, None
        if caller is not None:
            self._waiting[caller] -= 1
            if not self._waiting[caller]:
                del self._waiting[caller]


class ServiceRate:
    """
    How fast a queue drains, as an exponential average.

    Thread safety: none of its own; the engine's lock guards it.
    """

    _WEIGHT = 0.2
    _LONGEST_SECONDS = 60.0

    def __init__(self) -> None:
        self._run_seconds: float | None = None

    def add(self, run_seconds: float) -> None:
        """Count a run that took *run_seconds* from its start to its end."""
        before = self._run_seconds
        self._run_seconds = (
            run_seconds if before is None else before + self._WEIGHT * (run_seconds - before)
        )

    def seconds_left(self, run_for: float) -> float:
        """When a run will have ended that began *run_for* seconds ago, between 1 s and 60 s."""
        if self._run_seconds is None:
            return 1.0
        return min(max(1.0, self._run_seconds - run_for), self._LONGEST_SECONDS)

    def seconds_to_drain(self, waiting: int, workers: int) -> float:
        """When *waiting* runs will have started, between 1 s and 60 s."""
        if self._run_seconds is None:
            return 1.0
        seconds = (waiting + 1) * self._run_seconds / workers
        return min(max(1.0, seconds), self._LONGEST_SECONDS)
