"""LLMStream: registering backends, and answering from an app's own views."""

import gc
import sysconfig
import weakref

import pytest
from concurrency import wait_until
from flask import Flask, current_app, has_request_context, jsonify, request
from flask_apps import data_of, make_app, scripted, tokens_of

from flask_llmstream import (
    AsyncInferenceEngine,
    ConfigurationError,
    Deadline,
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    InferenceRequest,
    InferenceResponse,
    InvalidRequestError,
    LLMStream,
    PermissionDeniedError,
    QueueFullError,
    RequestCancelledError,
    RequestDroppedError,
    UnknownModelError,
    UpstreamError,
    Usage,
    request_finished,
)
from flask_llmstream.backends.function import FunctionBackend
from flask_llmstream.testing import ScriptedBackend, Signal

HI = InferenceRequest(prompt="Hi")


def streaming(llm, *, on_finish=None, make_request=lambda: InferenceRequest(prompt="Hi"), **config):
    """A client of an app whose ``/`` streams."""
    app = make_app(llm, **config)

    @app.route("/", methods=["GET", "POST"])
    def view():
        return llm.stream(make_request(), on_finish=on_finish)

    return app.test_client()


def engine_of(client, llm, model="m"):
    with client.application.app_context():
        return llm.engine_of(model)


# Setting up.


def test_an_app_finds_its_extension():
    app = Flask("tests")
    llm = LLMStream(app)
    assert app.extensions["llmstream"] is llm


def test_init_app_is_the_same_for_factories():
    llm = LLMStream()
    assert make_app(llm).extensions["llmstream"] is llm


@pytest.mark.parametrize("second", ["same", "other"])
def test_an_app_has_one_extension(second):
    app = Flask("tests")
    llm = LLMStream(app)
    with pytest.raises(ConfigurationError, match="This app has an LLMStream already"):
        (llm if second == "same" else LLMStream()).init_app(app)
    assert app.extensions["llmstream"] is llm


def test_a_factory_may_be_called_again_and_again():
    llm, backend = scripted("Hi")
    for number in range(1, 4):
        app = make_app(llm, default_model="m", queue_size=number)
        app.register_blueprint(llm.openai_blueprint())
        with app.app_context():
            assert llm.complete(HI).text == "Hi"
            assert llm.settings().queue_size == number
            assert llm.engine_of("m").queue_stats()["queue_size"] == number
    assert len(backend.requests) == 3


def test_apps_share_backends_but_not_engines():
    llm, _ = scripted("Hi")
    first, second = make_app(llm), make_app(llm)
    with first.app_context():
        first_engine = llm.engine_of("m")
        assert llm.engine_of("m") is first_engine
    with second.app_context():
        assert llm.engine_of("m") is not first_engine


def test_an_app_may_be_forgotten():
    llm, _ = scripted("Hi")
    app = make_app(llm)
    app.register_blueprint(llm.openai_blueprint())
    reference = weakref.ref(app)
    del app
    gc.collect()
    assert reference() is None


def test_the_engines_of_a_forgotten_app_let_their_threads_go():
    llm = LLMStream()
    llm.backend("m")(lambda request: "Hi")
    app = make_app(llm)
    with app.app_context():
        assert llm.complete(HI).text == "Hi"
        engine = weakref.ref(llm.engine_of("m"))
    del app

    def is_gone():
        gc.collect()
        return engine() is None

    wait_until(is_gone)


def test_an_engine_of_one_s_own_outlives_an_app():
    llm = LLMStream()
    engine = AsyncInferenceEngine(ScriptedBackend("Hi"))
    llm.add_engine(engine, models=["m"])
    for _ in range(2):
        app = make_app(llm)
        with app.app_context():
            assert llm.complete(HI).text == "Hi"
        del app
        gc.collect()
    assert engine.is_available


def test_without_an_app_it_says_so():
    llm, _ = scripted("Hi")
    make_app(llm)
    for use in (llm.stream, llm.complete, llm.tokens):
        with pytest.raises(ConfigurationError, match=r"no current app.*app\.app_context"):
            use(HI)
    with pytest.raises(ConfigurationError, match="no current app"):
        llm.settings()


def test_in_an_app_that_it_does_not_know_it_says_so():
    llm, _ = scripted("Hi")
    with (
        Flask("other").app_context(),
        pytest.raises(ConfigurationError, match=r"not initialised.*llm\.init_app\(app\)"),
    ):
        llm.complete(HI)


def test_a_free_threaded_python_is_refused(monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: int(name == "Py_GIL_DISABLED"))
    with pytest.raises(ConfigurationError, match="free-threaded"):
        LLMStream()


# Backends.


def test_a_generator_function_is_the_shortest_backend():
    llm = LLMStream()

    @llm.backend("echo")
    def echo(request):
        yield from request.last_user_text.split()

    with make_app(llm).app_context():
        assert llm.complete(InferenceRequest(prompt="a b")).text == "ab"
    assert list(echo(InferenceRequest(prompt="a b"))) == ["a", "b"]  # Left as it was.


@pytest.mark.parametrize(
    "result",
    ["Hi", b"Hi", ["H", "i"], InferenceResponse(text="Hi"), iter("Hi")],
    ids=["str", "bytes", "list", "response", "iterator"],
)
def test_a_function_may_return_the_whole_answer(result):
    llm = LLMStream()
    llm.backend("m")(lambda request: result)
    with make_app(llm).app_context():
        assert llm.complete(HI).text == "Hi"


