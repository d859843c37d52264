"""A gevent hub's mailbox, and what other threads put into it to wake its greenlets."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, final

from .native import current_hub

if TYPE_CHECKING:
    from collections.abc import Callable

    from .clock import Clock, Timer

__all__ = ["GreenletParker", "HubTask", "Interrupted", "Interruptible", "Mailbox"]


class GreenletParker:
    """
    A `Parker`: parks the greenlet and lets its hub run.

    Args:
        mailbox: Of its hub; wakes come through it.
        clock: Ends a park that has a deadline.
    """

    __slots__ = ("_clock", "_greenlet", "_has_permit", "_mailbox", "_timer")

    def __init__(self, mailbox: Mailbox, clock: Clock) -> None:
        self._mailbox = mailbox
        self._clock = clock
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
            self._timer = self._clock.call_at(until, self.unpark)

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

    def __init__(self, mailbox: Mailbox) -> None:
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


@final
class HubTask:
    """
    A function that runs on the hub itself, once for all the wake-ups before it runs. It
    must not wait, and takes constant time.

    Attributes:
        function: Called with the monotonic time, read once for several tasks; None for
            nothing to do (any more).
    """

    __slots__ = ("_is_posted", "_mailbox", "function")

    def __init__(self, mailbox: Mailbox) -> None:
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


class Mailbox:
    """One hub's way in from other threads: a deque and one async watcher."""

    def __init__(self, hub: Any) -> None:
        self._hub: weakref.ref[Any] = weakref.ref(hub)
        self.ready: deque[GreenletParker | Interruptible | HubTask | Callable[[], Any]] = deque()
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

    def post(self, item: GreenletParker | Interruptible | HubTask | Callable[[], Any]) -> None:
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

    def spawn(self, function: Callable[[], Any]) -> None:
        """On the hub's own thread: run *function* in a greenlet of its own."""
        sys.modules["gevent"].spawn(function)

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
                elif isinstance(item, (GreenletParker, Interruptible)):
                    item.resume()
                else:
                    self.spawn(item)
            except BaseException:
                # One broken waiter must not strand the others behind it.
                self.hub.handle_error(self, *sys.exc_info())
            if not number % _ITEMS_BETWEEN_LOOKS:
                now = monotonic()
                if now >= until:
                    # Connections and requests must come in between.
                    self.send()
                    return
