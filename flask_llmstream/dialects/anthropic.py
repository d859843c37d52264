"""
Anthropic's Messages: ``POST /v1/messages``, streamed and whole, and what counts its tokens.

Fields about cost, speed, storage or accounting (`cache_control`, `service_tier`,
`container`, …) are ignored, and so are `thinking.budget_tokens` and `output_config.effort`:
how much a model thinks is its own affair. Where `thinking` is disabled, thinking is left
out of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import InferenceRequest, Reasoning
from ..framing import FRAMINGS, TEXT
from ..framing.text import TextRenderer
from .answer_ids import MESSAGE, answer_id
from .anthropic_messages import (
    Blocks,
    MessageBody,
    ToolChoice,
    read_messages,
    read_system,
    read_tool_choice,
    read_tools,
)
from .anthropic_objects import error_object, stop_reason, usage_object
from .blocks import Block, BlockKind, BlockRenderer, blocks_of
from .decoding import convert, decode, invalid, one_of
from .encoding import encode
from .parsed import Parsed
from .tool_arguments import is_cut, read_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.messages import InferenceResponse, Item
    from ..exceptions import LLMStreamError
    from ..framing import Framing
    from ..typing import EventRenderer

__all__ = ["AnthropicDialect", "ParsedMessages"]

# Clients send thinking back only where it is signed, and some take an empty signature for
# none. Nothing here checks it.
_SIGNATURE = "unsigned"

_NonEmpty = Annotated[str, Meta(min_length=1)]


class _Thinking(msgspec.Struct):
    type: str


class _OutputConfig(msgspec.Struct):
    format: dict[str, Any] | None = None


class _SchemaFormat(msgspec.Struct):
    schema: dict[str, Any]


class _ChatBody(msgspec.Struct, kw_only=True):
    """What is counted. Null is the same as absent; unknown fields are ignored."""

    model: str | None = None
    messages: Annotated[list[MessageBody], Meta(min_length=1)]
    system: str | Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None
    output_format: dict[str, Any] | None = None


class _MessagesBody(_ChatBody, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: Annotated[list[_NonEmpty], Meta(max_length=16)] | None = None
    metadata: dict[str, Any] | None = None


_chat_decoder = msgspec.json.Decoder(_ChatBody)
_messages_decoder = msgspec.json.Decoder(_MessagesBody)


@dataclass(frozen=True, slots=True)
class ParsedMessages(Parsed):
    """A body; `hides_thinking` leaves the model's thinking out of the answer."""

    hides_thinking: bool = False


class AnthropicDialect:
    """
    The `Dialect` of the Anthropic SDKs and of what is built on them.

    Thread safety: immutable; share one freely. A renderer belongs to one response.
    """

    name = "anthropic"
    framings = FRAMINGS
    streams_by_default = False
    body_type = _MessagesBody
    count_body_type = _ChatBody

    def parse(self, body: bytes) -> ParsedMessages:
        """
        Read a body.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """
        fields = decode(_messages_decoder, body)
        request = _read_chat(fields)
        request.max_tokens = fields.max_tokens
        request.temperature = fields.temperature
        request.top_p = fields.top_p
        request.top_k = fields.top_k or None  # 0 is no limit.
        request.stop = fields.stop_sequences or ()
        request.metadata = fields.metadata or {}
        if fields.tool_choice is not None and fields.tool_choice.disable_parallel_tool_use:
            # A backend that is not given it ignores it: the model may follow it or not.
            request.extra_body = {"parallel_tool_calls": False}
        return ParsedMessages(
            request=request,
            stream=fields.stream,
            hides_thinking=fields.thinking is not None and fields.thinking.type == "disabled",
        )

    def parse_count(self, body: bytes) -> InferenceRequest:
        """
        Read a body whose tokens are to be counted: the same, but for how to generate.

        Raises:
            InvalidRequestError: Names the field in `param` and in its message.
        """
        return _read_chat(decode(_chat_decoder, body))

    def renderer(self, parsed: Parsed, framing: Framing) -> EventRenderer:
        """Events as SSE or NDJSON, or the bare text."""
        if framing == TEXT:
            return TextRenderer()
        if _hides_thinking(parsed):
            return _ThoughtlessRenderer(parsed.request, framing)
        return _EventRenderer(parsed.request, framing)

    def document(self, parsed: Parsed, response: InferenceResponse) -> bytes:
        """
        A `message`.

        Raises:
            EngineError: A tool call's arguments are no JSON object.
        """
        choice = response.choices[0]
        content = [
            _content_block(block, is_cut=is_cut(choice))
            for block in blocks_of(choice)
            if not (block.kind is BlockKind.REASONING and _hides_thinking(parsed))
        ]
        return encode(
            {
                **_message(parsed.request, response.model),
                "content": content,
                "stop_reason": stop_reason(choice),
                "stop_sequence": choice.stop_sequence,
                "usage": usage_object(response.usage),
            }
        )

    def error_document(self, error: LLMStreamError, request_id: str = "") -> bytes:
        """Anthropic's error object, as the body of a 4xx or 5xx."""
        return encode(error_object(error, request_id))


