"""Engines for tests, whose books are checked at the end."""

from __future__ import annotations

import pytest
from concurrency import wait_until
from engine_fakes import FunctionBackend, GatedBackend, check_books

from flask_llmstream.engines.asynchronous import AsyncInferenceEngine


class Engines:
    """Makes engines; at the end of the test they are shut down and their books checked."""

    def __init__(self):
        self._engines = []

    def __call__(self, backend, **options):
        if not hasattr(backend, "generate") and not hasattr(backend, "submit"):
            backend = FunctionBackend(backend)
        engine = AsyncInferenceEngine(backend, **options)
        self._engines.append((engine, backend))
        return engine

    def close(self):
        for engine, backend in self._engines:
            if isinstance(backend, GatedBackend):
                backend.open()
            engine.shutdown(timeout_seconds=5)
            wait_until(lambda engine=engine: not engine.is_in_backend)
            stats = engine.queue_stats()
            check_books(stats)
            assert (stats["waiting"], stats["running"], stats["blocked"]) == (0, 0, 0)
            wait_until(lambda engine=engine: engine.worker_stats()["busy"] == 0)
            assert engine.worker_stats()["stuck"] == 0
            assert not engine._live


@pytest.fixture
def engines():
    """Makes engines; see `Engines`."""
    factory = Engines()
    yield factory
    factory.close()
