"""The bounded hand-off from one producer to one consumer, across threads and hubs."""

from __future__ import annotations

from collections import deque
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..exceptions import SlowReaderError
from . import runtime

if TYPE_CHECKING:
    from .messages import InferenceResponse, Item
    from .runtime import HubTask, Parker

__all__ = ["NOW", "Channel", "parker_here"]

NOW = -inf
"""Until when `receive_batch` waits that does not wait."""

_ITEM_OVERHEAD = 64
"""What an item that is more than plain text is taken to weigh beside its text, bytes."""


def _weight(item: Any) -> int:
    if type(item) is str:
        return _utf8_length(item)
    if isinstance(item, bytes):
        return len(item)
    # Not text alone: a token with log probabilities is mostly not its text.
    text = item if isinstance(item, str) else getattr(item, "text", getattr(item, "arguments", ""))
    return _ITEM_OVERHEAD + _utf8_length(text)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def parker_here(parker: Parker | None) -> Parker:
    """*parker*, if the caller may wait on it. Reused, since each one may set a timer."""
    if parker is None or not parker.is_usable_here():
        return runtime.make_parker()
    return parker


class Channel:
    """
    Carries one stream's items from its worker to its response.

    A deque and two published parkers, no lock: one wake-up serves all the tokens that
    came meanwhile. Producers are serial (the engine sees to it), the consumer is one
    greenlet or thread.

    Args:
        size: Items that may wait.
        max_bytes: UTF-8 bytes that may wait; one larger item passes when the channel is
            empty.
        slow_reader_seconds: How long the consumer may take nothing while it is full.

    Thread safety: `send`, `send_nowait` from the producer, `receive_batch` from the
    consumer, `close` and `wake` from any thread, finalizers included.
    """

    __slots__ = (
        "_batches",
        "_batches_seen",
        "_blocked",
        "_bytes",
        "_consumer",
        "_full_since",
        "_items",
        "_max_bytes",
        "_merge_limit",
        "_outcomes",
        "_producer",
        "_size",
        "_slow_reader_seconds",
        "_waiting",
        "_woken",
        "closed",
    )

    def __init__(
        self,
        *,
        size: int = 256,
        max_bytes: int = 256 * 1024,
        slow_reader_seconds: float = 30.0,
    ) -> None:
        self._items: deque[Item] = deque()
        self._size = size
        self._max_bytes = max_bytes
        # Text is merged in lumps: merging into one ever longer string would be quadratic.
        self._merge_limit = max(1, max_bytes // size)
        self._slow_reader_seconds = slow_reader_seconds
        self._bytes = 0  # Waiting, at most; the producer's alone.
        self._batches = 0  # The consumer's alone.
        self._batches_seen = 0  # The producer's alone.
        self._full_since = inf  # The producer's alone.
        self._consumer: Parker | None = None
        self._producer: Parker | None = None
        self._waiting: Parker | HubTask | None = None  # Published by the consumer.
        self._blocked: Parker | None = None  # Published by the producer.
        self._woken = False
        self.closed = False
        self._outcomes: list[InferenceResponse | BaseException | None] = []

    # The producer's side.

    def send(self, item: Item) -> bool:
        """
        Queue *item*; wait while the channel is full.

        Returns:
            False when the channel is closed: stop generating.

        Raises:
            SlowReaderError: The consumer took nothing for `slow_reader_seconds`.
        """
        weight = _weight(item)
        if self._is_full(weight):
            self._wait_for_room(weight)
        return self._append(item, weight)

    def send_nowait(self, item: Item) -> bool:
        """
        Queue *item* without waiting: over `size`, adjacent plain text is merged.

        Returns:
            False when the channel is closed: stop generating.

        Raises:
            SlowReaderError: More than `max_bytes` wait, or it stayed full for
                `slow_reader_seconds`.
        """
        # The path of most tokens, so it is written out.
        weight = len(item) if type(item) is str and item.isascii() else _weight(item)
        items = self._items
        if self._batches != self._batches_seen:
            self._batches_seen = self._batches
            self._bytes = 0
        waiting = len(items)
        if not waiting or (waiting < self._size and self._bytes + weight <= self._max_bytes):
            if self.closed:
                return False
            self._full_since = inf
            self._bytes += weight
            items.append(item)
            waiter = self._waiting
            if waiter is not None:
                waiter.unpark()
            return True
        if self.closed:
            return False
        if self._bytes + weight > self._max_bytes:
            raise self._slow_reader()
        now = monotonic()
        self._full_since = min(self._full_since, now)
        if now - self._full_since > self._slow_reader_seconds:
            raise self._slow_reader()
        if type(item) is str and self._merge(item):
            self._bytes += weight
            return True
        return self._append(item, weight)

    def _is_full(self, weight: int) -> bool:
        items = self._items
        if self._batches != self._batches_seen:
            # The consumer takes all there is, so it need not weigh what it takes. We may
            # forget one item that was on its way then; the next batch has it.
            self._batches_seen = self._batches
            self._bytes = 0
        waiting = len(items)
        return waiting > 0 and (waiting >= self._size or self._bytes + weight > self._max_bytes)

    def _append(self, item: Item, weight: int) -> bool:
        if self.closed:
            return False
        self._bytes += weight
        self._items.append(item)
        waiting = self._waiting
        if waiting is not None:
            waiting.unpark()
        return True

    def _merge(self, text: str) -> bool:
        """Join *text* to the last waiting item, where that is short plain text."""
        items = self._items
        try:
            last = items[-1]
            if type(last) is not str or len(last) >= self._merge_limit:
                return False
            # In place: what was accepted never leaves the deque but to the consumer. Only
            # this side appends, so if *last* was taken meanwhile, the deque is empty.
            items[-1] = last + text
        except IndexError:
            return False
        return True

    def _wait_for_room(self, weight: int) -> None:
        until = monotonic() + self._slow_reader_seconds
        parker = self._producer = parker_here(self._producer)
        self._blocked = parker
        try:
            while self._is_full(weight) and not self.closed:
                if monotonic() >= until:
                    raise self._slow_reader()
                parker.park(until)
        finally:
            self._blocked = None

    def _slow_reader(self) -> SlowReaderError:
        return SlowReaderError(
            f"The client did not read fast enough: {len(self._items)} items "
            f"({self._bytes} bytes) were waiting."
        )

    # Both sides.

    def close(self, outcome: InferenceResponse | BaseException | None = None) -> None:
        """
        End the stream; what waits is still received. The first close counts.

        Args:
            outcome: How it ended, for the consumer: the response, or the error.
        """
        if not self.closed:
            self._outcomes.append(outcome)  # Atomic; of two at once, the first one stays.
            self.closed = True
        for parker in (self._waiting, self._blocked):
            if parker is not None:
                parker.unpark()

    @property
    def outcome(self) -> InferenceResponse | BaseException | None:
        """What it was closed with."""
        return self._outcomes[0] if self._outcomes else None

    def wake(self) -> None:
        """Have the consumer's `receive_batch` return, if with nothing."""
        self._woken = True
        waiting = self._waiting
        if waiting is not None:
            waiting.unpark()

    # The consumer's side.

    @property
    def is_drained(self) -> bool:
        """Closed, and everything received."""
        return self.closed and not self._items

    @property
    def has_items(self) -> bool:
        return bool(self._items)

    @property
    def needs_attention(self) -> bool:
        """Closed, or woken: there is something to do beside receiving items."""
        return self.closed or self._woken

    def publish(self, waker: Parker | HubTask | None) -> None:
        """
        Have *waker* told, instead of a consumer that waits, when there is something to
        receive; None for nobody. Look for what is there already after that.
        """
        self._waiting = waker

    def receive_batch(self, until: float = inf) -> list[Item]:
        """
        Take all that waits; wait for something, the end, `wake`, or *until* (monotonic).

        Returns:
            Items in order; empty on the other three. Look at `is_drained`.
        """
        items = self._items
        if until > NOW and not (items or self.closed or self._woken):
            parker = self._consumer = parker_here(self._consumer)
            self._waiting = parker
            try:
                # Looked at again: whoever came before the parker was published told nobody.
                while not (items or self.closed or self._woken):
                    parker.park(until)  # Returns at once where *until* has passed.
                    if until <= monotonic():
                        break
            finally:
                self._waiting = None
        self._woken = False
        self._batches += 1  # Before the count of what is there: see `_is_full`.
        # As many as there are now: a fast producer must not hold us here.
        count = len(items)
        batch = [items.popleft()] if count == 1 else [items.popleft() for _ in range(count)]
        blocked = self._blocked
        if blocked is not None:
            blocked.unpark()
        return batch
