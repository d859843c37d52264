"""Random schedules on an engine, and what has to hold whatever happened."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from contextlib import contextmanager
from random import Random
from time import monotonic

from concurrency import wait_until
from engine_fakes import check_books

from flask_llmstream.core import runtime
from flask_llmstream.core.lifecycle import State, name_after
from flask_llmstream.core.messages import Finish, InferenceRequest, InferenceResponse
from flask_llmstream.engines.admission import BackpressurePolicy
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.exceptions import (
    AdmissionError,
    DeadlineExceededError,
    EngineError,
    RequestCancelledError,
    RequestDroppedError,
)

WORDS = [f"{number} " for number in range(12)]


class Wayward:
    """Generates as the request's metadata says: fast, slowly, deaf, and failing at times."""

    def __init__(self, worker):
        self.worker = worker

    def generate(self, request):
        plan = request.metadata
        if plan["style"] == "returns":
            self._pause(plan)
            return "".join(WORDS[: plan["words"]])
        if plan["style"] == "yields":
            return self._yield(plan)
        for word in self._yield(plan):
            if not request.stream_callback(word) and plan["style"] != "deaf":
                return None
        return None

    def _yield(self, plan):
        for number in range(plan["words"]):
            self._pause(plan)
            if number == plan["fails_at"]:
                raise ValueError("as planned")
            yield WORDS[number]

    def _pause(self, plan):
        if plan["pause_seconds"]:
            runtime.sleep(plan["pause_seconds"])


class Batching:
    """A callback backend: one native thread steps all its sequences, in turns."""

    max_concurrency = 4

    def __init__(self):
        self._sequences = {}
        self._is_running = True
        self._is_gone = False
        runtime.start_thread(self._run)

    def submit(self, request, emit):
        if request.metadata["fails_at"] == 0:
            raise ValueError("as planned")
        self._sequences[request.request_id] = (request.metadata, emit, [0])
        return lambda: self._sequences.pop(request.request_id, None)

    def _run(self):
        while self._is_running:
            for request_id, (plan, emit, position) in tuple(self._sequences.items()):
                number = position[0]
                position[0] += 1
                if number == plan["fails_at"]:
                    self._sequences.pop(request_id, None)
                    emit(ValueError("as planned"))
                elif number == plan["words"]:
                    self._sequences.pop(request_id, None)
                    emit(Finish("stop"))
                else:
                    emit(WORDS[number])
            runtime.sleep(0.0002)
        self._is_gone = True

    def close(self):
        self._is_running = False
        wait_until(lambda: self._is_gone)


class Record:
    """One request's story, as its submitter and its callbacks saw it."""

    def __init__(self, kind, words):
        self.kind = kind
        self.words = words
        self.handle = None
        self.refusal = None
        self.calls = []
        self.outcomes = []
        self.is_inside = False
        self.broken = []

    def on_token(self, token, is_final):
        if self.is_inside:
            self.broken.append("two calls at once")
        self.is_inside = True
        if ("", True) in self.calls:
            self.broken.append("a call after the end")
        self.calls.append((token, is_final))
        self.is_inside = False

    def check(self):
        assert not self.broken, self.broken
        if self.refusal is not None:
            assert self.calls == []
            assert self.outcomes == []
            return
        outcome = self.handle.outcome
        text = "".join(token for token, _ in self.calls)
        whole = "".join(WORDS[: self.words])
        if self.kind == "stream":
            wait_until(lambda: self.calls[-1:] == [("", True)])
            assert self.calls.count(("", True)) == 1
            assert whole.startswith(text)
        if self.kind == "async":
            wait_until(lambda: self.outcomes)
            assert self.outcomes == [outcome]
        if isinstance(outcome, InferenceResponse):
            assert outcome.text == whole
            assert self.kind != "stream" or text == whole

    @property
    def end(self):
        """Which total it has to be counted in."""
        if self.refusal is not None:
            return "total_rejected"
        outcome = self.handle.outcome
        if isinstance(outcome, InferenceResponse):
            return "total_completed"
        for error, total in (
            (RequestCancelledError, "total_cancelled"),
            (DeadlineExceededError, "total_timed_out"),
            (RequestDroppedError, "total_dropped"),
        ):
            if isinstance(outcome, error):
                return total
        assert isinstance(outcome, EngineError), outcome
        return "total_failed"

    @property
    def end_by_name(self):
        """Which figure it has to be counted in: that total, and the finer name."""
        error = self.refusal
        if error is None and not isinstance(self.handle.outcome, InferenceResponse):
            error = self.handle.outcome
        return self.end.removeprefix("total_"), name_after(error)