def test_a_function_may_call_the_callback():
    llm = LLMStream()

    @llm.backend("m")
    def call(request):
        assert request.stream_callback("H") is True
        request.stream_callback("i")

    with make_app(llm).app_context():
        assert llm.complete(HI).text == "Hi"
        assert list(llm.tokens(HI)) == ["H", "i"]


def test_a_backend_runs_under_an_app_context_of_its_own():
    llm = LLMStream()

    @llm.backend("m")
    def look(request):
        yield f"{current_app.name} {has_request_context()}"

    client = streaming(llm)
    assert tokens_of(client.get("/").text) == "tests False"


def test_a_function_backend_shows_its_function():
    def echo(request):
        yield "Hi"

    assert "echo" in repr(FunctionBackend(echo))


async def coroutine(request):
    return "Hi"


async def asynchronous_generator(request):
    yield "Hi"


@pytest.mark.parametrize("function", [coroutine, asynchronous_generator])
def test_an_asynchronous_function_is_refused(function):
    with pytest.raises(ConfigurationError, match=rf"{function.__name__} is asynchronous.*greenlet"):
        LLMStream().backend("m")(function)


class AsynchronousBackend:
    async def generate(self, request):
        return "Hi"


class AsynchronousGenerator:
    async def generate(self, request):
        yield "Hi"


class AsynchronousSubmit:
    async def submit(self, request, emit):
        emit("Hi")


class AsynchronousCall:
    async def __call__(self, request):
        return "Hi"


@pytest.mark.parametrize(
    "backend", [AsynchronousBackend, AsynchronousGenerator, AsynchronousSubmit]
)
def test_an_asynchronous_method_is_refused(backend):
    with pytest.raises(ConfigurationError, match=rf"{backend.__name__}\.\w+ is asynchronous"):
        LLMStream().add_backend("m", backend())


def test_an_object_with_an_asynchronous_call_is_refused():
    with pytest.raises(ConfigurationError, match="is asynchronous"):
        LLMStream().backend("m")(AsynchronousCall())


@pytest.mark.parametrize("thing", [None, "text", 5])
def test_what_cannot_be_called_is_no_function(thing):
    with pytest.raises(ConfigurationError, match="is no backend: it cannot be called"):
        LLMStream().backend("m")(thing)


def test_the_decorator_needs_its_parentheses():
    llm = LLMStream()
    with pytest.raises(ConfigurationError, match="model id must be a non-empty string"):

        @llm.backend
        def echo(request):
            yield "Hi"


@pytest.mark.parametrize("model", ["", None, 5, b"m"])
def test_a_model_id_is_a_string(model):
    llm = LLMStream()
    for register in (
        lambda: llm.backend(model),
        lambda: llm.add_backend(model, ScriptedBackend()),
        lambda: llm.add_engine(AsyncInferenceEngine(ScriptedBackend()), models=[model]),
    ):
        with pytest.raises(ConfigurationError, match="model id must be a non-empty string"):
            register()


@pytest.mark.parametrize("thing", [None, object(), lambda request: "Hi"])
def test_what_does_not_generate_is_no_backend(thing):
    with pytest.raises(ConfigurationError, match="neither generate"):
        LLMStream().add_backend("m", thing)


def test_a_class_is_no_backend():
    with pytest.raises(ConfigurationError, match=r"ScriptedBackend is a class.*ScriptedBackend\("):
        LLMStream().add_backend("m", ScriptedBackend)


@pytest.mark.parametrize("worker", ["process", "", None])
def test_an_unknown_worker_is_refused(worker):
    with pytest.raises(ConfigurationError, match='"thread" or "greenlet"'):
        LLMStream().backend("m", worker=worker)(lambda request: "Hi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_threads": 0}, "worker_threads must be at least 1, not 0"),
        ({"queue_size": -1}, "queue_size must be at least 0, not -1"),
        ({"block_timeout_seconds": -1}, "block_timeout_seconds must be at least 0"),
        ({"stuck_seconds": -1}, "stuck_seconds must be at least 0"),
    ],
)
def test_a_wrong_option_fails_where_it_is_given(options, message):
    llm = LLMStream()
    with pytest.raises(ConfigurationError, match=message):
        llm.backend("m", **options)(lambda request: "Hi")
    assert llm.models() == []


def test_an_unknown_option_fails_where_it_is_given():
    with pytest.raises(TypeError, match="workers"):
        LLMStream().add_backend("m", ScriptedBackend(), workers=3)


def test_options_win_over_the_config():
    llm = LLMStream()
    llm.add_backend("own", ScriptedBackend(), worker_threads=7, queue_size=8)
    llm.backend("decorated", worker_threads=6)(lambda request: "Hi")
    llm.add_backend("plain", ScriptedBackend())
    llm.add_backend("greenlet", ScriptedBackend(worker="greenlet"))
    with make_app(llm, worker_threads=3, queue_size=5).app_context():
        stats = {model: llm.engine_of(model).worker_stats() for model in llm.models()}
        assert llm.engine_of("own").queue_stats()["queue_size"] == 8
        assert llm.engine_of("plain").queue_stats()["queue_size"] == 5
    assert {model: each["capacity"] for model, each in stats.items()} == {
        "own": 7,
        "decorated": 6,
        "plain": 3,
        "greenlet": 1000,
    }


