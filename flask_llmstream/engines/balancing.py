"""Several backends of one model, offered to an engine as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from functools import partial
from itertools import chain
from math import inf
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import runtime
from ..core.messages import InferenceResponse
from ..exceptions import (
    AccessError,
    ConfigurationError,
    DeadlineExceededError,
    EngineError,
    RequestCancelledError,
    RequestError,
)
from .asynchronous import DEFAULT_MAX_CONCURRENCY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.messages import InferenceRequest, Item
    from ..typing import Emit, WorkerKind

__all__ = ["BalancedBackend", "LoadBalanceStrategy"]

_logger = logging.getLogger("flask_llmstream.engine")

T = TypeVar("T")

_LONGEST_OUT_SECONDS = 60.0
_RESPONSE_TIME_WEIGHT = 0.2
_SHOWS_IN_OUTPUT = frozenset({"tools", "n", "logprobs"})
"""What a backend that does not say what it ``supports`` is trusted with."""
_NOT_ITS_FAULT = (RequestError, AccessError, DeadlineExceededError, RequestCancelledError)
_END = object()


class LoadBalanceStrategy(Enum):
    """Which of a model's backends gets the next request."""

    LEAST_LOADED = "least_loaded"
    """The one with the fewest calls under way; of several, the one that waited longest."""
    ROUND_ROBIN = "round_robin"
    """Each in its turn."""
    RESPONSE_TIME_WEIGHTED = "response_time_weighted"
    """In proportion to how fast each begins to answer, and to how few calls it has."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        allowed = ", ".join(repr(strategy.value) for strategy in cls)
        raise ConfigurationError(f"load_balance must be one of {allowed}, not {value!r}.")


class _Member:
    """
    One backend, and what is known of it.

    Attributes:
        under_way: Its calls. Taking one out of a set is atomic, so that it needs no lock
            and a finalizer may do it, any number of times.
        failures: In a row; 0 is a backend that is in.
        retry_at: Monotonic: when one that is out is asked again.
        seconds: How long it takes to its first item, as an exponential average.
        turn: The number of its latest call.
        credit: What RESPONSE_TIME_WEIGHTED owes it, in calls.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.takes_callbacks = callable(getattr(backend, "submit", None))
        if not self.takes_callbacks and not callable(getattr(backend, "generate", None)):
            raise ConfigurationError(
                f"{type(backend).__name__} is no backend: it has neither generate() nor submit()."
            )
        self.worker: WorkerKind = getattr(backend, "worker", "thread")
        self.takes_batches = callable(getattr(backend, "generate_batch", None))
        self.supports: Iterable[str] | None = getattr(backend, "supports", None)
        limit: int | None = getattr(backend, "max_concurrency", None)
        self.limit: float = limit or (DEFAULT_MAX_CONCURRENCY if self.takes_callbacks else inf)
        self.under_way: set[_Attempt] = set()
        self.failures = 0
        self.retry_at = 0.0
        self.seconds: float | None = None
        self.turn = 0
        self.credit = 0.0

    @property
    def has_room(self) -> bool:
        return len(self.under_way) < self.limit


class _Attempt:
    """
    One call of one backend.

    Attributes:
        is_probe: It asks a backend that is out, and is still without a verdict.
        has_emitted: Something came: from here on nobody else may be asked.
    """

    __slots__ = ("has_emitted", "is_probe", "member", "started_at")

    def __init__(self, member: _Member, *, is_probe: bool, started_at: float) -> None:
        self.member = member
        self.is_probe = is_probe
        self.started_at = started_at
        self.has_emitted = False

    @property
    def is_open(self) -> bool:
        return self in self.member.under_way

    def close(self) -> None:
        """It is over. Any number of times, from any thread, finalizers included."""
        self.member.under_way.discard(self)
        if self.is_probe:
            # Without a verdict (cancelled, say): the next request is the probe.
            self.member.retry_at = self.started_at

    def __iter__(self) -> Iterator[Any]:
        # What a stream's chain asks for more when the answer's items have run out.
        self.close()
        return iter(())


class _Stream(chain[Any]):
    """
    The items of one attempt whose first one has been taken out already.

    Iterating it costs no Python frame an item. Closing it closes what the backend
    returned: a generator ends on the thread that closes it.
    """

    attempt: _Attempt
    source: Any

    def close(self) -> None:
        try:
            _close(self.source)
        finally:
            self.attempt.close()

    def __del__(self) -> None:
        self.attempt.close()


