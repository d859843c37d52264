"""Workers: where a run runs, what a stuck one costs, and how a pool recovers."""

from __future__ import annotations

import pytest
from concurrency import wait_until
from engine_fakes import GatedBackend, ask

from flask_llmstream.core import runtime
from flask_llmstream.exceptions import EngineClosedError

pytest_plugins = ["engine_fixture"]


def get_stuck(engine, backend, *prompts):
    """Have a worker stuck with each of *prompts* in turn."""
    for prompt in prompts:
        stuck = engine.worker_stats()["stuck"]
        handle = engine.submit(ask(prompt))
        backend.wait_for(prompt)
        handle.cancel()
        wait_until(lambda stuck=stuck: engine.worker_stats()["stuck"] == stuck + 1)


class TestStuckWorkers:
    def test_a_replaced_worker_that_returns_takes_the_place_of_one_still_stuck(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1, stuck_seconds=0)
        get_stuck(engine, backend, "first", "second")
        with pytest.raises(EngineClosedError):
            engine.submit(ask("refused"))

        backend.open("first")
        wait_until(lambda: engine.is_available)
        backend.open("third")

        assert engine.submit(ask("third")).get(5).text == "third!"
        assert engine.worker_stats()["stuck"] == 1


class TestStarting:
    def test_a_worker_that_could_not_be_made_is_tried_again(self, engines, monkeypatch):
        engine = engines(lambda request: request.prompt, worker_threads=1)

        def no_thread(function):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(runtime, "start_thread", no_thread)
            with pytest.raises(RuntimeError, match="new thread"):
                engine.submit(ask("lost"))

        assert engine.submit(ask("found")).get(5).text == "found"
