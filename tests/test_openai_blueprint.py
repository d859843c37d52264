"""OpenAI's routes: who may ask, in which order requests are refused, and the answers."""

import json
from io import BytesIO

import pytest
from flask_apps import chat, data_of, make_app, scripted
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_llmstream import (
    AsyncInferenceEngine,
    EngineError,
    Finish,
    LLMStream,
    PermissionDeniedError,
    Reasoning,
    RequestDroppedError,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from flask_llmstream.testing import ScriptedBackend

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer secret"}


def client_of(llm, blueprint=None, **config):
    app = make_app(llm, **config)
    app.register_blueprint(blueprint or llm.openai_blueprint())
    return app.test_client()


def ask(client, url=CHAT, *, headers=None, **fields):
    return client.post(url, json=chat(**fields), headers=headers)


def error_of(response):
    return response.get_json()["error"]


# Answers.


def test_a_whole_answer():
    llm, backend = scripted("Hel", "lo", Usage(3, 2))
    response = ask(client_of(llm), model="m", temperature=0.5)
    document = response.get_json()
    assert response.status_code == 200
    assert response.content_type == "application/json"
    assert document["object"] == "chat.completion"
    assert document["model"] == "m"
    assert document["id"] == f"chatcmpl-{response.headers['X-Request-ID']}"
    assert document["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert document["usage"]["total_tokens"] == 5
    assert backend.requests[0].temperature == 0.5
    assert backend.requests[0].last_user_text == "Hi"


def test_a_streamed_answer():
    llm, _ = scripted("Hel", "lo", Usage(3, 2))
    response = ask(client_of(llm), stream=True)
    assert response.status_code == 200
    assert response.content_type == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.content_length is None
    assert "Connection" not in response.headers
    *chunks, last, done = data_of(response.text)
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['X-Request-ID']}"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "Hello"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert "usage" not in last


def test_usage_is_streamed_where_it_is_asked_for():
    llm, _ = scripted("Hi", Usage(3, 2, cached_tokens=1, reasoning_tokens=1))
    body = ask(client_of(llm), stream=True, stream_options={"include_usage": True}).text
    *_, usage, _ = data_of(body)
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_tokens_are_sent_as_they_are_produced(gate):
    llm, _ = scripted("one", gate, "two")
    response = ask(client_of(llm), stream=True)
    body = iter(response.response)
    text = b""
    while b"one" not in text:
        text += next(body)
    assert b"two" not in text
    gate.open()
    assert b"two" in b"".join(body)
    response.close()


def test_tool_calls_reasoning_and_finish_come_through():
    llm, _ = scripted(
        Reasoning("hm"),
        ToolCallDelta(0, id="c1", name="f", arguments='{"a"'),
        ToolCallDelta(0, arguments=":1}"),
        Finish("tool_calls"),
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    choice = ask(client_of(llm), tools=[tool]).get_json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    ]


def test_choices_and_logprobs_come_through():
    llm, _ = scripted(
        Token("a", logprob=-0.5, top_logprobs=[("a", -0.5)]), Token("b", logprob=-1, choice=1)
    )
    document = ask(client_of(llm), n=2, logprobs=True, top_logprobs=1).get_json()
    assert [choice["message"]["content"] for choice in document["choices"]] == ["a", "b"]
    assert document["choices"][0]["logprobs"]["content"][0]["bytes"] == [97]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/json", "text/event-stream"),  # What every SDK sends while streaming.
        ("*/*", "text/event-stream"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("text/plain", "text/plain; charset=utf-8"),
    ],
)
def test_accept_picks_the_framing_of_a_stream(accept, content_type):
    llm, _ = scripted("Hi")
    response = ask(client_of(llm), stream=True, headers={"Accept": accept})
    assert (response.status_code, response.content_type) == (200, content_type)


def test_an_accept_that_names_nothing_of_ours_is_refused():
    llm, backend = scripted("Hi")
    response = ask(client_of(llm), headers={"Accept": "image/png"})
    assert response.status_code == 406
    assert error_of(response)["code"] == "not_acceptable"
    assert backend.requests == []


