"""The scripted upstream, the real one, and servers whose app streams from them."""

from __future__ import annotations

import json
import sys
import urllib.request
from itertools import count

import pytest
from server.process import Process

from flask_llmstream import AsyncInferenceEngine, InferenceRequest, UpstreamBackend
from flask_llmstream.engines.balancing import BalancedBackend

_numbers = count(1)

GUNICORN = [
    *(sys.executable, "-m", "gunicorn", "upstream.app:create_app()"),
    *("--bind", "127.0.0.1:0", "--log-level", "info"),
]
SERVERS = {
    "gevent": [*GUNICORN, "-k", "gevent", "--worker-connections", "4000"],
    "gthread": [*GUNICORN, "-k", "gthread", "--threads", "16"],
}


class Scripted(Process):
    """The scripted upstream, with the test's hand on it."""

    def __init__(self, *arguments):
        super().__init__([sys.executable, "-m", "upstream.scripted", *arguments])

    @property
    def origin(self):
        return f"http://127.0.0.1:{self.address[1]}"

    def url(self, name="a"):
        return f"{self.origin}/{name}/v1"

    def get(self, path):
        with urllib.request.urlopen(self.origin + path, timeout=15) as answer:
            return json.loads(answer.read())

    def records(self, id, at_least=1):
        """What happened to request *id*, once *at_least* so many records are there."""
        records = self.get(f"/log/{id}?n={at_least}")
        assert len(records) >= at_least, records
        return records


@pytest.fixture(scope="session")
def scripted():
    process = Scripted()
    yield process
    process.kill()


@pytest.fixture(scope="session")
def llama_url(smollm2_path):
    """llama.cpp's own HTTP server with the embedded model."""
    process = Process([sys.executable, "-m", "upstream.llama_server", str(smollm2_path)])
    yield f"http://127.0.0.1:{process.address[1]}/v1"
    process.kill()


@pytest.fixture(scope="session")
def servers(scripted):
    """A gunicorn by its worker kind, whose app streams from the scripted upstream."""
    running = {}

    def get(kind):
        if kind not in running:
            environment = {"UPSTREAM_TEST_ORIGIN": scripted.origin}
            running[kind] = Process(SERVERS[kind], environment=environment)
        return running[kind]

    yield get
    for process in running.values():
        process.kill()


def new_id():
    return f"up-{next(_numbers)}"


def scripts(id, any=None, **by_name):
    """A prompt that tells the scripted upstreams what to do."""
    told = {"id": id, **by_name}
    if any is not None:
        told["any"] = any
    return json.dumps(told)


HELLO = [["head"], ["text", "Hel"], ["text", "lo"], ["finish"], ["done"], ["end"]]


class Playing:
    """A request under way: its engine, its handle, and the `items` that came."""

    def __init__(self, engine, request, **options):
        self.engine = engine
        self.items = []
        request.stream_callback = lambda item: self.items.append(item) or True
        handle = engine.submit(request, **options)
        self.get = handle.get
        self.cancel = handle.cancel


@pytest.fixture
def play(scripted):
    """
    Play scripts to an engine of this process, which works on threads.

    Returns:
        The request's id, and its `Playing`.
    """
    engines = []

    def play(any=None, *, names="a", options=None, timeout_seconds=10.0, fields=None, **by_name):
        id = new_id()
        backends = [UpstreamBackend(scripted.url(name), **(options or {})) for name in names]
        engine = AsyncInferenceEngine(BalancedBackend(backends), worker_threads=8)
        engines.append(engine)
        request = InferenceRequest(
            request_id=id, prompt=scripts(id, any, **by_name), **(fields or {})
        )
        return id, Playing(engine, request, timeout_seconds=timeout_seconds)

    yield play
    for engine in engines:
        engine.shutdown(timeout_seconds=0)
