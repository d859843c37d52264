"""`/v1/completions` through the official client: one prompt, and several as one."""

import asyncio
import json
from collections import defaultdict

import openai
import pytest
from concurrency import wait_until
from flask_apps import data_of, make_app, serving
from openai import AsyncOpenAI, OpenAI

from flask_llmstream import (
    DeadlineExceededError,
    Finish,
    InferenceResponse,
    LLMStream,
    PermissionDeniedError,
    Reasoning,
    RequestCancelledError,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
    request_finished,
)
from flask_llmstream.testing import Gate, ScriptedBackend

PATH = "/v1/completions"
KEYS = {"alice": "secret", "bob": "other"}
ALICE = {"Authorization": "Bearer secret"}
BOB = {"Authorization": "Bearer other"}


class Prompts:
    """Plays another script for each prompt."""

    supports = ScriptedBackend().supports

    def __init__(self, **scripts):
        self.of = {prompt: ScriptedBackend(*script) for prompt, script in scripts.items()}

    def generate(self, request):
        return self.of[request.prompt].generate(request)

    def request(self, prompt):
        return self.of[prompt].requests[-1]

    def wait_for(self, *prompts):
        for prompt in prompts:
            self.of[prompt].started.wait()

    def wait_until_cancelled(self, *prompts):
        for prompt in prompts:
            wait_until(lambda prompt=prompt: self.request(prompt).cancelled)


class Service:
    """An app with one model, and ways to ask it."""

    def __init__(self, backend, engine=None, **settings):
        self.backend = backend
        self.llm = LLMStream()
        self.llm.add_backend("m", backend, **(engine or {}))
        self.app = make_app(self.llm, **{"api_keys": KEYS, "heartbeat_seconds": 30, **settings})
        self.app.register_blueprint(self.llm.openai_blueprint())
        self.client = self.app.test_client()

    def ask(self, prompt="Once", headers=ALICE, **fields):
        return self.client.post(PATH, json={"prompt": prompt, **fields}, headers=headers)

    def queue_stats(self):
        with self.app.app_context():
            return self.llm.engine_of("m").queue_stats()


@pytest.fixture
def gates():
    """Makes gates, which are all open in the end."""
    made = []

    def make():
        made.append(Gate())
        return made[-1]

    yield make
    for gate in made:
        gate.open()


@pytest.fixture
def finished():
    """The outcomes of this test's requests, by prompt."""
    outcomes = {}

    def receive(sender, outcome):
        assert outcome.request.prompt not in outcomes, "told twice"
        outcomes[outcome.request.prompt] = outcome

    with request_finished.connected_to(receive):
        yield outcomes


@pytest.fixture
def connect():
    """The official client of a service, which is served."""
    with_server = []

    def make(service):
        server = serving(service.app)
        address = server.__enter__()
        client = OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0, timeout=20)
        with_server.append((server, client))
        return client

    yield make
    for server, client in with_server:
        client.close()
        server.__exit__(None, None, None)


def texts_of(chunks):
    """The text of each choice, joined, by its index."""
    texts = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return dict(texts)


def read_texts(frames):
    """The same of a stream's bytes."""
    texts = defaultdict(str)
    for payload in data_of(b"".join(frames).decode()):
        for choice in payload.get("choices", ()) if isinstance(payload, dict) else ():
            texts[choice["index"]] += choice["text"]
    return dict(texts)


# One prompt.


def test_a_whole_answer(connect):
    client = connect(Service(ScriptedBackend("Hel", "lo", Usage(3, 2))))

    answer = client.completions.create(model="m", prompt="Once")

    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "Hello", "stop")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)


