"""Balancing: who is next, what happens when one fails, and that every call is counted out."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from time import monotonic

import pytest
from concurrency import Background, wait_until

from flask_llmstream.core.deadlines import Deadline
from flask_llmstream.core.messages import Finish, InferenceRequest, InferenceResponse, Usage
from flask_llmstream.engines import balancing, rotation
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.engines.balancing import BalancedBackend, LoadBalanceStrategy
from flask_llmstream.engines.rotation import Wait
from flask_llmstream.exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    PermissionDeniedError,
    QueueFullError,
    RequestCancelledError,
    UnknownModelError,
    UpstreamError,
)
from flask_llmstream.testing import Gate, ScriptedBackend, Signal

LEAST_LOADED = LoadBalanceStrategy.LEAST_LOADED
ROUND_ROBIN = LoadBalanceStrategy.ROUND_ROBIN
RESPONSE_TIME_WEIGHTED = LoadBalanceStrategy.RESPONSE_TIME_WEIGHTED


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but where a test moves it; a backend that fails is out for 2 s, 4 s…"""
    clock = Clock()
    monkeypatch.setattr(rotation, "monotonic", clock)
    monkeypatch.setattr(balancing, "monotonic", clock)
    monkeypatch.setattr(rotation, "uniform", lambda _, longest: longest)
    return clock


class FakeBackend:
    """Yields its name; `fails` holds what it raises instead, call by call."""

    def __init__(self, name, *, fails=(), **attributes):
        self.name = name
        self.fails = list(fails)
        self.calls = 0
        self.closed = 0
        self.__dict__.update(attributes)

    def generate(self, request):
        self.calls += 1
        if self.fails:
            error = self.fails.pop(0)
            if error is not None:
                raise error
        try:
            yield self.name
            yield "!"
        finally:
            self.closed += 1


@dataclass
class Run:
    """What an engine's copy of a request has as its `control`."""

    is_over: bool
    timed_out: bool = False

    def on_cancel(self, function):
        self.cancel = function


def request(prompt="x", **options):
    return InferenceRequest(prompt=prompt, **options)


def ask(balanced, **options):
    """The first item, which a fake's name is; the stream is closed."""
    stream = balanced.generate(request(**options))
    try:
        return next(stream)
    finally:
        stream.close()


def under_way(balanced):
    return [each["under_way"] for each in balanced.statistics()]


def failures(balanced):
    return [each["failures"] for each in balanced.statistics()]


# Who is next.


def test_round_robin_asks_each_in_its_turn():
    balanced = BalancedBackend(map(FakeBackend, "abc"), strategy=ROUND_ROBIN)
    assert [ask(balanced) for _ in range(7)] == list("abcabca")


def test_least_loaded_asks_the_one_with_the_fewest_calls():
    balanced = BalancedBackend(map(FakeBackend, "abc"))
    streams = [balanced.generate(request()) for _ in range(3)]
    assert under_way(balanced) == [1, 1, 1]
    streams[1].close()
    assert ask(balanced) == "b"
    assert ask(balanced) == "b"
    streams[0].close()
    streams[2].close()


def test_least_loaded_takes_turns_among_equals():
    balanced = BalancedBackend(map(FakeBackend, "ab"))
    assert [ask(balanced) for _ in range(4)] == list("abab")


def test_response_time_weighted_gives_shares_by_speed(clock):
    class Slow(FakeBackend):
        def generate(self, request):
            clock.now += self.seconds
            return super().generate(request)

    backends = [Slow("fast", seconds=0.1), Slow("slow", seconds=0.3)]
    balanced = BalancedBackend(backends, strategy=RESPONSE_TIME_WEIGHTED)
    for _ in range(2):
        ask(balanced)  # Each is asked before any is weighed.
    assert [backend.calls for backend in backends] == [1, 1]
    shares = Counter(ask(balanced) for _ in range(400))
    assert 290 <= shares["fast"] <= 310


def test_response_time_weighted_follows_a_backend_that_becomes_slow(clock):
    class Slow(FakeBackend):
        seconds = 0.1

        def generate(self, request):
            clock.now += self.seconds
            return super().generate(request)

    backends = [Slow("a"), Slow("b")]
    balanced = BalancedBackend(backends, strategy=RESPONSE_TIME_WEIGHTED)
    for _ in range(10):
        ask(balanced)
    backends[0].seconds = 10.0
    for _ in range(50):
        ask(balanced)
    shares = Counter(ask(balanced) for _ in range(200))
    assert 0 < shares["a"] < 20


def test_response_time_weighted_counts_the_calls_under_way(clock):
    balanced = BalancedBackend(map(FakeBackend, "ab"), strategy=RESPONSE_TIME_WEIGHTED)
    for _ in range(2):
        ask(balanced)
    balanced.add(FakeBackend("c"))
    streams = [balanced.generate(request()) for _ in range(30)]
    assert under_way(balanced) == [10, 10, 10]
    for stream in streams:
        stream.close()


