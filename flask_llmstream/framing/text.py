"""Plain text: the answer's text and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.messages import Token

if TYPE_CHECKING:
    from ..core.messages import InferenceResponse, Item
    from ..exceptions import LLMStreamError

__all__ = ["TextRenderer"]


class TextRenderer:
    """
    Renders answer text of choice 0 as UTF-8, for every dialect alike. Stateless.

    Reasoning, tool calls, usage and other choices have no form here and are left out.
    Nor has an error: `error` is None, and the transfer has to be aborted, so that a
    broken answer never looks like a short one.
    """

    heartbeat = b""

    def start(self) -> bytes:
        return b""

    def render(self, item: Item) -> bytes:
        """
        The text of *item*.

        Raises:
            UnicodeEncodeError: It holds a lone surrogate, which UTF-8 cannot carry.
        """
        if not isinstance(item, str) or (isinstance(item, Token) and item.choice):
            return b""
        return item.encode()

    def end(self, response: InferenceResponse) -> bytes:  # noqa: ARG002
        return b""

    def error(self, error: LLMStreamError) -> None:  # noqa: ARG002
        return None
