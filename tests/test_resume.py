"""Streams that are picked up where they broke: exactly once, by their own reader."""

import json
import re
from time import sleep

import pytest
from concurrency import wait_until
from flask import abort, request
from flask_apps import chat, make_app, scripted, serving
from openai import OpenAI

from flask_llmstream import InferenceRequest, LLMStream, UpstreamError
from flask_llmstream.stores import MemoryStore
from flask_llmstream.testing import ScriptedBackend

ALICE = {"Authorization": "Bearer secret"}
BOB = {"Authorization": "Bearer other"}
KEYS = {"alice": "secret", "bob": "other"}
PATH = "/v1/chat/completions"


class Service:
    """An app with one scripted model, and a client that may leave and come back."""

    def __init__(self, *script, **settings):
        self.llm, self.backend = scripted(*script)
        settings = {"resume_seconds": 30, "api_keys": KEYS, **settings}
        self.app = make_app(self.llm, **settings)
        self.app.register_blueprint(self.llm.openai_blueprint())
        self.client = self.app.test_client()

    def ask(self, last=None, headers=ALICE, **fields):
        if last is not None:
            headers = {**headers, "Last-Event-ID": last}
        return self.client.post(PATH, json=chat(stream=True, **fields), headers=headers)

    @property
    def runs(self):
        return len(self.backend.requests)


def events_of(body):
    """(id, payload) of each event; comments are left out."""
    events = []
    for block in body.split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        assert list(fields) == ["id", "data"], block
        events.append((fields["id"], fields["data"]))
    return events


def texts_of(events):
    chunks = [json.loads(data) for _, data in events if data != "[DONE]"]
    return [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]


def is_told(backend):
    """Whether the backend of the only run knows that nobody wants more."""
    return backend.requests[0].cancelled


def test_events_are_numbered_under_an_id_that_nobody_guesses():
    events = events_of(Service("Hel", "lo").ask().text)

    ids = [id.split(".") for id, _ in events]
    assert [int(number) for _, number in ids] == [1, 2, 3, 4, 5]
    assert len({stream for stream, _ in ids}) == 1
    assert re.fullmatch(r"[0-9a-f]{32}", ids[0][0])
    assert texts_of(events) == ["", "Hel", "lo", ""]
    assert events[-1][1] == "[DONE]"


def test_without_the_setting_there_are_no_ids():
    service = Service("Hi", resume_seconds=0)
    text = service.ask().text

    assert "id: " not in text
    assert service.ask(last="0" * 32 + ".1").text.endswith("[DONE]\n\n")
    assert service.runs == 2


def test_whoever_comes_back_gets_the_rest_from_every_place():
    service = Service("a", "b", "c")
    events = events_of(service.ask().text)

    for number, (id, _) in enumerate(events[:-1], 1):
        assert events_of(service.ask(last=id).text) == events[number:]
    assert service.runs == 1


def test_at_the_end_there_is_nothing_more_to_come_for():
    service = Service("a")
    last = events_of(service.ask().text)[-1][0]

    answer = service.ask(last=last)

    assert (answer.status_code, answer.data) == (204, b"")


def test_the_model_goes_on_while_nobody_reads(gate):
    service = Service("a", gate, "b")
    first = service.ask()
    frames = first.iter_encoded()
    read = b""
    while b'"a"' not in read:
        read += next(frames)
    first.close()
    gate.open()
    service.backend.closed.wait()

    rest = service.ask(last=events_of(read.decode())[-1][0])

    events = events_of(rest.text)
    assert texts_of(events) == ["b", ""]
    assert events[-1][1] == "[DONE]"


def test_whoever_comes_back_early_reads_on_live(gate):
    service = Service("a", gate, "b")
    first = service.ask()
    read = next(first.iter_encoded()).decode()
    last = events_of(read)[0][0]
    first.close()

    second = service.ask(last=last)
    frames = second.iter_encoded()
    assert texts_of(events_of(next(frames).decode()))[-1] == "a"
    gate.open()

    assert texts_of(events_of(b"".join(frames).decode())) == ["b", ""]


