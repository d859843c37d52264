"""The AI SDK's route: what a page with `useChat` asks, and what it gets."""

import json
import urllib.request

import pytest
from concurrency import wait_until
from flask_apps import WAIT_SECONDS, data_of, make_app, scripted, serving

from flask_llmstream import (
    Finish,
    LLMStream,
    Reasoning,
    StreamReader,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from flask_llmstream.testing import Gate, ScriptedBackend

CHAT = "/api/ai"
HEADER = "x-vercel-ai-ui-message-stream"


def client_of(llm, blueprint=None, **config):
    app = make_app(llm, **config)
    app.register_blueprint(blueprint or llm.ai_sdk_blueprint())
    return app.test_client()


def body(text="Hi", **fields):
    """What `useChat` sends."""
    message = {"id": "u1", "role": "user", "parts": [{"type": "text", "text": text}]}
    return {"id": "chat-1", "messages": [message], "trigger": "submit-message", **fields}


def ask(client, url=CHAT, *, headers=None, **fields):
    return client.post(url, json=body(**fields), headers=headers)


# Answers.


def test_it_streams_by_itself():
    llm, backend = scripted(Reasoning("Hm."), "Hel", "lo", Usage(3, 2))
    response = ask(client_of(llm), model="m", temperature=0.5)
    assert response.status_code == 200
    assert response.content_type == "text/event-stream"
    assert response.headers[HEADER] == "v1"
    assert response.headers["Cache-Control"] == "no-cache"
    *parts, done = data_of(response.text)
    assert done == "[DONE]"
    assert [part["type"] for part in parts] == [
        "start",
        "start-step",
        "reasoning-start",
        "reasoning-delta",
        "reasoning-end",
        "text-start",
        "text-delta",
        "text-delta",
        "text-end",
        "finish-step",
        "finish",
    ]
    assert parts[0]["messageId"] == f"msg_{response.headers['X-Request-ID']}"
    assert parts[-1]["messageMetadata"]["usage"]["totalTokens"] == 5
    assert backend.requests[0].temperature == 0.5
    assert backend.requests[0].last_user_text == "Hi"
    assert backend.requests[0].metadata == {"chat_id": "chat-1"}


def test_a_whole_answer_is_a_message():
    llm, _ = scripted("Hel", "lo", Usage(3, 2))
    response = ask(client_of(llm), stream=False)
    message = response.get_json()
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert HEADER not in response.headers
    assert message["id"] == f"msg_{response.headers['X-Request-ID']}"
    assert message["role"] == "assistant"
    assert message["parts"][-1] == {"type": "text", "text": "Hello", "state": "done"}
    assert message["metadata"]["usage"]["totalTokens"] == 5


def test_a_tool_and_its_result_go_to_the_page_and_back():
    llm, backend = scripted(
        ToolCallDelta(0, id="c1", name="weather", arguments='{"city":"Oslo"}'),
        Finish("tool_calls"),
    )
    client = client_of(llm)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    answer = ask(client, stream=False, tools=[tool]).get_json()
    answer["parts"][-1] |= {"state": "output-available", "output": "4 degrees"}
    again = body(tools=[tool])
    again["messages"].append(answer)
    start = data_of(client.post(CHAT, json=again).text)[0]
    assert start == {"type": "start", "messageId": answer["id"]}
    heard = backend.requests[1].messages
    assert [(message.role, message.text) for message in heard] == [
        ("user", "Hi"),
        ("assistant", ""),
        ("tool", "4 degrees"),
    ]
    assert heard[1].tool_calls[0].arguments == '{"city":"Oslo"}'
    assert heard[2].tool_call_id == "c1"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "text/event-stream"),
        ("application/json", "text/event-stream"),
        ("text/plain", "text/plain; charset=utf-8"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("application/json, */*;q=0", "application/json"),
    ],
)
def test_accept_picks_the_framing(accept, content_type):
    llm, _ = scripted("Hi")
    response = ask(client_of(llm), headers={"Accept": accept})
    assert (response.status_code, response.content_type) == (200, content_type)
    assert (HEADER in response.headers) == (content_type == "text/event-stream")


def test_text_is_the_text_alone():
    llm, _ = scripted(Reasoning("Hm."), "Hel", "lo")
    assert ask(client_of(llm), headers={"Accept": "text/plain"}).text == "Hello"


