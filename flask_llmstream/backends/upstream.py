"""A model behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import importlib
import logging
import time
from email.utils import parsedate_to_datetime
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..client import StreamReader
from ..core import runtime
from ..exceptions import (
    ConfigurationError,
    InvalidRequestError,
    LLMStreamError,
    QueueFullError,
    RequestTooLargeError,
    UnknownModelError,
    UpstreamError,
)
from ..typing import FEATURES
from .upstream_chat import chat_request, model_ids, read_chunk, read_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..core.messages import InferenceRequest, Item

__all__ = ["UpstreamBackend"]

_logger = logging.getLogger("flask_llmstream.upstream")

_ERROR_BODY_BYTES = 64 * 1024
_IDLE_CONNECTIONS = 100
_IDLE_SECONDS = 30.0
_DISCOVERY_SECONDS = 60.0
_LAST_CHUNK_SECONDS = 0.05
"""How long an upstream may take from its terminal marker to the end of its body."""


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
        max_concurrency: Requests that it is given at a time; None is as many as the
            engine works on. The rest waits in the engine's queue, in priority order.
        connect_timeout_seconds: To reach it; the answer's own limit is the request's
            deadline.
        discover: Also serve the models that ``GET /models`` lists there, under their own
            ids; asked in the background and kept for a minute.

    Raises:
        ConfigurationError: *base_url* is no HTTP URL, or the HTTP client is missing.

    Thread safety: every method, from greenlets of a patched process or from threads.
    """

    worker = "greenlet"
    supports = FEATURES | {"extra_body"}

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_concurrency: int | None = None,
        connect_timeout_seconds: float = 5.0,
        discover: bool = False,
    ) -> None:
        self._httpx = _import_httpx()
        url = self._httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigurationError(f"base_url must be an http(s) URL, not {base_url!r}.")
        if max_concurrency is not None and max_concurrency < 1:
            raise ConfigurationError(f"max_concurrency must be at least 1, not {max_concurrency}.")
        self.model = model
        self.max_concurrency = max_concurrency
        self.discovers = discover
        self._url = str(url).rstrip("/")
        self._secrets = tuple(
            secret for secret in (self._url, url.netloc.decode(), api_key) if secret
        )
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connect_timeout_seconds = connect_timeout_seconds
        self._after_fork()
        runtime.after_fork(self)

    def __repr__(self) -> str:
        return f"<UpstreamBackend {self.model or ''}>"

    def _after_fork(self) -> None:
        # The parent's sockets: closing them here would end its streams.
        self._clients: dict[bool, Any] = {}
        self._discovered: frozenset[str] = frozenset()
        self._discover_at = 0.0

    # Generating.

    def generate(self, request: InferenceRequest) -> Iterator[Item]:
        """
        Yield the upstream's items, as they come.

        Raises:
            InvalidRequestError: The upstream refuses the request; with its message.
            QueueFullError: The upstream is busy; with its ``Retry-After``.
            UpstreamError: It cannot be reached, fails, or breaks off (with the code
                ``stream_incomplete``).
        """
        exchange = _Exchange()
        with exchange:
            request.on_cancel(exchange.give_up)
            try:
                with self._open(request, exchange) as response:
                    if response.status_code != 200:
                        raise self._refusal(response)
                    chunks = exchange.chunks(response.iter_raw())
                    yield from self._items(StreamReader(chunks))
                    exchange.finish(chunks)
            except self._httpx.HTTPError as exc:
                raise self._unreachable(exc) from exc

    def _open(self, request: InferenceRequest, exchange: _Exchange) -> Any:
        deadline = request.deadline
        left = None if deadline is None else deadline.remaining_seconds()
        headers = {
            **self._headers,
            "Content-Type": "application/json",
            "X-Request-ID": request.request_id,
        }
        if left is not None:
            headers["X-Request-Timeout"] = f"{max(left, 0.001):.3f}"
        return self._client(pools=exchange.is_greenlet).stream(
            "POST",
            f"{self._url}/chat/completions",
            content=chat_request(request, self._model_for(request)),
            headers=headers,
            timeout=self._httpx.Timeout(left, connect=self._connect_timeout_seconds),
            extensions={"trace": exchange.trace},
        )

    def _items(self, events: StreamReader) -> Iterator[Item]:
        try:
            for event in events:
                yield from read_chunk(event.data)
        except LLMStreamError as exc:
            # Its class is the upstream's view: a 401 there is no 401 here.
            raise self._broken(exc) from exc

    def _model_for(self, request: InferenceRequest) -> str:
        if self.model is None or request.model in self.discovered:
            return request.model
        return self.model

    def _client(self, *, pools: bool) -> Any:
        client = self._clients.get(pools)
        if client is None:
            # In the process and the world that use it: its locks are greenlet locks only
            # where they are made after gunicorn has patched.
            client = self._httpx.Client(
                limits=self._httpx.Limits(
                    max_connections=None,
                    max_keepalive_connections=_IDLE_CONNECTIONS if pools else 0,
                    keepalive_expiry=_IDLE_SECONDS,
                )
            )
            client = self._clients.setdefault(pools, client)
        return client

    # Its errors, as ours.

    def _unreachable(self, exc: Exception) -> UpstreamError:
        if isinstance(exc, self._httpx.TimeoutException):
            return UpstreamError("The upstream did not answer in time.")
        return UpstreamError("The upstream could not be reached, or closed the connection.")

    def _broken(self, exc: LLMStreamError) -> UpstreamError:
        error = UpstreamError(self._without_secrets(exc.message), retry_after=exc.retry_after)
        error.code = exc.code
        error.retryable = exc.retryable
        return error

    def _refusal(self, response: Any) -> LLMStreamError:
        status = response.status_code
        body = b""
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > _ERROR_BODY_BYTES:
                break
        message, code = read_error(body)
        message = self._without_secrets(message) or f"The upstream answered {status}."
        if status == 429:
            return QueueFullError(message, retry_after=_retry_after(response.headers))
        if status == 404 and code == "model_not_found":
            return UnknownModelError(message, param="model")
        if status in _CALLERS_FAULT:
            error: LLMStreamError = (
                RequestTooLargeError(message) if status == 413 else InvalidRequestError(message)
            )
            error.code = code or error.code
            return error
        if status in (401, 403):
            # Our key, not the caller's; what the upstream says may quote it.
            return UpstreamError("The upstream does not accept this server's credentials.")
        return UpstreamError(
            f"The upstream answered {status}.", retry_after=_retry_after(response.headers)
        )

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[upstream]")
        return text

    # Discovering.

    @property
    def discovered(self) -> frozenset[str]:
        """The models that the upstream listed last. Never waits; asks anew when it is old."""
        if self.discovers and monotonic() >= self._discover_at:
            self._discover_at = monotonic() + _DISCOVERY_SECONDS
            runtime.spawn(self._discover)
        return self._discovered

    def _discover(self) -> None:
        try:
            response = self._client(pools=False).get(
                f"{self._url}/models", headers=self._headers, timeout=self._connect_timeout_seconds
            )
            response.raise_for_status()
            self._discovered = frozenset(model_ids(response.content))
        except (self._httpx.HTTPError, LLMStreamError) as exc:
            # What it listed before stays: that it cannot list now does not unserve it.
            runtime.log(
                _logger,
                logging.WARNING,
                "An upstream did not list its models (%s).",
                type(exc).__name__,
            )


