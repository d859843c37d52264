"""The consumer's side of a stream: whole events, or an error that says what is missing."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from . import exceptions
from .core.runtime import log
from .dialects.encoding import decode
from .exceptions import (
    IncompleteStreamError,
    LLMStreamError,
    RequestCancelledError,
    UpstreamError,
)
from .framing import MAX_EVENT_BYTES, NDJSONDecoder, ServerSentEvent, SSEDecoder
from .reconnecting import Backoff, Reconnection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from types import TracebackType

__all__ = ["StreamReader"]

logger = logging.getLogger(__name__)

# The peer chooses the id, so its length is not to be trusted.
_MAX_LOGGED_ID = 128

# A base class may share its code with a subclass; the subclass says more.
_ERRORS_BY_CODE: dict[str, type[LLMStreamError]] = {
    cls.code: cls
    for cls in sorted(
        (getattr(exceptions, name) for name in exceptions.__all__),
        key=lambda cls: len(cls.__mro__),
    )
}


# vLLM and llama.cpp put the HTTP status there, which they could not send any more.
_ERRORS_BY_STATUS: dict[str, type[LLMStreamError]] = {
    "400": exceptions.InvalidRequestError,
    "413": exceptions.RequestTooLargeError,
    "422": exceptions.InvalidRequestError,
    "429": exceptions.QueueFullError,
}

# OpenAI's and Anthropic's own names. Of the others a retry may mend any.
_ERRORS_BY_TYPE: dict[str, type[LLMStreamError]] = {
    "invalid_request_error": exceptions.InvalidRequestError,
    "authentication_error": exceptions.AuthenticationError,
    "permission_error": exceptions.PermissionDeniedError,
    "not_found_error": exceptions.UnknownModelError,
    "rate_limit_error": exceptions.QueueFullError,
}


class StreamReader:
    """
    Iterates the events of a streamed answer.

    The iteration ends at the terminal marker and nowhere else, so whoever leaves the
    loop without an exception has the whole answer. After the marker nothing more is
    read. After an error every further step raises it again.

    A stream whose events have ids can be read on where it broke::

        def answer(last_event_id=""):
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            with httpx.stream("POST", url, json=body, headers=headers) as response:
                response.raise_for_status()
                yield from response.iter_bytes()

        with StreamReader(answer(), reconnect=answer) as reader:
            for event in reader: ...

    Each event still comes once. What does not go on where it broke is an
    `IncompleteStreamError`.

    Args:
        chunks: The body, in any pieces: ``response.iter_bytes()`` of httpx,
            ``iter_content(None)`` of requests, ``stream()`` of urllib3, a list. Whatever
            it raises (as `Exception`) counts as the end of the input.
        framing: ``"sse"`` or ``"ndjson"``. An NDJSON event's `data` is the line.
        terminal: What the last event is. A string is compared with its data, its event
            type, and the ``type`` in its JSON (``"message_stop"``,
            ``"response.completed"``); of several strings any will do; a callable gets the
            event. Default: the data ``[DONE]``; for NDJSON a JSON object with
            ``"done": true``.
        max_event_bytes: Most bytes of one event; more is a `StreamError`.
        reconnect: Comes back to a stream that broke: called with the last event's id, to be
            sent as ``Last-Event-ID``, it opens the stream again and returns the new chunks,
            or None where the server has no more of it (204). It may be a generator. What
            it raises, now or as chunks, is tried again, but for a 4xx of httpx or requests
            and for an `LLMStreamError` that is not ``retryable``; ``Retry-After`` is
            honoured in both forms. A stream of NDJSON, or without ids, cannot be resumed.
        backoff: When to come back, and when to give up.

    Attributes:
        terminal_event: The marker once it was met (with Ollama's usage, say), else None.

    Raises:
        IncompleteStreamError: On iteration: the input ended without the marker (and there
            was no way back to it), or the reader was closed before it. Logged with the
            answer's id, without content.
        LLMStreamError: On iteration: the error that the stream itself reports, in the
            class with its code, else `UpstreamError`; its own ``retryable`` is kept.
        StreamError: On iteration: an event is too large, or the text is not UTF-8.

    Thread safety: none; one thread or greenlet reads and closes. To stop a reader that
    waits, close the transport below it. It takes no lock and starts no thread, so that it
    waits as its transport does: natively, or cooperatively under gevent.
    """

    def __init__(
        self,
        chunks: Iterable[bytes],
        *,
        framing: str = "sse",
        terminal: str | Collection[str] | Callable[[ServerSentEvent], bool] | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        reconnect: Callable[[str], Iterable[bytes] | None] | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        if framing not in ("sse", "ndjson"):
            raise ValueError(f'framing must be "sse" or "ndjson", not {framing!r}')
        if reconnect is not None and framing != "sse":
            raise ValueError('reconnect needs the framing "sse": others have no ids')
        if terminal is None:
            terminal = "[DONE]" if framing == "sse" else _is_done
        self._is_terminal = terminal if callable(terminal) else _marker(terminal)
        self._framing = framing
        self._max_event_bytes = max_event_bytes
        self._way_back = (
            None if reconnect is None else Reconnection(reconnect, backoff or Backoff())
        )
        self._events: deque[ServerSentEvent] = deque()
        self._events_read = 0
        self._first_data = self._last_data = ""
        self._error: LLMStreamError | None = None
        self._closed = False
        self.terminal_event: ServerSentEvent | None = None
        self._open(chunks)

    def __iter__(self) -> Iterator[ServerSentEvent]:
        return self

    def __next__(self) -> ServerSentEvent:
        if self.terminal_event is not None:
            raise StopIteration
        if self._error is not None:
            raise self._error
        event = self._receive()
        if self._is_terminal(event):
            self.terminal_event = event
            raise StopIteration
        if not self._events_read:
            self._first_data = event.data
        self._last_data = event.data
        self._events_read += 1
        return event

    def __enter__(self) -> StreamReader:  # noqa: PYI034 - typing.Self is 3.11
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close *chunks* (and so the connection) where it has a ``close``. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._error is None:
            self._error = IncompleteStreamError("The reader was closed.")
        self._close_chunks()

    def _open(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._iterator = iter(chunks)
        self._decode: Callable[[bytes], list[ServerSentEvent]]
        if self._framing == "sse":
            events = SSEDecoder(max_event_bytes=self._max_event_bytes, errors="strict")
            if self._way_back is not None:
                self._way_back.follow(events)
            self._decode = events.feed
        else:
            lines = NDJSONDecoder(max_event_bytes=self._max_event_bytes)
            self._decode = lambda data: [ServerSentEvent(line) for line in lines.feed(data)]

    def _close_chunks(self) -> None:
        with ExitStack() as stack:
            # An iterable (a response) and the iterator that it made (a generator with a
            # `finally`) may both hold something.
            for closable in {id(part): part for part in (self._chunks, self._iterator)}.values():
                close = getattr(closable, "close", None)
                if close is not None:
                    stack.callback(close)

    def _receive(self) -> ServerSentEvent:
        """The next event, the marker included."""
        way_back = self._way_back
        while True:
            while not self._events:
                self._fill()
            event = self._events.popleft()
            # A key in a JSON text is escaped only by who wants to hide it, so the search
            # spares nearly every event the parsing.
            if 'error"' in event.data or event.event == "error":
                error = _in_band_error(event)
                if error is not None:
                    # With an id of its own it is kept like any event, and would come again.
                    if not error.retryable or way_back is None or way_back.has_own_id(event):
                        self._fail(error)
                    self._come_back(error)
                    continue
            if way_back is None:
                return event
            try:
                if way_back.advance(event):
                    return event
            except IncompleteStreamError as error:
                with suppress(Exception):
                    self._close_chunks()  # Another answer, which nobody wants.
                self._fail(error)

    def _fill(self) -> None:
        """Take the next piece of input, or else come back for it."""
        try:
            self._events.extend(self._decode(self._read()))
        except IncompleteStreamError as error:
            self._come_back(error)
        except LLMStreamError as error:
            self._fail(error)

    def _read(self) -> bytes:
        """The next piece of input; an error where there is none."""
        cause: Exception | None = None
        try:
            return next(self._iterator)
        except StopIteration:
            pass
        except Exception as exc:
            cause = exc
        # A fault that the decoder held back says more than the end of the input does.
        self._decode(b"")
        last = _json_object(self._last_data)
        if last.get("type") == "abort":
            # The AI SDK's word for a cancel, which its pages do not take for an error.
            raise RequestCancelledError(str(last.get("reason") or "")) from cause
        raise IncompleteStreamError("The stream ended without its terminal marker.") from cause

    def _come_back(self, error: LLMStreamError) -> None:
        """Open the stream again after *error*, or raise that."""
        self._error = error
        if self._way_back is None:
            self._fail(error)
        with suppress(Exception):
            self._close_chunks()
        try:
            chunks = self._way_back.open_again(error)
        except LLMStreamError:
            self._fail(error)
        self._open(chunks)
        self._events.clear()
        self._error = None

    def _fail(self, error: LLMStreamError) -> NoReturn:
        self._error = error
        if isinstance(error, IncompleteStreamError):
            cause = error.__cause__
            # Only the class of the cause: its text may quote the answer, or a URL with a key.
            log(
                logger,
                logging.WARNING,
                "stream %r ended without its terminal marker after %d events (%s)",
                self._request_id(),
                self._events_read,
                "end of input" if cause is None else type(cause).__name__,
            )
        raise error

    def _request_id(self) -> str:
        """The answer's id, as its events have it: in each, or in the first one's message."""
        for data in (self._last_data, self._first_data):
            payload = _json_object(data)
            for holder in (payload, payload.get("response"), payload.get("message")):
                if isinstance(holder, dict) and isinstance(holder.get("id"), str):
                    return str(holder["id"])[:_MAX_LOGGED_ID]
        return "unknown"


def _marker(terminal: str | Collection[str]) -> Callable[[ServerSentEvent], bool]:
    markers = (terminal,) if isinstance(terminal, str) else tuple(terminal)

    def is_terminal(event: ServerSentEvent) -> bool:
        if event.data in markers or event.event in markers:
            return True
        return (
            any(marker in event.data for marker in markers)
            and _json_object(event.data).get("type") in markers
        )

    return is_terminal


def _is_done(event: ServerSentEvent) -> bool:
    return "true" in event.data and _json_object(event.data).get("done") is True


def _json_object(data: str) -> dict[str, Any]:
    """*data* as a JSON object; empty where it is none: payloads need not be JSON."""
    try:
        value = decode(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _in_band_error(event: ServerSentEvent) -> LLMStreamError | None:
    """
    The error that *event* reports; None where it reports none.

    ============================ ===================================================
    OpenAI                       ``{"error": {"message", "type", "code"}}``
    Anthropic                    ``{"type": "error", "error": {"type", "message"}}``
    Responses                    the same, or ``{"type": "error", "code", "message"}``,
                                 or ``{"response": {"error": {"code", "message"}}}``
    Ollama                       ``{"error": "message"}``
    AI SDK                       ``{"type": "error", "errorText": "message"}``; ours, before it,
                                 ``{"type": "data-error", "data": {"code", "message"}}``
    anyone                       ``event: error`` with any data
    ============================ ===================================================
    """
    payload = _json_object(event.data)
    reported = payload.get("data") if payload.get("type") == "data-error" else payload.get("error")
    if not reported and isinstance(payload.get("response"), dict):
        reported = payload["response"].get("error")
    if isinstance(reported, dict):
        fields = {**payload, **reported}
    elif isinstance(reported, str) and reported:
        fields = {**payload, "message": reported}
    elif event.event == "error" or payload.get("type") == "error":
        fields = payload or {"message": event.data}
    else:
        return None
    texts = {key: value for key, value in fields.items() if isinstance(value, str)}
    cls = (
        _ERRORS_BY_CODE.get(texts.get("code", ""))
        or _ERRORS_BY_CODE.get(texts.get("type", ""))
        or _ERRORS_BY_STATUS.get(str(fields.get("code")))
        or _ERRORS_BY_TYPE.get(texts.get("type", ""))
        or UpstreamError
    )
    message = texts.get("message") or texts.get("errorText") or "The stream reported an error."
    error = cls(message, param=texts.get("param"))
    if isinstance(fields.get("retryable"), bool):
        error.retryable = fields["retryable"]
    return error