def test_supports_is_passed_on():
    llm = LLMStream()
    llm.backend("m", supports=["json_object"])(lambda request: "{}")
    wanted = InferenceRequest(prompt="Hi", response_format={"type": "json_object"})
    with make_app(llm).app_context():
        assert llm.complete(wanted).text == "{}"


def test_a_function_may_take_the_fields_that_have_no_name():
    llm = LLMStream()

    @llm.backend("m", supports=["extra_body"])
    def think(request):
        yield request.extra_body["reasoning_effort"]

    wanted = InferenceRequest(prompt="Hi", extra_body={"reasoning_effort": "high"})
    with make_app(llm).app_context():
        assert llm.complete(wanted).text == "high"


@pytest.mark.parametrize("supports", ["tools", ["tool"], ["tools", "vision"]])
def test_a_misspelt_feature_is_refused(supports):
    with pytest.raises(ConfigurationError, match=r"supports must be .*json_object"):
        LLMStream().backend("m", supports=supports)(lambda request: "Hi")


def test_several_backends_of_one_model_are_balanced(gate):
    llm, first = scripted(gate, "Hi")
    second = ScriptedBackend(gate, "Hi")
    llm.add_backend("m", second, queue_size=3)
    with make_app(llm).app_context():
        answers = [llm.tokens(HI), llm.tokens(HI)]
        first.started.wait()
        second.started.wait()
        gate.open()
        assert [list(answer) for answer in answers] == [["Hi"], ["Hi"]]
        assert llm.models() == ["m"]
        assert llm.engine_of("m").queue_stats()["queue_size"] == 3


# Engines.


def test_an_engine_serves_models_for_several_apps():
    llm = LLMStream()
    engine = AsyncInferenceEngine(ScriptedBackend("Hi"))
    llm.add_engine(engine, models=["a", "b"])
    for app in (make_app(llm), make_app(llm)):
        with app.app_context():
            assert llm.models() == ["a", "b"]
            assert llm.engine_of("b") is engine
            assert llm.complete(InferenceRequest(prompt="Hi", model="b")).text == "Hi"


def test_an_engine_that_comes_late_serves_the_apps_that_are_there():
    llm = LLMStream()
    app = make_app(llm)
    engine = AsyncInferenceEngine(ScriptedBackend("Hi"))
    llm.add_engine(engine, models=["m"])
    with app.app_context():
        assert llm.engine_of("m") is engine


def test_a_model_has_one_owner():
    llm, _ = scripted(model="backend")
    engine = AsyncInferenceEngine(ScriptedBackend())
    llm.add_engine(engine, models=["engine"])
    with pytest.raises(ConfigurationError, match="'engine' has an engine already"):
        llm.add_engine(engine, models=["engine"])
    with pytest.raises(ConfigurationError, match="'engine' has an engine already"):
        llm.add_backend("engine", ScriptedBackend())
    with pytest.raises(ConfigurationError, match="'backend' has a backend already"):
        llm.add_engine(engine, models=["backend"])


def test_an_engine_gets_all_of_its_models_or_none():
    llm, _ = scripted(model="taken")
    with pytest.raises(ConfigurationError, match="'taken'"):
        llm.add_engine(AsyncInferenceEngine(ScriptedBackend()), models=["free", "taken"])
    assert llm.models() == ["taken"]


def test_one_model_as_a_string_would_be_several():
    with pytest.raises(ConfigurationError, match="models must be a list of model ids, not 'ab'"):
        LLMStream().add_engine(AsyncInferenceEngine(ScriptedBackend()), models="ab")


def test_a_model_in_use_gets_no_further_backend():
    llm, _ = scripted("Hi")
    with make_app(llm).app_context():
        llm.complete(HI)
    with pytest.raises(ConfigurationError, match="before the first request"):
        llm.add_backend("m", ScriptedBackend())


# Streaming from a view.


def test_a_view_streams():
    llm, _ = scripted("Hel", "lo", Usage(1, 2))
    response = streaming(llm).get("/")
    assert response.content_type == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in response.headers
    *tokens, last, done = data_of(response.text)
    assert [token["token"] for token in tokens] == ["Hel", "lo"]
    assert (last["done"], last["finish_reason"]) == (True, "stop")
    assert {token["id"] for token in [*tokens, last]} == {response.headers["X-Request-ID"]}
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("accept", "content_type", "body"),
    [
        ("text/event-stream", "text/event-stream", "data: "),
        ("application/x-ndjson", "application/x-ndjson", '{"id"'),
        ("text/plain", "text/plain; charset=utf-8", "Hello"),
        ("application/json", "text/event-stream", "data: "),
        ("*/*", "text/event-stream", "data: "),
        ("application/json, text/plain, */*", "text/event-stream", "data: "),
    ],
)
def test_accept_picks_the_framing(accept, content_type, body):
    llm, _ = scripted("Hel", "lo")
    response = streaming(llm).get("/", headers={"Accept": accept})
    assert response.content_type == content_type
    assert response.text.startswith(body)


