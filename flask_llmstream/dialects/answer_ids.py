"""The ids that answers have on the wire: a prefix that clients know, and the request's own."""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..core.messages import InferenceRequest

__all__ = ["CHAT", "COMPLETION", "MESSAGE", "RESPONSE", "answer_id", "request_ids_of"]

CHAT = "chatcmpl-"
COMPLETION = "cmpl-"
MESSAGE = "msg_"
RESPONSE = "resp_"

_PREFIXES = (CHAT, COMPLETION, MESSAGE, RESPONSE)


def answer_id(request: InferenceRequest, prefix: str = "") -> str:
    """
    The id of the answer to *request*, which has to stay the same all through it.

    Unguessable, unless the client chose its `X-Request-ID` itself.
    """
    return f"{prefix}{request.request_id or token_hex(16)}"


def request_ids_of(id: str) -> Iterator[str]:
    """The ids of requests that *id*, an answer's or a request's, may mean."""
    yield id
    for prefix in _PREFIXES:
        if id.startswith(prefix):
            yield id.removeprefix(prefix)
