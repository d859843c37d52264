"""The package's own route: framings by Accept, and what its readers make of them."""

import json

import httpx
import pytest
from flask_apps import data_of, make_app, scripted, serving, tokens_of

from flask_llmstream import (
    Finish,
    LLMStream,
    PermissionDeniedError,
    QueueFullError,
    Reasoning,
    StreamingHandler,
    StreamReader,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from flask_llmstream.testing import ScriptedBackend

KEY = {"Authorization": "Bearer secret"}
SSE, NDJSON, TEXT, JSON = (
    {"Accept": accept}
    for accept in ("text/event-stream", "application/x-ndjson", "text/plain", "application/json")
)
# Two- to four-byte characters, and what careless readers take for the end of a line.
UNICODE = "é€𝄞\u2028\u2029\x85\r\n\n\x0b\x0cdata: [DONE]\n\n"


def client_of(llm, blueprint=None, **config):
    app = make_app(llm, **config)
    app.register_blueprint(blueprint or llm.native_blueprint())
    return app.test_client()


def ask(client, url="/stream", *, headers=None, **fields):
    return client.post(url, json={"prompt": "Hi", **fields}, headers=headers)


def event_source(body):
    """
    The data of each event, as a browser's EventSource reads it: WHATWG HTML 9.2.6, line by
    line, in the standard's own words.
    """
    dispatched, data = [], []
    text = body.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    for line in text.split("\n")[:-1]:
        field, _, value = line.partition(":")
        if not line:
            if data:
                dispatched.append("\n".join(data))
            data = []
        elif field == "data":
            data.append(value.removeprefix(" "))
        else:
            assert field == ""  # A comment: there is nothing else in these streams.
    assert not data  # An event without its blank line is discarded.
    return dispatched


# Framings.


@pytest.mark.parametrize("headers", [{}, SSE, {"Accept": "*/*"}])
def test_its_events_are_those_of_the_streaming_handler_byte_by_byte(headers):
    llm, backend = scripted("Hel", Token("lo"), UNICODE, Usage(3, 2))
    response = ask(client_of(llm), headers=headers)

    assert (response.status_code, response.content_type) == (200, "text/event-stream")
    id = response.headers["X-Request-ID"]
    tokens = [
        StreamingHandler.format_sse_event(token, id, index)
        for index, token in enumerate(("Hel", "lo", UNICODE))
    ]
    done = StreamingHandler.format_done_event(id)
    assert response.data.startswith(b"".join(tokens))
    assert response.data.endswith(done)
    last = response.data.removeprefix(b"".join(tokens)).removesuffix(done)
    # It begins as the handler's own last event does, and tells how the answer ended.
    assert last.startswith(StreamingHandler.format_sse_event("", id, 3, done=True)[:-3] + b",")
    (told,) = data_of(last.decode())
    assert (told["finish_reason"], told["usage"]["total_tokens"]) == ("stop", 5)
    assert backend.requests[0].prompt == "Hi"


def test_lines():
    llm, _ = scripted("Hel", "lo", Usage(3, 2))
    response = ask(client_of(llm), headers=NDJSON)

    assert response.content_type == "application/x-ndjson"
    *tokens, last = map(json.loads, response.text.splitlines())
    id = response.headers["X-Request-ID"]
    assert tokens == [
        {"id": id, "token": "Hel", "index": 0, "done": False},
        {"id": id, "token": "lo", "index": 1, "done": False},
    ]
    assert (last["token"], last["index"], last["done"]) == ("", 2, True)


def test_the_text_alone():
    llm, _ = scripted(Reasoning("Hm"), "Hel", "lo")
    response = ask(client_of(llm), headers=TEXT)

    assert (response.content_type, response.text) == ("text/plain; charset=utf-8", "Hello")


def test_a_document():
    llm, _ = scripted(Reasoning("Hm"), "Hel", "lo", Finish("length"), Usage(3, 2))
    client = client_of(llm)
    response = ask(client, stream=False)

    assert response.content_type == "application/json"
    document = response.get_json()
    assert document["id"] == response.headers["X-Request-ID"]
    assert (document["text"], document["reasoning"]) == ("Hello", "Hm")
    assert (document["finish_reason"], document["usage"]["total_tokens"]) == ("length", 5)


def test_what_it_cannot_produce_is_refused():
    llm, backend = scripted("Hi")
    response = ask(client_of(llm), headers={"Accept": "image/png"})

    assert response.status_code == 406
    assert response.get_json()["error"]["code"] == "not_acceptable"
    assert backend.requests == []


def test_tokens_are_sent_as_they_are_produced(gate):
    llm, _ = scripted("one", gate, "two")
    with ask(client_of(llm)) as response:
        frames = response.iter_encoded()
        assert tokens_of(next(frames).decode()) == "one"
        gate.open()
        assert tokens_of(b"".join(frames).decode()) == "two"


# Where it is.


@pytest.mark.parametrize("url", ["/stream", "/stream/"])
def test_a_slash_at_the_end_makes_no_difference(url):
    llm, _ = scripted("Hi")
    assert ask(client_of(llm), url).status_code == 200


@pytest.mark.parametrize(
    ("url", "method", "status"),
    [("/stream", "GET", 405), ("/stream", "DELETE", 405), ("/stream/r1", "POST", 405)],
)
def test_nothing_else_is_there(url, method, status):
    llm, _ = scripted("Hi")
    assert client_of(llm).open(url, method=method).status_code == status


@pytest.mark.parametrize("prefix", ["/api/tokens", "/", "/tokens/"])
def test_it_may_be_elsewhere(prefix):
    llm, _ = scripted("Hi")
    app = make_app(llm)
    app.register_blueprint(llm.native_blueprint(), url_prefix=prefix)

    assert tokens_of(ask(app.test_client(), prefix).text) == "Hi"
    path = prefix.rstrip("/")
    assert app.test_client().delete(f"{path}/r1").status_code == 404


def test_two_of_them_have_models_and_settings_of_their_own():
    llm, _ = scripted("Hi", model="small")
    llm.add_backend("large", ScriptedBackend("Hi"))
    app = make_app(llm)
    app.register_blueprint(llm.native_blueprint(models=["small"], max_tokens_limit=5))
    app.register_blueprint(llm.native_blueprint(name="staff"), url_prefix="/staff/stream")
    client = app.test_client()

    assert ask(client, model="large").status_code == 404
    assert ask(client, max_tokens=6).status_code == 400
    assert ask(client, "/staff/stream", model="large", max_tokens=6).status_code == 200


# Errors.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "prompt: give either this or `messages`"),
        (b'{"prompt": 1}', "prompt: expected `str"),
        (b"prompt=Hi", "body is not valid JSON"),
    ],
)
def test_a_bad_body_is_told_which_field_it_is(body, message):
    llm, backend = scripted("Hi")
    response = client_of(llm).post("/stream", data=body)

    assert response.status_code == 400
    error = response.get_json()["error"]
    assert error["message"].startswith(message)
    assert (error["code"], error["retryable"]) == ("invalid_request", False)
    assert backend.requests == []


