"""The priority queue and the service rate, on their own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.engines.admission import BackpressurePolicy, PriorityQueue, ServiceRate


@dataclass(eq=False)
class Waiting:
    """All that the queue knows of a run."""

    priority: int = 0


def drain(queue):
    return [queue.pop() for _ in range(len(queue))]


class TestPriorityQueue:
    def test_an_empty_one_has_nothing(self):
        queue = PriorityQueue()

        assert len(queue) == 0
        assert (queue.pop(), queue.peek(), queue.oldest_of_lowest()) == (None, None, None)
        assert queue.remove(Waiting()) is False

    def test_higher_is_sooner_and_equals_are_first_come_first_served(self):
        queue = PriorityQueue()
        runs = [Waiting(priority) for priority in (0, 5, -1, 5, 0)]
        for run in runs:
            queue.push(run)

        assert drain(queue) == [runs[1], runs[3], runs[0], runs[4], runs[2]]

    def test_peek_leaves_it_in_its_place(self):
        queue = PriorityQueue()
        run = Waiting()
        queue.push(run)

        assert queue.peek() is run
        assert drain(queue) == [run]

    def test_the_oldest_of_the_lowest_stays_in(self):
        queue = PriorityQueue()
        high, first, second = Waiting(1), Waiting(0), Waiting(0)
        for run in (high, first, second):
            queue.push(run)

        assert queue.oldest_of_lowest() is first
        assert len(queue) == 3

    def test_removes_from_the_middle_once(self):
        queue = PriorityQueue()
        runs = [Waiting() for _ in range(3)]
        for run in runs:
            queue.push(run)

        assert queue.remove(runs[1]) is True
        assert queue.remove(runs[1]) is False
        assert drain(queue) == [runs[0], runs[2]]

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("push"), st.integers(-3, 3)),
                st.tuples(st.sampled_from(["pop", "drop", "peek"]), st.just(0)),
                st.tuples(st.just("remove"), st.integers(0, 50)),
            )
        )
    )
    def test_does_as_a_sorted_list_would(self, steps):
        queue, model, pushed = PriorityQueue(), [], []
        for step, number in steps:
            if step == "push":
                run = Waiting(number)
                pushed.append(run)
                queue.push(run)
                model.append(run)
                model.sort(key=lambda each: -each.priority)  # Stable: equals keep their order.
            elif step == "pop":
                assert queue.pop() is (model.pop(0) if model else None)
            elif step == "peek":
                assert queue.peek() is (model[0] if model else None)
            elif step == "drop":
                lowest = [run for run in model if run.priority == model[-1].priority]
                assert queue.oldest_of_lowest() is (lowest[0] if lowest else None)
            elif pushed:
                run = pushed[number % len(pushed)]
                assert queue.remove(run) is (run in model)
                model = [each for each in model if each is not run]
            assert len(queue) == len(model)
            assert bool(queue) is bool(model)
        assert drain(queue) == model


class TestServiceRate:
    def test_says_a_second_before_it_has_measured(self):
        assert ServiceRate().seconds_to_drain(100, 1) == 1.0

    @pytest.mark.parametrize(
        ("waiting", "workers", "seconds"),
        [
            (0, 1, 4.0),
            (1, 1, 8.0),
            (3, 4, 4.0),
            (0, 100, 1.0),  # No sooner than a second, no later than a minute.
            (1000, 1, 60.0),
        ],
    )
    def test_tells_when_the_queue_will_have_started(self, waiting, workers, seconds):
        rate = ServiceRate()
        rate.add(4.0)

        assert rate.seconds_to_drain(waiting, workers) == seconds

    def test_follows_a_change_slowly(self):
        rate = ServiceRate()
        rate.add(10.0)
        rate.add(20.0)

        assert rate.seconds_to_drain(0, 1) == pytest.approx(12.0)


def test_the_policies_are_named_by_their_settings():
    assert [policy.value for policy in BackpressurePolicy] == ["block", "drop_oldest", "reject"]
