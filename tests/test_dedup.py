"""Deduplication: what is identical, who shares a run, and what is remembered."""

from __future__ import annotations

import enum
import random
from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from functools import partial
from math import inf

import pytest
from concurrency import Background, wait_until
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.core.deadlines import Deadline
from flask_llmstream.core.messages import (
    Choice,
    InferenceRequest,
    InferenceResponse,
    Message,
    ToolCall,
)
from flask_llmstream.engines import dedup
from flask_llmstream.engines.asynchronous import AsyncInferenceEngine
from flask_llmstream.engines.dedup import Deduplicator, ResponseCache, dedup_key
from flask_llmstream.exceptions import (
    DeadlineExceededError,
    EngineClosedError,
    FirstTokenTimeoutError,
    QueueFullError,
    RequestCancelledError,
    UpstreamError,
)
from flask_llmstream.testing import Gate, ScriptedBackend

# The key.

texts = st.text(max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts,
    lambda children: st.lists(children, max_size=2) | st.dictionaries(texts, children, max_size=2),
    max_leaves=4,
)
objects = st.dictionaries(texts, json_values, max_size=2)
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=texts | st.lists(st.fixed_dictionaries({"type": texts, "text": texts}), max_size=2),
    tool_calls=st.lists(st.builds(ToolCall, id=texts, name=texts, arguments=texts), max_size=2),
    tool_call_id=st.none() | texts,
    name=st.none() | texts,
)
IN_KEY = {
    "prompt": texts,
    "messages": st.lists(messages, max_size=2),
    "model": texts,
    "max_tokens": st.none() | st.integers(1, 9),
    "temperature": st.none() | st.floats(0, 2),
    "top_p": st.none() | st.floats(0.1, 1),
    "top_k": st.none() | st.integers(1, 9),
    "seed": st.none() | st.integers(0, 9),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=2),
    "tools": st.lists(objects, max_size=2),
    "tool_choice": st.none() | texts | objects,
    "response_format": st.none() | objects,
    "n": st.integers(1, 3),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "metadata": objects,
    "extra_body": objects,
    "identity": st.none() | texts | st.integers(0, 9) | st.binary(max_size=3) | objects,
}
NOT_IN_KEY = {
    "request_id": "other",
    "stream": True,
    "stream_callback": bool,
    "deadline": Deadline(1.0),
    "priority": 9,
    "control": object(),
}
CONTEXT = {"run_context"}
requests = st.fixed_dictionaries(IN_KEY).map(lambda values: InferenceRequest(**values))


