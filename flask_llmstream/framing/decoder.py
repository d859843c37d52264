"""What the decoders share: where faults surface, and where lines end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

from ..exceptions import StreamError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MAX_EVENT_BYTES", "Decoder", "LineSplitter"]

# Whole answers travel as one event (a Responses API snapshot, an image in base64), so
# it is far above a token's size and far below what a hostile peer would need.
MAX_EVENT_BYTES = 1024 * 1024

T = TypeVar("T")


class Decoder(ABC, Generic[T]):
    """
    Bytes in, whole values out, the same for every split of the bytes.

    Hence a fault never swallows the values before it: where both are in one piece of
    input, `feed` returns the values, and the next call raises. A decoder that has
    failed stays failed. Not thread-safe.
    """

    def __init__(self) -> None:
        self._fault: StreamError | None = None

    def feed(self, data: bytes) -> list[T]:
        """
        Take the next bytes, return the values that they complete.

        Feed ``b""`` at the end of the input, so that a fault held back is not lost.

        Raises:
            StreamError: The bytes break the framing, or a limit.
        """
        if self._fault is not None:
            raise self._fault
        values: list[T] = []
        try:
            self._decode(data, values)
        except StreamError as fault:
            self._fault = fault
            if not values:
                raise
        return values

    @abstractmethod
    def _decode(self, data: bytes, values: list[T]) -> None:
        """Append to *values* what *data* completes; raise where it breaks the framing."""


class LineSplitter:
    """
    Splits bytes into lines that end at LF, CRLF or CR, in any split of the bytes.

    That is how WHATWG HTML 9.2.6 ends lines. In UTF-8 no longer character holds these
    bytes, so lines can be split first and decoded after.

    Attributes:
        unfinished_bytes: Length of the line that has not ended yet.
    """

    def __init__(self) -> None:
        self.unfinished_bytes = 0
        # Joined when the line ends: appending to one `bytes` would copy it every time.
        self._unfinished: list[bytes] = []
        self._after_cr = False

    def feed(self, data: bytes) -> Iterable[bytes]:
        """The lines that *data* ends, without their terminators."""
        if not data:
            return ()
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]  # The rest of a CRLF, whose line ended at the CR.
        self._after_cr = data.endswith(b"\r")
        lines = data.splitlines()
        rest = b"" if data.endswith((b"\n", b"\r")) or not data else lines.pop()
        if lines and self._unfinished:
            lines[0] = b"".join((*self._unfinished, lines[0]))
            self._unfinished.clear()
            self.unfinished_bytes = 0
        if rest:
            self._unfinished.append(rest)
            self.unfinished_bytes += len(rest)
        return lines
