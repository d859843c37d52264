"""Answering identical requests once: while they run together, and for a while after."""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict, defaultdict
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from ..core import runtime
from ..core.messages import InferenceRequest, InferenceResponse
from ..exceptions import (
    DeadlineExceededError,
    LLMStreamError,
    QueueFullError,
    RequestCancelledError,
)
from ..typing import ANYONE
from .asynchronous import FINALIZER_WAIT_SECONDS
from .handle import InferenceHandle, Progress, cancelled_by_id

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from ..core.clock import Timer
    from .asynchronous import AsyncInferenceEngine
    from .run import Run

__all__ = ["Deduplicator", "Key", "ResponseCache", "dedup_key"]

Key: TypeAlias = "Hashable"

_COMPLETE = frozenset({"stop", "length", "tool_calls"})
"""Finish reasons of whole answers; one that a filter cut short is not worth keeping."""

# Every field that can change the answer, so also one that is added later. What compares
# (see the class) does, but for who asks when and how the answer travels.
_KEY_FIELDS = tuple(
    each.name
    for each in fields(InferenceRequest)
    if each.compare and each.name not in ("request_id", "stream", "priority")
)


def dedup_key(request: InferenceRequest) -> Key | None:
    """
    What two requests have in common exactly where one answer serves both: identity,
    model, prompt or messages, every sampling field, tools, metadata, and the context that
    the backend runs under.

    None where the request holds what has no canonical form, an identity that is an ORM
    object say. Hashing and comparing a key runs no user code.
    """
    identity = request.identity
    values = [getattr(request, name) for name in _KEY_FIELDS]
    try:
        # msgpack, not JSON, which has one form for several values: bytes and text, nan
        # and null. The type, since two classes of one shape may name different people.
        encoded = msgspec.msgpack.encode(
            [type(identity).__module__, type(identity).__qualname__, *values], order="sorted"
        )
    except Exception:
        return None
    return sha256(encoded).digest(), request.run_context


class ResponseCache:
    """
    The latest answers, the least recently used given up first.

    Args:
        size: Answers; 0 keeps none.
        ttl_seconds: How long one is good.

    Thread safety: none of its own; the deduplicator's lock guards it.
    """

    def __init__(self, size: int, ttl_seconds: float) -> None:
        self._size = size
        self._ttl_seconds = ttl_seconds
        self._entries: OrderedDict[Key, tuple[float, InferenceResponse]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> InferenceResponse | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        expires_at, response = entry
        if monotonic() >= expires_at:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return response

    def put(self, key: Key, response: InferenceResponse) -> None:
        """Keep *response*, where it is a whole answer; nobody else may hold it."""
        if all(choice.finish_reason in _COMPLETE for choice in response.choices):
            self._entries[key] = (monotonic() + self._ttl_seconds, response)
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)


class _Flight:
    """
    One run and all who wait for it. Guarded by the deduplicator's lock.

    Attributes:
        run: None until the engine has taken it.
        parkers: Of those who came before that.
        has_landed: Its outcome is being handed out: nobody can leave it any more.
    """

    __slots__ = ("engine", "has_landed", "key", "parkers", "priority", "run", "waiters")

    def __init__(self, key: Key, engine: AsyncInferenceEngine, priority: int) -> None:
        self.key = key
        self.engine = engine
        self.priority = priority
        self.run: Run | None = None
        self.waiters: set[_Waiter] = set()
        self.parkers: list[runtime.Parker] = []
        self.has_landed = False


class _Waiter:
    """
    One caller's share in a flight.

    Attributes:
        identity: Who waits; it is part of the flight's key.
        joined_at: Monotonic; None for the one whose request it is that runs.
    """

    __slots__ = ("_claims", "flight", "handle", "identity", "joined_at", "priority", "timer")

    def __init__(
        self, flight: _Flight, handle: InferenceHandle, identity: Any, priority: int
    ) -> None:
        self.flight = flight
        self.handle = handle
        self.identity = identity
        self.priority = priority
        self.joined_at: float | None = None
        self.timer: Timer | None = None
        self._claims = [True]

    def claim(self) -> bool:
        """Whether the caller is the one who ends this wait."""
        try:
            self._claims.pop()  # Atomic.
        except IndexError:
            return False
        if self.timer is not None:
            self.timer.cancel()
        return True


