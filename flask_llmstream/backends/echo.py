"""A backend without a model: it says what it was told."""

from __future__ import annotations

import re
from time import monotonic
from typing import TYPE_CHECKING

from ..core import runtime
from ..core.messages import Usage
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..core.messages import InferenceRequest, Item

__all__ = ["EchoBackend"]

# A word with the white space behind it, so that the pieces add up to the text.
_WORD = re.compile(r"\S+\s*|\s+")


class EchoBackend:
    """
    Streams the last user message back, word by word. For demos, tests and load tests.

    Args:
        tokens_per_second: The pace, as a model would have one; None as fast as it goes.

    Thread safety: serves any number of requests at once, on threads or greenlets.
    """

    supports: frozenset[str] = frozenset()

    def __init__(self, *, tokens_per_second: float | None = None) -> None:
        if tokens_per_second is not None and not tokens_per_second > 0:
            raise ConfigurationError(
                f"tokens_per_second must be above 0 or None, not {tokens_per_second!r}."
            )
        self._seconds_per_token = 0.0 if tokens_per_second is None else 1 / tokens_per_second

    def generate(self, request: InferenceRequest) -> Iterator[Item]:
        """The words of `request.last_user_text`, then their count; a word is a token."""
        words = _WORD.findall(request.last_user_text)
        next_at = monotonic()
        for word in words:
            if self._seconds_per_token:
                # By the schedule, not by a pause a token: the consumer's time costs no pace.
                next_at = max(monotonic(), next_at + self._seconds_per_token)
                runtime.sleep(next_at - monotonic())
            yield word
        texts = [message.text for message in request.messages] or [request.prompt]
        yield Usage(
            prompt_tokens=sum(len(text.split()) for text in texts),
            completion_tokens=len(words),
        )