def test_the_average_is_of_the_time_to_the_first_item(clock):
    class Slow(FakeBackend):
        def generate(self, request):
            clock.now += 2
            yield "first"
            clock.now += 100
            yield "last"

    balanced = BalancedBackend([Slow("a")])
    assert list(balanced.generate(request())) == ["first", "last"]
    assert balanced.statistics() == [
        {"name": "Slow", "under_way": 0, "failures": 0, "seconds": 2.0}
    ]


def test_a_strategy_may_be_given_by_its_name():
    balanced = BalancedBackend(map(FakeBackend, "ab"), strategy="round_robin")
    assert repr(balanced) == "<BalancedBackend of 2, round_robin>"


def test_an_unknown_strategy_is_refused_with_what_is_allowed():
    with pytest.raises(ConfigurationError, match=r"'least_loaded', 'round_robin'.*not 'fastest'"):
        BalancedBackend([FakeBackend("a")], strategy="fastest")


def test_a_full_backend_is_passed_over():
    balanced = BalancedBackend(
        [FakeBackend("a", max_concurrency=1), FakeBackend("b")], strategy=ROUND_ROBIN
    )
    held = balanced.generate(request())
    assert [ask(balanced) for _ in range(3)] == list("bbb")
    held.close()
    assert ask(balanced) == "a"


def test_where_all_are_full_a_request_waits_for_room():
    balanced = BalancedBackend([FakeBackend(name, max_concurrency=1) for name in "ab"])
    held = [balanced.generate(request()) for _ in range(2)]
    waiting = Background(lambda: ask(balanced))
    wait_until(lambda: balanced._rotation._waiting)
    assert under_way(balanced) == [1, 1]
    held[1].close()
    assert waiting.result() == "b"
    held[0].close()


def test_room_goes_to_the_highest_priority_then_to_who_came_first():
    asked = []

    class Noting(FakeBackend):
        def generate(self, request):
            asked.append(request.prompt)
            return super().generate(request)

    balanced = BalancedBackend([Noting("a", max_concurrency=1)])
    held = balanced.generate(request("held"))
    waiting = []
    for options in (
        {"prompt": "low"},
        {"prompt": "first", "priority": 5},
        {"prompt": "second", "priority": 5},
    ):
        waiting.append(Background(lambda options=options: ask(balanced, **options)))
        wait_until(lambda: len(balanced._rotation._waiting) == len(waiting))
    held.close()
    for each in waiting:
        each.result()
    assert asked == ["held", "first", "second", "low"]


def test_who_comes_while_others_wait_waits_behind_them():
    balanced = BalancedBackend([FakeBackend("a", max_concurrency=1)])
    rotation = balanced._rotation
    with rotation.waiting(0) as waiter:
        assert isinstance(rotation.pick([]), Wait)
        attempt = rotation.pick([], waiter=waiter)
    assert attempt.is_open


def test_who_is_cancelled_while_it_waits_gives_up():
    balanced = BalancedBackend([FakeBackend("a", max_concurrency=1)])
    held = balanced.generate(request())
    run = Run(is_over=False)
    waiting = Background(lambda: ask(balanced, control=run))
    wait_until(lambda: balanced._rotation._waiting)
    run.is_over = True
    run.cancel()
    with pytest.raises(RequestCancelledError):
        waiting.result()
    assert not balanced._rotation._waiting
    held.close()


def test_a_failing_backends_calls_wait_for_room_at_the_others(clock):
    gate = Gate()
    bad = ScriptedBackend(gate, UpstreamError("reset"))
    bad.max_concurrency = 1
    balanced = BalancedBackend([bad, FakeBackend("b", max_concurrency=1)])
    failing = Background(lambda: ask(balanced))
    gate.reached.wait()
    held = balanced.generate(request())
    gate.open()
    wait_until(lambda: balanced._rotation._waiting)
    assert under_way(balanced) == [0, 1]
    held.close()
    assert failing.result() == "b"


# What they are together.


def test_it_takes_over_the_worker_kind():
    assert BalancedBackend([FakeBackend("a", worker="greenlet")]).worker == "greenlet"
    assert BalancedBackend([FakeBackend("a")]).worker == "thread"


def test_worker_kinds_must_agree():
    with pytest.raises(ConfigurationError, match="one worker kind: 'thread', not 'greenlet'"):
        BalancedBackend([FakeBackend("a"), FakeBackend("b", worker="greenlet")])


def test_it_supports_what_all_support():
    balanced = BalancedBackend(
        [FakeBackend("a", supports={"tools", "n"}), FakeBackend("b", supports={"n", "images"})]
    )
    assert balanced.supports == {"n"}


