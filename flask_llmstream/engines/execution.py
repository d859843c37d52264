"""What works on one engine's requests: a backend, and workers that call it."""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..core.lifecycle import State
from .admission import ServiceRate
from .batching import Batch, run_batch
from .pool import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..exceptions import LLMStreamError
    from ..typing import WorkerKind
    from .admission import PriorityQueue, QueueShares
    from .batching import BatchLimits
    from .ledger import Ledger
    from .pool import Worker
    from .run import Run

__all__ = ["DEFAULT_MAX_CONCURRENCY", "Execution"]

DEFAULT_MAX_CONCURRENCY = 256


class Execution:
    """
    Takes requests from a queue and has the backend answer them.

    Args:
        backend: A `Backend` or a `CallbackBackend`.
        worker_threads: See `AsyncInferenceEngine`, as for the other options.
        kind: Of the workers.
        stuck_seconds: This long after its cancel a worker counts as stuck.
        batch_limits: None makes no batches.
        lock: The engine's; it guards everything here.
        ledger: The engine's books.
        waiting: Where the requests come from.
        shares: Who has how many of those.
        admit_blocked: Under the lock: there may be room in the queue now.

    Attributes:
        capacity: How many requests are worked on at a time.
        rate: How fast that goes.
    """

    def __init__(
        self,
        backend: Any,
        *,
        worker_threads: int,
        kind: WorkerKind,
        stuck_seconds: float,
        batch_limits: BatchLimits | None,
        lock: Any,
        ledger: Ledger,
        waiting: PriorityQueue,
        shares: QueueShares,
        admit_blocked: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._takes_callbacks = callable(getattr(backend, "submit", None))
        self._worker_threads = worker_threads
        self.stuck_seconds = stuck_seconds
        self._batch_limits = None if self._takes_callbacks else batch_limits
        self._lock = lock
        self._ledger = ledger
        self._waiting = waiting
        self._shares = shares
        self._admit_blocked = admit_blocked
        self.rate = ServiceRate()
        self._given = 0  # Requests that a callback backend holds, cancelled ones included.
        self._open_batch: Batch | None = None  # Incomplete: a worker waits for more.
        self.pool = WorkerPool(
            lock,
            limit=1 if self._takes_callbacks else worker_threads,
            kind="thread" if self._takes_callbacks else kind,
            take=self._take,
            work=self._work,
        )
        self.read_backend()

    def read_backend(self) -> None:
        """Look whether the backend takes batches, and how many requests at a time."""
        self._can_batch = hasattr(self._backend, "generate_batch")
        limit: int | None = getattr(self._backend, "max_concurrency", None)
        # A callback backend holds no worker: one thread hands requests over.
        self.capacity: int = (
            limit or DEFAULT_MAX_CONCURRENCY
            if self._takes_callbacks
            else min(self._worker_threads, limit or self._worker_threads)
        )

    # Under the lock.

    @property
    def occupied(self) -> int:
        """How many places are taken."""
        return self._given if self._takes_callbacks else self.pool.busy

    @property
    def is_exhausted(self) -> bool:
        """Whether every worker is stuck. Without the lock, too."""
        return self.pool.lost >= self.capacity

    def seconds_to_drain(self, waiting: int) -> float:
        """When *waiting* requests will have started."""
        return self.rate.seconds_to_drain(waiting, self.capacity)

    def enqueue(self, run: Run) -> Callable[[], None] | None:
        """Have *run* worked on in its turn. What to call after the lock."""
        batch = self._open_batch
        if batch is not None and not self._waiting and batch.add(run):
            self._start(run)
            return batch.parker.unpark if batch.is_full and batch.parker is not None else None
        self._waiting.push(run)
        return self.pool.wake_one()

    def wake(self) -> list[Callable[[], None]]:
        """There may be more places than there were. What to call after the lock."""
        wakes: list[Callable[[], None]] = []
        while len(wakes) < len(self._waiting) and (wake := self.pool.wake_one()) is not None:
            wakes.append(wake)
        return wakes

    def leave(self, run: Run, error: LLMStreamError | None) -> Callable[[], None] | None:
        """*run*, which was worked on, is over. What to call after the lock."""
        if error is None and run.started_at is not None:
            self.rate.add(monotonic() - run.started_at)
        if self._takes_callbacks:
            return run.finish_detached
        if error is not None and run.worker is not None:
            run.stuck_timer = runtime.clock.call_at(
                monotonic() + self.stuck_seconds, partial(self._check_stuck, run.worker, run)
            )
        return None

    def _take(self) -> tuple[Run, ...]:
        if self.occupied >= self.capacity:
            return ()
        self._admit_blocked()  # To the place that this worker has just left.
        while (run := self._waiting.pop()) is not None and run.is_over:
            pass  # Whoever claimed it is about to book it.
        if run is None:
            return ()
        self._start(run)
        limits = self._batch_limits
        if limits is None or not self._can_batch or run.is_stream:
            return (run,)
        batch = Batch(limits)
        batch.add(run)
        self._fill(batch)
        if self._open_batch is None and not batch.is_full:
            self._open_batch = batch
        return tuple(batch.runs)

    def _start(self, run: Run) -> None:
        self._shares.leave(run)
        self._ledger.move(run, State.RUNNING)
        run.started_at = monotonic()
        self._given += self._takes_callbacks

    def _fill(self, batch: Batch) -> None:
        """Add what waits, in its order."""
        while (run := self._waiting.peek()) is not None and not run.is_over and batch.add(run):
            self._waiting.remove(run)
            self._start(run)

    # On the pool's workers.

    def _work(self, worker: Worker) -> None:
        runs = worker.runs
        if self._takes_callbacks:
            runs[0].start_callbacks(self._backend, self._give_back)
            return
        limits = self._batch_limits
        generate_batch = None
        if limits is not None and not runs[0].is_stream:
            batch = self._open_batch
            if batch is not None and batch.runs[0] is runs[0]:
                self._keep_open(batch, worker, limits.wait_seconds)
            elif len(runs) > 1:
                with self._lock:
                    self._admit_blocked()  # To the places that a whole batch left.
            generate_batch = getattr(self._backend, "generate_batch", None)
        if generate_batch is not None:
            run_batch(generate_batch, worker.runs)
            return
        for run in worker.runs:
            run.generate(self._backend)

    def _keep_open(self, batch: Batch, worker: Worker, wait_seconds: float) -> None:
        """Wait for *worker*'s batch to become full, at most *wait_seconds*."""
        until = monotonic() + wait_seconds
        parker = batch.parker = runtime.make_parker()
        try:
            while not batch.is_full and monotonic() < until:
                parker.park(until)
        finally:
            with self._lock:
                self._open_batch = None
                self._fill(batch)
                worker.runs = tuple(batch.runs)
                for run in worker.runs:
                    run.worker = worker
                self._admit_blocked()  # To the places that the batch left.

    # On whatever thread.

    def _give_back(self) -> None:
        """A callback backend has nothing more to do for one of its requests."""
        with self._lock:
            self._given -= 1
            self._admit_blocked()
            wake = self.pool.wake_one() if self._waiting else None
        if wake is not None:
            wake()

    def _check_stuck(self, worker: Worker, run: Run) -> None:
        wake: Callable[[], None] | None = None
        with self._lock:
            # A batch is not stuck while one of its requests is still wanted.
            if (
                run in worker.runs
                and not worker.is_stuck
                and all(each.is_over for each in worker.runs)
            ):
                wake = self.pool.mark_stuck(worker)
                self._admit_blocked()
        if wake is not None:
            wake()
