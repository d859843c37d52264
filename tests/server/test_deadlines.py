"""Deadlines while the backend is stuck, and heartbeats while it is silent."""

from __future__ import annotations

import json
from time import monotonic

import pytest

from .asking import ask, new_id, on
from .conftest import CONCURRENT_KINDS, KINDS

OVERSHOOT_SECONDS = 0.5
"""Allowed here; 50 ms is what is aimed for."""
STUCK = ["gate"]
"""Blocks the worker's native thread, whatever anybody says, until the test opens it."""


@pytest.fixture
def in_time(server, measure):
    """Check, and note, how long after its budget an answer came."""

    def check(what, asked_at, budget_seconds, came_at):
        overshoot = came_at - asked_at - budget_seconds
        measure(f"overshoot, {what}", server.kind, overshoot)
        assert -0.01 < overshoot < OVERSHOOT_SECONDS

    return check


def assert_backend_was_told(server, id):
    """Let the backend come back: it finds `request.cancelled` true."""
    server.control.open_gate(id)
    assert server.control.wait(id, "closed")["cancelled"] is True


@on(*KINDS)
@pytest.mark.parametrize(
    ("headers", "more", "code"),
    [
        ({"X-Request-Timeout": "0.2"}, {}, "deadline_exceeded"),
        ({"X-Stainless-Timeout": "0.2"}, {}, "deadline_exceeded"),
        ({}, {"settings": {"deadline_seconds": 0.2}}, "deadline_exceeded"),
        ({}, {"settings": {"first_token_seconds": 0.2}}, "first_token_timeout"),
        ({"X-Stainless-Read-Timeout": "0.2"}, {}, "first_token_timeout"),
        ({"X-Litellm-Stream-Timeout": "0.2"}, {}, "first_token_timeout"),
        (
            {"X-Request-Timeout": "0.2"},
            {"settings": {"heartbeat_seconds": 0}},
            "deadline_exceeded",
        ),
        ({"X-Request-Timeout": "0.2"}, {"stream": False}, "deadline_exceeded"),
        ({"X-Stainless-Read-Timeout": "0.2"}, {"stream": False}, "deadline_exceeded"),
    ],
)
def test_a_deadline_before_the_first_token_is_a_504(server, in_time, headers, more, code):
    with server.client() as client:
        asked_at = monotonic()
        id = ask(client, STUCK, headers=headers, **more)
        answer = client.answer()
        in_time("before a token", asked_at, 0.2, answer.at)
        answer.read_all()
    assert (answer.status, answer.json()["error"]["code"]) == (504, code)
    assert answer.headers["x-should-retry"] == "false"
    assert_backend_was_told(server, id)


@on(*KINDS)
@pytest.mark.parametrize(
    ("headers", "settings", "code"),
    [
        ({"X-Request-Timeout": "0.3"}, {}, "deadline_exceeded"),
        ({"X-Stainless-Read-Timeout": "0.3"}, {}, "idle_timeout"),
        ({}, {"idle_seconds": 0.3}, "idle_timeout"),
        ({}, {"idle_seconds": 0.3, "heartbeat_seconds": 0.05}, "idle_timeout"),
    ],
)
def test_a_deadline_after_a_token_is_in_band(server, in_time, headers, settings, code):
    with server.client() as client:
        asked_at = monotonic()
        id = ask(client, ["emit", "a"], STUCK, headers=headers, settings=settings)
        answer = client.answer()
        came_at = answer.read_until(b"error")
        in_time("between tokens", asked_at, 0.3, came_at)
        answer.read_all()
    assert answer.status == 200
    assert answer.objects()[-1]["error"]["code"] == code
    assert "[DONE]" not in answer.events()
    assert answer.ending == "complete"
    assert_backend_was_told(server, id)


@on(*KINDS)
def test_a_first_token_timeout_after_a_heartbeat_is_in_band(server, in_time):
    settings = {"heartbeat_seconds": 0.05, "first_token_seconds": 0.3}
    with server.client() as client:
        asked_at = monotonic()
        id = ask(client, STUCK, settings=settings)
        answer = client.answer()
        in_time("first heartbeat", asked_at, 0.05, answer.at)
        assert answer.status == 200
        in_time("before a token", asked_at, 0.3, answer.read_until(b"error"))
        answer.read_all()
    assert answer.body.startswith(b": ping\n\n: ping\n\n")
    assert answer.objects()[-1]["error"]["code"] == "first_token_timeout"
    assert_backend_was_told(server, id)


