"""NDJSON: one JSON text a line."""

from __future__ import annotations

from ..exceptions import StreamError
from .decoder import MAX_EVENT_BYTES, Decoder, LineSplitter

__all__ = ["NDJSONDecoder", "escape_line_separators"]


class NDJSONDecoder(Decoder[str]):
    """
    Turns the bytes of an ``application/x-ndjson`` stream into its lines, sans I/O.

    Blank lines are skipped. A last line without its LF is never returned: it may be
    cut. The lines are text, not checked to be JSON. Not thread-safe.

    Args:
        max_event_bytes: Most bytes of one line; more is a `StreamError`, as is
            malformed UTF-8.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        super().__init__()
        self._max_event_bytes = max_event_bytes
        self._lines = LineSplitter()

    def _decode(self, data: bytes, values: list[str]) -> None:
        for line in self._lines.feed(data):
            self._check_size(len(line))
            if not line or line.isspace():
                continue
            try:
                values.append(line.decode())
            except UnicodeDecodeError as exc:
                raise StreamError("The NDJSON stream is not UTF-8.") from exc
        self._check_size(self._lines.unfinished_bytes)

    def _check_size(self, line_bytes: int) -> None:
        if line_bytes > self._max_event_bytes:
            raise StreamError(
                f"A line is larger than max_event_bytes ({self._max_event_bytes}); "
                "raise the limit if such lines are expected."
            )


def escape_line_separators(payload: bytes) -> bytes:
    r"""
    JSON text with U+0085, U+2028 and U+2029 as ``\u`` escapes: the same value, on one line.

    RFC 8259 lets them stand raw in strings, but readers that split text with
    `str.splitlines` (ollama-py, `httpx.Response.iter_lines`) break lines there.
    """
    if payload.isascii():
        return payload
    # UTF-8 synchronises itself: these bytes are nowhere part of another character.
    return (
        payload.replace(b"\xc2\x85", b"\\u0085")
        .replace(b"\xe2\x80\xa8", b"\\u2028")
        .replace(b"\xe2\x80\xa9", b"\\u2029")
    )
