"""OpenAI's own client speaks Responses to a real server: what its users see."""

import json
import threading

import openai
import pytest
from concurrency import wait_until
from flask_apps import make_app, serving
from openai import OpenAI
from pydantic import BaseModel
from scripted_service import ScriptedService

from flask_llmstream import (
    Finish,
    Message,
    QueueFullError,
    Reasoning,
    Refusal,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)

KEYS = {"alice": "secret", "bob": "other"}
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Service(ScriptedService):
    def __init__(self):
        super().__init__()
        self.add("hello", "Hel", "lo", Usage(3, 2, cached_tokens=1, reasoning_tokens=1))
        self.add("thinks", Reasoning("Let me "), Reasoning("think."), "4")
        self.add("refuses", Refusal("I can"), Refusal("not."))
        self.add("cut", "Hel", Finish("length"))
        self.add("down", UpstreamError("The model server is down."))
        self.add("full", QueueFullError("The queue is full.", retry_after=7))
        self.add("breaks", "Hel", UpstreamError("The model server is gone."))
        self.add("json", '{"city":', '"Oslo"}')
        self.add("logprobs", Token("Hi", logprob=-0.5, top_logprobs=[("Hi", -0.5), ("Ho", -1)]))
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
    app = make_app(service.llm, api_keys=KEYS, heartbeat_seconds=0.2)
    app.register_blueprint(service.llm.openai_blueprint())
    with serving(app) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url):
    with OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def bob(url):
    with OpenAI(base_url=url, api_key="other", max_retries=0, timeout=20) as client:
        yield client


def ask(client, model="hello", input="Hi", **fields):
    return client.responses.create(model=model, input=input, **fields)


def joined(events, type):
    return "".join(event.delta for event in events if event.type == f"response.{type}.delta")


# Answers.


def test_a_whole_answer(client):
    response = ask(client)

    assert response.output_text == "Hello"
    assert (response.status, response.model, response.error) == ("completed", "hello", None)
    assert response.usage.total_tokens == 5
    assert response.usage.input_tokens_details.cached_tokens == 1
    assert response.usage.output_tokens_details.reasoning_tokens == 1


def test_a_streamed_answer(client):
    events = list(ask(client, stream=True))

    assert joined(events, "output_text") == "Hello"
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Hello"
    assert events[-1].response.usage.total_tokens == 5
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.id == events[-1].response.id


def test_the_helper_puts_a_stream_together(client):
    with client.responses.stream(model="hello", input="Hi") as stream:
        snapshots = [event.snapshot for event in stream if event.type.endswith("text.delta")]
        response = stream.get_final_response()

    assert snapshots == ["Hel", "Hello"]
    assert response.output_text == "Hello"


def test_tokens_arrive_as_they_are_produced(client, service, gate):
    service.add("waits", "one", gate, "two")
    with ask(client, "waits", stream=True) as stream:
        texts = (event.delta for event in stream if event.type.endswith("text.delta"))
        assert next(texts) == "one"
        gate.open()
        assert list(texts) == ["two"]


def test_parameters_arrive(client, service):
    ask(
        client,
        instructions="Be brief.",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=7,
        user="u1",
        metadata={"a": "b"},
    )

    request = service.last("hello")
    assert (request.temperature, request.top_p, request.max_tokens) == (0.5, 0.9, 7)
    assert request.metadata == {"user": "u1", "a": "b"}
    assert request.identity == "alice"
    assert request.messages == (Message("system", "Be brief."), Message("user", "Hi"))


def test_thoughts_stay_out_of_the_text(client):
    response = ask(client, "thinks")
    assert response.output_text == "4"
    assert response.output[0].content[0].text == "Let me think."

    events = list(ask(client, "thinks", stream=True))
    assert joined(events, "reasoning_text") == "Let me think."
    assert joined(events, "output_text") == "4"


def test_a_refusal_is_told_apart(client):
    response = ask(client, "refuses")
    assert response.output_text == ""
    assert response.output[0].content[0].refusal == "I cannot."
    assert joined(list(ask(client, "refuses", stream=True)), "refusal") == "I cannot."


