"""The way into one engine's queue: who gets a place, who waits for one, who is refused."""

from __future__ import annotations

from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..core.lifecycle import State
from ..exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    QueueFullError,
    RequestDroppedError,
    TooManyRequestsError,
)
from .admission import BackpressurePolicy, PriorityQueue
from .callers import caller_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..exceptions import LLMStreamError
    from .admission import QueueShares
    from .execution import Execution
    from .ledger import Ledger
    from .run import Run

__all__ = ["QueueAdmission"]


class QueueAdmission:
    """
    Admits requests to a queue of limited size.

    Args:
        policy: What a full queue does.
        queue_size: Requests that may wait; those being worked on do not count.
        block_timeout_seconds: See `AsyncInferenceEngine`.
        lock: The engine's; it guards everything here.
        ledger: The engine's books.
        waiting: The queue.
        shares: Who has how many in it.
        execution: What empties it.
        enqueue: Under the lock: the request has a place. What to call after the lock.
        settle: Ends a request that the caller has claimed.

    Attributes:
        blocked: Those whose submitters wait for a place.
        refusal: Why all are refused; None where they are not.
    """

    def __init__(
        self,
        *,
        policy: BackpressurePolicy,
        queue_size: int,
        block_timeout_seconds: float | None,
        lock: Any,
        ledger: Ledger,
        waiting: PriorityQueue,
        shares: QueueShares,
        execution: Execution,
        enqueue: Callable[[Run], Callable[[], None] | None],
        settle: Callable[[Run, LLMStreamError | None], None],
    ) -> None:
        self._policy = policy
        self._queue_size = queue_size
        self._block_timeout_seconds = block_timeout_seconds
        self._lock = lock
        self._ledger = ledger
        self._waiting = waiting
        self._shares = shares
        self._execution = execution
        self._enqueue = enqueue
        self._settle = settle
        self.blocked = PriorityQueue()
        self.refusal: EngineClosedError | None = None

    def admit(self, run: Run, deadline_at: float) -> None:
        """
        Give *run* a place, as soon as there is one.

        Raises:
            LLMStreamError: It gets none; see `AsyncInferenceEngine.submit`.
        """
        dropped: Run | None = None
        wake: Callable[[], None] | None = None
        error: LLMStreamError | None = None
        is_blocked = False
        caller = None if self._shares.most is None else caller_of(run.request.identity)
        with self._lock:
            self._ledger.open(run)
            if monotonic() >= deadline_at:
                error = DeadlineExceededError("The request's deadline had passed on arrival.")
            elif self.refusal is not None:
                error = copy(self.refusal)
            elif self._execution.is_exhausted:
                error = EngineClosedError(
                    "Every worker of this model is stuck in its backend.",
                    retry_after=self._execution.stuck_seconds,
                )
            elif not (caller is None or self._has_worker_free() or self._shares.enter(run, caller)):
                error = self._share_full(self._shares.waiting_of(caller))
            elif not self._has_room():
                if self._policy is BackpressurePolicy.BLOCK and self._block_timeout_seconds != 0:
                    is_blocked = True
                    self.blocked.push(run)
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

    def close(self, error: EngineClosedError) -> None:
        """Refuse all that have no place yet, with *error*; the first one counts."""
        blocked: list[Run] = []
        with self._lock:
            self.refusal = self.refusal or error
            while (run := self.blocked.pop()) is not None:
                self._refuse(run, self.refusal)
                blocked.append(run)
        for run in blocked:
            if run.parker is not None:
                run.parker.unpark()

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
            if self.blocked.remove(run):
                error = self._queue_full()
                self._refuse(run, error)
                return error
            if run.state is State.REJECTED:
                return copy(self.refusal)
        return None

    # Under the lock.

    def admit_blocked(self) -> None:
        """Hand free places to blocked submitters, the highest priority first."""
        while self._has_room() and (run := self.blocked.pop()) is not None:
            wake = self._enqueue(run)
            # Waking is only an append and a release: allowed under the lock. A submitter
            # that has not published its parker yet looks at the state before it parks.
            if run.parker is not None:
                run.parker.unpark()
            if wake is not None:
                runtime.clock.call_soon(wake)

    def _has_room(self) -> bool:
        # A worker that has not taken its run yet has a place for it all the same.
        execution = self._execution
        return len(self._waiting) + execution.occupied < self._queue_size + execution.capacity

    def _has_worker_free(self) -> bool:
        """Whether a request would start at once: it needs no place in the queue."""
        execution = self._execution
        return len(self._waiting) + execution.occupied < execution.capacity

    def _queue_full(self) -> QueueFullError:
        waiting = len(self._waiting)
        return QueueFullError(
            f"The queue is full: {waiting} requests are waiting.",
            retry_after=self._execution.seconds_to_drain(waiting),
        )

    def _share_full(self, own: int) -> TooManyRequestsError:
        others = max(0, len(self._waiting) + len(self.blocked) - own)
        return TooManyRequestsError(
            f"You have {own} requests waiting, as many as one caller may have.",
            # By then the first of its own has started, were they all the last.
            retry_after=self._execution.seconds_to_drain(others),
        )

    def _refuse(self, run: Run, error: LLMStreamError) -> None:
        run.claim()
        self._shares.leave(run)
        self._ledger.move(run, State.REJECTED, error)
