"""Several requests as one: one answer, one error, one cancel."""

from __future__ import annotations

import random
import threading

import pytest
from concurrency import Background
from engine_fakes import GatedBackend, check_books

from flask_llmstream.core.messages import (
    Choice,
    InferenceRequest,
    InferenceResponse,
    Token,
    ToolCall,
    Usage,
)
from flask_llmstream.engines.gathering import gather
from flask_llmstream.engines.handle import InferenceHandle
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineError,
    RequestCancelledError,
    UpstreamError,
)


class Part:
    """A request that the test plays the engine of."""

    def __init__(self, text="", deaf=False):
        self.reasons = []
        self._claims = [True]
        self._is_deaf = deaf
        self.handle = InferenceHandle("rid", cancel=self.cancel, text=lambda: text)

    def cancel(self, reason):
        self.reasons.append(reason)
        if not self._is_deaf:
            self.end(reason or RequestCancelledError("cancelled"))

    def end(self, outcome):
        try:
            self._claims.pop()
        except IndexError:
            return
        self.handle.publish(outcome)


def gathered(*parts, choices=None):
    return gather([part.handle for part in parts], choices or [1] * len(parts))


def answer(*texts, **fields):
    choices = tuple(Choice(index, text) for index, text in enumerate(texts))
    return InferenceResponse(text=texts[0], choices=choices, **fields)


class TestJoining:
    def test_it_waits_for_the_last_one(self):
        first, second = Part(), Part()
        handle = gathered(first, second)

        second.end(answer("b"))
        assert not handle.ready()
        first.end(answer("a"))

        assert [choice.text for choice in handle.get(0).choices] == ["a", "b"]

    def test_choices_are_numbered_through(self):
        parts = Part(), Part(), Part()
        handle = gathered(*parts, choices=[2, 1, 2])
        for part, texts in zip(parts, (["a", "b"], ["c"], ["d", "e"]), strict=True):
            part.end(answer(*texts))

        choices = handle.get(0).choices
        assert [(choice.index, choice.text) for choice in choices] == list(enumerate("abcde"))

    def test_usage_adds_up(self):
        first, second, third = Part(), Part(), Part()
        handle = gathered(first, second, third)
        first.end(answer("a", usage=Usage(1, 2, 3, 4)))
        second.end(answer("b", usage=Usage(10, 20, 30, 40)))
        third.end(answer("c"))

        assert handle.get(0).usage == Usage(11, 22, 33, 44)

    def test_what_was_never_counted_stays_so(self):
        part = Part()
        handle = gathered(part)
        part.end(answer("a"))

        assert handle.get(0).usage is None

    def test_the_single_choice_fields_are_the_first_one_s(self):
        first, second = Part(), Part()
        handle = gathered(first, second)
        call, token = ToolCall("c", "f", "{}"), Token("a", logprob=-1.0)
        first.end(
            answer(
                "a",
                request_id="rid",
                model="m",
                tool_calls=(call,),
                finish_reason="length",
                logprobs=(token,),
                cache_hit=True,
                timings={"total": 1.0},
            )
        )
        second.end(answer("b", request_id="rid", model="m", cache_hit=False))

        response = handle.get(0)
        assert (handle.request_id, response.request_id, response.model) == ("rid", "rid", "m")
        assert (response.text, response.finish_reason) == ("a", "length")
        assert (response.tool_calls, response.logprobs) == ((call,), (token,))
        assert response.cache_hit is False
        assert response.timings == {}

    def test_the_text_so_far_is_the_first_one_s(self):
        assert gathered(Part("so far"), Part("other")).text == "so far"

    def test_answers_that_are_there_already_are_gathered_at_once(self):
        first, second = Part(), Part()
        first.end(answer("a"))
        second.end(answer("b"))

        assert len(gathered(first, second).get(0).choices) == 2

    def test_what_was_joined_stays_as_it_is(self):
        first, second = Part(), Part()
        handle = gathered(first, second)
        first.end(answer("a"))
        second.end(answer("b"))

        assert second.handle.get(0).choices[0].index == 0
        assert handle.get(0).choices[1].index == 1


