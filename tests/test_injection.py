"""Nothing that a model, a backend or a client says becomes anything but what it said."""

import json
import re
from contextlib import suppress

import pytest
from concurrency import wait_until
from described_app import PATHS, described_app
from hypothesis import given
from hypothesis import strategies as st
from rendering import WIRES, render_stream

from flask_llmstream import (
    EngineError,
    Finish,
    InferenceResponse,
    InvalidRequestError,
    Reasoning,
    Refusal,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from flask_llmstream.dialects.encoding import encode
from flask_llmstream.framing import SSE, TEXT

every_wire = pytest.mark.parametrize("wire", WIRES, ids=str)

EVIL = [
    *(
        "\n",
        "\r",
        "\r\n\r\n",
        "\n\n",
        "\0",
        "\x0b\x0c\x1c\x1d\x1e\x1f",
        "\x7f\x80\x85",
        "\u2028\u2029",
    ),
    *("\n\ndata: [DONE]\n\n", "data: [DONE]", "[DONE]", '\n{"done":true}\n', '"done":true'),
    *("\nevent: error\ndata: x\n\n", "\rid: 7\r\r", "\n: ping\n\n", "\nretry: 1\n", "id: 1\0"),
    *('"}]},"error":{"message":"x"}', '{"error":"x"}', '"type":"message_stop"', "\\", '\\"', "\\n"),
    *(
        "response.completed",
        "</script><script>",
        "\ufeff",
        "\ufffe\uffff",
        "😀\u200d",
        "e\u0301",
        "\u202e",
    ),
    *(
        "\\u000a\\ud83d",
        "%0d%0a",
        "a\tb",
        "'",
        "/",
        "<!--",
        "\n" * 300,
        "\u2028data: x\u2028\u2028",
    ),
]
every_evil = pytest.mark.parametrize("evil", EVIL, ids=ascii)

BENIGN = "[[x]]"


def marked(text):
    """*text* where it is sure to be the only one of its kind."""
    return f"[[{text}]]"


def payloads(wire, stream):
    """The events of a whole stream, its marker included, however it is cut."""
    reader = wire.read([stream])
    events = [*reader, reader.terminal_event]
    for size in (1, 7):
        chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
        reader = wire.read(chunks)
        assert [*reader, reader.terminal_event] == events
    return [(event.event, decoded(event.data)) for event in events]


def decoded(data):
    return data if data == "[DONE]" else json.loads(data)


def check_lines(stream):
    """No reader, however it takes lines apart, sees others than were written."""
    text = stream.decode()
    assert text.splitlines() == text.split("\n")[:-1]
    assert "\r" not in text
    assert "\0" not in text


VOLATILE = re.compile(r"[0-9a-f]{24,32}")


def shape(value, text):
    """*value* with what is another one every time, and *text*, made the same."""
    if isinstance(value, dict):
        return {
            shape(key, text): shape(each, text)
            for key, each in value.items()
            if not key.endswith(("created", "_at", "_duration", "bytes", "_offset"))
        }
    if isinstance(value, (list, tuple)):
        return [shape(each, text) for each in value]
    if isinstance(value, str):
        # Arguments are JSON in a string, as the backend or the dialect wrote it.
        for form in (text, json.dumps(text)[1:-1], encode(text)[1:-1].decode()):
            value = value.replace(form, BENIGN)
        return VOLATILE.sub("…", value)
    return value


def said(text):
    """Everything that a backend can say, and says it with *text*."""
    return (
        Reasoning(text),
        Token(text, logprob=-1.0, top_logprobs=[(text, -1.0)]),
        Token("and", logprob=-1.0, top_logprobs=[(text, -1.0)]),
        Refusal(text),
        ToolCallDelta(0, id=text, name=text, arguments=json.dumps({text: text})),
        ToolCallDelta(1, id=text + "2", name=text, arguments="{}"),
        Usage(1, 2),
        Finish("tool_calls", stop_sequence=text),
    )


# What a client says and gets back: ``...`` stands for the text.
ASKED = {
    "native": {"logprobs": True, "top_logprobs": 1},
    "openai_chat": {"model": ..., "service_tier": ..., "logprobs": True, "top_logprobs": 1},
    "openai_completions": {"model": ..., "echo": True, "prompt": ...},
    "openai_responses": {
        "model": ...,
        "instructions": ...,
        "metadata": {"x": ...},
        "user": ...,
        "safety_identifier": ...,
        "prompt_cache_key": ...,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
    },
    "anthropic": {"model": ...},
    "ollama_chat": {"model": ..., "logprobs": True, "top_logprobs": 1},
    "ollama_generate": {"model": ..., "logprobs": True, "top_logprobs": 1},
    "ai_sdk": {
        "messages": [
            {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]},
            {"id": ..., "role": "assistant", "parts": [{"type": "text", "text": "Yes?"}]},
        ]
    },
}