# Which model.


def test_a_request_without_a_model_gets_the_default():
    llm, _ = scripted(model="first")
    second = ScriptedBackend("Hi")
    llm.add_backend("second", second)
    assert ask(client_of(llm, default_model="second")).get_json()["model"] == "second"
    assert second.requests[0].model == "second"


def test_without_a_default_it_gets_the_first_one():
    llm, backend = scripted(model="first")
    llm.add_backend("second", ScriptedBackend())
    ask(client_of(llm))
    assert backend.requests[0].model == "first"


def test_a_blueprint_that_does_not_offer_the_default_has_its_own_first_one():
    llm, _ = scripted(model="small")
    llm.add_backend("large", ScriptedBackend("Hi"))
    client = client_of(llm, llm.openai_blueprint(models=["large"]), default_model="small")
    assert ask(client).get_json()["model"] == "large"


def test_a_default_that_does_not_exist_is_no_other_model():
    llm, backend = scripted("Hi")
    assert ask(client_of(llm, default_model="typo")).status_code == 404
    assert backend.requests == []


def test_an_unknown_model_is_refused_with_what_there_is():
    llm, backend = scripted(model="small")
    response = ask(client_of(llm), model="large")
    error = error_of(response)
    assert response.status_code == 404
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'large'" in error["message"]
    assert "'small'" in error["message"]
    assert backend.requests == []


def test_a_long_model_name_is_not_sent_back_in_full():
    llm, _ = scripted()
    assert len(ask(client_of(llm), model="x" * 100_000).data) < 1000


def test_a_blueprint_offers_its_models_only():
    llm, small = scripted("Hi", model="small")
    llm.add_backend("large", ScriptedBackend("Hi"))
    client = client_of(llm, llm.openai_blueprint(models=["large"]))
    assert ask(client, model="large").status_code == 200
    refused = ask(client, model="small")
    assert refused.status_code == 404
    assert "There is 'large'" in error_of(refused)["message"]
    assert small.requests == []


def test_one_model_as_a_string_would_be_a_list_of_letters():
    with pytest.raises(Exception, match="models must be a list of model ids, not 'large'"):
        LLMStream().openai_blueprint(models="large")


def test_models_are_listed_in_their_order():
    llm, _ = scripted(model="b")
    llm.add_backend("a", ScriptedBackend())
    llm.add_engine(AsyncInferenceEngine(ScriptedBackend()), models=["d", "c"])
    listing = client_of(llm).get("/v1/models").get_json()
    assert listing["object"] == "list"
    assert [model["id"] for model in listing["data"]] == ["b", "a", "d", "c"]
    assert all(model["object"] == "model" for model in listing["data"])


def test_a_blueprint_lists_what_it_offers_and_what_exists():
    llm, _ = scripted(model="a")
    llm.add_backend("b", ScriptedBackend())
    client = client_of(llm, llm.openai_blueprint(models=["b", "nowhere"]))
    assert [model["id"] for model in client.get("/v1/models").get_json()["data"]] == ["b"]
    assert client.get("/v1/models/b").status_code == 200
    assert client.get("/v1/models/a").status_code == 404


def test_a_model_s_name_may_have_slashes():
    llm, _ = scripted(model="org/name")
    response = client_of(llm).get("/v1/models/org/name")
    assert response.get_json()["id"] == "org/name"
    assert response.headers["X-Request-ID"]


def test_backends_that_come_after_the_blueprint_are_offered():
    llm = LLMStream()
    client = client_of(llm)
    assert client.get("/v1/models").get_json()["data"] == []
    assert "There is none" in error_of(ask(client))["message"]
    llm.add_backend("late", ScriptedBackend("Hi"))
    assert ask(client).status_code == 200


# Several blueprints.


