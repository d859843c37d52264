"""Typed reading of JSON bodies: whatever is wrong is an error that names its field."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..exceptions import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["convert", "decode", "invalid", "one_of"]

T = TypeVar("T")

# msgspec puts the place into its message's text and offers it nowhere else.
_PLACE = re.compile(r"(?P<reason>.*?)(?: - at `\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`")


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """
    *body* as what *decoder* reads.

    The message never quotes the body: it may end up in a log.

    Raises:
        InvalidRequestError: Not JSON (RFC 8259), or a field of the wrong type.
    """
    try:
        # The decoder skips over unknown fields unread; this looks at every byte.
        return decoder.decode(body.decode())
    except msgspec.ValidationError as exc:
        raise _located(exc) from exc
    except msgspec.DecodeError as exc:
        raise InvalidRequestError(f"body is not valid JSON: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidRequestError(f"body is not valid JSON: byte {exc.start} is not UTF-8") from exc
    except RecursionError as exc:
        raise InvalidRequestError("body is not valid JSON: nested too deeply") from exc


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
