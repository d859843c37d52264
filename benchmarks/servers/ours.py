"""This package: the OpenAI route, with every feature on."""

from __future__ import annotations

from collections import deque

from flask import Flask

from flask_llmstream import LLMStream

from ..steps import StepEngine

MOST_STREAMS = 20_000


class Steps:
    """The step engine as a `CallbackBackend`."""

    max_concurrency = MOST_STREAMS
    supports = frozenset()

    def __init__(self):
        self._joining = deque()
        self._emits = []
        StepEngine(self._step)

    def submit(self, request, emit):  # noqa: ARG002
        self._joining.append(emit)
        return lambda: None

    def _step(self, text):
        emits = self._emits
        while self._joining:
            emits.append(self._joining.popleft())
        self._emits = [emit for emit in emits if emit(text)]


class Silent:
    """One token, then nothing: streams that are open and idle."""

    max_concurrency = MOST_STREAMS
    supports = frozenset()

    def submit(self, request, emit):  # noqa: ARG002
        emit("~1~0~")
        return lambda: None


def create_app():
    app = Flask(__name__)
    app.config["LLMSTREAM_QUEUE_SIZE"] = MOST_STREAMS
    app.config.from_prefixed_env()  # FLASK_LLMSTREAM_COALESCE_SECONDS=0.2
    llm = LLMStream(app)
    llm.add_backend("steps", Steps())
    llm.add_backend("silent", Silent())

    @llm.backend("instant")
    def instant(request):  # noqa: ARG001
        yield "~1~0~"

    app.register_blueprint(llm.openai_blueprint())
    return app
