"""The response's end of a stream: what comes through the channel, within the budgets."""

from __future__ import annotations

from math import inf
from time import monotonic
from typing import TYPE_CHECKING, cast

from .core.channel import NOW
from .exceptions import DeadlineExceededError, FirstTokenTimeoutError, IdleTimeoutError

if TYPE_CHECKING:
    from .core.channel import Channel
    from .core.channel_group import ChannelGroup
    from .core.deadlines import Budgets
    from .core.messages import InferenceResponse, Item
    from .engines.handle import InferenceHandle
    from .exceptions import LLMStreamError

__all__ = ["Reception"]


class Reception:
    """
    The response's end of one stream: items in batches, within the budgets.

    It is where a stuck backend cannot hold up the answer: every wait here ends at the
    next deadline, and the engine is told.

    Args:
        channel: Closed with the handle's outcome once it resolves.
        handle: Of the submitted request.
        budgets: Of the request.
        arrived_at: Monotonic; the budgets' start.

    Thread safety: one consumer; `leave` from any thread, finalizers included.
    """

    __slots__ = (
        "__weakref__",
        "_has_item",
        "_item_at",
        "_total_at",
        "budgets",
        "channel",
        "handle",
    )

    def __init__(
        self,
        channel: Channel | ChannelGroup,
        handle: InferenceHandle,
        *,
        budgets: Budgets,
        arrived_at: float,
    ) -> None:
        self.channel = channel
        self.handle = handle
        self.budgets = budgets
        self._total_at = arrived_at + budgets.total_seconds
        self._item_at = arrived_at + budgets.first_token_seconds
        self._has_item = False
        handle.add_done_callback(self._on_done)

    def _on_done(self) -> None:
        self.channel.close(self.handle.outcome)

    @property
    def outcome(self) -> InferenceResponse | LLMStreamError | None:
        """How it ended, once everything was received; None before."""
        if not self.channel.is_drained:
            return None
        # Whoever ends the request in the same moment may not have told the handle yet.
        return self.handle.outcome or cast("LLMStreamError", self.channel.outcome)

    @property
    def due_at(self) -> float:
        """When the next budget runs out, monotonic."""
        return min(self._total_at, self._item_at)

    def receive(self, until: float = inf) -> list[Item]:
        """What there is; waits at most until *until*. Empty at the end, too."""
        batch = self.channel.receive_batch(min(until, self.due_at))
        if batch:
            self._has_item = True
            self._item_at = monotonic() + self.budgets.idle_seconds
        elif not self.channel.closed:
            self._check_budgets()
        return batch

    def take(self, now: float) -> list[Item]:
        """What there is at *now* (monotonic), and there is something; never waits."""
        self._has_item = True
        self._item_at = now + self.budgets.idle_seconds
        return self.channel.receive_batch(NOW)

    def _check_budgets(self) -> None:
        now = monotonic()
        if now >= self._total_at:
            self.leave(DeadlineExceededError("The request's deadline passed."))
        elif now < self._item_at:
            return
        elif self._has_item:
            self.leave(
                IdleTimeoutError(f"No token came for {self.budgets.idle_seconds:g} seconds.")
            )
        else:
            self.leave(
                FirstTokenTimeoutError(
                    f"No token came within {self.budgets.first_token_seconds:g} seconds."
                )
            )

    def leave(self, reason: LLMStreamError) -> None:
        """End the request, for *reason*, unless it has ended: the engine first, then us."""
        self.handle.cancel(reason)
        # A handle resolves at once, so this only matters to a producer that waits for room.
        self.channel.close(reason)
