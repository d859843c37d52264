"""Backends as users write them, under load: nothing hangs, and every answer is whole."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest

from . import upstream
from .app import SCRIPTED_MODELS
from .asking import ask, on
from .process import Process
from .workload import TOKENS

ANSWERS = 60
ROUNDS = 3
STREAMS = 200
MOST_WORKERS = SCRIPTED_MODELS["thread"]["worker_threads"]
WHOLE = "".join(f"{number} " for number in range(TOKENS))


def answer_to(server, **more):
    with server.client() as client:
        ask(client, **more)
        answer = client.answer().read_all()
    assert (answer.status, answer.ending) == (200, "complete"), answer.text
    assert answer.events()[-1] == "[DONE]", answer.text
    return answer.tokens()


def visit(server):
    with server.client() as client:
        client.ask("GET", "/words")
        answer = client.answer().read_all()
    assert (answer.status, answer.text) == (200, str(2 * TOKENS))


@on("gevent", "hub", "gthread", "pywsgi")
@pytest.mark.parametrize("model", ["logging", "scoped-session", "plain-session"])
def test_threads_that_log_and_query_beside_the_views(server, model):
    with ThreadPoolExecutor(2 * ANSWERS) as pool:
        for _ in range(ROUNDS):
            answers = [pool.submit(answer_to, server, model=model) for _ in range(ANSWERS)]
            visits = [pool.submit(visit, server) for _ in range(ANSWERS)]
            for answer in answers:
                assert answer.result(30) == WHOLE
            for each in visits:
                each.result(30)


@pytest.fixture(scope="module")
def upstream_server():
    process = Process([sys.executable, "-m", "server.upstream"])
    yield process
    process.kill()


@on("gevent", "hub")
def test_greenlets_share_an_http_client(server, upstream_server, measure):
    host, port = upstream_server.address
    url = f"http://{host}:{port}/"
    words = "".join(f"{number} " for number in range(upstream.WORDS))
    started_at = monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = [
            pool.submit(answer_to, server, model="upstream", prompt=url) for _ in range(STREAMS)
        ]
        assert {answer.result(30) for answer in answers} == {words}
    seconds = monotonic() - started_at
    measure("200 streams from an upstream", server.kind, seconds)
    assert seconds < STREAMS * upstream.WORDS * upstream.PAUSE_SECONDS / 10


def totals(stats):
    ended = ("completed", "cancelled", "rejected", "timed_out", "dropped", "failed")
    return stats["total_submitted"], sum(stats[f"total_{name}"] for name in ended)


@on("gevent", "hub")
@pytest.mark.parametrize("model", ["thread", "greenlet", "batching"])
def test_many_streams_and_some_that_are_killed(server, model):
    control = server.control
    numbers = [["emit", f"{number} "] for number in range(TOKENS)]
    chance = random.Random(model)

    def read(kill_after):
        with server.client() as client:
            ask(client, *numbers, model=model, **more)
            answer = client.answer()
            if kill_after is None:
                assert answer.read_all().events()[-1] == "[DONE]"
                assert answer.tokens() == WHOLE
            else:
                while len(answer.body) < kill_after and answer.read():
                    pass
                chance.choice((client.close, client.reset))()

    more = {"prompt": "any"} if model == "batching" else {}
    with ThreadPoolExecutor(STREAMS) as pool:

        def run(kill_share):
            kills = [
                chance.randrange(2000) if chance.random() < kill_share else None
                for _ in range(STREAMS)
            ]
            for future in [pool.submit(read, kill) for kill in kills]:
                future.result(30)
            return control.wait_for_stats(model, busy=0, running=0, waiting=0)

        threads = control.threads
        run(kill_share=0.5)  # What is made once and stays is there from here on.
        file_descriptors = control.file_descriptors
        before = control.stats(model)
        for kill_share in (0.5, 0.0):
            after = run(kill_share)
    submitted, ended = totals(after)
    assert submitted == ended == totals(before)[0] + 2 * STREAMS
    for name in ("total_failed", "total_timed_out", "total_rejected"):
        assert after[name] == before[name]
    server.wait_for(lambda: control.file_descriptors <= file_descriptors)
    assert control.threads <= threads + MOST_WORKERS + 4
