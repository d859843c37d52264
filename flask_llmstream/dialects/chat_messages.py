"""Chat messages as OpenAI's clients write them, checked and turned into `Message`s."""

from __future__ import annotations

from typing import Any

import msgspec

from ..core.messages import Message, ToolCall
from .decoding import convert, invalid, one_of

__all__ = ["MessageBody", "read_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")


class _Function(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    id: str
    function: _Function


class MessageBody(msgspec.Struct, kw_only=True):
    """One element of a body's `messages`."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    function_call: Any = None


class _TextPart(msgspec.Struct):
    text: str


class _RefusalPart(msgspec.Struct):
    refusal: str


class _ImageURL(msgspec.Struct):
    url: str


class _ImagePart(msgspec.Struct):
    image_url: _ImageURL


class _InputAudio(msgspec.Struct):
    data: str
    format: str


class _AudioPart(msgspec.Struct):
    input_audio: _InputAudio


class _FilePart(msgspec.Struct):
    file: dict[str, Any]


_PARTS: dict[str, type[msgspec.Struct]] = {
    "text": _TextPart,
    "image_url": _ImagePart,
    "input_audio": _AudioPart,
    "file": _FilePart,
    "refusal": _RefusalPart,
}


def read_messages(bodies: list[MessageBody]) -> tuple[Message, ...]:
    """
    The chat, in order.

    Content parts are checked and kept as they came: whether a model can see images is
    for its engine to say.

    Raises:
        InvalidRequestError: Names the message and its field.
    """
    return tuple(
        _read_message(body, f"messages[{position}]") for position, body in enumerate(bodies)
    )


def _read_message(body: MessageBody, param: str) -> Message:
    if body.role not in ROLES:
        raise invalid(f"{param}.role", one_of(ROLES))
    if body.function_call is not None:
        raise invalid(f"{param}.function_call", "is deprecated; use `tool_calls`")
    calls = body.tool_calls if body.role == "assistant" else None
    content = body.content
    if content is None and body.role == "assistant":
        # What a client sends back of an answer that was refused.
        content = body.refusal
    if content is None and not calls:
        raise invalid(f"{param}.content", "is required where there are no `tool_calls`")
    if body.role == "tool" and body.tool_call_id is None:
        raise invalid(f"{param}.tool_call_id", "is required: which call does this answer?")
    if isinstance(content, list):
        for position, part in enumerate(content):
            _check_part(part, f"{param}.content[{position}]")
    return Message(
        role=body.role,
        content=content if content is not None else "",
        tool_calls=tuple(
            ToolCall(call.id, call.function.name, call.function.arguments) for call in calls or ()
        ),
        tool_call_id=body.tool_call_id,
        name=body.name,
    )


def _check_part(part: dict[str, Any], param: str) -> None:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise invalid(f"{param}.type", one_of(_PARTS))
    convert(part, _PARTS[kind], param)