def test_who_may_not_ask_is_refused_before_anything_is_read():
    llm, _ = scripted("Hi")
    client = client_of(llm, api_keys="secret")

    assert client.post("/stream", data=b"{").status_code == 401
    assert client.delete("/stream/r1").status_code == 401
    assert ask(client, headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (PermissionDeniedError("Not for you."), 403),
        (QueueFullError("Full.", retry_after=7), 429),
        (UpstreamError("Down."), 502),
    ],
)
def test_an_error_before_the_first_token_has_a_status(error, status):
    llm, _ = scripted(error)
    response = ask(client_of(llm))

    assert (response.status_code, response.content_type) == (status, "application/json")
    assert response.get_json()["error"]["code"] == error.code
    assert (response.headers.get("Retry-After") == "7") is (status == 429)


# Cancel.


def test_an_answer_is_ended_by_the_id_of_its_events(gate):
    llm, backend = scripted("Hel", gate, "lo")
    client = client_of(llm, api_keys={"alice": "secret", "bob": "other"})
    with ask(client, headers=KEY) as response:
        frames = response.iter_encoded()
        (first,) = data_of(next(frames).decode())
        path = f"/stream/{first['id']}"

        assert client.delete(path, headers={"Authorization": "Bearer other"}).status_code == 404
        answer = client.delete(path, headers=KEY)
        assert answer.get_json() == {"id": first["id"], "cancelled": True}

        rest = b"".join(frames)
        assert data_of(rest.decode())[-1]["error"]["code"] == "cancelled"
        assert b"[DONE]" not in rest
    gate.open()
    backend.closed.wait()
    assert client.delete(path, headers=KEY).status_code == 404


