"""Ollama's own client against a real server: what its users see."""

import asyncio
import time
from datetime import datetime, timezone

import httpx
import ollama
import pytest
from concurrency import wait_until
from flask_apps import make_app, serving
from pydantic import BaseModel
from scripted_service import GuardedService

from flask_llmstream import (
    Finish,
    Reasoning,
    RequestCancelledError,
    StreamReader,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)

HI = [{"role": "user", "content": "Hi"}]
KEY = {"Authorization": "Bearer secret"}
PNG = b"\x89PNG\r\n\x1a\n rest"
# What careless readers, and ollama-py, take for the end of a line.
LINES = "one\u2028two\u2029three\x85four\r\nfive\x0b\x0c\x1e"


def weather(city: str, days: int = 1) -> str:
    """
    Tell the weather.

    Args:
        city: Where.
        days: From now on.
    """
    return f"Rain in {city} for {days}."


class Service(GuardedService):
    def __init__(self):
        super().__init__()
        self.add("hello", "Hel", "lo", Usage(3, 2))
        self.add("down", UpstreamError("The model server is down."))
        self.add("breaks", "Hel", UpstreamError("The model server is gone."))
        self.add("able", "x", supports=())
        self.add("thinks", Reasoning("Let me "), Reasoning("see."), "Hi")
        self.add("cut", "Hi", Finish("length"))
        self.add("busy", "Hi")
        self.add("forbidden", "Hi")
        self.add("lines", LINES)
        self.add("json", '{"city":', '"Oslo"}')
        self.add("likely", Token("a", logprob=-0.5, top_logprobs=[("a", -0.5), ("b", -1.0)]), "b")
        self.add(
            "tools",
            "I look.",
            ToolCallDelta(0, id="call_1", name="weather", arguments='{"ci'),
            ToolCallDelta(0, arguments='ty":"Oslo"}'),
            ToolCallDelta(1, id="call_2", name="weather", arguments='{"city":"Rome","days":2}'),
            Finish("tool_calls"),
        )
        self.add("mumbles", "Hm", ToolCallDelta(0, name="f", arguments="[1]"))


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture(scope="module")
def url(service):
    app = make_app(service.llm, api_keys={"alice": "secret"}, heartbeat_seconds=0.2)
    app.register_blueprint(service.llm.ollama_blueprint())
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with ollama.Client(url, headers=KEY, timeout=20, trust_env=False) as client:
        yield client


def contents(parts):
    return "".join(part.message.content for part in parts)


# Answers.


def test_a_whole_answer(client):
    before = datetime.now(timezone.utc)
    started = time.monotonic()
    answer = client.chat("hello", HI)
    took = (time.monotonic() - started) * 1e9
    assert (answer.message.role, answer.message.content) == ("assistant", "Hello")
    assert answer.message.tool_calls is None
    assert answer.message.thinking is None
    assert (answer.model, answer.done, answer.done_reason) == ("hello", True, "stop")
    assert (answer.prompt_eval_count, answer.eval_count) == (3, 2)
    assert answer.created_at.endswith("Z")
    assert datetime.fromisoformat(answer.created_at.replace("Z", "+00:00")) >= before
    parts = (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration)
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(answer.total_duration, abs=3)
    assert answer.total_duration <= took


def test_a_streamed_answer(client):
    *parts, last = client.chat("hello", HI, stream=True)
    assert [part.message.content for part in parts] == ["Hel", "lo"]
    assert not any(part.done for part in parts)
    assert (last.done, last.done_reason, last.message.content) == (True, "stop", "")
    assert (last.prompt_eval_count, last.eval_count) == (3, 2)
    assert last.total_duration > 0


def test_a_prompt(client, service):
    answer = client.generate("hello", "Hi")
    assert (answer.response, answer.done_reason, answer.eval_count) == ("Hello", "stop", 2)
    assert service.last("hello").prompt == "Hi"
    *parts, last = client.generate("hello", "Hi", system="Be brief.", stream=True)
    assert "".join(part.response for part in parts) == "Hello"
    assert (last.response, last.done) == ("", True)
    assert [each.text for each in service.last("hello").messages] == ["Be brief.", "Hi"]


def test_the_asynchronous_client(url):
    async def read():
        client = ollama.AsyncClient(url, headers=KEY, timeout=20, trust_env=False)
        async with client:
            answer = await client.chat("hello", HI)
            parts = [part async for part in await client.chat("hello", HI, stream=True)]
        return answer.message.content, contents(parts)

    assert asyncio.run(read()) == ("Hello", "Hello")


def test_tokens_arrive_as_they_are_produced(client, service, gate):
    service.add("waits", "one", gate, "two")
    stream = client.chat("waits", HI, stream=True)
    assert next(stream).message.content == "one"
    gate.open()
    assert contents(stream) == "two"


