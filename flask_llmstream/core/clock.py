"""One thread that keeps every deadline of the process."""

from __future__ import annotations

import heapq
from collections import deque
from contextlib import suppress
from itertools import count
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Clock", "Timer"]

_INBOX_LIMIT = 1024
"""Timers that may pile up before the thread is woken only to sort them in."""


class Timer:
    """A call to come. Cancelled or called, it refers to nothing any more."""

    __slots__ = ("_number", "function", "when")

    _numbers = count()

    def __init__(self, when: float, function: Callable[[], Any]) -> None:
        self.when = when
        self.function: Callable[[], Any] | None = function
        self._number = next(self._numbers)

    @property
    def is_pending(self) -> bool:
        """Neither cancelled nor called. Turns False before the call."""
        return self.function is not None

    def cancel(self) -> None:
        self.function = None

    def __lt__(self, other: Timer) -> bool:
        return (self.when, self._number) < (other.when, other._number)


class Clock:
    """
    Timers and deferred calls, on one native thread.

    What it calls holds up what is due next. Callers only append to a deque and wake the
    thread; the heap is the thread's alone. So there is no lock, and a finalizer may call.

    Args:
        make_parker: For the thread to sleep on.
        start_thread: Runs a function on a new native thread.
        get_thread_id: Of the caller.
        report: Told what a call raised.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(
        self,
        make_parker: Callable[[], Any],
        start_thread: Callable[[Callable[[], Any]], None],
        get_thread_id: Callable[[], int],
        report: Callable[[BaseException], None],
    ) -> None:
        self._make_parker = make_parker
        self._start_thread = start_thread
        self._get_thread_id = get_thread_id
        self._report = report
        self.reset()

    def reset(self) -> None:
        """Forget everything; in a forked child the thread is gone, and so are its callers."""
        self._inbox: deque[Timer] = deque()
        self._heap: list[Timer] = []
        self._live_after_sweep = 0
        self._sleeps_until = inf
        self._parker = self._make_parker()
        self._start_tickets = [True]
        self._thread_id: int | None = None

    def call_at(self, when: float, function: Callable[[], Any]) -> Timer:
        """Call *function* at *when* on the monotonic clock, at the earliest."""
        timer = Timer(when, function)
        self._inbox.append(timer)
        if self._start_tickets:
            self._start()
        if when < self._sleeps_until or len(self._inbox) > _INBOX_LIMIT:
            self._parker.unpark()
        return timer

    def call_soon(self, function: Callable[[], Any]) -> None:
        """Call *function* as soon as the thread runs."""
        self.call_at(-inf, function)

    def is_current_thread(self) -> bool:
        """Whether the caller is a timer of this clock."""
        return self._thread_id == self._get_thread_id()

    def _start(self) -> None:
        try:
            ticket = self._start_tickets.pop()  # Atomic: one caller gets it.
        except IndexError:
            return
        try:
            self._start_thread(self._run)
        except BaseException:
            # Out of threads for now: the next caller tries again.
            self._start_tickets.append(ticket)
            raise

    def _run(self) -> None:
        parker = self._parker
        self._thread_id = self._get_thread_id()
        while True:
            self._take_inbox()
            heap = self._heap
            while heap and heap[0].when <= monotonic():
                self._fire(heapq.heappop(heap))
            # Published before the re-check: a caller either sees it or is seen.
            self._sleeps_until = heap[0].when if heap else inf
            if not self._inbox:
                parker.park(self._sleeps_until)
            self._sleeps_until = -inf

    def _fire(self, timer: Timer) -> None:
        # A method of its own, so that no frame keeps what it called while we sleep.
        function, timer.function = timer.function, None
        if function is None:
            return
        try:
            function()
        except BaseException as error:
            # SystemExit and gevent.Timeout too: everybody else's deadlines must go on, and
            # be it that a user's log filter raises.
            with suppress(BaseException):
                self._report(error)

    def _take_inbox(self) -> None:
        inbox, heap = self._inbox, self._heap
        # As many as there are now: callers that go on must not hold up what is due.
        for _ in range(len(inbox)):
            timer = inbox.popleft()
            if timer.function is not None:
                heapq.heappush(heap, timer)
        # Cancelled timers stay until their time or until they are half of the heap.
        if len(heap) > 2 * self._live_after_sweep + _INBOX_LIMIT:
            heap[:] = [timer for timer in heap if timer.function is not None]
            heapq.heapify(heap)
            self._live_after_sweep = len(heap)