def test_what_nothing_can_be_made_of_is_406():
    llm, backend = scripted("Hi")
    response = streaming(llm).get("/", headers={"Accept": "image/png"})
    assert response.status_code == 406
    assert response.get_json()["error"]["code"] == "not_acceptable"
    assert backend.requests == []


def test_head_submits_nothing():
    llm, backend = scripted("Hi")
    client = streaming(llm)
    response = client.head("/")
    assert response.status_code == 200
    assert response.content_type == "text/event-stream"
    assert response.headers["X-Request-ID"]
    assert response.data == b""
    assert backend.requests == []
    assert engine_of(client, llm).worker_stats()["total_submitted"] == 0


def test_a_failure_before_the_first_token_has_its_status():
    llm, _ = scripted(UpstreamError("The model server is down.", retry_after=9))
    response = streaming(llm).get("/")
    assert response.status_code == 502
    assert response.content_type == "application/json"
    assert response.headers["Retry-After"] == "9"
    assert response.get_json()["error"] == {
        "message": "The model server is down.",
        "code": "upstream_error",
        "retryable": True,
    }


def test_a_view_may_catch_a_failure_and_ask_another_model():
    llm, broken = scripted(UpstreamError("down"), model="broken")
    llm.add_backend("spare", ScriptedBackend("Hi"))
    app = make_app(llm)

    @app.get("/")
    def view():
        wanted = InferenceRequest(prompt="Hi", model="broken")
        try:
            return llm.stream(wanted)
        except UpstreamError:
            wanted.model = "spare"
            return llm.stream(wanted)

    assert tokens_of(app.test_client().get("/").text) == "Hi"
    broken.closed.wait()


def test_a_failure_after_the_first_token_is_told_in_the_stream():
    llm, _ = scripted("Hel", ValueError("secret"))
    response = streaming(llm).get("/")
    assert response.status_code == 200
    first, last = data_of(response.text)
    assert first["token"] == "Hel"
    assert last["error"]["code"] == "engine_error"
    assert "secret" not in response.text


def test_a_request_may_have_an_id_of_its_own():
    llm, backend = scripted("Hi")
    client = streaming(llm, make_request=lambda: InferenceRequest(prompt="Hi", request_id="mine"))
    response = client.get("/", headers={"X-Request-ID": "theirs"})
    assert backend.requests[0].request_id == "mine"
    assert response.headers["X-Request-ID"] == "mine"
    assert data_of(response.text)[0]["id"] == "mine"


@pytest.mark.parametrize("id", ["a b", "a\nSet-Cookie: x=1", "é", "x" * 129])
def test_an_id_that_no_header_can_carry_is_refused(id):
    llm, backend = scripted("Hi")
    response = streaming(llm, make_request=lambda: InferenceRequest(request_id=id)).get("/")
    assert response.status_code == 400
    assert backend.requests == []


def test_a_request_stays_as_it_is_and_can_be_asked_again():
    llm, backend = scripted("Hi")
    wanted = InferenceRequest(prompt="Hi")
    client = streaming(llm, make_request=lambda: wanted, max_tokens_limit=9)
    for id in ("one", "two"):
        response = client.get("/", headers={"X-Request-ID": id, "X-Request-Timeout": "60"})
        assert response.status_code == 200
    with client.application.app_context():
        assert llm.complete(wanted).text == "Hi"
        assert list(llm.tokens(wanted)) == ["Hi"]
    assert wanted == InferenceRequest(prompt="Hi")
    assert wanted.stream_callback is wanted.deadline is None
    assert [each.request_id for each in backend.requests[:2]] == ["one", "two"]
    assert backend.requests[2].deadline.remaining_seconds() > 200


def test_a_callback_of_one_s_own_is_refused_with_where_to_go():
    llm, _ = scripted("Hi")
    with (
        make_app(llm).app_context(),
        pytest.raises(InvalidRequestError, match="Submit to an engine") as caught,
    ):
        llm.complete(InferenceRequest(prompt="Hi", stream_callback=print))
    assert caught.value.param == "stream_callback"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("Hi", "Give an InferenceRequest, not str"),
        ({"prompt": "Hi"}, "Give an InferenceRequest, not dict"),
        (
            InferenceRequest(messages=[{"role": "user", "content": "Hi"}]),
            r"messages\[0\] is a dict. Give Message\(role, content",
        ),
        (InferenceRequest(messages="Hi"), r"messages\[0\] is a str"),
    ],
)
def test_what_is_no_request_is_a_mistake_that_says_so(wanted, message):
    llm, _ = scripted("Hi")
    with make_app(llm).app_context():
        for use in (llm.stream, llm.complete, llm.tokens):
            with pytest.raises(TypeError, match=message):
                use(wanted)


def test_a_deadline_of_one_s_own_counts_where_it_is_shorter():
    llm, backend = scripted("Hi")
    with make_app(llm).app_context():
        for seconds in (5, 1000):
            llm.complete(InferenceRequest(prompt="Hi", deadline=Deadline.after(seconds)))
    short, long = (each.deadline.remaining_seconds() for each in backend.requests)
    assert 4 < short <= 5
    assert 290 < long <= 300


# How long.


@pytest.mark.parametrize("value", ["0", "-1", "NOT_GIVEN", "nan", "inf"])
def test_a_timeout_that_makes_no_sense_is_refused(value):
    llm, backend = scripted("Hi")
    response = streaming(llm).get("/", headers={"X-Request-Timeout": value})
    assert response.status_code == 400
    assert "X-Request-Timeout" in response.get_json()["error"]["message"]
    assert backend.requests == []


