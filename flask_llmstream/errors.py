"""An error as an HTTP response."""

from __future__ import annotations

import logging
from math import ceil
from typing import TYPE_CHECKING

from flask import Response
from flask import request as http_request

from .exceptions import ConfigurationError
from .policy import request_id_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from .exceptions import LLMStreamError

__all__ = ["respond_to"]

_logger = logging.getLogger("flask_llmstream.response")


def respond_to(
    error_document: Callable[[LLMStreamError], bytes],
) -> Callable[[LLMStreamError], Response]:
    """An error handler for Flask whose bodies are *error_document*'s."""

    def respond(error: LLMStreamError) -> Response:
        if isinstance(error, ConfigurationError):
            _logger.error("A request failed on how the server is set up.", exc_info=error)
        # A stream error that came before the stream has no status of its own.
        status = error.status or 500
        headers = {"Cache-Control": "no-store", "X-Request-ID": request_id_for(http_request)}
        if error.retry_after is not None or (error.retryable and status in (429, 503)):
            headers["Retry-After"] = str(max(1, ceil(error.retry_after or 1)))
        if not error.retryable:
            # The SDKs would try 408, 409 and every 5xx again.
            headers["X-Should-Retry"] = "false"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(
            error_document(error),
            status=status,
            headers=headers,
            content_type="application/json",
        )

    return respond