class BalancedBackend:
    """
    Hands each request to one of several backends of the same model.

    A backend that fails before its first item, other than by the request's own fault, is
    taken out and the request goes to the next one. It is probed again with one request at
    a time, after 1 s to 60 s, twice as long each time. Where all are out, the one whose
    time comes first is asked anyway.

    Args:
        backends: At least one; all of them callback backends or none, all of one
            ``worker`` kind.
        strategy: Who is next.

    Attributes:
        worker: The backends' kind.
        supports: What all of them do; not there where none of them says.
        max_concurrency: What all of them may be given together; not there where one has
            no limit. A backend above its own limit is passed over while another one is
            not.
        generate_batch: There where all of them have it.
        submit: There where they are callback backends.

    Raises:
        ConfigurationError: *backends* is empty or mixed.

    Thread safety: every method, from any thread or greenlet. In a forked child nothing is
    under way.
    """

    worker: WorkerKind
    supports: frozenset[str]
    max_concurrency: int
    generate_batch: Callable[[Sequence[InferenceRequest]], Sequence[InferenceResponse]]
    submit: Callable[[InferenceRequest, Emit], Callable[[], Any]]

    def __init__(
        self,
        backends: Iterable[Any],
        *,
        strategy: LoadBalanceStrategy | str = LoadBalanceStrategy.LEAST_LOADED,
    ) -> None:
        self._strategy = LoadBalanceStrategy(strategy)
        self._members = tuple[_Member, ...]()
        self._turns = 0
        self._lock = runtime.allocate_lock()  # Guards the members, and what is known of each.
        for backend in backends:
            self.add(backend)
        if not self._members:
            raise ConfigurationError("A BalancedBackend needs at least one backend.")
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()
        for member in self._members:
            member.under_way = set()

    def __repr__(self) -> str:
        return f"<BalancedBackend of {len(self._members)}, {self._strategy.value}>"

    @property
    def backends(self) -> tuple[Any, ...]:
        return tuple(member.backend for member in self._members)

    def add(self, backend: Any) -> None:
        """
        Balance over *backend*, too; no effect where it is there already.

        An engine that runs on this one is to be told: `backend_changed`.

        Raises:
            ConfigurationError: It is no backend, or does not go with the others.
        """
        member = _Member(backend)
        with self._lock:
            members = self._members
            if any(each.backend is backend for each in members):
                return
            if members and members[0].takes_callbacks != member.takes_callbacks:
                raise ConfigurationError(
                    "One model's backends must all be callback backends, or none: "
                    f"{type(backend).__name__} is not like the others."
                )
            if members and members[0].worker != member.worker:
                raise ConfigurationError(
                    f"One model's backends must all have one worker kind: {members[0].worker!r}, "
                    f"not {member.worker!r} as {type(backend).__name__} has."
                )
            self._members = (*members, member)
            self._advertise()

    def remove(self, backend: Any) -> None:
        """
        Give *backend* no more requests; what it has goes on.

        Raises:
            ConfigurationError: It is not there, or the only one.
        """
        with self._lock:
            members = tuple(each for each in self._members if each.backend is not backend)
            if members == self._members:
                raise ConfigurationError(f"{type(backend).__name__} is none of these backends.")
            if not members:
                raise ConfigurationError(
                    "The only backend of a model cannot be removed. Unregister the model."
                )
            self._members = members
            self._advertise()

    def _advertise(self) -> None:
        """Under the lock: be what the members are together."""
        members = self._members
        offers: dict[str, Any] = {"worker": members[0].worker}
        if any(member.supports is not None for member in members):
            offers["supports"] = frozenset.intersection(
                *(
                    _SHOWS_IN_OUTPUT if member.supports is None else frozenset(member.supports)
                    for member in members
                )
            )
        limit = sum(member.limit for member in members)
        if limit != inf:
            offers["max_concurrency"] = int(limit)
        if members[0].takes_callbacks:
            offers["submit"] = self._submit
        elif all(member.takes_batches for member in members):
            offers["generate_batch"] = self._generate_batch
        for name in ("supports", "max_concurrency", "generate_batch", "submit"):
            self.__dict__.pop(name, None)
        self.__dict__.update(offers)

    def check_ready(self) -> None:
        """
        Whether one of the backends is ready, by its own ``check_ready`` where it has one.

        Raises:
            LLMStreamError: What the last of them said.
        """
        last: Exception | None = None
        for backend in self.backends:
            check = getattr(backend, "check_ready", None)
            if check is None:
                return
            try:
                check()
            except Exception as error:
                last = error
            else:
                return
        if last is not None:
            raise last

    def statistics(self) -> list[dict[str, Any]]:
        """For each backend: its ``name``, calls ``under_way``, ``failures``, ``seconds``."""
        with self._lock:
            return [
                {
                    "name": type(member.backend).__name__,
                    "under_way": len(member.under_way),
                    "failures": member.failures,
                    "seconds": member.seconds,
                }
                for member in self._members
            ]

    # Generating, on an engine's worker.

    def generate(self, request: InferenceRequest) -> Any:
        """What the chosen backend returns; see `Backend`."""

        def start(attempt: _Attempt) -> Any:
            result = attempt.member.backend.generate(self._watched(request, attempt))
            if _is_iterable(result):
                return self._begin_stream(attempt, result)
            if not attempt.has_emitted and not request.cancelled:
                self._succeed(attempt)
            attempt.close()
            return result

        return self._try_each(start, lambda: request.cancelled)

    def _watched(self, request: InferenceRequest, attempt: _Attempt) -> InferenceRequest:
        """*request* for *attempt*, with a callback that notices the first item."""
        emit = request.stream_callback
        if emit is None:
            return request

        def notice(item: Item) -> bool:
            if not attempt.has_emitted:
                self._succeed(attempt)
            return emit(item)

        return replace(request, stream_callback=notice)

    def _generate_batch(self, requests: Sequence[InferenceRequest]) -> Any:
        def start(attempt: _Attempt) -> Any:
            responses = attempt.member.backend.generate_batch(requests)
            self._succeed(attempt)
            attempt.close()
            return responses

        def is_over() -> bool:
            return all(request.cancelled for request in requests)

        return self._try_each(start, is_over, in_batches=True)

    def _begin_stream(self, attempt: _Attempt, result: Iterable[Item]) -> Iterator[Item] | None:
        iterator = iter(result)
        try:
            first = next(iterator, _END)
        except BaseException:
            _close(result)
            raise
        if not attempt.has_emitted:
            self._succeed(attempt)
        if first is _END:
            _close(result)
            attempt.close()
            return None
        stream = _Stream((first,), iterator, attempt)
        stream.attempt = attempt
        stream.source = result
        return stream

    def _try_each(
        self,
        start: Callable[[_Attempt], T],
        is_over: Callable[[], bool],
        *,
        in_batches: bool = False,
    ) -> T:
        tried: list[_Member] = []
        attempt = self._pick(tried, in_batches=in_batches)
        while attempt is not None:
            try:
                return start(attempt)
            except BaseException as error:
                attempt = self._next_after(
                    attempt, error, tried, is_over=is_over, in_batches=in_batches
                )
                if attempt is None:
                    raise
        raise EngineError("None of the model's backends takes batches any more.")

    def _next_after(
        self,
        attempt: _Attempt,
        error: BaseException,
        tried: list[_Member],
        *,
        is_over: Callable[[], bool],
        in_batches: bool = False,
    ) -> _Attempt | None:
        """Who is asked after *attempt* failed; None where the error is for the caller."""
        member = attempt.member
        if (
            attempt.has_emitted
            or not isinstance(error, Exception)
            or isinstance(error, _NOT_ITS_FAULT)
            or is_over()
        ):
            attempt.close()
            return None
        self._fail(attempt)
        attempt.close()
        tried.append(member)
        following = self._pick(tried, in_batches=in_batches)
        if following is not None:
            # Without a next one it is the caller's, who logs it.
            runtime.log(
                _logger,
                logging.WARNING,
                "A backend (%s) failed; another one (%s) is asked.",
                type(member.backend).__name__,
                type(following.member.backend).__name__,
                error=error,
            )
        return following

    # A callback backend's part.

    def _submit(self, request: InferenceRequest, emit: Emit) -> Callable[[], None]:
        call = _CallbackCall(self, request, emit)
        call.submit(self._pick([]))
        return call.cancel

    # Choosing.

    def _pick(self, tried: Sequence[_Member], *, in_batches: bool = False) -> _Attempt | None:
        """Open an attempt at a member that has not been *tried*; None where there is none."""
        now = monotonic()
        with self._lock:
            members = [
                member
                for member in self._members
                if member not in tried and (member.takes_batches or not in_batches)
            ]
            if not members:
                return None
            member = _due(members, now)
            is_probe = member is not None
            if member is None:
                healthy = [member for member in members if not member.failures]
                if healthy:
                    free = [member for member in healthy if member.has_room]
                    member = self._choose(free or healthy)
                else:
                    member = min(members, key=_retry_at)
            else:
                # One probe at a time, unless it says nothing for so long.
                member.retry_at = now + _LONGEST_OUT_SECONDS
            self._turns += 1
            member.turn = self._turns
            attempt = _Attempt(member, is_probe=is_probe, started_at=now)
            member.under_way.add(attempt)
        return attempt

    def _choose(self, members: Sequence[_Member]) -> _Member:
        if self._strategy is LoadBalanceStrategy.LEAST_LOADED:
            return min(members, key=lambda member: (len(member.under_way), member.turn))
        if self._strategy is LoadBalanceStrategy.ROUND_ROBIN:
            return min(members, key=lambda member: member.turn)
        return _choose_by_weight(members)

    def _succeed(self, attempt: _Attempt) -> None:
        """The first item came, or the whole answer."""
        seconds = monotonic() - attempt.started_at
        attempt.has_emitted = True
        attempt.is_probe = False
        member = attempt.member
        with self._lock:
            member.failures = 0
            before = seconds if member.seconds is None else member.seconds
            member.seconds = before + _RESPONSE_TIME_WEIGHT * (seconds - before)

    def _fail(self, attempt: _Attempt) -> None:
        """Take the backend out, for longer each time."""
        now = monotonic()
        member = attempt.member
        is_probe, attempt.is_probe = attempt.is_probe, False
        with self._lock:
            # Those that were under way as it went out say nothing new.
            if is_probe or not member.failures:
                member.failures += 1
                longest = min(_LONGEST_OUT_SECONDS, 2.0**member.failures)
                member.retry_at = now + uniform(longest / 2, longest)