class Deduplicator:
    """
    Has identical requests run once, and remembers the answers.

    Each caller has a handle, a deadline and a cancel of its own: one who leaves never
    stops the others, and the run is cancelled when the last one has left.

    Args:
        size: Answers to remember; 0 none, and requests still run together.
        ttl_seconds: For how long.

    Thread safety: every method, from any thread or greenlet. In a forked child it starts
    empty.
    """

    def __init__(self, *, size: int, ttl_seconds: float) -> None:
        self._size = size
        self._ttl_seconds = ttl_seconds
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()  # Guards everything below.
        self._cache = ResponseCache(self._size, self._ttl_seconds)
        self._flights: dict[Key, _Flight] = {}
        self._waiters: dict[str, set[_Waiter]] = {}
        self._served: defaultdict[str, Counter[str]] = defaultdict(Counter)  # By model.

    def submit(
        self, engine: AsyncInferenceEngine, key: Key, request: InferenceRequest, *, priority: int
    ) -> InferenceHandle:
        """
        A handle to the remembered answer, to the run that is under way, or to a new one.

        Args:
            engine: Runs it.
            key: `dedup_key` of *request*.
            request: Not a stream; its deadline is this caller's alone.
            priority: A joiner's raises that of the run.

        Raises:
            LLMStreamError: As `AsyncInferenceEngine.submit`.
        """
        deadline_at = inf if request.deadline is None else request.deadline.at
        if monotonic() >= deadline_at:
            raise _refused(
                engine,
                request,
                DeadlineExceededError("The request's deadline had passed on arrival."),
            )
        request_id = request.request_id or secrets.token_hex(12)
        parker: runtime.Parker | None = None
        while True:
            waiter: _Waiter | None = None
            is_higher = False
            with self._lock:
                response = self._cache.get(key)
                flight = self._flights.get(key)
                if response is not None:
                    self._served[request.model]["cache_hits"] += 1
                elif flight is None:
                    self._served[request.model]["cache_misses"] += 1
                    flight = self._flights[key] = _Flight(key, engine, priority)
                    break
                elif flight.run is not None:
                    self._served[request.model]["joined"] += 1
                    waiter = self._board(flight, flight.run, request_id, priority, deadline_at)
                    waiter.joined_at = monotonic()
                    is_higher = priority > flight.priority
                    flight.priority = max(priority, flight.priority)
                elif parker is not None:
                    flight.parkers.append(parker)
            if response is not None:
                return _resolved(request_id, response)
            if waiter is not None:
                if is_higher:
                    _reprioritize(waiter.flight)
                return waiter.handle
            # Whoever was first is just submitting it, or is held up by a full queue. If
            # that one is refused, this one tries.
            if parker is None:
                parker = runtime.make_parker()
                continue
            try:
                parker.park(deadline_at)
            except RuntimeError:
                # On the hub, which cannot wait: on its own, then.
                return engine.submit(request, priority=priority)
            if monotonic() >= deadline_at:
                error = QueueFullError("The queue is full.", retry_after=1.0)
                raise _refused(engine, request, error)
        return self._lead(flight, request, request_id, deadline_at)

    def _lead(
        self, flight: _Flight, request: InferenceRequest, request_id: str, deadline_at: float
    ) -> InferenceHandle:
        """Have the engine run *request* for the whole *flight*."""
        run: Run | None = None
        try:
            # Under an id of its own, so that this caller's cancel does not end the run for
            # the others.
            shared = replace(request, request_id=f"{request_id}.{secrets.token_hex(4)}")
            run = flight.engine.submit_shared(
                shared, priority=flight.priority, admit_until=deadline_at
            )
            with self._lock:
                flight.run = run
                waiter = self._board(flight, run, request_id, flight.priority, deadline_at)
        finally:
            with self._lock:
                if run is None:
                    self._close(flight)
                parkers, flight.parkers = flight.parkers, []
            for parker in parkers:
                parker.unpark()
        run.handle.add_done_callback(partial(self._land, flight, run))
        return waiter.handle

    def _board(
        self, flight: _Flight, run: Run, request_id: str, priority: int, deadline_at: float
    ) -> _Waiter:
        """Under the lock: one more who waits."""

        def leave(reason: LLMStreamError | None) -> None:
            self._leave(waiter, reason or RequestCancelledError("The request was cancelled."))

        handle = InferenceHandle(
            request_id,
            cancel=leave,
            text=lambda: run.handle.text,
            progress=lambda: _progress_of(run, waiter),
        )
        waiter = _Waiter(flight, handle, run.request.identity, priority)
        flight.waiters.add(waiter)
        self._waiters.setdefault(request_id, set()).add(waiter)
        if deadline_at != inf:
            error = DeadlineExceededError("The request's deadline passed.")
            waiter.timer = runtime.clock.call_at(deadline_at, partial(handle.cancel, error))
        return waiter

    # Leaving and landing.

    def _leave(self, waiter: _Waiter, error: LLMStreamError) -> None:
        """One caller's end before the run's: any thread, finalizers included."""
        if not waiter.claim():
            return
        # As in the engine: a finalizer may be here while this thread is inside the lock.
        if self._lock.acquire(True, FINALIZER_WAIT_SECONDS):
            try:
                deserted = self._forget(waiter)
            finally:
                self._lock.release()
            if deserted is not None:
                deserted.handle.cancel(error)
        else:
            runtime.clock.call_soon(partial(self._leave_later, waiter, error))
        waiter.handle.publish(error)

    def _leave_later(self, waiter: _Waiter, error: LLMStreamError) -> None:
        with self._lock:
            deserted = self._forget(waiter)
        if deserted is not None:
            deserted.handle.cancel(error)

    def _forget(self, waiter: _Waiter) -> Run | None:
        """Under the lock: the run, where nobody waits for it now, nor can any more."""
        flight = waiter.flight
        flight.waiters.discard(waiter)
        self._forget_id(waiter)
        if flight.waiters or flight.has_landed:
            return None
        self._close(flight)
        return flight.run

    def _land(self, flight: _Flight, run: Run) -> None:
        """The run is over: hand its outcome to all who wait."""
        outcome = run.handle.outcome
        with self._lock:
            flight.has_landed = True
            is_wanted = self._close(flight)
            if is_wanted and isinstance(outcome, InferenceResponse):
                self._cache.put(flight.key, outcome)
            waiters, flight.waiters = flight.waiters, set()
            for waiter in waiters:
                self._forget_id(waiter)
        for waiter in waiters:
            if waiter.claim() and outcome is not None:
                waiter.handle.publish(_share(outcome, waiter, run))

    def _close(self, flight: _Flight) -> bool:
        """Under the lock: let nobody join any more; False where that was so already."""
        if self._flights.get(flight.key) is not flight:
            return False
        del self._flights[flight.key]
        return True

    def _forget_id(self, waiter: _Waiter) -> None:
        same_id = self._waiters.get(waiter.handle.request_id)
        if same_id is not None:
            same_id.discard(waiter)
            if not same_id:
                del self._waiters[waiter.handle.request_id]

    # Looking and steering.

    def cancel(self, request_id: str, *, identity: Any = ANYONE) -> bool:
        """End the wait of every caller with this id and *identity*; False without one."""
        with self._lock:
            waiters = tuple(self._waiters.get(request_id, ()))
        own = [each for each in waiters if identity is ANYONE or each.identity == identity]
        for waiter in own:
            waiter.handle.cancel(cancelled_by_id())
        return bool(own)

    def reprioritize(self, request_id: str, priority: int) -> bool:
        """
        Give waiting requests with this id another priority. A run has the highest of all
        who wait for it. False where no such run is in a queue.
        """
        with self._lock:
            waiters = tuple(self._waiters.get(request_id, ()))
            for waiter in waiters:
                waiter.priority = priority
                flight = waiter.flight
                flight.priority = max(each.priority for each in flight.waiters)
        # All of them, not only up to the first that moved.
        return sum(_reprioritize(waiter.flight) for waiter in waiters) > 0

    def clear(self) -> None:
        """Forget every answer; those under way are for who waits already, and not kept."""
        fresh = ResponseCache(self._size, self._ttl_seconds)
        with self._lock:
            # Swapped, not emptied: constant time, and what goes away goes after the lock.
            before = self._cache, self._flights
            self._cache, self._flights = fresh, {}
        del before

    def statistics(self) -> dict[str, int]:
        """``cache_size``, ``cache_hits``, ``cache_misses``, ``joined``, ``in_flight``."""
        with self._lock:
            served: Counter[str] = sum(self._served.values(), Counter())
            return {
                "cache_size": len(self._cache),
                "cache_hits": served["cache_hits"],
                "cache_misses": served["cache_misses"],
                "joined": served["joined"],
                "in_flight": len(self._flights),
            }

    def request_stats(self) -> dict[str, dict[str, int]]:
        """``joined`` and ``cache_hits`` by model: whom no run of their own served."""
        with self._lock:
            return {
                model: {name: served[name] for name in ("joined", "cache_hits")}
                for model, served in self._served.items()
            }


