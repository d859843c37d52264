"""Anthropic's own client against a real server: what its users see."""

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from concurrency import wait_until
from flask_apps import make_app, serving
from pydantic import BaseModel
from scripted_service import GuardedService

from flask_llmstream import (
    Finish,
    Reasoning,
    RequestCancelledError,
    ToolCallDelta,
    UpstreamError,
    Usage,
)

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


class Service(GuardedService):
    def __init__(self):
        super().__init__()
        self.add("hello", "Hel", "lo", Usage(3, 2, cached_tokens=1, reasoning_tokens=1))
        self.add("unicode", b"\xf0\x9f", b"\x98\x80", "\u2028", "\r\n")
        self.add("down", UpstreamError("The model server is down."))
        self.add("breaks", "Hel", UpstreamError("The model server is gone."))
        self.add("secret", ValueError("/etc/secret"))
        self.add("plain", "x", supports=())
        self.add("thinks", Reasoning("h"), Reasoning("m"), "Hi")
        self.add("cut", "Hi", Finish("length"))
        self.add("silent")
        self.add("recovers", "Hi")
        self.add("busy", "Hi")
        self.add("forbidden", "Hi")
        self.add("json", '{"city":', '"Oslo"}')
        self.add("lists", ToolCallDelta(0, id="t", name="weather", arguments='["Oslo"]'))
        self.add(
            "tools",
            "Let me see.",
            ToolCallDelta(0, id="t1", name="weather"),
            ToolCallDelta(1, id="t2", name="weather"),
            ToolCallDelta(0, arguments='{"ci'),
            ToolCallDelta(1, arguments='{"city":"Rome"}'),
            ToolCallDelta(0, arguments='ty":"Oslo"}'),
            ToolCallDelta(2, id="t3", name="now"),
            Finish("tool_calls"),
        )


@pytest.fixture(scope="module")
def service():
    return Service()


@pytest.fixture(scope="module")
def url(service):
    app = make_app(service.llm, api_keys={"alice": "secret"}, heartbeat_seconds=0.2)
    app.register_blueprint(service.llm.openai_blueprint())
    app.register_blueprint(service.llm.anthropic_blueprint())
    with serving(app) as address:
        yield address


def connect(url, **options):
    return Anthropic(base_url=url, **{"api_key": "secret", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(url):
    with connect(url, timeout=20) as client:
        yield client


def ask(client, model="hello", **fields):
    return client.messages.create(**{"model": model, "max_tokens": 99, "messages": HI, **fields})


def helped(client, model="hello", **fields):
    """The message that the SDK's own helper puts together."""
    fields = {"model": model, "max_tokens": 99, "messages": HI, **fields}
    with client.messages.stream(**fields) as stream:
        return stream.get_final_message()


@pytest.fixture(params=[ask, helped], ids=["whole", "streamed"])
def get(request, client):
    """A message, in both ways to get one."""
    return lambda *model, **fields: request.param(client, *model, **fields)


# Answers.


def test_a_message(get):
    message = get()
    assert (message.type, message.role, message.model) == ("message", "assistant", "hello")
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello")]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg_")


def test_cached_tokens_are_not_among_the_input_tokens(get):
    usage = get().usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 1, 2)
    assert usage.output_tokens_details.thinking_tokens == 1


def test_the_events_of_a_stream(client):
    events = list(ask(client, stream=True))
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.usage.input_tokens == 0
    assert events[0].message.content == []
    assert events[-2].usage.output_tokens == 2


def test_the_text_of_a_stream(client):
    with client.messages.stream(model="hello", max_tokens=9, messages=HI) as stream:
        assert list(stream.text_stream) == ["Hel", "lo"]
        assert stream.get_final_text() == "Hello"
        assert stream.request_id


def test_characters_that_tokens_split(get):
    assert get("unicode").content[0].text == "😀\u2028\r\n"


def test_tokens_arrive_as_they_are_produced(client, service, gate):
    service.add("waits", "one", gate, "two")
    with client.messages.stream(model="waits", max_tokens=9, messages=HI) as stream:
        assert next(stream.text_stream) == "one"
        gate.open()
        assert next(stream.text_stream) == "two"


def test_pings_before_the_first_token_disturb_nothing(client, service, gate):
    service.add("thinks long", gate, "Hi")
    with client.messages.stream(model="thinks long", max_tokens=9, messages=HI) as stream:
        # It is here though no token is: a ping has opened it.
        gate.open()
        assert stream.get_final_text() == "Hi"


def test_an_empty_answer(get):
    message = get("silent")
    assert (message.content, message.stop_reason) == ([], "end_turn")


def test_a_length_is_told(get):
    assert get("cut").stop_reason == "max_tokens"
    assert get(max_tokens=1).stop_reason == "max_tokens"


