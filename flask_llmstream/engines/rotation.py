"""Who is next among a model's backends, and who is left out for a while."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from random import uniform
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core import runtime
from ..exceptions import ConfigurationError
from .execution import DEFAULT_MAX_CONCURRENCY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..typing import WorkerKind

__all__ = ["Attempt", "LoadBalanceStrategy", "Member", "Rotation", "Wait", "Waiter"]

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
        busy_until: Monotonic: not to be asked before, as it said itself.
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
        self.busy_until = 0.0
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

    __slots__ = ("_rotation", "has_emitted", "is_probe", "member", "started_at")

    def __init__(
        self, rotation: Rotation, member: Member, *, is_probe: bool, started_at: float
    ) -> None:
        self._rotation = rotation
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
        self._rotation.wake()

    def __iter__(self) -> Iterator[Any]:
        # What a stream's chain asks for more when the answer's items have run out.
        self.close()
        return iter(())


class Wait(NamedTuple):
    """
    Nobody is to be asked now.

    Args:
        until: Monotonic: when to look again, unless woken before.
        is_refused: All said themselves that they are busy until then.
    """

    until: float
    is_refused: bool = False


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits for a member: the highest priority first, then first come."""

    priority: int
    parker: runtime.Parker = field(default_factory=runtime.make_parker)


class Rotation:
    """
    Picks members, and keeps book of how they fare.

    A member that fails is out: it is probed with one request at a time, after 1 s to 60 s,
    twice as long each time, or when it said. Where all are out, the one whose time comes
    first is picked anyway. One that is busy is left alone for as long as it said, and one
    that is full until it has room: who finds no other waits.

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
        # Guards the members, what is known of each, and the waiters.
        self._lock = runtime.allocate_lock()
        self._waiting = tuple[Waiter, ...]()
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
        self.wake()

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

    def pick(
        self,
        tried: Sequence[Member],
        *,
        in_batches: bool = False,
        waiter: Waiter | None = None,
    ) -> Attempt | Wait | None:
        """
        Open an attempt at a member that has not been *tried*; None where there is none.

        Args:
            tried: Who is not asked again.
            in_batches: Only who takes batches.
            waiter: Of `waiting`, where the caller waits: nobody comes before the first.
        """
        now = monotonic()
        with self._lock:
            members = self._candidates(tried, in_batches=in_batches)
            if not members:
                return None
            found = self._find(members, now)
            if isinstance(found, Wait):
                return found
            if self._waiting and self._waiting[0] is not waiter:
                return Wait(inf)
            return self._open(found, now)

    def pick_now(self, tried: Sequence[Member]) -> Attempt | None:
        """`pick` for who cannot wait: where all are full or busy, one of them is asked."""
        now = monotonic()
        with self._lock:
            members = self._candidates(tried)
            if not members:
                return None
            found = self._find(members, now)
            return self._open(self._choose(members) if isinstance(found, Wait) else found, now)

    def _candidates(self, tried: Sequence[Member], *, in_batches: bool = False) -> list[Member]:
        return [
            member
            for member in self.members
            if member not in tried and (member.takes_batches or not in_batches)
        ]

    def _find(self, members: Sequence[Member], now: float) -> Member | Wait:
        """Under the lock."""
        able = [member for member in members if member.busy_until <= now]
        if not able:
            return Wait(min(member.busy_until for member in members), is_refused=True)
        free = [member for member in able if member.has_room]
        due = [member for member in free if member.failures and member.retry_at <= now]
        if due:
            return min(due, key=_retry_at)
        if all(member.failures for member in able):
            return min(free, key=_retry_at) if free else Wait(inf)
        healthy = [member for member in free if not member.failures]
        if healthy:
            return self._choose(healthy)
        return Wait(min(max(member.retry_at, member.busy_until) or inf for member in members))

    def _open(self, member: Member, now: float) -> Attempt:
        """Under the lock."""
        is_probe = member.failures > 0 and member.retry_at <= now
        if is_probe:
            # One probe at a time, unless it says nothing for so long.
            member.retry_at = now + _LONGEST_OUT_SECONDS
        self._turns += 1
        member.turn = self._turns
        attempt = Attempt(self, member, is_probe=is_probe, started_at=now)
        member.under_way.add(attempt)
        return attempt

    def _choose(self, members: Sequence[Member]) -> Member:
        if self.strategy is LoadBalanceStrategy.LEAST_LOADED:
            return min(members, key=lambda member: (len(member.under_way), member.turn))
        if self.strategy is LoadBalanceStrategy.ROUND_ROBIN:
            return min(members, key=lambda member: member.turn)
        return _choose_by_weight(members)

    # Waiting.

    @contextmanager
    def waiting(self, priority: int) -> Iterator[Waiter]:
        """Be in the line. Whoever parks on the waiter is woken when it may be its turn."""
        waiter = Waiter(priority)
        with self._lock:
            # Stable: who came first stays first among equals.
            self._waiting = tuple(sorted((*self._waiting, waiter), key=lambda each: -each.priority))
        try:
            yield waiter
        finally:
            with self._lock:
                self._waiting = tuple(each for each in self._waiting if each is not waiter)
            self.wake()

    def wake(self) -> None:
        """Have the first waiter look. Any thread, finalizers included."""
        waiting = self._waiting
        if waiting:
            waiting[0].parker.unpark()

    def succeed(self, attempt: Attempt) -> None:
        """The first item came, or the whole answer."""
        seconds = monotonic() - attempt.started_at
        attempt.has_emitted = True
        attempt.is_probe = False
        member = attempt.member
        with self._lock:
            is_back, member.failures = member.failures > 0, 0
            before = seconds if member.seconds is None else member.seconds
            member.seconds = before + _RESPONSE_TIME_WEIGHT * (seconds - before)
        if is_back:
            self.wake()

    def refuse(self, attempt: Attempt, seconds: float) -> None:
        """The backend is busy, and said for how long."""
        member = attempt.member
        with self._lock:
            member.busy_until = max(member.busy_until, monotonic() + seconds)

    def fail(self, attempt: Attempt, *, retry_after: float | None = None) -> None:
        """Take the backend out: for *retry_after* seconds, or for longer each time."""
        now = monotonic()
        member = attempt.member
        is_probe, attempt.is_probe = attempt.is_probe, False
        with self._lock:
            # Those that were under way as it went out say nothing new.
            if is_probe or not member.failures:
                member.failures += 1
                longest = min(_LONGEST_OUT_SECONDS, 2.0**member.failures)
                member.retry_at = now + (retry_after or uniform(longest / 2, longest))

    @property
    def is_out(self) -> bool:
        """Whether every member failed lately, and none is to be probed yet."""
        now = monotonic()
        return all(member.failures and member.retry_at > now for member in self.members)

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
