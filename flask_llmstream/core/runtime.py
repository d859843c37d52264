"""
Threads and greenlets, and how one waits for the other.

Whether a wait parks a greenlet or a thread is decided at that wait (see `native`).

Rules that the rest of the package relies on:

- a waiter *publishes* its parker, *re-checks*, then *parks*; a waker changes the state,
  then unparks what is published. Under the GIL one of the two sees the other.
- an engine thread makes exactly one gevent call, ``async_.send()``: every other way to
  wake a hub from a native thread loses wake-ups or corrupts libev's active count.
- locks come from `allocate_lock` and guard constant-time bodies; nobody parks, logs,
  imports or calls out while holding one, since a patched process deadlocks otherwise.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections import deque
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from .clock import Clock, Timer
from .native import (
    allocate_lock,
    current_hub,
    get_thread_id,
    is_patched,
    is_plain_greenlet_socket,
    original,
    shut_down_socket,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "HubTask",
    "Interrupted",
    "Interruptible",
    "Parker",
    "ThreadParker",
    "after_fork",
    "allocate_lock",
    "clock",
    "get_thread_id",
    "has_greenlets",
    "is_patched",
    "is_plain_greenlet_socket",
    "log",
    "make_hub_task",
    "make_interruptible",
    "make_logging_native",
    "make_parker",
    "original",
    "run_detached",
    "shut_down_socket",
    "sleep",
    "spawn",
    "spawn_greenlet",
    "start_thread",
]


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


class _GreenletParker:
    """Parks the greenlet and lets its hub run. Wakes come through the hub's mailbox."""

    __slots__ = ("_greenlet", "_has_permit", "_mailbox", "_timer")

    def __init__(self, mailbox: _Mailbox) -> None:
        self._mailbox = mailbox
        self._greenlet: Any = None
        self._has_permit = False
        self._timer: Timer | None = None

    def park(self, until: float = inf) -> None:
        mailbox = self._mailbox
        greenlet = mailbox.current_greenlet()
        self._greenlet = greenlet
        try:
            if not self._has_permit and until > monotonic():
                self._set_timer(until)
                mailbox.switch_to_hub()
        finally:
            self._greenlet = None
            self._has_permit = False

    def unpark(self) -> None:
        if self._has_permit:
            return
        self._has_permit = True
        if self._greenlet is not None:
            self._mailbox.post(self)

    def is_usable_here(self) -> bool:
        hub = current_hub()
        return hub is not None and hub is self._mailbox.hub

    def _set_timer(self, until: float) -> None:
        # Lazily: an earlier timer that is still pending wakes us early, and the next park
        # renews it. So a stream of tokens sets no timer at all. After `_greenlet` is
        # published: a timer that fires meanwhile is seen, or sees it.
        timer = self._timer
        if timer is not None and timer.is_pending:
            if timer.when <= until:
                return
            timer.cancel()
        if until < inf:
            self._timer = clock.call_at(until, self.unpark)

    def resume(self) -> None:
        """On the hub: switch to the waiter, if it still waits for this wake-up."""
        greenlet = self._greenlet
        if greenlet is not None and self._has_permit:
            greenlet.switch()


class Interrupted(BaseException):
    """Thrown into a greenlet whose wait was given up; see `Interruptible`."""


class Interruptible:
    """
    Between `begin` and `end`, lets any thread end what this greenlet waits for, whatever
    that is: a name, a connection, a byte.
    """

    __slots__ = ("_greenlet", "_mailbox")

    def __init__(self, mailbox: _Mailbox) -> None:
        self._mailbox = mailbox
        self._greenlet: Any = None

    def begin(self) -> None:
        self._greenlet = self._mailbox.current_greenlet()

    def end(self) -> None:
        self._greenlet = None

    def interrupt(self) -> None:
        """Have `Interrupted` raised where it waits. Any thread; constant time."""
        self._mailbox.post(self)

    def resume(self) -> None:
        """On the hub, so the greenlet is in a wait now, unless it has ended its part."""
        greenlet = self._greenlet
        if greenlet is not None:
            greenlet.throw(Interrupted)


class HubTask:
    """
    A function that runs on the hub itself, once for all the wake-ups before it runs. It
    must not wait, and takes constant time.

    Attributes:
        function: Called with the monotonic time, read once for several tasks; None for
            nothing to do (any more).
    """

    __slots__ = ("_is_posted", "_mailbox", "function")

    def __init__(self, mailbox: _Mailbox) -> None:
        self._mailbox = mailbox
        self._is_posted = False
        self.function: Callable[[float], Any] | None = None

    def unpark(self) -> None:
        """Have it run soon. Any thread; never blocks. Named as a parker's, whose place it takes."""
        if self._is_posted:
            return
        self._is_posted = True
        mailbox = self._mailbox
        mailbox.ready.append(self)
        if not mailbox.is_posted:
            mailbox.send()

    def resume(self, now: float) -> None:
        # Reset before the call: what comes during it posts again.
        self._is_posted = False
        function = self.function
        if function is not None:
            function(now)