def test_a_timeout_that_makes_no_sense_stops_all_of_llm_alike():
    llm, backend = scripted("Hi")
    app = make_app(llm)
    checks = []
    llm.permission_check(lambda identity, request: checks.append(request))
    with app.test_request_context(headers={"X-Request-Timeout": "soon"}):
        for use in (llm.stream, llm.complete, llm.tokens):
            with pytest.raises(InvalidRequestError):
                use(HI)
    assert backend.requests == checks == []


@pytest.mark.parametrize(("asked", "given"), [("7", 7), ("900", 900), ("1e9", 3600)])
def test_a_client_says_how_long_it_waits(asked, given):
    llm, backend = scripted("Hi")
    streaming(llm).get("/", headers={"X-Request-Timeout": asked})
    assert given - 5 < backend.requests[0].deadline.remaining_seconds() <= given


def test_the_deadline_before_the_first_token_is_504(gate):
    llm, _ = scripted(gate)
    response = streaming(llm).get("/", headers={"X-Request-Timeout": "0.05"})
    assert response.status_code == 504
    assert response.get_json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-should-retry"] == "false"


def test_the_first_token_has_a_budget(gate):
    llm, _ = scripted(gate)
    response = streaming(llm, first_token_seconds=0.05).get("/")
    assert response.status_code == 504
    assert response.get_json()["error"]["code"] == "first_token_timeout"


def test_a_gap_between_tokens_has_a_budget(gate):
    llm, _ = scripted("Hel", gate)
    response = streaming(llm, idle_seconds=0.05).get("/")
    assert response.status_code == 200
    assert data_of(response.text)[-1]["error"]["code"] == "idle_timeout"


def test_the_total_ends_a_stream_that_flows(gate):
    llm, _ = scripted("Hel", gate)
    response = streaming(llm).get("/", headers={"X-Request-Timeout": "0.5"})
    assert response.status_code == 200
    assert data_of(response.text)[-1]["error"]["code"] == "deadline_exceeded"


def test_a_stream_opens_and_pings_while_the_model_still_reads_the_prompt(gate):
    llm, _ = scripted(gate, "Hi")
    response = streaming(llm, heartbeat_seconds=0.02).get("/")
    body = iter(response.response)
    assert next(body) == b": ping\n\n"
    gate.open()
    assert "Hi" in b"".join(body).decode()


def test_after_a_ping_the_first_token_s_budget_is_told_in_the_stream(gate):
    llm, _ = scripted(gate)
    response = streaming(llm, heartbeat_seconds=0.02, first_token_seconds=0.5).get("/")
    assert response.status_code == 200
    assert data_of(response.text)[-1]["error"]["code"] == "first_token_timeout"


# The queue.


def full(gate, policy):
    """An engine with one worker, busy, and one place in the queue, taken."""
    backend = ScriptedBackend(gate, "Hi")
    llm = LLMStream()
    llm.add_backend("m", backend, worker_threads=1, queue_size=1, backpressure=policy)
    client = streaming(llm, block_timeout_seconds=0.05)
    engine = engine_of(client, llm)
    running = engine.submit(HI)
    backend.started.wait()
    return client, backend, running, engine.submit(HI)


@pytest.mark.parametrize("policy", ["reject", "block"])
def test_a_full_queue_is_429_with_retry_after(gate, policy):
    client, backend, _, waiting = full(gate, policy)
    response = client.get("/")
    assert response.status_code == 429
    assert response.get_json()["error"]["code"] == "queue_full"
    assert int(response.headers["Retry-After"]) >= 1
    gate.open()
    assert waiting.get(10).text == "Hi"
    assert len(backend.requests) == 2


def test_drop_oldest_drops_who_waits_longest(gate):
    client, _, _, waiting = full(gate, "drop_oldest")
    app = client.application
    llm = app.extensions["llmstream"]
    with app.app_context():
        tokens = llm.tokens(HI)
    with pytest.raises(RequestDroppedError):
        waiting.get(10)
    gate.open()
    assert list(tokens) == ["Hi"]


def test_a_dropped_request_is_503(gate):
    client, backend, _, waiting = full(gate, "drop_oldest")
    llm = client.application.extensions["llmstream"]
    app = client.application
    responses = []

    @request_finished.connect_via(app)
    def finished(sender, outcome):
        responses.append(outcome.error.code)

    @app.get("/two")
    def two():
        first = llm.tokens(HI)  # Takes the place of the one that waits,
        second = llm.tokens(HI)  # and loses it.
        try:
            next(first)
        finally:
            second.close()

    response = app.test_client().get("/two")
    assert response.status_code == 503
    assert response.get_json()["error"]["code"] == "request_dropped"
    assert response.headers["Retry-After"] == "1"
    assert sorted(responses) == ["cancelled", "request_dropped"]
    assert len(backend.requests) == 1
    assert isinstance(waiting.outcome, RequestDroppedError)


def test_an_engine_that_is_shut_down_is_503():
    llm, backend = scripted("Hi")
    client = streaming(llm)
    engine_of(client, llm).shutdown(timeout_seconds=0)
    response = client.get("/")
    assert response.status_code == 503
    assert response.get_json()["error"]["code"] == "engine_closed"
    assert int(response.headers["Retry-After"]) >= 1
    assert backend.requests == []


