"""Clients that do not read."""

from __future__ import annotations

import socket
from time import monotonic

import pytest
from flask import Flask

from flask_llmstream import InferenceRequest, LLMStream
from flask_llmstream.testing import ScriptedBackend

from .asking import ask, on
from .conftest import CONCURRENT_KINDS, KINDS

SLOW_READER_SECONDS = 1.0
SETTINGS = {"slow_reader_seconds": SLOW_READER_SECONDS}
TOKEN_BYTES = 1000
FLOOD = ["flood", 300_000, TOKEN_BYTES]
"""300 MB."""
KERNEL_BYTES = 16 * 1024 * 1024
"""More than the kernel keeps for both ends of a connection."""
GROWTH_BYTES = 16 * 1024 * 1024


def stalled_client(server):
    return server.client(receive_buffer=4096)


@on(*KINDS)
@pytest.mark.parametrize("accept", ["text/event-stream", "text/plain"])
def test_a_client_that_does_not_read_is_cut_off(server, measure, accept):
    before = server.control.resident_bytes
    with stalled_client(server) as client:
        asked_at = monotonic()
        id = ask(client, FLOOD, settings=SETTINGS, headers={"Accept": accept})
        finished = server.control.wait(id, "finished")
        seconds = finished["at"] - asked_at
        measure("slow reader, ask to end", server.kind, seconds)
        assert SLOW_READER_SECONDS < seconds < 3 * SLOW_READER_SECONDS
        assert finished["code"] == "slow_reader"
        server.control.wait_for_stats("thread", busy=0)
        produced = server.control.progress(id) * TOKEN_BYTES
        assert 0 < produced < KERNEL_BYTES
        assert server.control.resident_bytes - before < GROWTH_BYTES
        answer = client.answer().read_all()
    assert answer.ending in ("eof", "reset")  # And no last chunk.


@on(*CONCURRENT_KINDS)
def test_a_stalled_stream_holds_up_nobody_else(server):
    with stalled_client(server) as stalled, server.client() as reader:
        stalled_id = ask(stalled, FLOOD, settings={"slow_reader_seconds": 20})
        stalled.answer()
        ask(reader, ["flood", 20_000, 10])
        started_at = monotonic()
        answer = reader.answer().read_all()
        seconds = monotonic() - started_at
        assert answer.tokens() == "x" * 200_000
        assert seconds < 5.0
        # Its own producer waits, with no more than the kernel and the channel hold.
        produced = server.control.progress(stalled_id)
        assert produced * TOKEN_BYTES < KERNEL_BYTES
        assert server.control.events(stalled_id, "finished") == []
        stalled.reset()
        assert server.control.wait(stalled_id, "finished")["code"] in ("cancelled", "slow_reader")
    server.control.wait_for_stats("thread", busy=0)


@on(*KINDS)
def test_a_client_that_reads_late_but_in_time_gets_everything(server):
    count = KERNEL_BYTES // TOKEN_BYTES
    with server.client() as client:
        id = ask(client, ["flood", count, TOKEN_BYTES], headers={"Accept": "text/plain"})
        answer = client.answer()
        seen = -1
        while seen != (seen := server.control.progress(id)):  # Until it waits for us.
            pass
        answer.read_all()
    assert answer.ending == "complete"
    assert len(answer.body) == count * TOKEN_BYTES
    assert server.control.wait(id, "finished")["code"] is None


def test_a_server_stuck_in_the_last_chunk_is_freed():
    app = Flask(__name__)
    app.config["LLMSTREAM_SLOW_READER_SECONDS"] = 0.2
    llm = LLMStream(app)
    llm.add_backend("scripted", ScriptedBackend("a"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10.0)
        with app.test_request_context(environ_overrides={"gunicorn.socket": ours}):
            response = llm.stream(InferenceRequest(prompt="?"))
        assert b"[DONE]" in b"".join(response.response)
        # The server would write its last chunk now, and find no room for it.
        assert theirs.recv(1) == b""
        response.response.close()
