"""Apps that are imported before the fork, and several workers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .asking import ask
from .process import Server
from .test_workload import WHOLE, answer_to

GUNICORN_KINDS = ("gevent", "hub", "gthread", "sync")
ANSWERS = 40


@pytest.fixture(scope="module", params=GUNICORN_KINDS)
def preloaded(request):
    """Two workers of an app that had answered requests before they were forked."""
    server = Server(request.param, "--preload", "-w", "2", config={"WARM_UP": True}, workers=2)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def pair():
    """Two gevent workers, each of which imported the app itself."""
    server = Server("gevent", "-w", "2", workers=2)
    yield server
    server.kill()


def assert_both_serve(server):
    """Streams, until both workers had one of each model."""
    for model in ("thread", "greenlet"):
        missing = {control.pid for control in server.controls}
        while missing:
            with server.client() as client:
                id = ask(client, ["emit", "a"], model=model, headers={"Connection": "close"})
                assert client.answer().read_all().tokens() == "a"
            served = [c.pid for c in server.controls if c.events(id, "started")]
            assert len(served) == 1
            missing -= set(served)


def assert_engines_run_in_workers_only(server):
    assert server.process.pid not in {control.pid for control in server.controls}
    assert len(server.controls) == 2


def test_both_workers_of_a_preloaded_app_serve(preloaded):
    assert_both_serve(preloaded)
    assert_engines_run_in_workers_only(preloaded)


def test_a_preloaded_app_streams_token_by_token(preloaded):
    with preloaded.client() as client:
        id = ask(client, ["emit", "a "], ["gate"], ["emit", "b"])
        answer = client.answer()
        answer.read_until(b'"a "')
        for control in preloaded.controls:
            control.open_gate(id)
        assert answer.read_all().tokens() == "a b"


def test_a_preloaded_app_keeps_deadlines(preloaded):
    with preloaded.client() as client:
        id = ask(client, ["gate"], headers={"X-Request-Timeout": "0.2"})
        answer = client.answer()
        assert answer.status == 504
        for control in preloaded.controls:
            control.open_gate(id)
        answer.read_all()


def test_a_preloaded_app_notices_that_a_client_left(preloaded):
    with preloaded.client() as client:
        id = ask(client, ["emit", "a"], ["until_cancelled"])
        client.answer().read_until(b"a")
        (control,) = [c for c in preloaded.controls if c.events(id, "started")]
        client.reset()
        control.wait(id, "cancelled")


@pytest.mark.parametrize("model", ["logging", "scoped-session", "plain-session", "batching"])
def test_a_preloaded_app_under_load(preloaded, model):
    more = {"prompt": "any"} if model == "batching" else {}
    with ThreadPoolExecutor(ANSWERS) as pool:
        answers = [pool.submit(answer_to, preloaded, model=model, **more) for _ in range(ANSWERS)]
        assert {answer.result(30) for answer in answers} == {WHOLE}


def test_two_workers_share_a_port(pair):
    assert_both_serve(pair)
    assert_engines_run_in_workers_only(pair)
    with ThreadPoolExecutor(ANSWERS) as pool:
        answers = [pool.submit(answer_to, pair, model="logging") for _ in range(ANSWERS)]
        assert {answer.result(30) for answer in answers} == {WHOLE}