def test_an_engine_that_is_shut_down_ends_its_streams(gate):
    llm, _ = scripted("Hel", gate)
    client = streaming(llm)
    response = client.get("/")
    body = iter(response.response)
    text = next(body)
    engine_of(client, llm).shutdown(timeout_seconds=0)
    text += b"".join(body)
    assert data_of(text.decode())[-1]["error"]["code"] == "engine_closed"
    assert b"[DONE]" not in text


# Who asks.


def test_identity_is_loaded_in_the_request():
    llm, backend = scripted("Hi")
    llm.identity_loader(lambda: request.headers["X-User"])
    streaming(llm).get("/", headers={"X-User": "alice"})
    assert backend.requests[0].identity == "alice"


def test_without_a_loader_it_is_the_name_of_the_api_key():
    llm, backend = scripted("Hi")
    app = make_app(llm, api_keys={"alice": "secret"})
    app.register_blueprint(llm.openai_blueprint())
    app.test_client().post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}]},
        headers={"Authorization": "Bearer secret"},
    )
    assert backend.requests[0].identity == "alice"


def test_outside_of_a_request_nobody_asks_unless_it_is_said():
    llm, backend = scripted("Hi")
    seen = []
    llm.identity_loader(lambda: request.headers["X-User"])
    llm.permission_check(lambda identity, request: seen.append(identity))
    with make_app(llm).app_context():
        llm.complete(HI)
        llm.complete(InferenceRequest(prompt="Hi", identity="nightly job"))
    assert [each.identity for each in backend.requests] == [None, "nightly job"]
    assert seen == [None, "nightly job"]


def test_an_identity_is_never_carried_over_to_the_next_who_asks():
    llm, backend = scripted("Hi")
    llm.identity_loader(lambda: request.headers["X-User"])
    wanted = InferenceRequest(prompt="Hi")
    client = streaming(llm, make_request=lambda: wanted)
    for user in ("alice", "bob"):
        client.get("/", headers={"X-User": user})
    assert [each.identity for each in backend.requests] == ["alice", "bob"]


# What may be asked.


def all_ways(llm, wanted):
    """The error of each way to ask, the blueprint's included; None where it went well."""
    app = make_app(llm)
    app.register_blueprint(llm.openai_blueprint())
    errors = []
    for use in (llm.stream, llm.complete, llm.tokens):
        with app.test_request_context():
            try:
                answer = use(wanted)
            except Exception as error:
                errors.append(type(error))
            else:
                errors.append(None)
                getattr(answer, "close", lambda: None)()
    response = app.test_client().post(
        "/v1/chat/completions",
        json={"model": wanted.model, "messages": [{"role": "user", "content": wanted.prompt}]},
    )
    return [*errors, response.status_code]


def test_a_permission_check_holds_for_every_way_to_ask():
    llm, backend = scripted("Hi")
    checked = []

    @llm.permission_check
    def check(identity, request):
        checked.append((identity, request.last_user_text))
        raise PermissionDeniedError("Not you.")

    assert all_ways(llm, HI) == [PermissionDeniedError] * 3 + [403]
    assert checked == [(None, "Hi")] * 4
    assert backend.requests == []


def test_a_permission_check_that_says_false_means_no():
    llm, backend = scripted("Hi")
    llm.permission_check(lambda identity, request: False)
    assert all_ways(llm, HI) == [PermissionDeniedError] * 3 + [403]
    assert backend.requests == []


@pytest.mark.parametrize("answer", [None, True, "yes", 0])
def test_a_permission_check_that_says_anything_else_means_yes(answer):
    llm, _ = scripted("Hi")
    llm.permission_check(lambda identity, request: answer)
    assert all_ways(llm, HI) == [None] * 3 + [200]


def test_every_permission_check_is_asked_in_order():
    llm, _ = scripted("Hi")
    asked = []
    for number in range(3):
        llm.permission_check(lambda identity, request, number=number: asked.append(number))
    with make_app(llm).app_context():
        llm.complete(HI)
    assert asked == [0, 1, 2]


def test_a_permission_check_sees_what_will_be_asked():
    llm, _ = scripted("Hi")
    seen = []

    @llm.before_submit
    def complete(request):
        request.max_tokens = 7
        return request

    llm.permission_check(lambda identity, request: seen.append(request.max_tokens))
    with make_app(llm).app_context():
        llm.complete(HI)
    assert seen == [7]


def test_an_unknown_model_holds_for_every_way_to_ask():
    llm, _ = scripted("Hi")
    wanted = InferenceRequest(prompt="Hi", model="?")
    assert all_ways(llm, wanted) == [UnknownModelError] * 3 + [404]


def test_the_token_limit_holds_for_views_too():
    llm, backend = scripted("Hi")
    with make_app(llm, max_tokens_limit=10).app_context():
        with pytest.raises(InvalidRequestError, match="at most 10"):
            llm.complete(InferenceRequest(prompt="Hi", max_tokens=11))
        llm.complete(HI)
    assert backend.requests[0].max_tokens == 10


