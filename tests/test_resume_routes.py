"""Where a stream is resumed, by whom, and in which dialect: nowhere but where it was begun."""

import json

import pytest
from concurrency import wait_until
from flask_apps import chat, make_app, scripted

from flask_llmstream import (
    AuthenticationError,
    InferenceRequest,
    LLMStream,
    UpstreamError,
)
from flask_llmstream.framing import SSEDecoder
from flask_llmstream.testing import ScriptedBackend

MESSAGES = [{"role": "user", "content": "Hi"}]
PATHS = {
    "/v1/chat/completions": chat(stream=True),
    "/v1/completions": {"prompt": "Hi", "stream": True},
    "/v1/responses": {"input": "Hi", "model": "m", "stream": True},
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 100, "stream": True},
    "/api/ai": {"messages": [{"role": "user", "parts": [{"type": "text", "text": "Hi"}]}]},
    "/stream": {"prompt": "Hi", "stream": True},
}


def serve(llm, **settings):
    app = make_app(llm, resume_seconds=30, **settings)
    app.register_blueprint(llm.openai_blueprint())
    app.register_blueprint(llm.anthropic_blueprint())
    app.register_blueprint(llm.ai_sdk_blueprint())
    app.register_blueprint(llm.native_blueprint())
    return app


@pytest.fixture
def service():
    llm, backend = scripted("Hel", "lo")
    return serve(llm).test_client(), backend


def ask(client, path, last=None, **more):
    headers = {"Last-Event-ID": last} if last else {}
    return client.post(path, json=PATHS[path], headers={**headers, **more})


def events_of(body):
    return SSEDecoder().feed(body if isinstance(body, bytes) else body.encode())


@pytest.mark.parametrize("path", PATHS)
def test_every_dialect_is_resumed_from_every_event(service, path):
    client, backend = service
    whole = ask(client, path)
    events = events_of(whole.data)
    assert [int(event.id.rpartition(".")[2]) for event in events] == [*range(1, len(events) + 1)]

    for number, event in enumerate(events, 1):
        rest = ask(client, path, event.id)
        assert rest.status_code == (204 if number == len(events) else 200)
        assert events_of(rest.data) == events[number:]
        for name in ("X-Vercel-AI-UI-Message-Stream", "Content-Type", "Cache-Control"):
            if rest.status_code == 200:
                assert rest.headers.get(name) == whole.headers.get(name)
    assert len(backend.requests) == 1


@pytest.mark.parametrize("begun_at", PATHS)
def test_a_stream_is_resumed_in_its_own_dialect_alone(service, begun_at):
    client, backend = service
    last = events_of(ask(client, begun_at).data)[0].id

    for path in PATHS:
        if path != begun_at:
            assert ask(client, path, last).status_code == 404
    assert len(backend.requests) == 1


def test_a_blueprint_resumes_its_own_streams_alone():
    """Whose keys may have the names of another one's, and which may offer other models."""
    llm, _ = scripted("Hi")
    app = make_app(llm, resume_seconds=30, api_keys=["one"])
    app.register_blueprint(llm.openai_blueprint())
    inner = llm.openai_blueprint(name="inner", api_keys=["two"])
    app.register_blueprint(inner, url_prefix="/inner/v1")
    client = app.test_client()
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    body = chat(stream=True)
    answer = client.post("/v1/chat/completions", json=body, headers=one)
    resume = {"Last-Event-ID": events_of(answer.data)[0].id}

    path = "/inner/v1/chat/completions"
    assert client.post(path, json=body, headers={**two, **resume}).status_code == 404
    assert client.post(path, json=body, headers={**one, **resume}).status_code == 401


def test_an_answer_that_is_not_streamed_is_a_new_one(service):
    client, backend = service
    last = events_of(ask(client, "/v1/chat/completions").data)[0].id

    whole = client.post("/v1/chat/completions", json=chat(), headers={"Last-Event-ID": last})

    assert whole.json["choices"][0]["message"]["content"] == "Hello"
    assert len(backend.requests) == 2


