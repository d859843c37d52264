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
from typing import TYPE_CHECKING, Any, NamedTuple

from .core import runtime
from .core.messages import InferenceResponse
from .exceptions import LLMStreamError, SlowReaderError, UnknownStreamError
from .framing import SSE
from .hangup import ClientLeftError
from .replaying import END, Replay, log_store_failure, read_store
from .responses import unrenderable
from .stores import owner_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .config import Settings
    from .core.clock import Timer
    from .core.messages import Item
    from .reception import Reception
    from .replaying import Feed
    from .typing import EventRenderer, Store

__all__ = ["EventId", "Recording", "Recordings"]

_logger = logging.getLogger("flask_llmstream.response")

_EVENT_ID = re.compile(r"([0-9a-f]{32})\.([0-9]{1,15})")


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
        chat_id: What its page calls the chat, and may ask for its answer by.

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
        chat_id: str | None = None,
    ) -> None:
        self.stream_id = stream_id or secrets.token_hex(16)
        self.owner = owner
        self.chat_id = chat_id
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
            log_store_failure(exc)
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
        self._keep(self.position - len(records) + 1, [*records, END] if is_last else records)
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
            log_store_failure(exc)

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
        chat_id: str | None = None,
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
            chat_id=chat_id,
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

    def of_chat(
        self, chat_id: str, *, identity: Any, scope: str, settings: Settings
    ) -> Replay | None:
        """The whole of the newest stream that is under way in a chat, or None. See `record`."""
        owner = _owner(identity, scope)
        for recording in reversed(tuple(self._live.values())):
            if recording.chat_id == chat_id and recording.owner == owner:
                id = EventId(recording.stream_id, 0)
                try:
                    return self.replay(id, identity=identity, scope=scope, settings=settings)
                except UnknownStreamError:
                    return None  # It grew too large for the store.
        return None

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
            records = read_store(self._store, id.stream_id, -1) or []
            events = len(records) - 1 - (records[-1:] == [END])
            if records[:1] == [owner] and id.position <= events:
                replay = open_replay(recording=None)
                replay.begin_with(records[id.position + 1 :])
                return replay
        raise UnknownStreamError("There is no such stream of yours, or it is not kept any more.")


def _owner(identity: Any, scope: str) -> bytes | None:
    owner = owner_of(identity)
    return None if owner is None else owner_of((scope, owner))
