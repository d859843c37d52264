"""Answers that are ended by their id while something else happens to them."""

import json
import threading

import pytest
from concurrency import Background, wait_until
from flask_apps import chat, make_app, scripted

from flask_llmstream import LLMStream
from flask_llmstream.testing import Gate, ScriptedBackend

PATH = "/v1/chat/completions"
ROUNDS = 40


def serve(llm, **settings):
    app = make_app(llm, **settings)
    app.register_blueprint(llm.openai_blueprint())
    return app


def cancel(app, id):
    return app.test_client().delete(f"/v1/streams/{id}").status_code


def at_once(*functions):
    """What they return, each on a thread of its own."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait(10)
        return function()

    threads = [Background(lambda function=function: run(function)) for function in functions]
    return [thread.result() for thread in threads]


def stream_of(app):
    """An answer under way, and its id."""
    answer = app.test_client().post(PATH, json=chat(stream=True))
    return answer, answer.headers["X-Request-ID"]


def cancel_at_the_end(resume_seconds):
    """What the one who cancels is told, and what the one who reads, at the same moment."""
    gate = Gate()
    llm, _ = scripted("Hel", gate, "lo")
    app = serve(llm, resume_seconds=resume_seconds)
    stream, id = stream_of(app)
    _, status, body = at_once(gate.open, lambda: cancel(app, id), stream.get_data)
    return status, body


@pytest.mark.parametrize("resume_seconds", [0, 30])
def test_an_answer_is_cancelled_or_whole_but_never_both(resume_seconds):
    for _ in range(ROUNDS):
        status, body = cancel_at_the_end(resume_seconds)

        is_whole = body.endswith(b"[DONE]\n\n")
        assert is_whole != (b'"code":"cancelled"' in body)
        assert status == (404 if is_whole else 200)


def cancel_twice(resume_seconds):
    """What the two are told, what one who is late, and what the one who reads."""
    gate = Gate()
    llm, _ = scripted("Hel", gate)
    app = serve(llm, resume_seconds=resume_seconds)
    stream, id = stream_of(app)
    statuses = at_once(*[lambda: cancel(app, id)] * 2)
    late, body = cancel(app, id), stream.get_data()
    gate.open()
    return statuses, late, body


@pytest.mark.parametrize("resume_seconds", [0, 30])
def test_of_two_who_cancel_one_is_told_so(resume_seconds):
    for _ in range(ROUNDS):
        statuses, late, body = cancel_twice(resume_seconds)

        assert sorted(statuses) == [200, 404]
        assert late == 404
        assert b'"code":"cancelled"' in body


@pytest.mark.parametrize("resume_seconds", [0, 30])
def test_a_request_that_waits_in_the_queue_is_cancelled_there(gate, resume_seconds):
    llm = LLMStream()
    backend = ScriptedBackend("Hel", gate)
    llm.add_backend("m", backend, worker_threads=1)
    app = serve(llm, resume_seconds=resume_seconds, heartbeat_seconds=0)

    def ask(id):
        return app.test_client().post(PATH, json=chat(stream=True), headers={"X-Request-ID": id})

    running = ask("running")
    waiting = Background(lambda: ask("waiting"))
    with app.app_context():
        wait_until(lambda: llm.stats()["total"]["queued"] == 1)

    assert cancel(app, "waiting") == 200

    answer = waiting.result()
    assert (answer.status_code, answer.json["error"]["code"]) == (499, "cancelled")
    assert len(backend.requests) == 1
    running.close()


@pytest.mark.parametrize("resume_seconds", [0, 30])
@pytest.mark.parametrize("heartbeat_seconds", [0, 0.02])
def test_an_answer_is_cancelled_before_its_first_token(gate, resume_seconds, heartbeat_seconds):
    llm, backend = scripted(gate, "Hello")
    app = serve(llm, resume_seconds=resume_seconds, heartbeat_seconds=heartbeat_seconds)
    headers = {"X-Request-ID": "held"}
    asking = Background(
        lambda: app.test_client().post(PATH, json=chat(stream=True), headers=headers)
    )
    gate.reached.wait()
    if heartbeat_seconds:
        stream = asking.result()
        frames = stream.iter_encoded()
        assert next(frames)

    assert cancel(app, "held") == 200

    if heartbeat_seconds:
        rest = b"".join(frames)
        assert b'"code":"cancelled"' in rest
        assert b"[DONE]" not in rest
    else:
        assert asking.result().status_code == 499
    assert backend.requests[0].cancelled


# Responses in the background.


def begin(app, **fields):
    body = {"input": "Hi", "background": True, **fields}
    return app.test_client().post("/v1/responses", json=body)


def read(app, id, after=0):
    query = f"?stream=true&starting_after={after}"
    return app.test_client().get(f"/v1/responses/{id}{query}")


def events_of(body):
    blocks = [block for block in body.decode().split("\n\n") if "data: " in block]
    return [json.loads(block.partition("data: ")[2]) for block in blocks]


@pytest.mark.parametrize("how", ["cancel", "streams", "delete"])
def test_all_who_read_a_background_response_are_told_that_it_was_ended(gate, how):
    llm, backend = scripted("Hel", gate, "lo")
    app = serve(llm)
    id = begin(app).json["id"]
    gate.reached.wait()
    readers = [read(app, id), read(app, id, after=1)]
    client = app.test_client()
    end = {
        "cancel": lambda: client.post(f"/v1/responses/{id}/cancel"),
        "streams": lambda: client.delete(f"/v1/streams/{id}"),
        "delete": lambda: client.delete(f"/v1/responses/{id}"),
    }[how]

    first, second, answer = at_once(*(reader.get_data for reader in readers), end)

    assert answer.status_code == 200
    told = events_of(first)
    assert events_of(second) == told[1:]
    assert told[-1]["response"]["status"] in ("cancelled", "failed")
    assert backend.requests[0].cancelled
    found = client.get(f"/v1/responses/{id}")
    assert found.status_code == (404 if how == "delete" else 200)
    if how != "delete":
        assert found.json["status"] == told[-1]["response"]["status"]
    assert read(app, id).status_code == found.status_code


def at_the_end_of_a_response(method, path=""):
    """Ask for something at the very moment of its end: the app, its id, and the answer."""
    gate = Gate()
    llm, _ = scripted("Hel", gate, "lo")
    app = serve(llm)
    id = begin(app).json["id"]
    gate.reached.wait()
    client = app.test_client()
    _, answer = at_once(gate.open, lambda: client.open(f"/v1/responses/{id}{path}", method=method))
    with app.app_context():
        live = llm.recordings()._live
    return app, id, answer, lambda: not live


def test_a_response_that_is_deleted_as_it_ends_is_gone():
    for _ in range(ROUNDS):
        app, id, answer, is_over = at_the_end_of_a_response("DELETE")

        assert answer.status_code == 200
        wait_until(is_over)
        client = app.test_client()
        assert client.get(f"/v1/responses/{id}").status_code == 404
        assert client.delete(f"/v1/responses/{id}").status_code == 404


def test_a_response_is_cancelled_or_completed_for_good():
    for _ in range(ROUNDS):
        app, id, answer, is_over = at_the_end_of_a_response("POST", "/cancel")

        told = events_of(read(app, id).data)[-1]["response"]["status"]
        wait_until(is_over)
        assert app.test_client().get(f"/v1/responses/{id}").json["status"] == told
        if answer.json["status"] not in ("queued", "in_progress"):
            assert answer.json["status"] == told