def test_an_answer_that_is_cut_is_incomplete(client):
    response = ask(client, "cut", max_output_tokens=5)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hel"

    *_, last = ask(client, "cut", stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output[0].status == "incomplete"


def test_log_probabilities(client):
    include = ["message.output_text.logprobs"]
    response = ask(client, "logprobs", include=include, top_logprobs=2)

    (position,) = response.output[0].content[0].logprobs
    assert (position.token, position.logprob) == ("Hi", -0.5)
    assert [each.token for each in position.top_logprobs] == ["Hi", "Ho"]
    events = ask(client, "logprobs", include=include, stream=True)
    (delta,) = (event for event in events if event.type.endswith("text.delta"))
    assert delta.logprobs[0].logprob == -0.5


class Place(BaseModel):
    city: str


def test_a_text_format_is_parsed(client, service):
    response = client.responses.parse(model="json", input="Hi", text_format=Place)

    assert response.output_parsed == Place(city="Oslo")
    wanted = service.last("json").response_format
    assert wanted["json_schema"]["schema"]["properties"]["city"]["type"] == "string"
    with client.responses.stream(model="json", input="Hi", text_format=Place) as stream:
        assert stream.get_final_response().output_parsed == Place(city="Oslo")


def test_tool_calls(client, service):
    response = ask(client, "tools", tools=[WEATHER], tool_choice="required")

    assert [(call.type, call.call_id, call.name) for call in response.output] == [
        ("function_call", "call_1", "weather"),
        ("function_call", "call_2", "weather"),
    ]
    assert [json.loads(call.arguments)["city"] for call in response.output] == ["Oslo", "Rome"]
    assert service.last("tools").tools[0]["function"]["name"] == "weather"


def test_streamed_tool_calls(client):
    with client.responses.stream(model="tools", input="Hi", tools=[WEATHER]) as stream:
        events = list(stream)
        response = stream.get_final_response()

    deltas = [event for event in events if event.type.endswith("arguments.delta")]
    assert [event.snapshot for event in deltas] == [
        *('{"ci', '{"city":"Oslo"}'),
        '{"city":"Rome"}',
    ]
    done = [event.arguments for event in events if event.type.endswith("arguments.done")]
    assert done == ['{"city":"Oslo"}', '{"city":"Rome"}']
    assert [call.parsed_arguments for call in response.output] == [
        {"city": "Oslo"},
        {"city": "Rome"},
    ]


def test_a_tool_s_output_is_sent_back_with_the_client_s_own_items(client, service):
    asked = ask(client, "tools", tools=[WEATHER])
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
        for call in asked.output
    ]

    ask(client, input=[{"role": "user", "content": "Hi"}, *asked.output, *outputs])

    first, called, *answered = service.last("hello").messages
    assert first == Message("user", "Hi")
    assert [call.id for call in called.tool_calls] == ["call_1", "call_2"]
    assert [(each.role, each.tool_call_id, each.text) for each in answered] == [
        ("tool", "call_1", "Rain."),
        ("tool", "call_2", "Rain."),
    ]


# Going on.


def said(service, model="hello"):
    return [(message.role, message.text) for message in service.last(model).messages]


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_a_response(client, service, stream):
    first = final(ask(client, input="One", instructions="Be kind.", stream=stream))
    second = final(
        ask(client, input="Two", previous_response_id=first.id, stream=stream, model="thinks")
    )
    ask(client, input="Three", previous_response_id=second.id, instructions="Be brief.")

    assert said(service) == [
        *(("system", "Be brief."), ("user", "One"), ("assistant", "Hello")),
        *(("user", "Two"), ("assistant", "4"), ("user", "Three")),
    ]
    assert second.previous_response_id == first.id


def final(response):
    """The response object, streamed or not."""
    if isinstance(response, openai.Stream):
        *_, last = response
        return last.response
    return response


def test_a_tool_s_output_is_all_that_has_to_be_sent(client, service):
    asked = ask(client, "tools", tools=[WEATHER])
    output = {"type": "function_call_output", "call_id": "call_1", "output": "Rain."}

    ask(client, input=[output], previous_response_id=asked.id)

    _, called, answered = service.last("hello").messages
    assert [call.id for call in called.tool_calls] == ["call_1", "call_2"]
    assert (answered.tool_call_id, answered.text) == ("call_1", "Rain.")


