"""
The body of ``POST /v1/responses``, read into a request.

As in chat completions, a field that changes the answer and that no backend is told of is
refused, unless it says what happens anyway; what is about cost, speed or accounting is
ignored. Where the names differ, the field in an error is the body's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from .answer_ids import RESPONSE
from .decoding import convert, decode, invalid, one_of
from .extra_body import read_extra_body
from .generation import FunctionBody, GenerationBody, read_generation
from .openai_objects import tier_served
from .openai_responses_input import messages_of, read_items
from .parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .openai_responses_input import History, ResponseItem

__all__ = ["ParsedResponses", "ResponsesBody", "read_body"]

_Positive = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedResponses(Parsed):
    """
    A body of the Responses API.

    Args:
        token: What makes the ids of this response and its items. Whoever knows a
            response's id may go on from it, so it is never the client's `X-Request-ID`.
        created_at: Unix time in whole seconds.
        items: What is asked now.
        history: Every item of the conversation before.
        fields: Of the response object: what it repeats from the body.
        store: Whether the response is to be kept.
        background: Whether it goes on without its client.
    """

    token: str
    created_at: int
    items: Sequence[ResponseItem]
    history: Sequence[ResponseItem]
    fields: Mapping[str, Any]
    store: bool
    background: bool

    @property
    def answer_id(self) -> str:
        return RESPONSE + self.token


class _Text(msgspec.Struct):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class _Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class ResponsesBody(GenerationBody, kw_only=True):
    """A body of ``/v1/responses``."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: _Positive | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    include: list[str] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: _Positive | None = None
    truncation: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream_options: dict[str, Any] | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None


class _Named(msgspec.Struct):
    name: str


class _SchemaFormat(msgspec.Struct):
    schema: dict[str, Any]
    name: str = "response"
    description: str | None = None
    strict: bool | None = None


# Chat completions' names for what is called something else here. To ignore them would be
# a wrong answer, and to take them would make an answer that OpenAI would not give.
_OF_CHAT = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
    "reasoning_effort": "reasoning.effort",
}

# Named as in chat completions, so that an upstream that is asked for one knows them.
_PASSED_ON = frozenset(
    {
        "parallel_tool_calls",
        "service_tier",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "presence_penalty",
        "frequency_penalty",
    }
)
_OWN_FIELDS = frozenset(ResponsesBody.__struct_fields__) - _PASSED_ON

_LOGPROBS = "message.output_text.logprobs"

_decoder = msgspec.json.Decoder(ResponsesBody)


def read_body(body: bytes, *, created_at: int, history: History | None = None) -> ParsedResponses:
    """
    Read *body*.

    Args:
        body: As it came.
        created_at: Unix time in whole seconds.
        history: The caller's earlier responses; without it there are none to go on from.

    Raises:
        InvalidRequestError: Names the field in `param` and in its message.
        UnknownStreamError: An item that `input` refers to is none of the caller's.
    """
    fields = decode(_decoder, body)
    extra_body = read_extra_body(body, _OWN_FIELDS - _OF_CHAT.keys())
    _refuse_foreign(fields, extra_body)
    token = token_hex(16)
    earlier = _conversation(fields.previous_response_id, history)
    items = read_items(fields.input or [], token=token, history=history)
    tools, wanted_format = _tools(fields), _format(fields.text)
    chat = msgspec.structs.replace(
        fields,
        max_tokens=fields.max_output_tokens,
        tools=[{"type": "function", "function": _given(tool)} for tool in tools],
        tool_choice=_tool_choice(fields.tool_choice, tools),
        response_format=_chat_format(wanted_format),
        logprobs=_LOGPROBS in (fields.include or ()),
        top_logprobs=fields.top_logprobs if _LOGPROBS in (fields.include or ()) else None,
    )
    messages = messages_of([*_instructions(fields), *earlier, *items])
    if not messages:
        raise invalid("input", "is required")
    request = read_generation(chat, messages=messages)
    request.extra_body = {**extra_body, **_chat_extras(fields)}
    if fields.user is not None:
        request.metadata = {"user": fields.user, **request.metadata}
    return ParsedResponses(
        request=request,
        stream=fields.stream,
        token=token,
        created_at=created_at,
        items=items,
        history=earlier,
        fields=_repeated(fields, tools, wanted_format),
        store=fields.store is not False,
        background=bool(fields.background),
    )


