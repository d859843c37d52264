"""
OpenAI's chat completions: ``POST /v1/chat/completions``, streamed and whole.

Fields that change the answer and that no backend is told of (penalties, `logit_bias`,
audio, …) are refused unless they say what happens anyway; silence would be a wrong answer.
Fields about cost, speed, storage or accounting (`store`, `service_tier`,
`prompt_cache_key`, `prediction`, …) are ignored, and so is `parallel_tool_calls`: clients
send it by default, and a model may follow it or not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from .._version import __version__
from ..core.messages import Finish, Reasoning, Refusal, Token, ToolCallDelta
from ..framing import FRAMINGS, NDJSON, TEXT
from ..framing.text import TextRenderer
from .answer_ids import CHAT, answer_id
from .chat_messages import MessageBody, read_messages
from .decoding import decode, invalid
from .encoding import encode
from .extra_body import read_extra_body
from .generation import GenerationBody, read_generation
from .openai_objects import (
    call_id,
    error_object,
    logprobs_object,
    tool_call_object,
    usage_object,
)
from .parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.messages import Choice, InferenceRequest, InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer

__all__ = ["OpenAIChatDialect", "ParsedChat"]

# Changes whenever the same seed may give another text; the server's share of that.
_FINGERPRINT = f"fp_flask_llmstream_{__version__}"


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _ChatBody(GenerationBody, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    stream_options: _StreamOptions | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    functions: Any = None
    function_call: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


_DEPRECATED = {"functions": "tools", "function_call": "tool_choice"}

# What has a name in the request, or is about the answer's form. The rest of the fields
# above is there for its type.
_OWN_FIELDS = frozenset(GenerationBody.__struct_fields__) | {
    "messages",
    "max_completion_tokens",
    "stream_options",
}

_decoder = msgspec.json.Decoder(_ChatBody)


@dataclass(frozen=True, slots=True)
class ParsedChat(Parsed):
    """A chat body; `include_usage` asks for the usage chunk at the stream's end."""

    include_usage: bool = False


class OpenAIChatDialect:
    """
    The `Dialect` of the OpenAI SDKs and of what is built on them.

    Args:
        clock: Unix time in seconds; gives `created`.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name = "openai_chat"
    framings = FRAMINGS
    streams_by_default = False

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def parse(self, body: bytes) -> ParsedChat:
        """
        Read a body.

        `max_completion_tokens` wins over the older `max_tokens`. `user` ends up in the
        request's `metadata`, and what has no name in a request in its `extra_body`.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """
        chat = decode(_decoder, body)
        _refuse_deprecated(chat)
        request = read_generation(chat, messages=read_messages(chat.messages))
        request.extra_body = read_extra_body(body, _OWN_FIELDS)
        if chat.max_completion_tokens is not None:
            request.max_tokens = chat.max_completion_tokens
        if chat.user is not None:
            request.metadata = {"user": chat.user, **request.metadata}
        options = chat.stream_options
        return ParsedChat(
            request=request,
            stream=chat.stream,
            include_usage=options is not None and bool(options.include_usage),
        )

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Chunks as SSE or NDJSON, or the bare text of choice 0."""
        if framing == TEXT:
            return TextRenderer()
        include_usage = isinstance(parsed, ParsedChat) and parsed.include_usage
        return _ChunkRenderer(parsed.request, framing, int(self._clock()), include_usage)

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """A `chat.completion`."""
        request = parsed.request
        return encode(
            {
                "id": answer_id(request, CHAT),
                "object": "chat.completion",
                "created": int(self._clock()),
                "model": request.model or response.model,
                "system_fingerprint": _FINGERPRINT,
                "choices": [_choice_object(choice, request) for choice in response.choices],
                "usage": usage_object(response.usage),
            }
        )

    def error_document(self, error: LLMStreamError) -> bytes:
        """OpenAI's error object, as the body of a 4xx or 5xx."""
        return encode(error_object(error))


def _refuse_deprecated(chat: _ChatBody) -> None:
    for field, replacement in _DEPRECATED.items():
        if getattr(chat, field) is not None:
            raise invalid(field, f"is deprecated; use `{replacement}`")


