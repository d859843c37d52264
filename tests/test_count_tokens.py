"""``POST /v1/messages/count_tokens``: who counts, with whose time, and who is told."""

import socket
import threading
from dataclasses import replace

import pytest
from concurrency import on_a_hub, wait_until
from flask import current_app
from flask_apps import make_app, serving

from flask_llmstream import (
    EngineClosedError,
    InferenceEngineEnhanced,
    InvalidRequestError,
    LLMStream,
    Message,
    PermissionDeniedError,
    UpstreamError,
    request_finished,
)
from flask_llmstream.testing import Gate, ScriptedBackend

HI = {"role": "user", "content": "Hi there"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
URL = "/v1/messages/count_tokens"


class CountingModel(ScriptedBackend):
    """Counts words; before that it plays its script."""

    def count_tokens(self, request):
        assert current_app.name == "tests"
        self.thread = threading.get_ident()
        for _ in self.generate(request):
            pass
        return sum(len(message.text.split()) for message in request.messages)


def serve(backend, *, model="m", **settings):
    llm = LLMStream()
    llm.add_backend(model, backend)
    return llm, app_of(llm, **settings)


def app_of(llm, **settings):
    app = make_app(llm, **settings)
    app.register_blueprint(llm.anthropic_blueprint())
    return app


def count(app, headers=None, **fields):
    return app.test_client().post(URL, json={"messages": [HI], **fields}, headers=headers or {})


def test_the_prompt_is_counted_and_nothing_is_generated():
    backend = CountingModel()
    _, app = serve(backend)
    answer = count(app, system="Be very brief.", tools=[TOOL], tool_choice={"type": "any"})
    assert (answer.status_code, answer.json) == (200, {"input_tokens": 5})
    assert answer.headers["request-id"] == answer.headers["X-Request-ID"]
    assert backend.requests[-1].tool_choice == "required"


def test_what_the_app_adds_to_a_request_is_counted():
    llm, app = serve(CountingModel())
    added = Message("system", "Be brief.")
    llm.before_submit(lambda request: replace(request, messages=[added, *request.messages]))
    assert count(app).json == {"input_tokens": 4}


def test_several_backends_of_a_model_count_as_one():
    llm, app = serve(ScriptedBackend())
    llm.add_backend("m", CountingModel())
    assert count(app).json == {"input_tokens": 2}


def test_an_engine_that_was_given_counts_too():
    llm = LLMStream()
    engine = InferenceEngineEnhanced()
    engine.register_model("m", CountingModel())
    llm.add_engine(engine, models=["m"])
    assert count(app_of(llm)).json == {"input_tokens": 2}


def test_a_model_that_does_not_count_says_so():
    _, app = serve(ScriptedBackend())
    answer = count(app)
    assert answer.status_code == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert answer.json["error"]["message"] == "The model 'm' does not count tokens."


def test_a_count_is_no_answer_that_anybody_is_told_of():
    _, app = serve(CountingModel())
    outcomes = []

    def receive(sender, outcome):
        outcomes.append(outcome)

    with request_finished.connected_to(receive):
        count(app)
        app.test_client().post("/v1/messages", json={"messages": [HI], "max_tokens": 1})
    assert len(outcomes) == 1


# Who may.


def test_the_same_rules_hold_as_for_answers():
    llm, app = serve(CountingModel(supports=()), api_keys="secret", max_request_bytes=200)
    key = {"X-API-Key": "secret"}
    assert count(app).status_code == 401
    assert count(app, key, system="x" * 200).status_code == 413
    assert count(app, key, messages=[]).status_code == 400
    assert count(app, key, model="n").status_code == 404
    assert count(app, key, tools=[TOOL]).status_code == 400
    assert count(app, key).status_code == 200

    @llm.permission_check
    def nobody(identity, request):
        raise PermissionDeniedError("Not for you.")

    assert count(app, key).status_code == 403


def test_a_blueprint_counts_for_its_models_only():
    llm = LLMStream()
    for model in ("a", "b"):
        llm.add_backend(model, CountingModel())
    app = make_app(llm)
    app.register_blueprint(llm.anthropic_blueprint(models=["a"]))
    assert count(app, model="a").status_code == 200
    assert count(app, model="b").status_code == 404


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("No."), 400),
        (UpstreamError("Down."), 502),
        (EngineClosedError("Closed."), 503),
        (KeyError("/etc/secret"), 500),
    ],
)
def test_a_backend_that_fails_to_count_is_an_error(error, status):
    _, app = serve(CountingModel(error))
    answer = count(app)
    assert answer.status_code == status
    assert "secret" not in answer.text


# Whose time.


def test_a_count_has_the_request_s_budget(gate):
    _, app = serve(CountingModel(gate))
    answer = count(app, {"X-Request-Timeout": "0.1"})
    assert (answer.status_code, answer.json["error"]["type"]) == (504, "timeout_error")


def test_counts_wait_in_a_queue_of_their_own(gate):
    backend = CountingModel(gate)
    _, app = serve(backend, worker_threads=1, queue_size=0, backpressure="reject")
    counting = threading.Thread(target=count, args=(app,))
    counting.start()
    gate.reached.wait()
    assert count(app).status_code == 429
    backend.script = ("Hi",)
    answer = app.test_client().post("/v1/messages", json={"messages": [HI], "max_tokens": 1})
    assert answer.status_code == 200
    gate.open()
    counting.join()


def test_a_client_that_leaves_cancels_its_count(gate):
    backend = CountingModel(gate)
    _, app = serve(backend)
    with serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"messages":[{"role":"user","content":"Hi"}]}'
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            gate.reached.wait()
        wait_until(lambda: backend.requests[-1].cancelled)


def test_a_backend_that_waits_on_sockets_counts_where_it_answers():
    """As greenlets where there are any, and many at a time."""
    gates = [Gate(), Gate()]
    backend = CountingModel(worker="greenlet")
    backend.script = ()
    _, app = serve(backend)
    backend.count_tokens = lambda request: gates.pop().pass_through(10) or 2
    first, second = gates
    threads = [threading.Thread(target=count, args=(app,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for gate in (first, second):
        gate.reached.wait()
    for gate in (first, second):
        gate.open()
    for thread in threads:
        thread.join()


def test_the_hub_turns_while_a_native_thread_counts(gate):
    backend = CountingModel(gate)
    _, app = serve(backend)

    def serve_on_a_hub():
        import gevent

        def open_gate():
            while not gate.reached.is_set():
                gevent.sleep(0.001)
            gate.open()

        opener = gevent.spawn(open_gate)
        with gevent.Timeout(10):
            answer = count(app)
            opener.join()
        return threading.get_ident(), answer.json

    thread, answer = on_a_hub(serve_on_a_hub)
    assert answer == {"input_tokens": 2}
    assert backend.thread != thread