def test_a_stop_sequence_is_told(get):
    message = get(stop_sequences=["!", "ll"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "ll")
    assert message.content[0].text == "He"


def test_thinking_is_a_block_of_its_own(get):
    thought, said = get("thinks", thinking={"type": "enabled", "budget_tokens": 1024}).content
    assert (thought.type, thought.thinking, said.text) == ("thinking", "hm", "Hi")
    assert thought.signature


def test_thinking_that_is_not_wanted_is_left_out(get):
    (said,) = get("thinks", thinking={"type": "disabled"}).content
    assert said.text == "Hi"


def test_parallel_tool_calls_that_a_backend_emits_in_turns(get):
    message = get("tools", tools=[WEATHER])
    said, *calls = message.content
    assert (said.text, message.stop_reason) == ("Let me see.", "tool_use")
    assert [(call.id, call.name, call.input) for call in calls] == [
        ("t1", "weather", {"city": "Oslo"}),
        ("t2", "weather", {"city": "Rome"}),
        ("t3", "now", {}),
    ]


def test_a_conversation_goes_on_with_what_the_client_got(client, service, get):
    message = get("tools", tools=[WEATHER])
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "Rain."},
        {"type": "tool_result", "tool_use_id": "t2", "content": "No idea.", "is_error": True},
        {"type": "text", "text": "Well?"},
    ]
    messages = [
        *HI,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    ask(client, "tools", messages=messages, tools=[WEATHER], tool_choice={"type": "any"})
    request = service.last("tools")
    _, called, *answers = request.messages
    assert [call.arguments for call in called.tool_calls] == [
        '{"city":"Oslo"}',
        '{"city":"Rome"}',
        "{}",
    ]
    assert [(each.role, each.tool_call_id, each.text) for each in answers] == [
        ("tool", "t1", "Rain."),
        ("tool", "t2", "Error: No idea."),
        ("user", None, "Well?"),
    ]
    assert request.tool_choice == "required"


class Place(BaseModel):
    city: str


def test_an_answer_with_a_schema_is_parsed(client, service):
    answer = client.messages.parse(model="json", max_tokens=9, messages=HI, output_format=Place)
    assert answer.parsed_output == Place(city="Oslo")
    wanted = service.last("json").response_format
    assert wanted["json_schema"]["schema"]["properties"]["city"]["type"] == "string"


def test_parameters_arrive(client, service):
    client.beta.messages.create(
        model="hello",
        messages=HI,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        max_tokens=7,
        metadata={"user_id": "u1"},
        service_tier="auto",
        output_config={"effort": "low"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 3},
        betas=["some-beta-2026-01-01"],
    )
    request = service.last("hello")
    assert (request.max_tokens, request.temperature) == (7, 0.5)
    assert (request.top_p, request.top_k) == (0.9, 3)
    assert request.metadata == {"user_id": "u1"}
    assert request.identity == "alice"
    assert [(each.role, each.text) for each in request.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


def test_the_request_id_is_where_the_client_looks_for_it(client):
    raw = client.messages.with_raw_response.create(
        model="hello", max_tokens=9, messages=HI, extra_headers={"X-Request-ID": "req-7"}
    )
    assert raw.headers["x-request-id"] == raw.headers["request-id"] == "req-7"
    assert raw.parse()._request_id == "req-7"


def test_models_are_listed_in_anthropic_s_form(client, url, service):
    listed = list(client.models.list())
    assert [model.id for model in listed] == service.llm.models()
    assert {model.type for model in listed} == {"model"}
    assert client.models.retrieve("hello").display_name == "hello"
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nothing")
    openai_s = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).json()
    assert openai_s["object"] == "list"


# Errors.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "fields", "error", "type", "code", "message"),
    [
        ("hello", {"max_tokens": 0}, "BadRequest", "invalid_request", None, "max_tokens: "),
        ("plain", {"tools": [WEATHER]}, "BadRequest", "invalid_request", None, "support tools"),
        ("claude", {}, "NotFound", "not_found", "model_not_found", "'claude'"),
        ("forbidden", {}, "PermissionDenied", "permission", "permission_denied", "Not for you."),
        ("busy", {}, "RateLimit", "rate_limit", "queue_full", "The queue is full."),
        ("down", {}, "InternalServer", "api", "upstream_error", "is down."),
        ("secret", {}, "InternalServer", "api", "engine_error", "The server's log says how."),
    ],
)
def test_errors_are_the_client_s_own(client, model, fields, error, type, code, message, stream):
    with pytest.raises(getattr(anthropic, f"{error}Error")) as caught:
        ask(client, model, stream=stream, **fields)
    assert caught.value.type == f"{type}_error"
    assert caught.value.error_code == (code or type)
    assert message in caught.value.api_message
    assert caught.value.request_id == caught.value.body["request_id"]


