"""The life of a request in an engine: one table, no other way through."""

from __future__ import annotations

from enum import Enum

from ..exceptions import (
    DeadlineExceededError,
    LLMStreamError,
    RequestCancelledError,
    RequestDroppedError,
)

__all__ = [
    "TRANSITIONS",
    "IllegalTransitionError",
    "State",
    "advance",
    "name_after",
    "state_after",
]


class State(Enum):
    """Where a request stands. The value names its counter, ``total_<value>``."""

    SUBMITTED = "submitted"
    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    DROPPED = "dropped"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


_ENDED_EARLY = frozenset({State.CANCELLED, State.TIMED_OUT, State.DROPPED, State.FAILED})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.SUBMITTED: frozenset({State.WAITING, State.REJECTED, State.CANCELLED}),
    State.WAITING: frozenset({State.RUNNING}) | _ENDED_EARLY,
    State.RUNNING: frozenset({State.COMPLETED}) | _ENDED_EARLY - {State.DROPPED},
    State.COMPLETED: frozenset(),
    State.CANCELLED: frozenset(),
    State.REJECTED: frozenset(),
    State.TIMED_OUT: frozenset(),
    State.DROPPED: frozenset(),
    State.FAILED: frozenset(),
}


class IllegalTransitionError(RuntimeError):
    """A bug in an engine: nothing was changed."""


def advance(state: State, target: State) -> State:
    """*target*, where the table leads there from *state*."""
    if target not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"A request cannot go from {state.value} to {target.value}.")
    return target


def state_after(error: BaseException | None) -> State:
    """The terminal state of an admitted request that ended with *error*."""
    if error is None:
        return State.COMPLETED
    if isinstance(error, RequestCancelledError):
        return State.CANCELLED
    if isinstance(error, DeadlineExceededError):
        return State.TIMED_OUT
    if isinstance(error, RequestDroppedError):
        return State.DROPPED
    return State.FAILED


def name_after(error: LLMStreamError | None) -> str:
    """
    The finer name of an end, for who counts: who cancelled, else the error's code.

    The class's code: one error may carry its upstream's, of which there may be any number.
    """
    if error is None:
        return ""
    return error.cause if isinstance(error, RequestCancelledError) else type(error).code