def _refused(
    engine: AsyncInferenceEngine, request: InferenceRequest, error: LLMStreamError
) -> LLMStreamError:
    """*error*, in the engine's books."""
    engine.count_refusal(request, error)
    return error


def _reprioritize(flight: _Flight) -> bool:
    """Have the engine know *flight*'s priority; False where the run does not wait."""
    moved = False
    while flight.run is not None:
        priority = flight.priority
        moved = flight.engine.reprioritize(flight.run.handle.request_id, priority)
        if priority == flight.priority:
            break  # Else another one raised it meanwhile, and may have been overtaken.
    return moved


def _share(
    outcome: InferenceResponse | LLMStreamError, waiter: _Waiter, run: Run
) -> InferenceResponse | LLMStreamError:
    """*run*'s outcome as *waiter*'s own."""
    if not isinstance(outcome, InferenceResponse):
        return outcome
    if waiter.joined_at is None:
        return replace(outcome, request_id=waiter.handle.request_id)
    return _replayed(outcome, waiter.handle.request_id, waiter.joined_at - run.submitted_at)


def _progress_of(run: Run, waiter: _Waiter) -> Progress:
    """*run*'s, its times as *waiter* has seen them."""
    tokens, timings = run.handle.progress
    if waiter.joined_at is not None:
        timings = _later(timings, waiter.joined_at - run.submitted_at)
    return Progress(tokens, timings)


def _replayed(
    response: InferenceResponse, request_id: str, late_seconds: float
) -> InferenceResponse:
    """*response* for a caller who came *late_seconds* after its run was submitted."""
    timings = _later(response.timings, late_seconds)
    return replace(response, request_id=request_id, cache_hit=True, timings=timings)


def _later(timings: Mapping[str, float], late_seconds: float) -> dict[str, float]:
    """*timings* from *late_seconds* on."""
    return {name: max(0.0, seconds - late_seconds) for name, seconds in timings.items()}


def _resolved(request_id: str, response: InferenceResponse) -> InferenceHandle:
    """The handle of a caller whom the cache serves."""
    answer = _replayed(response, request_id, inf)
    handle = InferenceHandle(request_id, cancel=lambda _: None, text=lambda: answer.text)
    handle.publish(answer)
    return handle
