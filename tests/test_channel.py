"""The channel: one producer, one consumer, any mixture of threads and greenlets."""

from __future__ import annotations

import os
import threading
from collections import deque
from math import inf
from time import monotonic

import pytest
from concurrency import DEADLINE_SECONDS, Background, on_a_hub, run_script, wait_until
from hypothesis import given
from hypothesis import strategies as st
from interleaving import ModelParker, Once, SeenParker, interleave

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.messages import Reasoning, Token, ToolCallDelta
from flask_llmstream.exceptions import SlowReaderError

NOW = -inf
"""A deadline that has passed: take what there is."""


def full_channel(*items, size=1, **options):
    channel = Channel(size=size, **options)
    for item in items:
        channel.send_nowait(item)
    return channel


# Sending and receiving.


def test_items_come_out_as_they_went_in():
    channel = Channel()
    items = ["a", Token("b", logprob=-1.0), Reasoning("c"), ToolCallDelta(0, name="d")]

    assert all(channel.send(item) for item in items)
    assert channel.receive_batch() == items


def test_a_batch_is_all_that_waits():
    channel = Channel()
    for number in range(100):
        channel.send(str(number))

    assert channel.receive_batch() == [str(number) for number in range(100)]
    assert channel.receive_batch(NOW) == []


def test_receive_batch_returns_at_its_deadline_with_nothing():
    channel = Channel()
    until = monotonic() + 0.01

    assert channel.receive_batch(until) == []
    assert until <= monotonic() < until + 1.0
    assert not channel.closed


def test_wake_makes_receive_batch_return_once():
    channel = Channel()
    channel.wake()

    assert channel.receive_batch() == []
    assert channel.receive_batch(NOW) == []
    assert not channel.is_drained


def test_wake_reaches_a_consumer_that_waits():
    channel = Channel()
    consumer = Background(channel.receive_batch)
    wait_until(lambda: channel._waiting is not None)
    channel.wake()

    assert consumer.result() == []


@pytest.mark.parametrize("count", [3000])
@pytest.mark.parametrize("size", [1, 2, 8, 256])
def test_threads_lose_nothing_and_keep_the_order(size, count):
    channel = Channel(size=size)
    items = [str(number) for number in range(count)]

    def produce():
        for item in items:
            assert channel.send(item)
        channel.close("done")

    producer = Background(produce)
    received = []
    while not channel.is_drained:
        batch = channel.receive_batch(monotonic() + DEADLINE_SECONDS)
        assert len(batch) <= size
        received += batch
    producer.result()

    assert received == items
    assert channel.outcome == "done"


def exchange_between_greenlets(size):
    """A hundred items from one greenlet of a hub to another, through a channel of *size*."""

    def exchange():
        import gevent

        channel = Channel(size=size)

        def produce():
            for number in range(100):
                channel.send(str(number))
            channel.close()

        producer = gevent.spawn(produce)
        received = []
        while not channel.is_drained:
            received += channel.receive_batch()
        producer.get(timeout=DEADLINE_SECONDS)
        return received

    assert on_a_hub(exchange) == [str(number) for number in range(100)]


def test_greenlets_of_one_hub_exchange_items():
    exchange_between_greenlets(size=2)


def test_a_thread_feeds_greenlets_of_a_hub():
    channels = [Channel(size=size) for size in (1, 2, 8, 256)]

    def produce():
        for number in range(500):
            for channel in channels:
                channel.send(str(number))
        for channel in channels:
            channel.close()

    def consume(channel):
        received = []
        while not channel.is_drained:
            received += channel.receive_batch()
        return received

    def consume_all():
        import gevent

        greenlets = [gevent.spawn(consume, channel) for channel in channels]
        return [greenlet.get(timeout=DEADLINE_SECONDS) for greenlet in greenlets]

    producer = Background(produce)
    assert on_a_hub(consume_all) == [[str(number) for number in range(500)]] * 4
    producer.result()


def test_a_consumer_may_move_from_a_thread_to_a_hub_and_back():
    channel = Channel()

    def receive():
        wake = threading.Timer(0.005, channel.send, ["x"])
        wake.start()
        return channel.receive_batch(monotonic() + DEADLINE_SECONDS)

    assert [receive(), on_a_hub(receive), receive(), on_a_hub(receive)] == [["x"]] * 4


