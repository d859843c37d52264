"""What the routes of Responses keep, for whom and how much, and what they refuse."""

import json

import pytest
from concurrency import wait_until
from flask_apps import make_app, scripted

from flask_llmstream import LLMStream, PermissionDeniedError, Reasoning
from flask_llmstream.core import runtime
from flask_llmstream.stores import MemoryStore
from flask_llmstream.testing import ScriptedBackend

ALICE = {"Authorization": "Bearer secret"}
KEYS = {"alice": "secret"}
PATH = "/v1/responses"


def client_of(llm, **settings):
    app = make_app(llm, **settings)
    app.register_blueprint(llm.openai_blueprint())
    return app.test_client()


def make_client(*script, **settings):
    llm, _ = scripted(*(script or ("Hi",)))
    return client_of(llm, **settings)


def ask(client, path=PATH, headers=None, **fields):
    return client.post(path, json={"input": "Hi", **fields}, headers=headers)


def new_id(client, **fields):
    return ask(client, **fields).json["id"]


def is_kept(client, id, path=PATH):
    return client.get(f"{path}/{id}").status_code == 200


def events_of(body):
    """(id, payload) of each event of an SSE stream; comments are left out."""
    events = []
    for block in body.split("\n\n")[:-1]:
        lines = [line.split(": ", 1) for line in block.split("\n") if not line.startswith(":")]
        fields = dict(lines)
        events.append((fields.get("id"), json.loads(fields["data"])))
    return events


# How much is kept.


def test_the_oldest_responses_make_room():
    client = make_client(stored_responses=2)
    ids = [new_id(client) for _ in range(3)]

    assert [is_kept(client, id) for id in ids] == [False, True, True]


def test_large_responses_make_room_sooner():
    client = make_client("x" * 2000, stored_bytes=14_000)
    ids = [new_id(client) for _ in range(4)]

    assert [is_kept(client, id) for id in ids] == [False, False, True, True]


def test_a_response_is_kept_for_a_while():
    client = make_client(stored_seconds=0.001)
    id = new_id(client)

    wait_until(lambda: not is_kept(client, id))


def test_nothing_is_kept_where_that_is_set():
    client = make_client(stored_responses=0)
    answer = ask(client).json

    assert answer["store"] is False
    assert not is_kept(client, answer["id"])
    refused = ask(client, background=True)
    assert (refused.status_code, refused.json["error"]["param"]) == (400, "background")


def test_a_blueprint_has_limits_and_responses_of_its_own():
    llm, _ = scripted("Hi")
    app = make_app(llm)
    app.register_blueprint(llm.openai_blueprint())
    small = llm.openai_blueprint(name="small", stored_responses=1)
    app.register_blueprint(small, url_prefix="/small")
    client = app.test_client()
    ids = [ask(client, "/small/responses").json["id"] for _ in range(2)]

    assert [is_kept(client, id, "/small/responses") for id in ids] == [False, True]
    assert not is_kept(client, ids[1])
    assert is_kept(client, new_id(client))


# For whom.


def test_nothing_is_kept_for_who_cannot_be_told_again():
    class Nobody:
        pass

    llm, _ = scripted("Hi")
    llm.identity_loader(Nobody)
    client = client_of(llm)
    answer = ask(client).json

    assert answer["store"] is False
    assert not is_kept(client, answer["id"])
    assert ask(client, background=True).status_code == 400


def test_whose_it_is_was_said_before_the_app_completed_the_request():
    llm, _ = scripted("Hi")

    @llm.before_submit
    def as_somebody_else(request):
        request.identity = "the team"
        return request

    client = client_of(llm)

    assert is_kept(client, new_id(client))
    id = new_id(client, background=True)
    wait_until(lambda: client.get(f"{PATH}/{id}").json["status"] == "completed")
    assert client.get(f"{PATH}/{id}?stream=true").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("post", PATH),
        ("get", f"{PATH}/resp_1"),
        ("delete", f"{PATH}/resp_1"),
        ("get", f"{PATH}/resp_1/input_items"),
        ("post", f"{PATH}/resp_1/cancel"),
    ],
)
def test_every_route_asks_for_a_key(method, path):
    client = make_client(api_keys=KEYS)

    assert client.open(path, method=method.upper()).status_code == 401
    status = client.open(path, method=method.upper(), headers=ALICE, data=b"{}").status_code
    assert status == (400 if path == PATH else 404)


# Framings.


def test_a_stream_is_framed_as_accept_has_it():
    client = make_client(Reasoning("Hm"), "Hi")

    lines = ask(client, stream=True, headers={"Accept": "application/x-ndjson"})
    assert lines.content_type == "application/x-ndjson"
    assert json.loads(lines.text.splitlines()[-1])["type"] == "response.completed"
    assert ask(client, stream=True, headers={"Accept": "text/plain"}).text == "Hi"


