"""Ollama's own client for Python."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing, contextmanager

import httpx
from ollama import AsyncClient, Client, ResponseError

from .answers import Failure

TIMEOUT_SECONDS = 20


def options(job):
    """What a client for *job* is made with."""
    return {
        "host": job.base_url,
        "timeout": job.timeout_seconds or TIMEOUT_SECONDS,
        "headers": {**job.headers, "Authorization": f"Bearer {job.api_key}"},
    }


@contextmanager
def noting_errors(reading):
    try:
        yield
    except ResponseError as error:
        # One in the middle of a stream has -1.
        status = None if error.status_code == -1 else error.status_code
        reading.failure = Failure(status, None, error.error)
    except httpx.TransportError as error:  # It does not wrap what happens to a connection.
        reading.failure = Failure(None, None, str(error))


def chat_stream(job, reading):
    with (
        noting_errors(reading),
        Client(**options(job)) as client,
        # Nothing is sent before the first part is asked for, and it leaves only when closed.
        closing(client.chat(**job.body, stream=True)) as parts,
    ):
        for part in parts:
            note_chat(part, reading)


def chat_stream_async(job, reading):
    async def read():
        async with (
            AsyncClient(**options(job)) as client,
            aclosing(await client.chat(**job.body, stream=True)) as parts,
        ):
            async for part in parts:
                note_chat(part, reading)

    with noting_errors(reading):
        asyncio.run(read())


def chat_whole(job, reading):
    with noting_errors(reading), Client(**options(job)) as client:
        note_chat(client.chat(**job.body), reading)


def generate_stream(job, reading):
    with (
        noting_errors(reading),
        Client(**options(job)) as client,
        closing(client.generate(**job.body, stream=True)) as parts,
    ):
        for part in parts:
            note_generate(part, reading)


def generate_whole(job, reading):
    with noting_errors(reading), Client(**options(job)) as client:
        note_generate(client.generate(**job.body), reading)


def note_chat(part, reading):
    for call in part.message.tool_calls or ():
        reading.call(None, None, call.function.name, dict(call.function.arguments))
    reading.reasoning(part.message.thinking)
    note_end(part, reading)
    reading.text(part.message.content)


def note_generate(part, reading):
    reading.reasoning(part.thinking)
    note_end(part, reading)
    reading.text(part.response)


def note_end(part, reading):
    if part.done:
        # Calls are no reason of its own there.
        reading.finish = "tool_calls" if reading.has_calls else part.done_reason
        reading.usage = (part.prompt_eval_count, part.eval_count)
