"""The caller's end of a submitted request."""

from __future__ import annotations

from functools import partial
from math import inf
from time import monotonic
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from ..core import runtime
from ..exceptions import LLMStreamError, RequestCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..core.messages import InferenceResponse
    from ..core.runtime import Parker

__all__ = ["InferenceHandle", "Progress", "cancelled_by_id"]


class Progress(NamedTuple):
    """
    How far a request is, or was when it ended.

    Args:
        tokens: Completion tokens that were counted.
        timings: Seconds by name, from submit: ``queue``, ``total``, and ``first_token``,
            once there is one.
    """

    tokens: int = 0
    timings: Mapping[str, float] = MappingProxyType({})


def cancelled_by_id() -> RequestCancelledError:
    """Why a handle ends that somebody cancelled by its request's id."""
    return RequestCancelledError("The request was cancelled.", cause="by_id")


class InferenceHandle:
    """
    A promise of one answer. It resolves once, at once: at the end, on cancel, on any
    error and at the deadline, even where the backend is stuck.

    Attributes:
        request_id: The request's, or the one made for it.

    Thread safety: every method, from any thread or greenlet; `cancel` from a finalizer too.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_cancel",
        "_outcome",
        "_progress",
        "_text",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        *,
        cancel: Callable[[LLMStreamError | None], None],
        text: Callable[[], str] = str,
        progress: Callable[[], Progress] = Progress,
    ) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._text = text
        self._progress = progress
        self._outcome: InferenceResponse | LLMStreamError | None = None
        # A few at most. An empty deque takes 760 bytes, and every stream has one of these.
        self._callbacks: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"<InferenceHandle {self.request_id} {'resolved' if self.ready() else 'pending'}>"

    def ready(self) -> bool:
        """Whether `get` returns or raises without waiting."""
        return self._outcome is not None

    def get(self, timeout_seconds: float | None = None) -> InferenceResponse:
        """
        Wait for the answer.

        Args:
            timeout_seconds: Wait this long; None until the request itself ends.

        Raises:
            TimeoutError: *timeout_seconds* ran out; the request runs on.
            LLMStreamError: How the request failed.
        """
        self.wait(inf if timeout_seconds is None else monotonic() + timeout_seconds)
        outcome = self._outcome
        if outcome is None:
            raise TimeoutError(
                f"No answer within {timeout_seconds} s; the request runs on. "
                "Call cancel() to stop it."
            )
        if isinstance(outcome, LLMStreamError):
            # Several may wait for one outcome: each starts from a clean traceback.
            raise outcome.with_traceback(None)
        return outcome

    def wait(self, until: float = inf) -> bool:
        """Wait until *until* (monotonic); returns `ready()`. Raises nothing."""
        if self._outcome is None:
            parker: Parker = runtime.make_parker()
            self.add_done_callback(parker.unpark)
            try:
                while self._outcome is None and monotonic() < until:
                    parker.park(until)
            finally:
                self._forget(parker.unpark)
        return self._outcome is not None

    def cancel(self, reason: LLMStreamError | None = None) -> None:
        """
        End the request; no effect on one that has ended.

        Args:
            reason: What `get` raises then; None is a `RequestCancelledError`.
        """
        if self._outcome is None:
            self._cancel(reason)

    @property
    def outcome(self) -> InferenceResponse | LLMStreamError | None:
        """The answer, or how the request failed; None while it is pending."""
        return self._outcome

    @property
    def text(self) -> str:
        """Answer text of choice 0 produced so far."""
        return self._text()

    @property
    def progress(self) -> Progress:
        """How far it is; a whole answer has figures of its own."""
        return self._progress()

    def add_done_callback(self, function: Callable[[], object]) -> None:
        """
        Call *function* once resolved; now, where it is.

        It runs on the thread that resolves: constant time, no waiting, no user code.
        """
        self._callbacks.append(function)
        if self._outcome is not None:
            self._run_callbacks()

    def deliver(self, callback: Callable[[InferenceResponse | LLMStreamError], object]) -> None:
        """Call *callback*, the user's, with the outcome, on a thread for such calls."""

        def call() -> None:
            if self._outcome is not None:
                callback(self._outcome)

        self.add_done_callback(partial(runtime.run_detached, call))

    def publish(self, outcome: InferenceResponse | LLMStreamError) -> None:
        """Resolve. The engine's; the caller holds the run's claim."""
        self._outcome = outcome
        self._run_callbacks()

    def _forget(self, function: Callable[[], object]) -> None:
        # A caller that looks again and again must not leave something each time.
        try:
            self._callbacks.remove(function)
        except ValueError:
            pass  # Called, or being called.

    def _run_callbacks(self) -> None:
        # A registrar and the resolver may both be here: pop gives each call to one.
        callbacks = self._callbacks
        while callbacks:
            try:
                function = callbacks.pop(0)
            except IndexError:
                return
            function()
