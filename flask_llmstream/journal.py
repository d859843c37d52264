"""One line in the log for each request that is over: how it ended, never what was said."""

from __future__ import annotations

import json
import logging
import re
from typing import TYPE_CHECKING

from .core import runtime
from .core.lifecycle import state_after
from .exceptions import RequestCancelledError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .engines.handle import InferenceHandle
    from .outcome import Outcome

__all__ = ["is_kept", "note"]

_logger = logging.getLogger("flask_llmstream")

_PLAIN = re.compile(r'[^\s"=\\\x00-\x1f\x7f-\U0010ffff]+')
"""What logfmt needs no quotes around."""


def is_kept() -> bool:
    """Whether anybody reads the lines."""
    return _logger.isEnabledFor(logging.INFO)


def note(outcome: Outcome, handle: InferenceHandle, *, route: str, seconds: float) -> None:
    """
    Log how a request ended: as logfmt, and as the dict ``llmstream`` of the record, for
    formatters that make JSON.

    Args:
        outcome: Its.
        handle: Its.
        route: The endpoint that it came by; empty outside of an HTTP request.
        seconds: From its arrival until its answer was out.
    """
    fields = {
        name: value
        for name, value in _fields_of(outcome, handle, route, seconds).items()
        if value not in (None, "")
    }
    # One key: a record that has a name already, from a factory of the app's say, takes no
    # second one.
    runtime.log(_logger, logging.INFO, "finished %s", _logfmt(fields), extra={"llmstream": fields})


def _fields_of(
    outcome: Outcome, handle: InferenceHandle, route: str, seconds: float
) -> dict[str, str | int | float | None]:
    error, response, progress = outcome.error, outcome.response, handle.progress
    timings = progress.timings if response is None else response.timings
    usage = outcome.usage
    # Nobody may have told the handle yet, where whoever ends it is held up.
    is_known = response is not None or error is not None
    return {
        "request_id": handle.request_id,
        "model": outcome.request.model,
        "route": route,
        "outcome": state_after(error).value if is_known else "unknown",
        "finish_reason": outcome.finish_reason,
        "code": None if error is None else error.code,
        "cause": error.cause if isinstance(error, RequestCancelledError) else None,
        "prompt_tokens": None if usage is None else usage.prompt_tokens,
        "completion_tokens": progress.tokens if usage is None else usage.completion_tokens,
        "queue_seconds": _rounded(timings.get("queue")),
        "first_token_seconds": _rounded(timings.get("first_token")),
        "seconds": _rounded(seconds),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _logfmt(fields: Mapping[str, object]) -> str:
    return " ".join(f"{name}={_quoted(str(value))}" for name, value in fields.items())


def _quoted(text: str) -> str:
    """*text* as one value: no name, of a model or an id, makes a line or a field of its own."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