class _CallbackCall:
    """One request of a callback backend, at one member after the other."""

    __slots__ = ("_balanced", "_cancels", "_emit", "_request", "_tried")

    def __init__(self, balanced: BalancedBackend, request: InferenceRequest, emit: Emit) -> None:
        self._balanced = balanced
        self._request = request
        self._emit = emit
        self._tried: list[_Member] = []
        self._cancels: list[tuple[_Attempt, Any]] = []

    def submit(self, attempt: _Attempt | None) -> None:
        """Hand the request to *attempt*'s member, or to the next ones; raises the last error."""
        while attempt is not None:
            try:
                cancel = attempt.member.backend.submit(self._request, partial(self.emit, attempt))
            except BaseException as error:
                attempt = self._next_after(attempt, error)
                if attempt is None:
                    raise
            else:
                if attempt.is_open:  # Else it was over before submit() returned.
                    self._cancels.append((attempt, cancel))
                if self._request.cancelled:
                    self.cancel()
                return

    def emit(self, attempt: _Attempt, item: Item | BaseException) -> bool:
        """What a member calls, on its own threads."""
        if not attempt.is_open:
            return False
        if isinstance(item, BaseException):
            following = self._next_after(attempt, item)
            if following is None:
                return self._emit(item)
            try:
                self.submit(following)
            except BaseException as error:
                self._emit(error)
            return False
        if not attempt.has_emitted:
            self._balanced._succeed(attempt)
        goes_on = self._emit(item)
        if not goes_on:
            attempt.close()
        return goes_on

    def cancel(self) -> None:
        """Idempotent."""
        while self._cancels:
            try:
                attempt, cancel = self._cancels.pop()
            except IndexError:
                return
            attempt.close()
            if callable(cancel):
                cancel()

    def _next_after(self, attempt: _Attempt, error: BaseException) -> _Attempt | None:
        return self._balanced._next_after(
            attempt, error, self._tried, is_over=lambda: self._request.cancelled
        )


