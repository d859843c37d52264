"""OpenAI's own client for Python."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager

import openai
from openai import AsyncOpenAI, OpenAI

from .answers import Failure

TIMEOUT_SECONDS = 20
USAGE = {"stream_options": {"include_usage": True}}


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
    except openai.APIStatusError as error:
        reading.failure = Failure(error.status_code, error.code, error.body["message"])
    except openai.APIError as error:
        reading.failure = Failure(None, error.code, error.message)


def chat_stream(job, reading):
    with (
        noting_errors(reading),
        OpenAI(**options(job)) as client,
        client.chat.completions.create(**job.body, **USAGE, stream=True) as stream,
    ):
        for chunk in stream:
            note_chunk(chunk, reading)


def chat_stream_async(job, reading):
    async def read():
        async with (
            AsyncOpenAI(**options(job)) as client,
            await client.chat.completions.create(**job.body, **USAGE, stream=True) as stream,
        ):
            async for chunk in stream:
                note_chunk(chunk, reading)

    with noting_errors(reading):
        asyncio.run(read())


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
    """`.stream()`: events, and a completion that the SDK itself puts together."""
    with (
        noting_errors(reading),
        OpenAI(**options(job)) as client,
        client.chat.completions.stream(**job.body, **USAGE) as stream,
    ):
        for event in stream:
            if event.type == "content.delta":
                reading.text(event.delta)
        try:
            completion = stream.get_final_completion()
        except openai.LengthFinishReasonError as error:
            completion = error.completion
        note_completion(completion, reading)


def chat_whole(job, reading):
    with noting_errors(reading), OpenAI(**options(job)) as client:
        completion = client.chat.completions.create(**job.body)
        note_completion(completion, reading)
        reading.text(completion.choices[0].message.content)


def note_completion(completion, reading):
    """All but the text."""
    (choice,) = completion.choices
    reading.usage = (completion.usage.prompt_tokens, completion.usage.completion_tokens)
    reading.finish = choice.finish_reason
    reading.reasoning(getattr(choice.message, "reasoning_content", None))
    for index, call in enumerate(choice.message.tool_calls or ()):
        reading.call(index, call.id, call.function.name, call.function.arguments)


def completion_stream(job, reading):
    with (
        noting_errors(reading),
        OpenAI(**options(job)) as client,
        client.completions.create(**job.body, **USAGE, stream=True) as stream,
    ):
        for chunk in stream:
            if chunk.usage is not None:
                reading.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for choice in chunk.choices:
                reading.finish = choice.finish_reason or reading.finish
                reading.text(choice.text)


def completion_whole(job, reading):
    with noting_errors(reading), OpenAI(**options(job)) as client:
        completion = client.completions.create(**job.body)
        (choice,) = completion.choices
        reading.usage = (completion.usage.prompt_tokens, completion.usage.completion_tokens)
        reading.finish = choice.finish_reason
        reading.text(choice.text)


def responses_stream(job, reading):
    with (
        noting_errors(reading),
        OpenAI(**options(job)) as client,
        client.responses.create(**job.body, stream=True) as stream,
    ):
        for event in stream:
            note_event(event, reading)


def responses_stream_async(job, reading):
    async def read():
        async with (
            AsyncOpenAI(**options(job)) as client,
            await client.responses.create(**job.body, stream=True) as stream,
        ):
            async for event in stream:
                note_event(event, reading)

    with noting_errors(reading):
        asyncio.run(read())


def note_event(event, reading):
    if event.type == "response.output_text.delta":
        reading.text(event.delta)
    elif event.type == "response.reasoning_text.delta":
        reading.reasoning(event.delta)
    elif event.type == "response.output_item.added" and event.item.type == "function_call":
        reading.call(event.output_index, event.item.call_id, event.item.name)
    elif event.type == "response.function_call_arguments.delta":
        reading.call(event.output_index, arguments=event.delta)
    elif event.type in ("response.completed", "response.incomplete"):
        note_end(event.response, reading)


def responses_helper(job, reading):
    """`.stream()`: events, and a response that the SDK itself puts together."""
    with (
        noting_errors(reading),
        OpenAI(**options(job)) as client,
        client.responses.stream(**job.body) as stream,
    ):
        for event in stream:
            if event.type == "response.output_text.delta":
                reading.text(event.delta)
            elif event.type == "response.incomplete":
                note_response(event.response, reading)
                return  # `get_final_response` would raise: it knows completed ones only.
        note_response(stream.get_final_response(), reading)


def responses_whole(job, reading):
    with noting_errors(reading), OpenAI(**options(job)) as client:
        response = client.responses.create(**job.body)
        note_response(response, reading)
        reading.text(response.output_text)


def note_response(response, reading):
    """All but the text."""
    for item in response.output:
        if item.type == "function_call":
            reading.call(None, item.call_id, item.name, item.arguments)
        elif item.type == "reasoning":
            reading.reasoning("".join(part.text for part in item.content))
    note_end(response, reading)


def note_end(response, reading):
    reading.usage = (response.usage.input_tokens, response.usage.output_tokens)
    if response.status == "incomplete":
        reading.finish = {"max_output_tokens": "length"}[response.incomplete_details.reason]
    else:
        reading.finish = "tool_calls" if reading.has_calls else "stop"
