"""What the tests of the Flask side share: small apps, and readers of their answers."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager

from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from flask_llmstream import LLMStream
from flask_llmstream.testing import ScriptedBackend

WAIT_SECONDS = 10.0


def make_app(llm, **settings):
    """An app with *llm*; *settings* are ``LLMSTREAM_…`` values by their lower-case names."""
    app = Flask("tests")
    app.testing = True  # What nobody handles fails the test, instead of a 500.
    app.config.update({f"LLMSTREAM_{name.upper()}": value for name, value in settings.items()})
    llm.init_app(app)
    return app


def scripted(*script, model="m", **options):
    """An `LLMStream` with one scripted backend, and that backend."""
    llm = LLMStream()
    backend = ScriptedBackend(*script, **options)
    llm.add_backend(model, backend)
    return llm, backend


def chat(text="Hi", **fields):
    """A chat completion's body."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def data_of(body):
    """The payloads of an SSE stream: objects, and the string ``[DONE]``."""
    payloads = []
    for event in body.split("\n\n"):
        if event.startswith("data: "):
            text = event.removeprefix("data: ")
            payloads.append(text if text == "[DONE]" else json.loads(text))
    return payloads


def tokens_of(body):
    """The text of the package's own SSE stream, joined."""
    return "".join(event.get("token", "") for event in data_of(body) if isinstance(event, dict))


class _QuietHandler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, code="-", size="-"):
        pass


@contextmanager
def serving(app):
    """
    *app* behind Werkzeug's own server, a thread a connection; gives its address.

    What the server logs is an error that the app let through: it fails the test.
    """
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_QuietHandler)
    server.daemon_threads = True
    errors = []
    server.log = lambda level, message, *args: errors.append(message % args if args else message)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(WAIT_SECONDS)
        server.server_close()
    assert not errors, errors[0]
