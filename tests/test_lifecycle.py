"""The life of a request: its table, and the table's consequences."""

from __future__ import annotations

import pytest

from flask_llmstream.core.lifecycle import (
    TRANSITIONS,
    IllegalTransitionError,
    State,
    advance,
    name_after,
    state_after,
)
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    FirstTokenTimeoutError,
    IdleTimeoutError,
    RequestCancelledError,
    RequestDroppedError,
    SlowReaderError,
    UpstreamError,
)
from flask_llmstream.hangup import ClientLeftError

LEGAL = {
    State.SUBMITTED: "waiting rejected cancelled",
    State.WAITING: "running cancelled timed_out dropped failed",
    State.RUNNING: "completed cancelled timed_out failed",
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("target", State)
def test_exactly_the_moves_of_the_table_are_legal(state, target):
    if target.value in LEGAL.get(state, "").split():
        assert advance(state, target) is target
    else:
        with pytest.raises(IllegalTransitionError, match=f"{state.value} to {target.value}"):
            advance(state, target)


def test_terminal_states_lead_nowhere():
    assert set(TRANSITIONS) == set(State)
    assert {state for state in State if not state.is_terminal} == set(LEGAL)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, State.COMPLETED),
        (RequestCancelledError(), State.CANCELLED),
        (DeadlineExceededError(), State.TIMED_OUT),
        (FirstTokenTimeoutError(), State.TIMED_OUT),
        (IdleTimeoutError(), State.TIMED_OUT),
        (RequestDroppedError(), State.DROPPED),
        (EngineError(), State.FAILED),
        (EngineClosedError(), State.FAILED),
        (SlowReaderError(), State.FAILED),
        (TimeoutError("a backend's own"), State.FAILED),
        (KeyboardInterrupt(), State.FAILED),
    ],
)
def test_how_it_ended_tells_the_state(error, state):
    assert state_after(error) is state
    assert state.is_terminal


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (None, ""),
        (RequestCancelledError(), "app"),
        (RequestCancelledError(cause="by_id"), "by_id"),
        (ClientLeftError(), "client_left"),
        (IdleTimeoutError(), "idle_timeout"),
        (SlowReaderError(), "slow_reader"),
        (EngineError(), "engine_error"),
    ],
)
def test_an_end_has_a_finer_name(error, name):
    assert name_after(error) == name


def test_an_upstream_makes_up_no_names():
    error = UpstreamError()
    error.code = "whatever_it_says"
    assert name_after(error) == "upstream_error"