def test_it_serves_where_use_chat_asks_by_default():
    llm, _ = scripted("Hi")
    app = make_app(llm)
    app.register_blueprint(llm.ai_sdk_blueprint(), url_prefix="/api/chat")
    client = app.test_client()
    assert ask(client, "/api/chat").headers[HEADER] == "v1"
    assert client.get("/api/chat/chat-1/stream").status_code == 204


def test_two_blueprints_have_models_of_their_own():
    llm, _ = scripted("Hi", model="small")
    llm.add_backend("large", ScriptedBackend("Ho"))
    app = make_app(llm)
    app.register_blueprint(llm.ai_sdk_blueprint(models=["small"]))
    app.register_blueprint(llm.ai_sdk_blueprint(name="staff", models=["large"]), url_prefix="/ai")
    client = app.test_client()
    assert ask(client, "/ai", stream=False).get_json()["parts"][-1]["text"] == "Ho"
    assert ask(client, "/ai", model="small").status_code == 404
    assert ask(client, model="small").status_code == 200


def test_a_setting_that_does_not_exist_is_refused():
    with pytest.raises(Exception, match="deadline"):
        LLMStream().ai_sdk_blueprint(deadline=5)


# Coming back.


@pytest.mark.parametrize("chat", ["chat-1", "a%2Fb"])
def test_there_is_nothing_to_resume(chat):
    llm, backend = scripted("Hi")
    response = client_of(llm).get(f"{CHAT}/{chat}/stream")
    assert (response.status_code, response.data) == (204, b"")
    assert response.headers["X-Request-ID"]
    assert backend.requests == []


def test_a_page_that_is_loaded_again_has_the_whole_answer_under_way(gate):
    llm, backend = scripted("Hel", gate, "lo")
    client = client_of(llm, resume_seconds=30)
    page = ask(client)
    next(page.iter_encoded())
    page.close()

    again = client.get(f"{CHAT}/chat-1/stream")

    assert again.status_code == 200
    assert again.headers[HEADER] == "v1"
    gate.open()
    parts = data_of(
        "".join(line for line in again.text.splitlines(keepends=True) if line[:3] != "id:")
    )
    assert "".join(part["delta"] for part in parts[:-1] if part["type"] == "text-delta") == "Hello"
    assert (parts[0]["type"], parts[-2]["type"], parts[-1]) == ("start", "finish", "[DONE]")
    assert len(backend.requests) == 1
    wait_until(lambda: client.get(f"{CHAT}/chat-1/stream").status_code == 204)


def test_a_page_may_be_loaded_again_before_the_first_token(gate):
    llm, backend = scripted(gate, "Hello")
    client = client_of(llm, resume_seconds=30, heartbeat_seconds=0.02)
    page = ask(client)
    next(page.iter_encoded())
    page.close()

    again = client.get(f"{CHAT}/chat-1/stream")
    gate.open()

    assert '"delta":"Hello"' in again.text
    assert len(backend.requests) == 1


def test_who_only_looks_whether_there_is_an_answer_leaves_it_alone(gate):
    llm, backend = scripted("Hel", gate)
    client = client_of(llm, resume_seconds=30)
    page = ask(client)
    next(page.iter_encoded())
    page.close()

    assert client.head(f"{CHAT}/chat-1/stream").data == b""
    assert not backend.requests[0].cancelled


def test_the_newest_answer_of_a_chat_is_resumed():
    llm = LLMStream()
    first_gate, second_gate = Gate(), Gate()
    for name, each in (("first", first_gate), ("second", second_gate)):
        llm.add_backend(name, ScriptedBackend(name, each))
    client = client_of(llm, resume_seconds=30)
    pages = [ask(client, model=name) for name in ("first", "second")]

    again = client.get(f"{CHAT}/chat-1/stream")

    for each in (first_gate, second_gate):
        each.open()
    assert '"second"' in again.text
    for page in pages:
        page.close()


