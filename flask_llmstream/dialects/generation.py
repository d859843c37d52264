"""The body fields that say what to generate and how, the same on every route."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import InferenceRequest
from .decoding import convert, invalid, one_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.messages import Message

__all__ = [
    "MAX_CHOICES",
    "FunctionBody",
    "GenerationBody",
    "SamplingBody",
    "read_generation",
    "read_sampling",
]

# OpenAI's own limit. One request may take this many sequences of a backend, no more.
MAX_CHOICES = 128

_NonEmpty = Annotated[str, Meta(min_length=1)]
_Positive = Annotated[int, Meta(ge=1)]
# OpenAI's rule for names of functions. `\Z`, since `$` would let a newline follow.
_Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]


class SamplingBody(msgspec.Struct, kw_only=True):
    """
    Base of every body. Null is the same as absent; unknown fields are ignored.

    OpenAI takes at most four `stop` strings; local models' templates often need more.
    """

    model: str | None = None
    stream: bool | None = None
    max_tokens: _Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: _Positive | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _NonEmpty | Annotated[list[_NonEmpty], Meta(max_length=16)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    response_format: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class GenerationBody(SamplingBody, kw_only=True):
    """Base of the chat-like bodies."""

    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class FunctionBody(msgspec.Struct):
    """A function that may be called."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct):
    function: FunctionBody


class _Named(msgspec.Struct):
    name: str


class _NamedChoice(msgspec.Struct):
    function: _Named


class _Schema(msgspec.Struct):
    schema: dict[str, Any]
    strict: bool | None = None


class _SchemaFormat(msgspec.Struct):
    json_schema: _Schema


def read_generation(
    body: GenerationBody, *, prompt: str = "", messages: Sequence[Message] = ()
) -> InferenceRequest:
    """
    The request that *body* makes of a prompt or a chat.

    Tools, tool choice and response format are checked and kept in OpenAI's form.

    Raises:
        InvalidRequestError: Fields that do not go together; names the one to change.
    """
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs `logprobs` to be true")
    names = _tool_names(body.tools or ())
    request = read_sampling(body, prompt=prompt, messages=messages)
    request.tools = tuple(body.tools or ())
    request.tool_choice = _tool_choice(body.tool_choice, names)
    request.logprobs = bool(body.logprobs)
    request.top_logprobs = body.top_logprobs or 0
    return request


def read_sampling(
    body: SamplingBody, *, prompt: str = "", messages: Sequence[Message] = ()
) -> InferenceRequest:
    """
    What every body says of the request for a prompt or a chat.

    Raises:
        InvalidRequestError: The response format is none; names its field.
    """
    return InferenceRequest(
        prompt=prompt,
        messages=messages,
        model=body.model or "",
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        seed=body.seed,
        stop=body.stop or (),
        response_format=_response_format(body.response_format),
        n=body.n or 1,
        metadata=body.metadata or {},
    )


def _tool_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    names = set()
    for position, tool in enumerate(tools):
        param = f"tools[{position}]"
        if tool.get("type") != "function":
            raise invalid(f"{param}.type", one_of(["function"]))
        names.add(convert(tool, _Tool, param).function.name)
    return frozenset(names)


def _tool_choice(
    choice: str | Mapping[str, Any] | None, names: frozenset[str]
) -> str | Mapping[str, Any] | None:
    if isinstance(choice, str):
        if choice not in {"auto", "none", "required"}:
            raise invalid("tool_choice", one_of(["auto", "none", "required"]) + ", or an object")
        if choice == "required" and not names:
            raise invalid("tool_choice", "`required` needs `tools`")
        # Without tools there is nothing to choose: the request does not ask for the feature.
        return choice if names else None
    if choice is not None:
        if choice.get("type") != "function":
            raise invalid("tool_choice.type", one_of(["function"]))
        if convert(choice, _NamedChoice, "tool_choice").function.name not in names:
            raise invalid("tool_choice.function.name", "names no function of `tools`")
    return choice


def _response_format(wanted: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if wanted is None:
        return None
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_schema":
        convert(wanted, _SchemaFormat, "response_format")
    elif kind != "json_object":
        raise invalid("response_format.type", one_of(["text", "json_object", "json_schema"]))
    return wanted
