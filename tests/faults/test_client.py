"""Clients that leave, stall or dawdle, at every moment of an answer."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic, sleep

import pytest
from server.asking import EMIT_AND_WAIT, ask
from server.test_slow_body import LENGTH, begin
from server.test_slow_reader import FLOOD
from server.wire import Client

from .conftest import size
from .report import watching, what_was_seen

UNTIL_CANCELLED = ["until_cancelled"]
WAYS = pytest.mark.parametrize("way", [Client.close, Client.reset], ids=["FIN", "RST"])
NAMES = {Client.close: "FIN", Client.reset: "RST"}


@WAYS
def test_a_client_that_leaves_in_mid_stream(server, way):
    with watching(f"client: {NAMES[way]} in mid-stream", server) as fault:
        for _ in range(size(2, 20)):
            with server.client() as client:
                id = ask(client, *EMIT_AND_WAIT)
                answer = client.answer()
                answer.read_until(b'"a "')
                server.control.wait(id, "waiting")
                fault.told(id, way(client))
                fault.saw = what_was_seen(answer)
                assert server.control.wait(id, "finished")["code"] == "cancelled"


@WAYS
def test_a_client_that_leaves_before_the_first_token(server, way):
    with watching(f"client: {NAMES[way]} before the first token", server) as fault:
        for _ in range(size(2, 20)):
            with server.client() as client:
                id = ask(client, UNTIL_CANCELLED)
                server.control.wait(id, "waiting")
                fault.told(id, way(client))
                fault.saw = "nothing, left"
                assert server.control.wait(id, "finished")["code"] == "cancelled"


@WAYS
def test_a_client_that_leaves_the_queue(server, way):
    with watching(f"client: {NAMES[way]} in the queue", server) as fault:
        with server.client() as first:
            holder = ask(first, ["emit", "a"], ["gate"], model="single")
            server.control.wait(holder, "started")
            for _ in range(size(2, 20)):
                with server.client() as second:
                    id = ask(second, ["emit", "b"], model="single")
                    server.control.wait_for_stats("single", waiting=1)
                    # Its backend never hears of it; its place in the queue is free.
                    fault.told(id, way(second), "finished")
                    server.control.wait_for_stats("single", waiting=0, busy=1)
                assert server.control.events(id, "started") == []
            server.control.open_gate(holder)
            assert first.answer().read_all().tokens() == "a"
        fault.saw = "nothing, left"


@WAYS
def test_a_client_that_leaves_between_the_marker_and_the_close(server, way):
    with watching(f"client: {NAMES[way]} between [DONE] and the close", server) as fault:
        for _ in range(size(3, 50)):
            with server.client() as client:
                id = ask(client, ["emit", "a"])
                answer = client.answer()
                answer.read_until(b"[DONE]")
                way(client)
            # It has its whole answer: nobody was cancelled.
            assert server.control.wait(id, "finished")["code"] is None
        fault.saw = what_was_seen(answer)


def test_a_client_that_half_closes_and_reads_on(server):
    with watching("client: half-close, reads on", server) as fault:
        with server.client() as client:
            id = ask(client, ["emit", "a "], ["gate"], ["emit", "b"])
            answer = client.answer()
            answer.read_until(b'"a "')
            client.half_close()
            answer.read_until(b": ping")
            server.control.open_gate(id)
            assert answer.read_all().tokens() == "a b"
        assert server.control.wait(id, "finished")["code"] is None
        fault.saw = what_was_seen(answer)


def test_a_client_that_stalls_for_ever(server):
    with watching("client: does not read", server) as fault:
        with server.client(receive_buffer=4096) as client:
            id = ask(client, FLOOD, settings={"slow_reader_seconds": 0.5})
            assert server.control.wait(id, "finished")["code"] == "slow_reader"
            server.control.wait(id, "closed")
            answer = client.answer().read_all()
            fault.saw = f"cut ({answer.ending})"
            assert answer.ending in ("eof", "reset")
        assert server.control.progress(id) * FLOOD[2] < 16 * 1024 * 1024


def test_a_client_that_reads_a_byte_a_second(server):
    with watching("client: reads 1 byte a second", server) as fault:
        with server.client(receive_buffer=4096) as client:
            asked_at = monotonic()
            id = ask(client, FLOOD, settings={"slow_reader_seconds": 1.5})
            for _ in range(8):
                client._socket.recv(1)
                if server.control.events(id, "finished"):
                    break
                sleep(1.0)
            finished = server.control.wait(id, "finished")
            assert finished["code"] == "slow_reader"
            assert finished["at"] - asked_at < 6
            server.control.wait(id, "closed")
        fault.saw = "cut"


def test_connections_that_are_dropped_at_random_moments(server):
    count = size(100, 1000)
    chance = random.Random(20)
    moments = [(chance.randrange(6), chance.random(), chance.random() < 0.5) for _ in range(count)]
    with watching(f"client: {count} connections dropped at random moments", server) as fault:
        before = server.control.look()["stats"]["total"]["accepted"]
        with ThreadPoolExecutor(32) as pool:
            asked = sum(pool.map(lambda moment: _drop(server, *moment), moments))
        fault.saw = f"{count} left, {asked} of them had asked"
    accepted = server.control.look()["stats"]["total"]["accepted"] - before
    assert 0 < accepted <= asked


def _drop(server, stage, wait, is_reset):
    """Leave in one of the stages of a request; whether it had been asked for."""
    with server.client() as client:
        if stage == 1:
            client.send(b"POST /stream HTTP/1.1\r\nHost: loc")
        elif stage == 2:
            client.send(b"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        elif stage > 2:
            ask(client, model="batching", prompt="any")
        if stage > 3:
            answer = client.answer()
            until = wait * 2000
            while len(answer.raw) < until and answer.read():
                pass
        sleep(wait * 0.02)
        (client.reset if is_reset else client.close)()
    return stage > 2


def test_bodies_that_do_not_come(server):
    count = size(10, 60)
    with watching(f"client: {count} bodies that never come", server) as fault, ExitStack() as stack:
        slow = [stack.enter_context(server.client()) for _ in range(count)]
        for client in slow:
            begin(client, LENGTH, budget_seconds=1.0)
        # They hold no slot, and others are served beside them.
        with server.client() as client:
            ask(client, ["emit", "a"], model="single")
            assert client.answer().read_all().tokens() == "a"
        assert server.control.look()["slots"] == 0
        for client in slow:
            answer = client.answer().read_all()
            assert answer.status == 504
        fault.saw = what_was_seen(answer)
