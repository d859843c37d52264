"""Streams that break on the wire, read on by `StreamReader`: the text is exact."""

import json
from contextlib import contextmanager
from itertools import count

import httpx
import pytest
from cutting_proxy import cutting
from flask_apps import chat, make_app, scripted, serving

from flask_llmstream import Backoff, IncompleteStreamError, StreamReader
from flask_llmstream.testing import Gate

WORDS = ("Hel", "lo, ", "\u2028 wörld", " 😀", "\n\n", "data: [DONE]", " and", " more")
TEXT = "".join(WORDS)
AT_ONCE = Backoff(first_seconds=0.0, attempts=3)


class Service:
    """An app behind a proxy that cuts its connections, asked again and again."""

    def __init__(self, backend, proxy, client):
        self.backend = backend
        self.proxy = proxy
        self.asked = 0
        self._client = client

    def connect(self, last_event_id=""):
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        body = chat(stream=True)
        path = "/v1/chat/completions"
        with self._client.stream("POST", path, json=body, headers=headers) as response:
            response.raise_for_status()
            yield from response.iter_bytes()

    def reader(self, **options):
        self.asked += 1
        return StreamReader(
            self.connect(), **{"reconnect": self.connect, "backoff": AT_ONCE, **options}
        )

    def read(self, *cuts, **options):
        """The text, and the error, where connections break after so many bytes each."""
        self.proxy.cuts[:] = cuts
        text = ""
        with self.reader(**options) as reader:
            try:
                for event in reader:
                    text += text_of(event)
            except IncompleteStreamError as error:
                return text, error
        return text, None


def text_of(event):
    return json.loads(event.data)["choices"][0]["delta"].get("content", "")


@contextmanager
def serve(*script, **settings):
    llm, backend = scripted(*script)
    app = make_app(llm, resume_seconds=30, **settings)
    app.register_blueprint(llm.openai_blueprint())
    with (
        serving(app) as url,
        cutting(url) as proxy,
        # A new connection for each request, so that each can be cut.
        httpx.Client(
            base_url=proxy.url, limits=httpx.Limits(max_keepalive_connections=0)
        ) as client,
    ):
        yield Service(backend, proxy, client)


@pytest.fixture(scope="module")
def service():
    with serve(*WORDS) as service:
        yield service


@pytest.fixture(params=[False, True], ids=["FIN", "RST"])
def resets(request, service):
    service.proxy.resets = request.param
    yield
    service.proxy.resets = False


@pytest.mark.usefixtures("resets")
def test_a_stream_that_breaks_anywhere_on_the_wire_is_read_on(service):
    resumed = 0
    for cut in count(0, 37):
        before = service.proxy.connections
        text, error = service.read(cut)
        if service.proxy.connections == before + 1 and error is None:
            break  # The marker was through.
        if error is None:
            resumed += 1
            assert text == TEXT
        else:
            assert text == ""  # Its first event had not come.
    assert resumed > 50
    # However often it broke, the model was asked once.
    assert len(service.backend.requests) <= service.asked


@pytest.mark.usefixtures("resets")
def test_a_stream_may_break_again_and_again(service):
    connections = service.proxy.connections
    # The headers of a response, and one or two events.
    assert service.read(*range(700, 1500, 50)) == (TEXT, None)
    assert service.proxy.connections > connections + 4


def test_without_being_asked_for_nothing_is_read_on(service):
    text, error = service.read(1500, reconnect=None)
    assert text
    assert TEXT.startswith(text)
    assert error is not None


def test_it_gives_up_where_there_is_no_progress(service):
    connections = service.proxy.connections
    text, error = service.read(1500, 0, 300, 400, 500)
    assert TEXT.startswith(text)
    assert isinstance(error.__cause__, httpx.HTTPError)
    assert service.proxy.connections == connections + 4


def test_a_stream_that_is_not_kept_is_not_tried_for_again(service):
    connections = service.proxy.connections
    text, error = service.read(1500, reconnect=lambda _: service.connect("0" * 32 + ".1"))
    assert TEXT.startswith(text)
    assert error.__cause__.response.status_code == 404
    assert service.proxy.connections == connections + 2


def test_an_answer_that_is_not_made_yet_is_waited_for_on_the_new_connection():
    gate = Gate()
    with serve("Hel", gate, "lo", heartbeat_seconds=0.05) as service:

        def connect(last_event_id):
            for chunk in service.connect(last_event_id):
                gate.open()  # The server has said that it waits, with us.
                yield chunk

        with service.reader(reconnect=connect) as reader:
            text = text_of(next(reader)) + text_of(next(reader))
            assert text == "Hel"
            service.proxy.break_all()
            assert text + "".join(map(text_of, reader)) == "Hello"
        assert service.proxy.connections == 2
        assert len(service.backend.requests) == 1
