"""A recording and its readers, step by step: whatever happens between two of their steps."""

import gc
import json
import weakref
from math import inf
from time import monotonic

import pytest
from concurrency import Background, wait_until
from interleaving import interleave

from flask_llmstream import (
    EngineError,
    InferenceRequest,
    SlowReaderError,
    UnknownStreamError,
    replaying,
)
from flask_llmstream import recording as recording_module
from flask_llmstream.config import Settings
from flask_llmstream.core.assembly import Assembler
from flask_llmstream.core.channel import NOW, Channel
from flask_llmstream.core.clock import Timer
from flask_llmstream.core.deadlines import Budgets
from flask_llmstream.dialects import NativeDialect, Parsed
from flask_llmstream.engines.handle import InferenceHandle
from flask_llmstream.exceptions import IncompleteStreamError, LLMStreamError
from flask_llmstream.framing import SSE
from flask_llmstream.hangup import ClientLeftError
from flask_llmstream.reception import Reception
from flask_llmstream.recording import EventId, Recordings
from flask_llmstream.stores import MemoryStore
from flask_llmstream.testing import Gate, Signal

MODULES = recording_module.__file__, replaying.__file__
LONG = 60.0


class Run:
    """An engine's run, as far as its reception sees one; the test is the backend."""

    def __init__(self):
        self.request = InferenceRequest(prompt="p", request_id="r")
        self.channel = Channel()
        self.cancelled_for = None
        self.handle = InferenceHandle("r", cancel=self._cancel)
        budgets = Budgets(total_seconds=LONG, first_token_seconds=LONG, idle_seconds=LONG)
        self.reception = Reception(
            self.channel, self.handle, budgets=budgets, arrived_at=monotonic()
        )

    def _cancel(self, reason):
        self.cancelled_for = reason
        self.handle.publish(reason)

    def emit(self, *texts):
        for text in texts:
            assert self.channel.send(text)

    def finish(self):
        assembler = Assembler(self.request)
        self.handle.publish(assembler.response())


class Stage:
    """A run that is recorded on a thread of its own."""

    def __init__(self, store=None, *, linger_seconds=LONG, **settings):
        self.store = MemoryStore() if store is None else store
        self.recordings = Recordings(self.store)
        self.settings = Settings(**settings)
        self.run = Run()
        self.closed = Signal()
        self.first = self.recordings.record(
            self.run.reception,
            NativeDialect().renderer(Parsed(self.run.request), SSE),
            identity="alice",
            linger_seconds=linger_seconds,
            keep_seconds=LONG,
            settings=self.settings,
            on_close=self.closed.set,
        )

    @property
    def live(self):
        return self.recordings._live

    @property
    def recording(self):
        (recording,) = self.live.values()
        return recording

    def come_back(self, position, identity="alice"):
        return self.recordings.replay(
            EventId(self.stream_id, position), identity=identity, settings=self.settings
        )

    @property
    def stream_id(self):
        return self.first._recording.stream_id


def numbers_and_texts(events):
    for event in events:
        id, data = event.decode().split("\n")[:2]
        text = data.removeprefix("data: ")
        yield (
            int(id.rpartition(".")[2]),
            "[DONE]" if text == "[DONE]" else json.loads(text).get("token"),
        )


def read_now(replay):
    return list(numbers_and_texts(replay.receive(NOW)))


def read(replay, count=inf):
    """At least *count* events, or all to the end."""
    events = []
    while len(events) < count and replay.outcome is None:
        events += numbers_and_texts(replay.receive(monotonic() + 10))
    return events


def read_all(replay):
    return Background(lambda: read(replay)).result()


# Readers that are behind.


def test_a_burst_that_is_larger_than_the_channel_is_no_slow_reader():
    stage = Stage(channel_bytes=1000, channel_size=10)
    texts = ["x" * 300] * 50
    stage.run.emit(*texts)
    stage.run.finish()
    stage.closed.wait()

    events = read_all(stage.first)

    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert [text for _, text in events][:50] == texts
    assert events[-1][1] == "[DONE]"
    assert not isinstance(stage.first.outcome, LLMStreamError)


def test_a_reader_that_fell_behind_reads_on_live_once_it_has_caught_up():
    stage = Stage(channel_bytes=1000)
    stage.run.emit("a" * 800, "b" * 800, "c" * 800)
    wait_until(lambda: stage.recording.position >= 3)

    events = read(stage.first, 3)
    stage.run.emit("d")
    events += read(stage.first, 1)
    stage.run.finish()
    events += read_all(stage.first)

    assert [text[0] for _, text in events[:4]] == list("abcd")
    assert [number for number, _ in events] == list(range(1, len(events) + 1))


