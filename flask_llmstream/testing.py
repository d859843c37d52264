"""
For the tests of apps that stream: a backend that plays a script.

    gate = Gate()
    backend = ScriptedBackend("Hel", gate, "lo", Usage(3, 2))
    llm.add_backend("scripted", backend)
    ...                          # ask; the answer stops after "Hel"
    gate.open()                  # and goes on

Nothing here sleeps: a test decides what happens next.
"""

from __future__ import annotations

from collections import deque
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from .core import runtime
from .typing import FEATURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .core.messages import InferenceRequest, Item
    from .core.runtime import Parker
    from .typing import WorkerKind

__all__ = ["Gate", "ScriptedBackend", "Signal"]


class Signal:
    """
    Happens once; anyone may wait for it.

    Unlike `threading.Event` it works between native threads and greenlets of a patched
    process. Thread safety: every method, from any thread or greenlet.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._waiters: deque[Parker] = deque()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """Let everyone go who waits, now and later. Idempotent."""
        self._is_set = True
        while self._waiters:
            try:
                self._waiters.popleft().unpark()
            except IndexError:
                return  # Someone else sets it, too.

    def wait(self, timeout_seconds: float = 10.0) -> None:
        """
        Wait until it happens.

        Raises:
            TimeoutError: It did not within *timeout_seconds*.
        """
        until = monotonic() + timeout_seconds
        if not self._is_set:
            parker = runtime.make_parker()
            self._waiters.append(parker)
            while not self._is_set and monotonic() < until:
                parker.park(until)
        if not self._is_set:
            raise TimeoutError(f"It did not happen within {timeout_seconds} s.")


class Gate:
    """
    A place in a script where the backend waits for the test.

    Attributes:
        reached: Set when a backend arrived here.
    """

    def __init__(self) -> None:
        self.reached = Signal()
        self._opened = Signal()

    def open(self) -> None:
        """Let the backend go on, now and every later time."""
        self._opened.set()

    def pass_through(self, timeout_seconds: float = inf) -> None:
        """The backend's side: tell that it is here, and wait."""
        self.reached.set()
        self._opened.wait(timeout_seconds)


class ScriptedBackend:
    """
    Plays *script* for every request, whatever it asks.

    Args:
        script: Items are emitted, exceptions raised, and a `Gate` is waited for.
        worker: See `Backend`.
        supports: See `Backend`; everything by default.

    Attributes:
        requests: What it was asked, in order.
        started: Set when the first request reached it.
        closed: Set when a run of it was over, for whatever cause.
    """

    def __init__(
        self,
        *script: Item | BaseException | Gate,
        worker: WorkerKind = "thread",
        supports: Iterable[str] = FEATURES,
    ) -> None:
        self.script = script
        self.worker = worker
        self.supports = frozenset(supports)
        self.requests: list[InferenceRequest] = []
        self.started = Signal()
        self.closed = Signal()

    def generate(self, request: InferenceRequest) -> Iterator[Any]:
        """Emit the script's items, in order."""
        self.requests.append(request)
        self.started.set()
        try:
            for step in self.script:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, Gate):
                    step.pass_through()
                else:
                    yield step
        finally:
            self.closed.set()
