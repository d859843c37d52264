"""Noticing that a client has left, while no token flows."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from .core import runtime
from .exceptions import IncompleteStreamError, RequestCancelledError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ClientLeftError", "Connection", "HangupWatcher", "connection_of"]

_logger = logging.getLogger("flask_llmstream")

# Linux's numbers: gevent takes epoll and its constants out of a patched `select`.
_EPOLLRDHUP = 0x2000
_EPOLLERR = 0x008
_EPOLLHUP = 0x010
_EPOLLET = 1 << 31


class _DisconnectError(ConnectionResetError):
    """
    What a server takes for a write to a client that is gone, when it comes out of a
    response's body: it closes the connection, without the transfer's proper end and
    without a traceback in its log.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ECONNRESET  # gunicorn looks here,
        self.args = (self.errno, message)  # gevent.pywsgi here.


class ClientLeftError(RequestCancelledError, _DisconnectError):
    """The client left, and with it went the request."""

    message = "The client left."

    def __init__(self) -> None:
        super().__init__(self.message, cause="client_left")


class TransferAbortedError(IncompleteStreamError, _DisconnectError):
    """
    The answer broke off where the framing has no form for an error: the transfer is cut,
    so that it is no short success. Why is in the request's outcome.
    """

    message = "The stream ended before the answer did."

    def __init__(self) -> None:
        super().__init__(self.message)


class HangupWatcher:
    """
    One epoll on a native thread for all streams of the process.

    It never reads: pipelined bytes stay where they are. Edge-triggered, for FIN, RST and
    errors only. FIN may be a half-close, so the callback is told which of the two it was.
    Several may watch one connection: a view may read two answers for its one client.

    Where there is no epoll (macOS, Windows) `watch` does nothing: there a client's
    leaving shows at the next write.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(self) -> None:
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()
        self._epoll: Any = None
        self._callbacks: dict[int, dict[Callable[[bool], None], None]] = {}

    def watch(self, fileno: int, callback: Callable[[bool], None]) -> None:
        """
        Call ``callback(is_gone)`` when the peer closes or resets.

        Args:
            fileno: A connected socket; `unwatch` it before it is closed.
            callback: On the watcher's thread: constant time. *is_gone* is False for a
                FIN, which may be a half-close. It may be told more than once.
        """
        epoll = self._epoll or self._start()
        if epoll is None:
            return
        self._callbacks.setdefault(fileno, {})[callback] = None
        try:
            epoll.register(fileno, _EPOLLRDHUP | _EPOLLET)
        except FileExistsError:
            epoll.modify(fileno, _EPOLLRDHUP | _EPOLLET)  # Tells again what has been told.
        except OSError:
            self._callbacks.pop(fileno, None)  # No socket, or closed already.

    def unwatch(self, fileno: int, callback: Callable[[bool], None]) -> None:
        """Tell *callback* no more; no effect where it does not watch."""
        callbacks = self._callbacks.get(fileno, {})
        callbacks.pop(callback, None)
        if not callbacks and self._callbacks.pop(fileno, None) is not None:
            try:
                self._epoll.unregister(fileno)
            except OSError:
                pass  # The socket is closed, which took it out.

    def _start(self) -> Any:
        try:
            new_epoll = runtime.original("select", "epoll")
        except AttributeError:
            return None
        with self._lock:
            if self._epoll is None:
                self._epoll = new_epoll()
                runtime.start_thread(self._run)
        return self._epoll

    def _run(self) -> None:
        epoll, callbacks = self._epoll, self._callbacks
        new_poll = runtime.original("select", "poll")
        while True:
            for fileno, _ in epoll.poll():
                told = tuple(callbacks.get(fileno, ()))
                if not told:
                    continue
                # The number may belong to another connection by now: ask how it is.
                poll = new_poll()
                poll.register(fileno, _EPOLLRDHUP)
                events = dict(poll.poll(0)).get(fileno, 0)
                if events & (_EPOLLRDHUP | _EPOLLHUP | _EPOLLERR):
                    for callback in told:
                        self._tell(callback, bool(events & (_EPOLLHUP | _EPOLLERR)))

    def _tell(self, callback: Callable[[bool], None], is_gone: bool) -> None:
        try:
            callback(is_gone)
        except Exception as error:
            runtime.log(_logger, logging.ERROR, "A hangup callback failed.", error=error)


_watcher = HangupWatcher()


class Connection:
    """
    The client's connection behind one WSGI request.

    Args:
        sock: The server's socket; None where the server does not tell.
        is_disconnected: The server's own word for it (waitress), asked at each wake-up.
    """

    def __init__(self, sock: Any = None, is_disconnected: Callable[[], bool] | None = None) -> None:
        self._socket = sock
        self._watched: tuple[int, Callable[[bool], None]] | None = None
        self._is_disconnected = is_disconnected

    @property
    def is_gone(self) -> bool:
        return self._is_disconnected is not None and self._is_disconnected()

    def watch(self, callback: Callable[[bool], None]) -> None:
        """See `HangupWatcher.watch`. Once."""
        if self._socket is not None:
            fileno = self._socket.fileno()
            if fileno >= 0:
                self._watched = fileno, callback
                _watcher.watch(fileno, callback)

    def unwatch(self) -> None:
        """Forget it; before the server closes the socket. Any thread, idempotent."""
        watched, self._watched = self._watched, None
        if watched is not None:
            _watcher.unwatch(*watched)

    def stop_reading(self) -> None:
        """End a wait for more of the request; the answer can be written still. Any thread."""
        if self._socket is not None:
            runtime.shut_down_socket(self._socket, only_reading=True)

    def abort(self) -> None:
        """Shut the socket down under a writer that is stuck in it. Any thread."""
        if self._socket is not None:
            runtime.shut_down_socket(self._socket)


def connection_of(environ: Mapping[str, Any]) -> Connection:
    """
    The connection of a WSGI request, as far as its server tells (gunicorn, Werkzeug,
    gevent's, waitress). On HTTP/2 the socket is shared with other requests, so it is left
    alone.
    """
    if str(environ.get("SERVER_PROTOCOL", "")).startswith("HTTP/2"):
        return Connection()
    sock = (
        environ.get("gunicorn.socket")
        or environ.get("werkzeug.socket")
        or _socket_read_by(environ.get("wsgi.input"))
    )
    return Connection(sock, environ.get("waitress.client_disconnected"))


def _socket_read_by(body: Any) -> Any:
    """gevent.pywsgi names no socket, only the file that it reads the request from."""
    buffered = getattr(body, "rfile", None)
    return getattr(getattr(buffered, "raw", None), "_sock", None)
