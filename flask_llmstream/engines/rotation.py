"""Who is next among a model's backends, and who is left out for a while."""

from __future__ import annotations

from enum import Enum
from math import inf
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..core import runtime
from ..exceptions import ConfigurationError
from .asynchronous import DEFAULT_MAX_CONCURRENCY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..typing import WorkerKind

__all__ = ["Attempt", "LoadBalanceStrategy", "Member", "Rotation"]

_LONGEST_OUT_SECONDS = 60.0
_RESPONSE_TIME_WEIGHT = 0.2
_SHORTEST_SECONDS = 1e-6
"""Below this response times are alike: a clock may stand still between two looks."""


class LoadBalanceStrategy(Enum):
    """Which of a model's backends gets the next request."""

    LEAST_LOADED = "least_loaded"
    """The one with the fewest calls under way; of several, the one that waited longest."""
    ROUND_ROBIN = "round_robin"
    """Each in its turn."""
    RESPONSE_TIME_WEIGHTED = "response_time_weighted"
    """In proportion to how fast each begins to answer, and to how few calls it has."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        allowed = ", ".join(repr(strategy.value) for strategy in cls)
        raise ConfigurationError(f"load_balance must be one of {allowed}, not {value!r}.")


class Member:
    """
    One backend, and what is known of it.

    Attributes:
        under_way: Its calls. Taking one out of a set is atomic, so that it needs no lock
            and a finalizer may do it, any number of times.
        failures: In a row; 0 is a backend that is in.
        retry_at: Monotonic: when one that is out is asked again.
        seconds: How long it takes to its first item, as an exponential average.
        turn: The number of its latest call.
        credit: What RESPONSE_TIME_WEIGHTED owes it, in calls.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.takes_callbacks = callable(getattr(backend, "submit", None))
        if not self.takes_callbacks and not callable(getattr(backend, "generate", None)):
            raise ConfigurationError(
                f"{type(backend).__name__} is no backend: it has neither generate() nor submit()."
            )
        self.worker: WorkerKind = getattr(backend, "worker", "thread")
        self.takes_batches = callable(getattr(backend, "generate_batch", None))
        self.supports: Iterable[str] | None = getattr(backend, "supports", None)
        limit: int | None = getattr(backend, "max_concurrency", None)
        self.limit: float = limit or (DEFAULT_MAX_CONCURRENCY if self.takes_callbacks else inf)
        self.under_way: set[Attempt] = set()
        self.failures = 0
        self.retry_at = 0.0
        self.seconds: float | None = None
        self.turn = 0
        self.credit = 0.0

    @property
    def has_room(self) -> bool:
        return len(self.under_way) < self.limit


class Attempt:
    """
    One call of one backend.

    Attributes:
        is_probe: It asks a backend that is out, and is still without a verdict.
        has_emitted: Something came: from here on nobody else may be asked.
    """

    __slots__ = ("has_emitted", "is_probe", "member", "started_at")

    def __init__(self, member: Member, *, is_probe: bool, started_at: float) -> None:
        self.member = member
        self.is_probe = is_probe
        self.started_at = started_at
        self.has_emitted = False

    @property
    def is_open(self) -> bool:
        return self in self.member.under_way

    def close(self) -> None:
        """It is over. Any number of times, from any thread, finalizers included."""
        self.member.under_way.discard(self)
        if self.is_probe:
            # Without a verdict (cancelled, say): the next request is the probe.
            self.member.retry_at = self.started_at

    def __iter__(self) -> Iterator[Any]:
        # What a stream's chain asks for more when the answer's items have run out.
        self.close()
        return iter(())