def test_what_a_reader_catches_up_on_comes_in_pieces():
    stage = Stage(channel_bytes=1000)
    stage.run.emit(*["x" * 300] * 50)
    stage.run.finish()
    stage.closed.wait()

    later = stage.come_back(1)
    sizes = []
    while later.outcome is None:
        sizes.append(sum(map(len, later.receive(monotonic() + 10))))

    assert max(sizes) < 2000
    assert len(sizes) > 10


def test_a_reader_that_stalls_holds_up_nobody():
    stage = Stage(channel_bytes=1000)
    stage.run.emit("a")
    assert read(stage.first, 1) == [(1, "a")]
    other = stage.come_back(1)
    events = []
    for number in range(100):
        stage.run.emit(f"{number:100}")
        events += read(other, 1)
    stage.run.finish()
    events += read(other)
    assert events[-1][1] == "[DONE]"

    assert read_all(stage.first) == events


def test_a_reader_that_is_behind_what_no_store_has_is_too_slow():
    stage = Stage(MemoryStore(max_bytes=5000), channel_bytes=1000)
    stage.run.emit(*["x" * 300] * 50)
    stage.run.finish()
    stage.closed.wait()

    # Which of the two noticed depends on when the store gave it up.
    try:
        read(stage.first)
    except SlowReaderError:
        return
    assert isinstance(stage.first.outcome, SlowReaderError)


# Stores that fail.


class Store(MemoryStore):
    """One in memory, whose methods the test may have fail, or wait."""

    def __init__(self):
        super().__init__()
        self.appended = 0
        self.refuses_from = inf
        self.before = {}

    def _act(self, name):
        action = self.before.get(name)
        if isinstance(action, BaseException):
            raise action
        if action is not None:
            action()

    def append(self, stream_id, position, records):
        self.appended += 1
        self._act("append")
        return self.appended < self.refuses_from and super().append(stream_id, position, records)

    def read_after(self, stream_id, position):
        self._act("read_after")
        return super().read_after(stream_id, position)

    def expire(self, stream_id, seconds):
        self._act("expire")
        super().expire(stream_id, seconds)


@pytest.fixture
def store():
    return Store()


def test_a_store_that_fails_from_the_beginning_costs_only_the_resuming(store):
    store.before["append"] = OSError("no route to the store")

    assert Stage(store).first is None


def test_a_store_that_fails_costs_only_the_resuming(store):
    stage = Stage(store)
    stage.run.emit("a")
    assert read(stage.first, 1) == [(1, "a")]
    store.before["append"] = OSError("no route to the store")
    stage.run.emit("b")
    stage.run.finish()

    assert [text for _, text in read_all(stage.first)][:1] == ["b"]
    assert not isinstance(stage.first.outcome, LLMStreamError)
    assert stage.run.cancelled_for is None


def test_a_store_that_cannot_expire_a_stream_keeps_nobody_waiting(store):
    stage = Stage(store)
    store.before["expire"] = OSError("no route to the store")
    stage.run.emit("a")
    stage.run.finish()

    assert read_all(stage.first)[-1][1] == "[DONE]"
    stage.closed.wait()
    wait_until(lambda: not stage.live)


class Killed(BaseException):
    """What a greenlet that is killed raises, or a timeout of gevent's."""


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_recorder_that_is_killed_leaves_nobody_waiting(store, position):
    stage = Stage(store)
    if position:
        stage.run.emit("a")
        read(stage.first, 1)
    store.before["append"] = Killed()
    stage.run.emit("b")

    read_all(stage.first)
    assert isinstance(stage.first.outcome, EngineError)
    assert stage.run.cancelled_for is not None
    stage.closed.wait()
    wait_until(lambda: not stage.live)


def test_a_store_that_cannot_be_read_leaves_no_reader_behind(store):
    stage = Stage(store, linger_seconds=0.01)
    stage.run.emit("a")
    read(stage.first, 1)
    store.before["read_after"] = OSError("no route to the store")
    with pytest.raises(EngineError):
        stage.come_back(1)
    stage.first.leave(ClientLeftError())

    wait_until(lambda: stage.run.cancelled_for)


def test_what_a_store_has_missed_is_not_skipped(store):
    stage = Stage(store)
    stage.run.emit("a")
    read(stage.first, 1)
    store.refuses_from = 0
    stage.run.emit("b")
    read(stage.first, 1)

    with pytest.raises(UnknownStreamError):
        stage.come_back(1)
    stage.run.emit("c")
    stage.run.finish()
    assert [number for number, _ in read_all(stage.first)][:1] == [3]


