"""JSON objects that OpenAI's routes share: usage, log probabilities, errors, models."""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..core.messages import Usage
from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..core.messages import Token, ToolCall
    from ..exceptions import LLMStreamError

__all__ = [
    "FINGERPRINT",
    "call_id",
    "error_object",
    "finite_logprob",
    "logprob_list",
    "logprobs_object",
    "model_list",
    "model_object",
    "tier_served",
    "tool_call_object",
    "usage_object",
]

# Changes whenever the same seed may give another text; the server's share of that.
FINGERPRINT = f"fp_flask_llmstream_{__version__}"

# The names that OpenAI and the servers that speak its protocol use. SDKs choose their
# exception by the status; the type is for people and for gateways that rewrite statuses.
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

# What OpenAI sends for "too unlikely to say": JSON has neither infinity nor NaN.
_LOWEST_LOGPROB = -9999.0

_OWNER = "flask_llmstream"

# OpenAI names the tier that served; these two are only asked for.
_TIERS_SERVED = {"auto": "default", "fast": "priority"}


def error_object(error: LLMStreamError) -> dict[str, Any]:
    """
    ``{"error": {…}}``, for a 4xx or 5xx and in a stream alike.

    The SDKs take `message`, `type`, `param` and `code`; `retryable` is for readers of a
    stream, which have no status to go by.
    """
    status = error.status or 500
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _ERROR_TYPES.get(status, fallback),
            "param": error.param,
            "code": error.code,
            "retryable": error.retryable,
        }
    }


def usage_object(usage: Usage | None) -> dict[str, Any]:
    """The `usage` object; zeros where nothing was counted, since SDKs need numbers."""
    usage = usage or Usage(0, 0)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprob_list(tokens: Sequence[Token], top_logprobs: int) -> list[dict[str, Any]]:
    """
    An element for each token that carries a log probability.

    It has the *top_logprobs* alternatives asked for, though the backend may offer more.
    """
    return [
        {
            **_position(str(token), token.logprob),
            "top_logprobs": [_position(*pair) for pair in token.top_logprobs[:top_logprobs]],
        }
        for token in tokens
        if token.logprob is not None
    ]


def logprobs_object(tokens: Sequence[Token], top_logprobs: int) -> dict[str, Any] | None:
    """The `logprobs` of a chunk or a whole choice; None where no token carries any."""
    content = logprob_list(tokens, top_logprobs)
    return {"content": content, "refusal": None} if content else None


def finite_logprob(logprob: float) -> float:
    """*logprob* as JSON can have it."""
    # In this order max() takes the bound for NaN too.
    return max(_LOWEST_LOGPROB, logprob)


def _position(token: str, logprob: float) -> dict[str, Any]:
    return {
        "token": token,
        "logprob": finite_logprob(logprob),
        "bytes": list(token.encode("utf-8", "surrogatepass")),
    }


def tool_call_object(call: ToolCall) -> dict[str, Any]:
    """A whole tool call of a message."""
    return {
        "id": call.id or call_id(),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def tier_served(tier: str) -> str:
    """What an answer calls the `service_tier` that its request asked for."""
    return _TIERS_SERVED.get(tier, tier)


def call_id() -> str:
    """An id for a tool call whose backend gave none; clients answer by it."""
    return f"call_{token_hex(12)}"


def model_object(model_id: str, created: int) -> bytes:
    """``GET /models/<id>``; *created* is Unix time in seconds."""
    return encode(_model(model_id, created))


def model_list(model_ids: Iterable[str], created: int) -> bytes:
    """``GET /models``, in the order given."""
    return encode({"object": "list", "data": [_model(name, created) for name in model_ids]})


def _model(model_id: str, created: int) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": created, "owned_by": _OWNER}
