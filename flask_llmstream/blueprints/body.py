"""Reading a request's body, up to a limit."""

from __future__ import annotations

from flask import request
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from ..exceptions import InvalidRequestError, RequestTooLargeError

__all__ = ["check_length", "read_body"]


def check_length(max_bytes: int) -> None:
    """
    Look at what the request declares, before anything of it is read.

    Raises:
        RequestTooLargeError: Its Content-Length is more than *max_bytes*.
    """
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)


def read_body(max_bytes: int) -> bytes:
    """
    The whole body, also a chunked one that declares no length.

    Raises:
        RequestTooLargeError: It is more than *max_bytes*, or than Flask's own
            `MAX_CONTENT_LENGTH`.
        InvalidRequestError: It breaks off, or its chunks are malformed.
    """
    pieces = []
    room = max_bytes + 1
    try:
        while room > 0 and (piece := request.stream.read(room)):
            pieces.append(piece)
            room -= len(piece)
    except RequestEntityTooLarge as exc:
        raise _too_large(request.max_content_length or max_bytes) from exc
    except (ClientDisconnected, OSError) as exc:
        raise InvalidRequestError("The request body is incomplete.") from exc
    if room <= 0:
        raise _too_large(max_bytes)
    return b"".join(pieces)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")
