"""The body of a streamed response: from the channel to the server's next write."""

from __future__ import annotations

import logging
import weakref
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from .core import runtime
from .core.messages import InferenceResponse
from .exceptions import EngineError, LLMStreamError, RequestCancelledError, SlowReaderError
from .hangup import ClientLeftError, TransferAbortedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import Settings
    from .core.clock import Timer
    from .core.messages import Item
    from .dialects import Parsed
    from .hangup import Connection
    from .hub_writer import HubWriter
    from .reception import Reception
    from .replaying import Replay
    from .typing import Dialect, EventRenderer

__all__ = ["StreamBody", "render_document", "unrenderable"]

_logger = logging.getLogger("flask_llmstream.response")


class StreamBody:
    """
    What the WSGI server iterates: each item is whatever was waiting, joined.

    An object, not a generator: the `finally` of a generator that was never started does
    not run, and then a client that left before the first byte would leave its request
    running. Heartbeats, probes of half-closed clients and the terminal marker are written
    here.

    Args:
        reception: Of the stream.
        renderer: Of the dialect.
        connection: The client's.
        settings: `heartbeat_seconds`, `coalesce_seconds` and `slow_reader_seconds`.
        on_close: Called once, when the response is over, with the error that it had.
        is_resumed: There is nothing to wait for before the status line: where no event is
            there yet, a heartbeat takes it to the client at once.

    Attributes:
        writer: Of a server that lets the hub write; set before the first iteration.

    Thread safety: iteration and `close` from the server's greenlet or thread.
    """

    def __init__(
        self,
        reception: Reception | Replay,
        renderer: EventRenderer,
        connection: Connection,
        settings: Settings,
        on_close: Callable[[], None],
        *,
        is_resumed: bool = False,
    ) -> None:
        self._reception = reception
        self._renderer = renderer
        self._connection = connection
        self._on_close = on_close
        self.writer: HubWriter | None = None
        self._render = renderer.render
        self._has_heartbeat = bool(renderer.heartbeat)
        self._heartbeat_seconds = (settings.heartbeat_seconds if self._has_heartbeat else 0) or inf
        self._coalesce_seconds = settings.coalesce_seconds
        self._stall_seconds = settings.slow_reader_seconds
        self._heartbeat_at = monotonic() + (0 if is_resumed else self._heartbeat_seconds)
        self._pending: list[Item] = []
        self._is_open = False
        self._has_begun = False  # The server has something, and with it the headers.
        self._is_probed = False
        self._is_ended = False
        self._is_closed = False
        self._failure: Exception | None = None
        self._writing_since = inf
        self._stall_timer: Timer | None = None
        connection.watch(_weakly(self._on_hangup))

    # Before the status line.

    def open(self) -> None:
        """
        Wait for the first item, so that an error before it gets a status of its own; at
        most until the first heartbeat is due.

        Raises:
            LLMStreamError: The request failed.
        """
        reception = self._reception
        while not self._pending and reception.outcome is None:
            self._pending = reception.receive(self._heartbeat_at)
            if self._connection.is_gone:
                reception.leave(ClientLeftError())
            if monotonic() >= self._heartbeat_at:
                break
        if not self._pending and isinstance(reception.outcome, LLMStreamError):
            raise reception.outcome
        self._check_stall_at(monotonic() + self._stall_seconds)

    # What the server calls.

    def __iter__(self) -> StreamBody:
        return self

    def __next__(self) -> bytes:
        self._writing_since = inf
        while not self._is_ended:
            data = self._next_frames()
            if data:
                self._writing_since = now = monotonic()
                self._heartbeat_at = now + self._heartbeat_seconds
                self._has_begun = True
                return data
        if self._failure is not None:
            failure, self._failure = self._failure, None
            # Ourselves: a server that fails on a broken connection may not come to it.
            self.close()
            raise failure
        # The transfer coding's last chunk may find no room, either.
        self._writing_since = monotonic()
        raise StopIteration

    def _next_frames(self) -> bytes:
        reception = self._reception
        frames = []
        try:
            if self._is_open:
                batch = self._receive()
            else:
                self._is_open = True
                frames.append(self._renderer.start())
                batch, self._pending = self._pending, []
            frames += map(self._render, batch)
            outcome = reception.outcome
            if outcome is not None:
                frames.append(self._end(outcome))
            elif not any(frames):
                # Nothing came, or nothing that this dialect shows.
                frames.append(self._keep_alive())
        except OSError:
            raise  # Of the hub's write: the client is gone.
        except Exception as exc:
            error = unrenderable(exc)
            reception.leave(error)
            frames.append(self._end(error))
        return b"".join(frames)

    def _receive(self) -> list[Item]:
        reception = self._reception
        if self._coalesce_seconds:
            batch = reception.receive(self._heartbeat_at)
            if batch and not reception.channel.closed:
                runtime.sleep(self._coalesce_seconds)
                batch += reception.receive(0)
            return batch
        if self.writer is not None and self._has_begun:
            self._let_hub_write(self.writer)
        return reception.receive(self._heartbeat_at)

    def _let_hub_write(self, writer: HubWriter) -> None:
        """Sleep while the hub writes. Afterwards there is something for this greenlet."""
        while True:
            writer.run(self._reception, self._render, self._heartbeat_seconds)
            self._heartbeat_at = writer.written_at + self._heartbeat_seconds
            if not writer.has_unsent:
                return
            # The client reads too slowly for the hub to wait.
            self._writing_since = monotonic()
            writer.flush()
            self._writing_since = inf

    def _keep_alive(self) -> bytes:
        if self._connection.is_gone:
            self._reception.leave(ClientLeftError())
            return b""
        if self._is_probed or monotonic() >= self._heartbeat_at:
            self._is_probed = False
            return self._renderer.heartbeat
        return b""

    def _end(self, outcome: InferenceResponse | LLMStreamError) -> bytes:
        self._is_ended = True
        # From here on a client that leaves has what it came for.
        self._connection.unwatch()
        if isinstance(outcome, InferenceResponse):
            return self._renderer.end(outcome)
        frame = self._renderer.error(outcome)
        if frame is None:
            is_gone = isinstance(outcome, ClientLeftError)
            self._failure = outcome if is_gone else TransferAbortedError()
            return b""
        return frame

    def close(self) -> None:
        """The server is done with us, whether or not we are. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._writing_since = inf
        self._connection.unwatch()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if not self._is_ended:
            self._is_ended = True
            self._reception.leave(ClientLeftError() if self._is_open else _dropped())
        self._on_close()

    def __del__(self) -> None:
        # Dropped before the server had it: the app failed after it made the response.
        if not self._is_closed:
            self._is_closed = True
            self._connection.unwatch()
            if self._stall_timer is not None:
                self._stall_timer.cancel()
            self._reception.leave(_dropped())
            runtime.run_detached(self._on_close)

    # From other threads.

    def _on_hangup(self, is_gone: bool) -> None:
        """The watcher's call. A FIN may be a half-close, which only a write can tell."""
        if not is_gone and self._is_open and self._has_heartbeat:
            self._is_probed = True
            self._reception.channel.wake()
        else:
            self._reception.leave(ClientLeftError())

    def _check_stall(self) -> None:
        """
        The clock's call: end a stream whose client does not read.

        The server's write cannot be interrupted, so the socket is shut down under it.
        """
        now = monotonic()
        if now - self._writing_since >= self._stall_seconds:
            self._reception.leave(
                SlowReaderError(f"The client took over {self._stall_seconds:g} seconds to read.")
            )
            self._connection.abort()
            return
        start = now if self._writing_since == inf else self._writing_since
        self._check_stall_at(start + self._stall_seconds)

    def _check_stall_at(self, when: float) -> None:
        self._stall_timer = runtime.clock.call_at(when, _weakly(self._check_stall))