def _retry_at(member: _Member) -> float:
    return member.retry_at


def _due(members: Iterable[_Member], now: float) -> _Member | None:
    """The member that is out and is to be probed."""
    due = [member for member in members if member.failures and member.retry_at <= now]
    return min(due, key=_retry_at, default=None)


def _choose_by_weight(members: Sequence[_Member]) -> _Member:
    """
    Smooth weighted round robin: all get their share, in small portions, so that also the
    average of a slow one stays fresh. Who has not answered yet counts as the fastest.
    """
    known = [member.seconds for member in members if member.seconds is not None]
    fastest = min(known, default=1.0)
    weights = [
        1
        / (max(fastest if member.seconds is None else member.seconds, 1e-6))
        / (len(member.under_way) + 1)
        for member in members
    ]
    total = sum(weights)
    for member, weight in zip(members, weights, strict=True):
        member.credit += weight / total
    chosen = max(members, key=lambda member: member.credit)
    chosen.credit -= 1
    return chosen


def _is_iterable(result: Any) -> bool:
    """Whether *result* is items to come; what else it may be is for the engine to judge."""
    return isinstance(result, Iterable) and not isinstance(
        result, (str, bytes, Mapping, InferenceResponse)
    )


def _close(result: Any) -> None:
    close = getattr(result, "close", None)
    if close is not None:
        close()
