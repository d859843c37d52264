"""OpenAI's own client for Python."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import openai
from openai import AsyncOpenAI, OpenAI

from .answers import Failure
from .service import KEY

TIMEOUT_SECONDS = 20
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@contextmanager
def client_of(job, reading, kind=OpenAI):
    """A client for *job*; what it raises is noted in *reading*."""
    client = kind(
        base_url=job.base_url,
        api_key=KEY,
        max_retries=0,
        timeout=job.timeout_seconds or TIMEOUT_SECONDS,
        default_headers=job.headers,
    )
    try:
        yield client
    except openai.APIStatusError as error:
        reading.failure = Failure(error.status_code, error.code, error.body["message"])
    except openai.APIError as error:
        reading.failure = Failure(None, error.code, error.message)


def chat_stream(job, reading):
    with client_of(job, reading) as client, client:
        with client.chat.completions.create(**job.body, **WITH_USAGE) as stream:
            for chunk in stream:
                note_chunk(chunk, reading)


def chat_stream_async(job, reading):
    async def read(client):
        async with client:
            stream = await client.chat.completions.create(**job.body, **WITH_USAGE)
            async with stream:
                async for chunk in stream:
                    note_chunk(chunk, reading)

    with client_of(job, reading, AsyncOpenAI) as client:
        asyncio.run(read(client))


def note_chunk(chunk, reading):
    if chunk.usage is not None:
        reading.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
    for choice in chunk.choices:
        reading.finish = choice.finish_reason or reading.finish
        # A field of the servers that are compatible; the SDK keeps what it does not know.
        reading.reasoning(getattr(choice.delta, "reasoning_content", None))
        for call in choice.delta.tool_calls or ():
            reading.call(call.index, call.id, call.function.name, call.function.arguments)
        reading.text(choice.delta.content)


def chat_helper(job, reading):
    """`.stream()`: events, and a whole completion that the SDK itself puts together."""
    with client_of(job, reading) as client, client:
        options = {"stream_options": {"include_usage": True}}
        with client.chat.completions.stream(**job.body, **options) as stream:
            for event in stream:
                if event.type == "content.delta":
                    reading.text(event.delta)
            try:
                completion = stream.get_final_completion()
            except openai.LengthFinishReasonError as error:
                completion = error.completion
        note_completion(completion, reading, with_text=False)


def chat_whole(job, reading):
    with client_of(job, reading) as client, client:
        note_completion(client.chat.completions.create(**job.body), reading)


def note_completion(completion, reading, *, with_text=True):
    (choice,) = completion.choices
    reading.usage = (completion.usage.prompt_tokens, completion.usage.completion_tokens)
    reading.finish = choice.finish_reason
    reading.reasoning(getattr(choice.message, "reasoning_content", None))
    for index, call in enumerate(choice.message.tool_calls or ()):
        reading.call(index, call.id, call.function.name, call.function.arguments)
    if with_text:
        reading.text(choice.message.content)