def filled(value, text):
    """*value* with *text* for every ``...``."""
    if isinstance(value, dict):
        return {key: filled(each, text) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, text) for each in value]
    return text if value is ... else value


@every_wire
def test_what_is_said_with_it_has_the_shape_that_it_has_without(wire):
    shapes = []
    for text in (BENIGN, *map(marked, EVIL)):
        stream = wire.render(*said(text), **filled(ASKED[wire.dialect.name], text))
        check_lines(stream)
        events = payloads(wire, stream)
        assert json.dumps(events).count(json.dumps(text)[1:-1]) > 2
        shapes.append(shape(events, text))
        assert shapes[-1] == shapes[0], text


@every_wire
def test_an_error_is_read_as_it_was_told(wire):
    for text in EVIL:
        stream = wire.render(text, UpstreamError(text, param=text))
        check_lines(stream)
        with pytest.raises(UpstreamError) as caught:
            list(wire.read([stream]))
        assert caught.value.message == text


TEXTS = {
    "native": lambda event: event.get("token"),
    "openai_chat": lambda event: first(event, "choices").get("delta", {}).get("content"),
    "openai_completions": lambda event: first(event, "choices").get("text"),
    "openai_responses": lambda event: (
        event["type"] == "response.output_text.delta" and event["delta"]
    ),
    "anthropic": lambda event: event.get("delta", {}).get("text"),
    "ollama_chat": lambda event: event["message"]["content"],
    "ollama_generate": lambda event: event["response"],
    "ai_sdk": lambda event: event["type"] == "text-delta" and event["delta"],
}


def first(event, key):
    return next(iter(event.get(key) or ()), {})


def text_read(wire, stream):
    """The answer's text, as a client joins it."""
    texts = [
        TEXTS[wire.dialect.name](payload)
        for _, payload in payloads(wire, stream)
        if payload != "[DONE]"
    ]
    return "".join(text for text in texts if text)


@every_wire
def test_a_text_is_the_same_in_tokens_of_one_character(wire):
    text = "".join(EVIL)
    stream = wire.render(*text)
    check_lines(stream)
    assert text_read(wire, stream) == text


# Anything but half a pair, which is refused (see below).
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]))


@every_wire
@given(texts=st.lists(st.one_of(ANYTHING, st.sampled_from(EVIL)), max_size=6))
def test_any_text_is_read_as_it_was_said(wire, texts):
    stream = wire.render(*texts)
    check_lines(stream)
    assert text_read(wire, stream) == "".join(texts)


@every_wire
def test_plain_text_is_the_text_and_nothing_else(wire):
    parsed = wire.parse()
    renderer = wire.dialect.renderer(parsed, TEXT)
    stream = render_stream(renderer, EVIL, InferenceResponse())
    assert stream.decode() == "".join(EVIL)


@every_wire
def test_a_whole_answer_is_one_document_of_the_same_shape(wire):
    shapes = []
    for text in (BENIGN, *map(marked, EVIL)):
        document = wire.document(*said(text), **filled(ASKED[wire.dialect.name], text))
        check_lines(document + b"\n")
        shapes.append(shape(json.loads(document), text))
        assert shapes[-1] == shapes[0], text


