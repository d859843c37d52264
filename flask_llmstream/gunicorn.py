"""
A gunicorn worker for many streams: ``gunicorn -k flask_llmstream.gunicorn.StreamingGeventWorker``.

It is gunicorn's gevent worker. The one difference: while a stream of this package flows, its
tokens are written from the hub, all ready streams in a row, instead of switching into a
greenlet for each. Everything else, the last chunk, the access log, keep-alive, is gunicorn's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gunicorn.workers.ggevent import GeventWorker

from .hub_writer import HubWriter
from .responses import StreamBody

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["StreamingGeventWorker"]

_logger = logging.getLogger("flask_llmstream")


class StreamingGeventWorker(GeventWorker):  # type: ignore[misc]
    """
    gunicorn's gevent worker, which lets the hub write this package's streams.

    It steps aside for TLS and HTTP/2, for bodies that a middleware wraps, and, with one
    warning, for a gunicorn whose inside is not what it was tested with.
    """

    wsgi: Any

    def load_wsgi(self) -> None:
        """Wrap the app outside of all its middleware."""
        super().load_wsgi()
        self.wsgi = _Outermost(self.wsgi)


class _Outermost:
    """The app, whose streams get a `HubWriter` on their way out."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._has_warned = False

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        body = self._app(environ, start_response)
        if type(body) is StreamBody:
            try:
                body.writer = HubWriter.of(getattr(start_response, "__self__", None))
            except AttributeError as error:
                self._warn(error)
        return body

    def _warn(self, error: AttributeError) -> None:
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "This gunicorn is not one that StreamingGeventWorker knows (%s); "
                "streams are written as its gevent worker does.",
                error,
            )
