"""What a backend may yield, return and raise, and what becomes of it."""

from __future__ import annotations

import threading

import pytest
from concurrency import DEADLINE_SECONDS, wait_until
from engine_fakes import FunctionBackend, TokenLog, ask, error_of, pass_deadline

from flask_llmstream.core.lifecycle import State
from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceResponse,
    Reasoning,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.exceptions import (
    ConfigurationError,
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    IdleTimeoutError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    RequestDroppedError,
    ServerShutdownError,
    SlowReaderError,
    UpstreamError,
)


def answer_of(engines, generate, **fields):
    return engines(generate).submit(ask(**fields)).get(5)


class Closable:
    """An iterator that is no generator, and knows whether it was closed."""

    def __init__(self, items):
        self._items = iter(items)
        self.closed_on = None

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._items)

    def close(self):
        self.closed_on = threading.get_ident()


class TestReturns:
    @pytest.mark.parametrize(
        "result",
        [
            "ab",
            b"ab",
            Token("ab", logprob=-1.0),
            ["a", "b"],
            ("a", b"b"),
            InferenceResponse(text="ab"),
        ],
        ids=str,
    )
    def test_a_whole_answer_or_its_items(self, engines, result):
        items = []

        response = answer_of(engines, lambda _: result, stream_callback=items.append)

        assert response.text == "ab"
        assert response.finish_reason == "stop"
        assert "".join(item for item in items if isinstance(item, str)) == "ab"

    def test_an_iterator_that_is_closed_on_the_worker(self, engines):
        items = Closable("ab")

        assert answer_of(engines, lambda _: items).text == "ab"

        assert items.closed_on not in (None, threading.get_ident())

    @pytest.mark.parametrize("result", ["", None, (), b""], ids=repr)
    def test_nothing(self, engines, result):
        response = answer_of(engines, lambda _: result)

        assert (response.text, response.usage) == ("", Usage(0, 0))

    @pytest.mark.parametrize("result", [5, {"text": "a"}, object(), ValueError("x")], ids=repr)
    def test_garbage_is_refused_by_name(self, engines, result):
        error = error_of(engines(lambda _: result).submit(ask()))

        assert type(error) is EngineError
        assert f"returned {type(result).__name__}" in error.message

    @pytest.mark.parametrize("result", [b"\xff", [b"\xff"]], ids=["returned", "yielded"])
    def test_bytes_that_are_not_utf_8_are_an_error(self, engines, result):
        assert type(error_of(engines(lambda _: result).submit(ask()))) is EngineError

    @pytest.mark.parametrize("result", ["ab", b"ab", InferenceResponse(text="ab")], ids=str)
    def test_text_that_was_emitted_is_not_said_twice(self, engines, result):
        items = []

        def generate(request):
            assert request.stream_callback("a")
            assert request.stream_callback("b")
            return result

        response = answer_of(engines, generate, stream_callback=items.append)

        assert response.text == "ab"
        assert [item for item in items if isinstance(item, str)] == ["a", "b"]

    def test_a_whole_response_is_kept_whole(self, engines):
        choices = (
            Choice(
                text="a",
                reasoning="r",
                tool_calls=(ToolCall("id", "f", "{}"),),
                finish_reason="tool_calls",
            ),
            Choice(index=1, text="b", finish_reason="length"),
        )
        returned = InferenceResponse(choices=choices, usage=Usage(5, 6), cache_hit=True)

        response = answer_of(engines, lambda _: returned, n=2, request_id="mine", model="m")

        assert response.choices == choices
        assert response.text == "a"
        assert response.usage == Usage(5, 6)
        assert response.cache_hit
        assert (response.request_id, response.model) == ("mine", "m")

    def test_timings_are_told(self, engines):
        def generate(request):
            yield "a"

        timings = answer_of(engines, generate).timings

        assert 0 <= timings["queue"] <= timings["first_token"] <= timings["total"]
        assert "first_token" not in answer_of(engines, lambda _: None).timings


