"""Counting what each caller has under way."""

import threading
from dataclasses import dataclass

import pytest
from concurrency import Background
from interleaving import Once, interleave

from flask_llmstream.engines import callers as callers_module
from flask_llmstream.engines.callers import Callers, caller_of
from flask_llmstream.exceptions import ConfigurationError, TooManyRequestsError

ALICE, BOB = caller_of("alice"), caller_of("bob")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(callers_module, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def callers():
    return Callers()


def free_places(callers, caller, limit):
    """How many more *caller* may have; they are given back."""
    places = []
    try:
        while len(places) <= limit:
            places.append(callers.enter(caller, limit=limit))
    except TooManyRequestsError:
        pass
    for place in places:
        place.give_back()
    return len(places)


def is_empty(callers):
    """Nothing is left of those that are over."""
    return not (callers._places or callers._returned)


# Who a caller is.


def test_nobody_is_not_counted():
    assert caller_of(None) is None


def test_the_same_identity_is_the_same_caller_and_no_other_one():
    @dataclass
    class User:
        id: int

    identities = ["alice", "bob", 1, "1", ("alice", 1), {"sub": "alice"}, User(1)]
    assert len({caller_of(each) for each in identities}) == len(identities)
    assert caller_of({"a": 1, "b": 2}) == caller_of({"b": 2, "a": 1})


def test_who_cannot_be_told_from_others_is_a_mistake_that_says_so():
    with pytest.raises(ConfigurationError, match="Have the identity_loader return an id"):
        caller_of(object())


# Entering and leaving.


def test_each_caller_has_the_limit_for_itself(callers):
    places = [callers.enter(ALICE, limit=2) for _ in range(2)]
    with pytest.raises(TooManyRequestsError, match="You have 2 requests under way"):
        callers.enter(ALICE, limit=2)
    assert free_places(callers, BOB, 2) == 2
    places[0].give_back()
    assert free_places(callers, ALICE, 2) == 1


def test_a_place_is_given_back_once(callers):
    first, _ = (callers.enter(ALICE, limit=2) for _ in range(2))
    first.give_back()
    first.give_back()
    assert free_places(callers, ALICE, 2) == 1


def test_a_limit_may_differ_from_route_to_route(callers):
    for _ in range(3):
        callers.enter(ALICE, limit=3)
    for limit in (1, 3):
        with pytest.raises(TooManyRequestsError):
            callers.enter(ALICE, limit=limit)
    callers.enter(ALICE, limit=4)


def test_nothing_is_left_of_callers_that_are_gone(callers):
    for number in range(1000):
        callers.enter(caller_of(f"caller {number}"), limit=1).give_back()
    assert is_empty(callers)


def test_a_refusal_leaves_nothing_behind(callers):
    place = callers.enter(ALICE, limit=1)
    for _ in range(10):
        with pytest.raises(TooManyRequestsError):
            callers.enter(ALICE, limit=1)
    place.give_back()
    assert is_empty(callers)


def test_a_forked_child_starts_with_nobody(callers):
    place = callers.enter(ALICE, limit=1)
    callers._after_fork()
    mine = callers.enter(ALICE, limit=1)
    place.give_back()  # The parent's: it is none of this process.
    with pytest.raises(TooManyRequestsError):
        callers.enter(ALICE, limit=1)
    mine.give_back()
    assert free_places(callers, ALICE, 1) == 1


# When to come back.


def refusal(callers, limit):
    with pytest.raises(TooManyRequestsError) as caught:
        callers.enter(ALICE, limit=limit)
    return caught.value.retry_after


def test_before_anything_ended_it_is_a_second(callers, clock):
    callers.enter(ALICE, limit=1)
    clock.now += 100
    assert refusal(callers, 1) == 1


def test_it_is_when_the_oldest_of_its_own_will_be_over(callers, clock):
    bob = callers.enter(BOB, limit=1)
    clock.now += 20
    bob.give_back()
    callers.enter(ALICE, limit=2)
    clock.now += 5
    callers.enter(ALICE, limit=2)
    assert refusal(callers, 2) == 15
    clock.now += 12
    assert refusal(callers, 2) == 3
    clock.now += 12
    assert refusal(callers, 2) == 1  # It takes longer than others: any moment now.


def test_it_is_a_minute_at_the_most(callers, clock):
    place = callers.enter(BOB, limit=1)
    clock.now += 1e6
    place.give_back()
    callers.enter(ALICE, limit=1)
    assert refusal(callers, 1) == 60


# At once.


def test_a_finalizer_may_give_back_inside_of_the_lock(callers):
    place = callers.enter(ALICE, limit=1)
    with callers._lock:
        place.give_back()
    assert free_places(callers, ALICE, 1) == 1
    assert is_empty(callers)


MODULE = callers_module.__file__


def test_entering_and_giving_back_may_meet_at_any_point():
    """Another thread's whole return, in the middle of an `enter`."""

    def prepare():
        callers = Callers()
        first = callers.enter(ALICE, limit=1)
        entered = []

        def act():
            try:
                entered.append(callers.enter(ALICE, limit=1))
            except TooManyRequestsError:
                pass

        give_back = Once(first.give_back)

        def check():
            give_back()
            assert free_places(callers, ALICE, 1) == 1 - len(entered)
            for place in entered:
                place.give_back()
            assert free_places(callers, ALICE, 1) == 1
            assert is_empty(callers)

        return act, give_back, check

    interleave(prepare, MODULE)


def test_two_may_give_back_at_once_at_any_point():
    def prepare():
        callers = Callers()
        first, second = (callers.enter(ALICE, limit=2) for _ in range(2))
        give_back = Once(second.give_back)

        def check():
            give_back()
            assert free_places(callers, ALICE, 2) == 2
            assert is_empty(callers)

        return first.give_back, give_back, check

    interleave(prepare, MODULE)


def test_one_place_may_be_given_back_twice_at_once_at_any_point():
    def prepare():
        callers = Callers()
        first = callers.enter(ALICE, limit=2)
        callers.enter(ALICE, limit=2)
        give_back = Once(first.give_back)

        def check():
            give_back()
            assert free_places(callers, ALICE, 2) == 1

        return first.give_back, give_back, check

    interleave(prepare, MODULE)


def test_the_limit_holds_and_nothing_is_lost_among_threads(callers):
    limit, under_way, most, lock = 3, 0, 0, threading.Lock()
    start = threading.Barrier(8)

    def come_and_go():
        nonlocal under_way, most
        start.wait(5)
        entered = 0
        for _ in range(400):
            try:
                place = callers.enter(ALICE, limit=limit)
            except TooManyRequestsError:
                continue
            with lock:
                under_way += 1
                most = max(most, under_way)
            entered += 1
            with lock:
                under_way -= 1
            place.give_back()
        return entered

    threads = [Background(come_and_go) for _ in range(8)]
    assert sum(thread.result() for thread in threads) > 0
    assert 1 <= most <= limit
    assert free_places(callers, ALICE, limit) == limit
    assert is_empty(callers)