def two_blueprints(llm, **internal):
    app = make_app(llm, max_tokens_limit=10, api_keys="public")
    app.register_blueprint(llm.openai_blueprint())
    app.register_blueprint(
        llm.openai_blueprint(name="internal", **internal), url_prefix="/internal/v1"
    )
    return app.test_client()


def test_two_blueprints_have_settings_of_their_own():
    llm, backend = scripted("Hi")
    client = two_blueprints(llm, max_tokens_limit=99, api_keys={"ops": "private"})
    public = {"Authorization": "Bearer public"}
    private = {"Authorization": "Bearer private"}
    assert ask(client, headers=public).status_code == 200
    assert ask(client, headers=private).status_code == 401
    assert ask(client, "/internal/v1/chat/completions", headers=public).status_code == 401
    assert ask(client, "/internal/v1/chat/completions", headers=private).status_code == 200
    assert [request.max_tokens for request in backend.requests] == [10, 99]
    assert [request.identity for request in backend.requests] == ["key-1", "ops"]


def test_a_blueprint_may_have_a_longer_deadline_within_the_maximum():
    llm, backend = scripted("Hi")
    client = two_blueprints(llm, deadline_seconds=600, api_keys=None)
    ask(client, headers={"Authorization": "Bearer public"})
    ask(client, "/internal/v1/chat/completions")
    short, long = (request.deadline.remaining_seconds() for request in backend.requests)
    assert 290 < short <= 300
    assert 590 < long <= 600


# Refusals, in order, before anything is queued.


def refusing(llm):
    """A client for whom everything can go wrong at once."""

    @llm.permission_check
    def nobody(identity, request):
        raise PermissionDeniedError("Nobody may.")

    return client_of(llm, api_keys="secret", max_request_bytes=500, max_tokens_limit=10)


STEPS = [
    (413, {"pad": "x" * 500, "model": "?", "max_tokens": "x"}, {}),
    (401, {"model": "?", "max_tokens": "x"}, {}),
    (400, {"model": "?", "max_tokens": "x"}, KEY),
    (400, {"model": "?"}, {**KEY, "X-Request-Timeout": "soon"}),
    (404, {"model": "?", "max_tokens": 99}, KEY),
    (400, {"max_tokens": 99}, KEY),
    (400, {"n": 2}, KEY),
    (403, {"max_tokens": 9}, KEY),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "fields", "headers"), STEPS)
def test_refusals_come_in_their_order_and_queue_nothing(status, fields, headers, stream):
    llm, backend = scripted("Hi", supports=())
    response = ask(refusing(llm), headers=headers, stream=stream, **fields)
    assert response.status_code == status
    assert response.content_type == "application/json"
    assert set(error_of(response)) == {"message", "type", "param", "code", "retryable"}
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["X-Request-ID"]
    assert ("WWW-Authenticate" in response.headers) == (status == 401)
    assert backend.requests == []
    if status not in (413, 401):
        assert not any(stats_of(llm).values())


def stats_of(llm):
    """Nothing was ever submitted where no engine was made, or its counters are zero."""
    return {
        name: count
        for state in llm._states.values()
        for engine in state.engines.by_model.values()
        for name, count in engine.worker_stats().items()
        if name.startswith("total_")
    }


def test_429_comes_last(gate):
    llm = LLMStream()
    asked = []
    backend = ScriptedBackend(gate)
    llm.add_backend("m", backend, worker_threads=1, queue_size=0, backpressure="reject")

    @llm.permission_check
    def count(identity, request):
        asked.append(identity)

    client = client_of(llm)
    engine_handle = busy(llm, client, backend)
    response = ask(client)
    assert response.status_code == 429
    assert error_of(response)["code"] == "queue_full"
    assert error_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) >= 1
    assert "x-should-retry" not in response.headers
    assert len(asked) == 1
    assert len(backend.requests) == 1
    engine_handle.cancel()


def busy(llm, client, backend):
    """Occupy *backend*'s worker."""
    from flask_llmstream import InferenceRequest

    with client.application.app_context():
        handle = llm.engine_of("m").submit(InferenceRequest(prompt="first"))
    backend.started.wait()
    return handle


