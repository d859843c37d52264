"""What a stream's consumer is called with, how often, and on which thread."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
from concurrency import DEADLINE_SECONDS, Background, wait_until
from engine_fakes import GatedBackend, TokenLog, ask, error_of, fill, pass_deadline, submit_blocked

from flask_llmstream.core.messages import (
    Finish,
    InferenceResponse,
    Reasoning,
    Token,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    RequestCancelledError,
    RequestDroppedError,
    SlowReaderError,
)


class SteppedBackend:
    """Emits a token whenever the test says so; deaf to what `stream_callback` answers."""

    def __init__(self):
        self.is_inside = threading.Event()
        self.answers = []
        self.threads = []
        self._steps = threading.Semaphore(0)
        self._is_over = False

    def generate(self, request):
        self.threads.append(threading.get_ident())
        self.is_inside.set()
        while True:
            assert self._steps.acquire(timeout=DEADLINE_SECONDS)
            if self._is_over:
                return
            self.answers.append(request.stream_callback("x"))

    def step(self):
        """Emit once; returns what the guard answered."""
        assert self.is_inside.wait(DEADLINE_SECONDS)
        count = len(self.answers)
        self._steps.release()
        wait_until(lambda: len(self.answers) > count)
        return self.answers[-1]

    def finish(self):
        self._is_over = True
        self._steps.release()


class TestTokenCallback:
    def test_gets_each_token_and_then_the_end_once(self, engines):
        tokens = TokenLog()
        engine = engines(lambda request: iter("abc"))

        assert engine.submit_streaming(ask(), tokens).get(5).text == "abc"

        assert tokens.calls == [("a", False), ("b", False), ("c", False), ("", True)]

    def test_runs_on_the_producing_worker(self, engines):
        tokens, producers = TokenLog(), []

        def generate(request):
            producers.append(threading.get_ident())
            yield from "ab"

        engines(generate).submit_streaming(ask(), tokens).get(5)

        assert set(tokens.threads) == set(producers)
        assert threading.get_ident() not in producers

    def test_gets_answer_text_of_choice_0_only(self, engines):
        tokens = TokenLog()

        def generate(request):
            yield Reasoning("hmm")
            yield Token("a", logprob=-0.5)
            yield Token("other", choice=1)
            yield ToolCallDelta(0, name="f", arguments="{}")
            yield "€".encode()[:2]
            yield "€".encode()[2:]
            yield Finish("stop")
            yield Usage(1, 2)

        engines(generate).submit_streaming(ask(n=2), tokens).get(5)

        assert tokens.calls == [("a", False), ("€", False), ("", True)]

    def test_gets_what_was_held_back_before_the_end(self, engines):
        tokens = TokenLog()

        def generate(request):
            yield "so EN"

        engines(generate).submit_streaming(ask(stop=["END"]), tokens).get(5)

        assert tokens.calls == [("so ", False), ("EN", False), ("", True)]

    @pytest.mark.parametrize("tokens_before", [0, 2])
    def test_gets_the_end_once_where_the_backend_fails(self, engines, tokens_before):
        tokens, producers = TokenLog(), []

        def generate(request):
            producers.append(threading.get_ident())
            yield from "ab"[:tokens_before]
            raise ValueError("broken")

        error = error_of(engines(generate).submit_streaming(ask(), tokens))

        assert type(error) is EngineError
        assert tokens.text == "ab"[:tokens_before]
        assert tokens.finals == 1
        assert tokens.calls[-1] == ("", True)
        assert set(tokens.threads) == set(producers)

    @pytest.mark.parametrize("how", ["cancel", "deadline"])
    def test_gets_the_end_when_a_deaf_backend_next_returns_to_the_guard(self, engines, how):
        tokens, backend = TokenLog(), SteppedBackend()
        engine = engines(backend)
        handle = engine.submit_streaming(ask(), tokens, timeout_seconds=60)
        assert backend.is_inside.wait(5)
        if how == "cancel":
            handle.cancel()
        else:
            pass_deadline(handle)
        error = error_of(handle)

        assert isinstance(
            error, RequestCancelledError if how == "cancel" else DeadlineExceededError
        )
        assert tokens.calls == []  # The backend is still inside: it has to come back first.
        assert backend.step() is False
        assert tokens.calls == [("", True)]
        assert tokens.threads == backend.threads
        assert backend.step() is False
        backend.finish()
        engine.wait_for_completion(5)
        wait_until(lambda: not engine.is_in_backend)
        assert tokens.calls == [("", True)]

    def test_gets_the_end_when_a_backend_that_never_came_back_ends(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend)
        handle = engine.submit_streaming(ask("a"), tokens)
        backend.wait_for("a")
        handle.cancel()
        assert handle.ready()
        assert tokens.calls == []

        backend.open("a")
        tokens.wait_for_final()

        assert tokens.calls == [("", True)]

    def test_gets_the_end_where_a_waiting_request_is_cancelled(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        handle = engine.submit_streaming(ask("a"), tokens)

        handle.cancel()

        assert tokens.calls == [("", True)]
        assert tokens.threads == [threading.get_ident()]
        assert isinstance(error_of(handle), RequestCancelledError)

    def test_gets_the_end_where_a_waiting_request_meets_its_deadline(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        handle = engine.submit_streaming(ask("a"), tokens, timeout_seconds=0.05)

        assert isinstance(error_of(handle), DeadlineExceededError)
        tokens.wait_for_final()

        assert tokens.calls == [("", True)]
        assert threading.get_ident() not in tokens.threads

    def test_a_slow_end_of_a_waiting_request_holds_up_no_deadline(self, engines):
        backend, gate = GatedBackend(), threading.Event()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)
        slow = engine.submit_streaming(
            ask("a"), lambda *call: gate.wait(DEADLINE_SECONDS), timeout_seconds=0.05
        )
        other = engine.submit(ask("b"), timeout_seconds=0.1)

        assert isinstance(error_of(slow), DeadlineExceededError)
        assert isinstance(error_of(other), DeadlineExceededError)
        gate.set()

    def test_gets_the_end_on_the_thread_whose_submit_dropped_the_request(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=1, backpressure="drop_oldest")
        fill(engine, backend)
        handle = engine.submit_streaming(ask("a"), tokens)

        engine.submit(ask("b"))

        assert tokens.calls == [("", True)]
        assert tokens.threads == [threading.get_ident()]
        assert isinstance(error_of(handle), RequestDroppedError)

    def test_gets_nothing_where_submit_refuses(self, engines):
        tokens, backend = TokenLog(), GatedBackend()
        engine = engines(backend, worker_threads=1, queue_size=0)
        fill(engine, backend)

        with pytest.raises(QueueFullError):
            engine.submit_streaming(ask("blocked"), tokens, timeout_seconds=0.05)
        with pytest.raises(DeadlineExceededError):
            engine.submit_streaming(ask("late"), tokens, timeout_seconds=0)
        blocked = submit_blocked(engine, ask("c"))
        engine.shutdown(timeout_seconds=0)
        with pytest.raises(EngineClosedError):
            blocked.result()

        assert tokens.calls == []

    def test_may_cancel_its_own_stream(self, engines):
        tokens, handles, has_handle = TokenLog(), [], threading.Event()

        def on_token(token, is_final):
            tokens(token, is_final)
            assert has_handle.wait(5)
            handles[0].cancel()

        engine = engines(lambda request: iter("abc"))
        handles.append(engine.submit_streaming(ask(), on_token))
        has_handle.set()

        assert isinstance(error_of(handles[0]), RequestCancelledError)
        tokens.wait_for_final()
        assert tokens.calls == [("a", False), ("", True)]

    @pytest.mark.parametrize("stop", [(), ("END",)])
    def test_that_raises_ends_the_stream(self, engines, caplog, stop):
        finals = []

        def on_token(token, is_final):
            if not is_final:
                raise ValueError("mine")
            finals.append(token)

        # With the stop string the text is held back, and comes as the stream ends.
        handle = engines(lambda request: "E").submit_streaming(ask(stop=stop), on_token)
        error = error_of(handle)

        assert type(error) is EngineError
        assert "consumer" in error.message
        wait_until(lambda: finals)
        assert finals == [""]
        assert "The stream callback failed" in caplog.text
        assert "ValueError: mine" in caplog.text

    def test_that_raises_one_of_our_errors_ends_the_stream_with_it(self, engines):
        mine = SlowReaderError("mine")

        def on_token(token, is_final):
            if not is_final:
                raise mine

        assert error_of(engines(lambda _: "a").submit_streaming(ask(), on_token)) is mine

    @pytest.mark.parametrize("error", [ValueError, SystemExit])
    def test_that_raises_at_the_end_spoils_neither_answer_nor_worker(self, engines, error, caplog):
        def on_token(token, is_final):
            if is_final:
                raise error("mine")

        engine = engines(lambda request: "a", worker_threads=1)

        assert engine.submit_streaming(ask(), on_token).get(5).text == "a"
        assert engine.submit(ask()).get(5).text == "a"
        assert "The token callback failed at the end" in caplog.text

    @pytest.mark.parametrize("ends_at_deadline", [True, False])
    def test_that_raises_at_the_end_of_a_waiting_request_is_logged(
        self, engines, caplog, ends_at_deadline
    ):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)

        def on_token(token, is_final):
            raise ValueError("mine")

        handle = engine.submit_streaming(
            ask(), on_token, timeout_seconds=0.05 if ends_at_deadline else None
        )
        if not ends_at_deadline:
            handle.cancel()
        error_of(handle)

        wait_until(lambda: "The token callback failed at the end" in caplog.text)

    @pytest.mark.parametrize("how", ["cancel", "deadline"])
    def test_that_never_returns_from_the_end_does_not_keep_the_handle(self, engines, how):
        is_inside, gate = threading.Event(), threading.Event()

        def on_token(token, is_final):
            if is_final:
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)

        engine = engines(lambda request: "a", worker_threads=1, stuck_seconds=0)
        handle = engine.submit_streaming(ask(), on_token, timeout_seconds=60)
        assert is_inside.wait(5)
        assert not handle.ready()
        if how == "cancel":
            handle.cancel()
        else:
            pass_deadline(handle)

        assert isinstance(
            error_of(handle, 0),
            RequestCancelledError if how == "cancel" else DeadlineExceededError,
        )
        assert engine.submit(ask()).get(5).text == "a"  # On another worker.
        gate.set()

    def test_is_stopped_on_a_users_thread_by_what_stops_that_thread(self, engines):
        backend = GatedBackend()
        engine = engines(backend, worker_threads=1)
        fill(engine, backend)

        def on_token(token, is_final):
            raise KeyboardInterrupt

        handle = engine.submit_streaming(ask(), on_token)

        with pytest.raises(KeyboardInterrupt):
            handle.cancel()

        assert isinstance(error_of(handle, 5), RequestCancelledError)


class TestTwoProducers:
    def test_at_once_end_the_stream(self, engines):
        tokens, is_inside, gate = TokenLog(), threading.Event(), threading.Event()

        def on_token(token, is_final):
            if not is_final:
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)
            tokens(token, is_final)

        def generate(request):
            first = Background(lambda: request.stream_callback("a"))
            assert is_inside.wait(5)
            assert request.stream_callback("b") is False
            assert request.cancelled
            gate.set()
            assert first.result() is False

        error = error_of(engines(generate).submit_streaming(ask(), on_token))

        assert type(error) is EngineError
        assert "two threads" in error.message
        tokens.wait_for_final()
        assert tokens.calls == [("a", False), ("", True)]

    @pytest.mark.parametrize("stop", [(), ("END",)])
    def test_of_which_one_outlives_the_backend_do_not_overtake_the_end(self, engines, stop):
        tokens, is_inside, gate = TokenLog(), threading.Event(), threading.Event()
        emitters = []

        def on_token(token, is_final):
            if not is_final:
                is_inside.set()
                assert gate.wait(DEADLINE_SECONDS)
            tokens(token, is_final)

        def generate(request):
            emitters.append(Background(lambda: request.stream_callback("a")))
            assert is_inside.wait(5)

        handle = engines(generate).submit_streaming(ask(stop=stop), on_token)

        assert "two threads" in error_of(handle).message
        assert tokens.calls == []
        gate.set()
        assert emitters[0].result() is False
        assert tokens.calls == [("a", False), ("", True)]


class TestStreamCallback:
    def test_gets_every_item_and_makes_the_request_a_stream(self, engines):
        items, seen = [], []
        answer = [Reasoning("r"), "a", Token("b", logprob=-1.0), Finish("length"), Usage(3, 2)]

        def generate(request):
            seen.append(request)
            return iter(answer)

        request = ask(stream_callback=items.append)
        response = engines(generate).submit(request).get(5)

        assert items == answer
        assert (response.text, response.finish_reason) == ("ab", "length")
        assert response.usage == Usage(3, 2)
        assert seen[0].stream
        assert seen[0].stream_callback != items.append
        assert request == ask(stream_callback=items.append)
        assert request.stream is False

    def test_that_returns_false_cancels(self, engines):
        items, is_closed = [], threading.Event()

        def generate(request):
            try:
                while True:
                    yield "a"
            finally:
                is_closed.set()

        def on_item(item):
            items.append(item)
            return False

        engine = engines(generate)
        error = error_of(engine.submit(ask(stream_callback=on_item)))

        assert isinstance(error, RequestCancelledError)
        assert is_closed.wait(5)
        assert items == ["a"]
        assert engine.queue_stats()["total_cancelled"] == 1

    @pytest.mark.parametrize("answer", [None, True, 0, ""])
    def test_that_returns_anything_else_goes_on(self, engines, answer):
        engine = engines(lambda request: iter("ab"))

        assert engine.submit(ask(stream_callback=lambda _: answer)).get(5).text == "ab"

    def test_that_raises_ends_the_stream(self, engines, caplog):
        def on_item(item):
            raise ValueError("mine")

        error = error_of(engines(lambda _: "a").submit(ask(stream_callback=on_item)))

        assert type(error) is EngineError
        assert "ValueError: mine" in caplog.text

    def test_may_go_with_a_token_callback(self, engines):
        items, tokens = [], TokenLog()
        engine = engines(lambda request: iter("ab"))

        engine.submit_streaming(ask(stream_callback=items.append), tokens).get(5)

        assert items == ["a", "b"]
        assert tokens.calls == [("a", False), ("b", False), ("", True)]

    def test_that_stops_on_the_last_words_cancels(self, engines):
        tokens = TokenLog()
        engine = engines(lambda request: iter(("E",)))
        request = ask(stop=["END"], stream_callback=lambda item: False)

        assert isinstance(error_of(engine.submit_streaming(request, tokens)), RequestCancelledError)
        tokens.wait_for_final()
        assert tokens.calls == [("", True)]


class TestContext:
    """`run_context`, which the extension sets to the app's."""

    def context(self, log, *, fails_to=None):
        @contextmanager
        def run_context():
            if fails_to == "enter":
                raise ValueError("enter")
            log.append(("enter", threading.get_ident()))
            try:
                yield
            except BaseException as error:
                log.append((type(error).__name__, threading.get_ident()))
                raise
            else:
                log.append(("exit", threading.get_ident()))
            if fails_to == "exit":
                raise ValueError("exit")

        return run_context

    def steps(self, log):
        return [step for step, _ in log]

    def test_holds_the_backend_and_the_callbacks_to_the_last(self, engines):
        log = []

        def on_token(token, is_final):
            log.append((token or "final", threading.get_ident()))

        def generate(request):
            log.append(("generate", threading.get_ident()))
            yield "a"

        request = ask(run_context=self.context(log))
        engines(generate).submit_streaming(request, on_token).get(5)

        assert self.steps(log) == ["enter", "generate", "a", "final", "exit"]
        assert len({thread for _, thread in log}) == 1
        assert threading.get_ident() not in dict(log).values()

    def test_sees_what_the_backend_raised(self, engines):
        log = []

        def generate(request):
            raise ValueError("broken")

        handle = engines(generate).submit_streaming(
            ask(run_context=self.context(log)), lambda *_: log.append(("final", 0))
        )

        assert type(error_of(handle)) is EngineError
        assert self.steps(log) == ["enter", "final", "ValueError"]

    @pytest.mark.parametrize("when", ["enter", "exit"])
    def test_that_fails_is_the_runs_failure(self, engines, caplog, when):
        tokens, log = TokenLog(), []
        request = ask(run_context=self.context(log, fails_to=when))
        engine = engines(lambda _: "a", worker_threads=1)

        error = error_of(engine.submit_streaming(request, tokens))

        assert type(error) is EngineError
        assert f"ValueError: {when}" in caplog.text
        assert tokens.text == ("a" if when == "exit" else "")
        assert tokens.finals == 1
        assert engine.submit(ask()).get(5).text == "a"

    def test_whose_exit_fails_does_not_hide_what_the_backend_raised(self, engines, caplog):
        @contextmanager
        def run_context():
            try:
                yield
            finally:
                raise ValueError("exit")

        def generate(request):
            raise SlowReaderError("first")

        error = error_of(engines(generate).submit(ask(run_context=run_context)))

        assert isinstance(error, SlowReaderError)


def test_the_text_so_far_can_be_read(engines):
    backend = SteppedBackend()
    handle = engines(backend).submit(ask())
    assert handle.text == ""

    backend.step()
    backend.step()

    assert handle.text == "xx"
    backend.finish()
    assert isinstance(handle.get(5), InferenceResponse)
