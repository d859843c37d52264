"""
Answers that outlive their reader: recorded as they are made, replayed to who comes back.

A resumable stream has two halves::

    run ⇢ Channel ⇢ Recording (renders, numbers, stores) ⇢ Channel ⇢ Replay ⇢ StreamBody

A `Recording` reads the run to its end, with or without anybody listening. A `Replay` is one
reader: first what the store has after the reader's last position, then what comes live.
Both count records, so that nothing is missed between the two and nothing comes twice.
"""

from __future__ import annotations

import logging
import re
import secrets
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .core import runtime
from .core.channel import NOW, Channel
from .core.messages import InferenceResponse
from .exceptions import (
    IncompleteStreamError,
    LLMStreamError,
    SlowReaderError,
    UnknownStreamError,
)
from .framing import SSE
from .hangup import ClientLeftError
from .responses import unrenderable
from .stores import owner_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import Settings
    from .core.clock import Timer
    from .core.messages import Item
    from .responses import Reception
    from .typing import EventRenderer, Store

__all__ = ["Asides", "EventId", "Recording", "Recordings", "Replay", "ReplayRenderer"]

_logger = logging.getLogger("flask_llmstream.response")

_EVENT_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,15})")
_END = b""
"""The record that ends a stream. The first one is its owner; between them are events."""


class EventId(NamedTuple):
    """What a client sends back as ``Last-Event-ID``: a stream, and how far it got."""

    stream_id: str
    position: int

    @classmethod
    def of(cls, header: str | None) -> EventId | None:
        """The id in *header*; None where it is none of ours."""
        match = _EVENT_ID.fullmatch(header or "")
        return None if match is None else cls(match[1], int(match[2]))


class Record(bytes):
    """One event as it is sent, and its place in the stream."""

    position: int


