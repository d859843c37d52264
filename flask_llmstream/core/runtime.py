"""
Threads and greenlets, and how one waits for the other: what the package asks for.

A waiter has a parker: a thread's (`parking`), or a greenlet's, which is woken through its
hub's `mailbox`. Which one is decided at each wait, by what gevent has patched (`native`).

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
import weakref
from time import monotonic
from typing import TYPE_CHECKING, Any

from .clock import Clock
from .detached import DetachedCalls
from .mailbox import GreenletParker, HubTask, Interrupted, Interruptible, Mailbox
from .native import (
    allocate_lock,
    current_hub,
    get_thread_id,
    is_patched,
    is_plain_greenlet_socket,
    original,
    shut_down_socket,
)
from .native_logging import make_logging_native
from .parking import Parker, ThreadParker

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


_mailboxes: weakref.WeakKeyDictionary[Any, Mailbox] = weakref.WeakKeyDictionary()
_home: Mailbox | None = None
"""The hub that serves requests: greenlet workers and deferred log records go there."""
_own_threads: set[int] = set()
"""Native threads of `start_thread`. A hub that user code grows there serves nobody."""


def _mailbox_of(hub: Any) -> Mailbox:
    global _home
    mailbox = _mailboxes.get(hub)
    if mailbox is None:
        mailbox = _mailboxes[hub] = Mailbox(hub)
    if (
        _home is not mailbox
        and (hub.main_hub or _home is None or not _home.is_open)
        and hub.thread_ident not in _own_threads
    ):
        _home = mailbox
    return mailbox


def _find_home() -> Mailbox | None:
    """The mailbox of the serving hub; None where no hub has been seen, or it is gone."""
    hub = current_hub()
    if hub is not None:
        _mailbox_of(hub)
    return _home if _home is not None and _home.is_open else None


def make_parker() -> Parker:
    """A parker for the caller's world: its greenlet where it has a hub, else its thread."""
    hub = current_hub()
    return ThreadParker() if hub is None else GreenletParker(_mailbox_of(hub), clock)


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
        home.spawn(function)
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


def _report(error: BaseException) -> None:
    log(logging.getLogger("flask_llmstream"), logging.ERROR, "A callback failed.", error=error)


def run_detached(function: Callable[[], Any]) -> None:
    """
    Run user code on a thread of its own kind, in order unless one takes longer than a second.
    Any thread; finalizers too.
    """

    def call() -> None:
        make_logging_native()
        function()

    _detached.call(call)


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
_detached = DetachedCalls(clock, start_thread, _report)
"""For users' callbacks that have no worker to run on: they may take long."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