def test_features_hold_for_views_too():
    llm, backend = scripted("Hi", supports=())
    with (
        make_app(llm).app_context(),
        pytest.raises(InvalidRequestError, match="does not support n") as caught,
    ):
        llm.tokens(InferenceRequest(prompt="Hi", n=2))
    assert caught.value.param == "n"
    assert backend.requests == []


def test_every_before_submit_completes_the_request_in_order():
    llm, backend = scripted("Hi")

    @llm.before_submit
    def first(request):
        request.prompt += " first"
        return request

    @llm.before_submit
    def second(request):
        return InferenceRequest(prompt=request.prompt + " second", model=request.model)

    with make_app(llm).app_context():
        llm.complete(HI)
    assert backend.requests[0].prompt == "Hi first second"
    assert backend.requests[0].request_id
    assert first.__name__ == "first"  # The decorator gives it back.


def test_before_submit_may_choose_another_model():
    llm, _ = scripted("small", model="small")
    llm.add_backend("large", ScriptedBackend("large"))

    @llm.before_submit
    def route(request):
        if len(request.prompt) > 5:
            request.model = "large"
        return request

    with make_app(llm).app_context():
        assert llm.complete(InferenceRequest(prompt="short")).text == "small"
        assert llm.complete(InferenceRequest(prompt="long prompt")).text == "large"


def test_another_model_is_held_to_its_own_features():
    llm, _ = scripted("Hi", model="able")
    unable = ScriptedBackend("Hi", supports=())
    llm.add_backend("unable", unable)

    @llm.before_submit
    def route(request):
        request.model = "unable"
        return request

    with make_app(llm).app_context(), pytest.raises(InvalidRequestError, match="'unable'"):
        llm.complete(InferenceRequest(prompt="Hi", n=2))
    assert unable.requests == []


def test_what_before_submit_adds_is_held_to_the_features_too():
    llm, backend = scripted("Hi", supports=())

    @llm.before_submit
    def add(request):
        request.response_format = {"type": "json_object"}
        return request

    with make_app(llm).app_context(), pytest.raises(InvalidRequestError, match="json_object"):
        llm.complete(HI)
    assert backend.requests == []


def test_a_model_that_before_submit_makes_up_is_404():
    llm, _ = scripted("Hi")

    @llm.before_submit
    def route(request):
        request.model = "?"
        return request

    with make_app(llm).app_context(), pytest.raises(UnknownModelError):
        llm.complete(HI)


def test_before_submit_may_refuse():
    llm, backend = scripted("Hi")

    @llm.before_submit
    def quota(request):
        raise QueueFullError("Your tokens are used up.", retry_after=60)

    response = streaming(llm).get("/")
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "60"
    assert backend.requests == []


def test_before_submit_must_return_the_request():
    llm, _ = scripted("Hi")

    @llm.before_submit
    def forget(request):
        request.max_tokens = 7

    with (
        make_app(llm).app_context(),
        pytest.raises(ConfigurationError, match=r"forget.* must return .*InferenceRequest"),
    ):
        llm.complete(HI)


# Whole answers.


def test_complete_waits_for_the_whole_answer():
    llm, _ = scripted("Hel", "lo", Usage(1, 2))
    with make_app(llm).app_context():
        answer = llm.complete(HI)
    assert (answer.text, answer.finish_reason, answer.model) == ("Hello", "stop", "m")
    assert answer.usage == Usage(1, 2)


def test_complete_raises_what_the_backend_raises():
    llm, _ = scripted("Hel", UpstreamError("down"))
    with make_app(llm).app_context(), pytest.raises(UpstreamError, match="down"):
        llm.complete(HI)


def test_complete_keeps_the_deadline(gate):
    llm, _ = scripted(gate)
    with (
        make_app(llm, deadline_seconds=0.05).app_context(),
        pytest.raises(DeadlineExceededError),
    ):
        llm.complete(HI)


def test_an_error_of_complete_that_a_view_leaves_alone_is_answered():
    llm, _ = scripted(ValueError("secret"))
    app = make_app(llm)
    app.add_url_rule("/", view_func=lambda: llm.complete(HI).text)
    response = app.test_client().get("/")
    assert response.status_code == 500
    assert response.get_json()["error"]["code"] == "engine_error"


# How it ended.


class Outcomes(list):
    """Collects outcomes; `came` is set with the first."""

    def __init__(self):
        super().__init__()
        self.came = Signal()

    def __call__(self, outcome):
        self.append(outcome)
        self.came.set()


def test_on_finish_is_told_once_with_the_whole_answer():
    llm, _ = scripted("Hel", "lo", Usage(1, 2))
    outcomes = Outcomes()
    response = streaming(llm, on_finish=outcomes).get("/")
    assert response.text
    response.close()
    (outcome,) = outcomes
    assert (outcome.text, outcome.finish_reason, outcome.error) == ("Hello", "stop", None)
    assert outcome.usage == Usage(1, 2)
    assert outcome.response.text == "Hello"
    assert outcome.request.prompt == "Hi"
    assert outcome.request.request_id == response.headers["X-Request-ID"]


def test_on_finish_is_told_of_a_failure_with_what_there_was():
    llm, _ = scripted("Hel", UpstreamError("gone"))
    outcomes = Outcomes()
    streaming(llm, on_finish=outcomes).get("/").close()
    (outcome,) = outcomes
    assert (outcome.text, outcome.finish_reason, outcome.usage) == ("Hel", None, None)
    assert isinstance(outcome.error, UpstreamError)
    assert outcome.response is None