class Recording:
    """
    Reads an answer to its end and stores it, event by event.

    Args:
        reception: Of the run; its budgets hold with and without a reader.
        renderer: Of the dialect, for SSE.
        store: Keeps the events.
        owner: Whose stream this is.
        linger_seconds: How long the run goes on after its last reader left; infinity is to
            its end.
        keep_seconds: How long the events are kept after the end.
        on_close: Called once, when the answer is whole or has failed.
        has_ids: Whether events carry ids, by which EventSource comes back by itself.
        stream_id: 32 hexadecimal digits that nobody can guess; empty for new ones.

    Attributes:
        position: Of the last event so far.
        is_stored: Whether the store keeps it, so far.

    Thread safety: `attach`, `detach` and `leave_alone` from any thread, finalizers included;
    `run` once.
    """

    def __init__(
        self,
        reception: Reception,
        renderer: EventRenderer,
        store: Store,
        owner: bytes,
        *,
        linger_seconds: float,
        keep_seconds: float,
        on_close: Callable[[], None],
        has_ids: bool = True,
        stream_id: str = "",
    ) -> None:
        self.stream_id = stream_id or secrets.token_hex(16)
        self.owner = owner
        self.position = 0
        self._renderer = renderer
        self._linger_seconds = linger_seconds
        self._keep_seconds = keep_seconds
        self._reception = reception
        self._store = store
        self._on_close = on_close
        self._has_ids = has_ids
        self.is_stored = store.append(self.stream_id, 0, [owner])
        self._readers: list[Channel] = []
        self._outcomes: list[InferenceResponse | LLMStreamError] = []
        self._timer: Timer | None = None

    # Readers.

    def attach(self, channel: Channel) -> None:
        """Have *channel* sent every event from now on, and closed at the end."""
        self._readers.append(channel)
        timer = self._timer
        if timer is not None:
            timer.cancel()
        if self._outcomes:
            channel.close(self._outcomes[0])

    def detach(self, channel: Channel) -> None:
        """Send *channel* no more. The last one's leaving starts the run's last seconds."""
        try:
            self._readers.remove(channel)
        except ValueError:
            return
        if not (self._readers or self._outcomes or self._linger_seconds == inf):
            self._timer = runtime.clock.call_at(
                monotonic() + self._linger_seconds, partial(self.leave_alone, ClientLeftError())
            )

    def leave_alone(self, reason: LLMStreamError) -> None:
        """Nobody comes back: end the run, for *reason*, unless somebody reads or it may go on."""
        if not self._readers and self._linger_seconds != inf:
            self._reception.handle.cancel(reason)

    # The recorder's own greenlet or thread, and before there is one.

    def begin(self) -> None:
        """Record now what comes before the first item."""
        self._append(self._renderer.start())

    def run(self) -> None:
        """Record to the end. Raises nothing."""
        reception = self._reception
        try:
            outcome = self._record_items()
        except Exception as exc:
            outcome = unrenderable(exc)
            reception.leave(outcome)
        try:
            self._finish(outcome)
        except Exception as exc:
            self._close(unrenderable(exc))
        self._store.expire(self.stream_id, self._keep_seconds)
        self._on_close()

    def _record_items(self) -> InferenceResponse | LLMStreamError:
        reception, render = self._reception, self._renderer.render
        while True:
            batch: list[Item] = reception.receive()
            if batch:
                start = b"" if self.position else self._renderer.start()
                self._append(b"".join((start, *map(render, batch))))
            outcome = reception.outcome
            if outcome is not None:
                return outcome

    def _finish(self, outcome: InferenceResponse | LLMStreamError) -> None:
        has_begun = self.position > 0
        if isinstance(outcome, InferenceResponse):
            start = b"" if has_begun else self._renderer.start()
            self._append(start + self._renderer.end(outcome), is_last=True)
        else:
            # Who reads live and has nothing yet may still get a status instead.
            self._append(self._renderer.error(outcome) or b"", is_last=True, is_sent=has_begun)
        self._close(InferenceResponse() if has_begun else outcome)

    def _close(self, outcome: InferenceResponse | LLMStreamError) -> None:
        self._outcomes.append(outcome)
        for channel in tuple(self._readers):
            channel.close(outcome)

    def _append(self, frames: bytes, *, is_last: bool = False, is_sent: bool = True) -> None:
        """Store and send *frames*, whole events, each as a record of its own."""
        records = []
        for event in frames.split(SSE.suffix)[:-1]:
            self.position += 1
            if self._has_ids:
                record = Record(
                    b"id: %b.%d\n%b\n\n" % (self.stream_id.encode(), self.position, event)
                )
            else:
                record = Record(event + SSE.suffix)
            record.position = self.position
            records.append(record)
        if self.is_stored:
            stored = [*records, _END] if is_last else records
            first = self.position - len(records) + 1
            self.is_stored = self._store.append(self.stream_id, first, stored)
        if is_sent:
            for channel in tuple(self._readers):
                self._send(channel, records)

    def _send(self, channel: Channel, records: list[Record]) -> None:
        try:
            for record in records:
                channel.send_nowait(record)
        except LLMStreamError as error:
            # Too slow, but only this one; it may come back for the rest.
            channel.close(error)
            self.detach(channel)


