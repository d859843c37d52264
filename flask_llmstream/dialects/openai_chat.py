"""
OpenAI's chat completions: ``POST /v1/chat/completions``, streamed and whole.

Fields that change the answer and that no backend is told of (penalties, `logit_bias`,
audio, …) are refused unless they say what happens anyway; silence would be a wrong answer.
Fields about cost, speed, storage or accounting (`store`, `prompt_cache_key`,
`safety_identifier`, `prediction`, …) are ignored, and so is `parallel_tool_calls`: clients
send it by default, and a model may follow it or not. `service_tier` and `metadata` are
ignored as well, and echoed as OpenAI does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from ..core.messages import Finish, Reasoning, Refusal, Token, ToolCallDelta
from ..framing import FRAMINGS, TEXT
from ..framing.text import TextRenderer
from .answer_ids import CHAT, answer_id
from .chat_messages import MessageBody, read_messages
from .decoding import decode, invalid
from .encoding import encode
from .extra_body import read_extra_body
from .generation import GenerationBody, read_generation
from .openai_chunks import ChunkRenderer, CountingRenderer, StreamOptions
from .openai_objects import (
    FINGERPRINT,
    call_id,
    error_object,
    logprobs_object,
    tier_served,
    tool_call_object,
    usage_object,
)
from .parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..core.messages import Choice, InferenceRequest, InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer

__all__ = ["OpenAIChatDialect", "ParsedChat"]


class _ChatBody(GenerationBody, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    stream_options: StreamOptions | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    service_tier: str | None = None
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
    """
    A chat body, and what its answer has to say.

    Args:
        include_usage: The usage, in a chunk of its own at the stream's end.
        continuous_usage: The usage so far, in every chunk.
        service_tier: The tier that was asked for.
        metadata: The client's own.
    """

    include_usage: bool = False
    continuous_usage: bool = False
    service_tier: str | None = None
    metadata: Mapping[str, Any] | None = None


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
    body_type = _ChatBody

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
        options = chat.stream_options or StreamOptions()
        return ParsedChat(
            request=request,
            stream=chat.stream,
            include_usage=options.shows_usage,
            continuous_usage=options.shows_usage_so_far,
            service_tier=chat.service_tier,
            metadata=chat.metadata,
        )

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Chunks as SSE or NDJSON, or the bare text of choice 0."""
        if framing == TEXT:
            return TextRenderer()
        chat = _as_chat(parsed)
        renderer = _ChatRenderer(chat, framing, int(self._clock()))
        return CountingRenderer(renderer) if chat.continuous_usage else renderer

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """A `chat.completion`."""
        chat = _as_chat(parsed)
        request = chat.request
        document = {
            "id": answer_id(request, CHAT),
            "object": "chat.completion",
            "created": int(self._clock()),
            "model": request.model or response.model,
            "system_fingerprint": FINGERPRINT,
            **_tier(chat),
            "choices": [_choice_object(choice, request) for choice in response.choices],
            "usage": usage_object(response.usage),
        }
        if chat.metadata is not None:
            document["metadata"] = chat.metadata
        return encode(document)

    def error_document(self, error: LLMStreamError) -> bytes:
        """OpenAI's error object, as the body of a 4xx or 5xx."""
        return encode(error_object(error))


def _refuse_deprecated(chat: _ChatBody) -> None:
    for field, replacement in _DEPRECATED.items():
        if getattr(chat, field) is not None:
            raise invalid(field, f"is deprecated; use `{replacement}`")


def _as_chat(parsed: Parsed) -> ParsedChat:
    """*parsed* also where it came from no body."""
    return parsed if isinstance(parsed, ParsedChat) else ParsedChat(parsed.request, parsed.stream)


def _tier(chat: ParsedChat) -> dict[str, str]:
    """The answer's `service_tier`, where the request has one."""
    tier = chat.service_tier
    return {} if tier is None else {"service_tier": tier_served(tier)}


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


class _ChatRenderer(ChunkRenderer):
    """`chat.completion.chunk` frames."""

    text_head = b'"delta":{"content":'
    text_tail = b'},"logprobs":null,"finish_reason":null}'
    no_content: ClassVar = {"delta": {}}

    def __init__(self, parsed: ParsedChat, framing: Framing, created: int) -> None:
        request = parsed.request
        envelope = {
            "id": answer_id(request, CHAT),
            "object": "chat.completion.chunk",
            "created": created,
            "model": request.model,
            "system_fingerprint": FINGERPRINT,
            **_tier(parsed),
        }
        super().__init__(envelope, framing, request.n, include_usage=parsed.include_usage)
        self._logprobs = request.logprobs
        self._top_logprobs = request.top_logprobs
        self._called: set[tuple[int, int]] = set()

    def start(self) -> bytes:
        opening = {"role": "assistant", "content": ""}
        return b"".join(self._delta(choice, opening) for choice in self._text_heads)

    def render(self, item: Item) -> bytes:
        if type(item) is str:
            return self._text(item, 0)
        if isinstance(item, str):
            return self._token(item)
        if isinstance(item, Reasoning):
            return self._other_text(b"reasoning_content", item)
        if isinstance(item, ToolCallDelta):
            return self._tool_call(item)
        if isinstance(item, Refusal):
            return self._other_text(b"refusal", item)
        if isinstance(item, Finish):
            return self._finish(item.choice, item.reason)
        return b""  # usage is the end's to tell

    def _delta(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> bytes:
        return self._chunk(choice, {"delta": delta}, logprobs=logprobs)

    def _other_text(self, field: bytes, item: Reasoning | Refusal) -> bytes:
        if not item.text or item.choice not in self._text_heads:
            return b""
        head = b'%b{"index":%d,"delta":{"%b":' % (self._head, item.choice, field)
        return head + encode(item.text) + self._text_tail

    def _token(self, item: str) -> bytes:
        text = str.__str__(item)  # not str(): a subclass may have a __str__ of its own
        if self._logprobs and isinstance(item, Token) and item.logprob is not None:
            logprobs = logprobs_object([item], self._top_logprobs)
            return self._delta(item.choice, {"content": text}, logprobs)
        return self._text(text, getattr(item, "choice", 0))

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
        return self._delta(item.choice, {"tool_calls": [call]})