def test_a_wrong_key(url):
    with connect(url, api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError):
        ask(client)


def test_a_body_that_is_too_large(url):
    with connect(url) as client, pytest.raises(anthropic.ContentTooLargeError) as caught:
        ask(client, system="x" * 2**20)
    assert caught.value.body["error"]["type"] == "request_too_large"


def broken(client, model, **fields):
    """The text so far, and the error."""
    texts = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        texts.extend(
            getattr(event.delta, "text", "")
            for event in ask(client, model, stream=True, **fields)
            if event.type == "content_block_delta"
        )
    return "".join(texts), caught.value


def test_an_error_in_the_middle_of_a_stream(client):
    text, error = broken(client, "breaks")
    assert text == "Hel"
    assert (error.type, error.error_code) == ("api_error", "upstream_error")
    assert error.api_message == "The model server is gone."
    assert error.status_code == 200  # The SDK has no other; by it, it is of no known class.


def test_arguments_that_are_no_object_are_an_error(client):
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask(client, "lists", tools=[WEATHER])
    for error in (caught.value, broken(client, "lists", tools=[WEATHER])[1]):
        assert error.error_code == "engine_error"
        assert (
            error.api_message
            == "The model called 'weather' with arguments that are no JSON object."
        )


# Retries.


def test_the_client_tries_again_what_may_help(service, url):
    with connect(url, max_retries=2) as client:
        assert ask(client, "recovers").content[0].text == "Hi"
    assert service.attempts["recovers"] == 2


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("forbidden", anthropic.PermissionDeniedError),
        ("endless", anthropic.GatewayTimeoutError),
    ],
)
def test_the_client_does_not_try_again_what_does_not_help(service, url, gate, model, error):
    if model == "endless":
        service.add("endless", gate)
    before = service.attempts[model]
    with connect(url, max_retries=2) as client, pytest.raises(error):
        ask(client, model, extra_headers={"X-Request-Timeout": "0.1"})
    assert service.attempts[model] - before == 1


# Time, and leaving.


def test_the_client_s_timeout_is_the_server_s_too(client, service):
    ask(client.with_options(timeout=7))
    assert 5 < service.last("hello").deadline.remaining_seconds() <= 7


def test_a_deadline_in_the_middle_of_a_stream(client, service, gate):
    service.add("stalls", "Hel", gate)
    text, error = broken(client, "stalls", extra_headers={"X-Request-Timeout": "0.5"})
    assert text == "Hel"
    assert (error.type, error.error_code) == ("timeout_error", "deadline_exceeded")


def test_closing_a_stream_cancels_its_request(client, service, gate, finished):
    service.add("long", "one", gate, "two")
    with client.messages.stream(model="long", max_tokens=9, messages=HI) as stream:
        assert next(stream.text_stream) == "one"
    wait_until(lambda: service.last("long").cancelled)
    gate.open()
    service.backends["long"].closed.wait()
    wait_until(lambda: finished["long"])
    assert isinstance(finished["long"][0].error, RequestCancelledError)


def test_an_answer_is_ended_by_its_message_s_id(client, url, service, gate):
    service.add("endless stream", "one", gate)
    headers = {"Authorization": "Bearer secret"}
    events = iter(ask(client, "endless stream", stream=True))
    id = next(events).message.id
    assert httpx.delete(f"{url}/v1/streams/{id}", headers=headers).status_code == 200
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(events)
    assert caught.value.error_code == "cancelled"


def test_a_finished_stream_is_no_cancel(client, finished):
    helped(client)
    wait_until(lambda: finished["hello"])
    assert finished["hello"][0].error is None


# Other ways to ask the same route.


def post(url, **headers):
    return httpx.post(
        f"{url}/v1/messages",
        json={"model": "hello", "max_tokens": 9, "messages": HI},
        headers={"Authorization": "Bearer secret", **headers},
    )


def test_the_same_stream_as_ndjson_and_as_text(url):
    lines = post(url, Accept="application/x-ndjson").text.splitlines()
    assert lines[-1] == '{"type":"message_stop"}'
    assert post(url, Accept="text/plain").text == "Hello"


def test_no_version_header_is_needed(url):
    assert post(url).json()["content"] == [{"type": "text", "text": "Hello"}]


def test_a_key_may_be_in_the_header_that_anthropic_s_other_clients_use(url):
    headers = {"Authorization": "", "X-API-Key": "secret"}
    assert post(url, **headers).status_code == 200
    assert post(url, **{**headers, "X-API-Key": "wrong"}).status_code == 401
