"""The channel: one producer, one consumer, any mixture of threads and greenlets."""

from __future__ import annotations

from collections import deque
from math import inf

import pytest
from concurrency import on_a_hub

from flask_llmstream.core import runtime
from flask_llmstream.core.channel import Channel
from flask_llmstream.core.messages import Reasoning, Token, ToolCallDelta
from flask_llmstream.exceptions import SlowReaderError


class SteppedDeque(deque):
    """Runs *intrude* before its *step*-th operation: every place where threads may switch."""

    def __init__(self, items, step, intrude):
        super().__init__(items)
        self._step = step
        self._intrude = intrude

    @property
    def was_intruded(self):
        return self._step <= 0

    def _advance(self):
        self._step -= 1
        if self._step == 0:
            self._intrude()

    def __len__(self):
        self._advance()
        return super().__len__()

    def __getitem__(self, index):
        self._advance()
        return super().__getitem__(index)

    def __setitem__(self, index, item):
        self._advance()
        super().__setitem__(index, item)

    def append(self, item):
        self._advance()
        super().append(item)

    def pop(self):
        self._advance()
        return super().pop()

    def popleft(self):
        self._advance()
        return super().popleft()


def intrude_at_every_step(make_channel, act, intrude):
    """
    Run ``act(channel)`` again and again, each time with ``intrude(channel)`` one
    operation later. Yields the channel, what *act* returned and what *intrude* did.
    """
    step = 1
    while True:
        channel = make_channel()
        done = []
        items = SteppedDeque(channel._items, step, lambda: done.append(intrude(channel)))  # noqa: B023
        channel._items = items
        result = act(channel)
        if not items.was_intruded:
            assert step > 2
            return
        channel._items = deque(items)
        yield channel, result, done[0]
        step += 1


def full_channel(*items, size=1, **options):
    channel = Channel(size=size, **options)
    for item in items:
        channel.send_nowait(item)
    return channel


# Bounds.


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
    def burst(channel):
        try:
            while True:
                channel.send_nowait("x" * 10)
        except SlowReaderError:
            return

    for channel, _, _ in intrude_at_every_step(
        lambda: full_channel("x" * 10, "x" * 10, size=2, max_bytes=100),
        lambda channel: channel.receive_batch(-inf),
        burst,
    ):
        burst(channel)
        assert sum(map(len, channel._items)) <= 100


# Merging.


def test_a_close_during_a_merge_loses_nothing_that_was_accepted():
    def leave(channel):
        channel.close()
        return channel.receive_batch(-inf), channel.is_drained

    for channel, accepted, (batch, is_drained) in intrude_at_every_step(
        lambda: full_channel("a"), lambda channel: channel.send_nowait("b"), leave
    ):
        assert is_drained  # The consumer goes away now; what comes later is not seen.
        assert batch[0].startswith("a")
        assert "".join(batch + channel.receive_batch(-inf)) == ("ab" if accepted else "a")


# Waiting.


def test_a_greenlet_that_is_blocked_again_and_again_sets_one_timer(monkeypatch):
    timers = []
    call_at = runtime.clock.call_at
    monkeypatch.setattr(
        runtime.clock, "call_at", lambda *args: timers.append(args) or call_at(*args)
    )

    def exchange():
        import gevent

        channel = Channel(size=1)

        def produce():
            for number in range(100):
                channel.send(str(number))
            channel.close()

        producer = gevent.spawn(produce)
        received = []
        while not channel.is_drained:
            received += channel.receive_batch()
        producer.get(timeout=10)
        return received

    assert on_a_hub(exchange) == [str(number) for number in range(100)]
    assert len(timers) <= 1


# The end.


def test_a_full_channel_that_is_closed_refuses_instead_of_blaming_the_reader():
    channel = full_channel("x" * 10, size=1, max_bytes=10)
    channel.close()

    assert channel.send_nowait("x") is False
    assert channel.send("x") is False


def test_of_two_closes_at_once_the_one_that_was_seen_stays():
    rival = RuntimeError("rival")

    class RacedChannel(Channel):
        """Another thread closes it just after the first closer found it open."""

        is_closed = False
        rivals = iter([rival])

        @property
        def closed(self):
            found = self.is_closed
            for other in self.rivals:
                self.close(other)
            return found

        @closed.setter
        def closed(self, value):
            self.is_closed = value

    channel = RacedChannel()
    channel.close(RuntimeError("late"))

    assert channel.closed
    assert channel.outcome is rival