class TestYields:
    @pytest.mark.parametrize("item", [None, 5, {"text": "a"}, Reasoning(None)], ids=repr)
    def test_garbage_ends_the_stream(self, engines, item, caplog):
        tokens, closed_on = TokenLog(), []

        def generate(request):
            try:
                yield "a"
                yield item
                yield "never"
            finally:
                closed_on.append(threading.get_ident())

        error = error_of(engines(generate).submit_streaming(ask(), tokens))

        assert type(error) is EngineError
        tokens.wait_for_final()
        assert tokens.calls == [("a", False), ("", True)]
        wait_until(lambda: closed_on)
        assert closed_on == tokens.threads[:1]
        assert "consumer" not in error.message
        assert "callback" not in caplog.text

    def test_what_cannot_be_put_together_is_an_error(self, engines, caplog):
        engine = engines(lambda _: iter([ToolCallDelta(0, arguments=None)]), worker_threads=1)

        for _ in range(2):  # The worker goes on.
            assert type(error_of(engine.submit(ask()))) is EngineError
        assert engine.queue_stats()["total_failed"] == 2
        assert "TypeError" in caplog.text

    @pytest.mark.parametrize("choice", [-1, 1, None])
    def test_a_choice_out_of_range_ends_the_stream(self, engines, choice):
        handle = engines(lambda _: iter([Token("a", choice=choice)])).submit(ask())

        assert type(error_of(handle)) is EngineError

    def test_usage_may_follow_the_finish(self, engines):
        items = [Finish("length"), "ignored", Usage(3, 4)]

        response = answer_of(engines, lambda _: iter(items))

        assert response.usage == Usage(3, 4)
        assert (response.finish_reason, response.text) == ("length", "")

    def test_a_character_may_be_split_between_two_yields(self, engines):
        assert answer_of(engines, lambda _: iter(["€".encode()[:1], "€".encode()[1:]])).text == "€"

    def test_a_backend_without_a_second_choice_is_told_apart(self, engines):
        error = error_of(engines(lambda _: iter("ab")).submit(ask(n=2)))

        assert isinstance(error, InvalidRequestError)
        assert error.param == "n"

    @pytest.mark.parametrize(
        ("fields", "text", "reason"),
        [({"stop": "c"}, "ab", "stop"), ({"max_tokens": 2}, "ab", "length")],
        ids=["stop", "max_tokens"],
    )
    def test_a_generator_is_closed_on_its_worker_once_it_said_enough(
        self, engines, fields, text, reason
    ):
        ran_on = []

        def generate(request):
            ran_on.append(threading.get_ident())
            try:
                yield from "abc"
                raise AssertionError("it was not closed")
            finally:
                ran_on.append(threading.get_ident())

        response = answer_of(engines, generate, **fields)

        assert (response.text, response.finish_reason) == (text, reason)
        assert ran_on == ran_on[:1] * 2

    def test_a_generator_that_fails_as_it_is_closed_has_answered(self, engines, caplog):
        def generate(request):
            try:
                yield "a END"
                raise AssertionError("it was not closed")
            finally:
                raise ValueError("while closing")

        assert answer_of(engines, generate, stop="END").text == "a "
        assert "ValueError: while closing" in caplog.text

    @pytest.mark.parametrize("how", ["cancel", "deadline"])
    def test_a_generator_is_closed_when_it_next_yields_after_the_end(self, engines, how, caplog):
        is_inside, gate, closed_on, ran_on = threading.Event(), threading.Event(), [], []

        def generate(request):
            ran_on.append(threading.get_ident())
            try:
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)
                yield "late"
                raise AssertionError("it was not closed")
            finally:
                closed_on.append(threading.get_ident())
                raise ValueError("told to stop")

        handle = engines(generate).submit(ask(), timeout_seconds=60)
        assert is_inside.wait(5)
        if how == "cancel":
            handle.cancel()
        else:
            pass_deadline(handle)
        error_of(handle)
        assert closed_on == []
        gate.set()

        wait_until(lambda: closed_on)
        assert closed_on == ran_on
        assert handle.text == ""
        assert "told to stop" not in caplog.text  # It was.


