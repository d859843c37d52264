"""What the official Python clients read, streaming and not."""

from __future__ import annotations

import pytest

from . import read_anthropic, read_native, read_ollama, read_openai
from .answers import LeftError, Reading
from .dialects import (
    ANTHROPIC,
    NATIVE,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OPENAI_CHAT,
    OPENAI_COMPLETION,
    OPENAI_RESPONSES,
    PLAIN_TEXT,
)
from .readers import Reader, cases

READERS = (
    Reader("openai chat", OPENAI_CHAT, read_openai.chat_stream),
    Reader("openai chat async", OPENAI_CHAT, read_openai.chat_stream_async),
    Reader("openai chat helper", OPENAI_CHAT, read_openai.chat_helper),
    Reader("openai chat whole", OPENAI_CHAT, read_openai.chat_whole, streams=False),
    Reader("openai completion", OPENAI_COMPLETION, read_openai.completion_stream),
    Reader(
        "openai completion whole",
        OPENAI_COMPLETION,
        read_openai.completion_whole,
        streams=False,
    ),
    Reader("openai responses", OPENAI_RESPONSES, read_openai.responses_stream),
    Reader("openai responses async", OPENAI_RESPONSES, read_openai.responses_stream_async),
    Reader("openai responses helper", OPENAI_RESPONSES, read_openai.responses_helper),
    Reader("openai responses whole", OPENAI_RESPONSES, read_openai.responses_whole, streams=False),
    Reader("anthropic", ANTHROPIC, read_anthropic.messages_stream),
    Reader("anthropic async", ANTHROPIC, read_anthropic.messages_stream_async),
    Reader("anthropic helper", ANTHROPIC, read_anthropic.messages_helper),
    Reader("anthropic whole", ANTHROPIC, read_anthropic.messages_whole, streams=False),
    Reader("ollama chat", OLLAMA_CHAT, read_ollama.chat_stream),
    Reader("ollama chat async", OLLAMA_CHAT, read_ollama.chat_stream_async),
    Reader("ollama chat whole", OLLAMA_CHAT, read_ollama.chat_whole, streams=False),
    Reader("ollama generate", OLLAMA_GENERATE, read_ollama.generate_stream),
    Reader("ollama generate whole", OLLAMA_GENERATE, read_ollama.generate_whole, streams=False),
    Reader("StreamReader sse", NATIVE, read_native.sse),
    Reader("StreamReader ndjson", NATIVE, read_native.ndjson),
    Reader("httpx text", PLAIN_TEXT, read_native.text),
    Reader("httpx json", NATIVE, read_native.whole, streams=False),
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