def test_on_finish_is_told_of_a_failure_before_the_first_token():
    llm, _ = scripted(UpstreamError("down"))
    outcomes = Outcomes()
    assert streaming(llm, on_finish=outcomes).get("/").status_code == 502
    assert [type(outcome.error) for outcome in outcomes] == [UpstreamError]


def test_on_finish_is_told_that_the_client_left(gate):
    llm, backend = scripted("Hel", gate, "lo")
    outcomes = Outcomes()
    response = streaming(llm, on_finish=outcomes).get("/")
    assert b"Hel" in next(iter(response.response))
    response.close()
    (outcome,) = outcomes
    assert outcome.text == "Hel"
    assert isinstance(outcome.error, RequestCancelledError)
    gate.open()
    backend.closed.wait()


def test_on_finish_is_told_of_a_response_that_was_never_sent(gate):
    llm, backend = scripted("Hel", gate)
    outcomes = Outcomes()
    app = make_app(llm)
    with app.test_request_context():
        response = llm.stream(HI, on_finish=outcomes)
    del response
    gc.collect()
    outcomes.came.wait()
    (outcome,) = outcomes
    assert isinstance(outcome.error, RequestCancelledError)
    gate.open()
    backend.closed.wait()


def test_on_finish_is_not_told_of_what_was_refused():
    llm, _ = scripted("Hi")
    outcomes = Outcomes()
    client = streaming(
        llm, on_finish=outcomes, make_request=lambda: InferenceRequest(prompt="Hi", model="?")
    )
    assert client.get("/").status_code == 404
    assert outcomes == []


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json;q=1, */*;q=0"])
def test_on_finish_runs_in_an_app_context(accept):
    llm, _ = scripted("Hi")
    names = []
    client = streaming(llm, on_finish=lambda outcome: names.append(current_app.name))
    client.get("/", headers={"Accept": accept}).close()
    assert names == ["tests"]


def test_the_signal_is_sent_for_every_way_to_ask():
    llm, _ = scripted("Hi")
    app = make_app(llm)
    seen = []

    def receive(sender, outcome):
        seen.append((sender is app, current_app.name, outcome.text, outcome.error))

    with request_finished.connected_to(receive, app), app.test_request_context():
        response = llm.stream(HI)
        list(response.response)
        response.close()
        llm.complete(HI)
        list(llm.tokens(HI))
    assert seen == [(True, "tests", "Hi", None)] * 3


def test_the_signal_comes_though_on_finish_fails(caplog):
    llm, _ = scripted("Hi")

    def fail(outcome):
        raise RuntimeError("The database is down.")

    client = streaming(llm, on_finish=fail)
    seen = Outcomes()

    def receive(sender, outcome):
        seen(outcome)

    with request_finished.connected_to(receive, client.application):
        response = client.get("/", headers={"X-Request-ID": "req-7"})
        assert "[DONE]" in response.text
        response.close()
    assert [outcome.text for outcome in seen] == ["Hi"]
    assert "The database is down." in caplog.text
    assert "req-7" in caplog.text


def test_a_receiver_that_fails_harms_nobody(caplog):
    llm, _ = scripted("Hi")
    client = streaming(llm)

    def fail(sender, outcome):
        raise RuntimeError("broken receiver")

    with request_finished.connected_to(fail, client.application):
        response = client.get("/")
        assert "[DONE]" in response.text
        response.close()
    assert "broken receiver" in caplog.text


def test_an_engine_error_of_one_request_leaves_the_next_one_alone():
    llm = LLMStream()

    @llm.backend("m", worker_threads=1)
    def sometimes(request):
        if request.prompt == "fail":
            raise ValueError
        yield "Hi"

    with make_app(llm).app_context():
        with pytest.raises(EngineError):
            llm.complete(InferenceRequest(prompt="fail"))
        assert llm.complete(HI).text == "Hi"


# Looking.


def test_models_are_in_the_order_of_their_registration():
    llm, _ = scripted(model="b")
    llm.add_engine(AsyncInferenceEngine(ScriptedBackend()), models=["c"])
    llm.add_backend("a", ScriptedBackend())
    assert llm.models() == ["b", "c", "a"]


def test_check_ready_says_what_is_missing():
    class Missing(ScriptedBackend):
        def check_ready(self):
            raise ConfigurationError("There is no file model.gguf.")

    llm, _ = scripted(model="fine")
    llm.add_backend("missing", Missing())
    with make_app(llm).app_context():
        llm.check_ready("fine")
        with pytest.raises(ConfigurationError, match=r"model\.gguf"):
            llm.check_ready("missing")
        with pytest.raises(UnknownModelError):
            llm.check_ready("?")
        llm.engine_of("fine").shutdown(timeout_seconds=0)
        with pytest.raises(EngineClosedError, match="takes no requests"):
            llm.check_ready("fine")


def test_a_view_may_use_the_answer_as_it_likes():
    llm, _ = scripted("Hel", "lo")
    app = make_app(llm)

    @app.get("/")
    def view():
        return jsonify(list(llm.tokens(InferenceRequest(prompt="Hi"))))

    assert app.test_client().get("/").get_json() == ["Hel", "lo"]