def test_an_item_may_be_referred_to(client, service):
    first = ask(client, input="One")
    (message,) = first.output
    (asked,) = client.responses.input_items.list(first.id).data

    ask(client, input=[{"type": "item_reference", "id": item.id} for item in (asked, message)])

    assert said(service) == [("user", "One"), ("assistant", "Hello")]


def test_items_of_somebody_else_s_are_not_to_be_referred_to(client, bob):
    (message,) = ask(client).output
    for id in (message.id, "msg_1"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(bob, input=[{"type": "item_reference", "id": id}])
        assert caught.value.param == "input[0].id"


def test_what_is_not_there_cannot_be_gone_on_from(client, bob):
    first = ask(client)
    for id in (first.id, "resp_1"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(bob, previous_response_id=id)
        assert caught.value.code == "previous_response_not_found"
        assert caught.value.param == "previous_response_id"


def test_a_conversation_outlives_the_responses_before(client, service):
    first = ask(client, input="One")
    second = ask(client, input="Two", previous_response_id=first.id)
    client.responses.delete(first.id)

    ask(client, input="Three", previous_response_id=second.id)

    assert [text for _, text in said(service)] == ["One", "Hello", "Two", "Hello", "Three"]


# What is kept.


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_kept_as_it_was_told(client, stream):
    told = final(ask(client, stream=stream))

    assert client.responses.retrieve(told.id) == told


def test_nobody_else_finds_a_response(client, bob):
    id = ask(client).id
    for look in (
        bob.responses.retrieve,
        bob.responses.delete,
        bob.responses.cancel,
        bob.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            look(id)
        assert caught.value.code == "stream_not_found"
    assert client.responses.retrieve(id).id == id


def test_a_deleted_response_is_gone(client):
    id = ask(client).id
    client.responses.delete(id)

    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)
    with pytest.raises(openai.BadRequestError):
        ask(client, previous_response_id=id)


def test_a_response_that_is_not_to_be_stored_is_not(client):
    response = ask(client, store=False)

    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_the_id_is_not_the_request_s(client):
    headers = {"X-Request-ID": "req-7"}
    raw = client.responses.with_raw_response.create(
        model="hello", input="Hi", extra_headers=headers
    )

    assert raw.headers["x-request-id"] == "req-7"
    assert "req-7" not in raw.parse().id


def test_input_items_come_in_pages(client):
    first = ask(client, input=[{"role": "user", "content": str(number)} for number in range(3)])
    id = ask(client, input="3", previous_response_id=first.id).id

    def texts(**query):
        page = client.responses.input_items.list(id, **query)
        return [item.content[0].text for item in page.data], page.has_more

    assert texts() == (["3", "Hello", "2", "1", "0"], False)
    assert texts(order="asc", limit=2) == (["0", "1"], True)
    (second, *_) = client.responses.input_items.list(id, order="asc", after=first_item(client, id))
    assert second.content[0].text == "1"
    everything = client.responses.input_items.list(id, order="asc", limit=2)
    assert [item.content[0].text for item in everything] == ["0", "1", "2", "Hello", "3"]


def first_item(client, id):
    return client.responses.input_items.list(id, order="asc").data[0].id


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"order": "up"}, "order"),
        ({"after": "x"}, "after"),
    ],
)
def test_a_page_that_is_none_is_refused(client, query, param):
    id = ask(client).id
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.input_items.list(id, **query)
    assert caught.value.param == param


# Errors.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "fields", "error", "code"),
    [
        ("hello", {"temperature": 9}, openai.BadRequestError, "invalid_request"),
        ("gpt", {}, openai.NotFoundError, "model_not_found"),
        ("full", {}, openai.RateLimitError, "queue_full"),
        ("down", {}, openai.InternalServerError, "upstream_error"),
    ],
)
def test_errors_before_the_stream_are_the_client_s_own(client, model, fields, error, code, stream):
    with pytest.raises(error) as caught:
        ask(client, model, stream=stream, **fields)
    assert caught.value.code == code