def test_401_says_how():
    llm, _ = scripted("Hi")
    response = ask(client_of(llm, api_keys="secret"))
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(response)["type"] == "authentication_error"
    assert error_of(response)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m"])
def test_models_need_a_key_too(path):
    llm, _ = scripted()
    client = client_of(llm, api_keys="secret")
    assert client.get(path).status_code == 401
    assert client.get(path, headers=KEY).status_code == 200


def test_a_key_may_come_as_x_api_key():
    llm, backend = scripted("Hi")
    client = client_of(llm, api_keys={"alice": "secret"})
    assert ask(client, headers={"x-api-key": "secret"}).status_code == 200
    assert backend.requests[0].identity == "alice"


# Bodies.


def post_chunked(client, body, **environ):
    return client.post(
        CHAT,
        input_stream=BytesIO(body),
        environ_overrides={"wsgi.input_terminated": True, **environ},
        headers={"Transfer-Encoding": "chunked"},
    )


def test_a_chunked_body_is_read():
    llm, _ = scripted("Hi")
    assert post_chunked(client_of(llm), json.dumps(chat()).encode()).status_code == 200


@pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 413)])
def test_the_limit_is_exact_for_declared_and_for_chunked_bodies(over, status):
    llm, backend = scripted("Hi")
    body = json.dumps(chat()).encode()
    client = client_of(llm, max_request_bytes=len(body) - over)
    assert client.post(CHAT, data=body).status_code == status
    assert post_chunked(client, body).status_code == status
    assert len(backend.requests) == (0 if over else 2)


def test_a_declared_length_is_believed_before_anything_is_read():
    class Unreadable:
        def read(self, size=-1):
            raise AssertionError("it was read")

    llm, _ = scripted("Hi")
    client = client_of(llm, max_request_bytes=10)
    response = client.post(
        CHAT, environ_overrides={"CONTENT_LENGTH": "11", "wsgi.input": Unreadable()}
    )
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"
    assert "10 bytes" in error_of(response)["message"]


def test_flask_s_own_limit_is_answered_as_json_too():
    llm, backend = scripted("Hi")
    client = client_of(llm)
    client.application.config["MAX_CONTENT_LENGTH"] = 20
    body = json.dumps(chat()).encode()
    for response in (client.post(CHAT, data=body), post_chunked(client, body)):
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
    assert backend.requests == []


class BrokenStream(BytesIO):
    def read(self, size=-1):
        raise OSError("Invalid chunk header")

    readinto = read


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_body_that_breaks_off_is_a_bad_request(limit):
    llm, backend = scripted("Hi")
    client = client_of(llm)
    client.application.config["MAX_CONTENT_LENGTH"] = limit
    response = client.post(
        CHAT,
        environ_overrides={"wsgi.input": BrokenStream(), "wsgi.input_terminated": True},
        headers={"Transfer-Encoding": "chunked"},
    )
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_request"
    assert backend.requests == []


def test_a_body_shorter_than_it_said_is_a_bad_request():
    llm, _ = scripted("Hi")
    response = client_of(llm).post(
        CHAT, environ_overrides={"CONTENT_LENGTH": "100", "wsgi.input": BytesIO(b"{")}
    )
    assert response.status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"\x00", b'{"messages":1}'])
