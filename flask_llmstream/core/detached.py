"""Users' callbacks that have no worker to run on: in order, and none of them for ever."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from .parking import ThreadParker

if TYPE_CHECKING:
    from collections.abc import Callable

    from .clock import Clock

__all__ = ["DetachedCalls"]

_PATIENCE_SECONDS = 1.0
_MOST_THREADS = 8


class _Caller:
    """A thread that makes the calls. `called_at` is when the present one began."""

    __slots__ = ("called_at", "parker")

    def __init__(self) -> None:
        self.parker = ThreadParker()
        self.called_at: float | None = None

    @property
    def is_slow(self) -> bool:
        since = self.called_at
        return since is not None and monotonic() >= since + _PATIENCE_SECONDS


class DetachedCalls:
    """
    Calls what it is given, in order, on a native thread of its own.

    A call that takes long, a database's say, or a cancel that a GPU hangs in, must not hold
    up everybody's: after a second what comes behind it goes to a new thread, at most to the
    eighth. No lock, so that a finalizer may call.

    Args:
        clock: Tells when a call takes long.
        start_thread: Runs a function on a new native thread.
        report: Told what a call raised.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(
        self,
        clock: Clock,
        start_thread: Callable[[Callable[[], Any]], None],
        report: Callable[[BaseException], None],
    ) -> None:
        self._clock = clock
        self._start_thread = start_thread
        self._report = report
        self.reset()

    def reset(self) -> None:
        """Forget everything; in a forked child the threads are gone, and so are their callers."""
        self._calls: deque[Callable[[], Any]] = deque()
        self._caller = _Caller()  # Who makes the next call; the others only end theirs.
        self._first_tickets = [True]
        self._tickets = [True] * _MOST_THREADS

    def call(self, function: Callable[[], Any]) -> None:
        """Have *function* called soon."""
        self._calls.append(function)
        if self._first_tickets:
            self._start_first()
        # Looked up after the append: who takes over looks for calls after that.
        self._caller.parker.unpark()

    def _start_first(self) -> None:
        try:
            self._first_tickets.pop()  # Atomic: one caller gets it.
        except IndexError:
            return
        self._start(self._caller)

    def _start(self, caller: _Caller) -> None:
        """Start *caller*, who is the one already."""
        ticket = self._tickets.pop()
        try:
            self._start_thread(partial(self._run, caller))
        except BaseException:
            # Out of threads for now: with the next call it is tried again.
            self._tickets.append(ticket)
            self._first_tickets.append(True)
            raise

    def _run(self, caller: _Caller) -> None:
        while self._caller is caller or self._takes_over(caller):
            if self._calls:
                self._call_next(caller)
            else:
                caller.parker.park()
        self._tickets.append(True)

    def _takes_over(self, caller: _Caller) -> bool:
        """Whether *caller*, whose call took long, finds that another one does so now."""
        if not self._caller.is_slow:
            return False
        self._caller = caller
        return True

    def _call_next(self, caller: _Caller) -> None:
        # A method of its own, so that no frame keeps what it called while we sleep.
        try:
            function = self._calls.popleft()
        except IndexError:
            return  # Somebody who took over was quicker.
        now = caller.called_at = monotonic()
        timer = self._clock.call_at(now + _PATIENCE_SECONDS, partial(self._replace, caller))
        try:
            function()
        except BaseException as error:
            # SystemExit and gevent.Timeout too: everybody else's calls must go on, and be it
            # that a user's log filter raises.
            with suppress(BaseException):
                self._report(error)
        finally:
            caller.called_at = None
            timer.cancel()

    def _replace(self, caller: _Caller) -> None:
        """The clock's call: *caller* is in its call still, or was a moment ago."""
        if self._caller is not caller or not self._tickets:
            return
        self._caller = _Caller()
        self._start(self._caller)
        caller.parker.unpark()  # Back already, and waiting? It may go.
