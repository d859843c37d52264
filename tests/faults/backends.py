"""Backends that misbehave, each in its own way: the request's prompt says which."""

from __future__ import annotations

import _thread
import ctypes
import json
import sys
from collections import deque
from functools import partial
from time import monotonic

from flask_llmstream import Finish, InferenceResponse
from flask_llmstream.core import runtime

WAIT_SECONDS = 20.0
WORKERS = 4
STUCK_SECONDS = 0.5
HUGE_BYTES = 10_000_000
GIL_SECONDS = 2.0

generating = {}
"""What `generate` does, by name: functions of a `Player`."""
calling_back = {}
"""What a callback backend does."""


class _KeepsTheGIL(ctypes.PyDLL):
    """The C library as an extension calls it that never lets go of the GIL."""

    def sleep(self, seconds):
        self.usleep(int(seconds * 1e6))


def plays(table, function):
    table[function.__name__.replace("_", " ")] = function
    return function


generates = partial(plays, generating)
calls_back = partial(plays, calling_back)


class Player:
    """
    One run.

    Attributes:
        id: Under which the recorder files its events.
        request: As the backend was given it.
        size: Of what is to be large or long.
    """

    def __init__(self, recorder, request):
        script = json.loads(request.prompt)
        [[self.how, *sizes]] = script["steps"]
        self.id, self.size = script["id"], next(iter(sizes), None)
        self.request = request
        self._recorder = recorder

    def record(self, name, **details):
        self._recorder.record(self.id, name, **details)

    def wait_for(self, name):
        self._recorder.wait(self.id, name)

    def pass_gate(self):
        self._recorder.pass_gate(self.id, 0)

    def wait_for_cancel(self):
        until = monotonic() + WAIT_SECONDS
        while not self.request.cancelled and monotonic() < until:
            runtime.sleep(0.001)
        self.record("cancelled" if self.request.cancelled else "forgotten")


# Generators and functions.


@generates
def yields_a(_):
    yield "a"


@generates
def raises_at_once(_):
    raise ValueError("scripted")


@generates
def raises_in_its_first_step(_):
    raise ValueError("scripted")
    yield


@generates
def raises_after_a_token(_):
    yield "a"
    raise ValueError("scripted")


@generates
def raises_as_it_is_closed(player):
    try:
        yield "a"
        player.wait_for_cancel()
        yield "b"
    finally:
        raise ValueError("scripted")


@generates
def raises_in_its_cancel_callback(player):
    def fail():
        raise ValueError("scripted")

    player.request.on_cancel(fail)
    yield "a"
    player.wait_for_cancel()


@generates
def runs_out_of_memory(_):
    yield "a"
    raise MemoryError("scripted")


@generates
def recurses_for_ever(player):
    yield "a"
    yield from recurses_for_ever(player)


@generates
def exits(_):
    yield "a"
    sys.exit("scripted")


@generates
def exits_its_thread(_):
    yield "a"
    _thread.exit()


@generates
def is_interrupted(_):
    yield "a"
    raise KeyboardInterrupt("scripted")


@generates
def is_killed(_):
    yield "a"
    from greenlet import GreenletExit

    raise GreenletExit


@generates
def yields_an_object(_):
    yield "a"
    yield object()


@generates
def yields_none(_):
    yield "a"
    yield None


@generates
def yields_bad_text(_):
    yield "a"
    yield "\ud800"


@generates
def yields_bad_bytes(_):
    yield b"a"
    yield b"\xff\xfe"


@generates
def yields_a_choice_nobody_asked_for(_):
    yield "a"
    yield Finish("stop", choice=7)


@generates
def returns_a_number(_):
    return 42


@generates
def returns_an_answer_of_numbers(_):
    return InferenceResponse(text=42)


@generates
def hangs_before_the_first_token(player):
    player.pass_gate()
    yield "late"


@generates
def hangs_in_the_middle(player):
    yield "a"
    player.pass_gate()
    yield "late"


@generates
def ignores_its_cancel(player):
    """It calls back, and does not listen to what is said."""
    player.request.stream_callback("a")
    player.wait_for_cancel()
    for number in range(100):
        player.request.stream_callback(f"late {number}")
    player.pass_gate()


@generates
def is_huge(player):
    yield "a"
    yield "x" * (player.size or HUGE_BYTES)
    yield "b"


@generates
def keeps_the_gil(player):
    yield "a"
    _KeepsTheGIL(None).sleep(player.size or GIL_SECONDS)
    yield "b"


@generates
def answers_in_time(player):
    for number in range(20):
        runtime.sleep((player.size or 1.0) / 20)
        yield f"{number} "


# Callback backends, each on a thread of its own.


@calls_back
def calls_late(player, emit):
    emit("a")
    player.wait_for_cancel()
    for number in range(100):
        assert emit(f"late {number}") is False
    assert emit(Finish("stop")) is False


@calls_back
def finishes_twice(_, emit):
    emit("a")
    emit(Finish("stop"))
    emit(Finish("stop"))


@calls_back
def fails_after_its_finish(_, emit):
    emit("a")
    emit(Finish("stop"))
    emit(ValueError("scripted"))


