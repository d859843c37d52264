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
from collections import deque
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from .core import runtime
from .core.channel import NOW, Channel
from .core.messages import InferenceResponse
from .exceptions import (
    EngineError,
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
    from collections.abc import Callable, Sequence

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
        self.is_stored = True
        self._readers: list[Feed] = []
        self._outcomes: list[InferenceResponse | LLMStreamError] = []
        self._alone_until = inf
        self._timer: Timer | None = None
        self._keep(0, [owner])

    # Readers.

    def attach(self, feed: Feed) -> None:
        """Have *feed* sent every event from now on, and closed at the end."""
        self._readers.append(feed)
        self._forget_timer()
        if self._outcomes:
            feed.close(self._outcomes[0])

    def detach(self, feed: Feed) -> None:
        """Send *feed* no more. The last one's leaving starts the run's last seconds."""
        try:
            self._readers.remove(feed)
        except ValueError:
            return
        if self._readers or self._linger_seconds == inf:
            return
        self._alone_until = monotonic() + self._linger_seconds
        self._timer = runtime.clock.call_at(self._alone_until, self._give_up)
        if self._outcomes:
            self._forget_timer()

    def _give_up(self) -> None:
        # Of two who left at once, each has set a timer, and who came back could only cancel
        # one of them.
        if monotonic() >= self._alone_until:
            self.leave_alone(ClientLeftError())

    def _forget_timer(self) -> None:
        timer = self._timer
        if timer is not None:
            timer.cancel()

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
        # Every exception, also that of a greenlet which is killed: readers would wait for good.
        try:
            outcome = self._record_items()
        except BaseException as exc:
            outcome = unrenderable(exc)
            self._reception.leave(outcome)
        try:
            self._finish(outcome)
        except BaseException as exc:
            self._close(unrenderable(exc))
        try:
            self._store.expire(self.stream_id, self._keep_seconds)
        except Exception as exc:
            _log_failure(exc)
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
        self._forget_timer()  # Which would keep all this for as long as it lingers.
        for feed in tuple(self._readers):
            feed.close(outcome)

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
        self._keep(self.position - len(records) + 1, [*records, _END] if is_last else records)
        if is_sent:
            for feed in tuple(self._readers):
                self._send(feed, records)

    def _keep(self, position: int, records: Sequence[bytes]) -> None:
        if not self.is_stored:
            return
        try:
            self.is_stored = self._store.append(self.stream_id, position, records)
        except Exception as exc:
            self.is_stored = False
            _log_failure(exc)

    def _send(self, feed: Feed, records: list[Record]) -> None:
        if feed.is_behind:
            return
        try:
            for record in records:
                feed.send_nowait(record)
        except SlowReaderError as error:
            if self.is_stored:
                # A burst, more often than a slow reader: a batch of the run may be more than
                # there is room for at once.
                feed.is_behind = True
                feed.wake()
            else:
                feed.close(error)
                self.detach(feed)


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
        is_whole = records[-1:] == [_END]
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
        records = _read(self._store, self._stream_id, self._position)
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
            return self._backlog[0] == _END
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
            if record != _END:
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
        scope: str = "",
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

        Who comes back must be the same *identity*, and come by the same *scope*: another
        dialect's events, or another blueprint's, are no way to go on.

        Where it *begins_at_once*, an error before the first item is told in the stream; else
        it may get a status of its own.

        Returns:
            None where it cannot be said whose the stream is; nothing is recorded then.
        """
        owner = _owner(identity, scope)
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

        def run() -> None:
            try:
                recording.run()
            finally:
                del self._live[id]

        try:
            replay = Replay(id, 0, recording=recording, store=self._store, settings=settings)
            if begins_at_once:
                recording.begin()
            runtime.spawn(run)
        except BaseException:
            del self._live[id]
            raise
        return replay

    def replay(self, id: EventId, *, identity: Any, scope: str = "", settings: Settings) -> Replay:
        """
        A stream again, from where its reader was. See `record`.

        Raises:
            UnknownStreamError: There is no such stream, or it is somebody else's.
            EngineError: The store failed.
        """
        owner = _owner(identity, scope)
        recording = self._live.get(id.stream_id)
        open_replay = partial(Replay, *id, store=self._store, settings=settings)
        if recording is not None and recording.owner == owner and id.position <= recording.position:
            replay = open_replay(recording=recording)
            try:
                is_there = replay.catch_up()
            except BaseException:
                replay.leave(ClientLeftError())
                raise
            if is_there:
                return replay
            replay.leave(ClientLeftError())
        elif recording is None:
            records = _read(self._store, id.stream_id, -1) or []
            if records[:1] == [owner] and id.position < len(records):
                replay = open_replay(recording=None)
                replay.begin_with(records[id.position + 1 :])
                return replay
        raise UnknownStreamError("There is no such stream of yours, or it is not kept any more.")


def _owner(identity: Any, scope: str) -> bytes | None:
    owner = owner_of(identity)
    return None if owner is None else owner_of((scope, owner))


def _read(store: Store, stream_id: str, position: int) -> list[bytes] | None:
    try:
        return store.read_after(stream_id, position)
    except Exception as exc:
        _log_failure(exc)
        raise EngineError("The store of this stream's events failed.") from exc


def _log_failure(error: Exception) -> None:
    runtime.log(_logger, logging.ERROR, "The store of streams failed.", error=error)