class TestFailing:
    def test_the_first_error_ends_the_others_and_is_the_outcome(self):
        parts = Part(), Part(), Part()
        handle = gathered(*parts)
        parts[0].end(answer("a"))

        parts[1].end(UpstreamError("down"))

        with pytest.raises(UpstreamError, match="down"):
            handle.get(0)
        with pytest.raises(RequestCancelledError):
            parts[2].handle.get(0)
        assert parts[0].reasons == []

    def test_it_fails_at_once_though_another_one_is_deaf(self):
        first, second = Part(deaf=True), Part()
        handle = gathered(first, second)

        second.end(EngineError("broken"))

        with pytest.raises(EngineError, match="broken"):
            handle.get(0)
        assert len(first.reasons) == 1
        first.end(answer("late"))
        assert isinstance(handle.outcome, EngineError)

    def test_one_that_failed_before_it_was_gathered_fails_it(self):
        first, second = Part(), Part()
        second.end(UpstreamError("down"))

        handle = gathered(first, second)

        with pytest.raises(UpstreamError):
            handle.get(0)
        assert first.handle.ready()

    def test_the_other_ones_errors_do_not_replace_the_first(self):
        first, second = Part(deaf=True), Part()
        handle = gathered(first, second)
        second.end(UpstreamError("down"))
        first.end(EngineError("broken"))

        assert isinstance(handle.outcome, UpstreamError)


class TestCancelling:
    def test_a_cancel_ends_all_with_its_reason(self):
        first, second = Part(), Part()
        handle = gathered(first, second)
        reason = DeadlineExceededError("late")

        handle.cancel(reason)

        assert handle.outcome is reason
        assert first.reasons == second.reasons == [reason]

    def test_a_cancel_without_a_reason_has_one(self):
        part = Part()
        handle = gathered(part)

        handle.cancel()

        with pytest.raises(RequestCancelledError):
            handle.get(0)
        with pytest.raises(RequestCancelledError):
            part.handle.get(0)

    def test_a_cancel_is_told_at_once_though_one_of_them_is_deaf(self):
        first, second = Part(deaf=True), Part()
        handle = gathered(first, second)

        handle.cancel()

        assert handle.ready()
        assert second.handle.ready()

    def test_a_cancel_after_the_end_changes_nothing(self):
        part = Part()
        handle = gathered(part)
        part.end(answer("a"))

        handle.cancel()

        assert handle.get(0).text == "a"
        assert part.reasons == []

    def test_ended_ones_are_left_alone(self):
        first, second = Part(), Part()
        handle = gathered(first, second)
        first.end(answer("a"))

        handle.cancel()

        assert first.reasons == []
        assert first.handle.get(0).text == "a"


@pytest.mark.parametrize("seed", range(20))
def test_of_many_ends_at_once_one_counts(seed):
    chance = random.Random(seed)
    parts = [Part() for _ in range(8)]
    handle = gathered(*parts)
    resolved = []
    handle.add_done_callback(lambda: resolved.append(handle.outcome))
    ends = [lambda part=part: part.end(answer("a")) for part in parts]
    for extra in chance.sample([handle.cancel, lambda: parts[3].end(EngineError("x"))], seed % 3):
        ends.insert(chance.randrange(len(ends)), extra)
    start = threading.Barrier(len(ends))

    def run(end):
        start.wait(10)
        end()

    for thread in [Background(lambda end=end: run(end)) for end in ends]:
        thread.result()

    assert len(resolved) == 1
    assert handle.outcome is resolved[0]
    assert all(part.handle.ready() for part in parts)
    if isinstance(handle.outcome, InferenceResponse):
        assert len(handle.outcome.choices) == len(parts)
    else:
        assert seed % 3


# With an engine.


def requests(*prompts):
    return [InferenceRequest(prompt=prompt, request_id="rid") for prompt in prompts]


def test_an_engine_s_answers_are_gathered(engines):
    engine = engines(GatedBackend(), worker_threads=2)
    engine.backend.open()
    handles = [engine.submit(request) for request in requests("a", "b", "c")]

    response = gather(handles, [1, 1, 1]).get(10)

    assert [choice.text for choice in response.choices] == ["a!", "b!", "c!"]
    assert response.usage == Usage(0, 3)


def test_a_cancel_leaves_nothing_in_the_engine(engines):
    backend = GatedBackend()
    engine = engines(backend, worker_threads=1)
    handles = [engine.submit(request) for request in requests("a", "b", "c")]
    backend.wait_for("a")

    gather(handles, [1, 1, 1]).cancel()

    stats = engine.queue_stats()
    check_books(stats)
    assert (stats["total_cancelled"], stats["waiting"]) == (3, 0)
