"""JSON for the wire: one line, whatever a reader takes for a line's end."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from ..framing.ndjson import escape_line_separators

__all__ = ["decode", "encode"]

_encode = msgspec.json.Encoder().encode


def encode(value: Any) -> bytes:
    """
    *value* as compact JSON that fits every framing.

    U+0085, U+2028 and U+2029 are escaped for SSE too. WHATWG HTML 9.2.5 ends lines at CR
    and LF only, but readers built on `str.splitlines` (httpx's `iter_lines`, so LiteLLM
    and httpx-sse before 0.4.2) cut an event at any of them.

    Strings must be exact `str`: a `Token` is not one.
    """
    try:
        payload = _encode(value)
    except UnicodeEncodeError:
        # Half a surrogate pair has no UTF-8, but it has an escape. Engines keep it out of
        # texts, not out of alternative tokens and messages of errors.
        return json.dumps(value, separators=(",", ":")).encode()
    return escape_line_separators(payload)


def decode(payload: str | bytes) -> Any:
    """
    The value of *payload*: what `encode` wrote, here or elsewhere.

    Python's own decoder, where msgspec refuses, also takes half a surrogate pair, and NaN,
    which some servers write.

    Raises:
        ValueError: It is no JSON.
        RecursionError: It is nested too deeply.
    """
    try:
        return msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return json.loads(payload)