def test_a_body_that_is_no_chat_is_refused_as_json(body):
    llm, backend = scripted("Hi")
    response = client_of(llm).post(CHAT, data=body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"
    assert backend.requests == []


def test_the_content_type_of_a_body_does_not_matter():
    llm, _ = scripted("Hi")
    client = client_of(llm)
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post(CHAT, data=json.dumps(chat()), content_type=content_type)
        assert response.status_code == 200


# Request ids.


def test_a_client_s_request_id_is_echoed_and_names_the_answer():
    llm, backend = scripted("Hi")
    response = ask(client_of(llm), headers={"X-Request-ID": "req-7"})
    assert response.headers["X-Request-ID"] == "req-7"
    assert response.get_json()["id"] == "chatcmpl-req-7"
    assert backend.requests[0].request_id == "req-7"


@pytest.mark.parametrize(
    ("headers", "fields", "status"),
    [({}, {}, 401), (KEY, {"n": 0}, 400), (KEY, {"model": "?"}, 404), (KEY, {"n": 2}, 400)],
)
def test_a_request_id_is_echoed_on_errors_too(headers, fields, status):
    llm, _ = scripted(supports=())
    client = client_of(llm, api_keys="secret")
    response = ask(client, headers={**headers, "X-Request-ID": "req-7"}, **fields)
    assert response.status_code == status
    assert response.headers["X-Request-ID"] == "req-7"


def test_what_is_no_request_id_is_not_echoed():
    llm, backend = scripted("Hi")
    response = ask(client_of(llm), headers={"X-Request-ID": "<b>"})
    assert response.headers["X-Request-ID"] == backend.requests[0].request_id != "<b>"


def test_an_error_has_the_request_id_that_the_log_has(caplog):
    llm, backend = scripted(ValueError("secret"))
    response = ask(client_of(llm))
    assert response.status_code == 500
    assert response.headers["X-Request-ID"] == backend.requests[0].request_id
    assert backend.requests[0].request_id in caplog.text


# Failures.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UpstreamError("The model server is down."), 502, "upstream_error"),
        (EngineError("Out of memory."), 500, "engine_error"),
        (RequestDroppedError("Dropped."), 503, "request_dropped"),
        (ValueError("secret"), 500, "engine_error"),
    ],
)
def test_a_failure_before_the_first_token_has_a_status(error, status, code, stream):
    llm, backend = scripted(error)
    response = ask(client_of(llm), stream=stream)
    assert response.status_code == status
    assert response.content_type == "application/json"
    assert error_of(response)["code"] == code
    assert b"secret" not in response.data
    backend.closed.wait()


def test_a_failure_after_the_first_token_ends_the_stream_without_its_marker():
    llm, _ = scripted("Hel", UpstreamError("The model server is gone."))
    response = ask(client_of(llm), stream=True)
    assert response.status_code == 200
    *_, text, last = data_of(response.text)
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert last["error"]["message"] == "The model server is gone."
    assert last["error"]["code"] == "upstream_error"
    assert "[DONE]" not in response.text
    assert '"finish_reason":"' not in response.text


def test_a_failure_in_plain_text_aborts_the_transfer():
    llm, _ = scripted("Hel", UpstreamError("gone"))
    response = ask(client_of(llm), stream=True, headers={"Accept": "text/plain"})
    received = []
    with pytest.raises(Exception, match="ended before the answer did"):
        received.extend(iter(response.response))
    body = ask(client_of(llm), stream=True, headers={"Accept": "text/plain"}).response
    assert next(iter(body)) == b"Hel"
    body.close()


def test_a_failure_of_a_whole_answer_has_a_status_though_text_came():
    llm, _ = scripted("Hel", UpstreamError("gone"))
    response = ask(client_of(llm))
    assert response.status_code == 502
    assert b"Hel" not in response.data


@pytest.mark.parametrize("stream", [False, True])
def test_a_set_up_that_is_wrong_is_not_told_to_clients(stream, caplog):
    from flask_llmstream import ConfigurationError

    llm, _ = scripted("Hel", ConfigurationError("There is no file /srv/model.gguf."))
    response = ask(client_of(llm), stream=stream)
    assert "/srv" not in response.text
    assert "configuration_error" in response.text
    assert "/srv/model.gguf" in caplog.text


class Unrenderable(ScriptedBackend):
    def generate(self, request):
        yield Usage("many", None)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_rendered_is_an_engine_error(stream, caplog):
    llm = LLMStream()
    llm.add_backend("m", Unrenderable())
    response = ask(client_of(llm), stream=stream, stream_options={"include_usage": True})
    assert '"code":"engine_error"' in response.text
    assert response.status_code == (200 if stream else 500)
    assert "could not be rendered" in caplog.text


