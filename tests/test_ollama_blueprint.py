"""Ollama's routes: framings, names of models, and what there is to know about them."""

import json

import pytest
from flask_apps import chat, make_app, scripted

from flask_llmstream import (
    ConfigurationError,
    EngineClosedError,
    LLMStream,
    RequestDroppedError,
    Usage,
)
from flask_llmstream.testing import ScriptedBackend

KEY = {"Authorization": "Bearer secret"}


def client_of(llm, blueprint=None, **config):
    app = make_app(llm, **config)
    app.register_blueprint(blueprint or llm.ollama_blueprint())
    return app.test_client()


def ask(client, url="/api/chat", *, headers=None, **fields):
    return client.post(url, json=chat(**fields), headers=headers)


def lines_of(response):
    return [json.loads(line) for line in response.text.splitlines()]


# Framings.


def test_it_streams_lines_unless_told_otherwise():
    llm, _ = scripted("Hel", "lo", Usage(3, 2))
    response = ask(client_of(llm))

    assert (response.status_code, response.content_type) == (200, "application/x-ndjson")
    assert response.headers["X-Accel-Buffering"] == "no"
    *parts, last = lines_of(response)
    assert "".join(part["message"]["content"] for part in parts) == "Hello"
    assert last["done"]


def test_it_answers_whole_where_it_is_told_to():
    llm, _ = scripted("Hel", "lo")
    response = ask(client_of(llm), stream=False)

    assert response.content_type == "application/json"
    assert response.get_json()["message"] == {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "application/x-ndjson"),
        ("application/json", "application/x-ndjson"),  # What Ollama's clients always send.
        ("text/event-stream", "text/event-stream"),
        ("text/plain", "text/plain; charset=utf-8"),
    ],
)
@pytest.mark.parametrize("stream", [{}, {"stream": True}, {"stream": None}])
def test_accept_picks_the_framing_of_a_stream(accept, content_type, stream):
    llm, _ = scripted("Hi")
    response = ask(client_of(llm), headers={"Accept": accept}, **stream)

    assert (response.status_code, response.content_type) == (200, content_type)
    assert "Hi" in response.text


def test_what_it_cannot_produce_is_refused():
    llm, backend = scripted("Hi")
    response = ask(client_of(llm), headers={"Accept": "image/png"})

    assert response.status_code == 406
    assert backend.requests == []


# Names.


def test_a_tag_that_says_nothing_need_not_match():
    llm = LLMStream()
    for model in ("small", "large:latest", "new", "new:latest", "old:7b"):
        llm.add_backend(model, ScriptedBackend("Hi"))
    client = client_of(llm)

    def answered_by(model):
        return ask(client, model=model, stream=False).get_json()["model"]

    assert answered_by("small:latest") == answered_by("small") == "small"
    assert answered_by("large") == answered_by("large:latest") == "large:latest"
    assert (answered_by("new"), answered_by("new:latest")) == ("new", "new:latest")
    for model in ("old", "old:latest", "old:7b:latest:latest", "none"):
        assert ask(client, model=model).status_code == 404


def test_a_request_without_a_model_gets_the_default():
    llm, _ = scripted("Hi")
    assert ask(client_of(llm), stream=False).get_json()["model"] == "m"


def test_only_its_own_models_can_be_had():
    llm, backend = scripted("Hi")
    llm.add_backend("other", ScriptedBackend("Hi"))
    client = client_of(llm, llm.ollama_blueprint(models=["other"]))

    assert ask(client, model="m").status_code == 404
    assert ask(client, model="m:latest").status_code == 404
    assert client.post("/api/show", json={"model": "m"}).status_code == 404
    assert client.post("/api/chat", json={"model": "m"}).status_code == 404
    assert [each["name"] for each in client.get("/api/tags").get_json()["models"]] == ["other"]
    assert [each["name"] for each in client.get("/api/ps").get_json()["models"]] == ["other"]
    assert backend.requests == []


def test_settings_are_its_own():
    llm, _ = scripted("Hi")
    client = client_of(llm, llm.ollama_blueprint(max_tokens_limit=5))

    assert ask(client, options={"num_predict": 6}).status_code == 400
    with pytest.raises(ConfigurationError, match="There is no setting num_ctx"):
        llm.ollama_blueprint(name="other", num_ctx=1)


# Models.


def test_what_a_model_is_told_about_it():
    llm, backend = scripted(supports={"tools"})
    backend.context_tokens = 8192
    client = client_of(llm)

    shown = client.post("/api/show", json={"model": "m:latest"}).get_json()
    assert shown["capabilities"] == ["completion", "tools"]
    architecture = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{architecture}.context_length"] == 8192
    assert client.post("/api/show", json={"name": "m"}).get_json() == shown
    (running,) = client.get("/api/ps").get_json()["models"]
    assert (running["name"], running["context_length"]) == ("m", 8192)