def test_an_error_in_the_middle_is_raised(client):
    stream = ask(client, "breaks", stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="is gone") as caught:
        seen.extend(iter(stream))
    assert caught.value.code == "upstream_error"
    # `extend` takes what came before an error.
    assert joined(seen, "output_text") == "Hel"


def test_an_error_in_the_middle_is_raised_by_the_helper(client):
    with (
        client.responses.stream(model="breaks", input="Hi") as stream,
        pytest.raises(openai.APIError, match="is gone"),
    ):
        stream.get_final_response()


def test_a_response_that_has_failed_is_kept(client):
    stream = ask(client, "breaks", stream=True)
    id = next(iter(stream)).response.id
    with pytest.raises(openai.APIError):
        list(stream)

    response = client.responses.retrieve(id)

    assert (response.status, response.error.code) == ("failed", "server_error")
    assert (response.output[0].status, response.output_text) == ("incomplete", "Hel")


def test_an_answer_is_cancelled_by_its_id(client, service, gate):
    backend = service.add("endless", "a", gate, "b")
    stream = ask(client, "endless", stream=True)
    id = next(iter(stream)).response.id

    client.delete(f"/streams/{id}", cast_to=object)

    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cancelled"
    assert backend.requests[0].cancelled
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


def test_leaving_cancels(client, service, gate):
    backend = service.add("left", "a", gate, "b")
    with ask(client, "left", stream=True) as stream:
        next(event for event in stream if event.type.endswith("text.delta"))

    wait_until(lambda: backend.requests[0].cancelled)


# In the background.


def wait_for(client, id, *statuses):
    def response():
        found = client.responses.retrieve(id)
        return found if found.status in statuses else None

    wait_until(response)
    return response()


def test_in_the_background_the_answer_comes_later(client, service, gate):
    service.add("later", gate, "Hel", "lo", Usage(3, 2))
    asked = ask(client, "later", background=True)
    assert (asked.status, asked.background, asked.output) == ("queued", True, [])
    assert client.responses.retrieve(asked.id).status == "queued"
    gate.open()

    response = wait_for(client, asked.id, "completed")

    assert response.output_text == "Hello"
    assert response.usage.total_tokens == 5
    assert response.id == asked.id


def test_in_progress_is_told(client, service, gate):
    service.add("slow", "a", gate, "b")
    asked = ask(client, "slow", background=True)

    assert wait_for(client, asked.id, "in_progress").output == []
    gate.open()
    assert wait_for(client, asked.id, "completed").output_text == "ab"


