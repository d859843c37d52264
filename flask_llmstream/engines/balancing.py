"""Several backends of one model, offered to an engine as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import runtime
from ..core.messages import InferenceResponse
from ..exceptions import (
    AccessError,
    ConfigurationError,
    DeadlineExceededError,
    EngineError,
    LLMStreamError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    UnknownModelError,
    UpstreamError,
)
from ..typing import SHOWN_FEATURES
from .rotation import LoadBalanceStrategy, Member, Rotation, Wait

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeGuard

    from ..core.messages import InferenceRequest, Item
    from ..typing import Emit, WorkerKind
    from .rotation import Attempt

__all__ = ["BalancedBackend", "LoadBalanceStrategy"]

_logger = logging.getLogger("flask_llmstream.engine")

T = TypeVar("T")

_NOT_ITS_FAULT = (RequestError, AccessError, DeadlineExceededError, RequestCancelledError)
_PATIENCE_SECONDS = 60.0
"""Nobody waits longer for backends that are busy: the first token would be too late."""
_SILENT_SECONDS = 10.0
"""A backend that says nothing for so long, until the request's time is over, has failed."""
_END = object()


class _Stream(chain[Any]):
    """
    The items of one attempt whose first one has been taken out already.

    Iterating it costs no Python frame an item. Closing it closes what the backend
    returned: a generator ends on the thread that closes it.
    """

    attempt: Attempt
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
    a time, after 1 s to 60 s, twice as long each time, or when its ``Retry-After`` says.
    Where all are out, the one whose time comes first is asked anyway.

    One that is busy (QueueFullError with `retry_after`) is left alone for so long. Where
    all are, a request waits for the first of them, if its deadline lets it. One that has
    as many requests as it takes gets no more: those that failed elsewhere wait for room,
    the highest priority first.

    Args:
        backends: At least one; all of them callback backends or none, all of one
            ``worker`` kind.
        strategy: Who is next.

    Attributes:
        worker: The backends' kind.
        supports: What all of them do; not there where none of them says.
        max_concurrency: What all of them may be given together; not there where one has
            no limit.
        generate_batch: There where all of them have it.
        submit: There where they are callback backends.
        count_tokens: There where one of them has it.

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
    count_tokens: Callable[[InferenceRequest], int]

    def __init__(
        self,
        backends: Iterable[Any],
        *,
        strategy: LoadBalanceStrategy | str = LoadBalanceStrategy.LEAST_LOADED,
    ) -> None:
        self._rotation = Rotation(LoadBalanceStrategy(strategy))
        for backend in backends:
            self._rotation.add(Member(backend))
        if not self._rotation.members:
            raise ConfigurationError("A BalancedBackend needs at least one backend.")
        self._advertise()

    def __repr__(self) -> str:
        return f"<BalancedBackend of {len(self.backends)}, {self._rotation.strategy.value}>"

    @property
    def backends(self) -> tuple[Any, ...]:
        return tuple(member.backend for member in self._rotation.members)

    def add(self, backend: Any) -> None:
        """
        Balance over *backend*, too; no effect where it is there already.

        An engine that runs on this one is to be told: `backend_changed`.

        Raises:
            ConfigurationError: It is no backend, or does not go with the others.
        """
        self._rotation.add(Member(backend))
        self._advertise()

    def remove(self, backend: Any) -> None:
        """
        Give *backend* no more requests; what it has goes on.

        Raises:
            ConfigurationError: It is not there, or the only one.
        """
        self._rotation.remove(backend)
        self._advertise()

    def _advertise(self) -> None:
        """Be what the members are together."""
        members = self._rotation.members
        offers: dict[str, Any] = {"worker": members[0].worker}
        if any(member.supports is not None for member in members):
            offers["supports"] = frozenset.intersection(
                *(
                    SHOWN_FEATURES if member.supports is None else frozenset(member.supports)
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
        if self._counters():
            offers["count_tokens"] = self._count_tokens
        # What stays is never away, not for a moment: workers look at it.
        self.__dict__.update(offers)
        optional = {"supports", "max_concurrency", "generate_batch", "count_tokens"}
        for name in optional - offers.keys():
            self.__dict__.pop(name, None)
        if members is not self._rotation.members:
            self._advertise()  # Another thread changed them, and may have been overtaken.

    def check_ready(self) -> None:
        """
        Whether one of the backends is ready, by its own ``check_ready`` where it has one.

        Raises:
            UpstreamError: All of them failed lately.
            LLMStreamError: What the last of them said.
        """
        if self._rotation.is_out:
            raise UpstreamError("All of the model's backends failed lately.")
        errors: list[Exception] = []
        for backend in self.backends:
            check = getattr(backend, "check_ready", None)
            if check is None:
                return
            try:
                check()
            except Exception as error:
                errors.append(error)
            else:
                return
        raise errors[-1]

    def statistics(self) -> list[dict[str, Any]]:
        """For each backend: its ``name``, calls ``under_way``, ``failures``, ``seconds``."""
        return self._rotation.statistics()

    # Generating, on an engine's worker.

    def generate(self, request: InferenceRequest) -> Any:
        """What the chosen backend returns; see `Backend`."""

        def start(attempt: Attempt) -> Any:
            result = attempt.member.backend.generate(self._watched(request, attempt))
            if _is_iterable(result):
                stream = _begin(attempt, result)
                if stream is not None:
                    if not attempt.has_emitted:
                        self._rotation.succeed(attempt)
                    return stream
                result = None
            # A backend that returns because it was cancelled has not shown that it works.
            if not attempt.has_emitted and not request.cancelled:
                self._rotation.succeed(attempt)
            attempt.close()
            return result

        return self._try_each(start, (request,))

    def _watched(self, request: InferenceRequest, attempt: Attempt) -> InferenceRequest:
        """*request* for *attempt*, with a callback that notices the first item."""
        emit = request.stream_callback
        if emit is None:
            return request

        def notice(item: Item) -> bool:
            if not attempt.has_emitted:
                self._rotation.succeed(attempt)
            return emit(item)

        return replace(request, stream_callback=notice)

    def _generate_batch(self, requests: Sequence[InferenceRequest]) -> Any:
        def start(attempt: Attempt) -> Any:
            responses = attempt.member.backend.generate_batch(requests)
            self._rotation.succeed(attempt)
            attempt.close()
            return responses

        return self._try_each(start, requests, in_batches=True)

    def _try_each(
        self,
        start: Callable[[Attempt], T],
        requests: Sequence[InferenceRequest],
        *,
        in_batches: bool = False,
    ) -> T:
        tried: list[Member] = []
        error: Exception | None = None
        try:
            while True:
                attempt = self._pick(requests, tried, error, in_batches=in_batches)
                try:
                    return start(attempt)
                except BaseException as exc:
                    if not self._is_for_another(attempt, exc, requests):
                        raise
                    error = exc  # type: ignore[assignment]  # An Exception, as it is for another.
                    if not _says_when(exc):
                        tried.append(attempt.member)
        finally:
            error = None  # Its traceback refers to this frame.

    def _pick(
        self,
        requests: Sequence[InferenceRequest],
        tried: list[Member],
        error: Exception | None,
        *,
        in_batches: bool,
    ) -> Attempt:
        """The next attempt, waited for where it has to be; raises the last *error* without one."""
        rotation = self._rotation
        found = rotation.pick(tried, in_batches=in_batches)
        if isinstance(found, Wait):
            # Who failed before may be back by then.
            tried.clear()
            with rotation.waiting(max(request.priority for request in requests)) as waiter:
                for request in requests:
                    request.on_cancel(waiter.parker.unpark)
                while isinstance(
                    found := rotation.pick(tried, in_batches=in_batches, waiter=waiter), Wait
                ):
                    if all(request.cancelled for request in requests):
                        raise error or RequestCancelledError("The request was cancelled.")
                    if found.is_refused:
                        _check_patience(found.until, requests, error)
                    waiter.parker.park(found.until)
        if found is None:
            raise error or EngineError("None of the model's backends takes batches any more.")
        if error is not None:
            _log_failover(error, found)
        return found

    def _is_for_another(
        self, attempt: Attempt, error: BaseException, requests: Sequence[InferenceRequest]
    ) -> bool:
        """Book how *attempt* failed: whether another backend is asked, or the caller told."""
        is_over = all(request.cancelled for request in requests)
        if (
            not attempt.has_emitted
            and is_over
            and any(request.timed_out for request in requests)
            and monotonic() - attempt.started_at >= _SILENT_SECONDS
        ):
            # Else one that takes requests and never answers would stay in.
            self._rotation.fail(attempt)
        elif attempt.has_emitted or is_over or not _is_its_fault(error):
            pass
        elif _says_when(error):
            self._rotation.refuse(attempt, error.retry_after or 0.0)
            attempt.close()
            return True
        else:
            self._rotation.fail(attempt, retry_after=getattr(error, "retry_after", None))
            attempt.close()
            return True
        attempt.close()
        return False

    # Counting, which is nobody's turn: all of them have the same model.

    def _counters(self) -> list[Callable[[InferenceRequest], int]]:
        found = (getattr(backend, "count_tokens", None) for backend in self.backends)
        return [count for count in found if callable(count)]

    def _count_tokens(self, request: InferenceRequest) -> int:
        *others, last = self._counters()
        for count in others:
            try:
                return count(request)
            except Exception as error:
                if request.cancelled or not _is_its_fault(error):
                    raise
        return last(request)

    # A callback backend's part.

    def _submit(self, request: InferenceRequest, emit: Emit) -> Callable[[], None]:
        call = _CallbackCall(self, request, emit)
        call.submit(self._rotation.pick_now([]))
        return call.cancel


class _CallbackCall:
    """One request of a callback backend, at one member after the other."""

    __slots__ = ("_balanced", "_cancels", "_emit", "_request", "_tried")

    def __init__(self, balanced: BalancedBackend, request: InferenceRequest, emit: Emit) -> None:
        self._balanced = balanced
        self._request = request
        self._emit = emit
        self._tried: list[Member] = []
        self._cancels: list[tuple[Attempt, Any]] = []

    def submit(self, attempt: Attempt | None) -> None:
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

    def emit(self, attempt: Attempt, item: Item | BaseException) -> bool:
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
            self._balanced._rotation.succeed(attempt)
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

    def _next_after(self, attempt: Attempt, error: BaseException) -> Attempt | None:
        """Who is asked after *attempt* failed; None where the error is for the caller."""
        balanced = self._balanced
        if not balanced._is_for_another(attempt, error, (self._request,)):
            return None
        self._tried.append(attempt.member)
        following = balanced._rotation.pick_now(self._tried)
        if following is not None:
            _log_failover(error, following)
        return following


def _is_its_fault(error: BaseException) -> bool:
    """Whether another backend of the model may do better."""
    if not isinstance(error, Exception):
        return False
    return isinstance(error, UnknownModelError) or not isinstance(error, _NOT_ITS_FAULT)


def _says_when(error: BaseException) -> TypeGuard[QueueFullError]:
    """Whether the backend is only busy, and said for how long."""
    return isinstance(error, QueueFullError) and bool(error.retry_after)


def _check_patience(
    until: float, requests: Sequence[InferenceRequest], error: Exception | None
) -> None:
    """Raise where *until*, when the first of the backends takes requests again, is too late."""
    now = monotonic()
    latest = max(inf if each.deadline is None else each.deadline.at for each in requests)
    if until < min(latest, now + _PATIENCE_SECONDS):
        return
    if isinstance(error, QueueFullError):
        error.retry_after = until - now
    raise error or QueueFullError("The model is busy.", retry_after=until - now)


def _log_failover(error: BaseException, following: Attempt) -> None:
    runtime.log(
        _logger,
        logging.WARNING,
        "A backend failed (%s); another attempt is made (%s).",
        getattr(error, "code", type(error).__name__),
        type(following.member.backend).__name__,
        # What is raised as one of ours was told by who raised it.
        error=None if isinstance(error, LLMStreamError) else error,
    )


def _is_iterable(result: Any) -> bool:
    """Whether *result* is items to come; what else it may be is for the engine to judge."""
    return isinstance(result, Iterable) and not isinstance(
        result, (str, bytes, Mapping, InferenceResponse)
    )


def _begin(attempt: Attempt, result: Iterable[Item]) -> _Stream | None:
    """The stream of *result*, once it has its first item; None where it has none."""
    iterator = iter(result)
    try:
        first = next(iterator, _END)
    except BaseException:
        _close(result)
        raise
    if first is _END:
        _close(result)
        return None
    stream = _Stream((first,), iterator, attempt)
    stream.attempt = attempt
    stream.source = result
    return stream


def _close(result: Any) -> None:
    close = getattr(result, "close", None)
    if close is not None:
        close()
