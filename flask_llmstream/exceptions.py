"""
Every error that this package raises, and what each one looks like on the wire.

=================================== ======== ===================== ==============
class (indent = subclass)           status   code                  a retry helps
=================================== ======== ===================== ==============
LLMStreamError                      500      internal_error        no
  ConfigurationError                500      configuration_error   no
  RequestError                      400      invalid_request       no
    InvalidRequestError             400      invalid_request       no
    NotAcceptableError              406      not_acceptable        no
    RequestTooLargeError            413      request_too_large     no
    UnknownModelError               404      model_not_found       no
    UnknownStreamError              404      stream_not_found      no
  AccessError                       403      permission_denied     no
    AuthenticationError             401      invalid_api_key       no
    PermissionDeniedError           403      permission_denied     no
  AdmissionError                    503      engine_closed         yes
    QueueFullError                  429      queue_full            yes
    TooManyRequestsError            429      too_many_requests     yes
    RequestDroppedError             503      request_dropped       yes
    EngineClosedError               503      engine_closed         yes
      ServerShutdownError           503      server_shutdown       yes
  DeadlineExceededError             504      deadline_exceeded     no
    FirstTokenTimeoutError          504      first_token_timeout   no
    IdleTimeoutError                504      idle_timeout          no
  RequestCancelledError             499      cancelled             no
  EngineError                       500      engine_error          yes
    UpstreamError                   502      upstream_error        yes
  StreamError                       none     stream_error          yes
    SlowReaderError                 none     slow_reader           yes
    IncompleteStreamError           none     stream_incomplete     yes
=================================== ======== ===================== ==============

`DeadlineExceededError` is also the built-in `TimeoutError`. A stream error has no
status of its own: it can only happen once a response is under way.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

__all__ = [
    "AccessError",
    "AdmissionError",
    "AuthenticationError",
    "ConfigurationError",
    "DeadlineExceededError",
    "EngineClosedError",
    "EngineError",
    "FirstTokenTimeoutError",
    "IdleTimeoutError",
    "IncompleteStreamError",
    "InvalidRequestError",
    "LLMStreamError",
    "NotAcceptableError",
    "PermissionDeniedError",
    "QueueFullError",
    "RequestCancelledError",
    "RequestDroppedError",
    "RequestError",
    "RequestTooLargeError",
    "ServerShutdownError",
    "SlowReaderError",
    "StreamError",
    "TooManyRequestsError",
    "UnknownModelError",
    "UnknownStreamError",
    "UpstreamError",
]

CancelCause: TypeAlias = Literal[
    "app", "by_id", "callback", "client_left", "other_part", "response_dropped"
]


class LLMStreamError(Exception):
    """
    Root of the tree. The message is for the caller: it may reach the client as it is.

    Args:
        message: One sentence that names the field or the setting, and the remedy.
        retry_after: Seconds after which a retry may succeed; sent as ``Retry-After``.
        param: The request field at fault, as its path in the body (``messages[0].role``).

    Attributes:
        status: HTTP status before the first byte; None where there can be none.
        code: Stable, machine-readable; the ``code`` of the wire's error object.
        retryable: Whether the same request may succeed later.
    """

    status: ClassVar[int | None] = 500
    code: str = "internal_error"
    retryable: bool = False

    def __init__(
        self,
        message: str = "",
        *,
        retry_after: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message or type(self).__name__)
        self.retry_after = retry_after
        self.param = param

    @property
    def message(self) -> str:
        """What the client is told."""
        return str(self.args[0])


class ConfigurationError(LLMStreamError):
    """
    The app is set up wrongly. ``str()`` names the setting and what is allowed, or the file
    that is missing; `message`, which clients see, names nothing of the server's.
    """

    code = "configuration_error"

    @property
    def message(self) -> str:
        return "The server is not set up for this request. Its log says what is wrong."


class RequestError(LLMStreamError):
    """The caller's fault, found before anything was queued."""

    status = 400
    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A malformed request, or one that asks for what the model's backend cannot do."""


class NotAcceptableError(RequestError):
    """`Accept` names nothing that this route can produce (RFC 9110 12.5.1)."""

    status = 406
    code = "not_acceptable"


class RequestTooLargeError(RequestError):
    """The body is larger than `MAX_REQUEST_BYTES`."""

    status = 413
    code = "request_too_large"


class UnknownModelError(RequestError):
    """No engine serves the model, or the blueprint does not offer it."""

    status = 404
    code = "model_not_found"


class UnknownStreamError(RequestError):
    """No stream or stored answer of this id is the caller's, or it is gone by now."""

    status = 404
    code = "stream_not_found"


class AccessError(LLMStreamError):
    """The caller may not."""

    status = 403
    code = "permission_denied"


class AuthenticationError(AccessError):
    """Missing or wrong API key; answered with ``WWW-Authenticate: Bearer``."""

    status = 401
    code = "invalid_api_key"


class PermissionDeniedError(AccessError):
    """The `permission_check` said no."""


class AdmissionError(LLMStreamError):
    """The engine did not take the request, or gave it back before it started."""

    status = 503
    code = "engine_closed"
    retryable = True


class QueueFullError(AdmissionError):
    """The queue is full; `retry_after` comes from the measured service rate."""

    status = 429
    code = "queue_full"


class TooManyRequestsError(AdmissionError):
    """
    The caller has as many requests under way, or waiting, as one may have; `retry_after`
    comes from how long requests take.
    """

    status = 429
    code = "too_many_requests"


class RequestDroppedError(AdmissionError):
    """Waiting in the queue, the request made room for a newer one (DROP_OLDEST)."""

    code = "request_dropped"


class EngineClosedError(AdmissionError):
    """The engine is shut down, or every worker of it is stuck."""


class ServerShutdownError(EngineClosedError):
    """The server process is going away."""

    code = "server_shutdown"


class DeadlineExceededError(LLMStreamError, TimeoutError):
    """The request's total budget ran out."""

    status = 504
    code = "deadline_exceeded"


class FirstTokenTimeoutError(DeadlineExceededError):
    """No token came within the first-token budget."""

    code = "first_token_timeout"


class IdleTimeoutError(DeadlineExceededError):
    """The gap after a token grew longer than the idle budget."""

    code = "idle_timeout"


class RequestCancelledError(LLMStreamError):
    """
    The caller cancelled, or the client went away.

    Args:
        cause: Who ended it, as statistics and the log name it: ``client_left``, ``by_id``,
            ``callback`` (it said False), ``response_dropped`` (the app did not send it),
            ``other_part`` (of one request that is several) or ``app``.
    """

    status = 499
    code = "cancelled"

    def __init__(
        self,
        message: str = "",
        *,
        cause: CancelCause = "app",
        retry_after: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message, retry_after=retry_after, param=param)
        self.cause: CancelCause = cause


class EngineError(LLMStreamError):
    """The backend failed. What it raised is in the server's log, never in the answer."""

    code = "engine_error"
    retryable = True


class UpstreamError(EngineError):
    """A model server behind this one failed."""

    status = 502
    code = "upstream_error"


class StreamError(LLMStreamError):
    """A stream under way broke."""

    status = None
    code = "stream_error"
    retryable = True


class SlowReaderError(StreamError):
    """The client did not read for `SLOW_READER_SECONDS`, or `CHANNEL_BYTES` piled up."""

    code = "slow_reader"


class IncompleteStreamError(StreamError):
    """A stream ended without its terminal marker: the text is not whole."""

    code = "stream_incomplete"