def test_a_backend_that_does_not_say_is_trusted_with_what_its_output_shows():
    balanced = BalancedBackend(
        [FakeBackend("a", supports={"tools", "json_schema"}), FakeBackend("b")]
    )
    assert balanced.supports == {"tools"}


def test_it_says_nothing_where_none_says_what_it_supports():
    assert not hasattr(BalancedBackend(map(FakeBackend, "ab")), "supports")


def test_its_max_concurrency_is_the_sum_where_all_have_a_limit():
    limited = [FakeBackend(name, max_concurrency=2) for name in "ab"]
    assert BalancedBackend(limited).max_concurrency == 4
    assert not hasattr(BalancedBackend([*limited, FakeBackend("c")]), "max_concurrency")


def test_who_is_added_while_another_one_is_counts_too():
    class Intruded:
        def __iter__(self):
            if late not in balanced.backends:
                balanced.add(late)
            return iter({"n", "tools"})

    late = FakeBackend("late", supports={"n"})
    balanced = BalancedBackend([FakeBackend("a", supports={"n", "tools"})])
    balanced.add(FakeBackend("b", supports=Intruded()))
    assert len(balanced.backends) == 3
    assert balanced.supports == {"n"}


def counting(tokens, *fails):
    fails = list(fails)

    def count_tokens(request):
        if fails:
            raise fails.pop(0)
        return tokens

    return FakeBackend("a", count_tokens=count_tokens)


def test_it_counts_tokens_where_one_can():
    balanced = BalancedBackend([FakeBackend("a"), counting(7)])
    assert balanced.count_tokens(request()) == 7
    assert not hasattr(BalancedBackend([FakeBackend("a")]), "count_tokens")


def test_who_fails_to_count_leaves_it_to_the_next_one():
    balanced = BalancedBackend([counting(0, UpstreamError("Down.")), counting(7)])
    assert balanced.count_tokens(request()) == 7
    assert failures(balanced) == [0, 0]


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ((InvalidRequestError("No."), None), "No."),
        ((UpstreamError("Down."), UpstreamError("Down, too.")), "Down, too."),
    ],
    ids=["the request's own fault", "all fail"],
)
def test_what_nobody_can_count_is_an_error(errors, raised):
    balanced = BalancedBackend([counting(0, error) for error in errors])
    with pytest.raises(type(errors[0]), match=raised):
        balanced.count_tokens(request())


def test_a_count_that_is_cancelled_is_not_tried_again():
    balanced = BalancedBackend([counting(0, UpstreamError("Down.")), counting(7)])
    with pytest.raises(UpstreamError):
        balanced.count_tokens(request(control=Run(is_over=True)))


def test_what_is_added_counts_at_once_and_what_is_removed_no_more():
    first, second = FakeBackend("a", supports={"n"}, max_concurrency=1), FakeBackend("b")
    balanced = BalancedBackend([first])
    balanced.add(second)
    balanced.add(second)
    assert balanced.backends == (first, second)
    assert not hasattr(balanced, "max_concurrency")
    held = balanced.generate(request())
    balanced.remove(first)
    assert not hasattr(balanced, "supports")
    assert [ask(balanced) for _ in range(2)] == ["b", "b"]
    assert list(held) == ["a", "!"]


def test_the_only_backend_stays():
    backend = FakeBackend("a")
    balanced = BalancedBackend([backend])
    with pytest.raises(ConfigurationError, match="only backend"):
        balanced.remove(backend)
    with pytest.raises(ConfigurationError, match="none of these"):
        balanced.remove(FakeBackend("b"))


def test_there_must_be_one():
    with pytest.raises(ConfigurationError, match="at least one"):
        BalancedBackend([])


def test_what_cannot_generate_is_refused():
    with pytest.raises(ConfigurationError, match="str is no backend"):
        BalancedBackend(["a"])


def test_it_is_ready_when_one_backend_is():
    def not_ready():
        raise ConfigurationError("No file.")

    balanced = BalancedBackend([FakeBackend("a", check_ready=not_ready)])
    with pytest.raises(ConfigurationError, match="No file"):
        balanced.check_ready()
    balanced.add(FakeBackend("b", check_ready=lambda: None))
    balanced.check_ready()
    balanced = BalancedBackend([FakeBackend("a", check_ready=not_ready), FakeBackend("b")])
    balanced.check_ready()


# What goes through, and that it is counted out.


def test_a_stream_goes_through_item_by_item_and_is_closed_with_its_source():
    backend = FakeBackend("a")
    balanced = BalancedBackend([backend])
    stream = balanced.generate(request())
    assert next(stream) == "a"
    assert under_way(balanced) == [1]
    stream.close()
    stream.close()
    assert (backend.closed, under_way(balanced)) == (1, [0])


