"""L1: bytes and text on the wire. Pure: no Flask, no gevent, no sockets."""

from .chunked import ChunkedDecoder, encode_chunk
from .decoder import MAX_EVENT_BYTES
from .frames import FRAMINGS, JSON, NDJSON, SSE, TEXT, Framing
from .ndjson import NDJSONDecoder, escape_line_separators
from .negotiation import negotiate
from .sse import ServerSentEvent, SSEDecoder, encode_event
from .text import TextRenderer

__all__ = [
    "FRAMINGS",
    "JSON",
    "MAX_EVENT_BYTES",
    "NDJSON",
    "SSE",
    "TEXT",
    "ChunkedDecoder",
    "Framing",
    "NDJSONDecoder",
    "SSEDecoder",
    "ServerSentEvent",
    "TextRenderer",
    "encode_chunk",
    "encode_event",
    "escape_line_separators",
    "negotiate",
]
