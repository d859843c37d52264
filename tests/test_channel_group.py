"""Several channels read as one: nothing lost, nothing mixed up, one wait for all of them."""

from __future__ import annotations

import threading
from itertools import chain
from math import inf
from time import monotonic

import pytest
from concurrency import DEADLINE_SECONDS, Background, on_a_hub, wait_until
from hypothesis import given
from hypothesis import strategies as st
from interleaving import ModelParker, Once, SeenParker, interleave

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.channel_group import ChannelGroup
from flask_llmstream.core.messages import (
    Finish,
    Reasoning,
    Refusal,
    Token,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.core.runtime import ThreadParker
from flask_llmstream.exceptions import SlowReaderError

NOW = -inf


def make_group(*choices, **options):
    channels = [Channel(**options) for _ in choices]
    return ChannelGroup(channels, choices), *channels


def described(item):
    """An item with its type, since a `Token` equals its text."""
    return type(item).__name__, item, getattr(item, "choice", 0)


# Numbering.


def test_choices_are_numbered_through():
    group, first, second, third = make_group(1, 2, 1)
    first.send("a")
    second.send("b")
    second.send(Token("c", choice=1))
    third.send("d")

    assert [described(item) for item in group.receive_batch()] == [
        ("str", "a", 0),
        ("Token", "b", 1),
        ("Token", "c", 2),
        ("Token", "d", 3),
    ]


def test_every_kind_of_item_keeps_all_but_its_choice():
    group, _, second = make_group(2, 2)
    second.send(Token("t", logprob=-1.0, top_logprobs=[("t", -1.0)], choice=1))
    second.send(Reasoning("r", choice=1))
    second.send(Refusal("n"))
    second.send(ToolCallDelta(1, id="c", name="f", arguments="{}"))
    second.send(Finish("stop", stop_sequence="x", choice=1))

    token, *others = group.receive_batch()

    assert (described(token), token.logprob) == (("Token", "t", 3), -1.0)
    assert token.top_logprobs == (("t", -1.0),)
    assert others == [
        Reasoning("r", choice=3),
        Refusal("n", choice=2),
        ToolCallDelta(1, id="c", name="f", arguments="{}", choice=2),
        Finish("stop", stop_sequence="x", choice=3),
    ]


def test_a_subclass_of_str_keeps_its_text():
    class Word(str):
        __slots__ = ()

        def __str__(self):
            return "something else"

    group, _, second = make_group(1, 1)
    second.send(Word("hi"))

    (token,) = group.receive_batch()
    assert described(token) == ("Token", "hi", 1)


def test_the_usage_of_one_run_is_not_passed_off_as_all_of_it():
    group, first, second = make_group(1, 1)
    first.send(Usage(1, 2))
    second.send(Usage(1, 2))
    second.send("b")

    assert group.receive_batch() == ["b"]


# Receiving.


def test_a_batch_is_all_that_waits_in_all_of_them():
    group, first, second = make_group(1, 1)
    for number in range(3):
        first.send(str(number))
        second.send(str(number))

    assert group.receive_batch() == ["0", "1", "2"] * 2
    assert group.receive_batch(NOW) == []


def test_receive_batch_returns_at_its_deadline_with_nothing():
    group, *_ = make_group(1, 1)
    until = monotonic() + 0.01

    assert group.receive_batch(until) == []
    assert until <= monotonic() < until + 1.0
    assert not group.closed


def test_wake_makes_receive_batch_return_once():
    group, *_ = make_group(1, 1)
    group.wake()

    assert group.needs_attention
    assert group.receive_batch() == []
    assert group.receive_batch(NOW) == []
    assert not group.needs_attention
    assert not group.is_drained


@pytest.mark.parametrize("wakes", ["first", "second", "wake", "close"])
def test_whatever_happens_reaches_a_consumer_that_waits(wakes):
    group, first, second = make_group(1, 1)
    consumer = Background(group.receive_batch)
    wait_until(lambda: second._waiting is not None)
    {
        "first": lambda: first.send("x"),
        "second": lambda: second.send("x"),
        "wake": group.wake,
        "close": group.close,
    }[wakes]()

    assert consumer.result() == (["x"] if wakes in ("first", "second") else [])
    assert first._waiting is second._waiting is None


def test_a_killed_consumer_leaves_everything_to_the_next_one():
    def kill_one():
        import gevent

        group, first, second = make_group(1, 1)
        killed = gevent.spawn(group.receive_batch)
        gevent.sleep(0)
        killed.kill()
        assert first._waiting is second._waiting is None
        second.send("a")
        return group.receive_batch()

    assert on_a_hub(kill_one) == ["a"]


def test_a_consumer_may_move_from_a_thread_to_a_hub_and_back():
    group, first, _ = make_group(1, 1)

    def receive():
        wake = threading.Timer(0.005, first.send, ["x"])
        wake.start()
        return group.receive_batch(monotonic() + DEADLINE_SECONDS)

    assert [receive(), on_a_hub(receive), receive(), on_a_hub(receive)] == [["x"]] * 4


def test_a_published_waker_is_told_of_every_channel():
    group, first, second = make_group(1, 1)
    waker = ThreadParker()
    group.publish(waker)
    for act in (lambda: first.send("x"), lambda: second.send("x"), group.wake, group.close):
        assert not waker._lock.acquire(blocking=False)
        act()
        assert waker._lock.acquire(blocking=False), "it was not told"

    group.publish(None)
    first.send("x")
    assert not waker._lock.acquire(blocking=False)


# Bounds.


def test_a_full_channel_holds_up_its_own_producer_alone():
    group, first, second = make_group(1, 1, size=1)
    first.send("a")
    producer = Background(lambda: first.send("b"))
    wait_until(lambda: first._blocked is not None)

    assert second.send("c")
    assert group.receive_batch() == ["a", "c"]
    assert producer.result() is True
    assert group.receive_batch() == ["b"]


def test_a_reader_that_takes_nothing_is_blamed_by_any_of_them():
    _, first, _ = make_group(1, 1, size=1, slow_reader_seconds=0.01)
    first.send("a")

    with pytest.raises(SlowReaderError):
        first.send("b")


@pytest.mark.parametrize("size", [1, 2, 256])
@pytest.mark.parametrize("count", [2, 7])
def test_threads_lose_nothing_and_keep_their_order(size, count):
    items = 1000
    group, *channels = make_group(*[1] * count, size=size)
    left = list(range(count))

    def produce(channel):
        for number in range(items):
            assert channel.send(str(number))
        left.pop()
        if not left:
            group.close("done")

    producers = [Background(lambda channel=channel: produce(channel)) for channel in channels]
    received = [[] for _ in channels]
    while not group.is_drained:
        for item in group.receive_batch(monotonic() + DEADLINE_SECONDS):
            received[getattr(item, "choice", 0)].append(item)
    for producer in producers:
        producer.result()

    assert received == [[str(number) for number in range(items)]] * count
    assert group.outcome == "done"


def test_threads_feed_a_greenlet():
    group, *channels = make_group(1, 1, 1, size=2)

    def produce():
        for number in range(500):
            for channel in channels:
                channel.send(str(number))
        group.close()

    def consume():
        received = []
        while not group.is_drained:
            received += group.receive_batch()
        return received

    producer = Background(produce)
    received = on_a_hub(consume)
    producer.result()

    for choice in range(3):
        mine = [item for item in received if getattr(item, "choice", 0) == choice]
        assert mine == [str(number) for number in range(500)]


# Waking: publish, re-check, park, with a switch at any bytecode.


def actions(group, first, second):
    return {
        "send first": lambda: first.send("x"),
        "send second": lambda: second.send_nowait("x"),
        "wake": group.wake,
        "close": group.close,
    }


ACTIONS = ("send first", "send second", "wake", "close")


@pytest.mark.parametrize("action", ACTIONS)
def test_a_consumer_about_to_park_misses_no_wake_up(monkeypatch, action):
    def prepare():
        group, first, second = make_group(1, 1)
        wake = Once(actions(group, first, second)[action])
        monkeypatch.setattr(runtime, "make_parker", lambda: ModelParker(wake))
        received = []

        def check():
            assert received + group.receive_batch(NOW) == (["x"] if "send" in action else [])

        return lambda: received.extend(group.receive_batch()), wake, check

    interleave(prepare)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_waker_sees_a_consumer_that_parks_meanwhile(action):
    def prepare():
        group, first, second = make_group(1, 1)
        parker = group._consumer = SeenParker()
        consumers = []

        def consume():
            batch = group.receive_batch()
            parker.is_waited_on.set()
            return batch

        def intrude():
            consumers.append(Background(consume))
            assert parker.is_waited_on.wait(DEADLINE_SECONDS)

        def check():
            received = consumers[0].result()
            assert received + group.receive_batch(NOW) == (["x"] if "send" in action else [])

        return actions(group, first, second)[action], intrude, check

    interleave(prepare)


def test_two_producers_at_once_lose_nothing():
    def prepare():
        group, first, second = make_group(1, 1)
        received = []

        def check():
            received.extend(group.receive_batch(NOW))
            assert sorted(received) == ["a", "b"]

        def intrude():
            second.send("b")
            received.extend(group.receive_batch(NOW))

        return lambda: first.send("a"), intrude, check

    interleave(prepare)


# The end.


def test_what_waits_is_received_after_the_close():
    group, first, second = make_group(1, 1)
    first.send("a")
    second.send("b")
    group.close("done")

    assert group.closed
    assert not group.is_drained
    assert group.receive_batch() == ["a", "b"]
    assert group.is_drained
    assert group.outcome == "done"
    assert group.receive_batch() == []


def test_a_closed_group_takes_nothing_more_and_lets_its_producers_go():
    group, first, second = make_group(1, 1, size=1)
    first.send("a")
    producer = Background(lambda: first.send("b"))
    wait_until(lambda: first._blocked is not None)
    group.close()

    assert producer.result() is False
    assert second.send("c") is False


def test_the_first_close_counts():
    group, *_ = make_group(1, 1)
    assert group.outcome is None
    group.close("first")
    group.close("second")

    assert group.outcome == "first"


def test_of_two_closes_at_once_the_one_that_was_seen_stays():
    def prepare():
        group, *_ = make_group(1, 1)
        seen = []

        def intrude():
            group.close("rival")
            seen.append(group.outcome)

        def check():
            assert group.closed
            assert group.outcome == seen[0]

        return lambda: group.close("first"), intrude, check

    interleave(prepare)


def test_nothing_is_taken_once_the_consumer_has_seen_the_end():
    def prepare():
        group, first, second = make_group(1, 1)
        accepted = []

        def intrude():
            if group.is_drained:  # The consumer goes away now.
                accepted.extend([first.send("a"), second.send("b")])

        def check():
            assert accepted in ([], [False, False])

        return group.close, intrude, check

    interleave(prepare)


# Everything, against a model.

schedules = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 2), st.text(min_size=1, max_size=4)),
        st.sampled_from([("receive",), ("receive",), ("wake",), ("close",)]),
    ),
    max_size=40,
)


@given(schedules)
def test_any_schedule_does_as_the_model_does(schedule):
    group, *channels = make_group(1, 1, 1)
    waiting = [[], [], []]
    was_closed = was_woken = False
    for operation, *arguments in schedule:
        if operation == "send":
            index, text = arguments
            assert channels[index].send(text) is not was_closed
            if not was_closed:
                waiting[index].append((text, index))
        elif operation == "receive":
            # Would wait for ever were there neither items, nor an end, nor a wake-up.
            is_ready = any(waiting) or was_closed or was_woken
            batch = group.receive_batch(inf if is_ready else NOW)
            assert [(item, getattr(item, "choice", 0)) for item in batch] == [*chain(*waiting)]
            waiting, was_woken = [[], [], []], False
        elif operation == "wake":
            group.wake()
            was_woken = True
        else:
            group.close("done")
            was_closed = True
        assert group.has_items is any(waiting)
        assert group.needs_attention is (was_closed or was_woken)
        assert group.is_drained is (was_closed and not any(waiting))