def test_an_exhausted_stream_is_counted_out_without_a_close():
    balanced = BalancedBackend([FakeBackend("a")])
    stream = balanced.generate(request())
    assert list(stream) == ["a", "!"]
    assert under_way(balanced) == [0]
    stream.close()
    assert under_way(balanced) == [0]


def test_a_dropped_stream_is_counted_out():
    balanced = BalancedBackend([FakeBackend("a")])
    stream = balanced.generate(request())
    del stream
    assert under_way(balanced) == [0]


def test_a_stream_whose_close_fails_is_counted_out():
    class Bad(FakeBackend):
        def generate(self, request):
            try:
                yield "a"
                yield "b"
            finally:
                raise OSError("reset")

    balanced = BalancedBackend([Bad("a")])
    stream = balanced.generate(request())
    with pytest.raises(OSError, match="reset"):
        stream.close()
    assert under_way(balanced) == [0]


def test_a_stream_costs_no_frame_a_token():
    class Endless:
        def generate(self, request):
            return iter(lambda: "token", None)

    stream = BalancedBackend([Endless()]).generate(request())
    frames = []
    sys.setprofile(lambda frame, event, _: event == "call" and frames.append(frame.f_code.co_name))
    try:
        for _ in islice(stream, 100):
            pass
    finally:
        sys.setprofile(None)
    stream.close()
    assert not [name for name in frames if name != "<lambda>"]


@pytest.mark.parametrize("result", [None, "whole", b"whole", InferenceResponse(text="whole"), {}])
def test_what_is_no_iterator_goes_through_as_it_is(result):
    class Whole:
        def generate(self, request):
            return result

    balanced = BalancedBackend([Whole()])
    assert balanced.generate(request()) is result
    assert under_way(balanced) == [0]


def test_an_empty_iterator_is_an_empty_answer():
    class Empty:
        closed = False

        def generate(self, request):
            return self

        def __iter__(self):
            return iter(())

        def close(self):
            self.closed = True

    backend = Empty()
    balanced = BalancedBackend([backend])
    assert balanced.generate(request()) is None
    assert backend.closed
    assert under_way(balanced) == [0]


def test_a_failing_iterator_is_closed():
    class Broken:
        closed = 0

        def generate(self, request):
            return self

        def __iter__(self):
            return self

        def __next__(self):
            raise OSError("reset")

        def close(self):
            self.closed += 1

    broken = Broken()
    balanced = BalancedBackend([broken, FakeBackend("b")])
    assert ask(balanced) == "b"
    assert (broken.closed, under_way(balanced)) == (1, [0, 0])


def test_a_backend_may_call_back_instead_of_yielding():
    class Pushing:
        def generate(self, request):
            assert request.stream_callback("a")
            assert not request.stream_callback("b")

    items = []

    def take(item):
        items.append(item)
        return len(items) < 2

    assert BalancedBackend([Pushing()]).generate(request(stream_callback=take)) is None
    assert items == ["a", "b"]


def test_a_backend_may_call_back_and_then_yield():
    class Both:
        def generate(self, request):
            request.stream_callback("a")
            yield "b"

    items = []
    balanced = BalancedBackend([Both()])
    stream = balanced.generate(request(stream_callback=lambda item: not items.append(item)))
    assert (items, list(stream)) == (["a"], ["b"])
    assert under_way(balanced) == [0]


# Failing.


def test_a_failing_backend_hands_its_request_to_the_next_one(clock, caplog):
    backends = [FakeBackend("a", fails=[OSError("refused")]), FakeBackend("b")]
    balanced = BalancedBackend(backends)
    with caplog.at_level(logging.WARNING):
        assert ask(balanced) == "b"
    assert "failed (OSError); another attempt is made (FakeBackend)" in caplog.text
    assert "refused" in caplog.text
    assert (failures(balanced), under_way(balanced)) == ([1, 0], [0, 0])


def test_a_failing_backend_is_left_out_until_its_time_and_then_probed(clock):
    bad, good = FakeBackend("a", fails=[OSError()]), FakeBackend("b")
    balanced = BalancedBackend([bad, good], strategy=ROUND_ROBIN)
    assert ask(balanced) == "b"
    clock.now += 1.9
    assert [ask(balanced) for _ in range(3)] == list("bbb")
    clock.now += 0.1
    assert ask(balanced) == "a"
    assert failures(balanced) == [0, 0]
    assert [ask(balanced) for _ in range(4)] == list("baba")


def test_it_is_out_twice_as_long_each_time_up_to_a_minute(clock):
    bad = FakeBackend("a", fails=[OSError() for _ in range(9)])
    balanced = BalancedBackend([bad, FakeBackend("b")])
    waits = []
    for _ in range(9):
        calls = bad.calls
        began = clock.now
        while bad.calls == calls:
            ask(balanced)
            clock.now += 0.5
        waits.append(clock.now - 0.5 - began)
    assert [round(wait) for wait in waits] == [0, 2, 4, 8, 16, 32, 60, 60, 60]


