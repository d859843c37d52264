"""Finding stop strings in a stream of text, without ever showing a piece of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["StopFilter"]


class StopFilter:
    """
    Holds back only a suffix that is a proper prefix of a stop string.

    Args:
        stops: Strings that end the text, none of them empty. The one that is complete
            first counts; of two complete at once, the one that starts first.

    Attributes:
        matched: The stop string that was met; None so far.

    Thread safety: none; one producer.
    """

    __slots__ = ("_held", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("A stop string must not be empty.")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.matched: str | None = None

    @property
    def is_holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def feed(self, text: str) -> str:
        """Add *text*; returns what may be shown. After a match, nothing."""
        if self.matched is not None:
            return ""
        # Character by character only where it matters: which match is complete first.
        text = self._held + text
        first_end = len(text) + 1
        start = 0
        for stop in self._stops:
            found = text.find(stop)
            if found >= 0 and (found + len(stop), found) < (first_end, start):
                first_end, start, self.matched = found + len(stop), found, stop
        if self.matched is not None:
            self._held = ""
            return text[:start]
        held = self._held_length(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text has ended: what was held back was no stop string."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[-length:]
            if any(len(stop) > length and stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
