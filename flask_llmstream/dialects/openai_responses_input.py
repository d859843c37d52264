"""
The `input` of OpenAI's Responses: items, checked, and the chat that they make.

A chat has messages; Responses has items, of which a message is one kind. An answer's
items are the next question's, so they are kept as items (`read_items`) and become a chat
(`messages_of`) only when a model is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import msgspec

from ..core.messages import Message, ToolCall
from ..exceptions import UnknownStreamError
from .decoding import convert, invalid, one_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["History", "ResponseItem", "messages_of", "read_items"]

ResponseItem: TypeAlias = dict[str, Any]
"""One item as JSON: it has a `type` and an `id`, whether or not the client gave them."""

_ROLES = ("user", "assistant", "system", "developer")
_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")

# What OpenAI puts before the ids of each type.
_ID_PREFIXES = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
}


class History(Protocol):
    """The caller's own earlier responses, as far as they are kept."""

    def conversation(self, response_id: str) -> Sequence[ResponseItem]:
        """
        Every item of the conversation up to the end of that response.

        Raises:
            InvalidRequestError: It is none of the caller's, or not finished yet.
        """

    def item(self, item_id: str) -> ResponseItem | None:
        """One item of an earlier response; None where there is none."""


class _MessageItem(msgspec.Struct):
    content: str | list[dict[str, Any]]
    role: str
    id: str | None = None
    status: str | None = None


class _FunctionCall(msgspec.Struct):
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class _FunctionCallOutput(msgspec.Struct):
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: str | None = None


class _ReasoningItem(msgspec.Struct):
    id: str | None = None
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


class _Reference(msgspec.Struct):
    id: str


class _Text(msgspec.Struct):
    text: str


class _Refusal(msgspec.Struct):
    refusal: str


class _Image(msgspec.Struct):
    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None


class _File(msgspec.Struct):
    file_data: str | None = None
    filename: str | None = None
    file_id: str | None = None
    file_url: str | None = None


class _AudioData(msgspec.Struct):
    data: str
    format: str


class _Audio(msgspec.Struct):
    input_audio: _AudioData


_PARTS: dict[str, type[msgspec.Struct]] = {
    "input_text": _Text,
    "output_text": _Text,
    "refusal": _Refusal,
    "input_image": _Image,
    "input_file": _File,
    "input_audio": _Audio,
}


