"""A tool call's arguments as an object, for protocols that have no other form for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..exceptions import EngineError

if TYPE_CHECKING:
    from ..core.messages import Choice

__all__ = ["is_cut", "read_arguments"]

_CUT_REASONS = frozenset({"length", "content_filter"})


def is_cut(choice: Choice) -> bool:
    """Whether *choice* ended in the middle of what the model meant to say."""
    return choice.finish_reason in _CUT_REASONS or choice.stop_sequence is not None


def read_arguments(name: str, text: str, *, is_cut: bool) -> msgspec.Raw | None:
    """
    The JSON object that *text* is, as the model wrote it, on one line.

    Args:
        name: The function's.
        text: The call's arguments. Some models write none where there are no parameters.
        is_cut: Whether the answer ended before its time.

    Returns:
        None for what was cut.

    Raises:
        EngineError: *text* is something else. It is the model's mistake; another try may
            do better.
    """
    if not text.strip():
        return msgspec.Raw(b"{}")
    try:
        if isinstance(msgspec.json.decode(text), dict):
            return msgspec.Raw(msgspec.json.format(text.encode(), indent=-1))
    except (msgspec.DecodeError, RecursionError):
        pass
    if is_cut:
        return None
    raise EngineError(f"The model called {name!r} with arguments that are no JSON object.")