def test_jitter_spreads_the_wait_over_its_upper_half(monkeypatch):
    asked = []
    monkeypatch.setattr(rotation, "uniform", lambda low, high: asked.append((low, high)) or high)
    balanced = BalancedBackend([FakeBackend("a", fails=[OSError()]), FakeBackend("b")])
    ask(balanced)
    assert asked == [(1.0, 2.0)]


def test_only_one_request_at_a_time_is_the_probe(clock):
    gate = Gate()
    bad = ScriptedBackend(OSError())
    balanced = BalancedBackend([bad, FakeBackend("b")])
    assert ask(balanced) == "b"
    clock.now += 2
    bad.script = (gate, "a")
    probe = Background(lambda: ask(balanced))
    gate.reached.wait()
    assert [ask(balanced) for _ in range(3)] == list("bbb")
    gate.open()
    assert probe.result() == "a"
    assert failures(balanced) == [0, 0]


def test_a_probe_that_says_nothing_for_a_minute_is_not_the_last(clock):
    bad = FakeBackend("a", fails=[OSError()])
    balanced = BalancedBackend([bad, FakeBackend("b")])
    ask(balanced)
    clock.now += 2
    silent = balanced._rotation.pick([])
    assert silent.member.backend is bad
    assert ask(balanced) == "b"
    clock.now += 60
    assert ask(balanced) == "a"


def test_a_probe_without_a_verdict_leaves_it_to_the_next_request(clock):
    bad = FakeBackend("a", fails=[OSError(), InvalidRequestError("Too long.")])
    balanced = BalancedBackend([bad, FakeBackend("b")])
    ask(balanced)
    clock.now += 2
    with pytest.raises(InvalidRequestError):
        ask(balanced)
    assert failures(balanced) == [1, 0]
    assert ask(balanced) == "a"


def test_a_probe_that_ends_because_it_was_cancelled_shows_nothing(clock):
    class Hanging(FakeBackend):
        def generate(self, request):
            if not self.fails:
                request.control.is_over = True
                return iter(())
            raise self.fails.pop(0)

    balanced = BalancedBackend([Hanging("a", fails=[OSError()]), FakeBackend("b")])
    ask(balanced)
    clock.now += 2
    assert balanced.generate(request(control=Run(is_over=False))) is None
    assert (failures(balanced), under_way(balanced)) == ([1, 0], [0, 0])


def test_failures_of_calls_that_were_under_way_count_once(clock):
    bad, good = FakeBackend("a"), FakeBackend("b")
    balanced = BalancedBackend([bad, good], strategy=ROUND_ROBIN)
    first, _, second = (balanced._rotation.pick([]) for _ in range(3))
    for attempt in (first, second):
        assert balanced._is_for_another(attempt, OSError(), [request()])
    assert failures(balanced) == [1, 0]


def test_where_all_are_out_the_first_whose_time_comes_is_asked_anyway(clock):
    backends = [FakeBackend("a", fails=[OSError(), None]), FakeBackend("b", fails=[OSError()] * 9)]
    balanced = BalancedBackend(backends, strategy=ROUND_ROBIN)
    with pytest.raises(OSError):
        ask(balanced)
    assert failures(balanced) == [1, 1]
    assert ask(balanced) == "a"
    assert failures(balanced) == [0, 1]


def test_to_ask_before_its_time_does_not_count_against_it(clock):
    backend = FakeBackend("a", fails=[OSError() for _ in range(5)])
    balanced = BalancedBackend([backend])
    for _ in range(5):
        with pytest.raises(OSError):
            ask(balanced)
    assert failures(balanced) == [1]
    assert ask(balanced) == "a"
    assert failures(balanced) == [0]