def test_a_backend_that_does_not_say_what_it_can_is_trusted_with_tools():
    llm = LLMStream()
    llm.backend("m")(lambda request: "Hi")
    shown = client_of(llm).post("/api/show", json={"model": "m"}).get_json()

    assert shown["capabilities"] == ["completion", "tools"]
    assert not any("context_length" in name for name in shown["model_info"])


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": "none"}])
def test_a_model_that_is_not_there_is_not_shown(body):
    llm, _ = scripted()
    assert client_of(llm).post("/api/show", json=body).status_code == 404


def test_a_model_that_is_not_in_memory_does_not_run():
    llm, backend = scripted()
    client = client_of(llm)
    backend.is_loaded = False
    assert client.get("/api/ps").get_json() == {"models": []}
    backend.is_loaded = True
    assert len(client.get("/api/ps").get_json()["models"]) == 1


def test_the_version_is_one_that_clients_compare_with():
    llm, _ = scripted()
    version = client_of(llm).get("/api/version").get_json()["version"]

    # VS Code wants 0.6.4 at least.
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


# Loading.


@pytest.mark.parametrize("url", ["/api/chat", "/api/generate"])
def test_loading_needs_no_place_in_the_queue(url, gate):
    llm = LLMStream()
    llm.add_backend(
        "m", ScriptedBackend("a", gate), worker_threads=1, queue_size=0, backpressure="reject"
    )
    client = client_of(llm)
    with ask(client, model="m"):  # All places are taken.
        assert ask(client, model="m").status_code == 429
        response = client.post(url, json={"model": "m"})
        assert response.status_code == 200
        assert response.get_json()["done_reason"] == "load"


def test_loading_says_where_the_model_cannot_be_had():
    llm, backend = scripted()

    def check_ready():
        raise EngineClosedError("The model was closed.")

    backend.check_ready = check_ready
    response = client_of(llm).post("/api/generate", json={"model": "m"})
    assert (response.status_code, response.get_json()["error"]) == (503, "The model was closed.")


# Errors.


def test_an_error_is_a_text_that_ollama_s_clients_show():
    llm, _ = scripted(RequestDroppedError("Come back."))
    response = ask(client_of(llm))

    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.get_json() == {
        "error": "Come back.",
        "code": "request_dropped",
        "retryable": True,
    }


def test_every_route_needs_the_key():
    llm, _ = scripted("Hi")
    client = client_of(llm, api_keys="secret")

    for url in ("/api/chat", "/api/generate", "/api/show"):
        assert client.post(url, json={}).status_code == 401
    for url in ("/api/tags", "/api/ps", "/api/version"):
        assert client.get(url).status_code == 401
        assert client.get(url, headers=KEY).status_code == 200
        assert client.head(url, headers=KEY).status_code == 200


@pytest.mark.parametrize("url", ["/api/chat", "/api/generate", "/api/show"])
def test_a_body_that_cannot_be_read_is_refused(url):
    llm, _ = scripted()
    client = client_of(llm, max_request_bytes=100)

    malformed = client.post(url, data=b"{")
    assert malformed.status_code == 400
    assert malformed.get_json()["error"].startswith("body is not valid JSON")
    assert client.post(url, data=b" " * 101).status_code == 413


def test_an_answer_is_ended_by_its_id(gate):
    llm, _ = scripted("Hel", gate, "lo")
    client = client_of(llm)
    with ask(client, model="m") as response:
        frames = response.iter_encoded()
        next(frames)
        id = response.headers["X-Request-ID"]
        assert client.delete(f"/api/streams/{id}").get_json() == {"id": id, "cancelled": True}
        assert json.loads(b"".join(frames))["code"] == "cancelled"


def test_extra_options_reach_a_backend_that_takes_them():
    llm, backend = scripted("Hi", supports={"extra_body"})
    client = client_of(llm)

    assert ask(client, think="high", options={"min_p": 0.1, "num_ctx": 1}).status_code == 200
    assert backend.requests[0].extra_body == {"reasoning_effort": "high", "min_p": 0.1}


def test_a_penalty_that_a_backend_would_ignore_is_refused():
    llm, _ = scripted("Hi")
    response = ask(client_of(llm), options={"presence_penalty": 1.5})

    assert response.status_code == 400
    assert "presence_penalty" in response.get_json()["error"]
