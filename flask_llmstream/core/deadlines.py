"""Deadlines on the monotonic clock, and the budgets that make them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import monotonic

__all__ = ["Budgets", "Deadline"]


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """
    A moment on this process's monotonic clock; it does not travel between machines.

    Args:
        at: Seconds on `time.monotonic`'s scale; infinity is never.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment *seconds* from now; zero or less has passed already."""
        return cls(monotonic() + seconds)

    def remaining_seconds(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - monotonic())

    @property
    def expired(self) -> bool:
        return monotonic() >= self.at


@dataclass(frozen=True, slots=True)
class Budgets:
    """
    How long an answer may take, in seconds; infinity means no limit.

    Args:
        total_seconds: From arrival to the last byte, queueing included.
        first_token_seconds: From arrival to the first item.
        idle_seconds: Between one item and the next.
    """

    total_seconds: float = math.inf
    first_token_seconds: float = math.inf
    idle_seconds: float = math.inf

    def shortened(self, other: Budgets) -> Budgets:
        """Each budget the smaller of the two."""
        return Budgets(
            min(self.total_seconds, other.total_seconds),
            min(self.first_token_seconds, other.first_token_seconds),
            min(self.idle_seconds, other.idle_seconds),
        )
