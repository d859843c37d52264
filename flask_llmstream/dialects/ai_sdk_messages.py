"""The Vercel AI SDK's UI messages, as `useChat` keeps and sends them, made into `Message`s."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import Message, ToolCall
from .decoding import convert, invalid, one_of
from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["UIMessageBody", "read_ui_messages"]

ROLES = ("system", "user", "assistant")

_AUDIO_FORMATS = {"audio/wav": "wav", "audio/mp3": "mp3", "audio/mpeg": "mp3"}


class UIMessageBody(msgspec.Struct, kw_only=True):
    """One element of a body's `messages`."""

    role: str
    parts: list[dict[str, Any]]
    id: str | None = None


class _TextPart(msgspec.Struct):
    text: str


class _FilePart(msgspec.Struct, rename="camel"):
    # Empty where a provider keeps the file: there is none here to ask for it.
    url: Annotated[str, Meta(min_length=1)]
    media_type: str
    filename: str | None = None


class _Approval(msgspec.Struct):
    approved: bool | None = None
    reason: str | None = None


class _ToolPart(msgspec.Struct, rename="camel"):
    tool_call_id: str
    state: str
    tool_name: str | None = None
    input: Any = None
    raw_input: Any = None
    output: Any = None
    error_text: str | None = None
    approval: _Approval | None = None


class _SteeringPart(msgspec.Struct):
    parts: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part, and where it stands in the body."""

    kind: str
    fields: dict[str, Any]
    param: str


def read_ui_messages(bodies: Iterable[UIMessageBody]) -> tuple[Message, ...]:
    """
    The chat, in order, as the AI SDK's own `convertToModelMessages` makes it.

    Each step of an assistant's message becomes a message with its calls, and one for each
    result. Reasoning is left out, and so is what only a page has a use for: data and
    source parts, and kinds of parts that are unknown here.

    Raises:
        InvalidRequestError: Names the message, and its part and field.
    """
    messages: list[Message] = []
    for position, body in enumerate(bodies):
        param = f"messages[{position}]"
        if body.role not in ROLES:
            raise invalid(f"{param}.role", one_of(ROLES))
        parts = _parts(body.parts, param)
        if body.role == "assistant":
            messages += _read_answer(parts)
        else:
            messages.append(Message(body.role, _content(parts)))
    return tuple(messages)


def _parts(bodies: list[dict[str, Any]], param: str) -> list[_Part]:
    parts = []
    for position, fields in enumerate(bodies):
        place = f"{param}.parts[{position}]"
        kind = fields.get("type")
        if not isinstance(kind, str):
            raise invalid(f"{place}.type", "must be a string")
        parts.append(_Part(kind, fields, place))
    return parts


def _read_answer(parts: Iterable[_Part]) -> Iterator[Message]:
    """The messages of an assistant's one: the model was asked once for each step."""
    step: list[_Part] = []
    for part in parts:
        if part.kind == "step-start":
            yield from _read_step(step)
            step = []
        elif part.kind == "steering-message":  # The user spoke between two steps.
            yield from _read_step(step)
            step = []
            steering = convert(part.fields, _SteeringPart, part.param)
            yield Message("user", _content(_parts(steering.parts, part.param)))
        else:
            step.append(part)
    yield from _read_step(step)


def _read_step(parts: Iterable[_Part]) -> Iterator[Message]:
    said, calls, results = [], [], []
    for part in parts:
        if part.kind != "dynamic-tool" and not part.kind.startswith("tool-"):
            said.append(part)
            continue
        tool = convert(part.fields, _ToolPart, part.param)
        if tool.state == "input-streaming":
            continue  # The answer broke off in there.
        calls.append(ToolCall(tool.tool_call_id, _tool_name(part, tool), _arguments(tool)))
        result = _result(tool)
        if result is not None:
            results.append(Message("tool", result, tool_call_id=tool.tool_call_id))
    content = _content(said)
    if content or calls:
        yield Message("assistant", content, tool_calls=tuple(calls))
    yield from results


def _tool_name(part: _Part, tool: _ToolPart) -> str:
    if part.kind != "dynamic-tool":
        return part.kind.removeprefix("tool-")
    if tool.tool_name is None:
        raise invalid(f"{part.param}.toolName", "is required")
    return tool.tool_name


def _arguments(tool: _ToolPart) -> str:
    """
    The call's arguments: always JSON, which many chat templates insist on.

    Of arguments that were none, the page has the text: that becomes a JSON string.
    """
    value = tool.raw_input if tool.input is None else tool.input
    return "{}" if value is None else encode(value).decode()


def _result(tool: _ToolPart) -> str | None:
    """What the model is told of the call's result; None where there is none yet."""
    if tool.state == "output-available":
        return tool.output if isinstance(tool.output, str) else encode(tool.output).decode()
    if tool.state == "output-error":
        return tool.error_text or ""
    approval = tool.approval or _Approval()
    if tool.state == "output-denied" or approval.approved is False:
        return approval.reason or "Tool call execution denied."
    return None


def _content(parts: Iterable[_Part]) -> str | list[dict[str, Any]]:
    """Message content: a string where one is enough, else parts in OpenAI's form."""
    content = []
    for part in parts:
        if part.kind == "text":
            content.append(
                {"type": "text", "text": convert(part.fields, _TextPart, part.param).text}
            )
        elif part.kind == "file":
            content.append(_file(convert(part.fields, _FilePart, part.param), part.param))
    if not content:
        return ""
    if len(content) == 1 and content[0]["type"] == "text":
        return content[0]["text"]
    return content


def _file(file: _FilePart, param: str) -> dict[str, Any]:
    """
    A file as OpenAI's content part of its kind; a text file's text, which every model can
    read.
    """
    kind = file.media_type.partition("/")[0]
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": file.url}}
    head, is_data, data = file.url.partition(";base64,")
    if is_data and head.startswith("data:"):
        if kind == "text":
            return {"type": "text", "text": _decoded(data, param)}
        if file.media_type in _AUDIO_FORMATS:
            audio = {"data": data, "format": _AUDIO_FORMATS[file.media_type]}
            return {"type": "input_audio", "input_audio": audio}
    named = {} if file.filename is None else {"filename": file.filename}
    return {"type": "file", "file": {**named, "file_data": file.url}}


def _decoded(data: str, param: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, UnicodeError) as exc:
        raise invalid(f"{param}.url", "is no text in UTF-8, encoded in Base64") from exc
