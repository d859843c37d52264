"""Servers that are told to go, killed, reloaded, forked: what becomes of their streams."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import pytest
from server.asking import EMIT_AND_WAIT, ask
from server.test_forking import assert_both_serve

from flask_llmstream import IncompleteStreamError, StreamReader

from .conftest import KINDS
from .report import watching, what_was_seen

HOOKS = ("-c", str(Path(__file__).with_name("hooks.conf.py")))
GRACE_SECONDS = 2
GRACE = ("--graceful-timeout", str(GRACE_SECONDS))
on_kinds = pytest.mark.parametrize("kind", KINDS)
also_elsewhere = pytest.mark.full  # In tests/server, that is.


def begin_stream(stack, server, *steps):
    """A stream whose first token has come: its client, id and answer."""
    client = stack.enter_context(server.client())
    id = ask(client, *(steps or EMIT_AND_WAIT))
    answer = client.answer()
    answer.read_until(b'"a "')
    return client, id, answer


def assert_incomplete(pieces):
    with pytest.raises(IncompleteStreamError):
        list(StreamReader(pieces))


def rest_of(answer):
    """What came of its body, and what still comes, in pieces."""
    seen = 0
    while len(answer.pieces) > seen or answer.read():
        for data, _ in answer.pieces[seen:]:
            seen += 1
            yield data


def assert_ended_by_shutdown(answer):
    assert answer.read_all().objects()[-1]["error"]["code"] == "server_shutdown"
    assert answer.objects()[-1]["error"]["retryable"] is True
    assert "[DONE]" not in answer.events()
    assert answer.ending == "complete"


@also_elsewhere
@on_kinds
def test_sigterm_with_a_grace_shorter_than_the_stream(start, kind):
    server = start(kind, *GRACE)
    with watching("server: SIGTERM, grace shorter than a stream", server) as fault:
        with ExitStack() as stack:
            _, stuck_id, stuck = begin_stream(stack, server)
            _, id, finishing = begin_stream(stack, server, ["emit", "a "], ["gate"], ["emit", "b"])
            idle = stack.enter_context(server.client())
            ask(idle, ["emit", "a"])
            idle.answer().read_all()
            told_at = server.terminate()
            server.control.wait_for_stats("thread", is_available=False)
            ask(idle, ["emit", "a"])
            refused = idle.answer().read_all()
            assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            server.control.open_gate(id)
            assert finishing.read_all().events()[-1] == "[DONE]"
            assert_ended_by_shutdown(stuck)
            assert monotonic() - told_at < GRACE_SECONDS
            fault.told_seconds.append(server.control.wait(stuck_id, "cancelled")["at"] - told_at)
        assert server.wait_for_exit() == 0
        fault.saw = f"{what_was_seen(stuck)}; new ones {what_was_seen(refused)}"
        fault.is_process_gone = True


@on_kinds
def test_sigquit_without_a_hook_makes_no_short_success(start, kind):
    """On its way out a worker may come to say goodbye, or not: there is no grace."""
    server = start(kind, *GRACE)
    with watching("server: SIGQUIT, no hook", server) as fault, ExitStack() as stack:
        _, _, answer = begin_stream(stack, server)
        server.process.send_signal(signal.SIGQUIT)
        answer.read_all()
        if b"error" in answer.body:
            assert_ended_by_shutdown(answer)
        else:
            assert_incomplete([answer.body])
        server.wait_for_exit()
        fault.saw = what_was_seen(answer)
        fault.is_process_gone = True


@on_kinds
@pytest.mark.parametrize("name", ["SIGQUIT", pytest.param("SIGINT", marks=pytest.mark.full)])
def test_sigquit_with_the_hook_ends_streams_well(start, kind, name):
    server = start(kind, *HOOKS)
    with watching(f"server: {name}, with the hook", server) as fault, ExitStack() as stack:
        streams = [begin_stream(stack, server) for _ in range(20)]
        told_at = monotonic()
        server.process.send_signal(signal.Signals[name])
        for _, _, answer in streams:
            assert_ended_by_shutdown(answer)
        assert monotonic() - told_at < 1.0
        assert server.wait_for_exit() == 0
        assert monotonic() - told_at < 3.0
        fault.saw = what_was_seen(answer)
        fault.is_process_gone = True


@on_kinds
def test_a_killed_worker_s_streams_are_seen_to_be_incomplete(start_cold, kind):
    server = start_cold(kind, "-w", "2", workers=2)
    assert_both_serve(server)
    with ExitStack() as stack:
        _, id, answer = begin_stream(stack, server)
        (killed,) = [c for c in server.controls if c.events(id, "started")]
        (other,) = [c for c in server.controls if c is not killed]
        name = "server: SIGKILL of one worker of two"
        with watching(name, server, other, ignoring=("threads",)) as fault:
            os.kill(killed.pid, signal.SIGKILL)
            assert_incomplete(rest_of(answer))
            assert answer.ending in ("eof", "reset")
            for _ in range(10):
                with server.client() as client:
                    ask(client, ["emit", "a"], headers={"Connection": "close"})
                    assert client.answer().read_all().tokens() == "a"
            server.wait_for(lambda: len(server.meet()) == 3)
            fault.saw = what_was_seen(answer)


@also_elsewhere
@on_kinds
def test_a_reload_lets_streams_finish_and_new_ones_begin(start, kind):
    server = start(kind)
    old = server.control
    with watching("server: SIGHUP", server) as fault, ExitStack() as stack:
        _, id, answer = begin_stream(stack, server, ["emit", "a "], ["gate"], ["emit", "b"])
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: len(server.meet()) == 2)
        old.open_gate(id)
        assert answer.read_all().tokens() == "a b"
        assert answer.events()[-1] == "[DONE]"
        fault.saw = what_was_seen(answer)
        fault.is_process_gone = True


@also_elsewhere
@on_kinds
def test_max_requests_lets_streams_have_their_grace(start_cold, kind):
    server = start_cold(kind, "--max-requests", "3", *GRACE)
    with watching("server: max_requests", server) as fault, ExitStack() as stack:
        _, _, stuck = begin_stream(stack, server)
        with server.client() as client:
            ask(client, ["emit", "last"])
            assert client.answer().read_all().tokens() == "last"
        assert_ended_by_shutdown(stuck)
        server.wait_for(lambda: len(server.meet()) == 2)
        fault.saw = what_was_seen(stuck)
        fault.is_process_gone = True


@also_elsewhere
@on_kinds
def test_a_preloaded_app_is_as_any_other(start, kind):
    server = start(kind, "--preload", config={"WARM_UP": True})
    with watching("server: --preload, a client leaves", server) as fault, ExitStack() as stack:
        client, id, answer = begin_stream(stack, server)
        fault.told(id, client.reset())
        fault.saw = what_was_seen(answer)


# The other hook.


@on_kinds
def test_models_are_loaded_before_the_first_request(start_cold, kind):
    server = start_cold(kind, *HOOKS)
    # Asked for /ping alone: one was loaded, and one failed to, which is in the log.
    assert len(server.control.events("loading", "loaded")) == 2
    assert "The model 'unloadable' could not be loaded." in server.log
    assert "ValueError: scripted" in server.log
    with server.client() as client:
        ask(client, model="loadable")
        assert client.answer().read_all().tokens() == "a"
