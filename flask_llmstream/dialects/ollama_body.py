"""What Ollama's clients ask: ``POST /api/chat`` and ``/api/generate``, as requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from ..core.messages import Message
from .decoding import convert, decode, invalid, one_of
from .extra_body import meaningful
from .generation import GenerationBody, read_generation
from .ollama_messages import OllamaMessageBody, content_of, read_ollama_messages
from .parsed import Parsed

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ChatBody", "GenerateBody", "ParsedOllama", "read_chat", "read_generate"]

_NonEmpty = Annotated[str, Meta(min_length=1)]

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "max": "high"}

# Which an engine that keeps every token is told by a number above all vocabularies'.
_ALL_TOKENS = 2**30


class _Options(msgspec.Struct, kw_only=True):
    num_predict: int | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: int | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _NonEmpty | Annotated[list[_NonEmpty], Meta(max_length=16)] | None = None


# About how a model is loaded, which happened long before. Many clients always send
# `num_ctx`, and an upstream may refuse a field that it does not know.
_LOAD_OPTIONS = frozenset(
    {
        "draft_num_predict",
        "embedding_only",
        "f16_kv",
        "logits_all",
        "low_vram",
        "main_gpu",
        "num_batch",
        "num_ctx",
        "num_gpu",
        "num_keep",
        "num_thread",
        "numa",
        "use_mlock",
        "use_mmap",
        "vocab_only",
    }
)


class _Body(msgspec.Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class ChatBody(_Body, kw_only=True):
    """A body of ``/api/chat``."""

    messages: list[OllamaMessageBody] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(_Body, kw_only=True):
    """A body of ``/api/generate``."""

    prompt: str | None = None
    system: str | None = None
    images: list[str] | None = None
    suffix: str | None = None
    template: str | None = None
    raw: bool | None = None


_chat_decoder = msgspec.json.Decoder(ChatBody)
_generate_decoder = msgspec.json.Decoder(GenerateBody)

_REFUSED = {
    "suffix": "is not supported; text cannot be filled in here",
    "template": "is not supported; a model always has its own",
    "raw": "is not supported; a model's template is always used",
}


@dataclass(frozen=True, slots=True)
class ParsedOllama(Parsed):
    """
    A body of Ollama's.

    Args:
        is_load: There is nothing to answer: it asks whether the model can be had.
        shows_thinking: Whether the client wants to see what the model thinks.
    """

    is_load: bool = False
    shows_thinking: bool = True


def read_chat(body: bytes) -> ParsedOllama:
    """
    A body of ``/api/chat``.

    Raises:
        InvalidRequestError: Names the field in `param` and in its message.
    """
    chat = decode(_chat_decoder, body)
    # Ollama's tools need not say what they are; there is one kind.
    tools = [{"type": "function", **tool} for tool in chat.tools or ()]
    messages = read_ollama_messages(chat.messages or ())
    return _read(chat, messages=messages, tools=tools, is_load=not messages)


def read_generate(body: bytes) -> ParsedOllama:
    """
    A body of ``/api/generate``.

    Raises:
        InvalidRequestError: Names the field in `param` and in its message.
    """
    generate = decode(_generate_decoder, body)
    for field, reason in _REFUSED.items():
        if getattr(generate, field):
            raise invalid(field, reason)
    prompt = generate.prompt or ""
    if not (generate.system or generate.images):
        return _read(generate, prompt=prompt, is_load=not prompt)
    asked = Message("user", content_of(prompt, generate.images or (), "images"))
    system = (Message("system", generate.system),) if generate.system else ()
    return _read(generate, messages=(*system, asked), is_load=not prompt)


def _read(
    body: _Body,
    *,
    prompt: str = "",
    messages: Sequence[Message] = (),
    tools: list[dict[str, Any]] | None = None,
    is_load: bool,
) -> ParsedOllama:
    named = body.options or {}
    options = convert(named, _Options, "options")
    request = read_generation(
        GenerationBody(
            model=body.model,
            # -1 and -2 are "until it ends" and "until the context is full".
            max_tokens=_if_positive(options.num_predict),
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=None if options.top_k is None else _if_positive(options.top_k) or _ALL_TOKENS,
            seed=None if options.seed == -1 else options.seed,  # -1 is a random one
            stop=options.stop,
            logprobs=body.logprobs,
            top_logprobs=body.top_logprobs if body.logprobs else None,
            tools=tools,
            response_format=_response_format(body.format),
        ),
        prompt=prompt,
        messages=messages,
    )
    unnamed = named.keys() - _LOAD_OPTIONS - set(_Options.__struct_fields__)
    request.extra_body = meaningful({name: named[name] for name in named if name in unnamed})
    if isinstance(body.think, str):
        if body.think not in _EFFORTS:
            raise invalid("think", one_of(_EFFORTS) + ", `true` or `false`")
        request.extra_body["reasoning_effort"] = _EFFORTS[body.think]
    return ParsedOllama(
        request, body.stream, is_load=is_load, shows_thinking=body.think is not False
    )


def _if_positive(number: int | None) -> int | None:
    return number if number is not None and number > 0 else None


def _response_format(wanted: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(wanted, dict):
        # Upstreams want a name.
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}
    if wanted == "json":
        return {"type": "json_object"}
    if wanted:
        raise invalid("format", one_of(["json"]) + ", or a JSON schema")
    return None