def test_a_background_stream_is_picked_up_where_it_broke(client, service, gate):
    service.add("resumed", "a", gate, "b")
    stream = ask(client, "resumed", background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if event.type.endswith("text.delta"):
            break
    stream.close()
    gate.open()

    id, last = seen[0].response.id, seen[-1].sequence_number
    rest = list(client.responses.retrieve(id, stream=True, starting_after=last))

    assert [event.sequence_number for event in rest] == list(range(last + 1, last + 1 + len(rest)))
    assert joined([*seen, *rest], "output_text") == "ab"
    assert rest[-1].type == "response.completed"
    # Once more, from the start, after its end.
    whole = list(client.responses.retrieve(id, stream=True))
    assert [event.type for event in whole] == [event.type for event in [*seen, *rest]]
    assert list(client.responses.retrieve(id, stream=True, starting_after=len(whole) - 1)) == []


def test_the_helper_picks_up_a_background_response(client, service, gate):
    service.add("helped", "a", gate, "b")
    asked = ask(client, "helped", background=True, stream=True)
    id = next(iter(asked)).response.id
    asked.close()
    gate.open()

    with client.responses.stream(response_id=id, starting_after=3) as stream:
        numbers = [event.sequence_number for event in stream]
        response = stream.get_final_response()

    assert numbers[0] == 4
    assert response.output_text == "ab"


def test_two_may_read_one_response(client, service, gate):
    service.add("shared", "a", gate, "b")
    id = ask(client, "shared", background=True).id
    streams = [client.responses.retrieve(id, stream=True) for _ in range(2)]
    texts = ["", ""]

    def read(index):
        texts[index] = joined(list(streams[index]), "output_text")

    threads = [threading.Thread(target=read, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    gate.open()
    for thread in threads:
        thread.join(10)

    assert texts == ["ab", "ab"]


def test_a_background_response_is_cancelled(client, service, gate):
    backend = service.add("unwanted", "a", gate, "b")
    asked = ask(client, "unwanted", background=True)
    backend.started.wait()

    cancelled = client.responses.cancel(asked.id)

    assert (cancelled.id, cancelled.status) == (asked.id, "cancelled")
    assert backend.requests[0].cancelled
    assert client.responses.cancel(asked.id).status == "cancelled"
    assert client.responses.retrieve(asked.id).status == "cancelled"


def test_whoever_reads_a_response_that_is_cancelled_is_told(client, service, gate):
    service.add("stopped", "a", gate, "b")
    stream = ask(client, "stopped", background=True, stream=True)
    id = next(iter(stream)).response.id
    client.responses.cancel(id)

    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cancelled"
    assert wait_for(client, id, "cancelled").error is None


def test_the_route_that_ends_streams_ends_what_is_in_the_background(client, service, gate):
    service.add("ended", "a", gate, "b")
    id = ask(client, "ended", background=True).id

    client.delete(f"/streams/{id}", cast_to=object)

    assert wait_for(client, id, "cancelled").id == id


def test_a_deleted_background_response_ends(client, service, gate):
    backend = service.add("forgotten", "a", gate, "b")
    id = ask(client, "forgotten", background=True).id
    backend.started.wait()

    client.responses.delete(id)

    assert backend.requests[0].cancelled
    gate.open()
    backend.closed.wait()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


def test_only_what_is_in_the_background_is_cancelled_or_streamed_again(client):
    id = ask(client).id
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.retrieve(id, stream=True)


def test_a_background_response_may_fail(client):
    asked = ask(client, "down", background=True)

    response = wait_for(client, asked.id, "failed")

    assert response.error.code == "server_error"
    assert response.error.message == "The model server is down."


def test_a_background_response_is_gone_on_from_when_it_is_over(client, service, gate):
    service.add("first", gate, "One")
    id = ask(client, "first", background=True).id
    with pytest.raises(openai.BadRequestError, match="not finished"):
        ask(client, previous_response_id=id)
    assert [item.content[0].text for item in client.responses.input_items.list(id)] == ["Hi"]
    gate.open()
    wait_for(client, id, "completed")

    ask(client, input="Two", previous_response_id=id)

    assert said(service) == [("user", "Hi"), ("assistant", "One"), ("user", "Two")]
    assert [item.content[0].text for item in client.responses.input_items.list(id)] == ["Hi"]


def test_a_deadline_holds_in_the_background(client, service, gate):
    service.add("stuck", "a", gate)
    # The client's own timeout is not the response's.
    asked = client.with_options(timeout=0.5).responses.create(
        model="stuck", input="Hi", background=True, extra_headers={"X-Request-Timeout": "0.3"}
    )

    response = wait_for(client, asked.id, "failed")

    assert "deadline" in response.error.message


def test_the_client_s_timeout_is_no_deadline_of_what_is_in_the_background(client, service, gate):
    backend = service.add("patient", gate, "Hi")
    id = (
        client.with_options(timeout=0.5)
        .responses.create(
            model="patient",
            input="Hi",
            background=True,
            extra_headers={"x-stainless-timeout": "0.1", "x-stainless-read-timeout": "0.1"},
        )
        .id
    )
    backend.started.wait()
    deadline = backend.requests[0].deadline
    gate.open()

    assert wait_for(client, id, "completed").output_text == "Hi"
    assert deadline.remaining_seconds() > 100


def test_events_that_have_not_come_cannot_be_begun_after(client, service, gate):
    service.add("early", gate, "Hi")
    id = ask(client, "early", background=True).id
    for number, error in ((50, openai.NotFoundError), (-1, openai.BadRequestError)):
        with pytest.raises(error) as caught:
            client.responses.retrieve(id, stream=True, starting_after=number)
        assert caught.value.param == "starting_after"
