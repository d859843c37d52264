"""Clients whose request's body comes late, or never."""

from __future__ import annotations

import json
from time import monotonic

import pytest

from .asking import new_id, on
from .conftest import KINDS
from .test_deadlines import OVERSHOOT_SECONDS

BUDGET_SECONDS = 0.5
LENGTH = "Content-Length: 1000"
CHUNKED = "Transfer-Encoding: chunked"


def begin(client, how, *headers, budget_seconds=BUDGET_SECONDS):
    """Send the head of a request, and nothing of its body."""
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", how, *headers]
    lines += [f"X-Request-Timeout: {budget_seconds:g}", "", ""]
    client.send("\r\n".join(lines).encode())
    return monotonic()


@on(*KINDS)
@pytest.mark.parametrize(
    ("how", "part"),
    [
        (LENGTH, b""),
        (LENGTH, b'{"model": "thread"'),
        (CHUNKED, b""),
        (CHUNKED, b'12\r\n{"model": "thread"\r\n'),
        (CHUNKED, b'12\r\n{"model"'),
    ],
)
def test_a_body_that_does_not_come_ends_with_its_budget(server, how, part):
    with server.client() as client:
        asked_at = begin(client, how)
        client.send(part)
        answer = client.answer()
        overshoot = answer.at - asked_at - BUDGET_SECONDS
        assert -0.01 < overshoot < OVERSHOOT_SECONDS
        answer.read_all()
        assert (answer.status, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        # What is left of the body could be taken for the next request.
        assert client.is_at_eof()


@on(*KINDS)
def test_the_budget_for_a_first_token_is_one_for_the_body_as_well(server):
    with server.client() as client:
        begin(client, LENGTH, "X-Stainless-Read-Timeout: 0.2", budget_seconds=30)
        answer = client.answer().read_all()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "first_token_timeout")


@on(*KINDS)
def test_a_body_that_drips_ends_with_its_budget(server):
    with server.client() as client:
        asked_at = begin(client, LENGTH)
        client._socket.settimeout(0.02)
        while monotonic() < asked_at + 2 * BUDGET_SECONDS:
            client.send(b" ")
            try:
                answer = client.answer()
                break
            except TimeoutError:
                continue
        assert answer.at - asked_at < BUDGET_SECONDS + OVERSHOOT_SECONDS
    assert answer.status == 504


@on(*KINDS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_comes_late_but_in_time_is_answered(server, is_chunked):
    id = new_id()
    script = json.dumps({"id": id, "steps": [["emit", "a"]]})
    question = {"model": "thread", "messages": [{"role": "user", "content": script}]}
    body = json.dumps(question).encode()
    pieces = [body[start : start + 40] for start in range(0, len(body), 40)]
    if is_chunked:
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""]]
    with server.client() as client:
        begin(client, CHUNKED if is_chunked else f"Content-Length: {len(body)}", budget_seconds=10)
        for piece in pieces:
            client.send(piece)
            server.control.events(id)  # A round trip, in which this piece arrives.
        answer = client.answer().read_all()
    assert answer.status == 200
    assert answer.json()["choices"][0]["message"]["content"] == "a"
