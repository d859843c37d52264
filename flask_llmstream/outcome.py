"""How a request ended, as an app is told."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from .core.messages import InferenceResponse

if TYPE_CHECKING:
    from .core.messages import InferenceRequest, Usage
    from .engines.handle import InferenceHandle
    from .exceptions import LLMStreamError

__all__ = ["Outcome", "outcome_of"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    How a request ended, for `on_finish` and the ``request_finished`` signal.

    Args:
        request: As it was submitted.
        text: Answer text of choice 0; on an error, what there was so far.
        finish_reason: None on an error.
        error: None where the answer is whole.
        usage: None on an error.
        response: The whole answer; None on an error.
    """

    request: InferenceRequest
    text: str
    finish_reason: str | None
    error: LLMStreamError | None
    usage: Usage | None
    response: InferenceResponse | None


def outcome_of(request: InferenceRequest, handle: InferenceHandle) -> Outcome:
    """How the request behind *handle* ended; whoever ended it may still be resolving it."""
    handle.wait(monotonic() + 1.0)
    result = handle.outcome
    if isinstance(result, InferenceResponse):
        return Outcome(request, result.text, result.finish_reason, None, result.usage, result)
    return Outcome(request, handle.text, None, result, None, None)