def test_pings_before_the_first_token_disturb_nothing(client, service, gate):
    service.add("slow", gate, "Hi")
    stream = client.chat("slow", HI, stream=True)
    ping = next(stream)
    assert (ping.message.content, ping.done) == ("", False)
    gate.open()
    assert contents(stream) == "Hi"


def test_characters_that_the_client_splits_lines_at(client):
    assert contents(client.chat("lines", HI, stream=True)) == LINES
    assert client.chat("lines", HI).message.content == LINES


def test_the_tag_that_ollama_gives_every_model(client):
    answer = client.chat("hello:latest", HI)
    assert (answer.message.content, answer.model) == ("Hello", "hello")


def test_parameters_arrive(client, service):
    options = ollama.Options(
        num_predict=7, temperature=0.5, top_p=0.9, top_k=5, seed=1, stop=["\n"], num_ctx=4096
    )
    client.chat("hello", HI, options=options, keep_alive="5m")
    request = service.last("hello")
    assert (request.max_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (request.top_k, request.seed, list(request.stop)) == (5, 1, ["\n"])
    assert request.identity == "alice"


def test_a_length_is_told(client):
    assert client.chat("cut", HI).done_reason == "length"
    *_, last = client.chat("cut", HI, stream=True)
    assert last.done_reason == "length"


def test_thinking_is_apart_from_the_text(client):
    answer = client.chat("thinks", HI, think=True)
    assert (answer.message.thinking, answer.message.content) == ("Let me see.", "Hi")
    parts = list(client.chat("thinks", HI, think=True, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == "Let me see."
    assert contents(parts) == "Hi"
    generated = client.generate("thinks", "Hi")
    assert (generated.thinking, generated.response) == ("Let me see.", "Hi")


def test_thinking_is_hidden_from_who_does_not_want_it(client):
    assert client.chat("thinks", HI, think=False).message.thinking is None
    parts = list(client.chat("thinks", HI, think=False, stream=True))
    assert [part.message.thinking for part in parts] == [None] * len(parts)
    assert contents(parts) == "Hi"


def test_logprobs(client):
    answer = client.chat("likely", HI, logprobs=True, top_logprobs=2)
    (position,) = answer.logprobs
    assert (position.token, position.logprob) == ("a", -0.5)
    assert [each.token for each in position.top_logprobs] == ["a", "b"]
    parts = client.generate("likely", "Hi", logprobs=True, stream=True)
    assert [part.logprobs[0].token for part in parts if part.logprobs] == ["a"]


def test_tool_calls_of_a_whole_answer(client, service):
    message = client.chat("tools", HI, tools=[weather]).message
    assert message.content == "I look."
    assert [call.function.name for call in message.tool_calls] == ["weather", "weather"]
    assert [weather(**call.function.arguments) for call in message.tool_calls] == [
        "Rain in Oslo for 1.",
        "Rain in Rome for 2.",
    ]
    (tool,) = service.last("tools").tools
    assert tool["function"]["name"] == "weather"
    assert tool["function"]["parameters"]["properties"]["days"]["type"] == "integer"


def test_tool_calls_of_a_stream_come_whole(client):
    *parts, last = client.chat("tools", HI, tools=[weather], stream=True)
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert [call.function.arguments for call in calls] == [
        {"city": "Oslo"},
        {"city": "Rome", "days": 2},
    ]
    assert contents(parts) == "I look."
    assert last.done_reason == "stop"


def test_a_tool_s_answer_is_sent_back(client, service):
    called = client.chat("tools", HI, tools=[weather]).message
    results = [
        {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
        for call in called.tool_calls
    ]
    client.chat("tools", [*HI, called, *results], tools=[weather])
    _, told, first, second = service.last("tools").messages
    assert [call.arguments for call in told.tool_calls] == [
        '{"city":"Oslo"}',
        '{"city":"Rome","days":2}',
    ]
    assert [first.tool_call_id, second.tool_call_id] == [call.id for call in told.tool_calls]
    assert (second.name, second.text) == ("weather", "Rain in Rome for 2.")


def test_images(client, service):
    client.chat("hello", [{"role": "user", "content": "What is it?", "images": [PNG]}])
    image, text = service.last("hello").messages[0].content
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "What is it?"


class Place(BaseModel):
    city: str


def test_a_schema_is_followed(client, service):
    answer = client.chat("json", HI, format=Place.model_json_schema())
    assert Place.model_validate_json(answer.message.content) == Place(city="Oslo")
    wanted = service.last("json").response_format["json_schema"]
    assert wanted["schema"] == Place.model_json_schema()
    client.generate("json", "Hi", format="json")
    assert service.last("json").response_format == {"type": "json_object"}


# Models.


def test_models(client, service):
    listed = client.list().models
    assert [model.model for model in listed] == service.llm.models()
    assert all(model.modified_at and model.digest[:12] for model in listed)
    assert [model.model for model in client.ps().models] == service.llm.models()


def test_what_a_model_can_do(client):
    shown = client.show("hello:latest")
    assert shown.capabilities == ["completion", "tools", "vision"]
    assert shown.modelinfo["general.basename"] == "hello"
    assert shown.details.family == ""
    assert client.show("able").capabilities == ["completion"]
    with pytest.raises(ollama.ResponseError) as caught:
        client.show("nothing")
    assert caught.value.status_code == 404


def test_loading_a_model_asks_it_nothing(client, service):
    before = len(service.backends["hello"].requests)
    answer = client.chat("hello", [])
    assert (answer.done, answer.done_reason, answer.message.content) == (True, "load", "")
    (only,) = client.chat("hello", [], stream=True)
    assert only.done_reason == "load"
    assert client.generate("hello:latest", keep_alive=0).done_reason == "load"
    assert len(service.backends["hello"].requests) == before
    with pytest.raises(ollama.ResponseError) as caught:
        client.generate("nothing")
    assert caught.value.status_code == 404


# Errors.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "fields", "status", "message"),
    [
        ("hello", {"options": {"temperature": -1}}, 400, "options.temperature"),
        ("hello", {"think": "low"}, 400, "think: has no levels here"),
        ("able", {"format": "json"}, 400, "does not support response_format"),
        ("able", {"tools": [weather]}, 400, "does not support tools"),
        ("llama", {}, 404, "'llama'"),
        ("forbidden", {}, 403, "Not for you."),
        ("busy", {}, 429, "The queue is full."),
        ("down", {}, 502, "The model server is down."),
    ],
)
def test_errors_are_the_client_s_own(client, model, fields, status, message, stream):
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(model, HI, stream=stream, **fields))
    assert caught.value.status_code == status
    assert message in caught.value.error


def test_what_generate_cannot_do_is_refused(client):
    with pytest.raises(ollama.ResponseError, match="suffix: is not supported"):
        client.generate("hello", "def f(", suffix="return x")


def test_a_wrong_key(url):
    with (
        ollama.Client(url, headers={"Authorization": "Bearer wrong"}, trust_env=False) as client,
        pytest.raises(ollama.ResponseError) as caught,
    ):
        client.list()
    assert caught.value.status_code == 401


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("breaks", "The model server is gone."),
        ("mumbles", "The model called 'f' with arguments that are no JSON object."),
    ],
)
def test_an_error_in_the_middle_of_a_stream(client, model, message):
    stream = client.chat(model, HI, stream=True)
    assert next(stream).message.content in ("Hel", "Hm")
    with pytest.raises(ollama.ResponseError) as caught:
        list(stream)
    assert caught.value.error == message
    assert caught.value.status_code == -1


