"""The four framings of an answer: what goes around each payload."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FRAMINGS", "JSON", "NDJSON", "SSE", "TEXT", "Framing"]


@dataclass(frozen=True, slots=True)
class Framing:
    """
    How payloads become bytes: ``prefix + payload + suffix``.

    A renderer folds prefix and suffix into its own constants, so that a token costs one
    escape and one join.

    Args:
        name: ``sse``, ``ndjson``, ``text`` or ``json``.
        content_type: The response's Content-Type.
        prefix: Before each payload.
        suffix: After each payload.
        heartbeat: A frame that every parser of this framing skips; empty where none is.
        streams: Whether an answer is sent as it is produced.
    """

    name: str
    content_type: str
    prefix: bytes = b""
    suffix: bytes = b""
    heartbeat: bytes = b""
    streams: bool = True

    def frame(self, payload: bytes) -> bytes:
        """*payload* as one frame; it must be what the framing allows (no bare newline)."""
        return self.prefix + payload + self.suffix

    def head(self, event: str) -> bytes:
        """
        What stands before a payload whose reader goes by the *event*'s type, as
        `prefix` does where there is none. Only SSE has a place for it: elsewhere the
        payload has to say it itself.
        """
        return b"event: %b\n%b" % (event.encode(), self.prefix) if self == SSE else self.prefix


# WHATWG HTML 9.2.6: one data line, LF only; a line that starts with a colon is a comment.
# Always UTF-8, so Content-Type takes no charset (9.2.5).
SSE = Framing("sse", "text/event-stream", b"data: ", b"\n\n", b": ping\n\n")
# One JSON value a line, no blank lines: readers fail on them.
NDJSON = Framing("ndjson", "application/x-ndjson", b"", b"\n")
TEXT = Framing("text", "text/plain; charset=utf-8")
JSON = Framing("json", "application/json", streams=False)

FRAMINGS = (SSE, NDJSON, TEXT, JSON)
"""All of them, and in the order in which most routes offer them."""
