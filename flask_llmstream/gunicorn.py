"""
For gunicorn: a worker for many streams, and two hooks. Nothing here is needed to stream.

``gunicorn -k flask_llmstream.gunicorn.StreamingGeventWorker`` is gunicorn's gevent worker. The
one difference: while a stream of this package flows, its tokens are written from the hub, all
ready streams in a row, instead of switching into a greenlet for each. Everything else, the last
chunk, the access log, keep-alive, is gunicorn's.

The hooks work with every class of workers. In ``gunicorn.conf.py``:

    from flask_llmstream.gunicorn import post_worker_init, worker_int
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gunicorn.workers.ggevent import GeventWorker

from .extension import extensions
from .hub_writer import HubWriter
from .responses import StreamBody
from .shutdown import say_goodbye

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["StreamingGeventWorker", "post_worker_init", "worker_int"]

_logger = logging.getLogger("flask_llmstream")


def post_worker_init(worker: Any) -> None:  # noqa: ARG001 - gunicorn's hook
    """
    Hook: load the models in each worker before its first request, instead of with it. Those
    are meant whose backend has a ``load()``.

    A model that cannot be loaded is logged, and the worker serves the others. gunicorn's
    `timeout` counts from the worker's start: it must be longer than loading takes.
    """
    for llm, app in extensions():
        with app.app_context():
            for model in llm.models():
                try:
                    llm.load_model(model)
                except Exception:
                    _logger.exception("The model %r could not be loaded.", model)


def worker_int(worker: Any) -> None:  # noqa: ARG001 - gunicorn's hook
    """
    Hook: on SIGINT and SIGQUIT, which grant no time, end all streams with `server_shutdown`
    and a clean end of their transfer, within 0.3 seconds.

    Not a sync worker's: there the signal has interrupted the one who would write.
    """
    say_goodbye()


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
