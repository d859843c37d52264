"""What the official Python clients read, streaming and not."""

from __future__ import annotations

import pytest

from . import read_openai
from .answers import LeftError, Reading
from .dialects import OPENAI_CHAT
from .readers import Reader, cases

READERS = (
    Reader("openai chat", OPENAI_CHAT, read_openai.chat_stream),
    Reader("openai chat async", OPENAI_CHAT, read_openai.chat_stream_async),
    Reader("openai chat helper", OPENAI_CHAT, read_openai.chat_helper),
    Reader("openai chat whole", OPENAI_CHAT, read_openai.chat_whole, streams=False),
)


@pytest.mark.parametrize(("reader", "scenario"), cases(READERS))
def test_it_reads_what_was_scripted(check, reader, scenario):
    def ask(job):
        reading = Reading(leaves=job.leaves)
        try:
            reader.read(job, reading)
        except LeftError:
            pass
        return reading.answer()

    check(reader, scenario, ask)
