"""What the worker class must leave as it was: sizes, order, TLS, middleware, other gunicorns."""

from __future__ import annotations

import logging
import re
import ssl
import subprocess
from types import SimpleNamespace

import pytest

from flask_llmstream.hub_writer import HubWriter
from flask_llmstream.responses import StreamBody

from .asking import ask, on
from .process import COMMANDS, Process, Server
from .wire import Client

TOKENS, TOKEN_BYTES = 20_000, 500
"""10 MB: more than a connection's buffers hold, with a small one at our end."""


def start_hub(*arguments, app="server.app:create_app()"):
    command = [app if part == "server.app:create_app()" else part for part in COMMANDS["hub"]]
    return Process([*command, *arguments])


@on("hub", "gevent")
def test_a_reader_that_rests_gets_every_byte_in_order(server):
    """The hub's sends go only half way then, and the greenlet takes over again and again."""
    with server.client(receive_buffer=4096) as client:
        id = ask(client, ["flood", TOKENS, TOKEN_BYTES])
        answer = client.answer()
        while answer.read():
            if len(answer.pieces) % 50 == 0:
                server.control.progress(id)  # A round trip to the server, in which we don't read.
    assert answer.ending == "complete"
    assert [event["index"] for event in answer.objects()[:TOKENS]] == list(range(TOKENS))
    assert answer.tokens() == "x" * TOKENS * TOKEN_BYTES
    assert answer.events()[-1] == "[DONE]"


@pytest.mark.parametrize("kind", ["hub", "gevent"])
def test_the_access_log_counts_the_bodys_bytes(kind):
    server = Server(kind, "--access-logfile", "-", "--access-logformat", "sent=%(B)s for %(U)s")
    try:
        with server.client() as client:
            id = ask(client, ["emit", "ä"], ["gate"], ["emit", "b"], ["gate"], ["emit", "c"])
            answer = client.answer()
            for gate in (0, 1):
                answer.read_until(b'"index":%d' % gate)
                server.control.open_gate(id, gate)
            answer.read_all()
        found = server.wait_for(lambda: re.search(r"sent=(\d+) for /stream", server.log))
        assert int(found[1]) == len(answer.body)
    finally:
        server.kill()


def test_streams_over_tls_are_written_by_their_greenlets(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    server = start_hub("--keyfile", str(key), "--certfile", str(certificate))
    try:
        context = ssl.create_default_context(cafile=certificate)
        with Client(server.address) as client:
            client._socket = context.wrap_socket(client._socket, server_hostname="localhost")
            ask(client, ["flood", 2000, 100])
            answer = client.answer().read_all()
        assert answer.ending == "complete"
        assert answer.tokens() == "x" * 200_000
    finally:
        server.kill()


def test_a_body_that_a_middleware_wraps_is_its_own():
    server = start_hub(app="server.app:create_shouting_app()")
    try:
        with Client(server.address) as client:
            ask(client, ["emit", "a"], ["emit", "b"], headers={"Accept": "text/plain"})
            answer = client.answer().read_all()
        assert (answer.ending, answer.text) == ("complete", "AB")
    finally:
        server.kill()


class Response:
    """gunicorn's, as far as it counts here."""

    response_length = None
    chunked = True
    sent = 0
    _omits_body = False
    sock = None


def test_what_takes_a_greenlet_has_no_hub_writer():
    class WithLength(Response):
        response_length = 5

    class HTTP2Response(Response):
        pass

    WithLength.__name__ = "Response"
    assert HubWriter.of(WithLength()) is None
    assert HubWriter.of(HTTP2Response()) is None
    assert HubWriter.of(Response()) is None  # No socket of gevent's: TLS, say.


def test_an_unknown_gunicorn_is_left_alone_with_one_warning(caplog):
    from flask_llmstream.gunicorn import _Outermost

    class Response:
        response_length = None

        def start_response(self, status, headers):
            pass

    body = StreamBody.__new__(StreamBody)
    body._is_closed = True
    body.writer = None
    app = _Outermost(lambda environ, start_response: body)
    with caplog.at_level(logging.WARNING, "flask_llmstream"):
        for _ in range(2):
            assert app({}, Response().start_response) is body

    assert body.writer is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "StreamingGeventWorker" in caplog.text


def test_other_responses_pass_untouched():
    from flask_llmstream.gunicorn import _Outermost

    answer = [b"Hi"]

    assert _Outermost(lambda environ, start_response: answer)({}, SimpleNamespace()) is answer
