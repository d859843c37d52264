"""What a dialect made of a body."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.messages import InferenceRequest

__all__ = ["Parsed"]


@dataclass(frozen=True, slots=True)
class Parsed:
    """
    A request, and what its body says about the answer's form.

    Args:
        request: What to generate. It may still be completed (`request_id`, `model`): a
            renderer or document reads it when it is made.
        stream: Whether to stream; None where the body is silent, or there was none.
        others: What else to generate for the same answer, all at once. Choices are
            numbered through: these come after the first request's.
    """

    request: InferenceRequest
    stream: bool | None = None
    others: tuple[InferenceRequest, ...] = field(default=(), kw_only=True)

    @property
    def requests(self) -> tuple[InferenceRequest, ...]:
        """All that one answer is made of."""
        return (self.request, *self.others)

    @property
    def answer_id(self) -> str | None:
        """The answer's id, where it is not made of the request's; see `answer_ids`."""
        return None

    @property
    def chat_id(self) -> str | None:
        """What the page calls the chat, where it may ask for its answer by that."""
        return None
