"""Fields of a body that have no name in a request: passed on, refused or ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .decoding import decode_at, invalid
from .encoding import encode

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["check_extra_body", "meaningful", "read_extra_body"]

# What a client would notice if it were ignored → the values, besides null, under which
# there is nothing left to honour.
_NOTICED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
}

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_extra_body(body: bytes, own: Collection[str]) -> dict[str, Any]:
    """
    The fields of *body*, a JSON object, that are not in *own*, but for null and what
    changes nothing.

    Raises:
        InvalidRequestError: A number is out of range; names the field.
    """
    fields = _decoder.decode(body)
    return meaningful({name: decode_at(name, fields[name]) for name in fields if name not in own})


def meaningful(fields: Mapping[str, Any]) -> dict[str, Any]:
    """*fields* but for null and what changes nothing."""
    return {
        name: value
        for name, value in fields.items()
        if value is not None and value not in _NOTICED.get(name, ())
    }


def check_extra_body(extra_body: Mapping[str, Any]) -> None:
    """
    For a backend that is not given *extra_body*: refuse what must not be ignored.

    What is about cost, storage or speed is ignored, and so are unknown fields.

    Raises:
        InvalidRequestError: Names the field, and the value that would do.
    """
    for name, neutral in _NOTICED.items():
        if name in extra_body:
            allowed = "".join(f" or send {encode(each).decode()}" for each in neutral)
            raise invalid(name, f"is not supported by this model; leave it out{allowed}")
