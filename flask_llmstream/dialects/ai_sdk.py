"""
The Vercel AI SDK's UI message stream, version 1: what `useChat` and `useCompletion` read.

How to generate stands in what a page adds to the body, under OpenAI's names as on every
other route, or under the AI SDK's own (`maxOutputTokens`, `topP`, …). The rest of a body is
the page's, and ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import Message, Usage
from ..exceptions import RequestCancelledError
from ..framing import FRAMINGS, NDJSON, TEXT
from ..framing.text import TextRenderer
from .ai_sdk_messages import UIMessageBody, read_ui_messages
from .answer_ids import MESSAGE, answer_id
from .blocks import Block, BlockKind, BlockRenderer, blocks_of
from .decoding import decode, invalid
from .encoding import encode
from .generation import GenerationBody, read_generation
from .parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.messages import InferenceResponse
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer

__all__ = ["AISDKDialect", "ParsedUIChat"]

_NonEmpty = Annotated[str, Meta(min_length=1)]


class _ChatBody(GenerationBody, kw_only=True):
    messages: Annotated[list[UIMessageBody], Meta(min_length=1)] | None = None  # of useChat
    prompt: _NonEmpty | None = None  # of useCompletion
    id: str | None = None
    message_id: str | None = msgspec.field(default=None, name="messageId")
    system: str | None = None
    # Also by their names, as the AI SDK itself and assistant-ui have them.
    tools: list[dict[str, Any]] | dict[str, dict[str, Any]] | None = None  # type: ignore[assignment]


class _NamedChoice(msgspec.Struct, rename="camel"):
    tool_name: str


class _CallSettings(msgspec.Struct, rename="camel"):
    """What the AI SDK has a name of its own for."""

    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=1)] | None = None
    stop_sequences: Annotated[list[_NonEmpty], Meta(max_length=16)] | None = None
    tool_choice: str | _NamedChoice | None = None


_decoder = msgspec.json.Decoder(_ChatBody)
_settings_decoder = msgspec.json.Decoder(_CallSettings)


@dataclass(frozen=True, slots=True)
class ParsedUIChat(Parsed):
    """
    A chat body.

    Args:
        continues: The page's message that the answer goes on with, where there is one.
        id: The chat's.
    """

    continues: str | None = None
    id: str | None = None

    @property
    def chat_id(self) -> str | None:
        return self.id


class AISDKDialect:
    """
    The `Dialect` of pages with `useChat`, `useCompletion` or `Chat`, of AI SDK 5.0.100 to 7.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name = "ai_sdk"
    framings = FRAMINGS
    streams_by_default = True
    body_type = _ChatBody

    def parse(self, body: bytes) -> ParsedUIChat:
        """
        Read a body: UI messages, or a `prompt`, which is a user's only message.

        The chat's `id` ends up in the request's `metadata`, as `chat_id`.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """
        chat = decode(_decoder, body)
        if (chat.prompt is None) == (chat.messages is None):
            raise invalid("messages", "give either this or `prompt`")
        _adopt(chat, decode(_settings_decoder, body))
        request = read_generation(chat, messages=_messages(chat))
        if request.n > 1:
            raise invalid("n", "must be 1: a UI message has one answer")
        if request.logprobs:
            raise invalid("logprobs", "has no place in a UI message; leave it out")
        if chat.id is not None:
            request.metadata = {"chat_id": chat.id, **request.metadata}
        continues = _continued(chat.messages or (), chat.message_id)
        return ParsedUIChat(request, chat.stream, continues=continues, id=chat.id)

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Message parts as SSE or NDJSON, or the bare text."""
        if framing == TEXT:
            return TextRenderer()
        return _PartRenderer(_message_id(parsed), framing)

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """The UI message that a page would make of the stream."""
        parts = [_ui_part(block) for block in blocks_of(response.choices[0])]
        return encode(
            {
                "id": _message_id(parsed),
                "role": "assistant",
                "metadata": _metadata(response),
                "parts": [{"type": "step-start"}, *parts],
            }
        )

    def error_document(self, error: LLMStreamError) -> bytes:
        """
        What a stream ends with, as the body of a 4xx or 5xx.

        `useChat` makes the whole body its error's message.
        """
        return encode(
            {
                "type": "error",
                "errorText": error.message,
                "code": error.code,
                "retryable": error.retryable,
            }
        )


def _adopt(chat: _ChatBody, settings: _CallSettings) -> None:
    """Put what has a name of the AI SDK's where OpenAI has it."""
    choice: Any = settings.tool_choice
    if isinstance(choice, _NamedChoice):
        choice = {"type": "function", "function": {"name": choice.tool_name}}
    for name, value in (
        ("max_tokens", settings.max_output_tokens),
        ("top_p", settings.top_p),
        ("top_k", settings.top_k),
        ("stop", settings.stop_sequences),
        ("tool_choice", choice),
    ):
        if value is not None:
            setattr(chat, name, value)
    if isinstance(chat.tools, dict):
        chat.tools = [_function(name, tool) for name, tool in chat.tools.items()]


