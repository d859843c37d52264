"""A stream as it is on the wire, under every server."""

from __future__ import annotations

import json

import pytest

from .asking import ask, on
from .conftest import KINDS

KEEP_ALIVE_KINDS = ("gevent", "hub", "gthread", "pywsgi")


@on(*KINDS)
@pytest.mark.parametrize("model", ["thread", "greenlet"])
def test_each_token_arrives_before_the_next_is_let_out(server, model):
    with server.client() as client:
        id = ask(
            client, ["emit", "a "], ["gate"], ["emit", "b "], ["gate"], ["emit", "c"], model=model
        )
        answer = client.answer()
        assert answer.status == 200
        answer.read_until(b'"a "')
        assert answer.tokens() == "a "
        server.control.open_gate(id, 0)
        answer.read_until(b'"b "')
        assert answer.tokens() == "a b "
        server.control.open_gate(id, 1)
        answer.read_all()
    assert answer.tokens() == "a b c"
    assert answer.events()[-1] == "[DONE]"
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.ending == "complete"
    assert answer.raw.endswith(b"\r\n0\r\n\r\n")


@on(*KINDS)
def test_the_headers_of_a_stream(server):
    with server.client() as client:
        id = ask(client, ["emit", "a"])
        answer = client.answer().read_all()
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] == id
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in answer.headers
    names = [name.lower() for name, _ in answer.fields]
    assert sorted(names) == sorted(set(names))  # No hop-by-hop header of ours beside the server's.


@on(*KINDS)
@pytest.mark.parametrize(
    ("accept", "content_type", "body"),
    [
        ("*/*", "text/event-stream", None),
        ("text/event-stream", "text/event-stream", None),
        ("application/x-ndjson", "application/x-ndjson", None),
        ("text/plain", "text/plain; charset=utf-8", "äbc".encode()),
    ],
)
def test_accept_picks_the_framing(server, accept, content_type, body):
    with server.client() as client:
        ask(client, ["emit", "ä"], ["emit", "bc"], headers={"Accept": accept})
        answer = client.answer().read_all()
    assert answer.headers["content-type"] == content_type
    assert answer.ending == "complete"
    if body is not None:
        assert answer.body == body
    elif "ndjson" in content_type:
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert "".join(line["token"] for line in lines) == "äbc"
        assert [line["done"] for line in lines] == [False, False, True]
    else:
        assert answer.tokens() == "äbc"


@on(*KINDS)
def test_a_document_is_whole_and_declares_its_length(server):
    with server.client() as client:
        id = ask(client, ["emit", "ab"], ["emit", "c"], stream=False)
        answer = client.answer().read_all()
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert "x-accel-buffering" not in answer.headers
    assert answer.json()["text"] == "abc"
    assert answer.json()["id"] == answer.headers["x-request-id"] == id


@on(*KINDS)
def test_accept_without_anything_that_we_have_is_406(server):
    with server.client() as client:
        id = ask(client, ["emit", "a"], headers={"Accept": "image/png"})
        answer = client.answer().read_all()
    assert answer.status == 406
    assert answer.json()["error"]["code"] == "not_acceptable"
    assert server.control.events(id) == []


@on("gevent", "hub", "sync")
def test_a_request_id_that_could_forge_a_header_or_a_log_line_is_replaced(server):
    with server.client() as client:
        ask(client, ["emit", "a"], headers={"X-Request-ID": "no spaces, no commas"})
        answer = client.answer().read_all()
    assert answer.headers["x-request-id"].isalnum()
    assert answer.objects()[0]["id"] == answer.headers["x-request-id"]


@on(*KINDS)
def test_http_1_0_is_framed_by_eof(server):
    with server.client() as client:
        ask(client, ["emit", "a "], ["emit", "b"], version="1.0")
        answer = client.answer().read_all()
    assert answer.status == 200
    assert answer.tokens() == "a b"
    assert answer.events()[-1] == "[DONE]"
    if server.kind != "werkzeug":  # It answers HTTP/1.0 with chunks, whatever the app does.
        assert "transfer-encoding" not in answer.headers
        assert answer.ending == "eof"


@on(*KEEP_ALIVE_KINDS)
def test_the_connection_is_used_again_after_a_stream(server):
    with server.client() as client:
        for text in ("one", "two", "three"):
            ask(client, ["emit", text])
            answer = client.answer().read_all()
            assert (answer.tokens(), answer.ending) == (text, "complete")
        client.ask("GET", "/ping")
        assert client.answer().read_all().text == "pong"


@on(*KEEP_ALIVE_KINDS)
def test_a_request_sent_ahead_waits_for_the_end_of_the_stream(server):
    with server.client() as client:
        first = ask(client, ["emit", "first"], ["gate"], ["emit", "."])
        answer = client.answer()
        answer.read_until(b'"first"')
        ask(client, ["emit", "second"])
        client.ask("GET", "/ping")
        server.control.open_gate(first)
        assert answer.read_all().tokens() == "first."
        assert client.answer().read_all().tokens() == "second"
        assert client.answer().read_all().text == "pong"


@on(*KINDS)
def test_an_error_before_the_first_token_has_its_own_status(server):
    with server.client() as client:
        id = ask(client, ["raise", "scripted, and secret"])
        answer = client.answer().read_all()
    assert answer.status == 500
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["code"] == "engine_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == id


