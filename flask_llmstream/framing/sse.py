"""Server-sent events: the decoder of WHATWG HTML 9.2.6, and an encoder it cannot misread."""

from __future__ import annotations

import re

import msgspec

from ..exceptions import StreamError
from .decoder import MAX_EVENT_BYTES, Decoder, LineSplitter

__all__ = ["SSEDecoder", "ServerSentEvent", "encode_event"]

_BOM = b"\xef\xbb\xbf"
# At most 15 digits, some thirty thousand years: int() refuses thousands of digits.
_MILLISECONDS = re.compile(rb"[0-9]{1,15}")
_BREAKS_A_LINE = re.compile("[\r\n\0]")


# A Struct is made several times faster than a frozen dataclass; there is one a token.
class ServerSentEvent(msgspec.Struct, frozen=True, gc=False):
    """
    One event.

    Args:
        data: The payload; the lines of several ``data`` fields are joined by LF.
        event: The event's type.
        id: The stream's last event id as of this event; empty where none was sent.
    """

    data: str
    event: str = "message"
    id: str = ""


class SSEDecoder(Decoder[ServerSentEvent]):
    """
    Turns the bytes of a ``text/event-stream`` into events, sans I/O.

    An event that the input's end cuts off is never returned: without its blank line it
    is not whole (WHATWG HTML 9.2.6). Not thread-safe.

    Args:
        max_event_bytes: Most bytes that the lines of one event may have together;
            more is a `StreamError`. A comment counts only while it is read.
        errors: What malformed UTF-8 becomes: ``replace`` is the standard's way
            (U+FFFD); ``strict`` makes it a `StreamError`.

    Attributes:
        last_event_id: What a reconnect would send as ``Last-Event-ID``.
        retry_milliseconds: The reconnection time that the server set; None if it did not.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES, errors: str = "replace") -> None:
        super().__init__()
        self.last_event_id = ""
        self.retry_milliseconds: int | None = None
        self._max_event_bytes = max_event_bytes
        self._errors = errors
        self._lines = LineSplitter()
        self._at_start = True
        # The buffers of the event under way, as 9.2.6 names them.
        self._data: list[bytes] = []
        self._event_type = ""
        self._id = ""
        self._event_bytes = 0

    def _decode(self, data: bytes, values: list[ServerSentEvent]) -> None:
        for line in self._lines.feed(data):
            if self._at_start:
                self._at_start = False
                line = line.removeprefix(_BOM)  # noqa: PLW2901 - only the stream's first line
            if not line:
                self._dispatch(values)
                continue
            self._check_size(len(line))
            if line.startswith(b"data: "):  # what nearly every line is
                self._data.append(line[6:])
                self._event_bytes += len(line)
            else:
                self._process_field(line)
        self._check_size(self._lines.unfinished_bytes)

    def _dispatch(self, values: list[ServerSentEvent]) -> None:
        self.last_event_id = self._id
        if self._data:
            text = self._text(b"\n".join(self._data))
            values.append(ServerSentEvent(text, self._event_type or "message", self._id))
            self._data.clear()
        self._event_type = ""
        self._event_bytes = 0

    def _process_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if not name:
            return  # a comment
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event_type = self._text(value)
        elif name == b"id":
            if b"\0" not in value:
                self._id = self._text(value)
        elif name == b"retry":
            if _MILLISECONDS.fullmatch(value):
                self.retry_milliseconds = int(value)
            return
        else:
            return
        self._event_bytes += len(line)

    def _text(self, value: bytes) -> str:
        try:
            return value.decode("utf-8", self._errors)
        except UnicodeDecodeError as exc:
            raise StreamError("The event stream is not UTF-8.") from exc

    def _check_size(self, more_bytes: int) -> None:
        if self._event_bytes + more_bytes > self._max_event_bytes:
            raise StreamError(
                f"An event is larger than max_event_bytes ({self._max_event_bytes}); "
                "raise the limit if such events are expected."
            )


def encode_event(data: bytes, *, event: str | None = None, id: str | None = None) -> bytes:
    """
    One event with one ``data`` line: what every parser in use reads alike.

    Args:
        data: UTF-8 without CR and LF, as compact JSON is.
        event: The event's type; None leaves the line away, and a reader says ``message``.
        id: The event's id; None leaves the last one in force.

    Raises:
        ValueError: *data* is empty (several clients fail on that) or more than one
            line, or *event* or *id* holds CR, LF or NUL and would forge a field.
    """
    if not data:
        raise ValueError("data is empty; an event needs a payload")
    if b"\n" in data or b"\r" in data:
        raise ValueError("data holds a line break; encode it as compact JSON")
    frame = b"data: " + data + b"\n\n"
    if event is not None:
        frame = _field("event", event) + frame
    if id is not None:
        frame = _field("id", id) + frame
    return frame


def _field(name: str, value: str) -> bytes:
    if _BREAKS_A_LINE.search(value):
        raise ValueError(f"{name} holds CR, LF or NUL: {value!r}")
    return f"{name}: {value}\n".encode()
