"""The workers of one engine: native threads or greenlets, made when there is work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core import runtime
from ..core.runtime import ThreadParker

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..typing import WorkerKind
    from .run import Run

__all__ = ["Worker", "WorkerPool"]


class Worker:
    """One thread or greenlet. `runs` is what it works on now."""

    __slots__ = ("is_replaced", "is_stuck", "parker", "runs")

    def __init__(self) -> None:
        self.parker = ThreadParker()
        self.runs: tuple[Run, ...] = ()
        self.is_stuck = False
        self.is_replaced = False


class WorkerPool:
    """
    Hands runs to workers.

    A worker that is stuck in its backend cannot be stopped: it is replaced, at most
    *limit* times. When it returns it replaces one that is still stuck, or goes away.

    Args:
        lock: The engine's; it guards everything here.
        limit: How many runs are worked on at a time.
        kind: ``greenlet`` makes greenlets where the process has them.
        take: Under the lock: the next runs for a worker, empty where there are none.
        work: Works on what was taken; raises nothing.
    """

    def __init__(
        self,
        lock: Any,
        *,
        limit: int,
        kind: WorkerKind,
        take: Callable[[], tuple[Run, ...]],
        work: Callable[[Worker], None],
    ) -> None:
        self.limit = limit
        self.busy = 0  # Workers that hold one of the places.
        self.in_backend = 0  # All that work, stuck and replaced ones included.
        self.stuck = 0
        self._lock = lock
        self._kind = kind
        self._take = take
        self._work = work
        self._idle: list[Worker] = []
        self._count = 0  # Workers that are there or on their way, but for replaced ones.
        self._replaced = 0
        self._unreplaced: list[Worker] = []  # Stuck, but as many as may be are replaced.
        self._is_closed = False

    # Under the engine's lock.

    @property
    def lost(self) -> int:
        """Places that stuck workers hold, since as many as may be were replaced."""
        return len(self._unreplaced)

    def wake_one(self) -> Callable[[], None] | None:
        """There is a run to take: what to call, after the lock, so that someone does."""
        if self._idle:
            # Each idle worker is taken off once and woken once: no wake-up is left over.
            return self._idle.pop().parker.unpark
        if self._count >= self.limit:
            return None
        self._count += 1
        return self._start

    def mark_stuck(self, worker: Worker) -> Callable[[], None] | None:
        """*worker* ignored its cancel: give its place away. What to call after the lock."""
        worker.is_stuck = True
        self.stuck += 1
        if self._replaced >= self.limit:
            self._unreplaced.append(worker)
            return None
        self._replace(worker)
        return self.wake_one()

    def _replace(self, worker: Worker) -> None:
        worker.is_replaced = True
        self._replaced += 1
        self._count -= 1
        self.busy -= 1

    def _takes_over(self, worker: Worker) -> bool:
        """Whether *worker*, replaced and back, takes the place of one that is still stuck."""
        self._replaced -= 1
        if not self._unreplaced:
            return False
        self._replace(self._unreplaced.pop(0))
        worker.is_replaced = False
        self._count += 1
        return True

    def close(self) -> list[Callable[[], None]]:
        """Let the workers go once they have nothing to take. What to call after the lock."""
        self._is_closed = True
        idle, self._idle = self._idle, []
        return [worker.parker.unpark for worker in idle]

    # The workers' side.

    def _start(self) -> None:
        try:
            if self._kind == "greenlet" and runtime.has_greenlets():
                runtime.spawn_greenlet(self._run_greenlet)
            else:
                runtime.start_thread(self._run_thread)
        except BaseException:
            # The process may have no more threads: the next request tries again.
            with self._lock:
                self._count -= 1
            raise

    def _run_thread(self) -> None:
        worker = Worker()
        while self._take_for(worker, stays=True):
            if worker.runs:
                self._work(worker)
            else:
                worker.parker.park()

    def _run_greenlet(self) -> None:
        # A greenlet is cheaper to make than to keep.
        worker = Worker()
        while self._take_for(worker, stays=False):
            self._work(worker)

    def _take_for(self, worker: Worker, *, stays: bool) -> bool:
        """Give *worker* its next runs; False when it is to go."""
        with self._lock:
            if worker.runs:
                self._put_back(worker)
            if worker.is_replaced and not self._takes_over(worker):
                return False
            runs = self._take()
            if runs:
                worker.runs = runs
                for run in runs:
                    run.worker = worker
                self.busy += 1
                self.in_backend += 1
                return True
            if self._is_closed or not stays:
                self._count -= 1
                return False
            self._idle.append(worker)
            return True

    def _put_back(self, worker: Worker) -> None:
        for run in worker.runs:
            run.worker = None
            if run.stuck_timer is not None:
                run.stuck_timer.cancel()
        worker.runs = ()
        self.in_backend -= 1
        if not worker.is_replaced:
            self.busy -= 1
        if worker.is_stuck:
            worker.is_stuck = False
            self.stuck -= 1
            if not worker.is_replaced:
                self._unreplaced.remove(worker)
