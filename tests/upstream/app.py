"""The app that the servers of these tests run: models behind the scripted upstream."""

from __future__ import annotations

import os

from flask import Flask

from flask_llmstream import LLMStream, UpstreamBackend

NOBODY = "http://127.0.0.1:9/v1"
PAIRS = 40
"""Of upstreams, for tests that leave one of them in a bad way."""


def create_app():
    app = Flask(__name__)
    app.config.update(LLMSTREAM_HEARTBEAT_SECONDS=5, LLMSTREAM_QUEUE_SIZE=2000)
    llm = LLMStream(app)
    origin = os.environ["UPSTREAM_TEST_ORIGIN"]

    def upstream(name, **options):
        return UpstreamBackend(f"{origin}/{name}/v1", **options)

    llm.add_backend("one", upstream("a", model="upstream-model", api_key="sk-secret-key"))
    for number in range(PAIRS):
        for name in "ab":
            llm.add_backend(f"pair-{number}", upstream(f"{number}-{name}"))
    llm.add_backend("halfdead", UpstreamBackend(NOBODY))
    llm.add_backend("halfdead", upstream("b"))
    llm.add_backend("dead", UpstreamBackend(NOBODY))
    llm.add_backend("narrow", upstream("n2", max_concurrency=2))
    llm.add_backend("narrow", upstream("n1", max_concurrency=1))
    llm.add_backend("listing", upstream("l", discover=True))
    llm.add_backend("listing too", upstream("m", discover=True))
    if "UPSTREAM_TEST_LLAMA" in os.environ:
        llm.add_backend("llama", UpstreamBackend(os.environ["UPSTREAM_TEST_LLAMA"]))
    app.register_blueprint(llm.openai_blueprint())
    app.register_blueprint(llm.ops_blueprint())

    @app.get("/stats/<model>")
    def stats(model):
        engine = llm.engine_of(model)
        return {
            **engine.queue_stats(),
            **engine.worker_stats(),
            "backends": engine.backend_for(model).statistics(),
        }

    return app
