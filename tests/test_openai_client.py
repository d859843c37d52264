"""The official client against a real server: what its users see."""

from collections import Counter

import httpx
import openai
import pytest
from concurrency import wait_until
from flask_apps import make_app, serving
from openai import OpenAI
from pydantic import BaseModel
from scripted_service import GuardedService

from flask_llmstream import (
    Finish,
    Reasoning,
    RequestCancelledError,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Service(GuardedService):
    def __init__(self):
        super().__init__()
        self.add("hello", "Hel", "lo", Usage(3, 2, cached_tokens=1, reasoning_tokens=1))
        self.add("down", UpstreamError("The model server is down."))
        self.add("breaks", "Hel", UpstreamError("The model server is gone."))
        self.add("secret", ValueError("/etc/secret"))
        self.add("able", "x", supports=())
        self.add("thinks", Reasoning("hm"), "Hi")
        self.add("cut", "Hi", Finish("length"))
        self.add("recovers", "Hi")
        self.add("busy", "Hi")
        self.add("forbidden", "Hi")
        self.add("json", '{"city":', '"Oslo"}')
        self.add(
            "choices",
            Token("a", logprob=-0.5, top_logprobs=[("a", -0.5), ("b", -1.0)]),
            Token("b", logprob=-1.0, choice=1),
            Token("!", logprob=-0.1),
        )
        self.add(
            "tools",
            ToolCallDelta(0, id="call_1", name="weather", arguments='{"ci'),
            ToolCallDelta(0, arguments='ty":"Oslo"}'),
            ToolCallDelta(1, id="call_2", name="weather", arguments='{"city":"Rome"}'),
            Finish("tool_calls"),
        )


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture(scope="module")
def url(service):
    app = make_app(service.llm, api_keys={"alice": "secret"}, heartbeat_seconds=0.2)
    app.register_blueprint(service.llm.openai_blueprint())
    with serving(app) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=20) as client:
        yield client


# Answers.


def test_a_whole_answer(client):
    answer = client.chat.completions.create(model="hello", messages=HI)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "hello"
    assert answer.usage.total_tokens == 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens_details.reasoning_tokens == 1