@pytest.mark.parametrize("heartbeat_seconds", [0, 60])
def test_whoever_comes_back_has_the_status_at_once(gate, heartbeat_seconds):
    service = Service("a", gate, "b", heartbeat_seconds=heartbeat_seconds)
    first = service.ask()
    frames = first.iter_encoded()
    read = b""
    while b'"a"' not in read:
        read += next(frames)

    again = service.ask(last=events_of(read.decode())[-1][0])

    frames = again.iter_encoded()
    assert next(frames) == b": ping\n"
    gate.open()
    assert texts_of(events_of(b"".join(frames).decode())) == ["b", ""]


def test_two_may_read_one_stream(gate):
    service = Service("a", gate, "b")
    first = service.ask()
    frames = first.iter_encoded()
    last = events_of(next(frames).decode())[0][0]
    second = service.ask(last=last)
    first.close()
    gate.open()

    assert "".join(texts_of(events_of(second.text))) == "ab"


def test_a_run_that_nobody_comes_back_for_ends(gate):
    service = Service("a", gate, "b", resume_seconds=0.1)
    response = service.ask()
    read = next(response.iter_encoded())
    assert not is_told(service.backend)
    response.close()

    wait_until(lambda: is_told(service.backend))
    gate.open()
    last = events_of(read.decode())[0][0]
    wait_until(lambda: service.ask(last=last).status_code == 404)


def test_who_left_before_the_first_event_cannot_come_back(gate):
    service = Service(gate, "a", heartbeat_seconds=0.05)
    response = service.ask()
    assert next(response.iter_encoded()) == b": ping\n"
    response.close()

    wait_until(lambda: is_told(service.backend))


def test_a_response_that_is_dropped_ends_its_run(gate):
    service = Service("a", gate)

    @service.app.get("/dropped")
    def drop():
        service.llm.stream(InferenceRequest(prompt="p"))
        abort(500)

    assert service.client.get("/dropped").status_code == 500
    wait_until(lambda: is_told(service.backend))


@pytest.mark.parametrize("headers", [BOB, {**ALICE, "Authorization": "Bearer wrong"}])
def test_a_stream_is_its_own_readers_alone(headers):
    service = Service("a")
    last = events_of(service.ask().text)[0][0]

    answer = service.ask(last=last, headers=headers)

    assert answer.status_code == (404 if headers == BOB else 401)
    assert "content" not in answer.text


def test_a_stream_under_way_is_its_own_readers_alone(gate):
    service = Service("a", gate)
    response = service.ask()
    last = events_of(next(response.iter_encoded()).decode())[0][0]

    assert service.ask(last=last, headers=BOB).status_code == 404
    response.close()


@pytest.mark.parametrize("position", ["5", "6", "999999999999999"])
def test_a_place_that_the_stream_never_had_is_unknown(position):
    service = Service("a")
    stream = events_of(service.ask().text)[0][0].split(".")[0]

    assert service.ask(last=f"{stream}.{position}").status_code == 404


def test_an_unknown_stream_is_a_404_and_no_new_run():
    service = Service("a")

    answer = service.ask(last="0" * 32 + ".1")

    assert answer.status_code == 404
    assert answer.json["error"]["code"] == "stream_not_found"
    assert service.runs == 0


@pytest.mark.parametrize("last", ["", "7", "x" * 500, "é", "0" * 32, "0" * 32 + ".-1"])
def test_an_id_that_is_not_ours_means_nothing(last):
    assert Service("a").ask(last=last).text.endswith("[DONE]\n\n")


def test_an_error_in_the_middle_is_kept_like_any_event():
    service = Service("a", UpstreamError("Gone."))
    events = events_of(service.ask().text)
    assert "error" in json.loads(events[-1][1])

    assert events_of(service.ask(last=events[0][0]).text) == events[1:]