def test_a_stream_that_its_store_lost_the_end_of_is_not_at_its_end(store):
    stage = Stage(store)
    stage.run.emit("a")
    read(stage.first, 1)
    store.refuses_from = 0
    stage.run.finish()
    stage.closed.wait()
    wait_until(lambda: not stage.live)

    again = stage.come_back(1)

    assert not again.is_at_end
    assert isinstance(again.outcome, IncompleteStreamError)


def test_a_slow_store_holds_up_its_own_stream_alone(store):
    gate = Gate()
    stage, other = Stage(store), Stage()
    store.before["append"] = gate.pass_through
    stage.run.emit("a")
    gate.reached.wait()
    other.run.emit("b")
    assert read(other.first, 1) == [(1, "b")]
    assert read_now(stage.first) == []
    gate.open()

    assert read(stage.first, 1) == [(1, "a")]


def test_what_comes_while_the_store_is_read_comes_once(store):
    stage = Stage(store)
    stage.run.emit("a")
    read(stage.first, 1)

    def write_meanwhile():
        store.before.clear()
        stage.run.emit("b")
        read(stage.first, 1)

    store.before["read_after"] = write_meanwhile
    again = stage.come_back(0)
    stage.run.emit("c")
    stage.run.finish()

    assert [text for _, text in read_all(again)][:3] == ["a", "b", "c"]


def test_a_stream_that_ends_while_the_store_is_read_is_read_to_its_end(store):
    stage = Stage(store)
    stage.run.emit("a")
    read(stage.first, 1)

    def end_meanwhile():
        store.before.clear()
        stage.run.emit("b")
        stage.run.finish()
        wait_until(lambda: not stage.live)

    store.before["read_after"] = end_meanwhile
    events = read_all(stage.come_back(1))

    assert (events[0], events[-1][1]) == ((2, "b"), "[DONE]")


def test_a_stream_that_is_forgotten_while_it_is_read_is_read_to_its_end(store):
    stage = Stage(store)
    stage.run.emit("a", "b")
    stage.run.finish()
    stage.closed.wait()
    wait_until(lambda: not stage.live)
    again = stage.come_back(1)
    store.expire(stage.stream_id, 0)
    wait_until(lambda: store.bytes_held == 0)

    assert read_all(again)[-1][1] == "[DONE]"
    with pytest.raises(UnknownStreamError):
        stage.come_back(1)


# What is left when it is over.


def test_a_recording_is_forgotten_with_its_end_however_long_it_would_have_lingered():
    stage = Stage()
    stage.run.emit("a")
    read(stage.first, 1)
    for _ in range(3):
        stage.come_back(1).leave(ClientLeftError())
    stage.first.leave(ClientLeftError())
    recording, live = weakref.ref(stage.recording), stage.live
    stage.run.finish()
    stage.closed.wait()
    wait_until(lambda: not live)
    del stage

    def is_gone():
        gc.collect()
        return recording() is None

    wait_until(is_gone)


def test_a_flood_of_readers_leaves_one_timer():
    stage = Stage()
    stage.run.emit("a")
    read(stage.first, 1)
    stage.first.leave(ClientLeftError())
    for _ in range(1000):
        stage.come_back(1).leave(ClientLeftError())

    pending = [
        timer
        for timer in (*recording_module.runtime.clock._heap, *recording_module.runtime.clock._inbox)
        if timer.is_pending and getattr(timer.function, "__self__", None) is stage.recording
    ]
    assert len(pending) <= 1
    stage.run.finish()


def test_a_recording_that_cannot_begin_leaves_nothing(monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(recording_module.runtime, "spawn", fail)
    recordings = Recordings(MemoryStore())
    run = Run()
    with pytest.raises(RuntimeError):
        recordings.record(
            run.reception,
            NativeDialect().renderer(Parsed(run.request), SSE),
            identity="alice",
            linger_seconds=LONG,
            keep_seconds=LONG,
            settings=Settings(),
            on_close=lambda: None,
        )

    assert recordings._live == {}


# Two at once, in every order that one switch can make.


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 1000.0
        self.timers = []

    def __call__(self):
        return self.now

    def call_at(self, when, function):
        self.timers.append(Timer(when, function))
        return self.timers[-1]

    def pass_to(self, when):
        self.now = when
        for timer in [timer for timer in self.pending if timer.when <= when]:
            function, timer.function = timer.function, None
            function()

    @property
    def pending(self):
        return [timer for timer in self.timers if timer.is_pending]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recording_module, "monotonic", clock)
    monkeypatch.setattr(recording_module.runtime, "clock", clock)
    return clock


@pytest.fixture
def recorders(monkeypatch):
    """The recorders that were begun; the test runs them."""
    recorders = []
    monkeypatch.setattr(recording_module.runtime, "spawn", recorders.append)
    return recorders