class Rotation:
    """
    Picks members, and keeps book of how they fare.

    A member that fails is out: it is probed with one request at a time, after 1 s to 60 s,
    twice as long each time. Where all are out, the one whose time comes first is picked
    anyway.

    Args:
        strategy: Who is next.

    Thread safety: every method, from any thread or greenlet, finalizers aside.
    """

    def __init__(self, strategy: LoadBalanceStrategy) -> None:
        self.strategy = strategy
        self.members = tuple[Member, ...]()
        self._turns = 0
        self._after_fork()
        runtime.after_fork(self)

    def _after_fork(self) -> None:
        self._lock = runtime.allocate_lock()  # Guards the members, and what is known of each.
        for member in self.members:
            member.under_way = set()

    def add(self, member: Member) -> None:
        """
        Pick *member*, too; no effect where its backend is there already.

        Raises:
            ConfigurationError: It does not go with the others.
        """
        name = type(member.backend).__name__
        with self._lock:
            for other in self.members:
                if other.backend is member.backend:
                    return
                if other.takes_callbacks != member.takes_callbacks:
                    raise ConfigurationError(
                        "One model's backends must all be callback backends, or none: "
                        f"{name} is not like the others."
                    )
                if other.worker != member.worker:
                    raise ConfigurationError(
                        f"One model's backends must all have one worker kind: "
                        f"{other.worker!r}, not {member.worker!r} as {name} has."
                    )
            self.members = (*self.members, member)

    def remove(self, backend: Any) -> None:
        """
        Pick *backend* no more.

        Raises:
            ConfigurationError: It is not there, or the only one.
        """
        with self._lock:
            members = tuple(each for each in self.members if each.backend is not backend)
            if members == self.members:
                raise ConfigurationError(f"{type(backend).__name__} is none of these backends.")
            if not members:
                raise ConfigurationError(
                    "The only backend of a model cannot be removed. Unregister the model."
                )
            self.members = members

    def pick(self, tried: Sequence[Member], *, in_batches: bool = False) -> Attempt | None:
        """Open an attempt at a member that has not been *tried*; None where there is none."""
        now = monotonic()
        with self._lock:
            members = [
                member
                for member in self.members
                if member not in tried and (member.takes_batches or not in_batches)
            ]
            if not members:
                return None
            member = _due(members, now)
            is_probe = member is not None
            if member is None:
                member = self._choose(members)
            else:
                # One probe at a time, unless it says nothing for so long.
                member.retry_at = now + _LONGEST_OUT_SECONDS
            self._turns += 1
            member.turn = self._turns
            attempt = Attempt(member, is_probe=is_probe, started_at=now)
            member.under_way.add(attempt)
        return attempt

    def _choose(self, members: Sequence[Member]) -> Member:
        healthy = [member for member in members if not member.failures]
        if not healthy:
            return min(members, key=_retry_at)
        members = [member for member in healthy if member.has_room] or healthy
        if self.strategy is LoadBalanceStrategy.LEAST_LOADED:
            return min(members, key=lambda member: (len(member.under_way), member.turn))
        if self.strategy is LoadBalanceStrategy.ROUND_ROBIN:
            return min(members, key=lambda member: member.turn)
        return _choose_by_weight(members)

    def succeed(self, attempt: Attempt) -> None:
        """The first item came, or the whole answer."""
        seconds = monotonic() - attempt.started_at
        attempt.has_emitted = True
        attempt.is_probe = False
        member = attempt.member
        with self._lock:
            member.failures = 0
            before = seconds if member.seconds is None else member.seconds
            member.seconds = before + _RESPONSE_TIME_WEIGHT * (seconds - before)

    def fail(self, attempt: Attempt) -> None:
        """Take the backend out, for longer each time."""
        now = monotonic()
        member = attempt.member
        is_probe, attempt.is_probe = attempt.is_probe, False
        with self._lock:
            # Those that were under way as it went out say nothing new.
            if is_probe or not member.failures:
                member.failures += 1
                longest = min(_LONGEST_OUT_SECONDS, 2.0**member.failures)
                member.retry_at = now + uniform(longest / 2, longest)

    def statistics(self) -> list[dict[str, Any]]:
        """For each member: its ``name``, calls ``under_way``, ``failures``, ``seconds``."""
        with self._lock:
            return [
                {
                    "name": type(member.backend).__name__,
                    "under_way": len(member.under_way),
                    "failures": member.failures,
                    "seconds": member.seconds,
                }
                for member in self.members
            ]


def _retry_at(member: Member) -> float:
    return member.retry_at


def _due(members: Iterable[Member], now: float) -> Member | None:
    """The member that is out and is to be probed."""
    due = [member for member in members if member.failures and member.retry_at <= now]
    return min(due, key=_retry_at, default=None)


def _choose_by_weight(members: Sequence[Member]) -> Member:
    """
    Smooth weighted round robin: all get their share, in small portions, so that also the
    average of a slow one stays fresh. Who has not answered yet counts as the fastest.
    """
    known = [member.seconds for member in members if member.seconds is not None]
    fastest = min(known, default=1.0)
    weights = [
        1 / (max(member.seconds or fastest, _SHORTEST_SECONDS) * (len(member.under_way) + 1))
        for member in members
    ]
    total = sum(weights)
    for member, weight in zip(members, weights, strict=True):
        member.credit += weight / total
    chosen = max(members, key=lambda member: member.credit)
    chosen.credit -= 1
    return chosen
