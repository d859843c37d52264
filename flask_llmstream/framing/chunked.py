r"""
HTTP/1.1's chunked transfer coding, RFC 9112 7.1.

A server applies it by itself (PEP 3333 keeps applications from it). This is for those
who hold a raw socket: a consumer, a test, a worker that writes past its server.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..exceptions import StreamError
from .decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ChunkedDecoder", "encode_chunk"]

# nginx and Apache httpd stop at 8 KiB a line; nobody sends extensions of that size.
MAX_LINE_BYTES = 8 * 1024
MAX_TRAILER_BYTES = 16 * 1024

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|\\[\t\x20-\x7e\x80-\xff])*"'
# RFC 9112 7.1.1. Sixteen digits are 64 bits; more is an attempt to overflow somebody.
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})"
    rb"(?:[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*"
)
_TRAILER_LINE = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([\t\x20-\x7e\x80-\xff]*)")


def encode_chunk(data: bytes) -> bytes:
    r"""*data* as one chunk. Empty *data* is the last chunk, ``0\r\n\r\n``: nothing follows it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ChunkedDecoder(Decoder[bytes]):
    r"""
    Takes the chunked coding off a body, sans I/O, and strictly.

    `feed` returns the body's bytes as they come, one piece a chunk where the chunk is
    whole in the input. What RFC 9112 does not allow is a `StreamError`, also where others
    are lenient (a bare LF, blanks after the size): between two readers who disagree,
    requests are smuggled. Not thread-safe.

    Attributes:
        complete: Whether the last chunk and the trailer section were read. An input that
            ends before that is a cut body, never a short one.
        trailers: Trailer fields in order, as (name, value).
        unused_data: What came after the body: the next message on the connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trailers: list[tuple[str, str]] = []
        self.unused_data = b""
        self._buffer = bytearray()
        self._bytes_left = 0
        self._trailer_bytes = 0
        # One function a state; it returns False where it needs more input. Unbound, for a
        # bound method would tie the decoder into a reference cycle.
        self._step: Callable[[ChunkedDecoder, list[bytes]], bool] = ChunkedDecoder._read_size

    @property
    def complete(self) -> bool:
        return self._step is ChunkedDecoder._read_nothing

    def _decode(self, data: bytes, values: list[bytes]) -> None:
        self._buffer += data
        while self._step(self, values):
            pass

    def _read_size(self, _values: list[bytes]) -> bool:
        line = self._take_line()
        if line is None:
            return False
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise StreamError("Malformed chunk size (RFC 9112 7.1).")
        self._bytes_left = int(match[1], 16)
        data_follows = self._bytes_left > 0
        self._step = ChunkedDecoder._read_data if data_follows else ChunkedDecoder._read_trailer
        return True

    def _read_data(self, values: list[bytes]) -> bool:
        piece = self._take(self._bytes_left)
        if piece:
            values.append(piece)
            self._bytes_left -= len(piece)
        if self._bytes_left:
            return False
        self._step = ChunkedDecoder._read_data_end
        return True

    def _read_data_end(self, _values: list[bytes]) -> bool:
        if not b"\r\n".startswith(self._buffer[:2]):
            raise StreamError("A chunk is longer than its size says (RFC 9112 7.1).")
        if len(self._buffer) < len(b"\r\n"):
            return False
        self._take(2)
        self._step = ChunkedDecoder._read_size
        return True

    def _read_trailer(self, _values: list[bytes]) -> bool:
        line = self._take_line()
        if line is None:
            return False
        if not line:
            self._step = ChunkedDecoder._read_nothing
            return True
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise StreamError(f"The trailer section is larger than {MAX_TRAILER_BYTES} bytes.")
        match = _TRAILER_LINE.fullmatch(line)
        if match is None:
            raise StreamError("Malformed trailer field (RFC 9112 7.1.2).")
        self.trailers.append((match[1].decode(), match[2].rstrip(b" \t").decode("latin-1")))
        return True

    def _read_nothing(self, _values: list[bytes]) -> bool:
        self.unused_data += self._take(len(self._buffer))
        return False

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _take_line(self) -> bytes | None:
        """The next line without its CRLF; None where it has not ended."""
        end = self._buffer.find(b"\n", 0, MAX_LINE_BYTES)
        if end >= 0:
            line = self._take(end + 1)
            if line.endswith(b"\r\n"):
                return line[:-2]
            raise StreamError("A line ends in a bare LF (RFC 9112 7.1).")
        if len(self._buffer) >= MAX_LINE_BYTES:
            raise StreamError(f"A line is longer than {MAX_LINE_BYTES} bytes.")
        return None
