"""Whole answers as bytes: of any renderer, and of every dialect in the framings with an end mark."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flask_llmstream import StreamReader
from flask_llmstream.core.assembly import Assembler
from flask_llmstream.dialects import (
    AISDKDialect,
    AnthropicDialect,
    NativeDialect,
    OllamaChatDialect,
    OllamaGenerateDialect,
    OpenAIChatDialect,
    OpenAICompletionsDialect,
    OpenAIResponsesDialect,
)
from flask_llmstream.framing import NDJSON, SSE

if TYPE_CHECKING:
    from flask_llmstream import Dialect
    from flask_llmstream.framing import Framing

HI = [{"role": "user", "content": "Hi"}]
RESPONSE_ENDS = ("response.completed", "response.incomplete")


def run(request, items):
    """What passes the engine's guard of *items*, and the whole answer."""
    assembler = Assembler(request)
    passed = [each for item in items for each in assembler.accept(item)]
    passed += assembler.finish()
    return passed, assembler.response()


def render_stream(renderer, items, response):
    """All that is sent of an answer that starts, has *items*, and ends."""
    return b"".join([renderer.start(), *map(renderer.render, items), renderer.end(response)])


def read_sse(stream: bytes):
    """The payloads of *stream*; every frame must be one data line and an empty one."""
    assert b"\r" not in stream
    assert not stream or stream.endswith(b"\n\n")
    payloads = []
    for frame in stream.split(b"\n\n")[:-1]:
        assert len(frame.decode().splitlines()) == 1
        assert frame.startswith(b"data: ")
        payloads.append(frame.removeprefix(b"data: "))
    return payloads


@dataclass(frozen=True)
class Wire:
    """
    One dialect in one framing.

    Args:
        dialect: Renders it.
        framing: SSE or NDJSON.
        body: What a client asks with.
        terminal: As for `StreamReader`.
    """

    dialect: Dialect
    framing: Framing
    body: dict[str, Any]
    terminal: Any = None

    def __str__(self) -> str:
        return f"{self.dialect.name}-{self.framing.name}"

    def parse(self, **fields):
        parsed = self.dialect.parse(json.dumps({**self.body, **fields}).encode())
        parsed.request.request_id = "r1"
        parsed.request.model = parsed.request.model or "m"
        return parsed

    def frames(self, *items, **fields):
        """What goes out for *items*, in the pieces in which it is made; an error may be last."""
        parsed = self.parse(**fields)
        renderer = self.dialect.renderer(parsed, self.framing)
        assembler = Assembler(parsed.request)
        frames = [renderer.start()]
        for item in items:
            if isinstance(item, Exception):
                return [*frames, renderer.error(item)]
            frames += map(renderer.render, assembler.accept(item))
        frames += map(renderer.render, assembler.finish())
        return [*frames, renderer.end(assembler.response())]

    def render(self, *items, **fields):
        """The whole stream for *items*; it ends with an error where one is last."""
        return b"".join(self.frames(*items, **fields))

    def document(self, *items, **fields):
        """The whole answer for *items*, which is not streamed."""
        parsed = self.parse(**fields)
        _, response = run(parsed.request, items)
        return self.dialect.document(parsed, response)

    def read(self, chunks, **options):
        """A reader of such a stream."""
        return StreamReader(chunks, framing=self.framing.name, terminal=self.terminal, **options)


def _both(dialect, body, *, sse=None, ndjson=None):
    wire = partial(Wire, dialect, body=body)
    return (
        wire(framing=SSE, terminal=sse),
        wire(framing=NDJSON, terminal=ndjson),
    )


WIRES = (
    *_both(NativeDialect(), {"prompt": "Hi"}),
    *_both(OpenAIChatDialect(), {"messages": HI}),
    *_both(OpenAICompletionsDialect(), {"prompt": "Hi"}),
    *_both(
        OpenAIResponsesDialect(),
        {"input": "Hi", "model": "m"},
        sse=RESPONSE_ENDS,
        ndjson=RESPONSE_ENDS,
    ),
    *_both(
        AnthropicDialect(),
        {"messages": HI, "max_tokens": 1000},
        sse="message_stop",
        ndjson="message_stop",
    ),
    *_both(OllamaChatDialect(), {"model": "m", "messages": HI}),
    *_both(OllamaGenerateDialect(), {"model": "m", "prompt": "Hi"}),
    *_both(
        AISDKDialect(),
        {"messages": [{"role": "user", "parts": [{"type": "text", "text": "Hi"}]}]},
        ndjson="finish",
    ),
)