def test_a_streamed_answer(connect):
    client = connect(Service(ScriptedBackend("Hel", "lo", Finish("length"), Usage(3, 2))))

    *chunks, last = client.completions.create(
        model="m", prompt="Once", stream=True, stream_options={"include_usage": True}
    )

    assert texts_of(chunks) == {0: "Hello"}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]
    assert last.choices == []
    assert last.usage.total_tokens == 5
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_the_asynchronous_client_reads_the_same():
    service = Service(ScriptedBackend("Hel", "lo"))

    async def read(address):
        async with (
            AsyncOpenAI(base_url=f"{address}/v1", api_key="secret") as client,
            await client.completions.create(model="m", prompt=["a", "b"], stream=True) as stream,
        ):
            return [chunk async for chunk in stream]

    with serving(service.app) as address:
        assert texts_of(asyncio.run(read(address))) == {0: "Hello", 1: "Hello"}


def test_parameters_arrive(connect):
    service = Service(ScriptedBackend("Hi"))
    connect(service).completions.create(
        model="m",
        prompt="Once",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop=["\n"],
        seed=1,
        user="u1",
    )

    (request,) = service.backend.requests
    assert (request.prompt, request.messages) == ("Once", ())
    assert (request.max_tokens, request.temperature, request.top_p) == (7, 0.5, 0.9)
    assert (list(request.stop), request.seed) == (["\n"], 1)
    assert (request.metadata, request.identity) == ({"user": "u1"}, "alice")


def test_without_a_limit_the_model_finishes(connect):
    client = connect(Service(ScriptedBackend(*["x"] * 40)))

    (choice,) = client.completions.create(model="m", prompt="Once").choices

    assert (choice.text, choice.finish_reason) == ("x" * 40, "stop")


def test_an_app_s_own_limit_holds():
    service = Service(ScriptedBackend(*["x"] * 40), max_tokens_limit=5)

    (choice,) = service.ask().get_json()["choices"]

    assert (choice["text"], choice["finish_reason"]) == ("x" * 5, "length")


SCORED = (
    Token("a", logprob=-0.5, top_logprobs=[("a", -0.5), ("b", -1.0)]),
    Token("bc", logprob=-0.25),
)


def test_log_probabilities(connect):
    client = connect(Service(ScriptedBackend(*SCORED)))

    told = client.completions.create(model="m", prompt="Once", logprobs=2).choices[0].logprobs

    assert (told.tokens, told.token_logprobs, told.text_offset) == (
        ["a", "bc"],
        [-0.5, -0.25],
        [0, 1],
    )
    assert told.top_logprobs == [{"a": -0.5, "b": -1.0}, {"bc": -0.25}]
    streamed = [
        chunk.choices[0].logprobs.text_offset
        for chunk in client.completions.create(model="m", prompt="Once", logprobs=2, stream=True)
        if chunk.choices[0].logprobs is not None
    ]
    assert streamed == [[0], [1]]


def test_the_prompt_is_echoed(connect):
    client = connect(Service(ScriptedBackend(" upon")))

    fields = {"model": "m", "prompt": "Once", "echo": True}

    assert client.completions.create(**fields).choices[0].text == "Once upon"
    assert texts_of(client.completions.create(**fields, stream=True)) == {0: "Once upon"}


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_text_is_left_out(connect, stream):
    service = Service(
        ScriptedBackend(
            Reasoning("hm"),
            "Hi",
            ToolCallDelta(0, id="c", name="f", arguments="{}"),
            Finish("tool_calls"),
        )
    )

    answer = connect(service).completions.create(model="m", prompt="Once", stream=stream)

    chunks = list(answer) if stream else [answer]
    assert texts_of(chunks) == {0: "Hi"}
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_best_of_several(connect):
    service = Service(
        ScriptedBackend(
            Token("bad", logprob=-3.0),
            Token("good", logprob=-1.0, choice=1),
            Token("better", logprob=-0.5, choice=2),
            Usage(3, 3),
        )
    )

    answer = connect(service).completions.create(model="m", prompt="Once", n=2, best_of=3)

    assert [(each.index, each.text) for each in answer.choices] == [(0, "better"), (1, "good")]
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage.completion_tokens == 3, "what was generated, not what is told"