_LONGEST_DRAIN_SECONDS = 0.005
_ITEMS_BETWEEN_LOOKS = 32


class _Mailbox:
    """One hub's way in from other threads: a deque and one async watcher."""

    def __init__(self, hub: Any) -> None:
        self._hub: weakref.ref[Any] = weakref.ref(hub)
        self.ready: deque[_GreenletParker | Interruptible | HubTask | Callable[[], Any]] = deque()
        self.is_posted = False
        self._parked = 0
        self._getcurrent = sys.modules["greenlet"].getcurrent
        # Referenced only while someone is parked: a standing reference would keep
        # hub.join() from returning, none at all would give waiters LoopExit.
        self._watcher = hub.loop.async_(ref=False)
        self._watcher.start(self._drain)

    @property
    def hub(self) -> Any:
        return self._hub()

    @property
    def is_open(self) -> bool:
        """Whether its hub still runs what is posted."""
        hub = self._hub()
        return hub is not None and hub.loop is not None

    def current_greenlet(self) -> Any:
        greenlet = self._getcurrent()
        if greenlet is self._hub():
            raise RuntimeError(
                "Cannot wait on the gevent hub. Spawn a greenlet for what has to wait."
            )
        return greenlet

    def switch_to_hub(self) -> None:
        self._parked += 1
        if self._parked == 1:
            self._watcher.ref = True
        try:
            self.hub.switch()
        finally:
            self._parked -= 1
            if self._parked == 0:
                self._watcher.ref = False

    def post(self, item: _GreenletParker | Interruptible | HubTask | Callable[[], Any]) -> None:
        """Any thread: resume a waiter, or run a function in a greenlet of its own."""
        self.ready.append(item)
        if not self.is_posted:
            self.send()

    def send(self) -> None:
        """Have the hub look, soon."""
        self.is_posted = True
        try:
            self._watcher.send()
        except ValueError:
            pass  # The hub was destroyed, and whoever waited on it with it.

    def _drain(self) -> None:
        # Reset before the count: whoever is not in it sends again.
        self.is_posted = False
        ready = self.ready
        now = monotonic()
        until = now + _LONGEST_DRAIN_SECONDS
        for number in range(1, len(ready) + 1):
            item = ready.popleft()
            try:
                if type(item) is HubTask:
                    item.resume(now)
                elif isinstance(item, (_GreenletParker, Interruptible)):
                    item.resume()
                else:
                    sys.modules["gevent"].spawn(item)
            except BaseException:
                # One broken waiter must not strand the others behind it.
                self.hub.handle_error(self, *sys.exc_info())
            if not number % _ITEMS_BETWEEN_LOOKS:
                now = monotonic()
                if now >= until:
                    # Connections and requests must come in between.
                    self.send()
                    return


_mailboxes: weakref.WeakKeyDictionary[Any, _Mailbox] = weakref.WeakKeyDictionary()
_home: _Mailbox | None = None
"""The hub that serves requests: greenlet workers and deferred log records go there."""
_own_threads: set[int] = set()
"""Native threads of `start_thread`. A hub that user code grows there serves nobody."""


def _mailbox_of(hub: Any) -> _Mailbox:
    global _home
    mailbox = _mailboxes.get(hub)
    if mailbox is None:
        mailbox = _mailboxes[hub] = _Mailbox(hub)
    if (
        _home is not mailbox
        and (hub.main_hub or _home is None or not _home.is_open)
        and hub.thread_ident not in _own_threads
    ):
        _home = mailbox
    return mailbox


def _find_home() -> _Mailbox | None:
    """The mailbox of the serving hub; None where no hub has been seen, or it is gone."""
    hub = current_hub()
    if hub is not None:
        _mailbox_of(hub)
    return _home if _home is not None and _home.is_open else None


def make_parker() -> Parker:
    """A parker for the caller's world: its greenlet where it has a hub, else its thread."""
    hub = current_hub()
    return ThreadParker() if hub is None else _GreenletParker(_mailbox_of(hub))


def make_hub_task() -> HubTask:
    """For the caller's hub, which it has."""
    return HubTask(_mailbox_of(current_hub()))


