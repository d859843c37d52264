"""Backends that fail, hang, and do what no backend may: each on its own request only."""

from __future__ import annotations

from contextlib import ExitStack
from time import monotonic

import pytest
from server.asking import ask

from .backends import GIL_SECONDS, HUGE_BYTES, STUCK_SECONDS, WORKERS
from .conftest import size
from .report import watching, what_was_seen


def assert_served(server, model):
    """Others are served as ever: as many at a time as before."""
    with ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(WORKERS)]
        for client in clients:
            ask(client, ["finishes twice" if model == "callback" else "yields a"], model=model)
        for client in clients:
            assert client.answer().read_all().events()[-1] == "[DONE]"


def read(server, how, *more, model="wayward", **options):
    """The whole answer of a backend that does *how*."""
    with server.client() as client:
        ask(client, [how, *more], model=model, **options)
        return client.answer().read_all()


ALL_FAILURES = (
    *("raises at once", "raises in its first step", "raises after a token"),
    *("runs out of memory", "recurses for ever", "exits", "exits its thread"),
    *("is interrupted", "is killed", "yields an object", "yields none"),
    *("yields bad text", "yields bad bytes", "yields a choice nobody asked for"),
    *("returns a number", "returns an answer of numbers"),
)
BEFORE_A_TOKEN = (
    *("raises at once", "raises in its first step"),
    *("returns a number", "returns an answer of numbers"),
)


@pytest.mark.parametrize("model", ["wayward", "wayward-greenlet"])
@pytest.mark.parametrize("how", ALL_FAILURES)
def test_a_backend_that_fails(server, how, model):
    with watching(f"backend ({model}): {how}", server) as fault:
        for _ in range(size(1, 2 * WORKERS)):  # Or a worker that died would not be missed.
            answer = read(server, how, model=model)
            if answer.status == 200:
                assert answer.ending == "complete"
                assert "[DONE]" not in answer.events()
                error = answer.objects()[-1]["error"]
            else:
                assert answer.status == 500
                error = answer.json()["error"]
            assert error["code"] == "engine_error"
            assert "scripted" not in answer.text
            assert (answer.status == 500) == (how in BEFORE_A_TOKEN), answer.text
        assert_served(server, model)
        fault.saw = what_was_seen(answer)


CALLBACK_FAILURES = (
    *("fails twice", "emits an object", "emits none", "emits an error class"),
    *("calls from all threads at once", "raises in submit"),
)
CALLBACK_SUCCESSES = (
    *("finishes twice", "fails after its finish", "calls after its finish"),
    "calls from one thread after the other",
)


@pytest.mark.parametrize("how", CALLBACK_FAILURES)
def test_a_callback_backend_that_fails(server, how):
    with watching(f"backend (callback): {how}", server) as fault:
        answer = read(server, how, model="callback")
        if answer.status == 200:
            assert answer.ending == "complete"
            error = answer.objects()[-1]["error"]
        else:
            assert answer.status == 500
            error = answer.json()["error"]
        assert error["code"] == "engine_error"
        assert_served(server, "callback")
        fault.saw = what_was_seen(answer)


@pytest.mark.parametrize("how", CALLBACK_SUCCESSES)
def test_a_callback_backend_that_says_too_much(server, how):
    with watching(f"backend (callback): {how}", server) as fault:
        answer = read(server, how, model="callback")
        assert answer.ending == "complete"
        assert answer.events()[-1] == "[DONE]"
        assert "late" not in answer.tokens()
        fault.saw = what_was_seen(answer)


@pytest.mark.parametrize("how", ["calls late", "raises in its cancel", "takes long to cancel"])
def test_a_callback_backend_whose_client_left(server, how):
    with watching(f"backend (callback): {how}, its client left", server) as fault:
        for _ in range(size(1, 5)):
            with server.client() as client:
                id = ask(client, [how], model="callback")
                answer = client.answer()
                answer.read_until(b'"a"')
                fault.told(id, client.close())
            server.control.wait(id, "closed")
        fault.saw = what_was_seen(answer)


def test_a_cancel_that_hangs_holds_up_no_other(server):
    """It keeps its own place until it comes back; those after it get theirs back."""
    with watching("backend (callback): hangs in its cancel, others leave", server) as fault:
        with server.client() as client:
            hung = ask(client, ["hangs in its cancel"], model="callback")
            client.answer().read_until(b'"a"')
        for _ in range(size(3, 20)):
            with server.client() as client:
                id = ask(client, ["calls late"], model="callback")
                answer = client.answer()
                answer.read_until(b'"a"')
                fault.told(id, client.close())
                server.control.wait(
                    id, "told"
                )  # By its own cancel, which comes after the hung one.
            server.control.wait_for_stats("callback", busy=1)
        assert server.control.events(hung, "told") == []
        server.control.open_gate(hung)
        server.control.wait(hung, "told")
        fault.saw = what_was_seen(answer)