@every_wire
def test_half_a_pair_of_surrogates_in_an_error_is_escaped(wire):
    stream = wire.render("Hi", EngineError("\ud83d"))
    check_lines(stream)
    with pytest.raises(EngineError) as caught:
        list(wire.read([stream]))
    assert caught.value.message == "\ud83d"


HALVES = [
    "\ud83d",
    b"\xed\xa0\xbd",
    Token("\udc00"),
    Reasoning("\ud83d"),
    Refusal("\ud83d"),
    ToolCallDelta(0, id="\ud83d", name="f"),
    ToolCallDelta(0, id="c", name="\ud83d"),
    ToolCallDelta(0, id="c", name="f", arguments='"\ud83d'),
    Finish("stop", stop_sequence="\ud83d"),
    Finish("\ud83d"),
    Token("x", logprob=-1.0, top_logprobs=[("\ud83d", -1.0)]),
]


def ask(client, wire, *, stream=True, **fields):
    headers = {"Accept": wire.framing.content_type if stream else "application/json"}
    body = {**wire.body, "model": "m", "stream": stream, **fields}
    return client.post(PATHS[wire.dialect.name], json=body, headers=headers)


@every_wire
@pytest.mark.parametrize("half", HALVES, ids=ascii)
def test_half_a_pair_from_a_backend_is_an_error_or_escaped_and_never_broken_bytes(wire, half):
    client = described_app("Hi", half, resume_seconds=30).test_client()
    answer = ask(client, wire)
    assert answer.status_code == 200
    check_lines(answer.data)
    with suppress(EngineError, InvalidRequestError):
        list(wire.read([answer.data]))
    document = ask(client, wire, stream=False)
    assert document.status_code in (200, 400, 500)
    document.data.decode()
    json.loads(document.data)


@pytest.mark.parametrize("half", [HALVES[-1], UpstreamError("\ud83d")], ids=ascii)
def test_half_a_pair_in_what_is_kept_does_not_keep_it_from_being_used(half):
    client = described_app(Token("Hi", logprob=-1.0), half).test_client()
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    body = {"input": "Hi", "model": "m", "background": True, **logprobs}
    id = client.post("/v1/responses", json=body).json["id"]
    path = f"/v1/responses/{id}"
    wait_until(lambda: client.get(path).json["status"] in ("completed", "failed"))
    assert client.get(f"{path}/input_items").status_code == 200
    assert client.get(f"{path}?stream=true").status_code == 200
    assert client.post(f"{path}/cancel").status_code == 200
    again = {**body, "background": False, "previous_response_id": id}
    assert client.post("/v1/responses", json=again).status_code in (200, 502)


@every_wire
def test_streams_with_ids_and_pings_are_read_as_they_were_said(wire):
    client = described_app(*EVIL, *EVIL, resume_seconds=30).test_client()
    answer = ask(client, wire)
    assert answer.status_code == 200
    assert answer.text.startswith("id: ") is (wire.framing == SSE)
    check_lines(answer.data)
    assert text_read(wire, answer.data) == "".join(EVIL) * 2


@every_evil
def test_the_id_of_a_request_is_made_of_letters_that_harm_nobody(evil):
    app = described_app("Hi")
    environ = {"HTTP_X_REQUEST_ID": f"a{evil}b"}
    answer = app.test_client().post("/stream", json={"prompt": "x"}, environ_overrides=environ)
    assert re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", answer.headers["X-Request-ID"])
    check_lines(answer.data)


@every_evil
def test_the_name_of_a_function_is_held_to_its_letters(evil):
    tool = {"type": "function", "function": {"name": f"a{evil}"}}
    for wire in WIRES:
        if wire.dialect.name in ("native", "openai_chat", "ollama_chat", "ai_sdk"):
            with pytest.raises(InvalidRequestError):
                wire.parse(tools=[tool])
