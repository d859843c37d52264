"""One request under way: the guard between its backend and whoever listens."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from copy import copy
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..core.assembly import Assembler
from ..core.channel import Channel
from ..core.deadlines import Deadline
from ..core.lifecycle import State
from ..core.messages import Finish, InferenceResponse
from ..exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineError,
    LLMStreamError,
    RequestCancelledError,
)
from .handle import InferenceHandle, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.clock import Timer
    from ..core.messages import InferenceRequest, Item
    from ..core.runtime import Parker
    from ..typing import TokenCallback
    from .pool import Worker

__all__ = ["Run"]

_logger = logging.getLogger("flask_llmstream.engine")


def _nothing() -> None: ...


_FAILED = "The model backend failed. The server's log says how."


class Run:
    """
    A submitted request, from its admission to its end.

    Whoever wins `claim` decides how it ended. `is_over` is the guard's flag: once set, no
    further item passes. Neither takes a lock, so the end is told at once from any thread.

    Args:
        request: The caller's; a copy runs.
        settle: The engine's: books the end of a run that the caller has claimed, and
            resolves its handle.
        token_callback: See `TokenCallback`.
        priority: Higher is sooner.
        deadline_at: Monotonic; infinity is none.

    Attributes:
        request: The copy that the backend sees; its `stream_callback` is `emit`.
        caller: Among whose waiting requests it is counted, if it is.
        state: Guarded by the engine's lock, like `caller`, `priority` and `worker`.
        parker: The submitter's, while it is blocked by a full queue.
    """

    __slots__ = (
        "_backend_finishes",
        "_cancels",
        "_claims",
        "_emit_to",
        "_finals",
        "_give_back",
        "_is_left",
        "_serial",
        "_settle",
        "_stops",
        "_token_callback",
        "assembler",
        "cache_hit",
        "caller",
        "deadline_at",
        "first_item_at",
        "handle",
        "is_over",
        "parker",
        "priority",
        "request",
        "started_at",
        "state",
        "stuck_timer",
        "submitted_at",
        "timer",
        "worker",
    )

    def __init__(
        self,
        request: InferenceRequest,
        *,
        settle: Callable[[Run, LLMStreamError | None], None],
        token_callback: TokenCallback | None = None,
        priority: int = 0,
        deadline_at: float = inf,
    ) -> None:
        request_id = request.request_id or secrets.token_hex(12)
        self._settle = settle
        self._emit_to = request.stream_callback
        self._token_callback = token_callback
        own = self.request = copy(request)
        own.__post_init__()  # A field may have been set since it was made.
        own.request_id = request_id
        own.priority = priority
        own.deadline = None if deadline_at == inf else Deadline(deadline_at)
        own.stream = request.stream or self.is_stream
        own.stream_callback = self.emit
        own.control = self
        self.assembler = Assembler(self.request)
        self.handle = InferenceHandle(
            request_id, cancel=self.cancel, text=self._get_text, progress=self._get_progress
        )
        self.caller: bytes | None = None
        self.priority = priority
        self.deadline_at = deadline_at
        self.state = State.SUBMITTED
        self.is_over = False
        self.cache_hit = False
        self.parker: Parker | None = None
        self.timer: Timer | None = None
        self.stuck_timer: Timer | None = None
        self.worker: Worker | None = None
        self.submitted_at = monotonic()
        self.started_at: float | None = None
        self.first_item_at: float | None = None
        # list.pop() is atomic: each of these is taken once, whoever comes.
        self._claims = [True]
        self._finals = [] if token_callback is None else [token_callback]
        self._stops: list[Any] = []  # A callback backend's cancel, if it gave one.
        self._give_back: Callable[[], None] = _nothing
        self._backend_finishes = 0
        self._is_left = False  # The backend ended it by itself: there is nothing to cancel.
        self._cancels: list[Callable[[], Any]] = []
        # Tried, never waited for: it only tells that two threads emit at once. So it may
        # stay held while a greenlet parks in a full channel.
        self._serial = runtime.allocate_lock()

    @property
    def is_stream(self) -> bool:
        return self._emit_to is not None or self._token_callback is not None

    @property
    def timed_out(self) -> bool:
        return self.state is State.TIMED_OUT

    def _get_text(self) -> str:
        return self.assembler.text

    def _get_progress(self) -> Progress:
        return Progress(self.assembler.tokens, self._timings())

    # The end.

    def claim(self) -> bool:
        """Whether the caller is the one who ends this run. No item passes from here on."""
        try:
            self._claims.pop()
        except IndexError:
            return False
        self.is_over = True
        return True

    def end(self, error: LLMStreamError | None) -> bool:
        """End it, with the whole answer or *error*. False where it has ended already."""
        if not self.claim():
            return False
        self._settle(self, error)
        self._call_cancels()
        return True

    def on_cancel(self, function: Callable[[], Any]) -> None:
        """See `InferenceRequest.on_cancel`."""
        self._cancels.append(function)
        if self.is_over:
            self._call_cancels()

    def _call_cancels(self) -> None:
        while self._cancels:
            try:
                function = self._cancels.pop()
            except IndexError:
                return  # Two came at once; each call is made by one.
            try:
                function()
            except BaseException as error:
                # Whoever ends a run may be the clock, which everybody needs.
                self._log("A cancel callback failed", error)

    def cancel(self, reason: LLMStreamError | None = None) -> None:
        """End it from outside."""
        self.end(reason or RequestCancelledError("The request was cancelled."))

    def on_deadline(self) -> None:
        """The clock's call at `deadline_at`."""
        self.cancel(DeadlineExceededError("The request's deadline passed."))

    def outcome(self, error: LLMStreamError | None) -> InferenceResponse | LLMStreamError:
        """What the handle resolves with: the whole answer, or *error*. Raises nothing."""
        if error is not None:
            return error
        try:
            return self._response()
        except Exception as exc:
            self._log("The answer could not be put together", exc)
            return EngineError(_FAILED)

    def _response(self) -> InferenceResponse:
        response = self.assembler.response()
        response.timings = self._timings()
        response.cache_hit = self.cache_hit
        return response

    def _timings(self) -> dict[str, float]:
        """So far."""
        now = monotonic()
        timings = {
            "queue": (self.started_at or now) - self.submitted_at,
            "total": now - self.submitted_at,
        }
        if self.first_item_at is not None:
            timings["first_token"] = self.first_item_at - self.submitted_at
        return timings

    def send_final(self) -> None:
        """
        ``token_callback("", True)``, once. Raises nothing.

        After the last token, also where the backend emits from several threads: an `emit`
        that is under way sends it as it leaves.
        """
        if not self._finals or not self._serial.acquire(False):
            return
        try:
            self._call_final()
        except BaseException as error:
            # SystemExit, GreenletExit: the worker must go on, or the backend's thread.
            self._log("The token callback failed at the end", error)
        finally:
            self._serial.release()

    def finish_waiting(self) -> None:
        """It ended before it started: tell the token callback here, where it was ended."""
        if not self._finals:
            return
        if runtime.clock.is_current_thread():
            # User code must not hold up everybody's deadlines.
            runtime.run_detached(self.send_final)
            return
        try:
            self._call_final()
        except Exception as error:
            self._log("The token callback failed at the end", error)

    def _call_final(self) -> None:
        try:
            token_callback = self._finals.pop()
        except IndexError:
            return
        token_callback("", True)

    # The guard: what the backend calls.

    def emit(self, item: Item) -> bool:
        """
        Pass on *item*, unless the run is over or past its deadline.

        Returns:
            False when the backend should stop.

        Thread safety: serial, from one producing thread at a time; a second one at the
        same time ends the run with an error.
        """
        if not self.is_over:
            if self._serial.acquire(False):
                try:
                    if monotonic() >= self.deadline_at:
                        self.on_deadline()
                    else:
                        for each in self.assembler.accept(item):
                            self._pass_on(each)
                except BaseException as exc:
                    self.end(self._as_error(exc))
                finally:
                    self._serial.release()
            else:
                self._fail_as_concurrent()
        if self.is_over:
            # Perhaps long ago: only now does the producer come back.
            self.send_final()
            return False
        return not self.assembler.is_cut

    def _pass_on(self, item: Item) -> None:
        if self.is_over:
            return
        if self.first_item_at is None:
            self.first_item_at = monotonic()
        emit_to, callback = self._emit_to, self._token_callback
        try:
            if emit_to is not None and emit_to(item) is False:
                self.cancel(
                    RequestCancelledError("The stream callback asked to stop.", cause="callback")
                )
            elif callback is not None and isinstance(item, str) and not getattr(item, "choice", 0):
                callback(item, False)
        except LLMStreamError:
            raise
        except BaseException as error:
            self._log("The stream callback failed", error)
            raise EngineError("The stream's consumer failed.") from error

    def _fail_as_concurrent(self) -> None:
        self.end(EngineError("The model backend emitted from two threads at once."))

    # A worker's part.

    def generate(self, backend: Any) -> None:
        """Run *backend* to its end, on this worker. Raises nothing."""
        runtime.make_logging_native()
        error: LLMStreamError | None = None
        try:
            with self.context():
                try:
                    if not self.is_over:
                        self._consume(backend.generate(self.request))
                        self._flush()
                except BaseException as exc:
                    error = self._as_error(exc)
                    raise
                finally:
                    self._close()
        except BaseException as exc:
            if error is None:
                self._log("The context of the run failed", exc)
                error = EngineError(_FAILED)
        self._conclude(error)

    def absorb(self, response: InferenceResponse) -> None:
        """Take a whole answer that was made for this run. Raises nothing."""
        error: LLMStreamError | None = None
        try:
            self._consume(response)
            self._flush()
        except BaseException as exc:
            error = self._as_error(exc)
        self._conclude(error)

    def fail(self, exc: BaseException) -> None:
        """End with what the backend raised."""
        self._conclude(self._as_error(exc))

    def _conclude(self, error: LLMStreamError | None) -> None:
        self._close()
        if self.claim():
            self._settle(self, error)

    def _close(self) -> None:
        """Let nothing more pass but the final call."""
        self.is_over = True
        # Before the handle resolves, so that who waited for it has seen the end; before
        # the claim, so that a call that never returns can still be cancelled.
        self.send_final()

    def context(self) -> Any:
        context = self.request.run_context
        return nullcontext() if context is None else context()

    def _consume(self, result: Any) -> None:
        if result is None:
            return
        if isinstance(result, InferenceResponse):
            self.cache_hit = result.cache_hit
            items: Iterable[Item] = self.assembler.absorb(result)
        elif isinstance(result, (str, bytes)):
            text = result if isinstance(result, str) else result.decode()
            # The whole answer, like a response: what was emitted of it is not said twice.
            items = self.assembler.absorb(InferenceResponse(text=text))
        elif isinstance(result, Iterable) and not isinstance(result, Mapping):
            items = result
        else:
            raise EngineError(
                f"The model backend returned {type(result).__name__}; it may return an "
                "iterator of items, an InferenceResponse, a str or None."
            )
        try:
            for item in items:
                if not self.emit(item):
                    break
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                self._close_backend(close)

    def _close_backend(self, close: Callable[[], Any]) -> None:
        try:
            close()
        except Exception as error:
            # All that was wanted of it is here.
            if not self.is_over:
                self._log("The model backend failed as it was closed", error)

    def _flush(self) -> None:
        if self.is_over:
            return
        if not self._serial.acquire(False):
            self._fail_as_concurrent()
            return
        try:
            for item in self.assembler.finish():
                self._pass_on(item)
        finally:
            self._serial.release()

    def _as_error(self, exc: BaseException) -> LLMStreamError:
        if isinstance(exc, LLMStreamError) and not isinstance(exc, ConfigurationError):
            return exc
        if not self.is_over:
            # Once it is over, a backend may well fail because it was told to stop.
            self._log("The model backend failed", exc)
        if isinstance(exc, ConfigurationError):
            return exc
        return EngineError(_FAILED)

    def _log(self, message: str, error: BaseException) -> None:
        runtime.log(
            _logger,
            logging.ERROR,
            "%s (request %s, model %s).",
            message,
            self.request.request_id,
            self.request.model,
            error=error,
        )

    # A callback backend's part: no worker waits, so whoever ends it does what is left.

    def start_callbacks(self, backend: Any, give_back: Callable[[], None]) -> None:
        """
        Hand the request to *backend*, which emits from its own threads.

        Args:
            backend: A `CallbackBackend`.
            give_back: Called once, when the backend has nothing more to do for it.
        """
        self._give_back = give_back
        channel = getattr(self._emit_to, "__self__", None)
        if isinstance(channel, Channel):
            # A continuously batching engine must not wait for one slow reader.
            self._emit_to = channel.send_nowait
        runtime.make_logging_native()
        cancel = None
        try:
            with self.context():
                if not self.is_over:
                    cancel = backend.submit(self.request, self.emit_nowait)
        except BaseException as exc:
            self._conclude(self._as_error(exc))
        self._stops.append(cancel)
        if self.is_over:
            self._leave_backend()

    def emit_nowait(self, item: Item | BaseException) -> bool:
        """What a callback backend calls: like `emit`, and an exception ends the run."""
        if isinstance(item, BaseException):
            self._is_left = True
            self._conclude(self._as_error(item))
            return False
        goes_on = self.emit(item)
        assembler = self.assembler
        is_last = assembler.is_cut
        if isinstance(item, Finish):
            self._backend_finishes += 1
            is_last = is_last or assembler.finished_choices >= self.request.n
        if is_last and not self.is_over:
            # Where a choice was cut here, the backend still works on it.
            self._is_left = self._backend_finishes >= self.request.n
            self._finish_callbacks()
            return False
        return goes_on

    def _finish_callbacks(self) -> None:
        error: LLMStreamError | None = None
        try:
            self._flush()
        except BaseException as exc:
            error = self._as_error(exc)
        self._conclude(error)

    def finish_detached(self) -> None:
        """It is over, perhaps from outside: tell the backend, and the token callback."""
        self._leave_backend()
        if self._finals:
            runtime.run_detached(self.send_final)

    def _leave_backend(self) -> None:
        """Cancel what the backend has not ended by itself, and give its place back; once."""
        try:
            cancel = self._stops.pop()
        except IndexError:
            return  # Not submitted yet: that will see that it is over.
        if callable(cancel) and not self._is_left:
            runtime.run_detached(partial(self._stop_backend, cancel))
        else:
            self._give_back()

    def _stop_backend(self, cancel: Callable[[], Any]) -> None:
        # In this order, so that a backend never holds more than its max_concurrency.
        try:
            cancel()
        finally:
            self._give_back()