def test_a_streamed_answer(client):
    stream = client.chat.completions.create(model="hello", messages=HI, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_of_a_stream(client):
    *_, last = client.chat.completions.create(
        model="hello", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 2)


def test_tokens_arrive_as_they_are_produced(client, service, gate):
    service.add("waits", "one", gate, "two")
    with client.chat.completions.create(model="waits", messages=HI, stream=True) as stream:
        texts = (chunk.choices[0].delta.content for chunk in stream)
        assert next(text for text in texts if text) == "one"
        gate.open()
        assert next(text for text in texts if text) == "two"


def test_pings_before_the_first_token_disturb_nothing(client, service, gate):
    service.add("thinks long", gate, "Hi")
    with client.chat.completions.create(model="thinks long", messages=HI, stream=True) as stream:
        # It is here though no token is: a ping has opened it.
        gate.open()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hi"


def test_raw_responses_have_the_headers(client, service):
    raw = client.chat.completions.with_raw_response.create(
        model="hello", messages=HI, extra_headers={"X-Request-ID": "req-7"}
    )
    assert raw.status_code == 200
    assert raw.headers["x-request-id"] == raw.request_id == "req-7"
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello"
    assert answer._request_id == "req-7"


def test_streaming_raw_responses(client):
    with client.chat.completions.with_streaming_response.create(
        model="hello", messages=HI, stream=True
    ) as raw:
        assert raw.headers["content-type"] == "text/event-stream"
        assert raw.headers["x-accel-buffering"] == "no"
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_parameters_arrive(client, service):
    client.chat.completions.create(
        model="hello",
        messages=[{"role": "developer", "content": "Be brief."}, *HI],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=7,
        stop=["\n"],
        seed=1,
        user="u1",
        metadata={"a": "b"},
    )
    request = service.last("hello")
    assert (request.temperature, request.top_p, request.max_tokens) == (0.5, 0.9, 7)
    assert (list(request.stop), request.seed) == (["\n"], 1)
    assert request.metadata == {"user": "u1", "a": "b"}
    assert request.identity == "alice"
    assert [message.role for message in request.messages] == ["developer", "user"]


def test_several_choices_with_logprobs(client):
    answer = client.chat.completions.create(
        model="choices", messages=HI, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == ["a!", "b"]
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [each.token for each in first.top_logprobs] == ["a", "b"]


def test_several_streamed_choices_with_logprobs(client):
    stream = client.chat.completions.create(
        model="choices", messages=HI, n=2, logprobs=True, stream=True
    )
    texts, logprobs, reasons = ["", ""], [], Counter()
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                logprobs += [token.logprob for token in choice.logprobs.content]
            reasons[choice.index] += choice.finish_reason is not None
    assert texts == ["a!", "b"]
    assert sorted(logprobs) == [-1.0, -0.5, -0.1]
    assert reasons == {0: 1, 1: 1}


def test_a_length_is_told(client):
    answer = client.chat.completions.create(model="cut", messages=HI)
    assert answer.choices[0].finish_reason == "length"


def test_reasoning_stays_out_of_the_text(client):
    answer = client.chat.completions.create(model="thinks", messages=HI)
    assert answer.choices[0].message.content == "Hi"
    assert answer.choices[0].message.reasoning_content == "hm"


def test_tool_calls_of_a_whole_answer(client):
    answer = client.chat.completions.create(model="tools", messages=HI, tools=[WEATHER])
    first, second = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (first.id, first.function.name) == ("call_1", "weather")
    assert first.function.arguments == '{"city":"Oslo"}'
    assert second.function.arguments == '{"city":"Rome"}'


def test_tool_calls_are_put_together_by_the_client_s_helper(client):
    with client.chat.completions.stream(model="tools", messages=HI, tools=[WEATHER]) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        answer = stream.get_final_completion()
    assert [event.arguments for event in done] == ['{"city":"Oslo"}', '{"city":"Rome"}']
    calls = answer.choices[0].message.tool_calls
    assert [call.id for call in calls] == ["call_1", "call_2"]
    assert [call.function.name for call in calls] == ["weather", "weather"]


def test_a_tool_s_answer_is_sent_back(client, service):
    client.chat.completions.create(
        model="tools",
        tools=[WEATHER],
        messages=[
            *HI,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        ],
    )
    *_, called, answered = service.last("tools").messages
    assert called.tool_calls[0].name == "weather"
    assert (answered.tool_call_id, answered.text) == ("call_1", "Rain.")


class Place(BaseModel):
    city: str


def test_response_format_is_parsed(client, service):
    answer = client.chat.completions.parse(model="json", messages=HI, response_format=Place)
    assert answer.choices[0].message.parsed == Place(city="Oslo")
    wanted = service.last("json").response_format
    assert wanted["json_schema"]["schema"]["properties"]["city"]["type"] == "string"


def test_models(client, service):
    listed = [model.id for model in client.models.list()]
    assert listed == service.llm.models()
    assert client.models.retrieve("hello").id == "hello"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


# Errors.


def ask(client, model="hello", **fields):
    return client.chat.completions.create(model=model, messages=HI, **fields)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "fields", "error", "code", "message"),
    [
        ("hello", {"temperature": 9}, openai.BadRequestError, "invalid_request", "temperature"),
        ("able", {"n": 2}, openai.BadRequestError, "invalid_request", "does not support n"),
        ("gpt", {}, openai.NotFoundError, "model_not_found", "'gpt'"),
        ("forbidden", {}, openai.PermissionDeniedError, "permission_denied", "Not for you."),
        ("busy", {}, openai.RateLimitError, "queue_full", "The queue is full."),
        ("down", {}, openai.InternalServerError, "upstream_error", "is down."),
        ("secret", {}, openai.InternalServerError, "engine_error", "The server's log says how."),
    ],
)
def test_errors_are_the_client_s_own(client, model, fields, error, code, message, stream):
    with pytest.raises(error) as caught:
        ask(client, model, stream=stream, **fields)
    assert caught.value.code == code
    assert message in caught.value.message
    assert caught.value.request_id
    assert caught.value.body["code"] == code


def test_a_bad_field_is_named(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=9)
    assert caught.value.param == "temperature"