class TestGuard:
    def test_tells_the_backend_that_its_request_is_over(self, engines):
        is_inside, gate, seen = threading.Event(), threading.Event(), []

        def generate(request):
            seen.append(request.cancelled)
            is_inside.set()
            assert gate.wait(DEADLINE_SECONDS)
            seen.extend((request.cancelled, request.stream_callback("late")))

        handle = engines(generate).submit(ask())
        assert is_inside.wait(5)
        handle.cancel()
        gate.set()

        wait_until(lambda: len(seen) == 3)
        assert seen == [False, True, False]

    def test_refuses_what_comes_after_the_end(self, engines):
        requests, tokens = [], TokenLog()

        engines(lambda request: requests.append(request) or "a").submit_streaming(
            ask(), tokens
        ).get(5)

        assert requests[0].stream_callback("late") is False
        assert tokens.calls == [("a", False), ("", True)]

    def test_keeps_the_deadline_where_the_clock_is_late(self, engines, monkeypatch):
        now, tokens = [0.0], TokenLog()
        monkeypatch.setattr("flask_llmstream.engines.run.monotonic", lambda: now[0])

        def generate(request):
            yield "a"
            now[0] = float("inf")
            yield "b"

        handle = engines(generate).submit_streaming(ask(), tokens, timeout_seconds=60)

        assert isinstance(error_of(handle), DeadlineExceededError)
        tokens.wait_for_final()
        assert tokens.calls == [("a", False), ("", True)]

    def test_gives_the_backend_a_copy_with_a_deadline_and_an_id(self, engines):
        requests = []
        request = ask(metadata={"a": 1})

        engine = engines(lambda each: requests.append(each) or "a")
        handle = engine.submit(request, timeout_seconds=60, priority=3)
        handle.get(5)

        (seen,) = requests
        assert seen is not request
        assert 0 < seen.deadline.remaining_seconds() <= 60
        assert not seen.deadline.expired
        assert seen.request_id == handle.request_id != ""
        assert seen.priority == 3
        assert seen.metadata == {"a": 1}
        assert not seen.stream
        assert (request.request_id, request.deadline, request.priority) == ("", None, 0)


class TestRaises:
    @pytest.mark.parametrize(
        ("error", "state"),
        [
            (InvalidRequestError("x", param="tools"), State.FAILED),
            (QueueFullError("x", retry_after=3), State.FAILED),
            (EngineClosedError("x"), State.FAILED),
            (ServerShutdownError("x"), State.FAILED),
            (RequestDroppedError("x"), State.FAILED),
            (UpstreamError("x"), State.FAILED),
            (SlowReaderError("x"), State.FAILED),
            (RequestCancelledError("x"), State.CANCELLED),
            (IdleTimeoutError("x"), State.TIMED_OUT),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_our_errors_pass_as_they_are(self, engines, error, state, caplog):
        def generate(request):
            raise error

        engine = engines(generate, worker_threads=1)

        assert error_of(engine.submit(ask())) is error
        assert engine.worker_stats()[f"total_{state.value}"] == 1
        assert not caplog.records

    @pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
    @pytest.mark.parametrize("items", ["", "ab"])
    def test_anything_else_is_logged_and_kept_from_the_caller(self, engines, error, items, caplog):
        def generate(request):
            yield from items
            raise error("secret")

        engine = engines(generate, worker_threads=1)
        for _ in range(2):  # The worker goes on.
            caught = error_of(engine.submit(ask(request_id="rid", model="m")))
            assert type(caught) is EngineError
            assert "secret" not in caught.message
        assert f"{error.__name__}: secret" in caplog.text
        assert "(request rid, model m)" in caplog.text
        assert engine.queue_stats()["total_failed"] == 2

    def test_a_configuration_error_is_logged_and_passes(self, engines, caplog):
        def generate(request):
            raise ConfigurationError("No weights.")

        assert isinstance(error_of(engines(generate).submit(ask())), ConfigurationError)
        assert "No weights." in caplog.text

    def test_what_it_raises_because_it_was_told_to_stop_is_not_logged(self, engines, caplog):
        is_inside, gate = threading.Event(), threading.Event()

        def generate(request):
            is_inside.set()
            assert gate.wait(DEADLINE_SECONDS)
            raise ValueError("stopped")

        engine = engines(generate)
        handle = engine.submit(ask())
        assert is_inside.wait(5)
        handle.cancel()
        gate.set()
        wait_until(lambda: not engine.is_in_backend)

        assert isinstance(error_of(handle), RequestCancelledError)
        assert not caplog.records


class TestConfiguration:
    @pytest.mark.parametrize(
        "options",
        [
            {"worker_threads": 0},
            {"queue_size": -1},
            {"block_timeout_seconds": -0.1},
            {"stuck_seconds": -1},
        ],
        ids=str,
    )
    def test_a_value_out_of_range_is_named(self, options):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            AsyncInferenceEngine(FunctionBackend(str), **options)

    def test_what_is_no_backend_is_refused(self):
        with pytest.raises(ConfigurationError, match="object is no backend"):
            AsyncInferenceEngine(object())

    def test_an_unknown_kind_of_worker_is_refused(self):
        with pytest.raises(ConfigurationError, match="process"):
            AsyncInferenceEngine(FunctionBackend(str, worker="process"))


def test_reasoning_only_is_an_answer(engines):
    response = answer_of(engines, lambda _: iter([Reasoning("thinking")]))

    assert (response.text, response.choices[0].reasoning) == ("", "thinking")