def _refuse_foreign(fields: ResponsesBody, extra_body: Mapping[str, Any]) -> None:
    for name, own in _OF_CHAT.items():
        if name in extra_body:
            raise invalid(name, f"belongs to chat completions; use `{own}`")
    if fields.n not in (None, 1):
        raise invalid("n", "must be 1: a response is one answer")
    if fields.conversation is not None:
        raise invalid("conversation", "is not supported; use `previous_response_id`")
    if fields.prompt is not None:
        raise invalid("prompt", "is not supported; use `input` and `instructions`")
    if fields.background and fields.store is False:
        raise invalid("store", "must be true in the background: the answer is read later")


def _conversation(
    previous_response_id: str | None, history: History | None
) -> Sequence[ResponseItem]:
    if previous_response_id is None:
        return ()
    if history is None:
        raise invalid("previous_response_id", "is not supported here; send the items themselves")
    return history.conversation(previous_response_id)


def _instructions(fields: ResponsesBody) -> list[ResponseItem]:
    if fields.instructions is None:
        return []
    content = [{"type": "input_text", "text": fields.instructions}]
    return [{"type": "message", "role": "system", "content": content}]


def _tools(fields: ResponsesBody) -> list[FunctionBody]:
    tools = []
    for position, tool in enumerate(fields.tools or ()):
        param = f"tools[{position}]"
        if tool.get("type") != "function":
            raise invalid(f"{param}.type", one_of(["function"]) + ": no tools are built in here")
        tools.append(convert(tool, FunctionBody, param))
    return tools


def _given(fields: msgspec.Struct) -> dict[str, Any]:
    """*fields* without those that are null."""
    return {name: each for name, each in msgspec.to_builtins(fields).items() if each is not None}


def _tool_choice(
    choice: str | dict[str, Any] | None, tools: Sequence[FunctionBody]
) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function":
        raise invalid("tool_choice.type", one_of(["function"]))
    name = convert(choice, _Named, "tool_choice").name
    if all(name != tool.name for tool in tools):
        raise invalid("tool_choice.name", "names no function of `tools`")
    return {"type": "function", "function": {"name": name}}


def _format(text: _Text | None) -> dict[str, Any]:
    """`text.format` as it is repeated in the response."""
    wanted = (text.format if text is not None else None) or {"type": "text"}
    kind = wanted.get("type")
    if kind == "json_schema":
        return {"type": kind, **msgspec.to_builtins(convert(wanted, _SchemaFormat, "text.format"))}
    if kind not in ("text", "json_object"):
        raise invalid("text.format.type", one_of(["text", "json_object", "json_schema"]))
    return {"type": kind}


def _chat_format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    if wanted["type"] != "json_schema":
        return dict(wanted)
    schema = {name: each for name, each in wanted.items() if name != "type" and each is not None}
    return {"type": "json_schema", "json_schema": schema}


def _chat_extras(fields: ResponsesBody) -> dict[str, Any]:
    """What chat completions have a field for and requests have none."""
    extras = {}
    if fields.reasoning is not None and fields.reasoning.effort is not None:
        extras["reasoning_effort"] = fields.reasoning.effort
    if fields.text is not None and fields.text.verbosity not in (None, "medium"):
        extras["verbosity"] = fields.text.verbosity
    return extras


def _repeated(
    fields: ResponsesBody, tools: Sequence[FunctionBody], wanted_format: Mapping[str, Any]
) -> dict[str, Any]:
    """What the response object says of the body again."""
    text = fields.text or _Text()
    reasoning = fields.reasoning or _Reasoning()
    return {
        "instructions": fields.instructions,
        "previous_response_id": fields.previous_response_id,
        "tools": [{"type": "function", **msgspec.to_builtins(tool)} for tool in tools],
        "tool_choice": "auto" if fields.tool_choice is None else fields.tool_choice,
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "max_tool_calls": fields.max_tool_calls,
        "text": {"format": wanted_format, "verbosity": text.verbosity or "medium"},
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        # Nothing is cut away here, whatever the body allows.
        "truncation": "disabled",
        "metadata": fields.metadata or {},
        "service_tier": tier_served(fields.service_tier or "auto"),
        "user": fields.user,
        "safety_identifier": fields.safety_identifier,
        "prompt_cache_key": fields.prompt_cache_key,
        "presence_penalty": fields.presence_penalty or 0,
        "frequency_penalty": fields.frequency_penalty or 0,
    }