@pytest.mark.parametrize("accept", ["text/plain", "application/x-ndjson"])
def test_what_is_in_the_background_streams_as_sse_alone(accept):
    client = make_client()
    refused = ask(client, background=True, stream=True, headers={"Accept": accept})
    assert refused.status_code == 406

    id = new_id(client, background=True)
    again = client.get(f"{PATH}/{id}?stream=true", headers={"Accept": accept})
    assert again.status_code == 406


def test_head_shows_what_get_would_and_streams_nothing():
    client = make_client()
    id = new_id(client, background=True)
    answer = client.head(f"{PATH}/{id}?stream=true")

    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert answer.data == b""


@pytest.mark.parametrize("query", ["stream=true&starting_after=x", "stream=true&starting_after=-1"])
def test_a_number_that_is_none_is_refused(query):
    client = make_client()
    id = new_id(client, background=True)
    answer = client.get(f"{PATH}/{id}?{query}")

    assert (answer.status_code, answer.json["error"]["param"]) == (400, "starting_after")


# The background.


def test_what_is_refused_is_not_in_the_background(gate):
    llm, backend = scripted("a", gate)
    client = client_of(llm, worker_threads=1, queue_size=0, backpressure="reject")
    first = new_id(client, background=True)
    backend.started.wait()

    refused = ask(client, background=True)

    assert (refused.status_code, refused.json["error"]["code"]) == (429, "queue_full")
    assert "Retry-After" in refused.headers
    assert is_kept(client, first)


def test_the_app_s_own_checks_come_first():
    llm, backend = scripted("Hi")

    @llm.permission_check
    def nobody(identity, request):
        raise PermissionDeniedError("Not for you.")

    client = client_of(llm)

    assert ask(client, background=True).status_code == 403
    assert not backend.requests


def test_what_cannot_be_recorded_does_not_run_unseen(gate):
    llm, backend = scripted(gate)
    client = client_of(llm, resume_bytes=1)

    refused = ask(client, background=True)

    assert (refused.status_code, refused.json["error"]["code"]) == (500, "engine_error")
    wait_until(lambda: all(request.cancelled for request in backend.requests))


def test_a_background_stream_begins_before_its_first_token(gate):
    llm, _ = scripted(gate, "Hi")
    client = client_of(llm)
    response = ask(client, background=True, stream=True)

    events = events_of(next(response.iter_encoded()).decode())

    assert [event["type"] for _, event in events] == ["response.created", "response.queued"]
    gate.open()
    assert response.get_data().endswith(b"\n\n")


def test_a_background_response_needs_no_reader(gate):
    client = make_client("a", gate, "b")
    response = ask(client, background=True, stream=True)
    id = events_of(next(response.iter_encoded()).decode())[0][1]["response"]["id"]
    response.close()
    gate.open()

    wait_until(lambda: client.get(f"{PATH}/{id}").json["status"] == "completed")
    (message,) = client.get(f"{PATH}/{id}").json["output"]
    assert message["content"][0]["text"] == "ab"


def test_a_response_may_be_over_before_it_is_known_to_run(monkeypatch):
    monkeypatch.setattr(runtime, "spawn", lambda record: record())
    client = make_client("Hi")
    answer = ask(client, background=True).json

    assert answer["status"] == "completed"
    assert ask(client, previous_response_id=answer["id"]).status_code == 200


# Streams that are resumed.


def test_a_response_is_resumed_by_the_id_of_its_last_event():
    client = make_client("a", "b", resume_seconds=30)
    events = events_of(ask(client, stream=True).text)
    (last, _), rest = events[4], events[5:]

    again = ask(client, stream=True, headers={"Last-Event-ID": last})

    assert events_of(again.text) == rest
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))


class AbsentStore(MemoryStore):
    """One that is not there for the first who reads it."""

    has_been_asked = False

    def read_after(self, stream_id, position):
        was_asked, self.has_been_asked = self.has_been_asked, True
        return super().read_after(stream_id, position) if was_asked else None


def test_a_reader_s_own_error_is_no_part_of_the_response():
    llm = LLMStream(store=AbsentStore())
    llm.add_backend("m", ScriptedBackend("a", "b"))
    # Too little for a burst, so that its reader needs the store.
    client = client_of(llm, resume_seconds=30, channel_bytes=100)
    *seen, (no_id, error) = events_of(ask(client, stream=True).text)
    assert (no_id, error["code"], error["sequence_number"]) == (None, "slow_reader", 0)

    again = ask(client, stream=True, headers={"Last-Event-ID": seen[-1][0]})

    events = [event for _, event in [*seen, *events_of(again.text)]]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"]["status"] == "completed"