def canonical(value):
    """What tells two values apart where == does not: 0 and False, 0.0 and -0.0."""
    if isinstance(value, dict):
        return {key: canonical(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(each) for each in value]
    if isinstance(value, Message):
        return [canonical(getattr(value, field.name)) for field in fields(value)]
    return repr(value)


def test_every_field_is_known_to_these_tests():
    names = {field.name for field in fields(InferenceRequest)}
    assert names == IN_KEY.keys() | NOT_IN_KEY.keys() | CONTEXT


@given(requests)
def test_equal_requests_have_equal_keys(request):
    assert dedup_key(request) is not None
    assert dedup_key(replace(request)) == dedup_key(request)


@given(requests, st.data())
def test_a_change_of_any_one_field_changes_the_key(request, data):
    name = data.draw(st.sampled_from(sorted(IN_KEY)))
    value = data.draw(IN_KEY[name])
    changed = replace(request, **{name: value})
    is_same = canonical(getattr(request, name)) == canonical(getattr(changed, name))
    assert (dedup_key(changed) == dedup_key(request)) is is_same


@pytest.mark.parametrize("name", NOT_IN_KEY)
def test_how_and_when_it_is_asked_is_not_in_the_key(name):
    request = InferenceRequest(prompt="x")
    assert dedup_key(replace(request, **{name: NOT_IN_KEY[name]})) == dedup_key(request)


def test_the_order_of_a_mapping_does_not_matter():
    one = InferenceRequest(prompt="x", metadata={"a": 1, "b": {"c": 2, "d": 3}})
    other = InferenceRequest(prompt="x", metadata={"b": {"d": 3, "c": 2}, "a": 1})
    assert dedup_key(one) == dedup_key(other)


def test_a_sequence_is_what_it_holds():
    one = InferenceRequest(messages=[Message("user", "x")], stop=["a"])
    other = InferenceRequest(messages=(Message("user", "x"),), stop="a")
    assert dedup_key(one) == dedup_key(other)


def test_the_context_of_another_app_makes_another_key():
    class App:
        def app_context(self):
            raise NotImplementedError

    one, other = App(), App()
    keys = [
        dedup_key(InferenceRequest(prompt="x", run_context=app.app_context))
        for app in (one, one, other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_identities_of_one_shape_but_of_two_types_differ():
    @dataclass
    class User:
        id: int

    @dataclass
    class Robot:
        id: int

    class Role(enum.Enum):
        FIRST = 1

    identities = [User(1), Robot(1), Role.FIRST, 1, "1", True, None, b"1"]
    keys = {dedup_key(InferenceRequest(prompt="x", identity=each)) for each in identities}
    assert len(keys) == len(identities)


@pytest.mark.parametrize(
    "fields",
    [
        {"identity": object()},
        {"metadata": {"callback": print}},
        {"metadata": {1: "one"}},
        {"prompt": "\ud800"},
        {"seed": 1 << 80},
    ],
)
def test_what_has_no_canonical_form_has_no_key(fields):
    assert dedup_key(InferenceRequest(**{"prompt": "x", **fields})) is None


def test_a_key_is_small_whatever_the_prompt():
    digest, context = dedup_key(InferenceRequest(prompt="x" * 1_000_000))
    assert (len(digest), context) == (32, None)


# The cache.


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(dedup, "monotonic", lambda: now[0])
    return now


def test_the_least_recently_used_answer_is_given_up_first():
    cache = ResponseCache(2, inf)
    for key in "ab":
        cache.put(key, InferenceResponse(text=key))
    assert cache.get("a").text == "a"
    cache.put("c", InferenceResponse(text="c"))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_an_answer_is_good_for_its_time(clock):
    cache = ResponseCache(2, 60)
    cache.put("a", InferenceResponse(text="old"))
    clock[0] += 59.9
    assert cache.get("a").text == "old"
    clock[0] += 0.1
    assert cache.get("a") is None
    assert len(cache) == 0


def test_a_newer_answer_replaces_and_renews(clock):
    cache = ResponseCache(2, 60)
    cache.put("a", InferenceResponse(text="old"))
    clock[0] += 40
    cache.put("a", InferenceResponse(text="new"))
    clock[0] += 40
    assert cache.get("a").text == "new"


def test_a_cache_without_size_keeps_nothing():
    cache = ResponseCache(0, 60)
    cache.put("a", InferenceResponse(text="a"))
    assert cache.get("a") is None


@pytest.mark.parametrize(
    ("reasons", "is_kept"),
    [
        (["stop"], True),
        (["length"], True),
        (["tool_calls"], True),
        (["content_filter"], False),
        (["stop", "content_filter"], False),
    ],
)
def test_only_whole_answers_are_kept(reasons, is_kept):
    choices = tuple(Choice(index, finish_reason=reason) for index, reason in enumerate(reasons))
    cache = ResponseCache(2, 60)
    cache.put("a", InferenceResponse(choices=choices))
    assert (cache.get("a") is not None) is is_kept


@given(st.lists(st.tuples(st.sampled_from("pg"), st.integers(0, 5)), max_size=40))
def test_the_cache_holds_what_a_list_by_use_would(operations):
    cache, model = ResponseCache(3, inf), OrderedDict()
    for number, (operation, key) in enumerate(operations):
        if operation == "p":
            response = InferenceResponse(text=str(number))
            cache.put(key, response)
            model[key] = response
            model.move_to_end(key)
            if len(model) > 3:
                model.popitem(last=False)
        else:
            assert cache.get(key) is model.get(key)
            if key in model:
                model.move_to_end(key)
    assert len(cache) == len(model)


# Sharing a run.


class Shared:
    """A deduplicator over one engine, whose backend plays a script."""

    def __init__(self, *script, size=10, ttl_seconds=60, **options):
        self.backend = ScriptedBackend(*script)
        self.engine = AsyncInferenceEngine(self.backend, **options)
        self.dedup = Deduplicator(size=size, ttl_seconds=ttl_seconds)

    def submit(self, prompt="x", *, priority=0, **fields):
        request = InferenceRequest(prompt=prompt, **fields)
        return self.dedup.submit(self.engine, dedup_key(request), request, priority=priority)

    @property
    def runs(self):
        return len(self.backend.requests)

    @property
    def counts(self):
        return self.dedup.statistics()


@pytest.fixture
def make():
    made = []

    def make(*script, **options):
        made.append(Shared(*script, **options))
        return made[-1]

    yield make
    for shared in made:
        for step in shared.backend.script:
            if isinstance(step, Gate):
                step.open()
        shared.engine.shutdown(timeout_seconds=10)


def test_identical_requests_share_one_run(make):
    gate = Gate()
    shared = make(gate, "answer")
    handles = [shared.submit() for _ in range(3)]
    gate.open()
    responses = [handle.get(10) for handle in handles]
    assert [response.text for response in responses] == ["answer"] * 3
    assert shared.runs == 1
    assert [response.cache_hit for response in responses] == [False, True, True]
    assert (shared.counts["cache_misses"], shared.counts["joined"]) == (1, 2)


def test_each_caller_has_an_answer_of_its_own(make):
    gate = Gate()
    shared = make(gate, "answer")
    handles = [shared.submit(request_id=name) for name in "abc"]
    gate.open()
    responses = [handle.get(10) for handle in handles]
    assert [handle.request_id for handle in handles] == ["a", "b", "c"]
    assert [response.request_id for response in responses] == ["a", "b", "c"]
    responses[0].text = "changed"
    responses[0].timings["total"] = -1
    assert [response.text for response in responses[1:]] == ["answer", "answer"]
    assert all(response.timings["total"] >= 0 for response in responses[1:])
    assert shared.submit().get(10).text == "answer"


def test_different_requests_do_not_share(make):
    gate = Gate()
    shared = make(gate, "answer")
    handles = [shared.submit("a"), shared.submit("b"), shared.submit("a", seed=1)]
    gate.open()
    for handle in handles:
        assert not handle.get(10).cache_hit
    assert shared.runs == 3


def test_a_remembered_answer_needs_no_run(make):
    shared = make("answer")
    first = shared.submit(request_id="first").get(10)
    second = shared.submit(request_id="second")
    assert second.ready()
    assert second.text == "answer"
    response = second.get()
    assert (response.text, response.cache_hit, response.request_id) == ("answer", True, "second")
    assert set(response.timings) == set(first.timings)
    assert set(response.timings.values()) == {0.0}
    assert shared.runs == 1
    assert (shared.counts["cache_hits"], shared.counts["cache_size"]) == (1, 1)
    second.cancel()
    assert second.get() is response


def test_the_timings_of_who_joined_count_from_its_own_submit(make):
    gate = Gate()
    shared = make(gate, "answer")
    first = shared.submit()
    gate.reached.wait()
    second = shared.submit()
    gate.open()
    timings = [handle.get(10).timings for handle in (first, second)]
    assert timings[0]["total"] > timings[1]["total"] > 0
    assert timings[1]["queue"] == 0


def test_text_so_far_is_the_runs(make):
    gate = Gate()
    shared = make("so far", gate)
    handles = [shared.submit(), shared.submit()]
    gate.reached.wait()
    assert [handle.text for handle in handles] == ["so far", "so far"]


def test_without_a_cache_requests_still_share_a_run(make):
    gate = Gate()
    shared = make(gate, "answer", size=0)
    handles = [shared.submit(), shared.submit()]
    gate.open()
    for handle in handles:
        handle.get(10)
    assert shared.runs == 1
    shared.submit().get(10)
    assert shared.runs == 2


def test_an_error_reaches_all_and_is_not_remembered(make):
    gate = Gate()
    shared = make(gate, UpstreamError("down"))
    handles = [shared.submit(), shared.submit()]
    gate.open()
    for handle in handles:
        with pytest.raises(UpstreamError, match="down"):
            handle.get(10)
    shared.backend.script = ("up",)
    assert shared.submit().get(10).text == "up"


def test_a_partial_answer_is_not_remembered(make):
    shared = make("half of it", UpstreamError("down"))
    with pytest.raises(UpstreamError):
        shared.submit().get(10)
    assert shared.counts["cache_size"] == 0


# Leaving.


def test_one_who_cancels_does_not_stop_the_others(make):
    gate = Gate()
    shared = make(gate, "answer")
    first, second = shared.submit(), shared.submit()
    gate.reached.wait()
    first.cancel()
    with pytest.raises(RequestCancelledError):
        first.get(0)
    gate.open()
    assert second.get(10).text == "answer"
    assert shared.engine.worker_stats()["total_cancelled"] == 0


def test_the_run_is_cancelled_when_the_last_one_leaves(make):
    gate = Gate()
    shared = make(gate, "answer")
    handles = [shared.submit() for _ in range(3)]
    gate.reached.wait()
    for handle in handles:
        assert not shared.backend.requests[0].cancelled
        handle.cancel()
    assert shared.backend.requests[0].cancelled
    assert shared.engine.worker_stats()["total_cancelled"] == 1
    assert (shared.counts["in_flight"], shared.counts["cache_size"]) == (0, 0)


def test_the_run_ends_for_the_last_ones_reason(make):
    shared = make(Gate())
    handle = shared.submit()
    handle.cancel(FirstTokenTimeoutError("Too late."))
    with pytest.raises(FirstTokenTimeoutError):
        handle.get(0)
    assert shared.engine.worker_stats()["total_timed_out"] == 1


def test_after_the_last_one_left_a_new_run_starts(make):
    gate = Gate()
    shared = make(gate, "answer", worker_threads=2)
    shared.submit().cancel()
    handle = shared.submit()
    gate.open()
    assert handle.get(10).text == "answer"
    assert not handle.get().cache_hit


def test_a_deadline_ends_its_own_caller_only(make):
    gate = Gate()
    shared = make(gate, "answer")
    hurried = shared.submit(deadline=Deadline.after(0.05))
    patient = shared.submit(deadline=Deadline.after(60))
    with pytest.raises(DeadlineExceededError):
        hurried.get(10)
    assert not patient.ready()
    assert shared.backend.requests[0].deadline is None
    gate.open()
    assert patient.get(10).text == "answer"


def test_the_last_deadline_ends_the_run(make):
    gate = Gate()
    shared = make(gate, "answer")
    handles = [shared.submit(deadline=Deadline.after(0.05)) for _ in range(2)]
    for handle in handles:
        with pytest.raises(DeadlineExceededError):
            handle.get(10)
    wait_until(lambda: shared.engine.worker_stats()["total_timed_out"] == 1)


def test_a_get_that_times_out_does_not_leave(make):
    gate = Gate()
    shared = make(gate, "answer")
    handle = shared.submit()
    with pytest.raises(TimeoutError):
        handle.get(0.01)
    gate.open()
    assert handle.get(10).text == "answer"


def test_a_deadline_that_had_passed_is_refused(make):
    shared = make("answer")
    shared.submit().get(10)
    with pytest.raises(DeadlineExceededError):
        shared.submit(deadline=Deadline.after(0))


def test_a_request_id_ends_all_who_have_it(make):
    shared = make(Gate())
    handles = [shared.submit(request_id=name) for name in "aab"]
    assert shared.dedup.cancel("a")
    assert [handle.ready() for handle in handles] == [True, True, False]
    assert not shared.dedup.cancel("a")


def test_the_runs_own_id_is_nobodys(make):
    gate = Gate()
    shared = make(gate)
    shared.submit(request_id="a")
    gate.reached.wait()
    assert shared.backend.requests[0].request_id.startswith("a.")
    assert not shared.engine.cancel("a")


def test_what_ended_is_cancelled_no_more(make):
    shared = make("answer")
    handle = shared.submit(request_id="a")
    response = handle.get(10)
    assert not shared.dedup.cancel("a")
    handle.cancel()
    assert handle.get() is response


def test_a_finalizer_inside_the_lock_may_cancel(make, monkeypatch):
    monkeypatch.setattr(dedup, "FINALIZER_WAIT_SECONDS", 0.001)
    gate = Gate()
    shared = make(gate)
    handle = shared.submit()
    gate.reached.wait()
    with shared.dedup._lock:
        handle.cancel()
        assert handle.ready()
    wait_until(lambda: shared.backend.requests[0].cancelled)
    wait_until(lambda: shared.counts["in_flight"] == 0)


def test_one_of_two_may_leave_from_a_finalizer_inside_the_lock(make, monkeypatch):
    monkeypatch.setattr(dedup, "FINALIZER_WAIT_SECONDS", 0.001)
    gate = Gate()
    shared = make(gate, "answer")
    first, second = shared.submit(request_id="a"), shared.submit(request_id="b")
    with shared.dedup._lock:
        first.cancel()
    wait_until(lambda: not shared.dedup.cancel("a"))
    gate.open()
    assert second.get(10).text == "answer"


# Priorities.


def occupied(make, **options):
    """One worker, busy with another request: what comes next waits."""
    gate = Gate()
    shared = make(gate, "answer", worker_threads=1, **options)
    shared.submit("first")
    gate.reached.wait()
    return shared, gate


def order_of(shared, gate, handles):
    gate.open()
    for handle in handles:
        handle.get(10)
    return [request.prompt for request in shared.backend.requests[1:]]


def test_a_joiner_with_a_higher_priority_raises_the_runs(make):
    shared, gate = occupied(make)
    handles = [shared.submit("a"), shared.submit("b"), shared.submit("b", priority=1)]
    assert order_of(shared, gate, handles) == ["b", "a"]


def test_a_joiner_with_a_lower_priority_does_not_lower_it(make):
    shared, gate = occupied(make)
    handles = [shared.submit("a"), shared.submit("b", priority=1), shared.submit("b", priority=-1)]
    assert order_of(shared, gate, handles) == ["b", "a"]


def test_a_waiting_request_can_be_given_another_priority(make):
    shared, gate = occupied(make)
    handles = [shared.submit("a"), shared.submit("b", request_id="b")]
    assert shared.dedup.reprioritize("b", 1)
    assert order_of(shared, gate, handles) == ["b", "a"]


def test_the_highest_of_all_who_wait_counts(make):
    shared, gate = occupied(make)
    handles = [
        shared.submit("a", priority=1),
        shared.submit("b", request_id="b", priority=2),
        shared.submit("b", priority=3),
    ]
    assert shared.dedup.reprioritize("b", 0)
    assert order_of(shared, gate, handles) == ["b", "a"]


def test_what_runs_or_is_unknown_is_not_moved(make):
    gate = Gate()
    shared = make(gate)
    shared.submit(request_id="a")
    gate.reached.wait()
    assert not shared.dedup.reprioritize("a", 1)
    assert not shared.dedup.reprioritize("b", 1)


def test_a_priority_that_was_overtaken_is_set_again(make):
    shared, gate = occupied(make)
    handle = shared.submit("b", request_id="b")
    flight = shared.dedup._flights[dedup_key(InferenceRequest(prompt="b"))]
    set_priorities = []

    class Overtaking:
        def reprioritize(self, request_id, priority):
            set_priorities.append(priority)
            flight.priority = 9  # Another caller, just now.
            return True

    flight.engine = Overtaking()
    shared.dedup.reprioritize("b", 1)
    assert set_priorities == [1, 9]
    gate.open()
    handle.get(10)


# Clearing.


def test_clear_forgets_what_is_remembered(make):
    shared = make("answer")
    shared.submit().get(10)
    shared.dedup.clear()
    assert not shared.submit().get(10).cache_hit
    assert shared.runs == 2


def test_clear_leaves_what_runs_to_who_waits_for_it(make):
    gate = Gate()
    shared = make(gate, "answer", worker_threads=2)
    before = shared.submit()
    gate.reached.wait()
    shared.dedup.clear()
    after = shared.submit()
    wait_until(lambda: shared.runs == 2)
    gate.open()
    assert [handle.get(10).cache_hit for handle in (before, after)] == [False, False]


def test_clear_keeps_what_ran_before_from_being_remembered(make):
    gate = Gate()
    shared = make(gate, "answer")
    handle = shared.submit()
    shared.dedup.clear()
    gate.open()
    handle.get(10)
    assert shared.counts["cache_size"] == 0


def test_who_is_the_last_to_leave_a_cleared_run_cancels_it(make):
    gate = Gate()
    shared = make(gate)
    handle = shared.submit()
    gate.reached.wait()
    shared.dedup.clear()
    handle.cancel()
    assert shared.backend.requests[0].cancelled


def test_a_forked_child_starts_empty(make):
    shared = make("answer")
    shared.submit().get(10)
    shared.dedup._after_fork()
    assert set(shared.counts.values()) == {0}


# A full queue.


def full(make, **options):
    """No place: the worker is busy, and nobody may wait."""
    return occupied(make, queue_size=0, **options)


def submit_blocked(shared, **fields):
    blocked = shared.engine.queue_stats()["blocked"]
    submitting = Background(partial(shared.submit, "x", **fields))
    wait_until(lambda: shared.engine.queue_stats()["blocked"] == blocked + 1)
    return submitting


def submit_behind(shared, **fields):
    """A caller of what another one is just submitting."""
    flight = shared.dedup._flights[dedup_key(InferenceRequest(prompt="x"))]
    waiting = len(flight.parkers)
    submitting = Background(partial(shared.submit, "x", **fields))
    wait_until(lambda: len(flight.parkers) == waiting + 1)
    return submitting


def test_who_comes_while_the_first_is_held_up_joins_when_there_is_a_place(make):
    shared, gate = full(make)
    submitting = [submit_blocked(shared), submit_behind(shared), submit_behind(shared)]
    gate.open()
    responses = [each.result().get(10) for each in submitting]
    assert [response.cache_hit for response in responses] == [False, True, True]
    assert shared.runs == 2


def test_a_full_queue_refuses_each_by_its_own_deadline(make):
    shared, gate = full(make)
    first = submit_blocked(shared, deadline=Deadline.after(0.05))
    second = submit_behind(shared, deadline=Deadline.after(60))
    with pytest.raises(QueueFullError):
        first.result()
    gate.open()
    assert not second.result().get(10).cache_hit
    assert shared.counts["in_flight"] == 0


def test_who_waits_behind_the_first_is_refused_at_its_own_deadline(make):
    shared, gate = full(make)
    first = submit_blocked(shared)
    second = submit_behind(shared, deadline=Deadline.after(0.05))
    with pytest.raises(QueueFullError):
        second.result()
    gate.open()
    assert first.result().get(10).text == "answer"


def test_a_closing_engine_refuses_all_who_are_held_up(make):
    shared, _gate = full(make)
    submitting = [submit_blocked(shared), submit_behind(shared), submit_behind(shared)]
    shared.engine.refuse(EngineClosedError("Closed."))
    for each in submitting:
        with pytest.raises(EngineClosedError):
            each.result()
    assert shared.counts["in_flight"] == 1  # The worker's.


def test_on_the_hub_it_runs_on_its_own_rather_than_wait(make, monkeypatch):
    shared, gate = full(make)
    first = submit_blocked(shared)

    class HubParker:
        def park(self, until):
            raise RuntimeError("Cannot wait on the gevent hub.")

        def unpark(self):
            pass

    monkeypatch.setattr(dedup.runtime, "make_parker", HubParker)
    with pytest.raises(QueueFullError):
        shared.submit()
    monkeypatch.undo()
    gate.open()
    assert first.result().get(10).text == "answer"


# Races.


@pytest.mark.parametrize("seed", range(5))
def test_many_threads_run_it_once(make, seed):
    gate = Gate()
    shared = make(gate, "answer", worker_threads=4)
    threads = [Background(shared.submit) for _ in range(20)]
    handles = [thread.result() for thread in threads]
    random.Random(seed).shuffle(handles)
    leaving, staying = handles[:13], handles[13:]
    threads = [Background(handle.cancel) for handle in leaving]
    gate.open()
    for thread in threads:
        thread.result()
    assert [handle.get(10).text for handle in staying] == ["answer"] * 7
    assert shared.runs == 1
    for handle in leaving:
        try:
            assert handle.get(0).text == "answer"
        except RequestCancelledError:
            pass


@pytest.mark.parametrize("seed", range(5))
def test_in_whatever_order_they_come_and_leave_nothing_is_left_behind(make, seed):
    rng = random.Random(seed)
    shared = make("answer", size=2, ttl_seconds=0.001, worker_threads=3, queue_size=2)
    orders = [[rng.random() for _ in range(30)] for _ in range(8)]

    def work(order):
        for chance in order:
            try:
                handle = shared.submit(
                    rng.choice("abcd"),
                    deadline=Deadline.after(10 if chance < 0.8 else 0.001),
                    priority=int(chance * 10) % 3,
                )
                if int(chance * 100) % 3 == 0:
                    handle.cancel()
                assert handle.get(10).text == "answer"
            except (RequestCancelledError, DeadlineExceededError, QueueFullError):
                pass

    for thread in [Background(partial(work, order)) for order in orders]:
        thread.result(30)
    assert shared.engine.wait_for_completion(10)
    assert shared.counts["in_flight"] == 0
    assert not shared.dedup._waiters
    stats = shared.engine.queue_stats()
    assert stats["waiting"] == stats["running"] == stats["blocked"] == 0