def test_the_hub_itself_cannot_wait():
    def wait_on_the_hub():
        import gevent

        channel = full_channel("a")
        errors = []

        def try_both():
            for wait in (lambda: channel.send("b"), Channel().receive_batch):
                try:
                    wait()
                except RuntimeError as error:
                    errors.append(str(error))

        gevent.get_hub().loop.run_callback(try_both)
        gevent.sleep(0.001)
        return errors, channel.receive_batch()

    errors, batch = on_a_hub(wait_on_the_hub)
    assert batch == ["a"]
    assert len(errors) == 2
    assert "Spawn a greenlet" in errors[0]


def test_a_killed_consumer_leaves_everything_to_the_next_one():
    def kill_one():
        import gevent

        channel = Channel()
        killed = gevent.spawn(channel.receive_batch)
        gevent.sleep(0)
        killed.kill()
        assert channel._waiting is None
        channel.send("a")
        return channel.receive_batch()

    assert on_a_hub(kill_one) == ["a"]


@pytest.mark.timeout(120)
def test_soak_in_a_patched_process():
    """ITEMS=2000000 in the environment makes it a long one."""
    print(run_script("channel_soak.py", timeout_seconds=110.0))


def test_soak_with_a_switch_at_almost_every_chance():
    environment = {"SWITCH_INTERVAL": "0.000001", "SEED": "2"}
    environment["ITEMS"] = str(int(os.environ.get("ITEMS", "200000")) // 4)
    print(run_script("channel_soak.py", environment=environment))


# Bounds.


def test_send_waits_while_size_items_wait():
    channel = Channel(size=2)
    channel.send("a")
    channel.send("b")
    producer = Background(lambda: channel.send("c"))
    wait_until(lambda: channel._blocked is not None)

    assert channel.receive_batch() == ["a", "b"]
    assert producer.result() is True
    assert channel.receive_batch() == ["c"]


def test_send_blames_a_reader_that_takes_nothing():
    channel = full_channel("a", slow_reader_seconds=0.01)

    with pytest.raises(SlowReaderError, match=r"1 items \(1 bytes\)"):
        channel.send("b")
    assert channel.receive_batch() == ["a"]


def test_one_item_over_the_byte_bound_passes_alone():
    channel = Channel(max_bytes=10, slow_reader_seconds=0.001)

    assert channel.send("x" * 50)
    for send in (channel.send, channel.send_nowait):
        with pytest.raises(SlowReaderError):
            send("y")
    assert channel.receive_batch() == ["x" * 50]
    assert channel.send_nowait("x" * 50)


def test_the_byte_bound_counts_utf8_in_every_kind_of_item():
    wide = "\N{GRINNING FACE}" * 250  # 250 characters, 1,000 bytes

    for item in (wide, Token(wide), Reasoning(wide), ToolCallDelta(0, arguments=wide)):
        channel = Channel(max_bytes=2_500)
        channel.send_nowait(item)
        channel.send_nowait(item)
        with pytest.raises(SlowReaderError):
            channel.send_nowait(item)


def test_items_without_text_are_bounded_too():
    channel = Channel(size=4, max_bytes=1_000)

    def fill():
        for _ in range(1_000):
            channel.send_nowait(Token("", logprob=-0.5))

    with pytest.raises(SlowReaderError):
        fill()
    assert len(channel.receive_batch()) < 100


def test_a_reader_that_keeps_up_is_not_slow_though_the_channel_is_never_empty():
    channel = Channel(max_bytes=1_000)
    text = "x" * 300

    class NeverEmpty(deque):
        """The producer runs whenever the consumer takes something."""

        def popleft(self):
            channel.send_nowait(text)
            return super().popleft()

    channel._items = NeverEmpty()
    channel.send_nowait(text)

    assert [channel.receive_batch() for _ in range(100)] == [[text]] * 100


def test_the_byte_bound_holds_against_a_producer_that_runs_at_any_moment():
    def prepare():
        channel = full_channel("x" * 10, "x" * 10, size=2, max_bytes=100)

        def send_all():
            while True:
                channel.send_nowait("x" * 10)

        def burst():
            with pytest.raises(SlowReaderError):
                send_all()

        def check():
            burst()
            # One item may be forgotten by the count: it was on its way during a batch.
            assert sum(map(len, channel._items)) <= 100 + 10

        return lambda: channel.receive_batch(NOW), burst, check

    interleave(prepare)


def test_send_nowait_blames_a_reader_that_leaves_it_full_too_long(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("flask_llmstream.core.channel.monotonic", lambda: now[0])
    channel = full_channel("a", slow_reader_seconds=5)

    assert channel.send_nowait("b")
    now[0] += 5
    assert channel.send_nowait("c")
    now[0] += 0.1
    with pytest.raises(SlowReaderError):
        channel.send_nowait("d")

    assert channel.receive_batch(NOW) == ["abc"]
    assert channel.send_nowait("e"), "it was read: the time counts anew"
    assert channel.send_nowait("f")


# Merging.


def test_text_over_the_size_merges_and_other_items_keep_their_place():
    channel = full_channel("a", "b", size=2)
    for item in ("c", "d", Reasoning("r"), "e", Token("t"), "f", "g"):
        assert channel.send_nowait(item)

    assert channel.receive_batch() == ["a", "bcd", Reasoning("r"), "e", Token("t"), "fg"]


def test_text_is_merged_in_lumps():
    channel = Channel(size=10, max_bytes=1_000)
    for _ in range(1_000):
        channel.send_nowait("x")

    batch = channel.receive_batch()
    assert "".join(batch) == "x" * 1_000
    assert len(batch) < 25
    assert max(map(len, batch)) == 100  # max_bytes / size


@given(st.lists(st.text(max_size=30), max_size=60), st.integers(1, 5))
def test_merging_keeps_the_concatenation(texts, size):
    channel = Channel(size=size, max_bytes=2_000)
    accepted = []
    for text in texts:
        try:
            channel.send_nowait(text)
        except SlowReaderError:
            break
        accepted.append(text)

    assert "".join(channel.receive_batch(NOW)) == "".join(accepted)


def test_what_the_consumer_takes_first_is_not_merged():
    class TakenMeanwhile(deque):
        """The consumer is faster, just after the producer looked."""

        def __getitem__(self, index):
            item = super().__getitem__(index)
            received.extend(channel.receive_batch(NOW))
            return item

    received = []
    channel = full_channel("a")
    channel._items = TakenMeanwhile(channel._items)
    assert channel.send_nowait("b")

    assert received == ["a"]
    assert channel.receive_batch(NOW) == ["b"]


def test_a_merge_and_a_batch_at_once_lose_nothing():
    def prepare():
        channel = full_channel("a", "b", size=2)
        received = []

        def check():
            received.extend(channel.receive_batch(NOW))
            assert "".join(received) == "abcd"

        return (
            lambda: channel.send_nowait("c") and channel.send_nowait("d"),
            lambda: received.extend(channel.receive_batch(NOW)),
            check,
        )

    interleave(prepare)


def test_a_batch_and_merges_at_once_lose_nothing():
    def prepare():
        channel = full_channel("a", "b", size=2)
        received = []

        def intrude():
            for item in ("c", Reasoning("r"), "d", "e"):
                assert channel.send_nowait(item)

        def check():
            received.extend(channel.receive_batch(NOW))
            text = "".join(each if isinstance(each, str) else "|" for each in received)
            assert text == "abc|de"

        return lambda: received.extend(channel.receive_batch(NOW)), intrude, check

    interleave(prepare)


def test_a_close_during_a_merge_loses_nothing_that_was_accepted():
    def prepare():
        channel = full_channel("a")
        accepted, seen = [], []

        def leave():
            channel.close()
            seen.extend(channel.receive_batch(NOW))
            assert channel.is_drained  # The consumer goes away now.

        def check():
            # What was accepted as the channel closed may be late; nothing before it.
            assert seen[0].startswith("a")
            rest = channel.receive_batch(NOW)
            assert "".join(seen + rest) == ("ab" if accepted == [True] else "a")

        return lambda: accepted.append(channel.send_nowait("b")), leave, check

    interleave(prepare)


# Waking: publish, re-check, park, with a switch at any bytecode.


def a_parked_side(monkeypatch, other):
    """Have parkers fail where *other* has run, or runs now, and nobody wakes them."""
    monkeypatch.setattr(runtime, "make_parker", lambda: ModelParker(other))


@pytest.mark.parametrize("wakes", ["send", "send_nowait", "close", "wake"])
def test_a_consumer_about_to_park_misses_no_wake_up(monkeypatch, wakes):
    def prepare():
        channel = Channel()
        arguments = ("x",) if wakes.startswith("send") else ()
        wake = Once(lambda: getattr(channel, wakes)(*arguments))
        a_parked_side(monkeypatch, wake)
        received = []

        def receive():
            received.extend(channel.receive_batch())

        def check():
            assert received + channel.receive_batch(NOW) == list(arguments)

        return receive, wake, check

    interleave(prepare)


@pytest.mark.parametrize("wakes", ["receive_batch", "close"])
def test_a_producer_about_to_park_misses_no_wake_up(monkeypatch, wakes):
    def prepare():
        channel = full_channel("a")
        wake = Once(getattr(channel, wakes))
        a_parked_side(monkeypatch, wake)
        accepted = []

        def check():
            received = (wake.result or []) + channel.receive_batch(NOW)
            assert received == (["a", "b"] if accepted == [True] else ["a"])

        return lambda: accepted.append(channel.send("b")), wake, check

    interleave(prepare)


@pytest.mark.parametrize("waker", ["send", "send_nowait", "close", "wake"])
def test_a_waker_sees_a_consumer_that_parks_meanwhile(monkeypatch, waker):
    def prepare():
        channel = Channel()
        parker = SeenParker()
        channel._consumer = parker
        consumers = []
        arguments = ("x",) if waker.startswith("send") else ()

        def consume():
            batch = channel.receive_batch()
            parker.is_waited_on.set()
            return batch

        def intrude():
            consumers.append(Background(consume))
            assert parker.is_waited_on.wait(DEADLINE_SECONDS)

        def check():
            received = consumers[0].result()
            assert received + channel.receive_batch(NOW) == list(arguments)

        return lambda: getattr(channel, waker)(*arguments), intrude, check

    interleave(prepare)


@pytest.mark.parametrize("waker", ["receive_batch", "close"])
def test_a_waker_sees_a_producer_that_parks_meanwhile(waker):
    def prepare():
        channel = full_channel("a")
        parker = SeenParker()
        channel._producer = parker
        producers, received = [], []

        def produce():
            accepted = channel.send("b")
            parker.is_waited_on.set()
            return accepted

        def act():
            received.extend(getattr(channel, waker)() or ())

        def intrude():
            producers.append(Background(produce))
            assert parker.is_waited_on.wait(DEADLINE_SECONDS)

        def check():
            accepted = producers[0].result()
            received.extend(channel.receive_batch(NOW))
            assert received == (["a", "b"] if accepted else ["a"])
            assert accepted is (waker == "receive_batch") or "b" in received

        return act, intrude, check

    interleave(prepare)


def test_a_greenlet_that_is_blocked_again_and_again_sets_one_timer(monkeypatch):
    timers = []
    call_at = runtime.clock.call_at
    monkeypatch.setattr(
        runtime.clock, "call_at", lambda *args: timers.append(args) or call_at(*args)
    )

    exchange_between_greenlets(size=1)
    assert len(timers) <= 1


# The end.


def test_what_waits_is_received_after_the_close():
    channel = Channel()
    channel.send("a")
    channel.close("done")

    assert channel.closed
    assert not channel.is_drained
    assert channel.receive_batch() == ["a"]
    assert channel.is_drained
    assert channel.outcome == "done"
    assert channel.receive_batch() == []


def test_a_closed_channel_takes_nothing_more():
    channel = Channel()
    channel.close()

    assert channel.send("a") is False
    assert channel.send_nowait("a") is False
    assert channel.receive_batch() == []


def test_a_full_channel_that_is_closed_refuses_instead_of_blaming_the_reader():
    channel = full_channel("x" * 10, size=1, max_bytes=10)
    channel.close()

    assert channel.send_nowait("x") is False
    assert channel.send("x") is False


def test_the_first_close_counts():
    channel = Channel()
    assert channel.outcome is None
    channel.close("first")
    channel.close("second")

    assert channel.outcome == "first"


def test_of_two_closes_at_once_the_one_that_was_seen_stays():
    def prepare():
        channel = Channel()
        seen = []

        def intrude():
            channel.close("rival")
            seen.append(channel.outcome)

        def check():
            assert channel.closed
            assert channel.outcome == seen[0]

        return lambda: channel.close("first"), intrude, check

    interleave(prepare)


# Everything, against a model.


class Model:
    """What a channel of *size* does when nothing happens at the same time."""

    def __init__(self, size, max_bytes):
        self.size, self.max_bytes = size, max_bytes
        self.items = []
        self.bytes = 0
        self.closed = False

    def is_full(self, text):
        is_over = self.bytes + len(text.encode()) > self.max_bytes
        return bool(self.items) and (len(self.items) >= self.size or is_over)

    def put(self, text):
        self.items.append(text)
        self.bytes += len(text.encode())

    def take(self):
        taken, self.items, self.bytes = self.items, [], 0
        return taken


texts = st.text(min_size=1, max_size=12)
schedules = st.lists(
    st.one_of(
        st.tuples(st.just("send"), texts),
        st.tuples(st.just("send_nowait"), texts),
        st.sampled_from([("receive",), ("wake",)]),
        st.sampled_from([("receive",), ("receive",), ("receive",), ("close",)]),
    ),
    max_size=60,
)


@given(schedules, st.integers(1, 4), st.integers(8, 60))
def test_any_schedule_does_as_the_model_does(schedule, size, max_bytes):
    channel = Channel(size=size, max_bytes=max_bytes, slow_reader_seconds=0.0)
    model = Model(size, max_bytes)
    was_woken = False
    for operation, *arguments in schedule:
        if operation == "receive":
            # Would wait for ever were there neither items, nor an end, nor a wake-up.
            until = inf if model.items or model.closed or was_woken else NOW
            assert "".join(channel.receive_batch(until)) == "".join(model.take())
            was_woken = False
        elif operation == "wake":
            channel.wake()
            was_woken = True
        elif operation == "close":
            channel.close("done")
            model.closed = True
        elif model.closed:
            assert getattr(channel, operation)(*arguments) is False
        elif not model.is_full(*arguments):
            assert getattr(channel, operation)(*arguments) is True
            model.put(*arguments)
        else:
            # Full, and no time to read: both give up, but for what still merges.
            with pytest.raises(SlowReaderError):
                channel.send(*arguments)
            if model.bytes + len(arguments[0].encode()) > max_bytes:
                with pytest.raises(SlowReaderError):
                    channel.send_nowait(*arguments)
        assert len(channel._items) == len(model.items)
        assert channel.is_drained is (model.closed and not model.items)


@given(schedules, st.integers(1, 4))
def test_any_schedule_of_two_threads_keeps_order_and_bounds(schedule, size):
    """The producer's part and the consumer's run freely against each other."""
    channel = Channel(size=size, max_bytes=64)
    sends = [each for each in schedule if each[0].startswith("send")]
    receives = sum(each[0] == "receive" for each in schedule)

    def produce():
        accepted = []
        for operation, text in sends:
            try:
                is_open = getattr(channel, operation)(text)
            except SlowReaderError:
                continue
            if is_open:
                accepted.append(text)
        channel.close("done")
        return accepted

    producer = Background(produce)
    received = []
    for _ in range(receives):
        received += channel.receive_batch(monotonic() + 0.0002)
        assert sum(len(each.encode()) for each in channel._items) <= 64 + 48
    while not channel.is_drained:
        received += channel.receive_batch(monotonic() + DEADLINE_SECONDS)

    assert "".join(received) == "".join(producer.result())
