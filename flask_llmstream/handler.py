"""The native event format, for those who write a stream's bytes themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core.messages import Token
from .dialects.encoding import encode
from .framing import SSE, encode_chunk

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.messages import Item

__all__ = ["StreamingHandler"]


class StreamingHandler:
    """
    Static helpers that turn tokens into bytes.

    Thread safety: stateless and reentrant. A callback of `make_stream_callback` has a
    counter of its own; like every stream callback, it is called serially.
    """

    @staticmethod
    def format_sse_event(token: str, request_id: str, index: int, done: bool = False) -> bytes:
        r"""
        ``data: {"id":…,"token":…,"index":…,"done":false}\n\n``, one SSE event.

        The JSON is valid and on one line for any *token*. A lone surrogate, which UTF-8
        cannot carry, travels as its ``\u`` escape (RFC 8259 8.2).
        """
        return SSE.frame(
            encode(
                {
                    "id": request_id,
                    # The encoder takes exact strings, and a `Token` is a subclass. Not
                    # str(token), which would make text of anything.
                    "token": str.__str__(token),
                    "index": index,
                    "done": done,
                }
            )
        )

    @staticmethod
    def format_done_event(request_id: str) -> bytes:  # noqa: ARG004 - the marker has no room for it
        r"""``data: [DONE]\n\n``, the terminal marker. Nothing may follow it."""
        return SSE.frame(b"[DONE]")

    @staticmethod
    def format_chunked_data(data: bytes | str) -> bytes:
        r"""
        ``<hex>\r\n<data>\r\n``, one chunk of RFC 9112 7.1; text is encoded as UTF-8.

        Empty *data* gives the last chunk, ``0\r\n\r\n``. Not for a WSGI response, whose
        server does this itself (PEP 3333).
        """
        return encode_chunk(data.encode() if isinstance(data, str) else data)

    @staticmethod
    def make_stream_callback(
        sink: Callable[[bytes], Any], request_id: str
    ) -> Callable[[Item], bool]:
        """
        A stream callback that gives *sink* one event for each token, numbered from 0.

        What has no text of choice 0 gives no event, takes no number and goes on: an empty
        token, one of another choice, reasoning, tool calls, usage, finish.

        The callback says True for "go on". It says False where *sink* returned False
        itself; other results, None above all, mean nothing, so that ``list.append`` and
        ``queue.put`` are sinks. What *sink* raises passes through to the backend and ends
        its run: it is a fault, not a wish to stop. A number is used before *sink* is
        called and never again, whatever *sink* does.

        Raises:
            ValueError: *sink* is missing or cannot be called.
        """
        if not callable(sink):
            raise ValueError(  # noqa: TRY004 - missing or useless, it is one error to the caller
                f"sink must be a callable that takes bytes, not {sink!r}"
            )
        next_index = 0

        def stream_callback(item: Item) -> bool:
            nonlocal next_index
            if isinstance(item, bytes):
                raise TypeError("stream_callback takes text; decode bytes incrementally first")
            if not isinstance(item, str) or not item:
                return True
            if isinstance(item, Token) and item.choice:
                return True
            index = next_index
            next_index += 1
            return sink(StreamingHandler.format_sse_event(item, request_id, index)) is not False

        return stream_callback
