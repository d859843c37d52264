"""Replay buffers in this process."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from ..core import runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.clock import Timer

__all__ = ["MemoryStore"]

_STREAM_OVERHEAD = 512
_RECORD_OVERHEAD = 56
"""What a stream and a record take beside their bytes."""


class _Buffer:
    __slots__ = ("records", "size", "timer")

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.size = _STREAM_OVERHEAD
        self.timer: Timer | None = None


class MemoryStore:
    """
    The `Store` of one process: bounded, and gone with it.

    With several workers a client must come back to the same one (sticky sessions), or
    finds nothing.

    Args:
        max_bytes: Most that all streams take together. Over it, the streams that nothing
            was appended to for the longest time are forgotten, whole.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(self, *, max_bytes: int = 64 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()  # Guards what is below.
        self._buffers: OrderedDict[str, _Buffer] = OrderedDict()
        self._bytes = 0

    @property
    def bytes_held(self) -> int:
        """What all streams take."""
        return self._bytes

    def append(self, stream_id: str, position: int, records: Sequence[bytes]) -> bool:
        """See `Store.append`."""
        size = sum(map(len, records)) + _RECORD_OVERHEAD * len(records)
        with self._lock:
            buffer = self._buffers.get(stream_id)
            if buffer is None and position == 0:
                buffer = self._buffers[stream_id] = _Buffer()
                self._bytes += buffer.size
            if buffer is None or len(buffer.records) != position:
                return False
            buffer.records.extend(records)
            buffer.size += size
            self._bytes += size
            self._buffers.move_to_end(stream_id)
            while self._bytes > self._max_bytes:
                _, oldest = self._buffers.popitem(last=False)
                self._bytes -= oldest.size
                if oldest.timer is not None:
                    oldest.timer.cancel()  # It would keep the records until their time.
            return stream_id in self._buffers

    def read_after(self, stream_id: str, position: int) -> list[bytes] | None:
        """See `Store.read_after`."""
        with self._lock:
            buffer = self._buffers.get(stream_id)
            return None if buffer is None else buffer.records[position + 1 :]

    def expire(self, stream_id: str, seconds: float) -> None:
        """See `Store.expire`."""
        buffer = self._buffers.get(stream_id)
        if buffer is None:
            return
        timer = runtime.clock.call_at(
            monotonic() + seconds, partial(self._forget, stream_id, buffer)
        )
        previous, buffer.timer = buffer.timer, timer
        if previous is not None:
            previous.cancel()
        if self._buffers.get(stream_id) is not buffer:
            timer.cancel()  # It made room in the meantime.

    def _forget(self, stream_id: str, buffer: _Buffer) -> None:
        with self._lock:
            if self._buffers.get(stream_id) is buffer:
                del self._buffers[stream_id]
                self._bytes -= buffer.size
