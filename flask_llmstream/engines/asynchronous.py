"""The engine: a queue in front of a backend, and workers that empty it."""

from __future__ import annotations

import atexit
import weakref
from copy import copy
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..core.lifecycle import State, state_after
from ..exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    LLMStreamError,
    QueueFullError,
    RequestDroppedError,
    ServerShutdownError,
    TooManyRequestsError,
)
from ..typing import ANYONE
from .admission import BackpressurePolicy, PriorityQueue, QueueShares, ServiceRate
from .batching import Batch, run_batch
from .callers import caller_of
from .handle import cancelled_by_id
from .ledger import Ledger
from .pool import WorkerPool
from .run import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.messages import InferenceRequest, InferenceResponse
    from ..typing import TokenCallback, WorkerKind
    from .batching import BatchLimits
    from .handle import InferenceHandle
    from .pool import Worker

__all__ = ["AsyncInferenceEngine"]

DEFAULT_MAX_CONCURRENCY = 256
FINALIZER_WAIT_SECONDS = 0.05
"""Longer than anybody holds a lock; see `AsyncInferenceEngine._settle`."""


class AsyncInferenceEngine:
    """
    Runs requests on a backend: admission, priorities, deadlines, cancel.

    Args:
        backend: A `Backend` or a `CallbackBackend`.
        worker_threads: Requests worked on at a time, ≥ 1; greenlets where the backend's
            ``worker`` is ``"greenlet"`` and the process is patched. At most
            the backend's ``max_concurrency``, where it has one; a callback backend has that
            alone (256 by default).
        queue_size: Requests that may wait, ≥ 0; those being worked on do not count.
        priorities: False treats all alike, first come first served.
        backpressure: What a full queue does.
        block_timeout_seconds: How long BLOCK may hold a submitter; None until the
            request's deadline.
        identity_queue_share: Which part of `queue_size` the requests of one identity may
            fill, above 0; at least one of them may wait. 1 is no limit, and those of no
            identity have none.
        stuck_seconds: This long after its cancel a worker counts as stuck.
        batch_limits: Answer waiting non-streaming requests together, where the backend
            has ``generate_batch``; None never does.

    Raises:
        ConfigurationError: A value is out of range, or *backend* is none.

    Thread safety: every method, from any thread or greenlet. In a forked child the engine
    starts empty.
    """

    def __init__(
        self,
        backend: Any,
        *,
        worker_threads: int = 2,
        queue_size: int = 1000,
        priorities: bool = True,
        backpressure: BackpressurePolicy | str = BackpressurePolicy.BLOCK,
        block_timeout_seconds: float | None = None,
        identity_queue_share: float = 1.0,
        stuck_seconds: float = 30.0,
        batch_limits: BatchLimits | None = None,
    ) -> None:
        self._takes_callbacks = callable(getattr(backend, "submit", None))
        if not self._takes_callbacks and not callable(getattr(backend, "generate", None)):
            raise ConfigurationError(
                f"{type(backend).__name__} is no backend: it has neither generate() nor submit()."
            )
        kind: Any = getattr(backend, "worker", "thread")
        if kind not in ("thread", "greenlet"):
            raise ConfigurationError(
                f'A backend\'s worker must be "thread" or "greenlet", not {kind!r}.'
            )
        for name, value, least in (
            ("worker_threads", worker_threads, 1),
            ("queue_size", queue_size, 0),
            ("block_timeout_seconds", block_timeout_seconds, 0),
            ("stuck_seconds", stuck_seconds, 0),
        ):
            if value is not None and value < least:
                raise ConfigurationError(f"{name} must be at least {least}, not {value!r}.")
        self.backend = backend
        self._kind: WorkerKind = kind
        self._worker_threads = worker_threads
        self._queue_size = queue_size
        self._has_priorities = priorities
        self._policy = _read_policy(backpressure)
        self._block_timeout_seconds = block_timeout_seconds
        self._stuck_seconds = stuck_seconds
        self._identity_queue_share = identity_queue_share
        self._batch_limits = None if self._takes_callbacks else batch_limits
        self._read_backend()
        self._after_fork()
        runtime.after_fork(self)
        _engines.add(self)

    def _read_backend(self) -> None:
        self._can_batch = hasattr(self.backend, "generate_batch")
        limit: int | None = getattr(self.backend, "max_concurrency", None)
        # A callback backend holds no worker: one thread hands requests over.
        self._capacity: int = (
            limit or DEFAULT_MAX_CONCURRENCY
            if self._takes_callbacks
            else min(self._worker_threads, limit or self._worker_threads)
        )

    def _after_fork(self) -> None:
        # Guards everything below, and every run's state and priority.
        self._lock = runtime.allocate_lock()
        self._waiting = PriorityQueue()
        self._blocked = PriorityQueue()
        self._live: dict[str, set[Run]] = {}
        self._ledger = Ledger()
        self._given = 0  # Requests that a callback backend holds, cancelled ones included.
        self._rate = ServiceRate()
        self._shares = QueueShares(self._identity_queue_share, self._queue_size)
        self._refusal: EngineClosedError | None = None
        self._drained: set[Callable[[], None]] = set()
        self._resolving = 0  # Runs that are booked, their handles about to resolve.
        self._open_batch: Batch | None = None  # Incomplete: a worker waits for more.
        self._pool = WorkerPool(
            self._lock,
            limit=1 if self._takes_callbacks else self._worker_threads,
            kind="thread" if self._takes_callbacks else self._kind,
            take=self._take,
            work=self._work,
        )

    # Submitting.

    def submit(
        self,
        request: InferenceRequest,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> InferenceHandle:
        """
        Queue *request*. With a `stream_callback` of its own it is a stream.

        Args:
            request: Stays as it is; a copy runs.
            priority: Higher is sooner; 0 takes the request's own.
            timeout_seconds: Total budget from now; the request's deadline counts too.

        Raises:
            QueueFullError: No place, as the backpressure policy has it.
            TooManyRequestsError: Its identity's share of the queue is full.
            DeadlineExceededError: The budget is spent already.
            EngineClosedError: The engine is shut down, or all its workers are stuck.
        """
        return self._submit(request, None, priority, timeout_seconds)

    def submit_streaming(
        self,
        request: InferenceRequest,
        token_callback: TokenCallback,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> InferenceHandle:
        """
        Queue *request*; *token_callback* gets choice 0's text as it is produced, on the
        producing worker, and ``("", True)`` exactly once, last. See `submit`.
        """
        return self._submit(request, token_callback, priority, timeout_seconds)

    def submit_async(
        self,
        request: InferenceRequest,
        callback: Callable[[InferenceResponse | LLMStreamError], Any],
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> str:
        """
        Queue *request*; *callback* gets the answer or the error, once, on a thread of
        its own kind. See `submit`.

        Returns:
            The request id, for `cancel`.
        """
        handle = self._submit(request, None, priority, timeout_seconds)
        handle.deliver(callback)
        return handle.request_id

    def submit_shared(
        self, request: InferenceRequest, *, priority: int = 0, admit_until: float = inf
    ) -> Run:
        """
        Queue a non-streaming *request* that several callers will wait for. It has no
        deadline: it runs until it is done or cancelled.

        Args:
            request: Stays as it is; a copy runs.
            priority: Higher is sooner.
            admit_until: Monotonic: how long to wait for a place in the queue.

        Raises:
            LLMStreamError: As `submit`.
        """
        run = Run(request, settle=self._settle, priority=priority if self._has_priorities else 0)
        self._admit(run, admit_until)
        return run

    def _submit(
        self,
        request: InferenceRequest,
        token_callback: TokenCallback | None,
        priority: int,
        timeout_seconds: float | None,
    ) -> InferenceHandle:
        deadline_at = inf if request.deadline is None else request.deadline.at
        if timeout_seconds is not None:
            deadline_at = min(deadline_at, monotonic() + timeout_seconds)
        run = Run(
            request,
            settle=self._settle,
            token_callback=token_callback,
            priority=(priority or request.priority) if self._has_priorities else 0,
            deadline_at=deadline_at,
        )
        self._admit(run, deadline_at)
        return run.handle

    def _admit(self, run: Run, deadline_at: float) -> None:
        dropped: Run | None = None
        wake: Callable[[], None] | None = None
        error: LLMStreamError | None = None
        is_blocked = False
        caller = None if self._shares.most is None else caller_of(run.request.identity)
        with self._lock:
            self._ledger.open(run)
            if monotonic() >= deadline_at:
                error = DeadlineExceededError("The request's deadline had passed on arrival.")
            elif self._refusal is not None:
                error = copy(self._refusal)
            elif self._is_exhausted:
                error = EngineClosedError(
                    "Every worker of this model is stuck in its backend.",
                    retry_after=self._stuck_seconds,
                )
            elif not (caller is None or self._has_worker_free() or self._shares.enter(run, caller)):
                error = self._share_full(self._shares.waiting_of(caller))
            elif not self._has_room():
                if self._policy is BackpressurePolicy.BLOCK and self._block_timeout_seconds != 0:
                    is_blocked = True
                    self._blocked.push(run)
                elif self._policy is BackpressurePolicy.DROP_OLDEST:
                    dropped = self._waiting.oldest_of_lowest()
                    if dropped is None or dropped.priority > run.priority:
                        dropped, error = None, self._queue_full()
                else:
                    error = self._queue_full()
            if dropped is not None:
                # Out at once, booked or not: the next newcomer must find another one.
                self._waiting.remove(dropped)
                self._shares.leave(dropped)
                if not dropped.claim():
                    dropped = None  # It is ending anyway.
            if error is not None:
                self._refuse(run, error)
            elif not is_blocked:
                wake = self._enqueue(run)
        if error is not None:
            raise error
        if is_blocked:
            self._wait_for_place(run, deadline_at)
            return
        try:
            try:
                if wake is not None:
                    wake()
            finally:
                if dropped is not None:
                    self._settle(
                        dropped, RequestDroppedError("The request made room for a newer one.")
                    )
        except BaseException:
            # No thread to be had, or a final token call that stops this one: the caller
            # gets no handle, so nobody waits for the answer.
            run.cancel()
            raise

    def _has_room(self) -> bool:
        # A worker that has not taken its run yet has a place for it all the same.
        return len(self._waiting) + self._occupied() < self._queue_size + self._capacity

    def _has_worker_free(self) -> bool:
        """Whether a request would start at once: it needs no place in the queue."""
        return len(self._waiting) + self._occupied() < self._capacity

    def _occupied(self) -> int:
        return self._given if self._takes_callbacks else self._pool.busy

    @property
    def _is_exhausted(self) -> bool:
        return self._pool.lost >= self._capacity

    def _queue_full(self) -> QueueFullError:
        waiting = len(self._waiting)
        return QueueFullError(
            f"The queue is full: {waiting} requests are waiting.",
            retry_after=self._rate.seconds_to_drain(waiting, self._capacity),
        )

    def _share_full(self, own: int) -> TooManyRequestsError:
        others = max(0, len(self._waiting) + len(self._blocked) - own)
        return TooManyRequestsError(
            f"You have {own} requests waiting, as many as one caller may have.",
            # By then the first of its own has started, were they all the last.
            retry_after=self._rate.seconds_to_drain(others, self._capacity),
        )

    def _refuse(self, run: Run, error: LLMStreamError) -> None:
        run.claim()
        self._shares.leave(run)
        self._ledger.move(run, State.REJECTED, error)

    def _enqueue(self, run: Run) -> Callable[[], None] | None:
        self._ledger.move(run, State.WAITING)
        self._live.setdefault(run.handle.request_id, set()).add(run)
        if run.deadline_at != inf:
            run.timer = runtime.clock.call_at(run.deadline_at, run.on_deadline)
        batch = self._open_batch
        if batch is not None and not self._waiting and batch.add(run):
            self._start(run)
            return batch.parker.unpark if batch.is_full and batch.parker is not None else None
        self._waiting.push(run)
        return self._pool.wake_one()

    def _wait_for_place(self, run: Run, deadline_at: float) -> None:
        """Park the submitter until its run has a place; whoever frees one hands it over."""
        timeout = self._block_timeout_seconds
        until = deadline_at
        if timeout is not None:
            until = min(until, monotonic() + timeout)
        error: LLMStreamError | None = None
        try:
            parker = run.parker = runtime.make_parker()
            while run.state is State.SUBMITTED and monotonic() < until:
                parker.park(until)
        except RuntimeError:
            error = self._withdraw(run)  # On the hub, which cannot wait.
        except BaseException:
            # The submitter is being killed: it must not leave a request behind.
            if self._withdraw(run) is None:
                run.cancel()
            raise
        else:
            error = self._withdraw(run)
        if error is not None:
            raise error

    def _withdraw(self, run: Run) -> LLMStreamError | None:
        """Take *run* back where it was not admitted; why it is refused."""
        with self._lock:
            if self._blocked.remove(run):
                error = self._queue_full()
                self._refuse(run, error)
                return error
            if run.state is State.REJECTED:
                return copy(self._refusal)
        return None

    # Working, on the pool's workers.

    def _take(self) -> tuple[Run, ...]:
        """Under the lock."""
        if self._occupied() >= self._capacity:
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
        """Under the lock: add what waits, in its order."""
        while (run := self._waiting.peek()) is not None and not run.is_over and batch.add(run):
            self._waiting.remove(run)
            self._start(run)

    def _admit_blocked(self) -> None:
        """Under the lock: hand free places to blocked submitters, the highest priority first."""
        while self._has_room() and (run := self._blocked.pop()) is not None:
            wake = self._enqueue(run)
            # Waking is only an append and a release: allowed under the lock. A submitter
            # that has not published its parker yet looks at the state before it parks.
            if run.parker is not None:
                run.parker.unpark()
            if wake is not None:
                runtime.clock.call_soon(wake)

    def _work(self, worker: Worker) -> None:
        runs = worker.runs
        if self._takes_callbacks:
            runs[0].start_callbacks(self.backend, self._give_back)
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
            generate_batch = getattr(self.backend, "generate_batch", None)
        if generate_batch is not None:
            run_batch(generate_batch, worker.runs)
            return
        for run in worker.runs:
            run.generate(self.backend)

    def _give_back(self) -> None:
        """A callback backend has nothing more to do for one of its requests."""
        with self._lock:
            self._given -= 1
            self._admit_blocked()
            wake = self._pool.wake_one() if self._waiting else None
        if wake is not None:
            wake()

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

    # Ending.

    def _settle(self, run: Run, error: LLMStreamError | None) -> None:
        """Book the end of *run*, which the caller has claimed, and resolve its handle."""
        # A finalizer may end a run while this very thread is inside the lock: it waits a
        # moment, which is longer than anybody holds it, then leaves the rest to the clock.
        outcome = run.outcome(error)
        if isinstance(outcome, LLMStreamError):
            error = outcome
        if not self._lock.acquire(True, FINALIZER_WAIT_SECONDS):
            run.handle.publish(outcome)
            runtime.clock.call_soon(partial(self._settle_later, run, error))
            return
        try:
            effects = self._retire(run, error)
        finally:
            self._lock.release()
        run.handle.publish(outcome)
        self._tell_resolved()
        # Last: a token callback among them may take its time, or raise.
        for effect in effects:
            effect()

    def _settle_later(self, run: Run, error: LLMStreamError | None) -> None:
        with self._lock:
            effects = self._retire(run, error)
        self._tell_resolved()
        for effect in effects:
            effect()

    def _tell_resolved(self) -> None:
        """A handle is resolved: who waits for completion may find that it was the last."""
        drained: set[Callable[[], None]] = set()
        with self._lock:
            self._resolving -= 1
            if self._is_drained:
                drained, self._drained = self._drained, drained
        for tell in drained:
            tell()

    @property
    def _is_drained(self) -> bool:
        """Under the lock."""
        return not self._live and not self._resolving

    def _retire(self, run: Run, error: LLMStreamError | None) -> list[Callable[[], Any]]:
        """Under the lock: the books. What to call after the lock."""
        self._resolving += 1
        effects: list[Callable[[], Any]] = []
        same_id = self._live.get(run.handle.request_id, set())
        if run not in same_id:
            return effects  # From before a fork: the parent's books have it.
        before, after = run.state, state_after(error)
        if before is State.RUNNING and after is State.DROPPED:
            after = State.FAILED  # A backend raised what another engine's queue had said.
        self._shares.leave(run)
        self._ledger.move(run, after, error)
        if run.timer is not None:
            run.timer.cancel()
        same_id.discard(run)
        if not same_id:
            del self._live[run.handle.request_id]
        if before is State.WAITING:
            self._waiting.remove(run)
            effects.append(run.finish_waiting)
        elif before is State.RUNNING:
            if error is None and run.started_at is not None:
                self._rate.add(monotonic() - run.started_at)
            if self._takes_callbacks:
                effects.append(run.finish_detached)
            elif error is not None and run.worker is not None:
                run.stuck_timer = runtime.clock.call_at(
                    monotonic() + self._stuck_seconds, partial(self._check_stuck, run.worker, run)
                )
        self._admit_blocked()
        return effects

    def _check_stuck(self, worker: Worker, run: Run) -> None:
        wake: Callable[[], None] | None = None
        with self._lock:
            # A batch is not stuck while one of its requests is still wanted.
            if (
                run in worker.runs
                and not worker.is_stuck
                and all(each.is_over for each in worker.runs)
            ):
                wake = self._pool.mark_stuck(worker)
                self._admit_blocked()
        if wake is not None:
            wake()

    # Looking and steering.

    def cancel(self, request_id: str, *, identity: Any = ANYONE) -> bool:
        """End every live request with this id and *identity*; False where there is none."""
        with self._lock:
            runs = tuple(self._live.get(request_id, ()))
        own = [run for run in runs if identity is ANYONE or run.request.identity == identity]
        for run in own:
            run.cancel(cancelled_by_id())
        return bool(own)

    def reprioritize(self, request_id: str, priority: int) -> bool:
        """Move a waiting request; False where none with this id waits."""
        moved = False
        with self._lock:
            for run in self._live.get(request_id, ()):
                if self._has_priorities and self._waiting.remove(run):
                    run.priority = priority
                    self._waiting.push(run)
                    moved = True
        return moved

    def queue_stats(self) -> dict[str, Any]:
        """Requests ``waiting``, ``running``, ``blocked``, ``queue_size``, and the totals."""
        with self._lock:
            ledger, waiting, blocked = self._ledger.copy(), len(self._waiting), len(self._blocked)
        return {
            "waiting": waiting,
            "running": ledger.count(State.RUNNING),
            "blocked": blocked,
            "queue_size": self._queue_size,
            **ledger.totals(),
        }

    def worker_stats(self) -> dict[str, Any]:
        """Workers ``busy`` and ``stuck``, their ``capacity``, and the totals."""
        with self._lock:
            ledger, busy, stuck = self._ledger.copy(), self._occupied(), self._pool.stuck
        return {"busy": busy, "stuck": stuck, "capacity": self._capacity, **ledger.totals()}

    def request_stats(self) -> dict[str, dict[str, Any]]:
        """What became of the requests, by model; see `LLMStream.stats` for the figures."""
        with self._lock:
            ledger = self._ledger.copy()
        return ledger.figures()

    def count_refusal(self, request: InferenceRequest, error: LLMStreamError) -> None:
        """Somebody refused *request* on this engine's behalf, with *error*."""
        with self._lock:
            self._ledger.refuse(request.model, error)

    def backend_changed(self) -> None:
        """Look anew whether the backend takes batches, and its ``max_concurrency``."""
        self._read_backend()
        wakes: list[Callable[[], None]] = []
        with self._lock:
            self._admit_blocked()
            while len(wakes) < len(self._waiting) and (wake := self._pool.wake_one()) is not None:
                wakes.append(wake)
        for wake in wakes:
            wake()

    def backend_for(self, model: str) -> Any:  # noqa: ARG002 - one backend for all
        """What generates for *model*."""
        return self.backend

    @property
    def backpressure(self) -> BackpressurePolicy:
        """What a full queue does."""
        return self._policy

    @property
    def is_available(self) -> bool:
        """Whether `submit` would take a request at all, a full queue aside."""
        return self._refusal is None and not self._is_exhausted

    # Going away.

    def wait_for_completion(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing waits or runs; False where the time ran out first."""
        until = inf if timeout_seconds is None else monotonic() + timeout_seconds
        parker = runtime.make_parker()
        try:
            while True:
                with self._lock:
                    if self._is_drained:
                        return True
                    self._drained.add(parker.unpark)
                if monotonic() >= until:
                    return False
                parker.park(until)
        finally:
            with self._lock:
                self._drained.discard(parker.unpark)

    def refuse(self, error: EngineClosedError) -> None:
        """Take no more requests; what is pending goes on."""
        blocked: list[Run] = []
        with self._lock:
            self._refusal = self._refusal or error
            while (run := self._blocked.pop()) is not None:
                self._refuse(run, self._refusal)
                blocked.append(run)
        for run in blocked:
            if run.parker is not None:
                run.parker.unpark()

    def end_all(self, error: LLMStreamError) -> None:
        """End everything pending, with *error*."""
        with self._lock:
            left = [run for runs in self._live.values() for run in runs]
        for run in left:
            run.end(error)

    def shutdown(self, *, timeout_seconds: float | None = 30.0) -> None:
        """
        Refuse new requests, finish what is pending, then end the rest.

        Args:
            timeout_seconds: How long to finish; what is left gets EngineClosedError.
        """
        self.refuse(EngineClosedError("The engine is shut down."))
        self.wait_for_completion(timeout_seconds)
        self.end_all(EngineClosedError("The engine was shut down."))
        with self._lock:
            effects = self._pool.close()
        for effect in effects:
            effect()

    def _leave(self) -> None:
        """The interpreter exits: end everything now."""
        error = ServerShutdownError("The server is shutting down.")
        self.refuse(error)
        self.end_all(error)
        self.shutdown(timeout_seconds=0)

    @property
    def is_in_backend(self) -> bool:
        """Whether any worker is inside its backend, stuck ones included."""
        return self._pool.in_backend > 0


def _read_policy(value: BackpressurePolicy | str) -> BackpressurePolicy:
    try:
        return BackpressurePolicy(value)
    except ValueError:
        allowed = ", ".join(policy.value for policy in BackpressurePolicy)
        raise ConfigurationError(f"backpressure must be one of {allowed}, not {value!r}.") from None


_engines: weakref.WeakSet[AsyncInferenceEngine] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    """Native code that still decodes while the interpreter goes away would crash it."""
    engines = list(_engines)
    for engine in engines:
        engine._leave()
    until = monotonic() + 2.0
    while monotonic() < until and any(engine.is_in_backend for engine in engines):
        runtime.sleep(0.01)
