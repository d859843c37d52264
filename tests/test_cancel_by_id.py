"""`DELETE …/streams/<id>`: ending an answer that is one's own, and nobody else's."""

import pytest
from flask_apps import chat, make_app

from flask_llmstream import (
    AsyncInferenceEngine,
    InferenceEngineEnhanced,
    InferenceRequest,
    LLMStream,
    RequestCancelledError,
)
from flask_llmstream.testing import ScriptedBackend

ALICE = {"Authorization": "Bearer secret"}
BOB = {"Authorization": "Bearer other"}


@pytest.fixture
def backend(gate):
    return ScriptedBackend("Hel", gate, "lo")


@pytest.fixture
def client(backend):
    llm = LLMStream()
    llm.add_backend("m", backend)
    app = make_app(llm, api_keys={"alice": "secret", "bob": "other"})
    app.register_blueprint(llm.openai_blueprint())
    return app.test_client()


@pytest.fixture
def stream(client):
    """Alice's answer, under way."""
    response = client.post("/v1/chat/completions", json=chat(stream=True), headers=ALICE)
    yield response
    response.close()


def test_the_caller_ends_an_answer_by_its_id(client, stream, backend):
    frames = stream.iter_encoded()
    id = stream.headers["X-Request-ID"]
    assert f'"id":"chatcmpl-{id}"'.encode() in next(frames)

    answer = client.delete(f"/v1/streams/chatcmpl-{id}", headers=ALICE)

    assert (answer.status_code, answer.json) == (200, {"id": f"chatcmpl-{id}", "cancelled": True})
    rest = b"".join(frames)
    assert b'"code":"cancelled"' in rest
    assert b"[DONE]" not in rest
    backend.script[1].open()
    backend.closed.wait()
    assert backend.requests[0].cancelled


def test_the_id_of_the_request_serves_as_well(client, stream):
    id = stream.headers["X-Request-ID"]

    assert client.delete(f"/v1/streams/{id}", headers=ALICE).status_code == 200


def test_anybody_elses_answer_is_not_to_be_found(client, stream, backend):
    id = f"chatcmpl-{stream.headers['X-Request-ID']}"

    answer = client.delete(f"/v1/streams/{id}", headers=BOB)

    assert answer.status_code == 404
    assert answer.json["error"]["code"] == "stream_not_found"
    assert client.delete(f"/v1/streams/{id}").status_code == 401
    backend.script[1].open()
    assert stream.get_data().endswith(b"[DONE]\n\n")


def test_an_answer_that_is_over_is_gone(client, stream, backend):
    backend.script[1].open()
    stream.get_data()

    answer = client.delete(f"/v1/streams/{stream.headers['X-Request-ID']}", headers=ALICE)

    assert answer.status_code == 404


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("enhanced", [True, False], ids=["enhanced", "plain"])
def test_an_engine_cancels_for_one_identity_alone(gate, enhanced, is_stream):
    backend = ScriptedBackend("a", gate)
    if enhanced:
        engine = InferenceEngineEnhanced()
        engine.register_model("m", backend)
    else:
        engine = AsyncInferenceEngine(backend)
    handles = [
        engine.submit(
            InferenceRequest(
                prompt="p",
                model="m",
                request_id="r",
                identity=identity,
                stream_callback=(lambda _: True) if is_stream else None,
            )
        )
        for identity in ("alice", "bob")
    ]

    assert not engine.cancel("r", identity="carol")
    assert not engine.cancel("r", identity=None)
    assert engine.cancel("r", identity="alice")
    with pytest.raises(RequestCancelledError):
        handles[0].get(10)
    assert not handles[1].ready()
    assert engine.cancel("r")
    assert handles[1].ready()
    gate.open()
    engine.shutdown(timeout_seconds=10)
