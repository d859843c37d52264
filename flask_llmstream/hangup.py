"""Noticing that a client has left, while no token flows."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

from .core import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Connection", "HangupWatcher", "connection_of"]

# Linux's numbers: gevent takes epoll and its constants out of a patched `select`.
_EPOLLRDHUP = 0x2000
_EPOLLERR = 0x008
_EPOLLHUP = 0x010
_EPOLLET = 1 << 31


class HangupWatcher:
    """
    One epoll on a native thread for all streams of the process.

    It never reads: pipelined bytes stay where they are. Edge-triggered, for FIN, RST and
    errors only. FIN may be a half-close, so the callback is told which of the two it was.

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
        self._callbacks: dict[int, Callable[[bool], None]] = {}

    def watch(self, fileno: int, callback: Callable[[bool], None]) -> None:
        """
        Call ``callback(is_gone)`` when the peer closes or resets.

        Args:
            fileno: A connected socket; `unwatch` it before it is closed.
            callback: On the watcher's thread: constant time. *is_gone* is False for a
                FIN, which may be a half-close.
        """
        epoll = self._epoll or self._start()
        if epoll is None:
            return
        self._callbacks[fileno] = callback
        try:
            epoll.register(fileno, _EPOLLRDHUP | _EPOLLET)
        except OSError:
            self._callbacks.pop(fileno, None)  # No socket, or closed already.

    def unwatch(self, fileno: int) -> None:
        """Forget *fileno*; no effect where it is not watched."""
        if self._callbacks.pop(fileno, None) is not None:
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
                callback = callbacks.get(fileno)
                if callback is None:
                    continue
                # The number may belong to another connection by now: ask how it is.
                poll = new_poll()
                poll.register(fileno, _EPOLLRDHUP)
                events = dict(poll.poll(0)).get(fileno, 0)
                if events & (_EPOLLRDHUP | _EPOLLHUP | _EPOLLERR):
                    try:
                        callback(bool(events & (_EPOLLHUP | _EPOLLERR)))
                    except Exception as error:
                        runtime.log(
                            logging.getLogger("flask_llmstream"),
                            logging.ERROR,
                            "A hangup callback failed.",
                            error=error,
                        )


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
        self._fileno = -1
        self._is_disconnected = is_disconnected

    @property
    def is_gone(self) -> bool:
        return self._is_disconnected is not None and self._is_disconnected()

    def watch(self, callback: Callable[[bool], None]) -> None:
        """See `HangupWatcher.watch`."""
        if self._socket is not None:
            self._fileno = self._socket.fileno()
            if self._fileno >= 0:
                _watcher.watch(self._fileno, callback)

    def unwatch(self) -> None:
        """Forget it; before the server closes the socket. Any thread, idempotent."""
        if self._fileno >= 0:
            _watcher.unwatch(self._fileno)
            self._fileno = -1

    def abort(self) -> None:
        """
        Shut the socket down under a writer that is stuck in it, which then gets EPIPE.

        Any thread: one system call on the socket below gevent's and TLS's objects.
        """
        if self._socket is None:
            return
        raw = getattr(self._socket, "_sock", self._socket)
        try:
            raw_type = runtime.original("_socket", "socket")
            raw_type.shutdown(raw, socket.SHUT_RDWR)
        except OSError:
            pass  # It is closed already.


def connection_of(environ: Mapping[str, Any]) -> Connection:
    """
    The connection of a WSGI request, as far as its server tells (gunicorn, Werkzeug,
    waitress). On HTTP/2 the socket is shared with other requests, so it is left alone.
    """
    if str(environ.get("SERVER_PROTOCOL", "")).startswith("HTTP/2"):
        return Connection()
    sock = environ.get("gunicorn.socket") or environ.get("werkzeug.socket")
    return Connection(sock, environ.get("waitress.client_disconnected"))