@pytest.mark.parametrize("headers", [{}, {"Accept": "text/event-stream"}])
def test_the_best_of_several_cannot_be_streamed(headers):
    service = Service(ScriptedBackend("Hi"))
    fields = {} if headers else {"stream": True}

    response = service.ask(n=1, best_of=2, headers={**ALICE, **headers}, **fields)

    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == "best_of"
    assert service.queue_stats()["total_submitted"] == 0


def test_the_best_of_several_takes_a_backend_that_can():
    service = Service(ScriptedBackend("Hi", supports=["n"]))

    response = service.ask(best_of=2)

    assert response.status_code == 400
    assert "logprobs" in response.get_json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_what_cannot_be_done_is_refused(connect, fields, param):
    service = Service(ScriptedBackend("Hi"))

    with pytest.raises(openai.BadRequestError) as caught:
        connect(service).completions.create(**{"model": "m", "prompt": "Once", **fields})

    assert (caught.value.param, caught.value.code) == (param, "invalid_request")
    assert service.backend.requests == []


def test_it_comes_as_text_and_as_ndjson_too():
    service = Service(ScriptedBackend(" upon"))

    def ask(accept):
        return service.ask(stream=True, echo=True, headers={**ALICE, "Accept": accept})

    assert ask("text/plain").text == "Once upon"
    *_, last = ask("application/x-ndjson").text.splitlines()
    assert json.loads(last) == {"done": True}


# Several prompts.


