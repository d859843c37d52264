"""Workers that are told to go: SIGTERM, SIGHUP, max_requests."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from time import monotonic

import pytest

from .asking import ask
from .process import Server

GRACE_SECONDS = 3
STUCK = ["gate"]
GUNICORN_KINDS = ("gevent", "hub", "gthread", "sync")


@pytest.fixture
def start():
    """Start a server that ends with the test."""
    with ExitStack() as stack:

        def start(*arguments, **options):
            server = Server(*arguments, **options)
            stack.callback(server.kill)
            return server

        yield start


def start_graceful(start, kind, *arguments):
    return start(kind, "--graceful-timeout", str(GRACE_SECONDS), *arguments)


def wait_for_refusal(server, told_at, measure):
    server.control.wait_for_stats("thread", is_available=False)
    measure("SIGTERM to refusal", server.kind, monotonic() - told_at)


@pytest.mark.parametrize("kind", ["gevent", "hub", "gthread"])
def test_sigterm_ends_streams_well_and_refuses_new_requests(start, kind, measure):
    server = start_graceful(start, kind)
    with ExitStack() as stack:

        def open_stream(*steps, **more):
            client = stack.enter_context(server.client())
            return client, ask(client, *steps, **more)

        client, stuck_id = open_stream(["emit", "a"], STUCK)
        stuck = client.answer()
        stuck.read_until(b'"a"')
        client, finishing_id = open_stream(["emit", "a"], ["gate"], ["emit", "b"])
        finishing = client.answer()
        finishing.read_until(b'"a"')
        client, _ = open_stream(["emit", "a"], STUCK, headers={"Accept": "text/plain"})
        text = client.answer()
        text.read_until(b"a")
        silent, silent_id = open_stream(STUCK)
        document, document_id = open_stream(STUCK, stream=False)
        for id in (silent_id, document_id):
            server.control.wait(id, "started")
        client, _ = open_stream(["emit", "a"])
        client.answer().read_all()

        told_at = server.terminate()
        wait_for_refusal(server, told_at, measure)
        refused_id = ask(client, ["emit", "a"])  # New connections gthread leaves waiting.
        answer = client.answer().read_all()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "server_shutdown"
        assert server.control.events(refused_id) == []

        server.control.open_gate(finishing_id)
        assert finishing.read_all().tokens() == "ab"
        assert finishing.events()[-1] == "[DONE]"
        assert monotonic() - told_at < 2.0

        stuck.read_all()
        measure("SIGTERM to last words", kind, monotonic() - told_at)
        assert monotonic() - told_at < GRACE_SECONDS
        assert stuck.objects()[-1]["error"]["code"] == "server_shutdown"
        assert "[DONE]" not in stuck.events()
        assert stuck.ending == "complete"
        assert text.read_all().ending in ("eof", "reset")
        for client in (silent, document):
            answer = client.answer().read_all()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "server_shutdown"
        assert server.control.wait(stuck_id, "finished")["code"] == "server_shutdown"
    assert server.wait_for_exit() == 0
    assert "Exception ignored" not in server.log


def test_sigterm_ends_the_stream_of_a_sync_worker_well(start, measure):
    server = start_graceful(start, "sync")
    with server.client() as client:
        # With heartbeats: a signal that lands just before the main thread begins to wait is
        # handled when it next wakes.
        id = ask(client, ["emit", "a"], STUCK, settings={"heartbeat_seconds": 0.2})
        answer = client.answer()
        answer.read_until(b'"a"')
        told_at = server.terminate()
        answer.read_all()
        measure("SIGTERM to last words", "sync", monotonic() - told_at)
        assert answer.ending == "complete", server.log
        assert monotonic() - told_at < GRACE_SECONDS
        server.control.open_gate(id)
    assert answer.objects()[-1]["error"]["code"] == "server_shutdown"
    assert server.wait_for_exit() == 0


def test_a_sync_worker_finishes_its_stream_within_the_grace(start, measure):
    server = start_graceful(start, "sync")
    with server.client() as client:
        id = ask(client, ["emit", "a"], ["gate"], ["emit", "b"])
        answer = client.answer()
        answer.read_until(b'"a"')
        wait_for_refusal(server, server.terminate(), measure)
        server.control.open_gate(id)
        assert answer.read_all().events()[-1] == "[DONE]"
    assert server.wait_for_exit() == 0


def test_the_app_can_make_the_grace_shorter(start):
    server = start("gevent", config={"LLMSTREAM_SHUTDOWN_GRACE_SECONDS": 0.4})
    with server.client() as client:
        ask(client, ["emit", "a"], STUCK)
        answer = client.answer()
        answer.read_until(b'"a"')
        told_at = server.terminate()
        answer.read_all()
        assert monotonic() - told_at < 1.5
    assert answer.objects()[-1]["error"]["code"] == "server_shutdown"


@pytest.mark.parametrize("kind", ["gevent", "hub", "gthread"])
def test_a_reload_lets_streams_finish(start, kind):
    server = start(kind)
    with server.client() as client:
        id = ask(client, ["emit", "a"], ["gate"], ["emit", "b"])
        answer = client.answer()
        answer.read_until(b'"a"')
        old = server.control
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: len(server.meet()) == 2)
        old.open_gate(id)
        assert answer.read_all().tokens() == "ab"
        assert answer.events()[-1] == "[DONE]"

    def is_served():
        with server.client() as client:
            ask(client, ["emit", "new"])
            answer = client.answer().read_all()
        # The old worker goes on accepting for up to a second, and sends away what it gets.
        assert answer.status == 200 or answer.json()["error"]["code"] == "server_shutdown"
        return answer.status == 200

    server.wait_for(is_served, 5.0)


@pytest.mark.parametrize("kind", GUNICORN_KINDS)
def test_the_last_of_max_requests_is_served(start, kind):
    server = start_graceful(start, kind, "--max-requests", "2")
    for number in range(2):
        # The ping that found the worker was its first request, this is its last.
        with server.client() as client:
            id = ask(client, ["emit", "a"], ["gate"], ["emit", "b"])
            answer = client.answer()
            assert answer.status == 200, (number, answer.read_all().text)
            answer.read_until(b'"a"')
            server.control.open_gate(id)
            assert answer.read_all().events()[-1] == "[DONE]"
        server.wait_for(lambda number=number: len(server.meet()) == number + 2)


@pytest.mark.parametrize("kind", GUNICORN_KINDS)
def test_a_worker_for_one_request_serves_it(start, kind):
    server = start_graceful(start, kind, "--max-requests", "1")
    with server.client() as client:
        ask(client, ["emit", "a"])
        answer = client.answer().read_all()
    assert (answer.status, answer.tokens()) == (200, "a")


def test_the_last_request_of_a_sync_worker_has_all_its_time(start):
    server = start("sync", "--max-requests", "2", "--graceful-timeout", "1")
    with server.client() as client:
        ask(client, ["emit", "a"], ["stuck", 1.5], ["emit", "b"])
        answer = client.answer().read_all()
    assert answer.tokens() == "ab"
    assert answer.events()[-1] == "[DONE]"


@pytest.mark.parametrize("kind", ["gevent", "hub", "gthread"])
def test_streams_that_outlast_max_requests_end_well(start, kind):
    server = start_graceful(start, kind, "--max-requests", "3")
    with server.client() as client, server.client() as other:
        id = ask(client, ["emit", "a"], STUCK)
        stuck = client.answer()
        stuck.read_until(b'"a"')
        ask(other, ["emit", "last"])
        assert other.answer().read_all().tokens() == "last"
        reached_at = monotonic()
        stuck.read_all()
        assert GRACE_SECONDS / 2 < monotonic() - reached_at < GRACE_SECONDS + 1
    assert stuck.objects()[-1]["error"]["code"] == "server_shutdown"
    assert stuck.ending == "complete"
    server.control.open_gate(id)
    server.wait_for(lambda: len(server.meet()) == 2)
    with server.client() as client:
        ask(client, ["emit", "new"])
        assert client.answer().read_all().tokens() == "new"