def test_a_callback_backend_whose_thread_dies(server):
    with watching("backend (callback): lets its thread die", server) as fault:
        answer = read(
            server, "lets its thread die", model="callback", settings={"idle_seconds": 0.3}
        )
        assert answer.objects()[-1]["error"]["code"] == "idle_timeout"
        assert answer.ending == "complete"
        fault.saw = what_was_seen(answer)


@pytest.mark.parametrize("how", ["raises as it is closed", "raises in its cancel callback"])
def test_a_backend_that_fails_when_it_is_told_to_stop(server, how):
    with watching(f"backend: {how}", server) as fault:
        with server.client() as client:
            id = ask(client, [how], model="wayward")
            answer = client.answer()
            answer.read_until(b'"a"')
            fault.told(id, client.close())
            server.control.wait(id, "closed")
        assert_served(server, "wayward")
        fault.saw = what_was_seen(answer)


@pytest.mark.parametrize(
    ("how", "settings", "code"),
    [
        ("hangs before the first token", {"first_token_seconds": 0.3}, "first_token_timeout"),
        ("hangs before the first token", {"deadline_seconds": 0.3}, "deadline_exceeded"),
        ("hangs in the middle", {"idle_seconds": 0.3}, "idle_timeout"),
        ("hangs in the middle", {"deadline_seconds": 0.3}, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize("model", ["wayward", "wayward-greenlet"])
def test_a_backend_that_hangs(server, how, settings, code, model):
    (budget,) = settings
    with watching(f"backend ({model}): {how}, {budget}", server) as fault:
        with server.client() as client:
            asked_at = monotonic()
            id = ask(client, [how], model=model, settings=settings)
            answer = client.answer().read_all()
            assert monotonic() - asked_at < 0.3 + 0.5
            is_document = answer.status == 504
            assert is_document == (how == "hangs before the first token")
            error = answer.json()["error"] if is_document else answer.objects()[-1]["error"]
            assert error["code"] == code
            # It holds its worker, and nobody else's, until it comes back.
            assert_served(server, "single")
            server.control.open_gate(id)
            assert server.control.wait(id, "closed")["cancelled"] is True
        fault.saw = what_was_seen(answer)


def test_stuck_workers_are_counted_and_replaced_within_bounds(server):
    """A generation of workers that ignore their cancel, and their substitutes: then 503."""
    with watching("backend: ignores its cancel, all workers twice", server) as fault:
        ids = []
        for stuck in (WORKERS, 2 * WORKERS):
            for _ in range(WORKERS):
                with server.client() as client:
                    ids.append(ask(client, ["ignores its cancel"], model="wayward"))
                    answer = client.answer()
                    answer.read_until(b'"a"')
                    fault.told(ids[-1], client.close())
            begun_at = monotonic()
            server.control.wait_for_stats("wayward", stuck=stuck)
            assert monotonic() - begun_at < STUCK_SECONDS + 0.5
            if stuck == WORKERS:
                assert_served(server, "wayward")
        refused = read(server, "yields a")
        assert (refused.status, refused.json()["error"]["code"]) == (503, "engine_closed")
        assert "retry-after" in refused.headers
        for id in ids:
            server.control.open_gate(id)
            server.control.wait(id, "closed")
        server.control.wait_for_stats("wayward", stuck=0, busy=0, is_available=True)
        assert_served(server, "wayward")
        fault.saw = f"{what_was_seen(answer)}; then {what_was_seen(refused)}"


@pytest.mark.parametrize("accept", ["text/event-stream", "text/plain"])
def test_a_token_of_10_mb(server, accept):
    count = size(1_000_000, HUGE_BYTES)
    with watching(f"backend: {count:,} bytes in one token ({accept})", server) as fault:
        answer = read(server, "is huge", count, headers={"Accept": accept})
        assert answer.ending == "complete"
        text = answer.text if accept == "text/plain" else answer.tokens()
        assert text == "a" + "x" * count + "b"
        fault.saw = "200, all of it, clean end"


def test_a_c_extension_that_keeps_the_gil(server):
    seconds = size(0.5, GIL_SECONDS)
    with watching(f"backend: keeps the GIL for {seconds:g} s", server) as fault, ExitStack() as on:
        others = [on.enter_context(server.client()) for _ in range(WORKERS - 1)]
        for client in others:
            ask(client, ["answers in time", seconds], model="wayward")
        with server.client() as client:
            begun_at = monotonic()
            ask(client, ["keeps the gil", seconds], model="wayward")
            answer = client.answer().read_all()
            assert monotonic() - begun_at >= seconds
        assert answer.tokens() == "ab"
        for client in others:
            answer = client.answer().read_all()
            assert answer.tokens() == "".join(f"{number} " for number in range(20))
            assert answer.events()[-1] == "[DONE]"
        fault.saw = what_was_seen(answer)
