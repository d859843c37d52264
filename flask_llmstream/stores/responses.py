"""Whole responses, kept for who asks for them again or goes on from them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from ..core import runtime

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KeptResponse", "ResponseStore", "Turn"]

_RESPONSE_OVERHEAD = 1024
"""What a response takes beside its bytes."""


class Turn:
    """
    The items of one question and its answer, as JSON.

    All the conversations that go on from it share it.
    """

    __slots__ = ("items", "uses")

    def __init__(self, items: bytes) -> None:
        self.items = items
        self.uses = 0  # The store's: how many of its responses have it.


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """
    One response, as it is kept.

    Args:
        id: Unguessable.
        owner: Whose it is; see `owner_of`.
        document: The response, as JSON.
        turns: The conversation up to its end; it is the last one.
    """

    id: str
    owner: bytes
    document: bytes
    turns: tuple[Turn, ...]


class ResponseStore:
    """
    Keeps the responses of one process: bounded, and gone with it.

    With several workers a client must come back to the same one (sticky sessions), or
    finds nothing. A conversation stays whole when an earlier response of it is forgotten.

    Args:
        max_responses: Most that are kept; over it, those that nobody asked for the longest
            are forgotten.
        max_bytes: Most that they take together; likewise.
        keep_seconds: How long each is kept after it was last asked for.
        clock: Monotonic, in seconds.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(
        self,
        *,
        max_responses: int,
        max_bytes: int,
        keep_seconds: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()  # Guards what is below, and `Turn.uses`.
        self._kept: OrderedDict[str, tuple[float, KeptResponse]] = OrderedDict()
        self._bytes = 0

    @property
    def bytes_held(self) -> int:
        """What all responses take."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, response: KeptResponse) -> None:
        """Keep *response*; others, or itself where it is too large, may have to go for it."""
        expires_at = self._clock() + self._keep_seconds
        with self._lock:
            if response.id in self._kept:
                self._forget(response.id)
            self._kept[response.id] = (expires_at, response)
            self._bytes += _RESPONSE_OVERHEAD + len(response.document)
            for turn in response.turns:
                if not turn.uses:
                    self._bytes += len(turn.items)
                turn.uses += 1
            while len(self._kept) > self._max_responses or self._bytes > self._max_bytes:
                self._forget(next(iter(self._kept)))
            self._expire()

    def get(self, id: str, owner: bytes) -> KeptResponse | None:
        """The response, if it is *owner*'s and not forgotten."""
        with self._lock:
            return self._find(id, owner)

    def delete(self, id: str, owner: bytes) -> bool:
        """Forget the response; False where `get` would not find it."""
        with self._lock:
            if self._find(id, owner) is None:
                return False
            self._forget(id)
            return True

    def _find(self, id: str, owner: bytes) -> KeptResponse | None:
        self._expire()
        _, response = self._kept.get(id, (0.0, None))
        if response is None or response.owner != owner:
            return None
        # A conversation may refer to its first item as long as it goes on.
        self._kept[id] = (self._clock() + self._keep_seconds, response)
        self._kept.move_to_end(id)
        return response

    def _expire(self) -> None:
        # Each is kept equally long, so that they expire in the order in which they are here.
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._forget(next(iter(self._kept)))

    def _forget(self, id: str) -> None:
        _, response = self._kept.pop(id)
        self._bytes -= _RESPONSE_OVERHEAD + len(response.document)
        for turn in response.turns:
            turn.uses -= 1
            if not turn.uses:
                self._bytes -= len(turn.items)