@on(*KINDS)
@pytest.mark.parametrize("model", ["thread", "greenlet"])
def test_a_backend_cannot_end_the_server(server, model):
    with server.client() as client:
        ask(client, ["exit"], model=model)
        answer = client.answer().read_all()
        assert (answer.status, answer.json()["error"]["code"]) == (500, "engine_error")
    with server.client() as client:
        ask(client, ["emit", "a"], model=model)
        assert client.answer().read_all().tokens() == "a"


@on(*KEEP_ALIVE_KINDS)
def test_the_connection_is_used_again_after_an_error(server):
    with server.client() as client:
        ask(client, ["raise", "scripted"])
        assert client.answer().read_all().status == 500
        ask(client, ["emit", "a"], ["raise", "scripted"])
        assert client.answer().read_all().ending == "complete"
        ask(client, ["emit", "a"])
        assert client.answer().read_all().tokens() == "a"


@on(*KINDS)
@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
def test_an_error_after_a_token_is_in_band_and_the_transfer_ends_well(server, accept):
    with server.client() as client:
        id = ask(client, ["emit", "a"], ["raise", "scripted"], headers={"Accept": accept})
        answer = client.answer().read_all()
    assert answer.status == 200
    *_, last = answer.text.strip().split("\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert b"DONE" not in answer.body
    assert b'"done":true' not in answer.body
    assert answer.ending == "complete"
    assert server.control.wait(id, "finished")["code"] == "engine_error"


@on(*KINDS)
def test_plain_text_that_fails_is_cut_off(server):
    with server.client() as client:
        ask(client, ["emit", "a"], ["raise", "scripted"], headers={"Accept": "text/plain"})
        answer = client.answer().read_all()
    assert answer.body == b"a"
    assert answer.ending in ("eof", "reset")
    assert b"0\r\n\r\n" not in answer.raw


@on(*KINDS)
def test_openai_s_errors_look_like_openai_s(server):
    body = json.dumps({"model": "none", "messages": [{"role": "user", "content": "?"}]}).encode()
    with server.client() as client:
        client.ask("POST", "/v1/chat/completions", body=body)
        answer = client.answer().read_all()
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@on(*KINDS)
def test_a_body_that_is_too_large_is_413(server):
    body = b" " * (2 * 1024 * 1024)
    with server.client() as client:
        client.ask("POST", "/v1/chat/completions", body=body)
        answer = client.answer().read_all()
    assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")


@on(*KINDS)
def test_head_submits_nothing(server):
    with server.client() as client:
        id = ask(client, ["emit", "a"], method="HEAD")
        answer = client.answer(has_body=False).read_all()
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert "content-length" not in answer.headers  # GET would be chunked.
    with server.client() as client:
        ask(client, ["emit", "a"], method="GET")
        assert client.answer().read_all().tokens() == "a"
    assert server.control.events(id) == []


@on(*KINDS)
@pytest.mark.parametrize(
    ("how", "status"), [("exception", 500), ("abort", 418), ("drop", 200), ("replace", 200)]
)
@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_answer_that_the_app_drops_is_cancelled(server, how, status, as_tokens):
    steps = (["emit", "a"], ["until_cancelled"])
    with server.client() as client:
        id = ask(client, *steps, path=f"/after/{how}", as_tokens=as_tokens)
        assert client.answer().read_all().status == status
    server.control.wait(id, "cancelled")
    assert server.control.wait(id, "signalled")["text"] == "a"
    if not as_tokens:
        assert server.control.wait(id, "finished")["code"] == "cancelled"


@on(*KINDS)
def test_tokens_that_the_view_drops_are_cancelled_at_once(server):
    with server.client() as client:
        ask(client, ["emit", "a"], ["until_cancelled"], path="/drop-first")
        answer = client.answer().read_all()
    assert (answer.status, answer.text) == (200, "a")


@on(*KINDS)
@pytest.mark.parametrize(
    ("steps", "headers", "code", "text"),
    [
        ((["emit", "a"], ["emit", "b"]), {}, None, "ab"),
        ((["emit", "a"], ["raise", "scripted"]), {}, "engine_error", "a"),
        ((["emit", "a"], ["stuck", 0.6]), {"X-Request-Timeout": "0.2"}, "deadline_exceeded", "a"),
    ],
)
def test_the_outcome_is_told_once_in_an_app_context(server, steps, headers, code, text):
    with server.client() as client:
        id = ask(client, *steps, headers=headers)
        client.answer().read_all()
    server.control.wait(id, "signalled")
    server.control.wait(id, "closed")
    (finished,) = server.control.events(id, "finished")
    assert (finished["code"], finished["text"], finished["app"]) == (code, text, "server.app")
    (signalled,) = server.control.events(id, "signalled")
    assert signalled["text"] == text


@on(*KINDS)
def test_the_outcome_of_a_client_that_left_has_the_text_so_far(server):
    with server.client() as client:
        id = ask(client, ["emit", "a "], ["emit", "b"], ["until_cancelled"])
        client.answer().read_until(b'"b"')
        client.reset()
    server.control.wait(id, "signalled")
    (finished,) = server.control.events(id, "finished")
    assert (finished["code"], finished["text"]) == ("cancelled", "a b")


@on(*KINDS)
def test_what_fails_before_anything_was_sent_is_told_too(server):
    with server.client() as client:
        id = ask(client, ["raise", "scripted"])
        client.answer().read_all()
    assert server.control.wait(id, "finished")["code"] == "engine_error"
    server.control.wait(id, "signalled")
    assert len(server.control.events(id, "finished")) == 1