# Nothing that a client sends makes it fall over.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", ""])
part = st.one_of(
    json_values,
    st.fixed_dictionaries({"type": st.just("text"), "text": json_values}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": json_values}),
)
tool_call = st.fixed_dictionaries(
    {"id": st.text(max_size=5) | json_values},
    optional={
        "function": st.fixed_dictionaries(
            {"name": st.text(max_size=5), "arguments": st.text(max_size=5)}
        )
        | json_values
    },
)
message = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {"role": roles},
        optional={
            "content": st.text(max_size=20) | st.lists(part, max_size=3) | json_values,
            "name": st.text(max_size=5) | json_values,
            "tool_calls": st.lists(tool_call, max_size=2) | json_values,
            "tool_call_id": st.text(max_size=5) | json_values,
        },
    ),
)
tool = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {"type": st.just("function")},
        optional={"function": json_values | st.fixed_dictionaries({"name": st.text(max_size=8)})},
    ),
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(message, max_size=3) | json_values,
        "model": st.sampled_from(["m", "", None, "?"]) | json_values,
        "stream": st.booleans() | json_values,
        "stream_options": json_values | st.just({"include_usage": True}),
        "max_tokens": st.integers(-1, 5) | json_values,
        "max_completion_tokens": st.integers(-1, 5) | json_values,
        "temperature": st.floats(0, 2) | json_values,
        "top_p": json_values,
        "top_k": json_values,
        "seed": json_values,
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3) | json_values,
        "n": st.integers(-1, 4) | json_values,
        "logprobs": st.booleans() | json_values,
        "top_logprobs": st.integers(-1, 21) | json_values,
        "tools": st.lists(tool, max_size=2) | json_values,
        "tool_choice": st.sampled_from(["auto", "none", "required"]) | json_values,
        "response_format": json_values
        | st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}),
        "metadata": json_values,
        "user": json_values,
        "logit_bias": json_values,
        "presence_penalty": json_values,
    },
)


def assert_decent(response):
    assert response.status_code in (200, 400, 404)
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    if response.content_type == "text/event-stream":
        *_, last = data_of(response.text)
        assert last == "[DONE]" or "error" in last
    elif response.status_code == 200:
        assert response.get_json()["object"] == "chat.completion"
    else:
        error = error_of(response)
        assert isinstance(error["message"], str)
        assert error["code"] in ("invalid_request", "model_not_found")


@pytest.fixture(scope="module")
def fuzzed():
    return client_of(scripted("Hello", Usage(1, 1))[0])


@settings(deadline=None)
@given(body=bodies)
def test_whatever_the_body_says_the_answer_is_a_chat_or_a_json_error(fuzzed, body):
    assert_decent(fuzzed.post(CHAT, data=json.dumps(body).encode()))


@settings(deadline=None)
@given(body=bodies)
def test_so_it_is_for_a_chat_that_is_fine_but_for_one_field(fuzzed, body):
    body = {**chat(model="m"), **{name: body[name] for name in list(body)[:1]}}
    assert_decent(fuzzed.post(CHAT, data=json.dumps(body).encode()))


@settings(deadline=None)
@given(body=st.binary(max_size=50))
def test_so_it_is_for_any_bytes(fuzzed, body):
    assert_decent(fuzzed.post(CHAT, data=body))


@settings(deadline=None)
@given(
    headers=st.dictionaries(
        st.sampled_from(
            [
                "Accept",
                "Authorization",
                "X-API-Key",
                "X-Request-ID",
                "X-Stainless-Timeout",
                "X-Stainless-Read-Timeout",
                "X-Litellm-Timeout",
            ]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30),
    )
)
def test_whatever_the_headers_say_there_is_an_answer(fuzzed, headers):
    response = fuzzed.post(CHAT, json=chat(), headers=headers)
    assert response.status_code in (200, 406, 504)  # A timeout of 1e-9 s is a timeout.
