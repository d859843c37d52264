"""OpenAI's chat protocol from the caller's side: requests to JSON, chunks to items. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

from ..core.messages import Finish, Reasoning, Refusal, Token, ToolCallDelta, Usage
from ..exceptions import UpstreamError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..core.messages import InferenceRequest, Item, Message

__all__ = ["chat_request", "model_ids", "read_chunk", "read_completion", "read_error"]


def chat_request(
    request: InferenceRequest, model: str, *, max_tokens_field: str = "max_tokens"
) -> bytes:
    """The body of ``POST /chat/completions`` for *request*, streamed, with usage."""
    messages = [_message(message) for message in request.messages]
    if request.prompt:
        messages.append({"role": "user", "content": request.prompt})
    body: dict[str, Any] = {
        **request.extra_body,
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.max_tokens is not None:
        body[max_tokens_field] = request.max_tokens
    for name in ("temperature", "top_p", "top_k", "seed", "tool_choice"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop"] = list(request.stop)
    if request.tools:
        body["tools"] = list(request.tools)
    if request.response_format is not None:
        body["response_format"] = request.response_format
    if request.n > 1:
        body["n"] = request.n
    if request.logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs
    return msgspec.json.encode(body)


def _message(message: Message) -> dict[str, Any]:
    sent: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        sent["content"] = message.content or None
        sent["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        sent["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        sent["name"] = message.name
    return sent


class _TopLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float


class _Position(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_TopLogprob] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None  # Where a server forgets it: the place in the list.
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None  # Of a whole answer.
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Chunk)

_REASONS = {"function_call": "tool_calls", "eos": "stop", "max_tokens": "length"}
_KNOWN_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter"})


def read_chunk(data: str) -> Iterator[Item]:
    """
    The items of one ``chat.completion.chunk``.

    Raises:
        UpstreamError: *data* is no chunk.
    """
    return _read_choices(_decode(data))


def read_completion(document: bytes) -> Iterator[Item]:
    """
    The items of a whole ``chat.completion``.

    Raises:
        UpstreamError: *document* is none: an error, or not whole.
    """
    completion = _decode(document)
    choices = completion.choices
    if not choices or any(each.message is None or not each.finish_reason for each in choices):
        message, _, _ = read_error(document)
        raise UpstreamError(message or "The upstream sent a document that is no chat completion.")
    return _read_choices(completion)


def _decode(data: str | bytes) -> _Chunk:
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError) as exc:
        raise UpstreamError("The upstream sent what is no chat completion.") from exc


def _read_choices(chunk: _Chunk) -> Iterator[Item]:
    for choice in chunk.choices or ():
        delta = choice.delta or choice.message
        if delta is not None:
            yield from _read_delta(delta, choice)
        if choice.finish_reason:
            reason = _REASONS.get(choice.finish_reason, choice.finish_reason)
            # What a server made up ("abort", "eos_token") is a plain end to a client.
            yield Finish(reason if reason in _KNOWN_REASONS else "stop", choice=choice.index)
    if chunk.usage is not None:
        yield _usage(chunk.usage)


def _read_delta(delta: _Delta, choice: _Choice) -> Iterator[Item]:
    reasoning = delta.reasoning_content or delta.reasoning
    if reasoning:
        yield Reasoning(reasoning, choice=choice.index)
    positions = (choice.logprobs.content if choice.logprobs is not None else None) or ()
    if delta.refusal:
        yield Refusal(delta.refusal, choice=choice.index)
    text = delta.content or ""
    if positions:
        yield from _tokens(text, positions, choice.index)
    elif text:
        yield Token(text, choice=choice.index) if choice.index else text
    for place, call in enumerate(delta.tool_calls or ()):
        function = call.function or _Function()
        yield ToolCallDelta(
            place if call.index is None else call.index,
            id=call.id,
            name=function.name,
            arguments=function.arguments or "",
            choice=choice.index,
        )


def _tokens(text: str, positions: Any, choice: int) -> Iterator[Token]:
    """Each position as a token of its own, where together they are the text."""
    if len(positions) > 1 and "".join(position.token for position in positions) == text:
        for position in positions:
            yield _token(position.token, position, choice)
        return
    # One position, or tokens that split a character: the text goes with the first.
    for number, position in enumerate(positions):
        yield _token(text if number == 0 else "", position, choice)


def _token(text: str, position: _Position, choice: int) -> Token:
    return Token(
        text,
        logprob=position.logprob,
        top_logprobs=[(top.token, top.logprob) for top in position.top_logprobs or ()],
        choice=choice,
    )


def _usage(usage: _Usage) -> Usage:
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        usage.prompt_tokens or 0,
        usage.completion_tokens or 0,
        cached_tokens=(prompt.cached_tokens if prompt is not None else None) or 0,
        reasoning_tokens=(completion.reasoning_tokens if completion is not None else None) or 0,
    )


def model_ids(document: bytes) -> tuple[str, ...]:
    """
    The ids in the answer of ``GET /models``.

    Raises:
        UpstreamError: It is no list of models.
    """
    try:
        listed: Mapping[str, Any] = msgspec.json.decode(document)
        return tuple(str(model["id"]) for model in listed["data"])
    except (msgspec.DecodeError, KeyError, TypeError) as exc:
        raise UpstreamError("The upstream's list of models cannot be read.") from exc


_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


def read_error(document: bytes) -> tuple[str, str, str | None]:
    """
    Message, code and param of an error body, OpenAI's or what resembles it: ``{"error":
    "message"}``, ``{"message": …}``, FastAPI's ``{"detail": …}``.

    Message and code are empty where there are none, or none that a caller could use: the
    code is a word, not a status.
    """
    try:
        body = msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeError):
        return "", "", None
    if not isinstance(body, dict):
        return "", "", None
    error = body.get("error") or body
    if not isinstance(error, dict):
        error = {"message": error}
    message = error.get("message") or error.get("detail")
    if isinstance(message, list):  # FastAPI: one object for each wrong field.
        message = "; ".join(str(each.get("msg")) for each in message if isinstance(each, dict))
    code, param = error.get("code"), error.get("param")
    return (
        message if isinstance(message, str) else "",
        code if isinstance(code, str) and _CODE.fullmatch(code) else "",
        param if isinstance(param, str) else None,
    )