def test_an_id_of_the_client_s_own_may_have_slashes(gate):
    llm, _ = scripted("Hel", gate)
    client = client_of(llm)
    with ask(client, headers={"X-Request-ID": "team/7"}):
        assert client.delete("/stream/team/7").status_code == 200


# Readers, on a real connection.


@pytest.fixture(scope="module")
def url():
    llm = LLMStream()
    scripts = {
        "hello": ("Hel", Reasoning("Hm"), "lo", ToolCallDelta(0, name="f", arguments="{}")),
        "unicode": tuple(UNICODE),
        "breaks": ("Hel", UpstreamError("The model server is gone.")),
    }
    for model, script in scripts.items():
        llm.add_backend(model, ScriptedBackend(*script))
    app = make_app(llm)
    app.register_blueprint(llm.native_blueprint())
    with serving(app) as address:
        yield f"{address}/stream"


def stream(url, model, headers):
    return httpx.stream("POST", url, json={"prompt": "Hi", "model": model}, headers=headers)


@pytest.mark.parametrize(("framing", "headers"), [("sse", SSE), ("ndjson", NDJSON)])
@pytest.mark.parametrize(("model", "text"), [("hello", "Hello"), ("unicode", UNICODE)])
def test_our_reader_reads_the_whole_text(url, framing, headers, model, text):
    with stream(url, model, headers) as response:
        events = list(StreamReader(response.iter_bytes(), framing=framing))
    assert "".join(json.loads(event.data)["token"] for event in events) == text


@pytest.mark.parametrize(("framing", "headers"), [("sse", SSE), ("ndjson", NDJSON)])
def test_our_reader_raises_what_the_model_raised(url, framing, headers):
    with (
        stream(url, "breaks", headers) as response,
        pytest.raises(UpstreamError, match=r"The model server is gone\."),
    ):
        list(StreamReader(response.iter_bytes(), framing=framing))


@pytest.mark.parametrize(("model", "text"), [("hello", "Hello"), ("unicode", UNICODE)])
def test_a_browser_s_event_source_reads_the_whole_text(url, model, text):
    with stream(url, model, SSE) as response:
        *events, done = event_source(response.read())
    assert done == "[DONE]"
    assert "".join(json.loads(data)["token"] for data in events) == text


@pytest.mark.parametrize("headers", [SSE, NDJSON])
@pytest.mark.parametrize(("model", "text"), [("hello", "Hello"), ("unicode", UNICODE)])
def test_httpx_reads_an_event_a_line(url, headers, model, text):
    with stream(url, model, headers) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert "".join(event["token"] for event in events) == text
    assert [event["done"] for event in events] == [False] * (len(events) - 1) + [True]


def test_plain_text_that_breaks_is_no_short_answer(url):
    with stream(url, "breaks", TEXT) as response, pytest.raises(httpx.RemoteProtocolError):
        response.read()
    with stream(url, "unicode", TEXT) as response:
        assert response.read().decode() == UNICODE
