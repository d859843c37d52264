"""Anthropic's own client for Python."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import anthropic
from anthropic import Anthropic, AsyncAnthropic

from .answers import Failure

TIMEOUT_SECONDS = 20
FINISHES = {"end_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


def options(job):
    """What a client for *job* is made with."""
    return {
        "base_url": job.base_url,
        "api_key": job.api_key,
        "max_retries": 0,
        "timeout": job.timeout_seconds or TIMEOUT_SECONDS,
        "default_headers": job.headers,
    }


@contextmanager
def noting_errors(reading):
    try:
        yield
    except anthropic.APIStatusError as error:
        # One in the middle of a stream has the status of the stream itself.
        status = None if error.status_code == 200 else error.status_code
        reading.failure = Failure(status, None, error.body["error"]["message"])
    except anthropic.APIError as error:
        reading.failure = Failure(None, None, error.message)


def messages_stream(job, reading):
    with (
        noting_errors(reading),
        Anthropic(**options(job)) as client,
        client.messages.create(**job.body, stream=True) as stream,
    ):
        for event in stream:
            note_event(event, reading)


def messages_stream_async(job, reading):
    async def read():
        async with (
            AsyncAnthropic(**options(job)) as client,
            await client.messages.create(**job.body, stream=True) as stream,
        ):
            async for event in stream:
                note_event(event, reading)

    with noting_errors(reading):
        asyncio.run(read())


def note_event(event, reading):
    if event.type == "content_block_start" and event.content_block.type == "tool_use":
        reading.call(event.index, event.content_block.id, event.content_block.name)
    elif event.type == "content_block_delta":
        if event.delta.type == "text_delta":
            reading.text(event.delta.text)
        elif event.delta.type == "thinking_delta":
            reading.reasoning(event.delta.thinking)
        elif event.delta.type == "input_json_delta":
            reading.call(event.index, arguments=event.delta.partial_json)
    elif event.type == "message_delta":
        reading.finish = FINISHES[event.delta.stop_reason]
        reading.usage = (event.usage.input_tokens, event.usage.output_tokens)


def messages_helper(job, reading):
    """`.stream()`: the text, and a message that the SDK itself puts together."""
    with (
        noting_errors(reading),
        Anthropic(**options(job)) as client,
        client.messages.stream(**job.body) as stream,
    ):
        for text in stream.text_stream:
            reading.text(text)
        note_message(stream.get_final_message(), reading)


def messages_whole(job, reading):
    with noting_errors(reading), Anthropic(**options(job)) as client:
        message = client.messages.create(**job.body)
        note_message(message, reading)
        for block in message.content:
            if block.type == "text":
                reading.text(block.text)


def note_message(message, reading):
    """All but the text."""
    reading.usage = (message.usage.input_tokens, message.usage.output_tokens)
    reading.finish = FINISHES[message.stop_reason]
    for index, block in enumerate(message.content):
        if block.type == "thinking":
            reading.reasoning(block.thinking)
        elif block.type == "tool_use":
            reading.call(index, block.id, block.name, block.input)
