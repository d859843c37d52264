"""Clients that leave while no token flows: the backend is told at once."""

from __future__ import annotations

import pytest

from .asking import ask, on
from .conftest import CONCURRENT_KINDS, KINDS
from .process import Server
from .test_stream import KEEP_ALIVE_KINDS
from .wire import Client

NOTICE_SECONDS = 0.5
"""Allowed here; 50 ms is what is aimed for."""
REPEATS = 10
UNTIL_CANCELLED = ["until_cancelled"]


@pytest.fixture
def told_at_once(server, measure):
    """Check, and note, how soon after a client left its backend knew."""

    def check(what, id, left_at):
        seconds = server.control.wait(id, "cancelled")["at"] - left_at
        measure(f"leave to cancel, {what}", server.kind, seconds)
        assert seconds < NOTICE_SECONDS
        assert server.control.wait(id, "finished")["code"] == "cancelled"

    return check


@on(*KINDS)
@pytest.mark.parametrize("way", [Client.close, Client.reset])
def test_a_client_that_leaves_a_silent_stream(server, told_at_once, way):
    for _ in range(REPEATS):
        with server.client() as client:
            id = ask(client, ["emit", "a"], UNTIL_CANCELLED)
            client.answer().read_until(b'"a"')
            server.control.wait(id, "waiting")
            told_at_once(f"stream, {way.__name__}", id, way(client))


