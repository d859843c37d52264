"""What gunicorn calls, without gunicorn: models loaded early, and a goodbye."""

import logging
from time import monotonic
from weakref import WeakSet

import pytest
from concurrency import wait_until
from flask_apps import make_app, scripted

from flask_llmstream import (
    InferenceRequest,
    LLMStream,
    ServerShutdownError,
    UnknownModelError,
    shutdown,
)
from flask_llmstream import gunicorn as hooks
from flask_llmstream.testing import Gate, ScriptedBackend


class Loaded(ScriptedBackend):
    """Counts how often it was loaded, and fails if it is to."""

    def __init__(self, error=None):
        super().__init__("a")
        self.loads = 0
        self._error = error

    def load(self):
        self.loads += 1
        if self._error is not None:
            raise self._error


@pytest.fixture
def alone(monkeypatch):
    """Let the hooks know of the apps made here, not of what other tests left."""
    monkeypatch.setattr(shutdown, "_watches", WeakSet())
    made = []
    monkeypatch.setattr(hooks, "extensions", lambda: made)

    def make(llm):
        app = make_app(llm)
        made.append((llm, app))
        return app

    return make


def test_every_backend_that_can_be_loaded_is(alone):
    llm = LLMStream()
    one, other, failing = Loaded(), Loaded(), Loaded(ValueError("as planned"))
    llm.add_backend("failing", failing)
    llm.add_backend("balanced", one)
    llm.add_backend("balanced", other)
    llm.add_backend("nothing to load", ScriptedBackend("a"))
    alone(llm)

    hooks.post_worker_init(None)

    assert [backend.loads for backend in (one, other, failing)] == [1, 1, 1]


def test_a_model_that_cannot_be_loaded_is_logged(alone, caplog):
    llm = LLMStream()
    llm.add_backend("m", Loaded(ValueError("as planned")))
    alone(llm)
    with caplog.at_level(logging.ERROR, "flask_llmstream"):
        hooks.post_worker_init(None)
    (record,) = caplog.records
    assert record.getMessage() == "The model 'm' could not be loaded."
    assert str(record.exc_info[1]) == "as planned"


def test_an_unknown_model_cannot_be_loaded(alone):
    llm = LLMStream()
    with alone(llm).app_context(), pytest.raises(UnknownModelError):
        llm.load_model("m")


def test_every_app_s_extension_is_known_while_both_live():
    from flask_llmstream.extension import extensions

    llm = LLMStream()
    app = make_app(llm)
    assert (llm, app) in extensions()


def test_the_goodbye_ends_what_runs_and_refuses_what_comes(alone):
    gate = Gate()
    llm, backend = scripted("a", gate)
    with alone(llm).app_context():
        engine = llm.engine_of("m")
        handle = engine.submit(InferenceRequest(prompt="Hi"))
        backend.started.wait()
        hooks.worker_int(None)
        gate.open()
        with pytest.raises(ServerShutdownError):
            handle.get(5)
        with pytest.raises(ServerShutdownError):
            engine.submit(InferenceRequest(prompt="Hi"))


def test_the_goodbye_of_an_idle_worker_takes_no_time(alone):
    llm, _ = scripted("a")
    with alone(llm).app_context():
        llm.engine_of("m").submit(InferenceRequest(prompt="Hi")).get(5)
        begun_at = monotonic()
        hooks.worker_int(None)
        assert monotonic() - begun_at < shutdown._GOODBYE_SECONDS


def test_a_signal_handler_waits_for_no_lock_that_it_interrupted(alone):
    llm, _ = scripted("a")
    with alone(llm).app_context():
        engine = llm.engine_of("m")
        begun_at = monotonic()
        with engine._lock:  # As its holder on this very thread would, were it interrupted.
            hooks.worker_int(None)
        assert monotonic() - begun_at < shutdown._GOODBYE_SECONDS + 0.5
        wait_until(lambda: not engine.is_available)
