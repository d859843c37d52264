"""The engine that all servers of the suite share: one native thread, a token a step."""

from __future__ import annotations

from time import monotonic_ns

STEPS_PER_SECOND = 25
STEP_NANOSECONDS = 1_000_000_000 // STEPS_PER_SECOND
# An engine that had no turn for this long does not make up for it: its steps take a device's time.
MOST_LATE_NANOSECONDS = 10 * STEP_NANOSECONDS


class StepEngine:
    """
    Steps like a continuously batching engine: at each step every sequence gets a token.

    A step's text is ``~number~nanoseconds~``, the same for all sequences. The time is when the
    step was due, on the monotonic clock: what keeps the engine from its turn counts as late.

    Args:
        on_step: Called with each step's text, on the engine's thread.
    """

    def __init__(self, on_step):
        self._on_step = on_step
        self._sleep = unpatched("time", "sleep")
        unpatched("_thread", "start_new_thread")(self._run, ())

    def _run(self):
        number = 0
        due = monotonic_ns()
        while True:
            due = max(due + STEP_NANOSECONDS, monotonic_ns() - MOST_LATE_NANOSECONDS)
            # Also where it is late: computing a step gives up the GIL.
            self._sleep(max(0.0, (due - monotonic_ns()) / 1e9))
            number += 1
            self._on_step(f"~{number}~{due}~")


def unpatched(module, name):
    """What a server of greenlets may have replaced."""
    try:
        from gevent.monkey import get_original
    except ImportError:
        return getattr(__import__(module), name)
    return get_original(module, name)