class Submitter:
    """Submits, cancels and waits at random until the time is over."""

    def __init__(self, engine, seed, until):
        self._engine = engine
        self._random = Random(seed)
        self._until = until
        self.records = []
        self.is_done = False
        self.error = None

    def run(self):
        try:
            while monotonic() < self._until:
                self._step()
        except BaseException as error:
            self.error = error
        finally:
            self.is_done = True

    def _step(self):
        random = self._random
        words = random.randrange(len(WORDS))
        request = InferenceRequest(
            request_id=f"{random.random()}",
            priority=random.randrange(-1, 2),
            identity=random.choice([None, "alice", "bob"]),
            metadata={
                "style": random.choice(["returns", "yields", "calls", "deaf"]),
                "words": words,
                "fails_at": random.randrange(40),
                "pause_seconds": random.choice([0, 0, 0.0005, 0.002]),
            },
        )
        kind = random.choice(["plain", "stream", "async"])
        record = Record(kind, words)
        self.records.append(record)
        timeout = random.choice([None, None, 0.0005, 0.005, 0.05])
        try:
            self._submit(request, record, timeout)
        except (AdmissionError, DeadlineExceededError) as error:
            record.refusal = error
            return
        choice = random.randrange(6)
        if choice == 0:
            record.handle.cancel()
        elif choice == 1:
            self._engine.cancel(request.request_id)
        elif choice == 2:
            self._engine.reprioritize(request.request_id, 1)
        elif choice == 3:
            record.handle.wait(monotonic() + random.random() * 0.005)
            record.handle.cancel()
        elif choice == 4:
            record.handle.wait(monotonic() + 10)
            assert record.handle.ready()

    def _submit(self, request, record, timeout):
        engine = self._engine
        if record.kind == "stream":
            record.handle = engine.submit_streaming(
                request, record.on_token, timeout_seconds=timeout
            )
        elif record.kind == "plain":
            record.handle = engine.submit(request, timeout_seconds=timeout)
        else:
            submit = engine._submit

            def keep_handle(*arguments):
                record.handle = submit(*arguments)
                return record.handle

            # The id alone would not tell how it ended.
            handle = keep_handle(request, None, 0, timeout)
            handle.deliver(record.outcomes.append)


def stress(seed, seconds, spawners, workers=("thread",)):
    """
    One engine of random options, used by a submitter on each of *spawners*.

    Returns:
        How many requests there were.
    """
    random = Random(seed)
    backend = Batching() if random.random() < 0.3 else Wayward(random.choice(workers))
    engine = AsyncInferenceEngine(
        backend,
        worker_threads=random.randrange(1, 4),
        queue_size=random.choice([0, 1, 3, 100]),
        priorities=random.random() < 0.8,
        backpressure=random.choice(list(BackpressurePolicy)),
        block_timeout_seconds=random.choice([None, 0, 0.01]),
        stuck_seconds=random.choice([0, 0.001, 60]),
        identity_queue_share=random.choice([1, 0.5, 0.01]),
    )
    until = monotonic() + seconds
    submitters = [Submitter(engine, seed * 100 + n, until) for n in range(len(spawners))]
    for spawn, submitter in zip(spawners, submitters, strict=True):
        spawn(submitter.run)
    while not all(submitter.is_done for submitter in submitters):
        check_room(engine)
        runtime.sleep(0.002)
        assert monotonic() < until + 20, engine.queue_stats()
    assert engine.wait_for_completion(10), engine.queue_stats()
    records = [record for submitter in submitters for record in submitter.records]
    for submitter in submitters:
        if submitter.error is not None:
            raise submitter.error
    check_end(engine, records)
    engine.shutdown(timeout_seconds=10)
    wait_until(lambda: engine._execution.pool._count == engine._execution.pool._replaced == 0)
    assert engine._execution.pool.stuck == engine._execution.pool.lost == 0
    if isinstance(backend, Batching):
        backend.close()
    return len(records)


def check_room(engine):
    """At any moment, under the lock: no more wait and work than there are places."""
    with engine._lock:
        places = engine._queue_size + engine._execution.capacity
        assert len(engine._waiting) + engine._execution.occupied <= places
        assert engine._execution.pool._count <= engine._execution.pool.limit
        assert engine._execution.pool._replaced <= engine._execution.pool.limit
        ledger = engine._ledger
        live = [run for runs in engine._live.values() for run in runs]
        assert ledger.count(State.SUBMITTED) == len(engine._admission.blocked)
        for state in (State.WAITING, State.RUNNING):
            assert ledger.count(state) == sum(run.state is state for run in live), state
        waiting = [
            *live,
            *(run for level in engine._admission.blocked._levels.values() for run in level),
        ]
        assert engine._shares._waiting == Counter(run.caller for run in waiting if run.caller)
        assert max(engine._shares._waiting.values(), default=0) <= (engine._shares.most or 0)


def check_end(engine, records):
    for record in records:
        record.check()
    stats = engine.queue_stats()
    check_books(stats)
    assert (stats["waiting"], stats["running"], stats["blocked"]) == (0, 0, 0)
    assert stats["total_submitted"] == len(records)
    ends = [record.end for record in records]
    for total in {name for name in stats if name.startswith("total_")} - {"total_submitted"}:
        assert stats[total] == ends.count(total), (total, stats)
    check_figures(engine.request_stats().get("", {}), records)
    wait_until(lambda: not engine.is_in_backend)
    wait_until(lambda: engine.worker_stats()["busy"] == 0)
    assert not engine._live
    assert not engine._shares._waiting


def check_figures(figures, records):
    """Each request is counted once, in what its caller was told."""
    counted = Counter()
    for figure, value in figures.items():
        if isinstance(value, dict):
            counted.update({(figure, name): number for name, number in value.items()})
        elif figure in ("completed", "dropped"):
            counted[figure, "" if figure == "completed" else "request_dropped"] += value
    assert +counted == Counter(record.end_by_name for record in records)


@contextmanager
def hectic():
    """Threads switch all the time; the backends' planned failures are not logged."""
    interval = sys.getswitchinterval()
    logger = logging.getLogger("flask_llmstream")
    level = logger.level
    sys.setswitchinterval(1e-5)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.setswitchinterval(interval)