def test_head_reads_nothing():
    llm, backend = scripted("Hi")
    app = make_app(llm, resume_seconds=30)
    app.add_url_rule("/ask", "ask", lambda: llm.stream(InferenceRequest(prompt="p")))
    client = app.test_client()
    events = events_of(client.get("/ask").data)

    answer = client.head("/ask", headers={"Last-Event-ID": events[0].id})

    assert (answer.status_code, answer.data) == (200, b"")
    assert len(backend.requests) == 1


@pytest.mark.parametrize(
    ("error", "status"), [(AuthenticationError("Who?"), 401), (LookupError("gone"), 500)]
)
def test_who_cannot_be_told_apart_resumes_nothing(gate, error, status):
    llm, backend = scripted("Hel", gate, "lo")
    app = serve(llm)
    app.testing = False
    who = [None, error]

    @llm.identity_loader
    def identify():
        identity = who.pop(0)
        if identity is not None:
            raise identity

    client = app.test_client()
    first = ask(client, "/v1/chat/completions")
    last = events_of(next(first.iter_encoded()))[0].id

    assert ask(client, "/v1/chat/completions", last).status_code == status
    gate.open()
    assert first.get_data().endswith(b"[DONE]\n\n")
    assert len(backend.requests) == 1


def test_several_prompts_are_one_stream_that_is_resumed(gate):
    llm, backend = scripted("Hel", gate, "lo")
    client = serve(llm).test_client()
    body = {"prompt": ["One", "Two", "Three"], "stream": True}
    first = client.post("/v1/completions", json=body)
    read = next(first.iter_encoded())
    first.close()
    gate.open()
    wait_until(lambda: len(backend.requests) == 3)
    seen = events_of(read)

    rest = client.post("/v1/completions", json=body, headers={"Last-Event-ID": seen[-1].id})

    events = [*seen, *events_of(rest.data)]
    assert events[-1].data == "[DONE]"
    chunks = [json.loads(event.data) for event in events[:-1]]
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["Hello"] * 3
    assert len(backend.requests) == 3


def test_several_prompts_that_are_recorded_end_by_one_id(gate):
    llm, backend = scripted("Hel", gate)
    client = serve(llm).test_client()
    first = client.post("/v1/completions", json={"prompt": ["One", "Two"], "stream": True})
    frames = first.iter_encoded()
    id = json.loads(events_of(next(frames))[0].data)["id"]

    wait_until(lambda: len(backend.requests) == 2)

    assert client.delete(f"/v1/streams/{id}").status_code == 200

    assert all(request.cancelled for request in backend.requests)
    assert b'"cancelled"' in b"".join(frames)


def test_a_dialects_own_pings_are_nobodys_events(gate):
    llm, _ = scripted("Hel", gate, "lo")
    client = serve(llm, heartbeat_seconds=0.02).test_client()
    first = ask(client, "/v1/messages")
    frames = first.iter_encoded()
    read = b""
    while read.count(b"event: ping") < 3:
        read += next(frames)
    first.close()
    events = events_of(read)
    numbered = [event for event in events if event.event != "ping"]
    assert events[-1].id == numbered[-1].id  # What EventSource would come back with.

    again = ask(client, "/v1/messages", events[-1].id)
    frames = again.iter_encoded()
    assert events_of(next(frames))[0].event == "ping"
    gate.open()
    rest = [event for event in events_of(b"".join(frames)) if event.event != "ping"]

    numbers = [int(event.id.rpartition(".")[2]) for event in [*numbered, *rest]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert rest[-1].event == "message_stop"


def test_the_outcome_of_a_view_that_is_resumed_is_told_once():
    llm = LLMStream()
    llm.add_backend("m", ScriptedBackend("a", UpstreamError("Gone.")))
    app = make_app(llm, resume_seconds=30)
    outcomes = []
    app.add_url_rule(
        "/ask",
        "ask",
        lambda: llm.stream(InferenceRequest(prompt="p"), on_finish=outcomes.append),
    )
    client = app.test_client()
    events = events_of(client.get("/ask").data)
    for event in events:
        client.get("/ask", headers={"Last-Event-ID": event.id})

    wait_until(lambda: outcomes)
    assert [outcome.error.code for outcome in outcomes] == ["upstream_error"]