def _function(name: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool of the AI SDK's in OpenAI's form."""
    function = {
        "name": name,
        "description": tool.get("description"),
        "parameters": tool.get("inputSchema", tool.get("parameters")),
    }
    given = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": given}


def _messages(chat: _ChatBody) -> tuple[Message, ...]:
    if chat.messages is None:
        messages: tuple[Message, ...] = (Message("user", chat.prompt or ""),)
    else:
        messages = read_ui_messages(chat.messages)
    if not messages:
        raise invalid("messages", "has nothing that a model could read")
    return (Message("system", chat.system), *messages) if chat.system else messages


def _continued(messages: Sequence[UIMessageBody], message_id: str | None) -> str | None:
    """
    Which of the page's messages the answer belongs to; None where it is a new one.

    After a tool's result `useChat` shows another step of the same message. Under an id of
    its own it would be a second message with all the steps so far in it again.
    """
    answers = [message.id for message in messages if message.role == "assistant"]
    if message_id is not None and message_id in answers:
        return message_id
    return messages[-1].id if messages and messages[-1].role == "assistant" else None


def _message_id(parsed: Parsed) -> str:
    continues = parsed.continues if isinstance(parsed, ParsedUIChat) else None
    return continues or answer_id(parsed.request, MESSAGE)


_PART_TYPES = {
    BlockKind.REASONING: "reasoning",
    BlockKind.TEXT: "text",
    # There is no part for it, and a page has to show it.
    BlockKind.REFUSAL: "text",
}

_FINISH_REASONS = {"tool_calls": "tool-calls", "content_filter": "content-filter"}


def _finish_reason(response: InferenceResponse) -> str:
    reason = response.choices[0].finish_reason
    return _FINISH_REASONS.get(reason, reason)


def _metadata(response: InferenceResponse) -> dict[str, Any]:
    """A UI message has no other place for these; `usage` is a `LanguageModelUsage`."""
    usage = response.usage or Usage(0, 0)
    return {
        "finishReason": _finish_reason(response),
        "usage": {
            "inputTokens": usage.prompt_tokens,
            "inputTokenDetails": {
                "noCacheTokens": usage.prompt_tokens - usage.cached_tokens,
                "cacheReadTokens": usage.cached_tokens,
            },
            "outputTokens": usage.completion_tokens,
            "outputTokenDetails": {
                "textTokens": usage.completion_tokens - usage.reasoning_tokens,
                "reasoningTokens": usage.reasoning_tokens,
            },
            "totalTokens": usage.total_tokens,
        },
    }


def _tool_input(call: Block) -> dict[str, Any]:
    """The call's arguments as JSON; or as text, with what is wrong with it."""
    text = call.text
    try:
        # As the model wrote it, numbers too, but on one line.
        compact = msgspec.json.format(text.encode(), indent=-1) if text.strip() else b"{}"
    except (msgspec.DecodeError, RecursionError) as exc:
        return {"input": text, "errorText": f"The arguments are not valid JSON: {exc}"}
    return {"input": msgspec.Raw(compact)}


def _ui_part(block: Block) -> dict[str, Any]:
    """A whole block as a page keeps it."""
    if block.kind is not BlockKind.TOOL_CALL:
        return {"type": _PART_TYPES[block.kind], "text": block.text, "state": "done"}
    tool_input = _tool_input(block)
    return {
        "type": f"tool-{block.name}",
        "toolCallId": block.id,
        "state": "output-error" if "errorText" in tool_input else "input-available",
        **tool_input,
    }


class _PartRenderer(BlockRenderer):
    """
    The parts of a UI message, between `start` and `finish`.

    Everything around a piece of text is built once a block.
    """

    def __init__(self, message_id: str, framing: Framing) -> None:
        super().__init__(framing)
        self._message_id = message_id
        self._delta_head = b""
        self._delta_tail = b"}" + framing.suffix

    def start(self) -> bytes:
        return self._part("start", messageId=self._message_id) + self._part("start-step")

    def opened(self, block: Block) -> bytes:
        if block.kind is BlockKind.TOOL_CALL:
            call = {"toolCallId": block.id}
            self._delta_head = self._head("tool-input-delta", call, "inputTextDelta")
            return self._part("tool-input-start", **call, toolName=block.name)
        kind, id = _PART_TYPES[block.kind], str(block.index)
        self._delta_head = self._head(f"{kind}-delta", {"id": id}, "delta")
        return self._part(f"{kind}-start", id=id)

    def delta(self, block: Block, text: str) -> bytes:  # noqa: ARG002 - it is the open one
        return self._delta_head + encode(text) + self._delta_tail

    def closed(self, block: Block) -> bytes:
        if block.kind is not BlockKind.TOOL_CALL:
            return self._part(f"{_PART_TYPES[block.kind]}-end", id=str(block.index))
        tool_input = _tool_input(block)
        kind = "tool-input-error" if "errorText" in tool_input else "tool-input-available"
        return self._part(kind, toolCallId=block.id, toolName=block.name, **tool_input)

    def ended(self, response: InferenceResponse) -> bytes:
        finish = self._part(
            "finish",
            finishReason=_finish_reason(response),
            messageMetadata=_metadata(response),
        )
        done = b"" if self.framing == NDJSON else self.framing.frame(b"[DONE]")
        return self._part("finish-step") + finish + done

    def error(self, error: LLMStreamError) -> bytes:
        if isinstance(error, RequestCancelledError):
            # Somebody wanted it to stop: no failure, and no whole answer.
            return self._part("abort", reason=error.message)
        # Pages of AI SDK 5.0 to 6.0.2xx take no part with keys beyond the protocol's, so that
        # what a reader needs beside the text has a part of its own.
        told = {"message": error.message, "code": error.code, "retryable": error.retryable}
        return self._part("data-error", data=told, transient=True) + self._part(
            "error", errorText=error.message
        )

    def _head(self, kind: str, fields: Mapping[str, str], last: str) -> bytes:
        """A part up to the value of its *last* field."""
        opening = encode({"type": kind, **fields, last: ""})
        return self.framing.prefix + opening.removesuffix(b'""}')

    def _part(self, kind: str, **fields: Any) -> bytes:
        return self.framing.frame(encode({"type": kind, **fields}))
