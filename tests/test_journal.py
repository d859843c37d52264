"""One line in the log for each request that is over."""

import json
import logging
import re

import pytest
from concurrency import wait_until
from flask_apps import chat, make_app, scripted

from flask_llmstream import (
    InferenceEngineEnhanced,
    InferenceHandle,
    InferenceRequest,
    LLMStream,
    Outcome,
    RequestCancelledError,
    UpstreamError,
    Usage,
)
from flask_llmstream.journal import is_kept, note
from flask_llmstream.testing import ScriptedBackend

HI = InferenceRequest(prompt="a secret question", request_id="r1")


@pytest.fixture
def lines(caplog):
    """The fields of each line so far."""
    caplog.set_level(logging.INFO, "flask_llmstream")

    def lines():
        records = [record for record in caplog.records if hasattr(record, "llmstream")]
        assert {(record.name, record.levelno) for record in records} <= {
            ("flask_llmstream", logging.INFO)
        }
        return [record.llmstream for record in records]

    return lines


def only(lines):
    wait_until(lines)
    (fields,) = lines()
    return fields


def without_times(fields):
    return {name: value for name, value in fields.items() if not name.endswith("seconds")}


def app_of(llm, **settings):
    app = make_app(llm, **settings)
    app.register_blueprint(llm.openai_blueprint())
    app.add_url_rule("/", "view", lambda: llm.stream(HI))
    return app


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_has_a_line(lines, stream):
    llm, _ = scripted("Hel", "lo", Usage(3, 2))
    response = (
        app_of(llm)
        .test_client()
        .post("/v1/chat/completions", json=chat(stream=stream), headers={"X-Request-ID": "r1"})
    )
    assert response.text
    response.close()
    fields = only(lines)
    assert without_times(fields) == {
        "request_id": "r1",
        "model": "m",
        "route": "openai.chat_completions",
        "outcome": "completed",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    assert 0 <= fields["queue_seconds"] <= fields["first_token_seconds"] <= fields["seconds"] < 10


def test_a_line_is_logfmt_and_has_no_text_of_anybody(lines, caplog):
    llm, _ = scripted("a secret ", "answer")
    app_of(llm).test_client().get("/").close()
    assert lines()
    (message,) = [each for each in caplog.messages if each.startswith("finished ")]
    assert message.startswith("finished request_id=r1 model=m route=view outcome=completed ")
    names = [field.partition("=")[0] for field in message.split()[1:]]
    assert names == list(lines()[0])
    assert "secret" not in caplog.text
    json.dumps(lines())


def test_code_outside_of_a_request_has_lines_without_a_route(lines):
    llm, _ = scripted("Hi")
    with make_app(llm).app_context():
        assert llm.complete(HI).text == "Hi"
        assert list(llm.tokens(HI)) == ["Hi"]
    assert [fields["outcome"] for fields in lines()] == ["completed"] * 2
    assert all("route" not in fields for fields in lines())


def test_a_client_that_leaves_has_a_line_with_what_there_was(lines, gate):
    llm, _ = scripted("Hel", gate, "lo")
    response = app_of(llm).test_client().get("/")
    next(response.iter_encoded())
    response.close()
    fields = only(lines)
    assert without_times(fields) == {
        "request_id": "r1",
        "model": "m",
        "route": "view",
        "outcome": "cancelled",
        "code": "cancelled",
        "cause": "client_left",
        "completion_tokens": 1,
    }
    assert fields["first_token_seconds"] <= fields["seconds"]


def test_what_never_started_has_no_first_token(lines, gate):
    llm, _ = scripted(gate)
    app = app_of(llm, worker_threads=1)
    with app.app_context():
        busy = llm.engine_of("m").submit(HI)
    gate.reached.wait()
    response = app.test_client().get("/", headers={"X-Request-Timeout": "0.05"})
    assert response.status_code == 504
    fields = only(lines)
    assert (fields["outcome"], fields["code"]) == ("timed_out", "deadline_exceeded")
    assert (fields["completion_tokens"], "first_token_seconds" in fields) == (0, False)
    assert 0.04 < fields["queue_seconds"] <= fields["seconds"]
    gate.open()
    busy.get(10)


def test_a_cancel_by_id_has_its_cause(lines, gate):
    llm, _ = scripted("Hel", gate, "lo")
    client = app_of(llm).test_client()
    response = client.get("/")
    client.delete("/v1/streams/r1")
    response.get_data()
    response.close()
    assert (only(lines)["outcome"], only(lines)["cause"]) == ("cancelled", "by_id")


def test_a_failure_has_the_code_that_its_client_was_told(lines):
    error = UpstreamError("why")
    error.code = "insufficient_quota"
    llm, _ = scripted("Hel", error)
    app_of(llm).test_client().get("/").close()
    assert (only(lines)["outcome"], only(lines)["code"]) == ("failed", "insufficient_quota")
    assert "cause" not in only(lines)


def test_what_was_refused_is_no_request_that_ended(lines):
    llm, _ = scripted("Hi")
    client = app_of(llm, api_keys="secret").test_client()
    assert client.post("/v1/chat/completions", json=chat()).status_code == 401
    key = {"Authorization": "Bearer secret"}
    assert client.post("/v1/chat/completions", json={}, headers=key).status_code == 400
    with client.application.app_context():
        llm.engine_of("m").shutdown(timeout_seconds=0)
    assert client.post("/v1/chat/completions", json=chat(), headers=key).status_code == 503
    assert lines() == []


def test_each_who_shares_a_run_has_a_line(lines, gate):
    engine = InferenceEngineEnhanced()
    engine.register_model("m", ScriptedBackend(gate, "Hi"))
    llm = LLMStream()
    llm.add_engine(engine, models=["m"])
    with make_app(llm).app_context():
        for _ in range(2):
            gate.open()
            llm.complete(InferenceRequest(prompt="x"))
    assert [fields["outcome"] for fields in lines()] == ["completed"] * 2
    assert lines()[1]["queue_seconds"] == 0  # From the cache.
    engine.shutdown(timeout_seconds=10)


def test_who_leaves_a_shared_run_has_a_line_of_its_own(gate):
    engine = InferenceEngineEnhanced()
    engine.register_model("m", ScriptedBackend("Hel", gate, "lo"))
    handles = [engine.submit(InferenceRequest(prompt="x", model="m")) for _ in range(2)]
    gate.reached.wait()
    joined, first = (handle.progress for handle in reversed(handles))
    assert joined.tokens == first.tokens == 1
    for name in ("queue", "first_token"):
        assert 0 <= joined.timings[name] < first.timings[name]
    gate.open()
    engine.shutdown(timeout_seconds=10)


def test_a_response_that_was_never_sent_has_its_line_all_the_same(lines, gate):
    llm, _ = scripted("Hel", gate, "lo")
    app = make_app(llm)
    app.add_url_rule("/", view_func=lambda: llm.stream(HI) and "something else")
    assert app.test_client().get("/").text == "something else"
    assert only(lines)["cause"] == "response_dropped"


def test_the_line_comes_though_a_receiver_fails(lines):
    def fail(outcome):
        raise RuntimeError("The database is down.")

    llm, _ = scripted("Hi")
    app = make_app(llm)
    app.add_url_rule("/", view_func=lambda: llm.stream(HI, on_finish=fail))
    app.test_client().get("/").close()
    assert only(lines)["outcome"] == "completed"


def test_without_a_reader_of_the_log_it_costs_nothing(caplog):
    logging.getLogger("flask_llmstream").setLevel(logging.WARNING)
    try:
        assert not is_kept()
        llm, _ = scripted("Hi")
        with make_app(llm).app_context():
            llm.complete(HI)
    finally:
        logging.getLogger("flask_llmstream").setLevel(logging.NOTSET)
    assert not [record for record in caplog.records if hasattr(record, "llmstream")]


# The line itself.

FORGERIES = [
    "m\nfinished request_id=forged",
    "m outcome=completed",
    'm" outcome="completed',
    "m\r",
    "m\u2028x",
    "m\x85x",
    "m\x1b[31m",
    "m\x7f",
    "m\ud800",
    "m=x",
    "m\\",
    " ",
]


def message_of(caplog, **changed):
    caplog.set_level(logging.INFO, "flask_llmstream")
    handle = InferenceHandle(changed.pop("id", "r"), cancel=print)
    outcome = Outcome(
        **{
            "request": InferenceRequest(prompt="x", model=changed.pop("model", "m")),
            "text": "",
            "finish_reason": None,
            "error": RequestCancelledError("why"),
            "usage": None,
            "response": None,
            **changed,
        }
    )
    note(outcome, handle, route="r", seconds=0.12345)
    return caplog.messages[-1]


def parsed(message):
    """The fields of a line, which has nothing else."""
    fields = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|[^" ]+)', message)
    assert "".join(f" {name}={value}" for name, value in fields) == message.removeprefix("finished")
    assert len(dict(fields)) == len(fields)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in fields}


@pytest.mark.parametrize("name", FORGERIES, ids=ascii)
def test_no_name_makes_a_line_or_a_field_of_its_own(caplog, name):
    code = UpstreamError("why")
    code.code = name
    for field, changed in (
        ("model", {"model": name}),
        ("request_id", {"id": name}),
        ("code", {"error": code}),
    ):
        message = message_of(caplog, **changed)
        assert message.isascii()
        assert message.isprintable()
        assert parsed(message)[field] == name
        assert list(parsed(message)) == list(caplog.records[-1].llmstream)


def test_plain_names_stay_as_they_are(caplog):
    assert " model=Qwen/Qwen3-32B:q4@x " in message_of(caplog, model="Qwen/Qwen3-32B:q4@x")
    assert message_of(caplog).endswith(" seconds=0.1235")


def test_an_end_that_nobody_told_yet_is_called_so(caplog):
    assert " outcome=unknown " in message_of(caplog, error=None)


def test_a_record_factory_of_the_app_s_may_have_names_of_its_own(caplog):
    """`logging` refuses an extra name that a record has already."""
    before = logging.getLogRecordFactory()

    def factory(*arguments, **keywords):
        record = before(*arguments, **keywords)
        record.request_id = record.model = record.outcome = "the app's"
        return record

    logging.setLogRecordFactory(factory)
    try:
        assert "request_id=r" in message_of(caplog)
    finally:
        logging.setLogRecordFactory(before)
