"""The readers of a recorded stream; see `recording`, whose other half this is."""

from __future__ import annotations

import logging
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from .core import runtime
from .core.channel import NOW, Channel
from .core.messages import InferenceResponse
from .exceptions import EngineError, IncompleteStreamError, LLMStreamError, SlowReaderError
from .framing import SSE
from .hangup import ClientLeftError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import Settings
    from .core.messages import Item
    from .recording import Recording
    from .typing import Store

__all__ = [
    "END",
    "Asides",
    "Feed",
    "Replay",
    "ReplayRenderer",
    "log_store_failure",
    "read_store",
]

_logger = logging.getLogger("flask_llmstream.response")

END = b""
"""The record that ends a stream. The first one is its owner; between them are events."""


class Feed(Channel):
    """
    What comes live to one reader.

    Attributes:
        is_behind: Nothing more is sent: there was no room, and what was left out is to be
            had from the store. The recorder sets it, and wakes the reader; the reader resets
            it, and then reads the store, which has what was not sent until then.
    """

    __slots__ = ("is_behind",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            size=settings.channel_size,
            max_bytes=settings.channel_bytes,
            slow_reader_seconds=settings.slow_reader_seconds,
        )
        self.is_behind = False


class Replay:
    """
    One reader of a recorded answer: what a `StreamBody` receives from.

    Args:
        stream_id: What is read.
        position: Of the last event that the reader has; 0 is none.
        recording: The stream's, while it is under way in this process.
        store: Keeps the stream.
        settings: `channel_size`, `channel_bytes` and `slow_reader_seconds`.

    Thread safety: one consumer; `leave` from any thread, finalizers included.
    """

    def __init__(
        self,
        stream_id: str,
        position: int,
        *,
        recording: Recording | None,
        store: Store,
        settings: Settings,
    ) -> None:
        self.channel = Feed(settings)
        self._stream_id = stream_id
        self._position = position
        self._recording = recording
        self._store = store
        self._batch_bytes = settings.channel_bytes
        self._backlog: deque[bytes] = deque()
        if recording is not None:
            recording.attach(self.channel)

    def begin_with(self, records: Sequence[bytes]) -> None:
        """Read *records*, which the store has after the reader's position, and nothing else."""
        self._backlog.extend(records)
        # Without its last record the stream broke with the process that made it.
        is_whole = records[-1:] == [END]
        self.channel.close(InferenceResponse() if is_whole else IncompleteStreamError())

    def catch_up(self) -> bool:
        """
        Read next what the store has after the reader's position. It is read after the channel
        was attached, or got room again, which has the rest.

        Returns:
            False where the store has not got all of it (any more).

        Raises:
            EngineError: The store failed.
        """
        self.channel.is_behind = False
        records = read_store(self._store, self._stream_id, self._position)
        recording = self._recording
        # Looked at afterwards: what it did not take by now may have been sent before we came.
        if records is None or not (recording is None or recording.is_stored):
            return False
        self._backlog.extend(records)
        return True

    @property
    def is_at_end(self) -> bool:
        """The reader has the whole stream already."""
        if self._backlog:
            return self._backlog[0] == END
        return isinstance(self.outcome, InferenceResponse)

    @property
    def outcome(self) -> InferenceResponse | LLMStreamError | None:
        """How it ended, once everything was received; None before."""
        if self._backlog or self.channel.is_behind or not self.channel.is_drained:
            return None
        outcome = self.channel.outcome
        return outcome if isinstance(outcome, LLMStreamError) else InferenceResponse()

    @property
    def due_at(self) -> float:
        """The budgets are the recording's to keep."""
        return inf

    def receive(self, until: float = inf) -> list[Item]:
        """
        See `Reception.receive`; the items are events, rendered.

        Raises:
            SlowReaderError: What the reader was too slow for is not kept any more.
        """
        channel = self.channel
        events = self._kept() or self._live(NOW if channel.is_behind else until)
        if channel.is_behind and not events:
            if not self.catch_up():
                raise SlowReaderError("The client did not read fast enough for the store.")
            events = self._kept()
        return self._advance(events)

    def take(self, now: float) -> list[Item]:  # noqa: ARG002 - see `due_at`
        """What there is; never waits, and asks no store."""
        return self._advance(self._kept() or self._live(NOW))

    def _kept(self) -> list[Any]:
        """The next events of the backlog: not more at once than the channel would have."""
        events: list[Any] = []
        size = 0
        while self._backlog and size < self._batch_bytes:
            record = self._backlog.popleft()
            if record != END:
                events.append(record)
                size += len(record)
        return events

    def _live(self, until: float) -> list[Any]:
        batch: list[Any] = self.channel.receive_batch(until)
        # From the store already?
        return [event for event in batch if event.position > self._position]

    def _advance(self, events: list[Any]) -> list[Item]:
        self._position += len(events)
        if self._backlog or self.channel.is_behind:
            # There is more, which nobody will tell of.
            self.channel.wake()
        return events

    def leave(self, reason: LLMStreamError) -> None:
        """Stop reading. Who has no event yet has no id to come back with, but by its chat's."""
        self.channel.close(reason)
        recording = self._recording
        if recording is not None:
            recording.detach(self.channel)
            may_return = self._position or recording.chat_id is not None
            if not (may_return and isinstance(reason, (ClientLeftError, SlowReaderError))):
                recording.leave_alone(reason)


class Asides(Protocol):
    """What one reader is told beside the recorded events: a part of an `EventRenderer`."""

    @property
    def heartbeat(self) -> bytes: ...

    def error(self, error: LLMStreamError) -> bytes | None: ...


class ReplayRenderer:
    """The `EventRenderer` of what is rendered already. Stateless."""

    def __init__(self, asides: Asides) -> None:
        self.error = asides.error
        self.heartbeat = asides.heartbeat
        if self.heartbeat == SSE.heartbeat:
            # A blank line after it would end an event that has an id and no data: openai-py
            # and httpx-sse fail on that.
            self.heartbeat = SSE.heartbeat.removesuffix(b"\n")

    def start(self) -> bytes:
        return b""

    def render(self, item: Item) -> bytes:
        return item  # type: ignore[return-value]

    def end(self, response: InferenceResponse) -> bytes:  # noqa: ARG002
        return b""


def read_store(store: Store, stream_id: str, position: int) -> list[bytes] | None:
    """
    See `Store.read_after`.

    Raises:
        EngineError: It failed; the log has it.
    """
    try:
        return store.read_after(stream_id, position)
    except Exception as exc:
        log_store_failure(exc)
        raise EngineError("The store of this stream's events failed.") from exc


def log_store_failure(error: Exception) -> None:
    """What went wrong in the app's `Store`."""
    runtime.log(_logger, logging.ERROR, "The store of streams failed.", error=error)