@calls_back
def fails_twice(_, emit):
    emit("a")
    emit(ValueError("scripted"))
    emit(ValueError("scripted"))


@calls_back
def calls_after_its_finish(_, emit):
    emit("a")
    emit(Finish("stop"))
    for number in range(100):
        assert emit(f"late {number}") is False


@calls_back
def calls_from_one_thread_after_the_other(player, emit):
    for number in range(10):
        runtime.start_thread(partial(_emit_and_record, player, emit, f"{number} "))
        player.wait_for(f"emitted {number} ")
    emit(Finish("stop"))


def _emit_and_record(player, emit, text):
    emit(text)
    player.record(f"emitted {text}")


@calls_back
def calls_from_all_threads_at_once(_, emit):
    def call():
        while emit("a "):
            pass

    for _ in range(4):
        runtime.start_thread(call)


@calls_back
def emits_an_object(_, emit):
    emit("a")
    emit(object())


@calls_back
def emits_none(_, emit):
    emit("a")
    emit(None)


@calls_back
def emits_an_error_class(_, emit):
    emit("a")
    emit(ValueError)


@calls_back
def lets_its_thread_die(_, emit):
    emit("a")
    _thread.exit()


@calls_back
def raises_in_submit(_, emit):
    raise AssertionError("This is not played: `submit` raises.")


@calls_back
def raises_in_its_cancel(player, emit):
    emit("a")
    player.wait_for_cancel()


@calls_back
def hangs_in_its_cancel(player, emit):
    emit("a")
    player.wait_for_cancel()


@calls_back
def takes_long_to_cancel(player, emit):
    emit("a")
    player.wait_for_cancel()


class CallsBack:
    """A `CallbackBackend` that plays on a thread for each request."""

    def __init__(self, recorder):
        self._recorder = recorder

    def submit(self, request, emit):
        player = Player(self._recorder, request)
        player.record("started")
        if player.how == "raises in submit":
            raise ValueError("scripted")

        def play():
            try:
                calling_back[player.how](player, emit)
            finally:
                player.record("closed", cancelled=request.cancelled)

        def cancel():
            if player.how == "raises in its cancel":
                raise ValueError("scripted")
            if player.how == "hangs in its cancel":
                player.pass_gate()
            if player.how == "takes long to cancel":
                runtime.sleep(0.5)
            player.record("told")

        runtime.start_thread(play)
        return cancel


QUEUES = {"long-queue": 1000, "short-queue": 50}


def work(request):
    """``["work", seconds]``"""
    [[_, seconds]] = json.loads(request.prompt)["steps"]
    runtime.sleep(seconds)
    yield "done"


class Loads:
    """A model that is loaded, or not."""

    def __init__(self, recorder, error=None):
        self._recorder, self._error = recorder, error

    def load(self):
        self._recorder.record("loading", "loaded")
        if self._error is not None:
            raise self._error

    def generate(self, request):
        yield "a"


def add_to(llm, recorder):
    """Serve the models that misbehave, and two that may be loaded."""
    llm.add_backend("loadable", Loads(recorder))
    llm.add_backend("unloadable", Loads(recorder, ValueError("scripted")))

    def generate(request):
        player = Player(recorder, request)
        player.record("started")
        result = generating[player.how](player)
        if not hasattr(result, "__next__"):
            player.record("closed", cancelled=request.cancelled)
            return result
        return _recorded(player, result)

    llm.backend("wayward", worker_threads=WORKERS, stuck_seconds=STUCK_SECONDS)(generate)
    llm.backend("wayward-greenlet", worker="greenlet", worker_threads=WORKERS)(generate)
    llm.add_backend("callback", CallsBack(recorder))
    llm.add_backend("steps", Steps())
    for model, queue_size in QUEUES.items():
        llm.backend(model, worker_threads=2, queue_size=queue_size, backpressure="reject")(work)


STEP_SECONDS = 0.05


class Steps:
    """
    Serves every sequence from one native thread, as continuously batching engines do.

    The script is ``["steps", tokens, every]``: so many tokens, one in so many steps.
    """

    max_concurrency = 10_000

    def __init__(self):
        self._sequences = deque()
        self._is_started = False

    def submit(self, request, emit):
        [[_, tokens, every]] = json.loads(request.prompt)["steps"]
        self._sequences.append((emit, iter(range(tokens * every)), every))
        if not self._is_started:
            self._is_started = True
            runtime.start_thread(self._run)
        return lambda: None

    def _run(self):
        while True:
            due_at = monotonic() + STEP_SECONDS
            for _ in range(len(self._sequences)):
                self._step(self._sequences.popleft())
            runtime.sleep(max(0.0, due_at - monotonic()))

    def _step(self, sequence):
        emit, numbers, every = sequence
        number = next(numbers, None)
        if number is None:
            emit(Finish("stop"))
        elif number % every or emit(f"{number // every} "):
            self._sequences.append(sequence)


def _recorded(player, items):
    try:
        yield from items
    finally:
        player.record("closed", cancelled=player.request.cancelled)
