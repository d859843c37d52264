"""The package's own route, by its own `StreamReader` and by a mere HTTP client."""

from __future__ import annotations

import json
from contextlib import contextmanager

import httpx

from flask_llmstream import LLMStreamError, StreamReader

from .answers import Failure

TIMEOUT_SECONDS = 20


@contextmanager
def noting_errors(reading):
    try:
        yield
    except httpx.HTTPStatusError as error:
        told = error.response.json()["error"]
        reading.failure = Failure(error.response.status_code, told["code"], told["message"])
    except httpx.TransportError as error:
        reading.failure = Failure(None, None, str(error))
    except LLMStreamError as error:
        reading.failure = Failure(None, error.code, error.message)


@contextmanager
def post(job, accept, **fields):
    """The response, while it is open."""
    headers = {**job.headers, "Authorization": f"Bearer {job.api_key}", "Accept": accept}
    with (
        httpx.Client(timeout=job.timeout_seconds or TIMEOUT_SECONDS, headers=headers) as client,
        client.stream("POST", job.base_url, json={**job.body, **fields}) as response,
    ):
        if response.is_error:
            response.read()
        yield response.raise_for_status()


def sse(job, reading):
    with noting_errors(reading), post(job, "text/event-stream") as response:
        read_events(StreamReader(response.iter_bytes(), max_event_bytes=4 << 20), reading)


def ndjson(job, reading):
    with noting_errors(reading), post(job, "application/x-ndjson") as response:
        reader = StreamReader(response.iter_bytes(), framing="ndjson", max_event_bytes=4 << 20)
        read_events(reader, reading)
        note_event(json.loads(reader.terminal_event.data), reading)


def text(job, reading):
    with noting_errors(reading), post(job, "text/plain") as response:
        for text in response.iter_text():
            reading.text(text)


def whole(job, reading):
    with noting_errors(reading), post(job, "application/json", stream=False) as response:
        response.read()
        document = response.json()
        reading.reasoning(document.get("reasoning"))
        for call in document.get("tool_calls", ()):
            reading.call(None, call["id"], call["name"], call["arguments"])
        note_end(document, reading)
        reading.text(document["text"])


def read_events(reader, reading):
    for event in reader:
        note_event(json.loads(event.data), reading)


def note_event(event, reading):
    reading.reasoning(event.get("reasoning"))
    if call := event.get("tool_call"):
        reading.call(call["index"], call.get("id"), call.get("name"), call["arguments"])
    if event["done"]:
        note_end(event, reading)
    reading.text(event["token"])


def note_end(event, reading):
    reading.finish = event["finish_reason"]
    reading.usage = (event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"])