def render_document(dialect: Dialect, parsed: Parsed, response: InferenceResponse) -> bytes:
    """
    The whole answer as one JSON document.

    Raises:
        EngineError: The backend put something into it that JSON, or the dialect, has no
            form for.
    """
    try:
        return dialect.document(parsed, response)
    except LLMStreamError:
        raise  # The dialect's own: it says what is wrong.
    except Exception as exc:
        raise unrenderable(exc) from exc


def unrenderable(cause: BaseException) -> LLMStreamError:
    """
    The error for an answer that *cause* kept from being rendered: itself, where a dialect
    says what is wrong; else the log has it.
    """
    if isinstance(cause, LLMStreamError):
        return cause
    runtime.log(_logger, logging.ERROR, "An answer could not be rendered.", error=cause)
    return EngineError("The answer could not be rendered.")


def _dropped() -> RequestCancelledError:
    return RequestCancelledError(
        "The response was dropped before it was sent.", cause="response_dropped"
    )


def _weakly(method: Any) -> Callable[..., None]:
    """*method* without keeping its object: a body that is dropped must be finalized."""
    # Not a WeakMethod, which takes 1 KiB a stream: an object has one plain reference, shared.
    return partial(_call_if_alive, weakref.ref(method.__self__), method.__func__)


def _call_if_alive(
    reference: weakref.ref[StreamBody], function: Callable[..., None], *args: object
) -> None:
    target = reference()
    if target is not None:
        function(target, *args)
