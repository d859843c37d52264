"""Chat messages as Ollama's clients write them, checked and turned into `Message`s."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from typing import TYPE_CHECKING, Any

import msgspec

from ..core.messages import Message, ToolCall
from .chat_messages import ROLES
from .decoding import invalid, one_of
from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OllamaMessageBody", "content_of", "read_ollama_messages"]

# How the formats begin that vision models are fed with.
_IMAGE_TYPES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "image/webp"),
)


class _Function(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | None = None


class _ToolCall(msgspec.Struct):
    function: _Function
    id: str | None = None


class OllamaMessageBody(msgspec.Struct, kw_only=True):
    """
    One element of a body's `messages`. Null is the same as absent.

    What a model thought (`thinking`) is left out of its next prompt, as it is by most
    models' own templates.
    """

    role: str
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


def read_ollama_messages(bodies: Sequence[OllamaMessageBody]) -> tuple[Message, ...]:
    """
    The chat, in order.

    Ollama's tool calls had no ids for years, and most clients send none: a call gets one
    by its place, the same in every turn of the chat, and a result without one answers
    the first call still open, of its `tool_name` where it has one.

    Raises:
        InvalidRequestError: Names the message and its field.
    """
    messages = []
    open_calls: list[ToolCall] = []
    for position, body in enumerate(bodies):
        param = f"messages[{position}]"
        role = body.role.lower()
        if role not in ROLES:
            raise invalid(f"{param}.role", one_of(ROLES))
        calls: tuple[ToolCall, ...] = ()
        answered = None
        if role == "assistant" and body.tool_calls:
            calls = tuple(
                _tool_call(call, f"call_{position}_{number}")
                for number, call in enumerate(body.tool_calls)
            )
            open_calls = list(calls)
        elif role == "tool":
            answered = body.tool_call_id or _take_answered(open_calls, body.tool_name)
        messages.append(
            Message(
                role,
                content_of(body.content or "", body.images or (), f"{param}.images"),
                tool_calls=calls,
                tool_call_id=answered,
                name=body.tool_name if role == "tool" else None,
            )
        )
    return tuple(messages)


def _tool_call(call: _ToolCall, id: str) -> ToolCall:
    arguments = encode(call.function.arguments or {}).decode()
    return ToolCall(call.id or id, call.function.name, arguments)


def _take_answered(open_calls: list[ToolCall], name: str | None) -> str | None:
    for position, call in enumerate(open_calls):
        if name is None or call.name == name:
            return open_calls.pop(position).id
    return None


def content_of(text: str, images: Sequence[str], param: str) -> str | list[dict[str, Any]]:
    """
    A message's content: its text, or parts in OpenAI's form where there are images.

    Args:
        text: May be empty.
        images: Base64, without a media type: it is told from the data.
        param: Where they stand in the body.

    Raises:
        InvalidRequestError: Names the image that is none.
    """
    if not images:
        return text
    # Before the text, where Ollama puts them, too.
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(image, f"{param}[{number}]")}}
        for number, image in enumerate(images)
    ]
    if text:
        parts.append({"type": "text", "text": text})
    return parts


def _data_url(image: str, param: str) -> str:
    base64 = "".join(image.split())  # Encoders for mail break it into lines.
    try:
        data = b64decode(base64, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise invalid(param, "must be base64, and nothing before it") from exc
    for start, media_type in _IMAGE_TYPES:
        if start.match(data):
            return f"data:{media_type};base64,{base64}"
    raise invalid(param, "must be a PNG, JPEG, GIF or WebP image")
