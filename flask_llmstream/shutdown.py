"""Saying goodbye: a worker that is told to go ends its streams before it is cut off."""

from __future__ import annotations

import os
import signal
import weakref
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from .core import runtime
from .exceptions import ServerShutdownError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .typing import Engine

__all__ = ["ShutdownWatch", "say_goodbye"]

_POLL_SECONDS = 0.2
_LAST_WORDS_SECONDS = 1.0
"""Kept of the grace for writing the last events, a quarter of it at the most."""
_GOODBYE_SECONDS = 0.2
"""For the same where there is no grace; gunicorn itself waits 0.1 s after its hook."""


class ShutdownWatch:
    """
    Looks whether the gunicorn worker is going away: on SIGTERM, or at `max_requests`.

    Shortly before the grace is over, what still runs ends with a terminal event instead
    of a bare EOF. On SIGTERM the engines refuse new requests at once (503,
    `server_shutdown`). Under another server it does nothing.

    Args:
        engines: Those of the app, asked when it matters.
        grace_seconds: How long streams may go on; None is gunicorn's `graceful_timeout`.

    Thread safety: `start` from any thread, any number of times.
    """

    def __init__(
        self, engines: Callable[[], Iterable[Engine]], grace_seconds: float | None = None
    ) -> None:
        self._engines = engines
        self._grace_seconds = grace_seconds
        self._pid = 0
        _watches.add(self)

    def start(self) -> None:
        """Begin to look, once a process: threads do not survive a fork."""
        pid = os.getpid()
        if self._pid == pid:
            return
        self._pid = pid
        worker = _gunicorn_worker()
        if worker is not None:
            self._poll(worker)

    def _poll(self, worker: Any) -> None:
        # The one poll of the process: gunicorn has no hook that a worker of every class
        # calls when it is told to go.
        if worker.alive:
            runtime.clock.call_at(monotonic() + _POLL_SECONDS, partial(self._poll, worker))
            return
        grace = self._grace_seconds
        if grace is None:
            grace = float(worker.cfg.graceful_timeout)
        if worker.nr < worker.max_requests:
            self._refuse_all()
        elif _has_no_limit_for_its_last_request(worker):
            return
        # Else what it has accepted is served: the request that made it `max_requests` has
        # only just begun, and there is no other worker before this one is gone.
        last_words_at = monotonic() + grace - min(_LAST_WORDS_SECONDS, grace / 4)
        runtime.clock.call_at(last_words_at, self.end_all)

    def _refuse_all(self) -> None:
        for engine in self._engines():
            engine.refuse(_shutting_down())

    def end_all(self) -> None:
        """Refuse what comes, and end what runs with its last event."""
        self._refuse_all()
        for engine in self._engines():
            engine.end_all(_shutting_down())

    @property
    def has_requests(self) -> bool:
        """Whether any is under way, or waits."""
        stats = [engine.queue_stats() for engine in self._engines()]
        return any(each["running"] or each["waiting"] for each in stats)


_watches: weakref.WeakSet[ShutdownWatch] = weakref.WeakSet()
"""Of all apps of the process."""


def say_goodbye() -> None:
    """
    End every stream of the process with `server_shutdown`, and wait a moment while that is
    written. For a server that is about to exit, whatever else is under way.

    Thread safety: any thread or greenlet, also a signal handler, which may have interrupted
    somebody who holds a lock: the work is done elsewhere.
    """
    parker = runtime.make_parker()
    until = monotonic() + _GOODBYE_SECONDS
    is_waited_for = True

    def end() -> None:
        nonlocal is_waited_for
        watches = list(_watches)
        is_waited_for = any(watch.has_requests for watch in watches)
        for watch in watches:
            watch.end_all()
        parker.unpark()

    runtime.clock.call_soon(end)
    while is_waited_for and monotonic() < until:
        parker.park(until)


def _shutting_down() -> ServerShutdownError:
    return ServerShutdownError("The server is shutting down.", retry_after=1)


def _gunicorn_worker() -> Any:
    """The worker object of this process, which handles SIGTERM; None elsewhere."""
    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return worker if hasattr(worker, "alive") and hasattr(worker, "cfg") else None


def _has_no_limit_for_its_last_request(worker: Any) -> bool:
    """A sync worker at `max_requests` only leaves its loop; no grace is over it."""
    return any(base.__module__ == "gunicorn.workers.sync" for base in type(worker).__mro__)
