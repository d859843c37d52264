"""How a waiter sleeps until somebody lets it go: what is asked of every parker, and a thread's."""

from __future__ import annotations

import threading
from math import inf
from time import monotonic
from typing import Protocol

from .native import allocate_lock, current_hub, is_patched

__all__ = ["Parker", "ThreadParker"]


class Parker(Protocol):
    """One waiter's binary semaphore. Made for one waiter at a time, woken by anyone."""

    def park(self, until: float = inf) -> None:
        """
        Wait for `unpark`, or until *until* on the monotonic clock. May return early.

        Raises:
            RuntimeError: Called on the hub itself, which cannot wait.
        """

    def unpark(self) -> None:
        """Let the waiter go, or its next `park` return at once. Any thread; never blocks."""

    def is_usable_here(self) -> bool:
        """Whether the caller's native thread and hub may park on it."""


_LONGEST_MAIN_PARK_SECONDS = 0.5


class ThreadParker:
    """Parks the native thread. The lock is held while there is no permit."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._lock.acquire()

    def park(self, until: float = inf) -> None:
        # Not patched: there the main thread has a hub, and get_ident makes greenlets' state.
        if not is_patched() and threading.get_ident() == threading.main_thread().ident:
            # Signals are handled here, and CPython misses one that comes just before the
            # lock is waited for, until the wait ends.
            until = min(until, monotonic() + _LONGEST_MAIN_PARK_SECONDS)
        if until == inf:
            self._lock.acquire()
            return
        # Capped because a lock takes at most TIMEOUT_MAX; returning early is allowed.
        self._lock.acquire(True, min(max(0.0, until - monotonic()), 3600.0))

    def unpark(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # There is a permit already; one is enough.

    def is_usable_here(self) -> bool:
        return current_hub() is None