def test_several_prompts_are_answered_in_their_order(connect):
    service = Service(
        Prompts(
            a=("A", Token("A2", choice=1), Usage(1, 2, 3, 4)),
            b=("B", Token("B2", choice=1), Usage(10, 20, 30, 40)),
        )
    )
    client = connect(service)

    answer = client.completions.create(model="m", prompt=["a", "b"], n=2)

    assert [(each.index, each.text) for each in answer.choices] == list(
        enumerate(["A", "A2", "B", "B2"])
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 22)
    assert answer.usage.prompt_tokens_details.cached_tokens == 33
    assert answer.usage.completion_tokens_details.reasoning_tokens == 44
    *chunks, last = client.completions.create(
        model="m", prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    assert texts_of(chunks) == {0: "A", 1: "A2", 2: "B", 3: "B2"}
    assert last.usage == answer.usage


def test_several_prompts_stream_at_the_same_time(gates):
    first, second = gates(), gates()
    service = Service(Prompts(a=("a1", first, "a2"), b=("b1", second, "b2")))
    response = service.ask(["a", "b"], stream=True)
    frames = response.iter_encoded()
    received = []

    def read_until(texts):
        while read_texts(received) != texts:
            received.append(next(frames))

    read_until({0: "a1", 1: "b1"})
    second.open()
    read_until({0: "a1", 1: "b1b2"})
    first.open()
    received += frames
    assert read_texts(received) == {0: "a1a2", 1: "b1b2"}
    assert received[-1].endswith(b"data: [DONE]\n\n")


def test_one_that_nobody_reads_is_held_up(gates):
    gate = gates()
    service = Service(Prompts(a=["x"] * 10_000, b=["b1", gate]), channel_size=8)
    response = service.ask(["a", "b"], stream=True)
    gate.reached.wait()

    with pytest.raises(TimeoutError):
        service.backend.of["a"].closed.wait(0.3)
    gate.open()
    texts = read_texts(response.iter_encoded())
    assert texts == {0: "x" * 10_000, 1: "b1"}


def test_several_prompts_have_one_deadline(connect, gates, finished):
    service = Service(Prompts(a=("A",), b=(gates(),), c=(gates(),)))

    with pytest.raises(openai.InternalServerError) as caught:
        connect(service).completions.create(
            model="m", prompt=["a", "b", "c"], extra_headers={"X-Request-Timeout": "1"}
        )

    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    service.backend.wait_until_cancelled("b", "c")
    wait_until(lambda: len(finished) == 3)
    assert finished["a"].error is None
    assert isinstance(finished["b"].error, (DeadlineExceededError, RequestCancelledError))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_all(connect, gates, stream):
    service = Service(Prompts(a=("A", gates()), b=("B", gates()), c=("C",)))
    fields = {"model": "m", "prompt": ["a", "b", "c"], "stream": stream}
    client = connect(service)

    if stream:
        with client.completions.create(**fields) as answer:
            next(iter(answer))
            service.backend.wait_for("a", "b")
    else:
        # Both sides count the same time; either may be the first to say so.
        with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
            client.with_options(timeout=1).completions.create(**fields)

    service.backend.wait_until_cancelled("a", "b")


def test_all_of_them_are_ended_by_their_one_id(gates):
    service = Service(Prompts(a=("A", gates()), b=("B", gates())))
    response = service.ask(["a", "b"], stream=True)
    frames = response.iter_encoded()
    id = data_of(next(frames).decode())[0]["id"]
    service.backend.wait_for("a", "b")

    assert service.client.delete(f"/v1/streams/{id}", headers=BOB).status_code == 404
    assert service.client.delete(f"/v1/streams/{id}", headers=ALICE).status_code == 200

    rest = b"".join(frames)
    assert rest.count(b'"code":"cancelled"') == 1
    assert b"[DONE]" not in rest
    assert service.backend.request("a").cancelled
    assert service.backend.request("b").cancelled


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_fails_before_the_first_token_fails_all(connect, gates, finished, stream):
    service = Service(Prompts(a=(gates(),), b=(UpstreamError("The model server is down."),)))

    with pytest.raises(openai.InternalServerError) as caught:
        connect(service).completions.create(model="m", prompt=["a", "b"], stream=stream)

    assert (caught.value.status_code, caught.value.code) == (502, "upstream_error")
    service.backend.wait_until_cancelled("a")
    wait_until(lambda: len(finished) == 2)
    assert isinstance(finished["a"].error, RequestCancelledError)
    assert isinstance(finished["b"].error, UpstreamError)


def test_one_that_fails_in_the_middle_ends_the_stream(gates):
    gate = gates()
    service = Service(Prompts(a=("A", gates()), b=("B", gate, UpstreamError("gone"))))
    response = service.ask(["a", "b"], stream=True)
    frames = response.iter_encoded()
    received = []
    while read_texts(received) != {0: "A", 1: "B"}:
        received.append(next(frames))
    gate.open()

    *_, last = data_of(b"".join(frames).decode())

    assert (last["error"]["code"], last["error"]["message"]) == ("upstream_error", "gone")
    service.backend.wait_until_cancelled("a")


def test_a_failure_waits_for_what_the_others_said_before(gates):
    service = Service(Prompts(a=("A",), b=(gates(), UpstreamError("gone"))))
    response = service.ask(["a", "b"], stream=True)
    wait_until(service.backend.of["a"].closed.is_set)
    service.backend.of["b"].script[0].open()
    service.backend.of["b"].closed.wait()

    payloads = data_of(response.text)

    assert payloads[0]["choices"][0]["text"] == "A"
    assert "error" in payloads[-1]


def test_each_prompt_is_admitted_for_itself():
    service = Service(Prompts(a=("A",), c=("C",)))
    seen = []

    @service.llm.before_submit
    def rewrite(request):
        seen.append(request.prompt)
        request.metadata["seen"] = len(seen)
        request.prompt = request.prompt.replace("b", "c")
        return request

    answer = service.ask(["a", "b"]).get_json()

    assert seen == ["a", "b"]
    assert [choice["text"] for choice in answer["choices"]] == ["A", "C"]
    assert service.backend.request("a").metadata == {"seen": 1}
    assert service.backend.request("c").metadata == {"seen": 2}


def test_one_prompt_that_is_not_permitted_stops_all_before_they_start():
    service = Service(Prompts(a=("A",), b=("B",)))

    @service.llm.permission_check
    def check(identity, request):
        if request.prompt == "b":
            raise PermissionDeniedError("Not b.")

    assert service.ask(["a", "b"]).status_code == 403
    assert service.queue_stats()["total_submitted"] == 0


def test_a_choice_s_place_follows_from_what_the_app_made_of_the_requests():
    service = Service(
        Prompts(a=("A", Token("A2", choice=1)), b=("B",), c=("C", Token("C2", choice=1)))
    )

    @service.llm.before_submit
    def limit(request):
        request.n = 1 if request.prompt == "b" else 2
        return request

    expected = dict(enumerate(["A", "A2", "B", "C", "C2"]))
    whole = service.ask(["a", "b", "c"], n=2).get_json()["choices"]
    assert {choice["index"]: choice["text"] for choice in whole} == expected
    stream = service.ask(["a", "b", "c"], n=2, stream=True)
    assert read_texts(stream.iter_encoded()) == expected


def test_the_prompts_of_one_body_may_go_to_several_models():
    service = Service(ScriptedBackend("small"))
    service.llm.add_backend("large", ScriptedBackend("large"))

    @service.llm.before_submit
    def route(request):
        request.model = "large" if len(request.prompt) > 3 else "m"
        return request

    answer = service.ask(["abc", "abcd"], model="m").get_json()

    assert [choice["text"] for choice in answer["choices"]] == ["small", "large"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_queue_without_room_for_all_takes_none(gates, stream):
    gate = gates()
    service = Service(
        ScriptedBackend("x", gate),
        engine={"worker_threads": 1, "queue_size": 1, "backpressure": "reject"},
    )

    response = service.ask(["a", "b", "c"], stream=stream)

    assert response.status_code == 429
    assert response.headers["Retry-After"]
    stats = service.queue_stats()
    assert (stats["waiting"], stats["running"]) == (0, 0)
    assert (stats["total_rejected"], stats["total_cancelled"]) == (1, 2)


def test_a_refused_list_lets_go_who_waits_for_room_in_a_channel():
    service = Service(
        ScriptedBackend(*["x"] * 100),
        engine={"worker_threads": 1, "queue_size": 0, "block_timeout_seconds": 0.2},
        channel_size=4,
    )

    assert service.ask(["a", "b", "c"], stream=True).status_code == 429
    service.backend.closed.wait()  # Not after SLOW_READER_SECONDS, which are 30.


def test_everybody_is_told_of_each_prompt_once(finished):
    service = Service(Prompts(a=("A", Usage(1, 2)), b=("B", Usage(3, 4))))

    assert service.ask(["a", "b"], stream=True).text.endswith("[DONE]\n\n")

    wait_until(lambda: len(finished) == 2)
    assert {prompt: outcome.usage for prompt, outcome in finished.items()} == {
        "a": Usage(1, 2),
        "b": Usage(3, 4),
    }
    assert finished["b"].text == "B"
    assert isinstance(finished["b"].response, InferenceResponse)


def test_a_stream_of_several_prompts_is_resumed():
    service = Service(Prompts(a=("A1", "A2"), b=("B1", "B2")), resume_seconds=30)
    whole = service.ask(["a", "b"], stream=True).get_data()
    events = whole.split(b"\n\n")[:-1]
    last = events[0].split(b"\n")[0].removeprefix(b"id: ").decode()

    rest = service.ask(["a", "b"], stream=True, headers={**ALICE, "Last-Event-ID": last})

    assert rest.get_data() == whole.split(b"\n\n", 1)[1]
    assert len(service.backend.of["a"].requests) == 1


def test_every_prompt_waits_in_the_queue_for_its_worker(connect):
    prompts = [f"p{number}" for number in range(20)]
    service = Service(
        Prompts(**{prompt: (prompt,) for prompt in prompts}), engine={"worker_threads": 2}
    )

    client = connect(service)

    expected = dict(enumerate(prompts))
    assert texts_of(client.completions.create(model="m", prompt=prompts, stream=True)) == expected
    answer = client.completions.create(model="m", prompt=prompts)
    assert texts_of([answer]) == expected
