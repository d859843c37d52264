"""Backends that do as a test tells them, and what the engine's tests do over and over."""

from __future__ import annotations

import threading
from collections import deque

from concurrency import DEADLINE_SECONDS, Background, wait_until

from flask_llmstream.core.messages import InferenceRequest
from flask_llmstream.exceptions import LLMStreamError

ENDS = ("completed", "cancelled", "rejected", "timed_out", "dropped", "failed")


def check_books(stats):
    """Every request that was ever submitted is in exactly one place."""
    ended = sum(stats[f"total_{end}"] for end in ENDS)
    here = stats["waiting"] + stats["running"] + stats["blocked"]
    assert stats["total_submitted"] == ended + here, stats
    assert min(stats.values()) >= 0, stats


class FunctionBackend:
    """``generate`` is the function that it is made of."""

    def __init__(self, function, **attributes):
        self.generate = function
        self.__dict__.update(attributes)


class GatedBackend:
    """Each run waits inside the backend, deaf to its cancel, until its gate is opened."""

    def __init__(self):
        self.started = []
        self._gates = {}
        self._is_open = False
        self._lock = threading.Lock()

    def generate(self, request):
        with self._lock:
            gate = self._gates.setdefault(request.prompt, threading.Event())
            if self._is_open:
                gate.set()
            self.started.append(request.prompt)
        assert gate.wait(DEADLINE_SECONDS)
        yield f"{request.prompt}!"

    def open(self, *prompts):
        """Let the runs of *prompts* go; without any, all of them for good."""
        with self._lock:
            self._is_open = self._is_open or not prompts
            for prompt in prompts or tuple(self._gates):
                self._gates.setdefault(prompt, threading.Event()).set()

    def wait_for(self, *prompts):
        """Wait until these runs have started, in any order."""
        wait_until(lambda: set(prompts) <= set(self.started))


class CallbackFake:
    """A callback backend whose test holds each request's `emit`, by prompt."""

    def __init__(self, **attributes):
        self.emits = {}
        self.requests = {}
        self.cancelled = deque()
        self.__dict__.update(attributes)

    def submit(self, request, emit):
        self.requests[request.prompt] = request
        self.emits[request.prompt] = emit
        return lambda: self.cancelled.append(request.prompt)

    def emit(self, prompt, *items):
        """Emit from a thread of the backend's own; returns what the last `emit` returned."""
        self.wait_for(prompt)
        return Background(lambda: [self.emits[prompt](item) for item in items][-1]).result()

    def wait_for(self, *prompts):
        wait_until(lambda: set(prompts) <= set(self.emits))


class TokenLog:
    """A token callback that keeps its calls, and the thread of each."""

    def __init__(self):
        self.calls = []
        self.threads = []

    def __call__(self, token, is_final):
        self.calls.append((token, is_final))
        self.threads.append(threading.get_ident())

    @property
    def finals(self):
        return self.calls.count(("", True))

    @property
    def text(self):
        return "".join(token for token, _ in self.calls)

    def wait_for_final(self):
        wait_until(lambda: self.finals)
        assert self.calls[-1] == ("", True)


def ask(prompt="p", **fields):
    return InferenceRequest(prompt=prompt, **fields)


def run_of(handle):
    """The engine's side of *handle*."""
    return handle._cancel.__self__


def pass_deadline(handle):
    """The clock's call when the deadline has passed, without the wait."""
    run_of(handle).timer.function()


def error_of(handle, timeout_seconds=DEADLINE_SECONDS):
    """The error that *handle* ends with."""
    try:
        response = handle.get(timeout_seconds)
    except LLMStreamError as error:
        return error
    raise AssertionError(f"it was answered: {response}")


def fill(engine, backend, prompt="busy", workers=1):
    """Occupy *workers* workers; returns the handles."""
    handles = [engine.submit(ask(f"{prompt}-{number}")) for number in range(workers)]
    backend.wait_for(*(f"{prompt}-{number}" for number in range(workers)))
    return handles


def submit_blocked(engine, request, **options):
    """Submit on a thread of its own, which is blocked by the full queue once this returns."""
    blocked = engine.queue_stats()["blocked"]
    submitter = Background(lambda: engine.submit(request, **options))
    wait_until(lambda: engine.queue_stats()["blocked"] == blocked + 1)
    return submitter
