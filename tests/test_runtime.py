"""Parking, waking, starting: in threads, on hubs, and in patched subprocesses."""

from __future__ import annotations

import sys
from threading import get_ident
from time import monotonic

import pytest
from concurrency import on_a_hub, run_script, wait_until

from flask_llmstream.core import runtime

# Greenlets' parkers.


def test_a_greenlet_that_waits_now_shorter_now_longer_keeps_one_timer(monkeypatch):
    timers = []
    call_at = runtime.clock.call_at

    def counted(when, function):
        timers.append(call_at(when, function))
        return timers[-1]

    monkeypatch.setattr(runtime.clock, "call_at", counted)

    def wait_in_turns():
        import gevent

        parker = runtime.make_parker()
        for _ in range(20):
            gevent.spawn(parker.unpark)
            parker.park(monotonic() + 60)
            assert sum(timer.function is not None for timer in timers) <= 1
            parker.park(monotonic() + 0.001)

    on_a_hub(wait_in_turns)
    assert len(timers) >= 20


# Hubs that come and go.


def test_a_hub_can_be_destroyed_by_a_greenlet_that_was_just_resumed():
    def leave_a_sleeper_behind():
        import gevent

        gevent.spawn(gevent.sleep, 3600)
        runtime.sleep(0.001)

    # `on_a_hub` destroys the hub next, which throws into what resumed us.
    on_a_hub(leave_a_sleeper_behind)


@pytest.mark.parametrize(
    "scenario",
    [
        "accidental_hubs_serve_nobody",
        "threads_take_their_hubs_along",
        "a_dead_hub_is_no_home",
    ],
)
def test_in_a_patched_process(scenario):
    run_script("patched_runtime.py", scenario)


# Detached calls.


def test_detached_calls_run_in_order_though_one_leaves_with_system_exit(caplog):
    called = []

    def leave():
        sys.exit("a user's callback")

    runtime.run_detached(lambda: called.append(1))
    runtime.run_detached(leave)
    runtime.run_detached(lambda: called.append(2))
    runtime.run_detached(lambda: called.append(get_ident()))
    wait_until(lambda: len(called) == 3)

    assert called[:2] == [1, 2]
    assert called[2] != get_ident()
    assert "A callback failed" in caplog.text


# Logging.


@pytest.mark.parametrize(
    "scenario",
    [
        "nobody_gets_stuck",
        "a_handler_that_replaces_another_is_made_native_too",
        "a_lock_that_is_held_is_left_for_next_time",
        "a_handler_that_may_switch_keeps_its_greenlet_lock",
        "handlers_come_and_go_while_everybody_logs",
        "a_native_threads_record_is_written_on_the_hub",
        "fork_leaves_logging_usable",
    ],
)
def test_logging_in_a_patched_process(scenario):
    run_script("patched_logging.py", scenario)