def test_a_wrong_key(url):
    with (
        OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.response.headers["WWW-Authenticate"] == "Bearer"


def test_an_error_in_the_middle_of_a_stream(client):
    texts = []

    def read():
        for chunk in ask(client, "breaks", stream=True):
            texts.append(chunk.choices[0].delta.content)  # noqa: PERF401 - it is cut short

    with pytest.raises(openai.APIError) as caught:
        read()
    assert "".join(texts) == "Hel"
    assert caught.value.message == "The model server is gone."
    assert caught.value.code == "upstream_error"
    assert not isinstance(caught.value, openai.APIStatusError)


# Retries.


def attempts_of(service, url, model, expected, **fields):
    before = service.attempts[model]
    with (
        OpenAI(base_url=url, api_key="secret", max_retries=2) as client,
        pytest.raises(expected),
    ):
        ask(client, model, **fields)
    return service.attempts[model] - before


def test_the_client_tries_again_what_may_help(service, url):
    with OpenAI(base_url=url, api_key="secret", max_retries=2) as client:
        assert ask(client, "recovers").choices[0].message.content == "Hi"
    assert service.attempts["recovers"] == 2


def test_the_client_does_not_try_again_what_does_not_help(service, url, gate):
    service.add("endless", gate)
    headers = {"X-Request-Timeout": "0.1"}
    assert (
        attempts_of(service, url, "endless", openai.InternalServerError, extra_headers=headers) == 1
    )


def test_nor_what_it_may_not(service, url):
    assert attempts_of(service, url, "forbidden", openai.PermissionDeniedError) == 1


# Time.


def test_the_client_s_timeout_is_the_server_s_too(client, service):
    ask(client.with_options(timeout=7))
    assert 5 < service.last("hello").deadline.remaining_seconds() <= 7


def test_the_client_s_timeout_is_a_stream_s_longest_gap(client, service):
    list(ask(client.with_options(timeout=7), stream=True))
    assert service.last("hello").deadline.remaining_seconds() > 200


def test_the_client_s_standing_timeout_changes_nothing(client, service):
    ask(client.with_options(timeout=600))
    assert 290 < service.last("hello").deadline.remaining_seconds() <= 300


def test_a_client_that_gives_up_leaves_no_work_behind(client, service, gate):
    service.add("never", gate, "Hi")
    # Both count the same time; either may be the first to say so.
    with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
        ask(client.with_options(timeout=0.1), "never")
    service.backends["never"].started.wait()
    wait_until(lambda: service.last("never").cancelled)


def test_our_own_header_counts_for_streams_as_well(client, gate, service):
    service.add("stalls", "Hel", gate)
    stream = ask(client, "stalls", stream=True, extra_headers={"X-Request-Timeout": "0.5"})
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "deadline_exceeded"


# Leaving.


def test_closing_a_stream_cancels_its_request(client, service, gate, finished):
    service.add("long", "one", gate, "two")
    stream = ask(client, "long", stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: service.last("long").cancelled)
    gate.open()
    service.backends["long"].closed.wait()
    wait_until(lambda: finished["long"])
    (outcome,) = finished["long"]
    assert isinstance(outcome.error, RequestCancelledError)


def test_a_finished_stream_is_no_cancel(client, finished):
    with ask(client, stream=True) as stream:
        list(stream)
    wait_until(lambda: finished["hello"])
    assert finished["hello"][0].error is None


# Other ways to ask the same route.


def post(url, accept, **fields):
    with httpx.Client() as client:
        return client.post(
            f"{url}/chat/completions",
            json={"model": "hello", "messages": HI, **fields},
            headers={"Authorization": "Bearer secret", "Accept": accept},
        )


def test_the_same_stream_as_ndjson_and_as_text(url):
    lines = post(url, "application/x-ndjson", stream=True).text.splitlines()
    assert lines[-1] == '{"done":true}'
    assert post(url, "text/plain", stream=True).text == "Hello"


def test_a_chunked_body_is_read(url):
    def body():
        yield b'{"model":"hello","messages":'
        yield b'[{"role":"user","content":"Hi"}]}'

    with httpx.Client() as client:
        answer = client.post(
            f"{url}/chat/completions", content=body(), headers={"Authorization": "Bearer secret"}
        )
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
