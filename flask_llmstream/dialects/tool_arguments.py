"""A tool call's arguments as an object, for protocols that have no other form for them."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["CUT_REASONS", "read_arguments"]

CUT_REASONS = frozenset({"length", "content_filter"})
"""Finish reasons for an end in the middle of what the model meant to say."""


def read_arguments(text: str) -> dict[str, Any] | None:
    """The JSON object that *text* is; None where it is none, or not all of one."""
    if not text.strip():
        return {}  # What some models write for a function without parameters.
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