def _choice_object(choice: Choice, request: InferenceRequest) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text
        if choice.text or not (choice.tool_calls or choice.refusal)
        else None,
        "refusal": choice.refusal or None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [tool_call_object(call) for call in choice.tool_calls]
    tokens = choice.logprobs if request.logprobs else ()
    return {
        "index": choice.index,
        "message": message,
        "logprobs": logprobs_object(tokens, request.top_logprobs),
        "finish_reason": choice.finish_reason,
    }


class _ChunkRenderer:
    """
    `chat.completion.chunk` frames.

    Everything around a token's text is built once, so that a token costs one escape and
    one concatenation. What comes for a choice that is finished, or that was not asked
    for, has no place on the wire and renders as nothing.
    """

    def __init__(
        self, request: InferenceRequest, framing: Framing, created: int, include_usage: bool
    ) -> None:
        envelope = {
            "id": answer_id(request, CHAT),
            "object": "chat.completion.chunk",
            "created": created,
            "model": request.model,
            "system_fingerprint": _FINGERPRINT,
        }
        self.heartbeat = framing.heartbeat
        self._framing = framing
        self._logprobs = request.logprobs
        self._top_logprobs = request.top_logprobs
        self._include_usage = include_usage
        self._head = framing.prefix + encode(envelope)[:-1] + b',"choices":['
        self._tail = (b'],"usage":null}' if include_usage else b"]}") + framing.suffix
        # Of the choices still open: what stands before a text.
        self._text_heads = {
            choice: self._head + b'{"index":%d,"delta":{"content":' % choice
            for choice in range(request.n)
        }
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail
        self._called: set[tuple[int, int]] = set()

    def start(self) -> bytes:
        opening = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(choice, opening) for choice in self._text_heads)

    def render(self, item: Item) -> bytes:
        if type(item) is str:
            return self._text(item, 0)
        if isinstance(item, str):
            return self._token(item)
        if isinstance(item, Reasoning):
            return self._chunk(item.choice, {"reasoning_content": item.text}) if item.text else b""
        if isinstance(item, ToolCallDelta):
            return self._tool_call(item)
        if isinstance(item, Refusal):
            return self._chunk(item.choice, {"refusal": item.text}) if item.text else b""
        if isinstance(item, Finish):
            return self._finish(item.choice, item.reason)
        return b""  # usage is the end's to tell

    def end(self, response: InferenceResponse) -> bytes:
        reasons = {choice.index: choice.finish_reason for choice in response.choices}
        frames = [
            self._finish(choice, reasons.get(choice, "stop")) for choice in list(self._text_heads)
        ]
        if self._include_usage:
            usage = encode(usage_object(response.usage))
            frames.append(self._head + b'],"usage":' + usage + b"}" + self._framing.suffix)
        done = b'{"done":true}' if self._framing == NDJSON else b"[DONE]"
        frames.append(self._framing.frame(done))
        return b"".join(frames)

    def error(self, error: LLMStreamError) -> bytes:
        return self._framing.frame(encode(error_object(error)))

    def _token(self, item: str) -> bytes:
        text = str.__str__(item)  # not str(): a subclass may have a __str__ of its own
        if self._logprobs and isinstance(item, Token) and item.logprob is not None:
            logprobs = logprobs_object([item], self._top_logprobs)
            return self._chunk(item.choice, {"content": text}, logprobs)
        return self._text(text, getattr(item, "choice", 0))

    def _text(self, text: str, choice: int) -> bytes:
        head = self._text_heads.get(choice)
        return head + encode(text) + self._text_tail if text and head else b""

    def _tool_call(self, item: ToolCallDelta) -> bytes:
        function = {"arguments": item.arguments}
        call: dict[str, Any] = {"index": item.index, "function": function}
        if (item.choice, item.index) not in self._called:
            # Once only: clients join the ids and names of a call's deltas as they do arguments.
            self._called.add((item.choice, item.index))
            function = {"name": item.name or "", **function}
            call = {
                "index": item.index,
                "id": item.id or call_id(),
                "type": "function",
                "function": function,
            }
        elif not item.arguments:
            return b""
        return self._chunk(item.choice, {"tool_calls": [call]})

    def _finish(self, choice: int, reason: str) -> bytes:
        frame = self._chunk(choice, {}, finish_reason=reason)
        self._text_heads.pop(choice, None)
        return frame

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        if choice not in self._text_heads:
            return b""
        fields = {
            "index": choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._head + encode(fields) + self._tail
