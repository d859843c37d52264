"""HTTP exchanges with an upstream, which any thread may give up while they wait."""

from __future__ import annotations

import importlib
import time
from base64 import b64encode
from email.utils import parsedate_to_datetime
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..core import runtime
from ..exceptions import ConfigurationError, UpstreamError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Exchange", "UpstreamHTTP", "read_retry_after"]

_IDLE_CONNECTIONS = 100
_IDLE_SECONDS = 4.0
"""Shorter than uvicorn's 5 s and everybody else's, so that it is we who close."""
_LAST_CHUNK_SECONDS = 0.05
"""How long an upstream may take from its terminal marker to the end of its body."""
_LONGEST_RETRY_AFTER_SECONDS = 86400.0


class UpstreamHTTP:
    """
    The way to one upstream: its address, and the connections that are kept.

    The client's transport is used without its `Client`, which would keep one caller's
    cookies for the others and log every address. ``HTTPS_PROXY`` and ``NO_PROXY`` count.

    Args:
        base_url: Where paths begin; a query is kept.
        headers: Sent with every request.
        connect_timeout_seconds: To reach it, TLS included.

    Raises:
        ConfigurationError: *base_url* is no HTTP URL, or the HTTP client is missing.

    Thread safety: every method, from greenlets of a patched process or from threads.
    """

    def __init__(
        self, base_url: str, headers: Mapping[str, str], connect_timeout_seconds: float
    ) -> None:
        self.httpx = _import_httpx()
        try:
            self.url = self.httpx.URL(base_url)
        except (self.httpx.InvalidURL, TypeError):
            self.url = self.httpx.URL("")
        if self.url.scheme not in ("http", "https") or not self.url.host:
            # Without the URL itself, which may hold a password.
            raise ConfigurationError(
                "An upstream's base_url must be like http://host:8000/v1, or https."
            )
        self.headers = {
            "Accept-Encoding": "identity",
            "User-Agent": f"flask-llmstream/{__version__}",
            **headers,
        }
        if self.url.userinfo and "Authorization" not in self.headers:
            login = f"{self.url.username}:{self.url.password}".encode()
            self.headers["Authorization"] = f"Basic {b64encode(login).decode()}"
        self.connect_timeout_seconds = connect_timeout_seconds
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        # The connections are the parent's.
        self._transports: dict[bool, Any] = {}

    def exchange(self) -> Exchange:
        """A fresh one, for the caller's greenlet or thread."""
        return Exchange(self)

    def url_of(self, path: str) -> Any:
        """*path* below the base URL."""
        return self.url.copy_with(path=self.url.path.rstrip("/") + path)

    def transport(self, *, pools: bool) -> Any:
        """The client's transport, which keeps connections where it *pools*."""
        transport = self._transports.get(pools)
        if transport is None:
            # In the process and the world that use it: its locks are greenlet locks only
            # where they are made after gunicorn has patched.
            transport = self._transports.setdefault(
                pools,
                self.httpx.HTTPTransport(
                    proxy=_proxy_of(self.url),
                    limits=self.httpx.Limits(
                        max_connections=None,
                        max_keepalive_connections=_IDLE_CONNECTIONS if pools else 0,
                        keepalive_expiry=_IDLE_SECONDS,
                    ),
                ),
            )
        return transport


