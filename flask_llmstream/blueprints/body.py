"""Reading a request's body, up to a limit, and for as long as its budgets have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import request
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from ..core import runtime
from ..exceptions import (
    DeadlineExceededError,
    FirstTokenTimeoutError,
    InvalidRequestError,
    RequestTooLargeError,
)

if TYPE_CHECKING:
    from ..call import Call
    from ..core.deadlines import Budgets

__all__ = ["check_length", "read_body"]


def check_length(max_bytes: int) -> None:
    """
    Look at what the request declares, before anything of it is read.

    Raises:
        RequestTooLargeError: Its Content-Length is more than *max_bytes*.
    """
    if (request.content_length or 0) > max_bytes:
        raise _too_large(max_bytes)


def read_body(call: Call) -> bytes:
    """
    The whole body, also a chunked one that declares no length.

    Servers wait for one that does not come for as long as its client stays, and gthread has
    a thread for it that others need. Here the wait ends with the budgets, which have begun
    on arrival, wherever the server tells which socket it is.

    Raises:
        RequestTooLargeError: It is more than `max_request_bytes`, or than Flask's own
            `MAX_CONTENT_LENGTH`.
        InvalidRequestError: It breaks off, or its chunks are malformed.
        DeadlineExceededError: It had not come in time.
    """
    budgets = call.budgets(streams=True)
    seconds = min(budgets.total_seconds, budgets.first_token_seconds)
    timer = runtime.clock.call_at(call.arrived_at + seconds, call.connection.stop_reading)
    try:
        body = _read(call.settings.max_request_bytes)
        if timer.is_pending:
            return body
    except (ClientDisconnected, OSError) as exc:
        if timer.is_pending:
            raise InvalidRequestError("The request body is incomplete.") from exc
    finally:
        timer.cancel()
    raise _too_late(budgets)


def _read(max_bytes: int) -> bytes:
    pieces = []
    room = max_bytes + 1
    try:
        while room > 0 and (piece := request.stream.read(room)):
            pieces.append(piece)
            room -= len(piece)
    except RequestEntityTooLarge as exc:
        raise _too_large(request.max_content_length or max_bytes) from exc
    if room <= 0:
        raise _too_large(max_bytes)
    return b"".join(pieces)


def _too_late(budgets: Budgets) -> DeadlineExceededError:
    if budgets.total_seconds <= budgets.first_token_seconds:
        return DeadlineExceededError("The request's deadline passed before its body was here.")
    return FirstTokenTimeoutError(
        f"The request's body was not here within {budgets.first_token_seconds:g} seconds."
    )


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")
