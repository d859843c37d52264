"""Real servers in front of upstreams: greenlets under gevent, threads under gthread."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import monotonic

import pytest
from server.wire import Client

from .conftest import HELLO, SERVERS, new_id, scripts

NOTICE_SECONDS = 0.5
"""Allowed here; 50 ms is what is aimed for."""
TEXT = [["head"], ["text", "Hel"]]
STREAMS = 1000


@pytest.fixture(params=SERVERS)
def server(request, servers):
    """The servers one after the other; none may log a traceback, or a secret."""
    process = servers(request.param)
    process.kind = request.param
    yield process
    assert "Traceback" not in process.log
    for secret in ("sk-secret-key", "/v1/chat/completions", '"any"'):
        assert secret not in process.log


@pytest.fixture
def pair(server):
    """A model of two upstreams, ``a`` and ``b``, that nobody else asks for."""
    server.pairs = getattr(server, "pairs", 0) + 1
    return f"pair-{server.pairs}"


def body_of(id, any=None, model="one", stream=True, **by_name):
    message = {"role": "user", "content": scripts(id, any, **by_name)}
    return json.dumps({"model": model, "stream": stream, "messages": [message]}).encode()


def ask(client, id, any=None, headers=(), **more):
    headers = {"Content-Type": "application/json", "X-Request-ID": id, **dict(headers)}
    body = body_of(id, any, **more)
    client.ask("POST", "/v1/chat/completions", headers=headers, body=body)


def play(server, any=None, id=None, **more):
    """The whole answer to one request."""
    with Client(server.address) as client:
        ask(client, id or new_id(), any, **more)
        return client.answer().read_all()


def text_of(answer):
    deltas = [c["delta"] for event in answer.objects() for c in event.get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas)


def get(server, path):
    with Client(server.address) as client:
        client.ask("GET", path)
        return client.answer().read_all().json()


def test_a_stream_goes_through(server, scripted):
    id = new_id()
    answer = play(server, HELLO, id=id)
    assert (answer.status, text_of(answer), answer.events()[-1]) == (200, "Hello", "[DONE]")
    asked = scripted.records(id)[0]
    assert asked["body"]["model"] == "upstream-model"
    assert asked["headers"]["authorization"] == "bearer sk-secret-key"
    assert asked["headers"]["x-request-id"] == id


def test_a_whole_answer_goes_through(server):
    answer = play(server, HELLO, stream=False).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"


def test_connections_are_kept_where_a_wait_can_be_interrupted(server, scripted):
    ids = [new_id() for _ in range(4)]
    for id in ids:
        assert text_of(play(server, HELLO, id=id)) == "Hello"
    connections = {scripted.records(id)[0]["connection"] for id in ids}
    assert len(connections) == (1 if server.kind == "gevent" else 4)


def test_a_kept_connection_that_the_upstream_closed_is_no_failure(server):
    for _ in range(10):
        assert text_of(play(server, [*HELLO, ["close"]])) == "Hello"


# Faults.


@pytest.mark.parametrize(
    "script",
    [
        [*TEXT, ["close"]],
        [*TEXT, ["reset"]],
        [*TEXT, ["finish"], ["end"]],
        [*TEXT, ["finish"], ["chunk", "data: [DON"], ["close"]],
    ],
)
def test_a_stream_that_breaks_off_says_so_and_has_no_finish(server, script):
    answer = play(server, script)
    assert (answer.status, text_of(answer)) == (200, "Hel")
    *events, last = answer.objects()
    assert (last["error"]["code"], last["error"]["type"]) == ("stream_incomplete", "server_error")
    assert not any(choice["finish_reason"] for event in events for choice in event["choices"])
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ([["status", 400, {}, '{"error":{"message":"No.","code":"bad_thing"}}']], 400, "bad_thing"),
        ([["status", 429, {"Retry-After": "900"}, "{}"]], 429, "queue_full"),
        ([["status", 401, {}, "{}"]], 502, "upstream_error"),
        ([["status", 500, {}, "<html>"]], 502, "upstream_error"),
        ([["close"]], 502, "upstream_error"),
        ([["head"], ["end"]], 502, "stream_incomplete"),
        ([["head", {"Content-Type": "text/html"}], ["end"]], 502, "upstream_error"),
    ],
)
def test_an_error_before_the_first_token_has_a_status(server, pair, script, status, code):
    for _ in range(2):  # Where all are out, they are asked all the same.
        answer = play(server, script, model=pair)
        assert (answer.status, answer.json()["error"]["code"]) == (status, code)
    if status == 429:
        assert 890 <= int(answer.headers["retry-after"]) <= 900


def test_nobody_there_is_a_502(server):
    answer = play(server, HELLO, model="dead")
    assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")
    assert b"127.0.0.1" not in answer.body


# Failing over.


def test_another_upstream_is_asked_where_nobody_is_there(server):
    for _ in range(6):
        assert text_of(play(server, HELLO, model="halfdead")) == "Hello"
    assert get(server, "/stats/halfdead")["backends"][0]["failures"] == 1


@pytest.mark.parametrize(
    "failing",
    [
        [["status", 500, {}, ""]],
        [["status", 503, {"Retry-After": "60"}, ""]],
        [["status", 429, {}, ""]],
        [["status", 429, {"Retry-After": "60"}, ""]],
        [["status", 404, {}, '{"error": {"message": "The model is not here."}}']],
        [["status", 401, {}, ""]],
        [["close"]],
        [["reset"]],
        [["head"], ["close"]],
        [["head"], ["event", {"error": {"message": "Oh."}}]],
    ],
)
def test_another_upstream_is_asked_before_the_first_token(server, scripted, pair, failing):
    ids = [new_id() for _ in range(4)]
    for id in ids:
        assert text_of(play(server, a=failing, b=HELLO, id=id, model=pair)) == "Hello"
    asked = [record["upstream"][-1] for id in ids for record in scripted.records(id)]
    assert asked == list("ab" + "bbb")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_request_is_to_blame_for_is_not_tried_again(server, scripted, pair, status):
    id = new_id()
    answer = play(server, [["status", status, {}, "{}"]], id=id, model=pair)
    assert answer.status == (413 if status == 413 else 400)
    assert len(scripted.records(id)) == 1
    assert [b["failures"] for b in get(server, f"/stats/{pair}")["backends"]] == [0, 0]


def test_nothing_is_tried_again_after_the_first_token(server, scripted, pair):
    id = new_id()
    assert text_of(play(server, [*TEXT, ["close"]], id=id, model=pair)) == "Hel"
    assert len(scripted.records(id)) == 1


def test_where_all_are_busy_the_request_waits_as_long_as_they_said(server, scripted, pair):
    id = new_id()
    busy = ["turns", [["status", 429, {"Retry-After": "1"}, ""]], HELLO]
    began = monotonic()
    assert text_of(play(server, busy, id=id, model=pair)) == "Hello"
    assert 1 <= monotonic() - began < 5
    assert len(scripted.records(id)) == 3


def test_who_leaves_while_all_are_busy_is_not_asked_for_any_more(server, scripted, pair):
    id = new_id()
    with Client(server.address) as client:
        ask(client, id, ["turns", [["status", 429, {"Retry-After": "30"}, ""]]], model=pair)
        scripted.records(id, at_least=2)
    server.wait_for(lambda: get(server, f"/stats/{pair}")["busy"] == 0)


def test_no_upstream_has_more_than_it_takes(server, scripted):
    script = [["head"], ["text", "a"], ["sleep", 0.05], *HELLO[3:]]
    with ThreadPoolExecutor(12) as clients:
        answers = clients.map(lambda _: play(server, script, model="narrow"), range(24))
        assert [text_of(answer) for answer in answers] == ["a"] * 24
    assert (scripted.get("/peak/n2"), scripted.get("/peak/n1")) == (2, 1)
    assert get(server, "/stats/narrow")["capacity"] == 3


# Leaving, and time.


SILENCES = {
    "before the answer": [["silent"]],
    "before the first token": [["head"], ["silent"]],
    "after a token": [*TEXT, ["silent"]],
}


@pytest.mark.parametrize("silence", SILENCES)
def test_a_client_that_leaves_closes_the_upstreams_connection(server, scripted, silence, capsys):
    delays = []
    for _ in range(10):
        id = new_id()
        with Client(server.address) as client:
            ask(client, id, SILENCES[silence])
            scripted.records(id)
            if silence == "after a token":
                client.answer().read_until(b"Hel")
            left_at = client.close()
        record = scripted.records(id, at_least=2)[1]
        assert record["name"] == "left"
        delays.append(record["at"] - left_at)
    with capsys.disabled():
        p50, worst = median(delays) * 1000, max(delays) * 1000
        print(f"\nleave to close, {server.kind}, {silence}: p50 {p50:.1f} ms, max {worst:.1f} ms")
    assert max(delays) < NOTICE_SECONDS


def test_the_deadline_goes_upstream_and_ends_there(server, scripted):
    id = new_id()
    answer = play(server, [["silent"]], id=id, headers={"X-Request-Timeout": "0.4"})
    assert (answer.status, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    asked, left = scripted.records(id, at_least=2)
    assert 0.1 < float(asked["headers"]["x-request-timeout"]) <= 0.4
    assert left["at"] - asked["at"] < 0.4 + NOTICE_SECONDS


# What upstreams list.


def test_the_models_that_upstreams_list_are_on_offer(server, scripted):
    def listed():
        return [model["id"] for model in get(server, "/v1/models")["data"]]

    server.wait_for(lambda: {"l-model", "m-model", "shared-model"} <= set(listed()))
    assert listed()[0] == "one"
    id = new_id()
    assert text_of(play(server, HELLO, id=id, model="m-model")) == "Hello"
    asked = scripted.records(id)[0]
    assert (asked["upstream"], asked["body"]["model"]) == ("m", "m-model")
    ids = [new_id() for _ in range(4)]
    for id in ids:
        assert text_of(play(server, HELLO, id=id, model="shared-model")) == "Hello"
    assert {scripted.records(id)[0]["upstream"] for id in ids} == {"l", "m"}


# Many.


async def read_stream(address, id):
    """The text of a stream whose answer names it, and how it ended."""
    # However long it takes until all are there: then they stream together.
    script = [["crowd", STREAMS], ["head"], ["text", f"{id}: "], ["tokens", 20, 0.1], *HELLO[3:]]
    reader, writer = await asyncio.open_connection(*address)
    body = body_of(id, script)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    data = (await reader.read()).decode()
    writer.close()
    return "".join(re.findall(r'"content":"(.*?)"', data)), data.endswith("0\r\n\r\n")


@pytest.mark.timeout(120)
def test_a_thousand_streams_on_one_worker_without_a_thread_each(servers, scripted, capsys):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 3 * STREAMS:
        pytest.skip(f"{STREAMS} streams need more open files than `ulimit -n` allows.")
    server = servers("gevent")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    worker = Path(f"/proc/{children.read_text().split()[0]}")
    ids = [new_id() for _ in range(STREAMS)]
    most_threads = []

    async def read_all():
        reading = [asyncio.create_task(read_stream(server.address, id)) for id in ids]
        while not all(task.done() for task in reading):
            most_threads.append(len(list((worker / "task").iterdir())))
            await asyncio.sleep(0.2)
        return [task.result() for task in reading]

    began = monotonic()
    answers = asyncio.run(read_all())
    seconds = monotonic() - began
    numbers = "".join(f"{number} " for number in range(20))
    assert answers == [(f"{id}: {numbers}", True) for id in ids]
    assert max(most_threads) < 30
    assert scripted.get("/peak/a") == STREAMS
    with capsys.disabled():
        print(f"\n{STREAMS} streams of 21 tokens in {seconds:.1f} s, {max(most_threads)} threads")
