"""JSON objects of Anthropic's routes: usage, tool calls, errors, models, counts."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ..core.messages import Usage
from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.messages import Choice
    from ..exceptions import LLMStreamError

__all__ = [
    "anthropic_model",
    "anthropic_model_list",
    "error_object",
    "stop_reason",
    "token_count",
    "usage_object",
]

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}


def stop_reason(choice: Choice) -> str:
    """Why the answer ended. A call is one whatever its backend calls the end."""
    reason = _STOP_REASONS.get(choice.finish_reason)
    if reason is not None:
        return reason
    if choice.stop_sequence is not None:
        return "stop_sequence"
    if choice.refusal:
        return "refusal"
    return "tool_use" if choice.tool_calls else "end_turn"


def usage_object(usage: Usage | None) -> dict[str, Any]:
    """
    The `usage` object; zeros where nothing was counted, since SDKs need numbers.

    Other than elsewhere, `input_tokens` are those that were *not* cached.
    """
    usage = usage or Usage(0, 0)
    counts: dict[str, Any] = {
        "input_tokens": max(0, usage.prompt_tokens - usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens:
        counts["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return counts


def error_object(error: LLMStreamError, request_id: str) -> dict[str, Any]:
    """
    ``{"type": "error", "error": {…}}``, for a 4xx or 5xx and in a stream alike.

    The SDKs take `type`, `message` and `details.error_code`; `code` and `retryable` are
    for readers of a stream, which have no status to go by.
    """
    status = error.status or 500
    fallback = "api_error" if status >= 500 else "invalid_request_error"
    return {
        "type": "error",
        "error": {
            "type": _ERROR_TYPES.get(status, fallback),
            "message": error.message,
            "details": {"error_code": error.code},
            "code": error.code,
            "retryable": error.retryable,
        },
        "request_id": request_id,
    }


def token_count(input_tokens: int) -> bytes:
    """``POST /messages/count_tokens``."""
    return encode({"input_tokens": input_tokens})


def anthropic_model(model_id: str, created: int) -> bytes:
    """``GET /models/<id>`` as Anthropic has it; *created* is Unix time in seconds."""
    return encode(_model(model_id, created))


def anthropic_model_list(model_ids: Sequence[str], created: int) -> bytes:
    """``GET /models`` as Anthropic has it, on one page and in the order given."""
    return encode(
        {
            "data": [_model(name, created) for name in model_ids],
            "has_more": False,
            "first_id": next(iter(model_ids), None),
            "last_id": next(reversed(model_ids), None),
        }
    )


def _model(model_id: str, created: int) -> dict[str, Any]:
    return {
        "type": "model",
        "id": model_id,
        "display_name": model_id,
        "created_at": datetime.fromtimestamp(created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
    }
