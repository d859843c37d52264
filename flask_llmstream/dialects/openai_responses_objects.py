"""JSON objects of OpenAI's Responses: the response, its output items, its usage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.messages import Usage
from .blocks import BlockKind
from .openai_objects import error_object

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.messages import InferenceResponse
    from ..exceptions import LLMStreamError
    from .blocks import Block
    from .openai_responses_body import ParsedResponses
    from .openai_responses_input import ResponseItem

__all__ = [
    "finished_object",
    "item_id",
    "item_object",
    "part_object",
    "response_error",
    "response_object",
    "status_of",
]


_INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


def status_of(finish_reason: str) -> str:
    """``incomplete`` where the answer was cut, else ``completed``."""
    return "incomplete" if finish_reason in _INCOMPLETE_REASONS else "completed"


def response_object(
    parsed: ParsedResponses,
    status: str,
    *,
    output: Sequence[ResponseItem] = (),
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    A `response` that is under way or has failed, with every field that
    openresponses.org's schema asks for.

    The schema has no null for `temperature` and `top_p`: where nobody said, they are
    OpenAI's defaults, whatever the backend's are.
    """
    request = parsed.request
    return {
        "id": parsed.answer_id,
        "object": "response",
        "created_at": parsed.created_at,
        "completed_at": None,
        "status": status,
        "background": parsed.background,
        "error": error,
        "incomplete_details": None,
        "model": request.model,
        "output": list(output),
        "usage": None,
        "store": parsed.store,
        "max_output_tokens": request.max_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_logprobs": request.top_logprobs,
        **parsed.fields,
    }


def finished_object(
    parsed: ParsedResponses,
    response: InferenceResponse,
    output: Sequence[ResponseItem],
    *,
    finished_at: int,
) -> dict[str, Any]:
    """A `response` that is over; *finished_at* is Unix time in whole seconds."""
    finish_reason = response.choices[0].finish_reason
    fields = response_object(parsed, status_of(finish_reason), output=output)
    reason = _INCOMPLETE_REASONS.get(finish_reason)
    if reason is None:
        fields["completed_at"] = finished_at
    else:
        fields["incomplete_details"] = {"reason": reason}
    return {**fields, "usage": _usage_object(response.usage)}


def _usage_object(usage: Usage | None) -> dict[str, Any]:
    """The `usage` of a response; zeros where nothing was counted, since SDKs need numbers."""
    usage = usage or Usage(0, 0)
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def response_error(error: LLMStreamError) -> dict[str, Any]:
    """
    The `error` of a failed response.

    Its codes are a closed list of OpenAI's, so that ours are in the `error` event alone.
    """
    told = error_object(error)["error"]
    status = error.status or 500
    if status == 429:
        code = "rate_limit_exceeded"
    else:
        code = "server_error" if status >= 500 else "invalid_prompt"
    return {**told, "code": code}


_ID_PREFIXES = {
    BlockKind.REASONING: "rs_",
    BlockKind.TEXT: "msg_",
    BlockKind.REFUSAL: "msg_",
    BlockKind.TOOL_CALL: "fc_",
}


def item_id(block: Block, token: str) -> str:
    """The id of *block*'s item in the response of that *token*."""
    return f"{_ID_PREFIXES[block.kind]}{token}_{block.index}"


def part_object(block: Block, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The one content part of a *block* that is no tool call, with *text* in it."""
    if block.kind is BlockKind.REASONING:
        return {"type": "reasoning_text", "text": text}
    if block.kind is BlockKind.REFUSAL:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def item_object(
    block: Block, token: str, status: str, parts: Sequence[dict[str, Any]] = ()
) -> ResponseItem:
    """
    *block* as an output item: each text and each refusal is a message of its own.

    Args:
        block: Of a tool call, its text are the arguments so far.
        token: Of the response.
        status: ``in_progress``, ``completed`` or ``incomplete``.
        parts: The content as far as it has come; a tool call has none.
    """
    item: ResponseItem = {"id": item_id(block, token), "status": status}
    if block.kind is BlockKind.TOOL_CALL:
        return {
            **item,
            "type": "function_call",
            "call_id": block.id,
            "name": block.name,
            "arguments": block.text,
        }
    if block.kind is BlockKind.REASONING:
        # A summary would be another text than the thoughts that there are.
        return {**item, "type": "reasoning", "summary": [], "content": list(parts)}
    return {**item, "type": "message", "role": "assistant", "content": list(parts)}
