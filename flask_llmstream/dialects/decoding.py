"""Typed reading of JSON bodies: whatever is wrong is an error that names its field."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..exceptions import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["MAX_DEPTH", "convert", "decode", "decode_at", "invalid", "one_of"]

# Deeper than what people write; far less than what walks a schema or writes it out again can
# take, be it Python's recursion or the stack of a library in C++.
MAX_DEPTH = 128

_BRACKETS = b"[{]}"
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\x01\xff\xff")  # As signed bytes: 1 and -1.
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))

T = TypeVar("T")

# msgspec puts the place into its message's text and offers it nowhere else.
_PLACE = re.compile(r"(?P<reason>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """
    *body* as what *decoder* reads.

    The message never quotes the body: it may end up in a log.

    Raises:
        InvalidRequestError: Not JSON (RFC 8259), nested more than `MAX_DEPTH` levels deep,
            or a field of the wrong type.
    """
    try:
        # The decoder skips over unknown fields unread; this looks at every byte.
        value = decoder.decode(body.decode())
    except msgspec.ValidationError as exc:
        raise _located(exc) from exc
    except msgspec.DecodeError as exc:
        raise InvalidRequestError(f"body is not valid JSON: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequestError(f"body is not valid JSON: byte {exc.start} is not UTF-8") from exc
    except RecursionError as exc:
        raise InvalidRequestError("body is not valid JSON: nested too deeply") from exc
    # Most bodies have not even that many brackets.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise InvalidRequestError(f"body is nested more than {MAX_DEPTH} levels deep")
    return value


def decode_at(param: str, part: msgspec.Raw) -> Any:
    """
    The *part* of a body that stands at *param*, which `decode` passed over.

    Raises:
        InvalidRequestError: A number is out of range.
    """
    try:
        return msgspec.json.decode(part)
    except msgspec.ValidationError as exc:
        raise _located(exc, param) from exc


def _depth(body: bytes) -> int:
    """How deep *body*, which is valid JSON, is nested."""
    # All in C, since it may be a mebibyte on the thread that serves everyone. Without escaped
    # quotes, every other piece between quotes is outside of strings.
    pieces = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2]
    steps = b"".join(pieces).translate(_STEPS, _ALL_BUT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def convert(value: Any, wanted: type[T], param: str) -> T:
    """
    Decoded JSON as *wanted*: *value* stands at *param*, and its neighbours say its type.

    Raises:
        InvalidRequestError: A field of the wrong type.
    """
    try:
        return msgspec.convert(value, wanted)
    except msgspec.ValidationError as exc:
        raise _located(exc, param) from exc


def invalid(param: str, reason: str) -> InvalidRequestError:
    """The error that blames *param*, ready to be raised."""
    return InvalidRequestError(f"{param}: {reason}", param=param)


def one_of(names: Collection[str]) -> str:
    """The reason that lists what is allowed; what was sent may be of any length."""
    return "must be one of " + ", ".join(f"`{name}`" for name in names)


def _located(exc: msgspec.ValidationError, root: str = "") -> InvalidRequestError:
    match = _PLACE.fullmatch(str(exc))
    assert match is not None  # noqa: S101 - the pattern matches every text
    reason, path = match["reason"], root + (match["path"] or "")
    if missing := _MISSING.fullmatch(reason):
        path, reason = f"{path}.{missing['field']}", "is required"
    param = path.removeprefix(".")
    reason = reason[:1].lower() + reason[1:]
    return invalid(param, reason) if param else InvalidRequestError(f"body: {reason}")
