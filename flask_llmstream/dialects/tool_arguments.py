"""A tool call's arguments as an object, for protocols that have no other form for them."""

from __future__ import annotations

import msgspec

from ..exceptions import EngineError

__all__ = ["CUT_REASONS", "read_arguments"]

CUT_REASONS = frozenset({"length", "content_filter"})
"""Finish reasons for an end in the middle of what the model meant to say."""


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