_CALLERS_FAULT = frozenset({400, 405, 413, 415, 422})


class _Exchange:
    """
    One request to the upstream, which another thread may give up while it waits.

    A greenlet gets an exception thrown into its wait, whatever that is for. A thread
    cannot be reached: its socket is shut down under it, which is why threads use every
    connection once and learn of each.
    """

    def __init__(self) -> None:
        self._wait = runtime.make_interruptible()
        self._socket: Any = None
        self._is_given_up = False
        self._tickets = [True]  # list.pop() is atomic: ended here, or given up there.

    @property
    def is_greenlet(self) -> bool:
        return self._wait is not None

    def __enter__(self) -> None:
        if self._wait is not None:
            self._wait.begin()

    def __exit__(self, *exc: object) -> None:
        self._take_ticket()
        if self._wait is not None:
            self._wait.end()

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """The trace of httpcore: the connection, once there is one."""
        if event.startswith("connection.connect_tcp.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    def chunks(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """*chunks*; a thread whose socket was shut down ends like a greenlet."""
        try:
            yield from chunks
        except Exception:
            if self._is_given_up:
                raise runtime.Interrupted from None
            raise

    def give_up(self) -> None:
        """Any thread; constant time."""
        if not self._take_ticket():
            return
        self._is_given_up = True
        if self._wait is not None:
            self._wait.interrupt()
        elif self._socket is not None:
            runtime.shut_down_socket(self._socket)

    def finish(self, chunks: Iterator[bytes]) -> None:
        """After the terminal marker: read the transfer's own end, for the next request."""
        if self._wait is None:
            return
        timer = runtime.clock.call_at(monotonic() + _LAST_CHUNK_SECONDS, self._wait.interrupt)
        try:
            for _ in chunks:
                pass
        except runtime.Interrupted:
            pass  # It does not end: the connection is not kept.
        finally:
            timer.cancel()

    def _take_ticket(self) -> bool:
        try:
            self._tickets.pop()
        except IndexError:
            return False
        return True


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of ``Retry-After`` (RFC 9110 10.2.3), which may be a date."""
    value = headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _import_httpx() -> Any:
    for name in ("httpx2", "httpx"):  # httpx2 needs Python 3.11.
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConfigurationError(
        "UpstreamBackend needs an HTTP client. Run: pip install 'flask-llmstream[upstream]'"
    )
