"""Where responses are kept: for their owner, for a while, and not without bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.stores import KeptResponse, ResponseStore, Turn

ALICE, BOB = b"alice", b"bob"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_store(**limits):
    limits = {"max_responses": 10, "max_bytes": 100_000, "keep_seconds": 60, **limits}
    return ResponseStore(**limits)


def response(id, *turns, owner=ALICE, document=b"{}"):
    return KeptResponse(id, owner, document, turns or (Turn(b"[]"),))


def test_a_response_is_kept_for_its_owner_alone():
    store = make_store()
    kept = response("a")
    store.put(kept)

    assert store.get("a", ALICE) is kept
    assert store.get("a", BOB) is None
    assert store.get("b", ALICE) is None


def test_only_its_owner_deletes_a_response():
    store = make_store()
    store.put(response("a"))

    assert not store.delete("a", BOB)
    assert store.delete("a", ALICE)
    assert store.get("a", ALICE) is None
    assert not store.delete("a", ALICE)
    assert store.bytes_held == 0


def test_the_oldest_make_room_for_a_new_one():
    store = make_store(max_responses=2)
    for id in "abc":
        store.put(response(id))

    assert [id for id in "abc" if store.get(id, ALICE)] == ["b", "c"]


def test_what_was_asked_for_lately_stays():
    store = make_store(max_responses=2)
    store.put(response("a"))
    store.put(response("b"))
    store.get("a", ALICE)
    store.put(response("c"))

    assert [id for id in "abc" if store.get(id, ALICE)] == ["a", "c"]


def test_the_oldest_make_room_for_many_bytes():
    store = make_store(max_bytes=10_000)
    for id in "abc":
        store.put(response(id, Turn(b"x" * 4000)))

    assert [id for id in "abc" if store.get(id, ALICE)] == ["c"]
    assert store.bytes_held <= 10_000


def test_what_is_larger_than_the_store_is_not_kept():
    store = make_store(max_bytes=10_000)
    store.put(response("a", document=b"x" * 20_000))

    assert (len(store), store.bytes_held) == (0, 0)


def test_nothing_is_kept_where_there_is_no_room_at_all():
    store = make_store(max_responses=0)
    store.put(response("a"))

    assert store.get("a", ALICE) is None


def test_a_response_is_forgotten_some_time_after_it_was_last_asked_for():
    clock = Clock()
    store = make_store(clock=clock, keep_seconds=60)
    for id in "abc":
        store.put(response(id))
    clock.now += 59
    assert store.get("b", ALICE)
    assert not store.get("c", BOB)
    clock.now += 1

    assert [id for id in "abc" if store.get(id, ALICE)] == ["b"]
    clock.now += 60
    assert not store.delete("b", ALICE)
    assert store.bytes_held == 0


def test_the_latest_word_on_a_response_counts():
    store = make_store()
    store.put(response("a", document=b"1"))
    held = store.bytes_held
    store.put(response("a", document=b"2"))

    assert store.get("a", ALICE).document == b"2"
    assert (len(store), store.bytes_held) == (1, held)


def test_a_turn_that_conversations_share_counts_once():
    store = make_store()
    first = Turn(b"x" * 4000)
    store.put(response("a", first))
    held = store.bytes_held
    store.put(response("b", first, Turn(b"y")))
    store.put(response("c", first, Turn(b"z")))
    assert store.bytes_held < held + 4000

    store.delete("a", ALICE)
    assert store.get("b", ALICE).turns[0] is first
    assert store.bytes_held > 4000
    store.delete("b", ALICE)
    store.delete("c", ALICE)
    assert store.bytes_held == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz"), st.booleans())))
def test_its_bytes_are_those_of_what_it_holds(steps):
    store = make_store(max_responses=3)
    turns = {name: Turn(name.encode() * 100) for name in "wxyz"}
    for id, name, is_put in steps:
        if is_put:
            store.put(response(id, turns["w"], turns[name]))
        else:
            store.delete(id, ALICE)

    kept = [each for id in "abcd" if (each := store.get(id, ALICE))]
    held = {turn for each in kept for turn in each.turns}
    assert len(kept) == len(store) <= 3
    assert store.bytes_held == len(kept) * (1024 + 2) + 100 * len(held)
    assert not any(turn.uses for turn in turns.values() if turn not in held)


@pytest.mark.parametrize("size", [0, 5])
def test_a_document_s_bytes_count(size):
    store = make_store()
    store.put(response("a", document=b"x" * size))

    assert store.bytes_held == 1024 + size + 2
