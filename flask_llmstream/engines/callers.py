"""Who has how many requests under way, and who may have one more."""

from __future__ import annotations

from collections import OrderedDict, deque
from time import monotonic
from typing import Any

from ..core import runtime
from ..exceptions import ConfigurationError, TooManyRequestsError
from ..stores.owner import owner_of
from .admission import ServiceRate

__all__ = ["Callers", "Place", "caller_of"]


def caller_of(identity: Any) -> bytes | None:
    """
    Whom a limit for each caller counts; None is nobody, whom no such limit holds for.

    Raises:
        ConfigurationError: *identity* is not the same from one request to the next.
    """
    if identity is None:
        return None
    caller = owner_of(identity)
    if caller is None:
        # Not counted would be not limited, without a word.
        raise ConfigurationError(
            f"An identity of type {type(identity).__name__} has no canonical form, so that its "
            "requests cannot be counted. Have the identity_loader return an id."
        )
    return caller


class Place:
    """One request of a caller's that is under way."""

    __slots__ = ("__weakref__", "_callers", "caller", "taken_at")

    def __init__(self, callers: Callers, caller: bytes) -> None:
        self._callers = callers
        self.caller = caller
        self.taken_at = monotonic()

    def give_back(self) -> None:
        """The request is over. Idempotent; from any thread, finalizers included."""
        self._callers.take_back(self)


class Callers:
    """
    Counts the requests that each caller has under way.

    Thread safety: every method, from any thread or greenlet; `take_back` from a finalizer,
    too. In a forked child nobody has any.
    """

    def __init__(self) -> None:
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()  # Guards all of these but for appending.
        self._places: dict[bytes, OrderedDict[Place, None]] = {}
        self._returned: deque[tuple[Place, float]] = deque()
        self._rate = ServiceRate()

    def enter(self, caller: bytes, *, limit: int) -> Place:
        """
        Count one more request of *caller*, to be given back when it is over.

        Args:
            caller: See `caller_of`.
            limit: As many may be under way at a time, ≥ 1.

        Raises:
            TooManyRequestsError: So many are; `retry_after` is when the oldest of them will
                be over, if it takes as long as others did.
        """
        with self._lock:
            self._clear()
            places = self._places.get(caller)
            if places is None or len(places) < limit:
                place = Place(self, caller)
                self._places.setdefault(caller, OrderedDict())[place] = None
                return place
            oldest = next(iter(places))
            retry_after = self._rate.seconds_left(monotonic() - oldest.taken_at)
        raise TooManyRequestsError(
            f"You have {limit} requests under way, as many as you may have at a time.",
            retry_after=retry_after,
        )

    def take_back(self, place: Place) -> None:
        """*place* is free; no effect where it was already."""
        # A finalizer may be here while this very thread is inside the lock. Then it is left
        # to who comes next, and nobody is counted before these are cleared.
        self._returned.append((place, monotonic()))
        if self._lock.acquire(False):
            try:
                self._clear()
            finally:
                self._lock.release()

    def _clear(self) -> None:
        """Under the lock: count those no more that are over."""
        while self._returned:
            place, returned_at = self._returned.popleft()
            places = self._places.get(place.caller)
            if places is not None and place in places:
                del places[place]
                self._rate.add(returned_at - place.taken_at)
                if not places:
                    del self._places[place.caller]