def _read_chat(fields: _ChatBody) -> InferenceRequest:
    tools = read_tools(fields.tools or ())
    return InferenceRequest(
        messages=(*read_system(fields.system), *read_messages(fields.messages)),
        model=fields.model or "",
        tools=tools,
        tool_choice=read_tool_choice(fields.tool_choice, tools),
        response_format=_response_format(fields),
    )


def _response_format(fields: _ChatBody) -> Mapping[str, Any] | None:
    """OpenAI's form of what is in `output_config`, or in its place before that came up."""
    wanted, param = fields.output_format, "output_format"
    if fields.output_config is not None and fields.output_config.format is not None:
        wanted, param = fields.output_config.format, "output_config.format"
    if wanted is None:
        return None
    if wanted.get("type") != "json_schema":
        raise invalid(f"{param}.type", one_of(("json_schema",)))
    schema = convert(wanted, _SchemaFormat, param).schema
    # OpenAI wants a name, and follows a schema to the letter only where it is told to.
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }


def _hides_thinking(parsed: Parsed) -> bool:
    return isinstance(parsed, ParsedMessages) and parsed.hides_thinking


def _message(request: InferenceRequest, model: str) -> dict[str, Any]:
    """A message that says nothing yet."""
    return {
        "id": answer_id(request, MESSAGE),
        "type": "message",
        "role": "assistant",
        "model": request.model or model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage_object(None),
    }


def _content_block(block: Block, *, is_cut: bool) -> dict[str, Any]:
    if block.kind is BlockKind.REASONING:
        return {"type": "thinking", "thinking": block.text, "signature": _SIGNATURE}
    if block.kind is BlockKind.TOOL_CALL:
        return {
            "type": "tool_use",
            "id": block.id,
            "name": block.name,
            "input": _tool_input(block.name, block.text, is_cut=is_cut),
        }
    return {"type": "text", "text": block.text}


def _tool_input(name: str, arguments: str, *, is_cut: bool) -> msgspec.Raw:
    """An empty one for a call that was cut, whose stop reason says that it is not whole."""
    value = read_arguments(name, arguments, is_cut=is_cut)
    return msgspec.Raw(b"{}") if value is None else value


# Of the blocks' deltas: type, and the key of the text.
_DELTAS = {
    BlockKind.REASONING: (b"thinking_delta", b"thinking"),
    BlockKind.TEXT: (b"text_delta", b"text"),
    BlockKind.REFUSAL: (b"text_delta", b"text"),
    BlockKind.TOOL_CALL: (b"input_json_delta", b"partial_json"),
}


class _EventRenderer(BlockRenderer):
    """Everything around a delta's text is built once a block."""

    def __init__(self, request: InferenceRequest, framing: Framing) -> None:
        super().__init__(framing)
        self.heartbeat = self._event("ping")
        self._request = request
        self._delta_head = b""
        self._delta_tail = b"}}" + framing.suffix

    def start(self) -> bytes:
        return self._event("message_start", message=_message(self._request, ""))

    def opened(self, block: Block) -> bytes:
        self._delta_head = self.framing.head("content_block_delta") + (
            b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (block.index, *_DELTAS[block.kind])
        )
        empty = _content_block(block, is_cut=False)
        if block.kind is BlockKind.REASONING:
            empty["signature"] = ""
        return self._event("content_block_start", index=block.index, content_block=empty)

    def delta(self, block: Block, text: str) -> bytes:  # noqa: ARG002
        return self._delta_head + encode(text) + self._delta_tail

    def closed(self, block: Block) -> bytes:
        stop = self._event("content_block_stop", index=block.index)
        if block.kind is not BlockKind.REASONING:
            return stop
        signature = {"type": "signature_delta", "signature": _SIGNATURE}
        return self._event("content_block_delta", index=block.index, delta=signature) + stop

    def ended(self, response: InferenceResponse) -> bytes:
        choice = response.choices[0]
        for call in choice.tool_calls:
            # The pieces are out already. What cannot be a document is no whole stream, either.
            _tool_input(call.name, call.arguments, is_cut=is_cut(choice))
        delta = {"stop_reason": stop_reason(choice), "stop_sequence": choice.stop_sequence}
        usage = usage_object(response.usage)
        return self._event("message_delta", delta=delta, usage=usage) + self._event("message_stop")

    def error(self, error: LLMStreamError) -> bytes:
        fields = error_object(error, self._request.request_id)
        return self._event(**fields)

    def _event(self, type: str, **fields: Any) -> bytes:
        payload = encode({"type": type, **fields})
        return self.framing.head(type) + payload + self.framing.suffix


class _ThoughtlessRenderer(_EventRenderer):
    """For who does not want to see the model think."""

    def render(self, item: Item) -> bytes:
        return b"" if isinstance(item, Reasoning) else super().render(item)
