"""How a consumer comes back to a stream that broke: where it was, when, and how often."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from .core import runtime
from .exceptions import IncompleteStreamError, LLMStreamError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .framing import ServerSentEvent, SSEDecoder

__all__ = ["Backoff", "Reconnection"]

_logger = logging.getLogger("flask_llmstream.client")

# An id of this package's own streams, whose events are numbered.
_OWN_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,15})")

# The statuses below 500 after which the same request may have another answer: Request
# Timeout, Too Early (RFC 8470) and Too Many Requests (RFC 6585).
_PASSING_STATUSES = {408, 425, 429}
# RFC 9110 10.2.3. A date would need both clocks to be right.
_SECONDS = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class Backoff:
    """
    When a `StreamReader` tries to come back, and when it gives up.

    Each wait is what the server asks for (``Retry-After``, or else the stream's own
    ``retry:``) and a random part of a span that doubles from try to try, so that a crowd
    that lost its server does not come back as one. A try makes progress when a new event
    comes; then the count and the span begin anew.

    Args:
        first_seconds: The span before the first try.
        longest_seconds: What the span grows to at most.
        attempts: Most tries in a row that make no progress.
        total_seconds: Most time without the stream, of all breaks together. No wait is
            begun that would go past it; what the transport waits for is not interrupted.
        sleep: Waits so many seconds.
        clock: Monotonic seconds.
        random: A number from 0 to 1.
    """

    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    attempts: int = 6
    total_seconds: float = 300.0
    sleep: Callable[[float], object] = runtime.sleep
    clock: Callable[[], float] = monotonic
    random: Callable[[], float] = random.random


class Reconnection:
    """
    One reader's way back. Not thread-safe.

    Args:
        reconnect: See `StreamReader`.
        backoff: When to try.
    """

    def __init__(
        self, reconnect: Callable[[str], Iterable[bytes] | None], backoff: Backoff
    ) -> None:
        self._reconnect = reconnect
        self._backoff = backoff
        self._decoder: SSEDecoder | None = None
        # What the server asks everybody to wait: the field ``retry``.
        self._retry_seconds = 0.0
        self._last_id = ""
        # Whether the last event had an id of its own: behind one without it, nobody can say
        # where to go on.
        self._has_place = False
        # Whether the stream was opened again and no new event has come since.
        self._is_returning = False
        self._attempts = 0
        self._span = backoff.first_seconds
        self._away_seconds = 0.0
        self._broke_at: float | None = None

    def follow(self, decoder: SSEDecoder) -> None:
        """The stream is read through *decoder* from now on."""
        self._decoder = decoder

    def has_own_id(self, event: ServerSentEvent) -> bool:
        """Whether *event* was sent with an id; one without it shows the last one's."""
        return event.id not in ("", self._last_id)

    def advance(self, event: ServerSentEvent) -> bool:
        """
        Take note of *event*. False where it was there before the stream broke.

        Raises:
            IncompleteStreamError: It does not go on where the stream broke.
        """
        if self._is_returning:
            steps = _steps(self._last_id, event.id)
            if steps is not None and steps <= 0:
                return False
            if steps != 1:
                raise IncompleteStreamError("The server did not resume the stream where it broke.")
            self._is_returning = False
        self._has_place = self.has_own_id(event)
        self._last_id = event.id
        if self._broke_at is not None:
            self._away_seconds += self._backoff.clock() - self._broke_at
            self._broke_at = None
            self._attempts = 0
            self._span = self._backoff.first_seconds
        return True

    def open_again(self, error: LLMStreamError) -> Iterable[bytes]:
        """
        The rest of the stream that *error* has ended, once it can be had.

        Raises:
            LLMStreamError: *error* itself, where there is no way back or none was found in
                time; what stood in the way is its cause.
        """
        if not self._has_place:
            raise error
        self._is_returning = True
        if self._decoder is not None and self._decoder.retry_milliseconds is not None:
            self._retry_seconds = self._decoder.retry_milliseconds / 1000
        obstacle: BaseException | None = error.__cause__
        while True:
            self._wait(error, obstacle)
            try:
                chunks = self._reconnect(self._last_id)
            except Exception as exc:
                obstacle = exc
                continue
            if chunks is None:
                raise error
            return chunks

    def _wait(self, error: LLMStreamError, obstacle: BaseException | None) -> None:
        backoff, now = self._backoff, self._backoff.clock()
        if self._broke_at is None:
            self._broke_at = now
        asked = _retry_after(obstacle)
        if asked is None:
            asked = self._retry_seconds
        pause = asked + backoff.random() * self._span
        left = backoff.total_seconds - self._away_seconds - (now - self._broke_at)
        if self._attempts >= backoff.attempts or pause > left or _is_final(obstacle):
            raise error from obstacle
        self._attempts += 1
        self._span = min(2 * self._span, backoff.longest_seconds)
        # Only the class: a text may quote the answer, or a URL with a key.
        runtime.log(
            _logger,
            logging.INFO,
            "resuming a stream in %.1f s, attempt %d (%s)",
            pause,
            self._attempts,
            type(obstacle or error).__name__,
        )
        backoff.sleep(pause)


def _steps(last_id: str, id: str) -> int | None:
    """
    How many events after the one with *last_id* that with *id* comes; None where it is in
    another stream. How another server counts is its own affair, but not that it counts.
    """
    if id == last_id:
        return 0
    last, new = _OWN_ID.fullmatch(last_id), _OWN_ID.fullmatch(id)
    if last is None:
        return 1 if id else None
    if new is None or new[1] != last[1]:
        return None
    return int(new[2]) - int(last[2])


def _is_final(obstacle: BaseException | None) -> bool:
    """Whether *obstacle* will be there the next time, too."""
    if isinstance(obstacle, LLMStreamError):
        return not obstacle.retryable
    status = getattr(_response_of(obstacle), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUSES


def _retry_after(obstacle: BaseException | None) -> float | None:
    """How many seconds the server asks to wait; None where it does not say."""
    if isinstance(obstacle, LLMStreamError):
        return obstacle.retry_after
    headers = getattr(_response_of(obstacle), "headers", None)
    value = headers.get("Retry-After") if isinstance(headers, Mapping) else None
    return float(value) if value and _SECONDS.fullmatch(value) else None


def _response_of(obstacle: BaseException | None) -> object:
    """What httpx's and requests' errors of a status carry."""
    return getattr(obstacle, "response", None)
