"""One upstream, from threads of this process: what goes there, and what its answers mean."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import sys
from time import monotonic

import pytest
from concurrency import Background, wait_until
from engine_fakes import error_of

from flask_llmstream import (
    ConfigurationError,
    Finish,
    InferenceRequest,
    InvalidRequestError,
    Message,
    QueueFullError,
    Reasoning,
    RequestTooLargeError,
    Token,
    ToolCall,
    ToolCallDelta,
    UnknownModelError,
    UpstreamBackend,
    UpstreamError,
    Usage,
)
from flask_llmstream.core.runtime import Interrupted

from .conftest import HELLO, Scripted, new_id, scripts

KEY = "sk-very-secret"


def document(**fields):
    return json.dumps(fields)


def refuse(status, body="", headers=None):
    return [["status", status, headers or {}, body]]


# What goes there.


def test_a_request_goes_there_as_it_is(play, scripted):
    id, handle = play(
        HELLO,
        options={"model": "theirs", "api_key": KEY, "headers": {"X-Team": "kitchen"}},
        fields={
            "model": "ours",
            "messages": [
                Message("system", "Be brief."),
                Message("assistant", "", tool_calls=[ToolCall("c1", "f", "{}")]),
                Message("tool", "42", tool_call_id="c1"),
            ],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "seed": 1,
            "stop": ["END"],
            "extra_body": {"min_p": 0.1, "model": "not this"},
        },
    )
    assert handle.get(10).text == "Hello"
    asked = scripted.records(id)[0]
    prompt = asked["body"]["messages"].pop()
    assert prompt["role"] == "user"
    assert asked["body"] == {
        "model": "theirs",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 1,
        "stop": ["END"],
        "min_p": 0.1,
    }
    headers = asked["headers"]
    assert headers["authorization"] == f"bearer {KEY}"
    assert headers["x-team"] == "kitchen"
    assert headers["x-request-id"] == id
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers


def test_what_is_left_of_the_deadline_goes_there(play, scripted):
    id, handle = play(HELLO, timeout_seconds=7.5)
    handle.get(10)
    assert 5 < float(scripted.records(id)[0]["headers"]["x-request-timeout"]) <= 7.5


def test_without_a_model_of_its_own_the_requests_id_is_sent(play, scripted):
    id, handle = play(HELLO, fields={"model": "ours"})
    handle.get(10)
    assert scripted.records(id)[0]["body"]["model"] == "ours"


def test_the_field_of_max_tokens_may_have_another_name(play, scripted):
    options = {"max_tokens_field": "max_completion_tokens"}
    id, handle = play(HELLO, options=options, fields={"max_tokens": 5})
    handle.get(10)
    body = scripted.records(id)[0]["body"]
    assert body["max_completion_tokens"] == 5
    assert "max_tokens" not in body


def test_one_callers_cookies_do_not_go_with_the_others(play, scripted):
    options = {}
    play([["head", {"Set-Cookie": "session=mine"}], *HELLO[1:]], options=options)[1].get(10)
    id, handle = play(HELLO, options=options)
    handle.get(10)
    assert "cookie" not in scripted.records(id)[0]["headers"]


def test_a_login_in_the_url_and_its_query_go_there(scripted):
    url = scripted.url().replace("//", "//me:pass@") + "?api-version=1"
    id = new_id()
    backend = UpstreamBackend(url)
    list(backend.generate(InferenceRequest(request_id=id, prompt=scripts(id, HELLO))))
    asked = scripted.records(id)[0]
    assert asked["headers"]["authorization"] == "basic bwu6cgfzcw=="  # Lower case here.
    assert asked["target"] == "/a/v1/chat/completions?api-version=1"


@pytest.mark.parametrize("url", ["", "gpu1:8000", "ftp://gpu1/v1", "http://", None])
def test_a_wrong_url_is_refused_without_repeating_it(url):
    with pytest.raises(ConfigurationError, match="base_url") as caught:
        UpstreamBackend(url)
    assert "gpu1" not in str(caught.value)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ConfigurationError, match="max_concurrency"):
        UpstreamBackend("http://gpu1/v1", max_concurrency=0)


def test_its_repr_tells_neither_address_nor_key():
    backend = UpstreamBackend("http://gpu1/v1", api_key=KEY, model="m")
    assert repr(backend) == "<UpstreamBackend m>"


# What comes back.


def test_every_kind_of_item_comes_back(play):
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a"'}}
    position = {
        "token": "b",
        "logprob": -0.5,
        "top_logprobs": [{"token": "b", "logprob": -0.5}, {"token": "c", "logprob": -2.0}],
    }

    def choice(**fields):
        return ["event", {"choices": [{"index": 0, **fields}]}]

    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    _, handle = play(
        [
            ["head"],
            ["chunk", ": a comment\n\n"],
            choice(delta={"role": "assistant", "content": ""}),
            choice(delta={"reasoning_content": "hm"}),
            choice(delta={"reasoning": "so"}),
            choice(delta={"content": "b"}, logprobs={"content": [position]}),
            choice(delta={"tool_calls": [call]}),
            choice(delta={"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
            choice(delta={}, finish_reason="tool_calls"),
            ["event", {"choices": [], "usage": usage}],
            ["done"],
            ["end"],
        ],
        fields={"logprobs": True, "top_logprobs": 2},
    )
    response = handle.get(10)
    assert handle.items == [
        Reasoning("hm"),
        Reasoning("so"),
        "b",
        ToolCallDelta(0, id="c1", name="f", arguments='{"a"'),
        ToolCallDelta(0, arguments=": 1}"),
        Usage(3, 4, cached_tokens=2, reasoning_tokens=1),
        Finish("tool_calls"),
    ]
    token = handle.items[2]
    assert isinstance(token, Token)
    assert (token.logprob, token.top_logprobs) == (-0.5, (("b", -0.5), ("c", -2.0)))
    assert response.tool_calls == (ToolCall("c1", "f", '{"a": 1}'),)
    assert response.usage == Usage(3, 4, cached_tokens=2, reasoning_tokens=1)


def test_several_choices_come_back(play):
    def text(index, text, reason=None):
        choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
        return ["event", {"choices": [choice]}]

    _, handle = play(
        [
            *(["head"], text(0, "a"), text(1, "x"), text(0, "b", "stop")),
            *(text(1, "y", "length"), ["done"], ["end"]),
        ],
        fields={"n": 2},
    )
    choices = handle.get(10).choices
    assert [(c.text, c.finish_reason) for c in choices] == [("ab", "stop"), ("xy", "length")]


def test_an_upstream_that_answers_whole_all_the_same(play):
    message = {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}
    body = document(
        choices=[{"index": 0, "message": message, "finish_reason": "length"}],
        usage={"prompt_tokens": 1, "completion_tokens": 2},
    )
    _, handle = play(refuse(200, body))
    response = handle.get(10)
    assert (response.text, response.choices[0].reasoning) == ("Hello", "hm")
    assert (response.finish_reason, response.usage) == ("length", Usage(1, 2))


# What its errors mean.


@pytest.mark.parametrize(
    ("status", "body", "kind", "code", "message"),
    [
        (
            400,
            document(error={"message": "Too long.", "code": "context_length_exceeded"}),
            InvalidRequestError,
            "context_length_exceeded",
            "Too long.",
        ),
        (400, document(error={"message": "No.", "code": 400}), InvalidRequestError, None, "No."),
        (400, document(error="No."), InvalidRequestError, None, "No."),
        (400, document(object="error", message="No."), InvalidRequestError, None, "No."),
        (422, document(detail=[{"msg": "missing"}]), InvalidRequestError, None, "missing"),
        (422, "[]", InvalidRequestError, None, "The upstream answered 422."),
        (400, "<html>", InvalidRequestError, None, "The upstream answered 400."),
        (413, document(error={"message": "Large."}), RequestTooLargeError, None, "Large."),
        (
            404,
            document(error={"message": "No such model.", "code": "model_not_found"}),
            UnknownModelError,
            None,
            "No such model.",
        ),
        (404, document(detail="Not Found"), UpstreamError, None, "The upstream answered 404."),
        (429, document(error={"message": "Slow."}), QueueFullError, None, "Slow."),
        (
            429,
            document(error={"message": "Slow.", "code": "rate_limit_exceeded"}),
            QueueFullError,
            "rate_limit_exceeded",
            "Slow.",
        ),
        (401, document(error={"message": "Wrong: sk-…"}), UpstreamError, None, "answered 401"),
        (403, document(error={"message": "No."}), UpstreamError, None, "answered 403"),
        (402, document(error={"message": "Pay."}), UpstreamError, None, "answered 402"),
        (307, "", UpstreamError, None, "answered 307"),
        (204, "", UpstreamError, None, "answered 204"),
        (500, "<html>It broke at gpu1</html>", UpstreamError, None, "answered 500"),
        (503, document(error={"message": "Loading"}), UpstreamError, None, "answered 503"),
        (200, document(error={"message": "Oh."}), UpstreamError, None, "Oh."),
        (200, document(choices=[]), UpstreamError, None, "no chat completion"),
        (200, document(choices=[{"message": {"content": "a"}}]), UpstreamError, None, "no chat"),
        (200, "{", UpstreamError, None, "no chat completion"),
    ],
)
def test_a_status_means(play, status, body, kind, code, message):
    _, handle = play(refuse(status, body))
    error = error_of(handle)
    assert type(error) is kind
    assert error.code == (code or kind.code)
    assert message in error.message
    assert not handle.items


def test_a_huge_error_is_not_read_to_its_end(play):
    _, handle = play(
        [
            *(["head", {"Content-Type": "text/html"}], ["chunk", "x" * 2_000_000]),
            ["silent"],
        ]
    )
    assert "something else" in error_of(handle).message
    body = document(error={"message": "y" * 50_000})
    error = error_of(play(refuse(400, body))[1])
    assert 1000 < len(error.message) < 3000
    error = error_of(play(refuse(400, "z" * 5_000_000))[1])
    assert error.message == "The upstream answered 400."


def test_an_error_whose_body_breaks_off_is_still_that_error(play):
    _, handle = play([["raw", "HTTP/1.1 400 Bad\r\nContent-Length: 100\r\n\r\n{"], ["close"]])
    assert isinstance(error_of(handle), InvalidRequestError)


@pytest.mark.parametrize("retry_after", ["3", "2.5", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_retry_after_reaches_the_caller(play, retry_after):
    _, handle = play(refuse(429, "", {"Retry-After": retry_after}), timeout_seconds=2)
    assert error_of(handle).retry_after >= 2


@pytest.mark.parametrize("retry_after", ["soon", "-1", "0", "nan", "Fri, 99 Dec", ""])
def test_a_retry_after_that_says_nothing_is_none(play, retry_after):
    _, handle = play(refuse(429, "", {"Retry-After": retry_after}))
    assert error_of(handle).retry_after is None


def test_an_endless_retry_after_is_a_day(play):
    _, handle = play(refuse(429, "", {"Retry-After": "inf"}))
    assert error_of(handle).retry_after <= 86400


def test_neither_address_nor_key_reaches_the_caller_or_the_log(play, scripted, caplog):
    caplog.set_level(logging.INFO)
    port = str(scripted.address[1])
    said = f"At {scripted.url()}/chat on 127.0.0.1:{port} with {KEY} by LOCALHOST, EMPTY is empty."
    body = document(error={"message": said})
    in_band = [["head"], ["event", {"error": {"message": said}}]]
    for script in (refuse(400, body), refuse(401, body), refuse(500, body), in_band):
        message = error_of(play(script, options={"api_key": KEY})[1]).message
        for text in (message, caplog.text):
            assert port not in text
            assert KEY not in text
            assert "127.0.0.1" not in text
    assert "is empty" in message
    assert "prompt" not in caplog.text


# Streams that break.


TEXT = [["head"], ["text", "Hel"]]


@pytest.mark.parametrize(
    "script",
    [
        [*TEXT, ["close"]],
        [*TEXT, ["reset"]],
        [*TEXT, ["end"]],
        [*TEXT, ["finish"], ["close"]],
        [*TEXT, ["finish"], ["end"]],
        [*TEXT, ["finish"], ["chunk", "data: [DON"], ["close"]],
        [*TEXT, ["raw", "5\r\nab"], ["close"]],
        [*TEXT, ["raw", "not a chunk\r\n"], ["close"]],
        [["raw", "HTTP/1.0 200 OK\r\n\r\n"], ["raw", 'data: {"choices":[]}\n\n'], ["close"]],
    ],
)
def test_a_stream_without_its_terminal_marker_is_incomplete(play, script):
    _, handle = play(script)
    error = error_of(handle)
    assert (type(error), error.code) == (UpstreamError, "stream_incomplete")
    assert not any(isinstance(item, Finish) for item in handle.items)


@pytest.mark.parametrize(
    ("event", "kind", "code"),
    [
        ({"error": {"message": "Oh.", "code": 500}}, UpstreamError, "upstream_error"),
        ({"error": {"message": "Oh.", "code": 400}}, InvalidRequestError, "invalid_request"),
        ({"error": {"message": "Oh.", "code": 429}}, QueueFullError, "queue_full"),
        ({"error": {"message": "Oh.", "code": "invalid_api_key"}}, UpstreamError, None),
        ({"choices": 1}, UpstreamError, "upstream_error"),
        ([], UpstreamError, "upstream_error"),
        ({"choices": [{"delta": {"content": 1}}]}, UpstreamError, "upstream_error"),
    ],
)
@pytest.mark.parametrize("text", [[], [["text", "Hel"]]])
def test_an_error_in_the_stream_is_in_band(play, event, kind, code, text):
    _, handle = play([["head"], *text, ["event", event], ["done"], ["end"]])
    error = error_of(handle)
    assert type(error) is kind
    assert error.code == code or code is None
    assert len(handle.items) == len(text)


@pytest.mark.parametrize("garbage", ["data: {\n\n", "data: \x00\n\n", "\xff\xfe\n\ndata: 1\n\n"])
def test_garbage_is_no_answer(play, garbage):
    _, handle = play([["head"], ["raw", f"{len(garbage):x}\r\n{garbage}\r\n"], ["end"]])
    assert isinstance(error_of(handle), UpstreamError)


@pytest.mark.parametrize(
    "script", [[["close"]], [["reset"]], [["raw", "SSH-2.0-OpenSSH\r\n\r\n"], ["close"]]]
)
def test_a_connection_that_breaks_before_the_answer(play, script):
    error = error_of(play(script)[1])
    assert (type(error), error.code, error.retryable) == (UpstreamError, "upstream_error", True)


def test_nobody_there():
    backend = UpstreamBackend("http://127.0.0.1:9/v1")
    with pytest.raises(UpstreamError, match="cannot be reached"):
        list(backend.generate(InferenceRequest(prompt="x")))


# Its time.


SILENT = [["silent"]]


@pytest.mark.parametrize("script", [SILENT, [["head"], ["silent"]], [*TEXT, ["silent"]]])
def test_a_cancel_closes_the_connection_and_logs_nothing(play, scripted, caplog, script):
    id, handle = play(script)
    scripted.records(id)
    wait_until(lambda: len(handle.items) == sum(verb == "text" for verb, *_ in script))
    at = monotonic()
    handle.cancel()
    left = scripted.records(id, at_least=2)[1]
    assert left["name"] == "left"
    assert left["at"] - at < 0.5
    wait_until(lambda: not handle.engine.is_in_backend)
    assert not caplog.records


@pytest.mark.parametrize("script", [SILENT, [["head"], ["silent"]], [*TEXT, ["silent"]]])
def test_a_deadline_closes_the_connection(play, scripted, caplog, script):
    id, handle = play(script, timeout_seconds=0.3)
    assert error_of(handle).code == "deadline_exceeded"
    assert scripted.records(id, at_least=2)[1]["name"] == "left"
    wait_until(lambda: not handle.engine.is_in_backend)
    assert not caplog.records


def test_an_upstream_that_ignores_the_close_frees_the_worker(play):
    _, handle = play([*TEXT, ["deaf", 5]])
    wait_until(lambda: handle.items)
    at = monotonic()
    handle.cancel()
    wait_until(lambda: not handle.engine.is_in_backend)
    assert monotonic() - at < 1


def test_an_upstream_that_does_not_end_its_answer(play):
    began = monotonic()
    _, handle = play([*HELLO[:-1], ["silent"]])
    assert handle.get(10).text == "Hello"
    assert monotonic() - began < 2


def test_slow_pieces_are_put_together(play):
    event = json.dumps({"choices": [{"delta": {"content": "ü"}}]}, ensure_ascii=False)
    pieces = [["sleep", 0.01], ["chunk", "data: "], ["chunk", event[:20]], ["sleep", 0.01]]
    script = [["head"], *pieces, ["chunk", event[20:]], ["chunk", "\r\n\r\n"], *HELLO[3:]]
    assert play(script)[1].get(10).text == "ü"


# TLS, whose socket is another one.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    path = folder / "server.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    try:
        subprocess.run(
            [*command.split(), "-keyout", folder / "key", "-out", folder / "cert"],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("There is no openssl to make a certificate with.")
    path.write_bytes((folder / "cert").read_bytes() + (folder / "key").read_bytes())
    return str(path)


def test_a_cancel_reaches_a_thread_that_waits_on_tls(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    upstream = Scripted(certificate)
    try:
        backend = UpstreamBackend(upstream.url().replace("http:", "https:"))

        class Control:
            is_over = timed_out = False

            def on_cancel(self, function):
                self.cancel = function

        control, id = Control(), new_id()
        prompt = scripts(id, [*TEXT, ["silent"]])
        request = InferenceRequest(prompt=prompt, request_id=id, control=control)
        generator = backend.generate(request)
        assert next(generator) == "Hel"
        reading = Background(lambda: next(generator))
        thread = reading._thread.ident
        wait_until(lambda: sys._current_frames()[thread].f_code.co_filename == ssl.__file__)
        control.is_over = True
        control.cancel()
        with pytest.raises(Interrupted):
            reading.result()
    finally:
        upstream.kill()
