"""Several channels that one consumer reads as one."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from .channel import NOW, parker_here
from .messages import Token, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .channel import Channel
    from .messages import InferenceResponse, Item
    from .runtime import HubTask, Parker

__all__ = ["ChannelGroup"]


class ChannelGroup:
    """
    The consumer's end of several runs' channels, which answer one request together.

    Its batches have what waits in all of them, so each run's producer is held up by its own
    channel alone. Choices are numbered through: those of a channel come after those of the
    channels before it. `Usage` stays behind, since each run tells only its own.

    Args:
        channels: In the order of their choices. Nobody else receives from them.
        choices: How many each of them has.

    Thread safety: as for `Channel`: `receive_batch` from the one consumer, `close` and
    `wake` from any thread, finalizers included.
    """

    __slots__ = ("_channels", "_consumer", "_outcomes", "_waiting", "_woken", "closed")

    def __init__(self, channels: Sequence[Channel], choices: Sequence[int]) -> None:
        starts = accumulate(choices[:-1], initial=0)
        self._channels = tuple(zip(channels, starts, strict=True))
        self._consumer: Parker | None = None
        self._waiting: Parker | HubTask | None = None  # Published here and in every channel.
        self._woken = False
        self.closed = False
        self._outcomes: list[InferenceResponse | BaseException | None] = []

    def close(self, outcome: InferenceResponse | BaseException | None = None) -> None:
        """End the stream; see `Channel.close`."""
        if not self.closed:
            self._outcomes.append(outcome)
            # Before we are: once the consumer sees our end, none of them takes any more.
            for channel, _ in self._channels:
                channel.close(outcome)
            self.closed = True
        waiting = self._waiting
        if waiting is not None:
            waiting.unpark()

    @property
    def outcome(self) -> InferenceResponse | BaseException | None:
        """What it was closed with."""
        return self._outcomes[0] if self._outcomes else None

    def wake(self) -> None:
        """Have `receive_batch` return, if with nothing."""
        self._woken = True
        waiting = self._waiting
        if waiting is not None:
            waiting.unpark()

    @property
    def is_drained(self) -> bool:
        """Closed, and everything received."""
        return self.closed and not self.has_items

    @property
    def has_items(self) -> bool:
        """Whether `receive_batch` would return at once, with something."""
        return any(channel.has_items for channel, _ in self._channels)

    @property
    def needs_attention(self) -> bool:
        """Closed, or woken: there is something to do beside receiving items."""
        return self.closed or self._woken

    def publish(self, waker: Parker | HubTask | None) -> None:
        """Have *waker* told when there is something to receive; see `Channel.publish`."""
        self._waiting = waker
        for channel, _ in self._channels:
            channel.publish(waker)

    def receive_batch(self, until: float = inf) -> list[Item]:
        """Take all that waits; see `Channel.receive_batch`."""
        if not (self.has_items or self.needs_attention):
            parker = self._consumer = parker_here(self._consumer)
            self.publish(parker)
            try:
                while not (self.has_items or self.needs_attention) and monotonic() < until:
                    parker.park(until)
            finally:
                self.publish(None)
        self._woken = False
        batch: list[Item] = []
        for channel, start in self._channels:
            if channel.has_items:
                batch += _numbered(channel.receive_batch(NOW), start)
        return batch


def _numbered(items: list[Item], start: int) -> Iterator[Item]:
    """*items* with their choices counted from *start*."""
    for item in items:
        if isinstance(item, (bytes, Usage)):
            continue
        if not start:
            yield item
        elif isinstance(item, Token):
            yield Token(
                item,
                logprob=item.logprob,
                top_logprobs=item.top_logprobs,
                choice=item.choice + start,
            )
        elif isinstance(item, str):
            yield Token(str.__str__(item), choice=start)
        else:
            yield replace(item, choice=item.choice + start)