def test_each_backend_is_asked_once_and_the_last_error_is_the_callers(clock):
    backends = [FakeBackend(name, fails=[UpstreamError(name)]) for name in "abc"]
    balanced = BalancedBackend(backends)
    with pytest.raises(UpstreamError, match="c"):
        ask(balanced)
    assert [backend.calls for backend in backends] == [1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("Too long."),
        PermissionDeniedError("No."),
        DeadlineExceededError("Late."),
        RequestCancelledError("Gone."),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_the_backends_fault_is_the_callers_at_once(error):
    backends = [FakeBackend("a", fails=[error]), FakeBackend("b")]
    balanced = BalancedBackend(backends)
    with pytest.raises(type(error)):
        ask(balanced)
    assert backends[1].calls == 0
    assert (failures(balanced), under_way(balanced)) == ([0, 0], [0, 0])


def test_a_backend_that_is_full_itself_hands_over(clock):
    balanced = BalancedBackend([FakeBackend("a", fails=[QueueFullError()]), FakeBackend("b")])
    assert ask(balanced) == "b"


def busy(seconds=0.05):
    return QueueFullError("Too many.", retry_after=seconds)


def test_a_busy_backend_is_left_alone_for_as_long_as_it_said(clock):
    balanced = BalancedBackend([FakeBackend("a", fails=[busy(7)]), FakeBackend("b")])
    assert [ask(balanced) for _ in range(3)] == list("bbb")
    assert failures(balanced) == [0, 0]
    clock.now += 6.9
    assert [ask(balanced) for _ in range(2)] == list("bb")
    clock.now += 0.1
    assert ask(balanced) == "a"


def test_where_all_are_busy_a_request_waits_for_the_first_of_them():
    backends = [FakeBackend("a", fails=[busy(30)]), FakeBackend("b", fails=[busy()])]
    balanced = BalancedBackend(backends)
    began = monotonic()
    assert ask(balanced, deadline=Deadline.after(10)) == "b"
    assert monotonic() - began >= 0.05
    assert [backend.calls for backend in backends] == [1, 2]


def test_where_the_deadline_does_not_let_it_wait_the_caller_is_told_when(clock):
    backends = [FakeBackend("a", fails=[busy(9)]), FakeBackend("b", fails=[busy(7)])]
    balanced = BalancedBackend(backends)
    for _ in range(2):  # The second one is told without that anybody is asked.
        with pytest.raises(QueueFullError) as caught:
            ask(balanced, deadline=Deadline(clock.now + 5))
        assert caught.value.retry_after == pytest.approx(7)
    assert [backend.calls for backend in backends] == [1, 1]


def test_nobody_waits_longer_than_a_minute_for_a_busy_backend(clock):
    balanced = BalancedBackend([FakeBackend("a", fails=[busy(100)])])
    with pytest.raises(QueueFullError, match="Too many"):
        ask(balanced)


def test_who_is_cancelled_while_all_are_busy_gives_up():
    balanced = BalancedBackend([FakeBackend("a", fails=[busy(30)])])
    run = Run(is_over=False)
    waiting = Background(lambda: ask(balanced, control=run))
    wait_until(lambda: balanced._rotation._waiting)
    run.is_over = True
    run.cancel()
    with pytest.raises(QueueFullError):
        waiting.result()


def test_a_failing_backend_may_say_when_it_is_to_be_probed(clock):
    bad = FakeBackend("a", fails=[UpstreamError("503", retry_after=9)])
    balanced = BalancedBackend([bad, FakeBackend("b")])
    assert ask(balanced) == "b"
    clock.now += 8.9
    assert [ask(balanced) for _ in range(2)] == list("bb")
    clock.now += 0.1
    assert ask(balanced) == "a"


def test_a_model_that_one_backend_does_not_have_another_one_may_have(clock):
    balanced = BalancedBackend([FakeBackend("a", fails=[UnknownModelError()]), FakeBackend("b")])
    assert ask(balanced) == "b"
    assert failures(balanced) == [1, 0]


def test_a_backend_that_says_nothing_until_the_time_is_over_is_out(clock):
    run = Run(is_over=False)

    class Silent(FakeBackend):
        def generate(self, request):
            clock.now += self.seconds
            run.is_over = run.timed_out = True
            raise RequestCancelledError
            yield

    impatient = BalancedBackend([Silent("a", seconds=9)])
    patient = BalancedBackend([Silent("a", seconds=10)])
    for balanced, expected in ((impatient, [0]), (patient, [1])):
        run.is_over = False
        with pytest.raises(RequestCancelledError):
            ask(balanced, control=run)
        assert failures(balanced) == expected


def test_it_is_not_ready_while_all_are_out(clock):
    balanced = BalancedBackend([FakeBackend("a", fails=[OSError()])])
    with pytest.raises(OSError):
        ask(balanced)
    with pytest.raises(UpstreamError, match="failed lately"):
        balanced.check_ready()
    clock.now += 2  # A request would be the probe.
    balanced.check_ready()


def test_who_was_cancelled_is_not_tried_again():
    backends = [FakeBackend("a", fails=[OSError()]), FakeBackend("b")]
    balanced = BalancedBackend(backends)
    with pytest.raises(OSError):
        balanced.generate(request(control=Run(is_over=True)))
    assert backends[1].calls == 0
    assert failures(balanced) == [0, 0]


def test_after_the_first_item_nobody_else_is_asked():
    class Breaking(FakeBackend):
        def generate(self, request):
            yield "a"
            raise UpstreamError("reset")

    good = FakeBackend("b")
    stream = BalancedBackend([Breaking("a"), good]).generate(request())
    with pytest.raises(UpstreamError):
        list(stream)
    assert good.calls == 0


def test_after_the_first_item_that_was_called_back_nobody_else_is_asked():
    class Breaking:
        def generate(self, request):
            request.stream_callback("a")
            raise UpstreamError("reset")

    good = FakeBackend("b")
    with pytest.raises(UpstreamError):
        BalancedBackend([Breaking(), good]).generate(request(stream_callback=lambda _: True))
    assert good.calls == 0


def test_an_engine_sees_one_answer_where_a_backend_failed(caplog):
    engine = AsyncInferenceEngine(
        BalancedBackend([ScriptedBackend(OSError("refused")), ScriptedBackend("o", "k")])
    )
    tokens = []
    handle = engine.submit_streaming(request(), lambda *call: tokens.append(call))
    assert handle.get(10).text == "ok"
    assert tokens == [("o", False), ("k", False), ("", True)]
    assert engine.worker_stats()["total_completed"] == 1
    engine.shutdown()


def test_an_engine_that_cancels_has_the_call_counted_out():
    gate = Gate()
    backend = ScriptedBackend("a", gate, "b")
    balanced = BalancedBackend([backend])
    engine = AsyncInferenceEngine(balanced)
    handle = engine.submit(request())
    gate.reached.wait()
    assert under_way(balanced) == [1]
    handle.cancel()
    gate.open()
    backend.closed.wait()
    engine.shutdown()
    wait_until(lambda: under_way(balanced) == [0])


# Batches.


class FakeBatchBackend(FakeBackend):
    def generate_batch(self, requests):
        self.calls += 1
        if self.fails:
            raise self.fails.pop(0)
        return [InferenceResponse(text=self.name + request.prompt) for request in requests]


def test_batches_are_taken_where_all_take_them():
    balanced = BalancedBackend(map(FakeBatchBackend, "ab"))
    responses = balanced.generate_batch([request("1"), request("2")])
    assert [response.text for response in responses] == ["a1", "a2"]
    balanced.add(FakeBackend("c"))
    assert not hasattr(balanced, "generate_batch")


def test_a_failing_batch_goes_to_the_next_one(clock):
    balanced = BalancedBackend([FakeBatchBackend("a", fails=[OSError()]), FakeBatchBackend("b")])
    assert balanced.generate_batch([request("1")])[0].text == "b1"
    assert (failures(balanced), under_way(balanced)) == ([1, 0], [0, 0])


def test_a_batch_that_all_left_is_not_tried_again():
    second = FakeBatchBackend("b")
    balanced = BalancedBackend([FakeBatchBackend("a", fails=[OSError()]), second])
    with pytest.raises(OSError):
        balanced.generate_batch([request(control=Run(is_over=True))])
    assert second.calls == 0


def test_a_batch_that_nobody_takes_any_more_fails():
    batching, plain = FakeBatchBackend("a"), FakeBackend("b")
    balanced = BalancedBackend([batching])
    generate_batch = balanced.generate_batch
    balanced.add(plain)
    assert generate_batch([request("1")])[0].text == "a1"
    balanced.remove(batching)
    with pytest.raises(EngineError, match="batches"):
        generate_batch([request("1")])


# Callback backends.


class FakeCallbackBackend:
    """Keeps each request's emit; `fails` holds what submit() raises, call by call."""

    def __init__(self, *, fails=(), at_once=(), **attributes):
        self.fails = list(fails)
        self.at_once = at_once
        self.emits = []
        self.cancelled = 0
        self.__dict__.update(attributes)

    def submit(self, request, emit):
        if self.fails:
            raise self.fails.pop(0)
        self.emits.append(emit)
        for item in self.at_once:
            emit(item)
        return self._cancel

    def _cancel(self):
        self.cancelled += 1


class Listener:
    """An engine's run and its emit, which ends the stream at its `Finish`."""

    def __init__(self):
        self.items = []
        self.is_over = False

    def __call__(self, item):
        self.items.append(item)
        self.is_over = self.is_over or isinstance(item, (Finish, BaseException))
        return not self.is_over

    def submit_to(self, balanced):
        return balanced.submit(request(control=self), self)


def test_callback_backends_are_one_callback_backend():
    backends = [FakeCallbackBackend(max_concurrency=3), FakeCallbackBackend()]
    balanced = BalancedBackend(backends)
    assert balanced.max_concurrency == 3 + 256
    assert not hasattr(balanced, "generate_batch")
    listener = Listener()
    listener.submit_to(balanced)
    emit = backends[0].emits[0]
    assert emit("a")
    assert emit(Usage(1, 1))
    assert under_way(balanced) == [1, 0]
    assert not emit(Finish("stop"))
    assert not emit("late")
    assert listener.items == ["a", Usage(1, 1), Finish("stop")]
    assert under_way(balanced) == [0, 0]


def test_callback_backends_do_not_mix_with_others():
    with pytest.raises(ConfigurationError, match="all be callback backends, or none"):
        BalancedBackend([FakeCallbackBackend(), FakeBackend("a")])


def test_a_callback_backends_cancel_is_called_once():
    backend = FakeCallbackBackend()
    balanced = BalancedBackend([backend])
    cancel = Listener().submit_to(balanced)
    cancel()
    cancel()
    assert (backend.cancelled, under_way(balanced)) == (1, [0])
    assert not backend.emits[0]("late")


def test_a_callback_backend_without_a_cancel_may_return_none():
    class Careless(FakeCallbackBackend):
        def submit(self, request, emit):
            super().submit(request, emit)

    balanced = BalancedBackend([Careless()])
    Listener().submit_to(balanced)()
    assert under_way(balanced) == [0]


def test_a_submit_that_fails_goes_to_the_next_one(clock):
    second = FakeCallbackBackend()
    balanced = BalancedBackend([FakeCallbackBackend(fails=[OSError()]), second])
    Listener().submit_to(balanced)
    assert len(second.emits) == 1
    assert (failures(balanced), under_way(balanced)) == ([1, 0], [0, 1])


def test_an_error_before_the_first_item_goes_to_the_next_one(clock):
    first, second = FakeCallbackBackend(), FakeCallbackBackend()
    balanced = BalancedBackend([first, second])
    listener = Listener()
    cancel = listener.submit_to(balanced)
    assert not first.emits[0](OSError())
    assert not first.emits[0]("late")
    assert second.emits[0]("b")
    assert listener.items == ["b"]
    assert (failures(balanced), under_way(balanced)) == ([1, 0], [0, 1])
    cancel()
    assert second.cancelled == 1


def test_an_error_inside_submit_goes_to_the_next_one(clock):
    first, second = FakeCallbackBackend(at_once=[OSError()]), FakeCallbackBackend()
    balanced = BalancedBackend([first, second])
    cancel = Listener().submit_to(balanced)
    cancel()
    assert (first.cancelled, second.cancelled) == (0, 1)
    assert under_way(balanced) == [0, 0]


def test_an_error_after_the_first_item_ends_the_stream():
    first, second = (
        FakeCallbackBackend(at_once=["a", UpstreamError("reset")]),
        FakeCallbackBackend(),
    )
    balanced = BalancedBackend([first, second])
    listener = Listener()
    listener.submit_to(balanced)
    assert isinstance(listener.items[1], UpstreamError)
    assert not second.emits
    assert (failures(balanced), under_way(balanced)) == ([0, 0], [0, 0])


def test_where_all_callback_backends_fail_the_last_error_ends_the_stream(clock):
    first = FakeCallbackBackend()
    balanced = BalancedBackend([first, FakeCallbackBackend(fails=[OSError("second")])])
    listener = Listener()
    listener.submit_to(balanced)
    first.emits[0](OSError("first"))
    assert [str(item) for item in listener.items] == ["second"]
    assert under_way(balanced) == [0, 0]


def test_where_every_submit_fails_the_last_error_is_raised(clock):
    balanced = BalancedBackend([FakeCallbackBackend(fails=[OSError(name)]) for name in "ab"])
    with pytest.raises(OSError, match="b"):
        Listener().submit_to(balanced)


def test_a_request_that_ended_inside_submit_is_cancelled_there():
    listener = Listener()

    class Slow(FakeCallbackBackend):
        def submit(self, request, emit):
            listener.is_over = True
            return super().submit(request, emit)

    backend = Slow()
    balanced = BalancedBackend([backend])
    listener.submit_to(balanced)
    assert (backend.cancelled, under_way(balanced)) == (1, [0])


def test_an_engine_runs_on_balanced_callback_backends():
    backends = [
        FakeCallbackBackend(at_once=[OSError()]),
        FakeCallbackBackend(at_once=["o", "k", Finish("stop")]),
    ]
    balanced = BalancedBackend(backends)
    engine = AsyncInferenceEngine(balanced)
    assert engine.submit(request()).get(10).text == "ok"
    engine.shutdown()
    assert under_way(balanced) == [0, 0]


# Threads.


def test_calls_from_many_threads_are_all_counted_out():
    backends = [FakeBackend(name, fails=[OSError() for _ in range(3)]) for name in "abc"]
    balanced = BalancedBackend(backends, strategy=RESPONSE_TIME_WEIGHTED)
    start = Signal()

    def work():
        start.wait()
        return [attempt() for _ in range(50)]

    def attempt():
        try:
            return ask(balanced)
        except OSError:
            return None

    threads = [Background(work) for _ in range(8)]
    start.set()
    answers = [answer for thread in threads for answer in thread.result()]
    assert len(answers) == 400
    assert answers.count(None) <= 9
    assert under_way(balanced) == [0, 0, 0]


def test_in_a_forked_child_nothing_is_under_way():
    balanced = BalancedBackend([FakeBackend("a")])
    held = balanced.generate(request())
    balanced._rotation._after_fork()
    assert under_way(balanced) == [0]
    held.close()
    assert ask(balanced) == "a"