def test_a_chat_is_resumed_by_its_own_reader_and_blueprint_alone(gate):
    llm, _ = scripted("Hel", gate)
    app = make_app(llm, resume_seconds=30, api_keys={"alice": "secret", "bob": "other"})
    app.register_blueprint(llm.ai_sdk_blueprint())
    other = llm.ai_sdk_blueprint(name="other")
    app.register_blueprint(other, url_prefix="/other")
    client = app.test_client()
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("secret", "other"))
    page = ask(client, headers=alice)

    def resume(url, headers):
        with client.get(f"{url}/chat-1/stream", headers=headers) as response:
            return response.status_code

    assert resume(CHAT, bob) == 204
    assert resume("/other", alice) == 204
    assert client.get(f"{CHAT}/chat-2/stream", headers=alice).status_code == 204
    assert resume(CHAT, alice) == 200
    page.close()


def test_who_may_not_ask_may_not_resume():
    llm, _ = scripted("Hi")
    response = client_of(llm, api_keys="secret").get(f"{CHAT}/chat-1/stream")
    assert response.status_code == 401


# Failures.


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"messages": [{"role": "user"}]}, 400, "invalid_request"),
        ({"model": "nobody"}, 404, "model_not_found"),
    ],
)
def test_a_refusal_says_what_an_error_in_a_stream_says(fields, status, code):
    llm, backend = scripted("Hi")
    response = ask(client_of(llm), **fields)
    error = response.get_json()
    assert response.status_code == status
    assert response.content_type == "application/json"
    assert (error["type"], error["code"], error["retryable"]) == ("error", code, False)
    assert error["errorText"]
    assert backend.requests == []


@pytest.mark.parametrize("stream", [None, False])
def test_a_failure_before_the_first_token_has_a_status(stream):
    llm, _ = scripted(UpstreamError("The model server is down."))
    response = ask(client_of(llm), stream=stream)
    assert response.status_code == 502
    assert response.get_json() == {
        "type": "error",
        "errorText": "The model server is down.",
        "code": "upstream_error",
        "retryable": True,
    }


def test_a_failure_after_the_first_token_ends_the_stream_without_its_end():
    llm, _ = scripted("Hel", UpstreamError("The model server is gone."))
    response = ask(client_of(llm))
    *parts, error = data_of(response.text)
    assert response.status_code == 200
    assert error["type"] == "error"
    assert error["errorText"] == "The model server is gone."
    assert not {"finish", "finish-step"} & {part["type"] for part in parts}


def test_our_own_reader_raises_what_the_stream_reports():
    llm, _ = scripted("Hel", UpstreamError("The model server is gone."))
    reader = StreamReader([ask(client_of(llm)).data])
    with pytest.raises(UpstreamError, match="The model server is gone"):
        list(reader)


def test_a_whole_stream_is_whole_to_our_own_reader():
    llm, _ = scripted("Hello")
    events = list(StreamReader([ask(client_of(llm)).data]))
    assert json.loads(events[-1].data)["type"] == "finish"


# Ends.


def test_an_answer_ends_by_the_id_of_its_message(gate):
    llm, backend = scripted("Hel", gate, "lo")
    client = client_of(llm)
    response = ask(client)
    frames = response.iter_encoded()
    id = data_of(next(frames).decode())[0]["messageId"]
    assert client.delete(f"{CHAT}/streams/{id}").get_json() == {"id": id, "cancelled": True}
    rest = data_of(b"".join(frames).decode())
    assert [part["type"] for part in rest] == ["abort"]
    assert backend.requests[0].cancelled
    response.close()


def test_a_page_that_leaves_stops_the_model(gate):
    llm, backend = scripted("Hel", gate, "lo")
    with serving(client_of(llm).application) as url:
        request = urllib.request.Request(url + CHAT, json.dumps(body()).encode())
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
            assert b'"start"' in response.readline()
        # While the model waits: nothing else could end it.
        wait_until(lambda: backend.requests[0].cancelled)
        gate.open()
        backend.closed.wait()


def test_a_silent_stream_is_kept_alive_with_comments(gate):
    llm, _ = scripted("Hel", gate, "lo")
    blueprint = llm.ai_sdk_blueprint(heartbeat_seconds=0.01)
    response = ask(client_of(llm, blueprint))
    frames = response.iter_encoded()
    assert b'"Hel"' in next(frames)
    assert next(frames) == b": ping\n\n"
    gate.open()
    assert b"".join(frames).endswith(b"data: [DONE]\n\n")