class Exchange:
    """
    One request and its answer, which another thread may give up while it waits.

    A greenlet gets an exception thrown into its wait, whatever that is for. A thread
    cannot be reached: its socket is shut down under it, which is why threads use every
    connection once and learn of each. Given up, it raises `runtime.Interrupted`.

    Iterating it gives the body's pieces.

    Attributes:
        status: Of the answer.
        headers: Of the answer.

    Thread safety: `give_up` from any thread; the rest is the worker's.
    """

    def __init__(self, http: UpstreamHTTP) -> None:
        self._http = http
        self._wait = runtime.make_interruptible()
        self._socket: Any = None
        self._response: Any = None
        self._pieces: Any = iter(())
        self._is_given_up = False
        self._is_connecting_anew = False
        self.status = 0
        self.headers: Mapping[str, str] = {}

    def send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        """
        Send a request and wait for the head of its answer.

        Args:
            method: ``GET`` or ``POST``.
            path: Below the base URL.
            headers: Beside those of every request.
            content: The body.
            timeout_seconds: For each step of it, and each piece of the answer's body.

        Raises:
            UpstreamError: It cannot be reached, or does not answer.
        """
        httpx = self._http.httpx
        connect_seconds = min(self._http.connect_timeout_seconds, timeout_seconds or inf)
        request = httpx.Request(
            method,
            self._http.url_of(path),
            headers={**self._http.headers, **(headers or {})},
            content=content,
            extensions={
                "timeout": httpx.Timeout(timeout_seconds, connect=connect_seconds).as_dict(),
                "trace": self._trace,
            },
        )
        transport = self._http.transport(pools=self._wait is not None)
        try:
            try:
                self._response = self._do(transport.handle_request, request)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                if self._is_connecting_anew:
                    raise
                # A connection that was kept, and that the upstream closed just now.
                self._response = self._do(transport.handle_request, request)
        except httpx.HTTPError as exc:
            raise self.error_of(exc) from None
        self.status = self._response.status_code
        self.headers = self._response.headers
        self._pieces = iter(self._response.stream)

    @property
    def content_type(self) -> str:
        """Without parameters, in lower case."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def __iter__(self) -> Exchange:
        return self

    def __next__(self) -> bytes:
        return self._do(next, self._pieces)  # type: ignore[no-any-return]

    def _do(self, function: Any, argument: Any) -> Any:
        """What *function* returns, which waits; this alone is what giving up ends."""
        wait = self._wait
        if self._is_given_up:
            raise runtime.Interrupted
        if wait is not None:
            wait.begin()
        try:
            return function(argument)
        except Exception:
            if self._is_given_up:  # A thread, whose socket was shut down.
                raise runtime.Interrupted from None
            raise
        finally:
            if wait is not None:
                wait.end()

    def read(self, max_bytes: int) -> bytes:
        """
        The whole body, or its first *max_bytes* and a little more.

        Raises:
            UpstreamError: It breaks off.
        """
        body = b""
        try:
            for piece in self:
                body += piece
                if len(body) > max_bytes:
                    break
        except self._http.httpx.HTTPError as exc:
            raise self.error_of(exc) from None
        return body

    def finish(self) -> None:
        """After the terminal marker: read the transfer's own end, to keep the connection."""
        if self._wait is None:
            return
        until = monotonic() + _LAST_CHUNK_SECONDS
        timer = runtime.clock.call_at(until, self._wait.interrupt)
        try:
            for _ in self:
                if monotonic() >= until:
                    return
        except (runtime.Interrupted, self._http.httpx.HTTPError):
            pass  # It does not end, or badly: the connection is not kept.
        finally:
            timer.cancel()

    def close(self) -> None:
        """Close the connection, unless the answer was read to its end. Idempotent."""
        if self._response is not None:
            self._response.stream.close()

    def give_up(self) -> None:
        """End what it waits for, now or next. Any thread; constant time."""
        self._is_given_up = True
        if self._wait is not None:
            self._wait.interrupt()
        elif self._socket is not None:
            runtime.shut_down_socket(self._socket)

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """The trace of httpcore, which tells of a connection as soon as there is one."""
        if event.endswith("connect_tcp.started"):
            self._is_connecting_anew = True
        elif event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self._is_given_up and self._wait is None:
                runtime.shut_down_socket(self._socket)

    def error_of(self, exc: Exception) -> UpstreamError:
        """What the caller may know of *exc*, whose own text may hold the address."""
        if isinstance(exc, self._http.httpx.TimeoutException):
            return UpstreamError("The upstream did not answer in time.")
        if isinstance(exc, self._http.httpx.ConnectError):
            return UpstreamError("The upstream cannot be reached.")
        return UpstreamError("The upstream closed the connection, or does not speak HTTP.")


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of ``Retry-After`` (RFC 9110 10.2.3), which may be a date; None without one."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    # Not a number, or in the past: as good as none.
    return min(seconds, _LONGEST_RETRY_AFTER_SECONDS) if seconds > 0 else None


def _proxy_of(url: Any) -> str | None:
    from urllib.request import getproxies, proxy_bypass

    if proxy_bypass(url.host):
        return None
    proxies = getproxies()
    return proxies.get(url.scheme) or proxies.get("all")


def _import_httpx() -> Any:
    for name in ("httpx2", "httpx"):  # httpx2 needs Python 3.11.
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConfigurationError(
        "UpstreamBackend needs an HTTP client. Run: pip install 'flask-llmstream[upstream]'"
    )