@on(*KINDS)
def test_a_plain_text_stream_past_its_deadline_is_cut_off(server, in_time):
    with server.client() as client:
        asked_at = monotonic()
        headers = {"Accept": "text/plain", "X-Request-Timeout": "0.3"}
        id = ask(client, ["emit", "a"], STUCK, headers=headers)
        answer = client.answer().read_all()
        in_time("plain text", asked_at, 0.3, monotonic())
    assert (answer.body, answer.ending) == (b"a", "eof")
    assert_backend_was_told(server, id)


@on(*KINDS)
def test_a_blueprint_s_deadline(server, in_time):
    id = new_id()
    script = {"id": id, "steps": [STUCK]}
    body = json.dumps(
        {
            "model": "thread",
            "stream": True,
            "messages": [{"role": "user", "content": json.dumps(script)}],
        }
    ).encode()
    with server.client() as client:
        asked_at = monotonic()
        client.ask("POST", "/hurried/v1/chat/completions", body=body)
        answer = client.answer()
        in_time("before a token", asked_at, 0.3, answer.at)
        answer.read_all()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert_backend_was_told(server, id)


@on(*KINDS)
def test_a_backend_that_sleeps_is_waited_for_no_longer(server, in_time):
    with server.client() as client:
        asked_at = monotonic()
        id = ask(client, ["stuck", 0.5], headers={"X-Request-Timeout": "0.2"})
        answer = client.answer()
        in_time("before a token", asked_at, 0.2, answer.at)
        assert answer.read_all().status == 504
    assert server.control.wait(id, "closed")["cancelled"] is True


@on(*CONCURRENT_KINDS)
def test_the_time_in_the_queue_counts(server, in_time):
    with server.client() as first, server.client() as second:
        holder = ask(first, ["emit", "a"], ["gate"], model="single")
        first.answer().read_until(b'"a"')
        asked_at = monotonic()
        id = ask(second, ["emit", "b"], model="single", headers={"X-Request-Timeout": "0.2"})
        answer = second.answer()
        in_time("in the queue", asked_at, 0.2, answer.at)
        assert answer.read_all().status == 504
        server.control.open_gate(holder)
        server.control.wait(holder, "finished")
    assert server.control.events(id, "started") == []


@on(*KINDS)
def test_a_client_cannot_lengthen_its_wait_for_a_token(server, in_time):
    with server.client() as client:
        asked_at = monotonic()
        headers = {"X-Stainless-Read-Timeout": "600", "X-Request-Timeout": "600"}
        id = ask(client, STUCK, headers=headers, settings={"first_token_seconds": 0.2})
        answer = client.answer()
        in_time("before a token", asked_at, 0.2, answer.at)
        assert answer.read_all().status == 504
    assert_backend_was_told(server, id)


@on(*KINDS)
@pytest.mark.parametrize(
    ("accept", "is_heartbeat"),
    [
        ("text/event-stream", lambda line: line == ": ping"),
        ("application/x-ndjson", lambda line: line and json.loads(line)["token"] == ""),
    ],
)
def test_heartbeats_come_before_and_between_tokens(server, accept, is_heartbeat):
    with server.client() as client:
        id = ask(
            client,
            ["gate"],
            ["emit", "a"],
            ["gate"],
            ["emit", "b"],
            headers={"Accept": accept},
            settings={"heartbeat_seconds": 0.05},
        )
        answer = client.answer()

        def read_two_heartbeats(seen):
            while sum(map(is_heartbeat, answer.text.splitlines())) < seen + 2:
                assert answer.read()
            return sum(map(is_heartbeat, answer.text.splitlines()))

        seen = read_two_heartbeats(0)
        server.control.open_gate(id, 0)
        answer.read_until(b'"a"')
        read_two_heartbeats(seen)
        server.control.open_gate(id, 1)
        answer.read_all()
    lines = [line for line in answer.text.splitlines() if line and not is_heartbeat(line)]
    objects = [json.loads(line.removeprefix("data: ")) for line in lines if "DONE" not in line]
    assert [event["token"] for event in objects if not event["done"]] == ["a", "b"]


@on(*KINDS)
def test_plain_text_has_no_heartbeat(server):
    with server.client() as client:
        steps = (["stuck", 0.2], ["emit", "a"], ["stuck", 0.2], ["emit", "b"])
        ask(client, *steps, headers={"Accept": "text/plain"}, settings={"heartbeat_seconds": 0.05})
        answer = client.answer().read_all()
    assert [piece for piece, _ in answer.pieces] == [b"a", b"b"]


@on(*KINDS)
def test_a_document_has_no_heartbeat(server):
    with server.client() as client:
        steps = (["stuck", 0.2], ["emit", "a"])
        ask(client, *steps, stream=False, settings={"heartbeat_seconds": 0.05})
        answer = client.answer().read_all()
    assert answer.status == 200
    assert answer.json()["text"] == "a"
    assert answer.body.startswith(b"{")