def test_an_error_before_the_first_token_has_its_status():
    service = Service(UpstreamError("Down."))

    answer = service.ask()

    assert (answer.status_code, answer.json["error"]["code"]) == (502, "upstream_error")


def test_an_error_after_the_first_ping_is_in_the_stream(gate):
    service = Service(gate, UpstreamError("Down."), heartbeat_seconds=0.05)
    response = service.ask()
    frames = response.iter_encoded()
    assert next(frames) == b": ping\n"
    gate.open()

    assert b'"upstream_error"' in b"".join(frames)


def test_an_empty_answer_is_whole():
    events = events_of(Service().ask().text)

    assert [data for _, data in events][-1] == "[DONE]"


@pytest.mark.parametrize(
    ("accept", "ends"), [("application/x-ndjson", '{"done":true}\n'), ("text/plain", "Hi")]
)
def test_other_framings_have_no_ids(accept, ends):
    service = Service("Hi")
    answer = service.ask(headers={**ALICE, "Accept": accept})

    assert answer.text.endswith(ends)
    assert "id: " not in answer.text


def test_what_the_store_cannot_keep_is_streamed_all_the_same():
    service = Service("x" * 5000, "end", resume_bytes=4000)
    events = events_of(service.ask().text)

    assert events[-1][1] == "[DONE]"
    assert service.ask(last=events[0][0]).status_code == 404


def test_an_identity_without_a_form_streams_without_ids():
    service = Service("Hi")
    service.llm.identity_loader(object)

    text = service.ask().text

    assert text.endswith("[DONE]\n\n")
    assert "id: " not in text


def test_a_store_of_ones_own_is_used():
    store = MemoryStore()
    llm = LLMStream(store=store)
    llm.add_backend("m", ScriptedBackend("Hi"))
    app = make_app(llm, resume_seconds=30)
    app.register_blueprint(llm.openai_blueprint())
    events = events_of(app.test_client().post(PATH, json=chat(stream=True)).text)

    stream = events[0][0].split(".")[0]
    assert store.read_after(stream, -1)[-1] == b""
    assert len(store.read_after(stream, 0)) == len(events) + 1


def test_a_view_of_ones_own_is_resumed_as_eventsource_does_it():
    llm, backend = scripted("a", "b")
    app = make_app(llm, resume_seconds=30)

    @app.get("/ask")
    def ask():
        return llm.stream(InferenceRequest(prompt=request.args["q"]))

    client = app.test_client()
    body = client.get("/ask?q=Hi").text
    first, *rest = body.split("\n\n")
    last = first.split("\n")[0].removeprefix("id: ")

    again = client.get("/ask?q=Hi", headers={"Last-Event-ID": last})

    assert again.text == "\n\n".join(rest)
    assert len(backend.requests) == 1


def test_the_outcome_is_told_once_when_the_run_ends(gate):
    llm, _ = scripted("a", gate, "b")
    app = make_app(llm, resume_seconds=30)
    outcomes = []

    @app.get("/ask")
    def ask():
        return llm.stream(InferenceRequest(prompt="p"), on_finish=outcomes.append)

    response = app.test_client().get("/ask")
    next(response.iter_encoded())
    response.close()
    assert outcomes == []
    gate.open()

    wait_until(lambda: outcomes)
    assert [(outcome.text, outcome.error) for outcome in outcomes] == [("ab", None)]


def test_the_official_client_minds_neither_ids_nor_pings():
    service = Service(heartbeat_seconds=0.02)

    @service.llm.backend("slow")
    def answer_slowly(request):
        yield "Hel"
        sleep(0.2)  # Several pings long.
        yield "lo"

    raw = service.ask(model="slow").text
    assert ": ping\nid: " in raw
    assert ": ping\n\n" not in raw
    with serving(service.app) as url, OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
        stream = client.chat.completions.create(
            model="slow", stream=True, messages=[{"role": "user", "content": "Hi"}]
        )
        texts = [chunk.choices[0].delta.content or "" for chunk in stream]

    assert "".join(texts) == "Hello"