@on(*KINDS)
@pytest.mark.parametrize("way", [Client.close, Client.reset])
@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("before the status line", {}),
        ("document", {"stream": False}),
        ("llm.complete()", {"path": "/complete"}),
    ],
)
def test_a_client_that_leaves_before_the_status_line(server, told_at_once, way, what, more):
    for _ in range(REPEATS // 2):
        with server.client() as client:
            id = ask(client, UNTIL_CANCELLED, **more)
            server.control.wait(id, "waiting")
            left_at = way(client)
            if "path" in more:  # It has no on_finish.
                server.control.wait(id, "cancelled")
                server.control.wait(id, "signalled")
            else:
                told_at_once(f"{what}, {way.__name__}", id, left_at)


@on(*KINDS)
@pytest.mark.parametrize("way", [Client.close, Client.reset])
@pytest.mark.parametrize("accept", ["text/plain", "application/x-ndjson"])
def test_a_client_that_leaves_another_framing(server, told_at_once, way, accept):
    for _ in range(REPEATS // 2):
        with server.client() as client:
            id = ask(client, ["emit", "a"], UNTIL_CANCELLED, headers={"Accept": accept})
            client.answer().read_until(b"a")
            server.control.wait(id, "waiting")
            told_at_once(f"{accept}, {way.__name__}", id, way(client))


@on(*KINDS)
@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
def test_a_half_closed_client_gets_the_rest(server, accept):
    with server.client() as client:
        id = ask(client, ["emit", "a "], ["gate"], ["emit", "b"], headers={"Accept": accept})
        answer = client.answer()
        answer.read_until(b'"a "')
        seen = len(answer.body)
        client.half_close()
        while len(answer.body) == seen:  # The probe, which we are here to read.
            assert answer.read()
        server.control.open_gate(id)
        answer.read_all()
    assert b'"b"' in answer.body
    assert b"error" not in answer.body
    assert answer.ending == "complete"
    assert server.control.wait(id, "finished")["code"] is None


@on(*KINDS)
def test_a_half_closed_client_that_leaves_for_good(server, told_at_once):
    with server.client() as client:
        id = ask(client, ["emit", "a "], UNTIL_CANCELLED)
        answer = client.answer()
        answer.read_until(b'"a "')
        client.half_close()
        answer.read_until(b": ping")
        told_at_once("after a half-close, reset", id, client.reset())


@on(*KINDS)
def test_a_half_close_before_the_status_line_counts_as_gone(server):
    with server.client() as client:
        id = ask(client, UNTIL_CANCELLED)
        server.control.wait(id, "waiting")
        client.half_close()
        answer = client.answer().read_all()
    assert answer.status == 499
    assert answer.json()["error"]["code"] == "cancelled"
    server.control.wait(id, "cancelled")


@on(*CONCURRENT_KINDS)
@pytest.mark.parametrize("way", [Client.close, Client.reset])
def test_a_client_that_leaves_the_queue(server, way):
    with server.client() as first:
        holder = ask(first, ["emit", "a"], ["gate"], model="single")
        first.answer().read_until(b'"a"')
        with server.client() as second:
            id = ask(second, ["emit", "b"], model="single")
            server.control.wait_for_stats("single", waiting=1)
            way(second)
            assert server.control.wait(id, "finished")["code"] == "cancelled"
            server.control.wait_for_stats("single", waiting=0, busy=1)
        server.control.open_gate(holder)
        server.control.wait(holder, "finished")
    assert server.control.events(id, "started") == []


@on(*CONCURRENT_KINDS)
def test_a_client_that_leaves_while_the_queue_is_full(server):
    clients = [server.client() for _ in range(3)]
    with clients[0], clients[1], clients[2]:
        gates = [ask(client, ["gate"], model="full") for client in clients[:1]]
        server.control.wait(gates[0], "started")
        gates.append(ask(clients[1], ["gate"], model="full"))
        server.control.wait_for_stats("full", waiting=1)
        id = ask(clients[2], ["emit", "a"], model="full")
        server.control.wait_for_stats("full", waiting=1, blocked=1)
        clients[2].close()
        # Its place in the queue is taken for it, and left at once.
        server.control.open_gate(gates[0])
        assert server.control.wait(id, "finished")["code"] == "cancelled"
        server.control.wait_for_stats("full", waiting=0, blocked=0, busy=1)
        server.control.open_gate(gates[1])
        server.control.wait(gates[1], "finished")
    assert server.control.events(id, "started") == []


@on(*KEEP_ALIVE_KINDS)
def test_a_client_that_leaves_its_second_stream(server, told_at_once):
    for _ in range(REPEATS // 2):
        with server.client() as client:
            done = ask(client, ["emit", "a"])
            client.answer().read_all()
            id = ask(client, ["emit", "a"], UNTIL_CANCELLED)
            client.answer().read_until(b'"a"')
            server.control.wait(id, "waiting")
            told_at_once("second on a connection", id, client.close())
        assert server.control.events(done, "finished")[0]["code"] is None


@on(*KINDS)
def test_a_client_that_leaves_after_the_end_has_its_whole_answer(server):
    with server.client() as client:
        id = ask(client, ["emit", "a"])
        client.answer().read_until(b"[DONE]")
        client.reset()
    assert server.control.wait(id, "finished")["code"] is None


@on(*KINDS)
@pytest.mark.parametrize("way", [Client.close, Client.reset])
def test_a_client_that_leaves_a_view_of_several_answers(server, told_at_once, way):
    scripts = [
        {"id": "first of two", "steps": [["emit", "a"], UNTIL_CANCELLED]},
        {"id": "second of two", "steps": [["emit", "b"], UNTIL_CANCELLED]},
    ]
    for script in scripts:
        script["id"] += f" {server.kind} {way.__name__}"
    with server.client() as client:
        ask(client, path="/tokens", scripts=scripts)
        client.answer().read_until(b"a")
        for script in scripts:
            server.control.wait(script["id"], "waiting")
        way(client)
        for script in scripts:
            server.control.wait(script["id"], "cancelled")


def test_a_client_that_leaves_a_unix_socket(measure, tmp_path):
    server = Server("gevent", "--bind", f"unix:{tmp_path}/gunicorn.sock")
    try:
        for _ in range(REPEATS // 2):
            with server.client() as client:
                id = ask(client, ["emit", "a"], UNTIL_CANCELLED)
                client.answer().read_until(b'"a"')
                server.control.wait(id, "waiting")
                left_at = client.close()
                seconds = server.control.wait(id, "cancelled")["at"] - left_at
                measure("leave to cancel, Unix socket", "gevent", seconds)
                assert seconds < NOTICE_SECONDS
        with server.client() as client:
            id = ask(client, ["emit", "a "], ["gate"], ["emit", "b"])
            answer = client.answer()
            answer.read_until(b'"a "')
            client.half_close()
            answer.read_until(b": ping")
            server.control.open_gate(id)
            assert answer.read_all().tokens() == "a b"
    finally:
        server.kill()


@on(*KEEP_ALIVE_KINDS)
def test_bytes_sent_ahead_are_no_leave(server):
    with server.client() as client:
        id = ask(client, ["emit", "a"], ["gate"], ["emit", "b"])
        answer = client.answer()
        answer.read_until(b'"a"')
        client.send(b"GET /pi")
        client.send(b"ng HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.control.open_gate(id)
        assert answer.read_all().tokens() == "ab"
        assert client.answer().read_all().text == "pong"