def make_interruptible() -> Interruptible | None:
    """For the caller's greenlet; None on a thread, which nothing can reach."""
    hub = current_hub()
    return None if hub is None else Interruptible(_mailbox_of(hub))


def sleep(seconds: float) -> None:
    """
    Wait without stopping anyone else, on a native thread and in a greenlet alike.

    In a patched process `time.sleep` on a native thread would grow a hub there.
    """
    until = monotonic() + seconds
    parker = make_parker()
    while monotonic() < until:
        parker.park(until)


def start_thread(function: Callable[[], Any]) -> None:
    """Run *function* on a new native thread; it does not keep the process alive."""

    def main() -> None:
        thread_id = get_thread_id()
        _own_threads.add(thread_id)
        try:
            function()
        finally:
            # User code that called a patched function here grew a hub: two fds each.
            hub = current_hub()
            if hub is not None:
                _mailboxes.pop(hub, None)
                hub.destroy(destroy_loop=True)
            _own_threads.discard(thread_id)

    original("_thread", "start_new_thread")(main, ())


def has_greenlets() -> bool:
    """Whether a worker of kind ``greenlet`` is one here: patched, with a hub to run on."""
    return is_patched() and _find_home() is not None


def spawn_greenlet(function: Callable[[], Any]) -> None:
    """Run *function* in a greenlet on the serving hub. Any thread; see `has_greenlets`."""
    home = _find_home()
    if home is None:
        raise RuntimeError("There is no gevent hub in this process.")
    if home.hub is current_hub():
        sys.modules["gevent"].spawn(function)
    else:
        home.post(function)


def spawn(function: Callable[[], Any]) -> None:
    """Run *function* in the background: in a greenlet where there are any, else a thread."""
    if has_greenlets():
        spawn_greenlet(function)
    else:
        start_thread(function)


def log(
    logger: logging.Logger,
    level: int,
    message: str,
    *args: object,
    error: BaseException | None = None,
    extra: Mapping[str, object] | None = None,
) -> None:
    """
    Log from any thread. In a patched process a handler may hold a greenlet lock, so the
    record is emitted by a greenlet of the serving hub, never by a native thread.
    """
    if not logger.isEnabledFor(level):
        return

    def emit() -> None:
        logger.log(level, message, *args, exc_info=error, extra=extra)

    home = _find_home() if is_patched() else None
    if home is None or home.hub is current_hub():
        emit()
    else:
        home.post(emit)


def make_logging_native() -> None:
    """
    Give `logging` and its stream and file handlers native locks, in a patched process.

    Without this a user's backend that logs on a native thread leaves greenlets stuck for
    good. Handlers that may switch while they emit (sockets, HTTP) keep their greenlet
    lock: a native lock held across a switch would stop the process. Called each time
    before user code runs on a native thread, since handlers come and go.
    """
    if not is_patched():
        return
    native_lock = original("_thread", "RLock")
    _make_lock_native(logging, "_lock", native_lock)
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        handler = reference()
        if isinstance(handler, logging.StreamHandler):
            _make_lock_native(handler, "lock", native_lock)


def _make_lock_native(owner: Any, name: str, native_lock: Any) -> None:
    lock = getattr(owner, name)
    if lock is None or isinstance(lock, native_lock):
        return
    # Not while somebody holds it: who takes the old lock and releases the new one fails.
    if lock.acquire(blocking=False):
        setattr(owner, name, native_lock())
        lock.release()


def _report(error: BaseException) -> None:
    log(logging.getLogger("flask_llmstream"), logging.ERROR, "A callback failed.", error=error)


def run_detached(function: Callable[[], Any]) -> None:
    """Run user code on a thread of its own kind, in order. Any thread; finalizers too."""

    def call() -> None:
        make_logging_native()
        function()

    _detached.call_soon(call)


_forkables: weakref.WeakSet[Any] = weakref.WeakSet()


def after_fork(owner: Any) -> None:
    """Have ``owner._after_fork()`` called in forked children: threads and locks are gone."""
    _forkables.add(owner)


def _after_fork_in_child() -> None:
    global _home
    _mailboxes.clear()
    _own_threads.clear()
    _home = None
    clock.reset()
    _detached.reset()
    for owner in list(_forkables):
        owner._after_fork()


clock = Clock(ThreadParker, start_thread, get_thread_id, _report)
"""The process's one timer thread, for constant-time code of this package only."""
_detached = Clock(ThreadParker, start_thread, get_thread_id, _report)
"""A second one, for users' callbacks that have no worker to run on: they may take long."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
