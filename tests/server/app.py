"""
The app that the servers of these tests run. What a backend does is in the request:
a script as JSON, whose steps are lists.

    ["emit", "text"]        yield it
    ["gate"]                wait for the test; gates are numbered from 0
    ["stuck", seconds]      block the thread, whatever anybody says
    ["until_cancelled"]     wait to be told, and record when
    ["raise", "message"]    fail
    ["exit"]                try to end the process
    ["flood", count, size]  yield *count* tokens of *size* letters
"""

from __future__ import annotations

import json
import os
import sys
from time import monotonic

from flask import Flask, Response, abort, current_app, has_request_context, request

from flask_llmstream import InferenceRequest, LLMStream, request_finished
from flask_llmstream.config import check_values
from flask_llmstream.core import runtime
from flask_llmstream.dialects import NativeDialect, Parsed

from . import probe, workload
from .control import Listener, Recorder

SCRIPTED_MODELS = {
    "thread": {"worker_threads": 64},
    "greenlet": {},
    "single": {"worker_threads": 1},
    "full": {"worker_threads": 1, "queue_size": 1},
}


def play(recorder, inference_request):
    """A scripted backend. Every run records its start, its cancel and its close."""
    script = json.loads(inference_request.last_user_text)
    id, gates = script["id"], 0
    recorder.record(id, "started", request_id=inference_request.request_id)
    try:
        for verb, *arguments in script["steps"]:
            if verb == "emit":
                yield arguments[0]
            elif verb == "gate":
                recorder.pass_gate(id, gates)
                gates += 1
            elif verb == "stuck":
                recorder.record(id, "stuck")
                runtime.original("time", "sleep")(arguments[0])
            elif verb == "until_cancelled":
                _wait_for_cancel(recorder, id, inference_request)
            elif verb == "raise":
                raise RuntimeError(arguments[0])
            elif verb == "exit":
                sys.exit("scripted")
            elif verb == "flood":
                count, size = arguments
                for number in range(count):
                    recorder.progress[id] = number
                    yield "x" * size
        recorder.record(id, "played")
    finally:
        recorder.record(id, "closed", cancelled=inference_request.cancelled)


def _wait_for_cancel(recorder, id, inference_request):
    recorder.record(id, "waiting")
    until = monotonic() + 20.0
    while not inference_request.cancelled and monotonic() < until:
        runtime.sleep(0.0005)
    recorder.record(id, "cancelled" if inference_request.cancelled else "forgotten")


def create_app():
    app = Flask(__name__)
    app.config.update(json.loads(os.environ.get("SERVER_TEST_CONFIG", "{}")))
    recorder = app.extensions["recorder"] = Recorder()
    llm = LLMStream(app)
    for model, options in SCRIPTED_MODELS.items():
        worker = "greenlet" if model == "greenlet" else "thread"
        llm.backend(model, worker=worker, **options)(lambda asked: play(recorder, asked))
    workload.add_to(app, llm)

    def answer(command):
        id = command.get("id")
        if command["do"] == "open":
            recorder.open_gate(id, command["number"])
        elif command["do"] == "wait":
            recorder.wait(id, command["name"])
            return next(e for e in recorder.events(id) if e["name"] == command["name"])
        elif command["do"] == "events":
            return recorder.events(id)
        elif command["do"] == "progress":
            return recorder.progress.get(id, 0)
        elif command["do"] == "stats":
            with app.app_context():
                engine = llm.engine_of(command["model"])
                return {
                    **engine.queue_stats(),
                    **engine.worker_stats(),
                    "is_available": engine.is_available,
                }
        elif command["do"] == "look":
            return probe.look(app, llm)
        return {}

    app.before_request(Listener(answer).start)
    app.register_blueprint(llm.ops_blueprint())
    app.register_blueprint(llm.openai_blueprint())
    app.register_blueprint(
        llm.openai_blueprint(name="hurried", deadline_seconds=0.3, heartbeat_seconds=0),
        url_prefix="/hurried/v1",
    )
    _add_routes(app, llm, recorder)

    def on_signal(sender, outcome):
        recorder.record(outcome.request.request_id, "signalled", text=outcome.text[:1000])

    request_finished.connect(on_signal, app, weak=False)
    if app.config.get("WARM_UP"):
        script = json.dumps({"id": "warm-up", "steps": [["emit", "warm"]]})
        with app.app_context():
            for model in SCRIPTED_MODELS:
                assert llm.complete(InferenceRequest(prompt=script, model=model)).text == "warm"
    return app


def create_shouting_app():
    """The same, behind a middleware that changes what it sends."""
    app = create_app()
    inner = app.wsgi_app

    def shout(environ, start_response):
        body = inner(environ, start_response)
        try:
            for data in body:
                yield data.upper()
        finally:
            body.close()

    app.wsgi_app = shout
    return app


def _asked():
    """The request's question: ``{"script", "prompt", "model", "settings", "stream"}``."""
    return json.loads(request.args["q"]) if "q" in request.args else request.get_json()


def _inference_request(asked):
    prompt = asked.get("prompt") or json.dumps(asked["script"])
    return InferenceRequest(
        prompt=prompt, model=asked.get("model", "thread"), priority=asked.get("priority", 0)
    )


def _add_routes(app, llm, recorder):
    def finish(asked):
        def on_finish(outcome):
            recorder.record(
                asked["script"]["id"],
                "finished",
                code=outcome.error and outcome.error.code,
                text=outcome.text[:1000],
                length=len(outcome.text),
                app=current_app.name,
                in_request=has_request_context(),
            )

        return on_finish

    def stream(asked):
        inference_request = _inference_request(asked)
        settings = asked.get("settings")
        if settings is None and asked.get("stream") is None:
            return llm.stream(inference_request, on_finish=finish(asked))
        parsed = Parsed(inference_request, asked.get("stream"))
        call = llm.call(check_values(settings or {}))
        return llm.answer(call, NativeDialect(), parsed, on_finish=finish(asked))

    @app.route("/ping")
    def ping():
        return "pong"

    @app.route("/stream", methods=["GET", "POST"])
    def stream_view():
        return stream(_asked())

    @app.post("/complete")
    def complete_view():
        return llm.complete(_inference_request(_asked())).text

    @app.post("/tokens")
    def tokens_view():
        """A view that makes a response of its own of several answers, one after the other."""
        asked = _asked()
        iterators = [
            llm.tokens(_inference_request({**asked, "script": script}))
            for script in asked["scripts"]
        ]

        def body():
            for iterator in iterators:
                yield from iterator

        response = Response(body(), mimetype="text/plain")
        for iterator in iterators:
            response.call_on_close(iterator.close)
        return response

    @app.post("/after/<how>")
    def fail_after_stream(how):
        """What an app may do to an answer that it has begun."""
        asked = _asked()
        if asked.get("as_tokens"):
            tokens = llm.tokens(_inference_request(asked))
            next(tokens)
            response = Response(tokens)
        else:
            response = stream(asked)
        if how == "exception":
            raise LookupError("The app fails after llm.stream().")
        if how == "abort":
            abort(418)
        if how == "drop":
            return "something else"
        if how == "replace":
            response.set_data(b"other data")
        return response

    @app.post("/drop-first")
    def drop_before_answer():
        """Drops its tokens, and does not answer before their backend knows."""
        asked = _asked()
        tokens = llm.tokens(_inference_request(asked))
        first = next(tokens)
        del tokens
        recorder.wait(asked["script"]["id"], "cancelled")
        return first

    @app.errorhandler(LookupError)
    def on_lookup_error(_):
        return "failed", 500
