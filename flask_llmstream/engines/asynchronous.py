"""The engine: a queue in front of a backend, and workers that empty it."""

from __future__ import annotations

import atexit
import weakref
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..core.lifecycle import State, state_after
from ..exceptions import (
    ConfigurationError,
    EngineClosedError,
    LLMStreamError,
    ServerShutdownError,
)
from ..typing import ANYONE
from .admission import BackpressurePolicy, PriorityQueue, QueueShares
from .execution import Execution
from .handle import cancelled_by_id
from .ledger import Ledger
from .queue_admission import QueueAdmission
from .run import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.messages import InferenceRequest, InferenceResponse
    from ..typing import TokenCallback
    from .batching import BatchLimits
    from .handle import InferenceHandle

__all__ = ["AsyncInferenceEngine"]

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
        if not any(callable(getattr(backend, name, None)) for name in ("generate", "submit")):
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
        self._has_priorities = priorities
        self._policy = _read_policy(backpressure)
        self._queue_size = queue_size
        self._identity_queue_share = identity_queue_share
        self._make_execution = partial(
            Execution,
            backend,
            worker_threads=worker_threads,
            kind=kind,
            stuck_seconds=stuck_seconds,
            batch_limits=batch_limits,
        )
        self._make_admission = partial(
            QueueAdmission,
            policy=self._policy,
            queue_size=queue_size,
            block_timeout_seconds=block_timeout_seconds,
        )
        self._after_fork()
        runtime.after_fork(self)
        _engines.add(self)

    def _after_fork(self) -> None:
        # Guards everything below, and every run's state and priority.
        self._lock = runtime.allocate_lock()
        self._live: dict[str, set[Run]] = {}
        self._ledger = Ledger()
        self._waiting = PriorityQueue()
        self._shares = QueueShares(self._identity_queue_share, self._queue_size)
        self._drained: set[Callable[[], None]] = set()
        self._resolving = 0  # Runs that are booked, their handles about to resolve.
        self._execution = self._make_execution(
            lock=self._lock,
            ledger=self._ledger,
            waiting=self._waiting,
            shares=self._shares,
            admit_blocked=self._admit_blocked,
        )
        self._admission = self._make_admission(
            lock=self._lock,
            ledger=self._ledger,
            waiting=self._waiting,
            shares=self._shares,
            execution=self._execution,
            enqueue=self._enqueue,
            settle=self._settle,
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
        self._admission.admit(run, admit_until)
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
        self._admission.admit(run, deadline_at)
        return run.handle

    def _enqueue(self, run: Run) -> Callable[[], None] | None:
        """Under the lock: *run* has its place. What to call after the lock."""
        self._ledger.move(run, State.WAITING)
        self._live.setdefault(run.handle.request_id, set()).add(run)
        if run.deadline_at != inf:
            run.timer = runtime.clock.call_at(run.deadline_at, run.on_deadline)
        return self._execution.enqueue(run)

    def _admit_blocked(self) -> None:
        """Under the lock: there may be room in the queue."""
        self._admission.admit_blocked()

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
        elif before is State.RUNNING and (effect := self._execution.leave(run, error)):
            effects.append(effect)
        self._admit_blocked()
        return effects

    # Looking and steering.

    def cancel(self, request_id: str, *, identity: Any = ANYONE) -> bool:
        """End every live request with this id and *identity*; False where there is none."""
        with self._lock:
            runs = tuple(self._live.get(request_id, ()))
        own = [run for run in runs if identity is ANYONE or run.request.identity == identity]
        # Another may have been quicker, or the answer's own end.
        ended = [run.end(cancelled_by_id()) for run in own]
        return any(ended)

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
            ledger = self._ledger.copy()
            waiting, blocked = len(self._waiting), len(self._admission.blocked)
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
            ledger = self._ledger.copy()
            busy, stuck = self._execution.occupied, self._execution.pool.stuck
        capacity = self._execution.capacity
        return {"busy": busy, "stuck": stuck, "capacity": capacity, **ledger.totals()}

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
        self._execution.read_backend()
        with self._lock:
            self._admit_blocked()
            wakes = self._execution.wake()
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
        return self._admission.refusal is None and not self._execution.is_exhausted

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
        self._admission.close(error)

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
            effects = self._execution.pool.close()
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
        return self._execution.pool.in_backend > 0


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
