"""The channel: one producer, one consumer, any mixture of threads and greenlets."""

from __future__ import annotations

import pytest

from flask_llmstream.core.channel import Channel
from flask_llmstream.core.messages import Reasoning, Token, ToolCallDelta
from flask_llmstream.exceptions import SlowReaderError


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