def test_arguments_that_are_no_object_are_no_answer(client):
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat("mumbles", HI)
    assert caught.value.status_code == 500


def test_a_deadline_in_the_middle_of_a_stream(url, service, gate):
    service.add("endless", "one", gate)
    headers = {**KEY, "X-Request-Timeout": "0.3"}
    with ollama.Client(url, headers=headers, timeout=20, trust_env=False) as client:
        stream = client.chat("endless", HI, stream=True)
        assert next(stream).message.content == "one"
        with pytest.raises(ollama.ResponseError, match="deadline passed"):
            list(stream)


# Leaving.


def test_closing_a_stream_cancels_its_request(client, service, gate, finished):
    service.add("long", "one", gate, "two")
    stream = client.chat("long", HI, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: service.last("long").cancelled)
    gate.open()
    service.backends["long"].closed.wait()
    wait_until(lambda: finished["long"])
    (outcome,) = finished["long"]
    assert isinstance(outcome.error, RequestCancelledError)


def test_a_finished_stream_is_no_cancel(client, finished):
    list(client.chat("hello", HI, stream=True))
    wait_until(lambda: finished["hello"])
    assert finished["hello"][0].error is None


# This package's own reader.


@pytest.mark.parametrize(("framing", "accept"), [("ndjson", "*/*"), ("sse", "text/event-stream")])
def test_our_reader_reads_it_and_raises_what_was_raised(url, framing, accept):
    def read(model):
        body = {"model": model, "messages": HI}
        headers = {**KEY, "Accept": accept}
        with (
            httpx.Client(trust_env=False) as client,
            client.stream("POST", f"{url}/api/chat", json=body, headers=headers) as response,
        ):
            return list(StreamReader(response.iter_bytes(), framing=framing))

    assert len(read("hello")) >= 2
    with pytest.raises(UpstreamError, match=r"The model server is gone\.") as caught:
        read("breaks")
    assert caught.value.retryable