def read_items(
    value: str | list[dict[str, Any]], *, token: str, history: History | None = None
) -> list[ResponseItem]:
    """
    The items of a body's `input`, each of them with a `type` and an `id`.

    Content is a list of parts, whatever it came as. References are replaced by what they
    refer to. What a client may write beside and nobody reads (`phase`, a part's
    `prompt_cache_breakpoint`) is not kept.

    Args:
        value: A string is one message of the user's.
        token: Of the response, for the ids of items that have none.
        history: Where references lead to; without one they lead nowhere.

    Raises:
        InvalidRequestError: Names the item and its field.
        UnknownStreamError: A reference leads nowhere.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return [
        _read_item(item, f"input[{position}]", f"{token}_in{position}", history)
        for position, item in enumerate(value)
    ]


def _read_item(item: ResponseItem, param: str, token: str, history: History | None) -> ResponseItem:
    kind = item.get("type")
    if kind is None:
        # Easy messages have no type, and in a reference it may be left out.
        kind = "message" if "role" in item or "id" not in item else "item_reference"
    if not isinstance(kind, str) or kind not in _TYPES:
        raise invalid(f"{param}.type", one_of(_TYPES))
    if kind == "item_reference":
        return _resolve(convert(item, _Reference, param).id, f"{param}.id", history)
    fields: dict[str, Any]
    if kind == "message":
        fields = _read_message(convert(item, _MessageItem, param), param)
    elif kind == "function_call":
        call = convert(item, _FunctionCall, param)
        fields = {
            "status": call.status or "completed",
            "call_id": call.call_id,
            "name": call.name,
            "arguments": call.arguments,
        }
    elif kind == "function_call_output":
        answer = convert(item, _FunctionCallOutput, param)
        fields = {
            "status": answer.status or "completed",
            "call_id": answer.call_id,
            "output": answer.output
            if isinstance(answer.output, str)
            else _read_parts(answer.output, f"{param}.output"),
        }
    else:
        thought = convert(item, _ReasoningItem, param)
        fields = {"summary": thought.summary or [], "content": thought.content or []}
        if thought.encrypted_content is not None:
            fields["encrypted_content"] = thought.encrypted_content
    return {"id": item.get("id") or _ID_PREFIXES[kind] + token, "type": kind, **fields}


def _read_message(message: _MessageItem, param: str) -> ResponseItem:
    if message.role not in _ROLES:
        raise invalid(f"{param}.role", one_of(_ROLES))
    content = message.content
    if isinstance(content, str):
        kind = "output_text" if message.role == "assistant" else "input_text"
        content = [{"type": kind, "text": content}]
    return {
        "status": message.status or "completed",
        "role": message.role,
        "content": _read_parts(content, f"{param}.content"),
    }


def _read_parts(parts: list[dict[str, Any]], param: str) -> list[ResponseItem]:
    return [_read_part(part, f"{param}[{position}]") for position, part in enumerate(parts)]


def _read_part(part: dict[str, Any], param: str) -> ResponseItem:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise invalid(f"{param}.type", one_of(_PARTS))
    read = convert(part, _PARTS[kind], param)
    if isinstance(read, _Image) and read.image_url is None:
        raise invalid(f"{param}.image_url", "is required: no files are kept here")
    if isinstance(read, _File) and read.file_data is None:
        raise invalid(f"{param}.file_data", "is required: no files are kept or fetched here")
    fields = {name: each for name, each in msgspec.to_builtins(read).items() if each is not None}
    if kind == "output_text":
        fields["annotations"] = []
    return {"type": kind, **fields}


def _resolve(id: str, param: str, history: History | None) -> ResponseItem:
    item = history.item(id) if history is not None else None
    if item is None:
        raise UnknownStreamError(
            f"{param}: there is no item of yours with this id. Send the item itself; "
            "only those of stored responses can be referred to, as long as they are kept.",
            param=param,
        )
    return item


def messages_of(items: Iterable[ResponseItem]) -> tuple[Message, ...]:
    """
    The chat that *items*, as `read_items` gives them, make.

    Calls belong to the assistant's message before them, as chat templates expect it.
    Reasoning is left out: models are not to see their earlier thoughts, and a chat has no
    place for them. So is a call that was cut off: nobody can have answered it.
    """
    messages: list[Message] = []
    for item in items:
        if item["type"] == "message":
            messages.append(Message(item["role"], _content(item["content"])))
        elif item["type"] == "function_call":
            if item["status"] == "incomplete":
                continue
            call = ToolCall(item["call_id"], item["name"], item["arguments"])
            if messages and messages[-1].role == "assistant":
                said = messages.pop()
                messages.append(
                    Message("assistant", said.content, tool_calls=(*said.tool_calls, call))
                )
            else:
                messages.append(Message("assistant", tool_calls=(call,)))
        elif item["type"] == "function_call_output":
            output = item["output"]
            messages.append(
                Message(
                    "tool",
                    output if isinstance(output, str) else _content(output),
                    tool_call_id=item["call_id"],
                )
            )
    return tuple(messages)


def _content(parts: Sequence[ResponseItem]) -> str | list[dict[str, Any]]:
    """*parts* in the form of chat completions; one text alone is a string, as most are."""
    content = [_chat_part(part) for part in parts]
    if len(content) == 1 and content[0]["type"] == "text":
        return str(content[0]["text"])
    return content


def _chat_part(part: ResponseItem) -> dict[str, Any]:
    kind = part["type"]
    if kind == "input_image":
        image = {"url": part["image_url"]}
        if "detail" in part:
            image["detail"] = part["detail"]
        return {"type": "image_url", "image_url": image}
    if kind == "input_file":
        file = {name: part[name] for name in ("file_data", "filename") if name in part}
        return {"type": "file", "file": file}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part["input_audio"]}
    if kind == "refusal":
        return {"type": "refusal", "refusal": part["refusal"]}
    return {"type": "text", "text": part["text"]}
