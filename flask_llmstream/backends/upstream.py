"""A model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import logging
import re
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..client import StreamReader
from ..core import runtime
from ..core.messages import Finish
from ..exceptions import (
    AccessError,
    ConfigurationError,
    InvalidRequestError,
    LLMStreamError,
    QueueFullError,
    RequestError,
    RequestTooLargeError,
    UnknownModelError,
    UpstreamError,
)
from ..typing import FEATURES
from .upstream_chat import chat_request, model_ids, read_chunk, read_completion, read_error
from .upstream_http import UpstreamHTTP, read_retry_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ..core.messages import InferenceRequest, Item
    from .upstream_http import Exchange

__all__ = ["UpstreamBackend"]

_logger = logging.getLogger("flask_llmstream.upstream")

_ERROR_BYTES = 64 * 1024
_ERROR_MESSAGE_LETTERS = 2000
_DOCUMENT_BYTES = 16 * 1024 * 1024
_DISCOVERY_SECONDS = 60.0
_DISCOVERY_RETRY_SECONDS = 5.0
_DISCOVERY_TIMEOUT_SECONDS = 10.0


class UpstreamBackend:
    """
    Streams from vLLM, SGLang, llama.cpp, Ollama, a provider: whatever speaks OpenAI's chat
    completions.

    Text, reasoning, tool calls, log probabilities, usage and finish reasons pass through,
    and the request's `extra_body` goes with it. When the request is over for whatever
    cause, the connection is closed, which is how those servers stop. Several upstreams
    under one model id are balanced, and failed over before the first token.

    Args:
        base_url: Up to and with ``/v1``.
        api_key: Sent as ``Authorization: Bearer``. It reaches no caller and no log.
        model: What the upstream calls the model; None sends the request's own id.
        headers: Sent with every request.
        max_concurrency: Requests that it is given at a time for one model id; None is as
            many as the engine works on. The rest waits in the engine's queue, in priority
            order.
        max_tokens_field: ``"max_completion_tokens"`` where the upstream wants that.
        connect_timeout_seconds: To reach it; the answer's own limit is the request's
            deadline.
        discover: Also serve the models that ``GET /models`` lists there, under their own
            ids; asked in the background and kept for a minute.

    Attributes:
        fails_over: Served through a `BalancedBackend` also where it is the only one, which
            waits for what a ``Retry-After`` says.

    Raises:
        ConfigurationError: *base_url* is no HTTP URL, *max_concurrency* is less than 1, or
            the HTTP client is missing.

    Thread safety: every method, from greenlets of a patched process or from threads.
    """

    worker = "greenlet"
    supports = FEATURES | {"extra_body"}
    fails_over = True

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_concurrency: int | None = None,
        max_tokens_field: str = "max_tokens",
        connect_timeout_seconds: float = 5.0,
        discover: bool = False,
    ) -> None:
        if max_concurrency is not None and max_concurrency < 1:
            raise ConfigurationError(f"max_concurrency must be at least 1, not {max_concurrency}.")
        headers = dict(headers or {})
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = UpstreamHTTP(base_url, headers, connect_timeout_seconds)
        self._secrets = _pattern_of(self._http.url, api_key, headers)
        self.model = model
        self.max_concurrency = max_concurrency
        self.discovers = discover
        self._max_tokens_field = max_tokens_field
        self._after_fork()
        runtime.after_fork(self)

    def __repr__(self) -> str:
        return f"<UpstreamBackend {self.model or ''}>"

    def _after_fork(self) -> None:
        self._discovered: tuple[str, ...] = ()
        self._discover_at = 0.0

    # Generating.

    def generate(self, request: InferenceRequest) -> Iterator[Item]:
        """
        Yield the upstream's items, as they come.

        Raises:
            RequestError: The upstream refuses the request; with its message and code.
            QueueFullError: The upstream is busy; with its ``Retry-After``.
            UpstreamError: It cannot be reached, fails, or breaks off (with the code
                ``stream_incomplete``).
        """
        exchange = self._http.exchange()
        request.on_cancel(exchange.give_up)
        try:
            self._send(request, exchange)
            if exchange.status != 200:
                raise self._refusal(exchange)
            if exchange.content_type == "application/json":
                # Asked to stream, it answered whole all the same.
                yield from read_completion(exchange.read(_DOCUMENT_BYTES))
            elif exchange.content_type in ("text/event-stream", ""):
                yield from _read_events(exchange)
            else:
                raise UpstreamError("The upstream answered with something else than events.")
        except LLMStreamError as exc:
            error = self._as_ours(exc)
            if isinstance(error, UpstreamError):
                self._warn(error, exchange, request)
            raise error from None
        finally:
            exchange.close()

    def _send(self, request: InferenceRequest, exchange: Exchange) -> None:
        headers = {"Content-Type": "application/json"}
        if request.request_id.isascii() and request.request_id.isprintable():
            headers["X-Request-ID"] = request.request_id
        left = None
        if request.deadline is not None:
            left = max(request.deadline.remaining_seconds(), 0.001)
            headers["X-Request-Timeout"] = f"{left:.3f}"
        exchange.send(
            "POST",
            "/chat/completions",
            headers=headers,
            content=chat_request(
                request,
                self._model_for(request),
                max_tokens_field=self._max_tokens_field,
            ),
            timeout_seconds=left,
        )

    def _model_for(self, request: InferenceRequest) -> str:
        if self.model is None or request.model in self._discovered:
            return request.model
        return self.model

    # Its errors, as ours.

    def _refusal(self, exchange: Exchange) -> LLMStreamError:
        """The error that a status other than 200 means to our caller."""
        status = exchange.status
        retry_after = read_retry_after(exchange.headers)
        failed = UpstreamError(f"The upstream answered {status}.", retry_after=retry_after)
        if status not in _ABOUT_THE_REQUEST:
            # What it says is for us, and may quote our key.
            return failed
        try:
            message, code, param = read_error(exchange.read(_ERROR_BYTES))
        except UpstreamError:
            message, code, param = "", "", None
        message = message or failed.message
        error: LLMStreamError
        if status == 429:
            error = QueueFullError(message, retry_after=retry_after)
        elif status == 413:
            error = RequestTooLargeError(message)
        elif status != 404:
            error = InvalidRequestError(message, param=param)
        elif code == "model_not_found" or "model" in message.lower():
            return UnknownModelError(message, param="model")
        else:
            return failed  # There is no such API at the base URL.
        error.code = code or error.code
        return error

    def _as_ours(self, exc: LLMStreamError) -> LLMStreamError:
        """
        What our caller is told: nothing of the upstream's address or key, and of its
        errors as its own only those that the request caused.
        """
        if isinstance(exc, AccessError):  # Of ours, not of our caller's.
            return UpstreamError("The upstream does not accept this server's credentials.")
        message = self._secrets.sub("[upstream]", exc.message)[:_ERROR_MESSAGE_LETTERS]
        kind = type(exc) if isinstance(exc, (RequestError, QueueFullError)) else UpstreamError
        error = kind(message, retry_after=exc.retry_after, param=exc.param)
        error.code = exc.code
        error.retryable = exc.retryable
        return error

    def _warn(self, error: UpstreamError, exchange: Exchange, request: InferenceRequest) -> None:
        if request.cancelled:
            return
        runtime.log(
            _logger,
            logging.WARNING,
            "An upstream failed: %s (status %s, request %s, model %s).",
            error.code,
            exchange.status or "none",
            request.request_id,
            request.model,
        )

    # Discovering.

    @property
    def discovered(self) -> tuple[str, ...]:
        """The models that the upstream listed last. Never waits; asks anew when it is old."""
        if self.discovers and monotonic() >= self._discover_at:
            self._discover_at = monotonic() + _DISCOVERY_SECONDS
            runtime.spawn(self._discover)
        return self._discovered

    def _discover(self) -> None:
        exchange = self._http.exchange()
        try:
            exchange.send("GET", "/models", timeout_seconds=_DISCOVERY_TIMEOUT_SECONDS)
            if exchange.status != 200:
                raise UpstreamError(f"The upstream answered {exchange.status}.")
            self._discovered = model_ids(exchange.read(_DOCUMENT_BYTES))
        except LLMStreamError:
            # What it listed before stays: that it cannot list now does not unserve it.
            self._discover_at = monotonic() + _DISCOVERY_RETRY_SECONDS
            runtime.log(
                _logger,
                logging.WARNING,
                "An upstream did not list its models (status %s).",
                exchange.status or "none",
            )
        finally:
            exchange.close()


_ABOUT_THE_REQUEST = frozenset({400, 404, 413, 415, 422, 429})
"""Statuses of which the caller is told why."""


def _read_events(exchange: Exchange) -> Iterator[Item]:
    finishes = []
    for event in StreamReader(exchange):
        for item in read_chunk(event.data):
            if isinstance(item, Finish):
                # Held until the terminal marker: a stream that breaks off has no finish.
                finishes.append(item)
            else:
                yield item
    exchange.finish()
    yield from finishes


def _pattern_of(url: Any, api_key: str | None, headers: Mapping[str, str]) -> re.Pattern[str]:
    """Finds what of the upstream's address and credentials a text may hold."""
    places = (str(url), str(url).rstrip("/"), url.netloc.decode(), url.host)
    credentials = (api_key, url.password, *headers.values())
    return re.compile(rf"(?<!\w)(?:(?i:{_any_of(places)})|{_any_of(credentials)})(?!\w)")


def _any_of(texts: Iterable[str | None]) -> str:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"\Z\A"
