"""Chats and tools as Anthropic's clients write them, checked and put into OpenAI's form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import Message, ToolCall
from .decoding import convert, invalid, one_of
from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

__all__ = [
    "MessageBody",
    "ToolChoice",
    "read_messages",
    "read_system",
    "read_tool_choice",
    "read_tools",
]

Blocks = list[dict[str, Any]]


class MessageBody(msgspec.Struct):
    """One element of a body's `messages`."""

    role: str
    content: str | Blocks


class ToolChoice(msgspec.Struct):
    """A body's `tool_choice`."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Text(msgspec.Struct):
    text: str


class _Source(msgspec.Struct):
    type: str


class _Base64Source(msgspec.Struct):
    # It goes into a URL, where a comma or a semicolon would mean something else.
    media_type: Annotated[str, Meta(pattern=r"^image/[a-z0-9.+-]+\Z")]
    data: str


class _URLSource(msgspec.Struct):
    url: str


class _Image(msgspec.Struct):
    source: dict[str, Any]


class _ToolUse(msgspec.Struct):
    id: str
    name: str
    input: dict[str, Any]


class _ToolResult(msgspec.Struct):
    tool_use_id: str
    content: str | Blocks | None = None
    is_error: bool | None = None


class _Tool(msgspec.Struct):
    # Anthropic's rule; `\Z`, since `$` would let a newline follow.
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,128}\Z")]
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


def read_system(system: str | Blocks | None) -> Iterator[Message]:
    """The system prompt, where there is one."""
    if system:
        yield Message("system", _content(system, "system", _TEXT))


def read_messages(bodies: Sequence[MessageBody]) -> Iterator[Message]:
    """
    The chat, in order.

    A tool's result is a message of its own, as it is everywhere else. Thinking of earlier
    turns is left out: no backend here has a use for it. `cache_control` and what else is
    about Anthropic's own servers is ignored.

    Raises:
        InvalidRequestError: Names the message and its field.
    """
    for position, body in enumerate(bodies):
        read = _ROLES.get(body.role)
        if read is None:
            raise invalid(f"messages[{position}].role", one_of(_ROLES))
        yield from read(body.content, f"messages[{position}].content")


def _read_user(content: str | Blocks, param: str) -> Iterator[Message]:
    if isinstance(content, str):
        yield Message("user", content)
        return
    said: list[dict[str, Any]] = []
    for block, place in _each(content, param, {*_PARTS, "tool_result"}):
        if block["type"] != "tool_result":
            said.append(_PARTS[block["type"]](block, place))
            continue
        if said:
            yield Message("user", _joined(said))
            said = []
        yield _tool_result(block, place)
    if said or not content:
        yield Message("user", _joined(said))


def _read_assistant(content: str | Blocks, param: str) -> Iterator[Message]:
    if isinstance(content, str):
        yield Message("assistant", content)
        return
    said: list[dict[str, Any]] = []
    calls: list[ToolCall] = []
    kinds = ("text", "tool_use", "thinking", "redacted_thinking")
    for block, place in _each(content, param, kinds):
        if block["type"] == "text":
            said.append(_text(block, place))
        elif block["type"] == "tool_use":
            call = convert(block, _ToolUse, place)
            calls.append(ToolCall(call.id, call.name, encode(call.input).decode()))
    yield Message("assistant", _joined(said), tool_calls=tuple(calls))


def _read_system_turn(content: str | Blocks, param: str) -> Iterator[Message]:
    yield Message("system", _content(content, param, _TEXT))


_ROLES: dict[str, Callable[[str | Blocks, str], Iterator[Message]]] = {
    "user": _read_user,
    "assistant": _read_assistant,
    "system": _read_system_turn,
}


def _tool_result(block: dict[str, Any], param: str) -> Message:
    result = convert(block, _ToolResult, param)
    content = _content(result.content or "", f"{param}.content", _PARTS)
    if result.is_error:
        # Messages have no place for it, and the model has to know.
        content = (
            f"Error: {content}"
            if isinstance(content, str)
            else [{"type": "text", "text": "Error: "}, *content]
        )
    return Message("tool", content, tool_call_id=result.tool_use_id)


def _content(
    content: str | Blocks, param: str, kinds: Mapping[str, Callable[..., dict[str, Any]]]
) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return _joined(
        [kinds[block["type"]](block, place) for block, place in _each(content, param, kinds)]
    )


def _each(
    blocks: Blocks, param: str, kinds: Collection[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Every block with its place, once its type is known to be one of *kinds*."""
    for position, block in enumerate(blocks):
        place = f"{param}[{position}]"
        kind = block.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise invalid(f"{place}.type", one_of(sorted(kinds)))
        yield block, place


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """*parts* as a message's content: plain text where that is all there is to it."""
    if not parts:
        return ""
    return str(parts[0]["text"]) if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _text(block: dict[str, Any], param: str) -> dict[str, Any]:
    return {"type": "text", "text": convert(block, _Text, param).text}


def _image(block: dict[str, Any], param: str) -> dict[str, Any]:
    source = convert(block, _Image, param).source
    place = f"{param}.source"
    kind = convert(source, _Source, place).type
    if kind == "base64":
        data = convert(source, _Base64Source, place)
        url = f"data:{data.media_type};base64,{data.data}"
    elif kind == "url":
        url = convert(source, _URLSource, place).url
    else:
        raise invalid(f"{place}.type", one_of(("base64", "url")))
    return {"type": "image_url", "image_url": {"url": url}}


_TEXT = {"text": _text}
_PARTS = {"text": _text, "image": _image}


def read_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """
    The tools, in OpenAI's form.

    Raises:
        InvalidRequestError: Names the tool and its field; so for one that Anthropic's
            servers run, or that its models know without a schema.
    """
    return tuple(_tool(tool, f"tools[{position}]") for position, tool in enumerate(tools))


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise invalid(
            f"{param}.type", "must be `custom`: there are no tools that this server knows"
        )
    read = convert(tool, _Tool, param)
    function: dict[str, Any] = {"name": read.name, "parameters": read.input_schema}
    if read.description is not None:
        function["description"] = read.description
    if read.strict is not None:
        function["strict"] = read.strict
    return {"type": "function", "function": function}


def read_tool_choice(
    choice: ToolChoice | None, tools: Sequence[Mapping[str, Any]]
) -> str | Mapping[str, Any] | None:
    """
    Which of *tools*, in OpenAI's form, is to be called, in OpenAI's form.

    Raises:
        InvalidRequestError: There is no such choice, or no such tool.
    """
    if choice is None:
        return None
    if choice.type in ("auto", "none"):
        # Without tools there is nothing to choose: the request does not ask for the feature.
        return choice.type if tools else None
    if choice.type == "any":
        if not tools:
            raise invalid("tool_choice", "`any` needs `tools`")
        return "required"
    if choice.type != "tool":
        raise invalid("tool_choice.type", one_of(("auto", "any", "tool", "none")))
    if choice.name not in {tool["function"]["name"] for tool in tools}:
        raise invalid("tool_choice.name", "names no tool of `tools`")
    return {"type": "function", "function": {"name": choice.name}}