def expect_whole(events, replay, texts):
    assert replay.outcome is not None
    assert not isinstance(replay.outcome, LLMStreamError)
    assert [number for number, _ in events] == list(range(1, len(events) + 1))
    assert [text for _, text in events][: len(texts)] == texts
    assert events[-1][1] == "[DONE]"


def drain(replay):
    """What is left of a stream whose recorder is done."""
    events = []
    for _ in range(100):
        if replay.outcome is not None:
            break
        events += numbers_and_texts(replay.take(monotonic()) or replay.receive(monotonic() + 1))
    return events


@pytest.mark.usefixtures("recorders")
def test_two_readers_that_leave_at_once_leave_the_run_all_its_time(clock):
    def prepare():
        stage = Stage(linger_seconds=30)
        start = clock.now
        second = stage.come_back(0)

        def check():
            clock.pass_to(start + 1)
            third = stage.come_back(0)
            clock.pass_to(start + 29)
            third._position = 1
            third.leave(ClientLeftError())
            clock.pass_to(start + 40)
            assert stage.run.cancelled_for is None
            clock.pass_to(start + 59)
            assert stage.run.cancelled_for is not None

        for reader in (stage.first, second):
            reader._position = 1
        return (
            lambda: stage.first.leave(ClientLeftError()),
            lambda: second.leave(ClientLeftError()),
            check,
        )

    interleave(prepare, MODULES)


@pytest.mark.usefixtures("recorders")
@pytest.mark.parametrize("comes_first", [False, True])
def test_one_leaves_while_another_comes(clock, comes_first):
    def prepare():
        stage = Stage(linger_seconds=30)
        stage.first._position = 1
        start, come_back = clock.now, []

        def come():
            come_back.append(stage.come_back(0))

        def leave():
            stage.first.leave(ClientLeftError())

        def check():
            (reader,) = come_back
            clock.pass_to(start + 100)
            assert stage.run.cancelled_for is None
            reader._position = 1
            reader.leave(ClientLeftError())
            clock.pass_to(start + 131)
            assert stage.run.cancelled_for is not None

        return (come, leave, check) if comes_first else (leave, come, check)

    interleave(prepare, MODULES)


@pytest.mark.parametrize("leaves_first", [False, True])
def test_one_leaves_while_the_run_ends(clock, recorders, leaves_first):
    def prepare():
        recorders.clear()
        stage = Stage(linger_seconds=30)
        stage.first._position = 1
        before = len(clock.pending)
        stage.run.emit("a")
        stage.run.finish()
        (record,) = recorders

        def leave():
            stage.first.leave(ClientLeftError())

        def check():
            # The store's, which forgets the stream then.
            assert len(clock.pending) <= before + 1
            assert stage.run.cancelled_for is None
            assert not stage.live

        return (leave, record, check) if leaves_first else (record, leave, check)

    interleave(prepare, MODULES)


@pytest.mark.parametrize("comes_first", [False, True])
def test_one_comes_while_the_run_is_recorded(recorders, comes_first):
    def prepare():
        recorders.clear()
        stage = Stage()
        stage.run.emit("a", "b")
        stage.run.finish()
        (record,) = recorders
        readers = []

        def come():
            readers.append(stage.come_back(0))

        def check():
            for reader in (stage.first, *readers):
                expect_whole(drain(reader), reader, ["a", "b"])

        return (come, record, check) if comes_first else (record, come, check)

    interleave(prepare, MODULES)


@pytest.mark.parametrize("reads_first", [False, True])
def test_one_falls_behind_while_it_reads(recorders, reads_first):
    texts = [letter * 300 for letter in "abcdef"]

    def prepare():
        recorders.clear()
        stage = Stage(channel_bytes=700)
        stage.run.emit(*texts)
        stage.run.finish()
        (record,) = recorders
        events = []

        def read_some():
            events.extend(numbers_and_texts(stage.first.take(0.0)))

        def check():
            events.extend(drain(stage.first))
            expect_whole(events, stage.first, texts)

        return (read_some, record, check) if reads_first else (record, read_some, check)

    interleave(prepare, MODULES)


def test_one_catches_up_while_more_comes(recorders):
    """The reader is behind already when it begins to read the store."""

    def prepare():
        recorders.clear()
        stage = Stage(channel_bytes=700)
        first, *more = (letter * 300 for letter in "abcdefgh")
        recording = stage.recording
        recording._append(b"".join(recording._renderer.render(t) for t in (first, *more[:3])))
        stage.run.emit(*more[3:])
        stage.run.finish()
        (record,) = recorders
        events = []

        def read_some():
            for _ in range(3):
                events.extend(numbers_and_texts(stage.first.receive(NOW)))

        def check():
            events.extend(drain(stage.first))
            expect_whole(events, stage.first, [first, *more])

        return read_some, record, check

    interleave(prepare, MODULES)
