"""The answer's tokens, for a view that makes a response of its own."""

import gc
import socket
from contextlib import closing

import pytest
from flask import Response
from flask_apps import make_app, scripted

from flask_llmstream import (
    DeadlineExceededError,
    FirstTokenTimeoutError,
    IdleTimeoutError,
    InferenceRequest,
    LLMStream,
    QueueFullError,
    Reasoning,
    RequestCancelledError,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
    request_finished,
)
from flask_llmstream.testing import Gate, ScriptedBackend, Signal

HI = InferenceRequest(prompt="Hi")


@pytest.fixture
def finished():
    """Outcomes of the requests of this test, and a signal for the first."""
    outcomes = []
    came = Signal()

    def receive(sender, outcome):
        outcomes.append(outcome)
        came.set()

    with request_finished.connected_to(receive):
        yield outcomes, came


def test_tokens_come_as_they_are_produced(gate):
    llm, _ = scripted("one", gate, "two")
    with make_app(llm).app_context():
        tokens = llm.tokens(HI)
        assert iter(tokens) is tokens
        assert next(tokens) == "one"
        gate.open()
        assert list(tokens) == ["two"]
        assert list(tokens) == []


def test_they_are_the_text_of_the_first_answer_alone():
    llm, _ = scripted(
        Reasoning("hm"),
        "a",
        Token("b", choice=1),
        ToolCallDelta(0, id="c", name="f"),
        Token("c", logprob=-1.0),
        Usage(1, 2),
    )
    with make_app(llm).app_context():
        tokens = list(llm.tokens(InferenceRequest(prompt="Hi", n=2)))
    assert tokens == ["a", "c"]
    assert tokens[1].logprob == -1.0


def test_the_request_is_submitted_at_once(gate):
    llm, backend = scripted(gate)
    with make_app(llm).app_context():
        tokens = llm.tokens(HI)
        backend.started.wait()
        tokens.close()


def test_what_is_refused_is_raised_at_once():
    llm = LLMStream()
    gate = Gate()
    llm.add_backend(
        "m", ScriptedBackend(gate), worker_threads=1, queue_size=0, backpressure="reject"
    )
    with make_app(llm).app_context(), closing(llm.tokens(HI)):
        with pytest.raises(QueueFullError):
            llm.tokens(HI)
        gate.open()


def test_a_failure_is_raised_after_the_tokens_before_it():
    llm, _ = scripted("one", "two", UpstreamError("gone"))
    with make_app(llm).app_context():
        tokens = llm.tokens(HI)
        assert [next(tokens), next(tokens)] == ["one", "two"]
        with pytest.raises(UpstreamError):
            next(tokens)
        assert list(tokens) == []


@pytest.mark.parametrize(
    ("config", "script", "error"),
    [
        ({"deadline_seconds": 0.05}, [], DeadlineExceededError),
        ({"first_token_seconds": 0.05}, [], FirstTokenTimeoutError),
        ({"idle_seconds": 0.05}, ["one"], IdleTimeoutError),
    ],
)
def test_budgets_hold(gate, config, script, error):
    llm, _ = scripted(*script, gate)
    with make_app(llm, **config).app_context():
        tokens = llm.tokens(HI)
        with pytest.raises(error):
            list(tokens)


def test_closing_cancels_and_is_told_once(gate, finished):
    llm, backend = scripted("one", gate, "two")
    outcomes, _ = finished
    with make_app(llm).app_context():
        tokens = llm.tokens(HI)
        assert next(tokens) == "one"
        tokens.close()
        tokens.close()
        assert list(tokens) == []
    (outcome,) = outcomes
    assert isinstance(outcome.error, RequestCancelledError)
    assert outcome.text == "one"
    gate.open()
    backend.closed.wait()


def test_dropping_cancels_and_is_told(gate, finished):
    llm, backend = scripted("one", gate, "two")
    outcomes, came = finished
    with make_app(llm).app_context():
        tokens = llm.tokens(HI)
        assert next(tokens) == "one"
        del tokens
    gc.collect()
    came.wait()
    (outcome,) = outcomes
    assert isinstance(outcome.error, RequestCancelledError)
    gate.open()
    backend.closed.wait()


def test_reading_to_the_end_is_no_cancel(finished):
    llm, _ = scripted("one", Usage(1, 2))
    with make_app(llm).app_context():
        tokens = llm.tokens(HI)
        assert list(tokens) == ["one"]
        tokens.close()
    (outcome,) = finished[0]
    assert (outcome.text, outcome.error, outcome.usage) == ("one", None, Usage(1, 2))


def test_a_view_may_read_two_answers_at_once():
    llm, _ = scripted("a", "b", model="first")
    llm.add_backend("second", ScriptedBackend("1", "2"))
    app = make_app(llm)

    @app.get("/")
    def view():
        first = llm.tokens(InferenceRequest(prompt="Hi", model="first"))
        second = llm.tokens(InferenceRequest(prompt="Hi", model="second"))
        return "".join(a + b for a, b in zip(first, second, strict=True))

    assert app.test_client().get("/").text == "a1b2"


def test_a_view_s_own_stream_is_cancelled_when_its_client_leaves(gate):
    llm, backend = scripted("one", gate, "two")
    app = make_app(llm)

    @app.get("/")
    def view():
        return Response(token.upper() for token in llm.tokens(InferenceRequest(prompt="Hi")))

    response = app.test_client().get("/")
    assert next(iter(response.response)) == b"ONE"
    response.close()
    gate.open()
    backend.closed.wait()


def test_a_client_that_leaves_is_noticed_though_no_token_comes(gate):
    llm, _ = scripted("one", gate, "two")
    ours, theirs = socket.socketpair()
    with (
        ours,
        make_app(llm).test_request_context(environ_overrides={"gunicorn.socket": ours}),
        closing(llm.tokens(HI)) as tokens,
    ):
        assert next(tokens) == "one"
        theirs.close()
        with pytest.raises(RequestCancelledError, match="client left"):
            next(tokens)


def test_a_client_that_leaves_ends_a_whole_answer_too(gate):
    llm, _ = scripted(gate)
    ours, theirs = socket.socketpair()
    theirs.close()
    with (
        ours,
        make_app(llm).test_request_context(environ_overrides={"gunicorn.socket": ours}),
        pytest.raises(RequestCancelledError, match="client left"),
    ):
        llm.complete(HI)


def test_a_client_that_leaves_two_answers_ends_both(gate):
    llm, _ = scripted("one", gate)
    ours, theirs = socket.socketpair()
    with (
        ours,
        make_app(llm).test_request_context(environ_overrides={"gunicorn.socket": ours}),
        closing(llm.tokens(HI)) as first,
        closing(llm.tokens(HI)) as second,
    ):
        assert [next(first), next(second)] == ["one", "one"]
        theirs.close()
        for tokens in (first, second):
            with pytest.raises(RequestCancelledError):
                next(tokens)