class Replay:
    """
    One reader of a recorded answer: what a `StreamBody` receives from.

    Args:
        recording: The stream's, while it is under way in this process.
        position: Of the last event that the reader has; 0 is none.
        settings: `channel_size`, `channel_bytes` and `slow_reader_seconds`.

    Thread safety: one consumer; `leave` from any thread, finalizers included.
    """

    def __init__(self, recording: Recording | None, position: int, settings: Settings) -> None:
        self.channel = Channel(
            size=settings.channel_size,
            max_bytes=settings.channel_bytes,
            slow_reader_seconds=settings.slow_reader_seconds,
        )
        self._position = position
        self._backlog: list[bytes] = []
        self._recording = recording
        if recording is not None:
            recording.attach(self.channel)

    def catch_up(self, records: list[bytes]) -> None:
        """
        Begin with what the store has after the reader's position. It is read after the
        channel was attached, which has the rest.
        """
        self._backlog = records
        if self._recording is None:
            # Without its last record the stream broke with the process that made it.
            is_whole = records[-1:] == [_END]
            self.channel.close(InferenceResponse() if is_whole else IncompleteStreamError())

    @property
    def is_at_end(self) -> bool:
        """The reader has the whole stream already."""
        return self._backlog == [_END] or (not self._backlog and self.channel.is_drained)

    @property
    def outcome(self) -> InferenceResponse | LLMStreamError | None:
        """How it ended, once everything was received; None before."""
        if self._backlog or not self.channel.is_drained:
            return None
        outcome = self.channel.outcome
        return outcome if isinstance(outcome, LLMStreamError) else InferenceResponse()

    @property
    def due_at(self) -> float:
        """The budgets are the recording's to keep."""
        return inf

    def receive(self, until: float = inf) -> list[Item]:
        """See `Reception.receive`; the items are events, rendered."""
        events: list[Any]
        if self._backlog:
            events = [event for event in self._backlog if event != _END]
            self._backlog = []
        else:
            batch: list[Any] = self.channel.receive_batch(until)
            # From the store already?
            events = [event for event in batch if event.position > self._position]
        self._position += len(events)
        return events

    def take(self, now: float) -> list[Item]:  # noqa: ARG002 - see `due_at`
        """What there is; never waits."""
        return self.receive(NOW)

    def leave(self, reason: LLMStreamError) -> None:
        """Stop reading. Who has no event yet has no id to come back with."""
        self.channel.close(reason)
        recording = self._recording
        if recording is not None:
            recording.detach(self.channel)
            if not self._position or not isinstance(reason, (ClientLeftError, SlowReaderError)):
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


class Recordings:
    """
    An app's recorded answers: those under way, and the store of all.

    Thread safety: every method, from any thread or greenlet.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._live: dict[str, Recording] = {}

    def record(
        self,
        reception: Reception,
        renderer: EventRenderer,
        *,
        identity: Any,
        linger_seconds: float,
        keep_seconds: float,
        settings: Settings,
        on_close: Callable[[], None],
        has_ids: bool = True,
        begins_at_once: bool = False,
        stream_id: str = "",
    ) -> Replay | None:
        """
        Begin to record, for the first reader. See `Recording`.

        Where it *begins_at_once*, an error before the first item is told in the stream; else
        it may get a status of its own.

        Returns:
            None where it cannot be said whose the stream is; nothing is recorded then.
        """
        owner = owner_of(identity)
        if owner is None:
            runtime.log(
                _logger,
                logging.WARNING,
                "An identity of type %s has no canonical form, so that its streams cannot be "
                "resumed. Have the identity_loader return an id.",
                type(identity).__name__,
            )
            return None
        recording = Recording(
            reception,
            renderer,
            self._store,
            owner,
            linger_seconds=linger_seconds,
            keep_seconds=keep_seconds,
            on_close=on_close,
            has_ids=has_ids,
            stream_id=stream_id,
        )
        if not recording.is_stored:
            return None
        id = recording.stream_id
        self._live[id] = recording
        replay = Replay(recording, 0, settings)
        if begins_at_once:
            recording.begin()

        def run() -> None:
            try:
                recording.run()
            finally:
                del self._live[id]

        runtime.spawn(run)
        return replay

    def replay(self, id: EventId, *, identity: Any, settings: Settings) -> Replay:
        """
        A stream again, from where its reader was.

        Raises:
            UnknownStreamError: There is no such stream, or it is somebody else's.
        """
        owner = owner_of(identity)
        recording = self._live.get(id.stream_id)
        if recording is not None and recording.owner == owner and id.position <= recording.position:
            replay = Replay(recording, id.position, settings)
            records = self._store.read_after(id.stream_id, id.position)
            if records is not None:
                replay.catch_up(records)
                return replay
            replay.leave(ClientLeftError())
        elif recording is None:
            records = self._store.read_after(id.stream_id, -1) or []
            if records[:1] == [owner] and id.position < len(records):
                replay = Replay(None, id.position, settings)
                replay.catch_up(records[id.position + 1 :])
                return replay
        raise UnknownStreamError("There is no such stream of yours, or it is not kept any more.")
