"""Where events are kept: what a store promises, and how the one in memory stays bounded."""

from dataclasses import dataclass

import pytest
from concurrency import wait_until

from flask_llmstream.stores import MemoryStore, owner_of


@pytest.fixture
def store():
    return MemoryStore(max_bytes=10_000)


def test_records_come_back_in_order(store):
    assert store.append("s", 0, [b"owner"])
    assert store.append("s", 1, [b"a", b"b"])

    assert store.read_after("s", -1) == [b"owner", b"a", b"b"]
    assert store.read_after("s", 1) == [b"b"]
    assert store.read_after("s", 2) == []
    assert store.read_after("other", -1) is None


def test_a_record_goes_in_at_its_own_position_or_not_at_all(store):
    store.append("s", 0, [b"owner"])

    assert not store.append("s", 2, [b"b"])
    assert not store.append("s", 0, [b"owner"])
    assert not store.append("new", 1, [b"a"])
    assert store.read_after("s", -1) == [b"owner"]


def test_the_streams_that_rested_longest_make_room(store):
    for stream in ("old", "rested", "busy"):
        store.append(stream, 0, [b"x" * 2000])
    store.append("old", 1, [b"x" * 1000])
    store.append("busy", 1, [b"x" * 2500])

    assert store.read_after("rested", -1) is None
    assert store.read_after("old", 0) == [b"x" * 1000]
    assert store.read_after("busy", 0) == [b"x" * 2500]
    assert store.bytes_held <= 10_000
    assert not store.append("rested", 1, [b"y"])


def test_a_stream_that_is_too_large_alone_is_not_kept(store):
    store.append("s", 0, [b"owner"])

    assert not store.append("s", 1, [b"x" * 10_000])
    assert store.read_after("s", -1) is None
    assert store.bytes_held == 0


def test_a_stream_expires(store):
    store.append("s", 0, [b"owner"])
    store.append("t", 0, [b"owner"])
    store.expire("s", 0)
    store.expire("gone", 0)

    wait_until(lambda: store.read_after("s", -1) is None)
    assert store.read_after("t", -1) == [b"owner"]


def test_the_last_word_about_expiry_counts(store):
    store.append("s", 0, [b"owner"])
    store.append("t", 0, [b"owner"])
    store.expire("s", 0.05)
    store.expire("s", 60)
    store.expire("t", 0.1)

    wait_until(lambda: store.read_after("t", -1) is None)
    assert store.read_after("s", -1) == [b"owner"]


def test_a_new_stream_of_an_old_id_does_not_expire_with_it(store):
    store.append("s", 0, [b"x" * 4000])
    store.expire("s", 0.05)
    store.append("t", 0, [b"x" * 4000])
    store.append("u", 0, [b"x" * 4000])
    store.append("s", 0, [b"new"])
    store.append("v", 0, [b"owner"])
    store.expire("v", 0.1)

    wait_until(lambda: store.read_after("v", -1) is None)
    assert store.read_after("s", -1) == [b"new"]


@dataclass
class Person:
    id: int


@dataclass
class Robot:
    id: int


class Opaque:
    pass


def test_an_owner_is_the_same_in_every_process_and_nobody_else():
    identities = [None, "1", 1, True, b"1", {"id": 1}, {"id": 2}, Person(1), Person(2), Robot(1)]
    owners = [owner_of(identity) for identity in identities]

    assert None not in owners
    assert len(set(owners)) == len(identities)
    assert owner_of({"a": 1, "b": 2}) == owner_of({"b": 2, "a": 1})
    assert owner_of(Opaque()) is None


class WatchedRecord(bytes):
    """One that tells when it is gone; bytes cannot be referred to weakly."""

    freed = 0

    def __del__(self):
        WatchedRecord.freed += 1


def test_what_made_room_is_gone_and_not_only_forgotten(store):
    store.append("s", 0, [WatchedRecord(b"x" * 4000)])
    store.expire("s", 60)
    for stream in ("t", "u"):
        store.append(stream, 0, [b"x" * 4000])
    assert store.read_after("s", -1) is None

    wait_until(lambda: WatchedRecord.freed)
