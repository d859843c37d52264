"""`llm.stats()`: each request that was accepted, counted once, by how it ended."""

import gc
import logging
import os
import socket
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest
from concurrency import Background, wait_until
from flask_apps import chat, make_app, scripted, serving

from flask_llmstream import (
    AsyncInferenceEngine,
    ConfigurationError,
    InferenceEngineEnhanced,
    InferenceRequest,
    LLMStream,
    ServerShutdownError,
    request_finished,
)
from flask_llmstream.engines.ledger import new_figures
from flask_llmstream.testing import ScriptedBackend

HI = InferenceRequest(prompt="Hi")


def figures(**changed):
    return {**new_figures(), **changed}


def check_sum(each):
    """Every accepted request is in exactly one place."""
    places = [each[name] for name in ("queued", "active", "completed", "dropped", "slow_readers")]
    for name in ("cancelled", "timed_out", "failed"):
        places += each[name].values()
    assert each["accepted"] == sum(places), each
    assert min(places) >= 0, each


class Stream:
    """The client's end of a GET, which may be left at any time."""

    def __init__(self, url, headers):
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=10)
        lines = ["GET / HTTP/1.0", *(f"{name}: {value}" for name, value in headers.items())]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())
        self._file = self._socket.makefile("r", encoding="utf-8")

    def read_until(self, field):
        """The value of the next *field* of an event."""
        for line in self._file:
            if line.startswith(f"{field}: "):
                return line.removeprefix(f"{field}: ").strip()
        raise AssertionError(f"the stream ended without {field}")

    def rest(self):
        return self._file.read()

    def close(self):
        self._file.close()
        self._socket.close()


@contextmanager
def opened(url, headers=()):
    with closing(Stream(url, dict(headers))) as stream:
        yield stream


class Served:
    """An app with one model ``m``, its figures, and ways to ask it."""

    def __init__(self, llm, **settings):
        self.llm = llm
        self.app = make_app(llm, **settings)
        self.app.register_blueprint(llm.openai_blueprint())
        self.app.add_url_rule("/", view_func=lambda: llm.stream(HI))
        self.client = self.app.test_client()

    @property
    def stats(self):
        with self.app.app_context():
            stats = self.llm.stats()
        for each in [stats["total"], *stats["models"].values()]:
            check_sum(each)
        return stats

    @property
    def figures(self):
        """The model's, which are all there are."""
        stats = self.stats
        assert stats["models"] == {"m": stats["total"]}
        return stats["total"]

    def expect(self, **expected):
        """Wait until the figures are these, and nothing else is counted."""
        wait_until(lambda: not self.figures["active"] or expected.get("active"))
        assert self.figures == figures(**expected)

    def engine(self):
        with self.app.app_context():
            return self.llm.engine_of("m")


def served(*script, **settings):
    llm, _ = scripted(*script)
    return Served(llm, **settings)


# Their form.


def test_without_a_request_every_model_has_figures():
    llm = LLMStream()
    assert Served(llm).stats == {"pid": os.getpid(), "total": new_figures(), "models": {}}
    llm.add_backend("a", ScriptedBackend())
    llm.add_backend("b", ScriptedBackend())
    assert Served(LLMStream()).stats["models"] == {}
    assert Served(llm).stats["models"] == {"a": new_figures(), "b": new_figures()}


def test_models_have_figures_of_their_own_and_a_total():
    llm, _ = scripted("Hi", model="a")
    llm.add_backend("b", ScriptedBackend(ValueError("as planned")))
    each = Served(llm)
    for model in ("a", "b", "a"):
        each.client.post("/v1/chat/completions", json=chat(model=model))
    stats = each.stats
    assert stats["models"] == {
        "a": figures(accepted=2, completed=2),
        "b": figures(accepted=1, failed={"engine_error": 1}),
    }
    assert stats["total"] == figures(accepted=3, completed=2, failed={"engine_error": 1})


def test_models_of_one_engine_are_told_apart_and_counted_once():
    llm = LLMStream()
    llm.add_engine(AsyncInferenceEngine(ScriptedBackend("Hi")), models=["a", "b"])
    each = Served(llm)
    for model in ("a", "b", "a"):
        each.client.post("/v1/chat/completions", json=chat(model=model))
    assert each.stats["models"] == {
        "a": figures(accepted=2, completed=2),
        "b": figures(accepted=1, completed=1),
    }
    assert each.stats["total"]["accepted"] == 3


def test_an_engine_of_one_s_own_need_not_tell():
    class Quiet:
        pass

    llm = LLMStream()
    llm.add_engine(Quiet(), models=["quiet"])
    assert Served(llm).stats["models"] == {"quiet": new_figures()}


def test_it_needs_an_app():
    with pytest.raises(ConfigurationError, match="no current app"):
        LLMStream().stats()


# Every end.


def test_a_stream_under_way_is_active_and_then_completed(gate):
    each = served("Hel", gate, "lo")
    response = each.client.get("/")
    assert each.figures == figures(accepted=1, active=1)
    gate.open()
    assert "[DONE]" in response.text
    each.expect(accepted=1, completed=1)


def test_what_waits_is_queued(gate):
    each = served(gate, "Hi", worker_threads=1)
    first = each.engine().submit(InferenceRequest(prompt="Hi", model="m"))
    gate.reached.wait()
    each.engine().submit(InferenceRequest(prompt="Hi", model="m"))
    assert each.figures == figures(accepted=2, active=1, queued=1)
    gate.open()
    first.get(10)
    each.expect(accepted=2, completed=2)


def test_what_is_refused_before_the_engine_is_not_counted():
    each = served("Hi")
    assert each.client.post("/v1/chat/completions", json={}).status_code == 400
    assert each.client.post("/v1/chat/completions", json=chat(model="x")).status_code == 404
    assert each.figures == new_figures()


def test_a_client_that_leaves_after_the_first_token(gate):
    each = served("Hel", gate, "lo")
    with serving(each.app) as url, opened(url) as stream:
        stream.read_until("data")
    each.expect(accepted=1, cancelled={"client_left": 1})


def test_a_client_that_leaves_before_the_first_token(gate):
    each = served(gate, "Hi")
    with serving(each.app) as url, opened(url):
        gate.reached.wait()
    each.expect(accepted=1, cancelled={"client_left": 1})


def test_a_client_that_leaves_while_it_waits(gate):
    each = served(gate, "Hi", worker_threads=1)
    busy = each.engine().submit(InferenceRequest(prompt="Hi", model="m"))
    with serving(each.app) as url, opened(url):
        wait_until(lambda: each.figures["queued"])
    wait_until(lambda: not each.figures["queued"])
    assert each.figures == figures(accepted=2, active=1, cancelled={"client_left": 1})
    gate.open()
    busy.get(10)


def test_a_cancel_by_id(gate):
    each = served("Hel", gate, "lo")
    response = each.client.get("/")
    id = response.headers["X-Request-ID"]
    assert each.client.delete(f"/v1/streams/{id}").status_code == 200
    assert '"cancelled"' in response.text
    each.expect(accepted=1, cancelled={"by_id": 1})


def test_a_response_that_the_app_drops(gate):
    each = served("Hel", gate, "lo")

    @each.app.get("/drops")
    def drops():
        each.llm.stream(HI)
        return "something else"

    assert each.client.get("/drops").text == "something else"
    gc.collect()
    each.expect(accepted=1, cancelled={"response_dropped": 1})


def test_tokens_that_the_app_does_not_want(gate):
    each = served("Hel", gate, "lo")
    with each.app.test_request_context():
        tokens = each.llm.tokens(HI)
        next(tokens)
        tokens.close()
    each.expect(accepted=1, cancelled={"app": 1})


@pytest.mark.parametrize(
    ("script", "settings", "header", "code"),
    [
        ([], {}, "0.05", "deadline_exceeded"),
        (["Hel"], {}, "0.3", "deadline_exceeded"),
        ([], {"first_token_seconds": 0.05}, None, "first_token_timeout"),
        (["Hel"], {"idle_seconds": 0.05}, None, "idle_timeout"),
    ],
    ids=["total, before", "total, after", "first token", "idle"],
)
def test_every_budget_has_its_name(gate, script, settings, header, code):
    each = served(*script, gate, "lo", **settings)
    headers = {} if header is None else {"X-Request-Timeout": header}
    assert code in each.client.get("/", headers=headers).text
    each.expect(accepted=1, timed_out={code: 1})


def test_a_deadline_while_it_waits(gate):
    each = served(gate, "Hi", worker_threads=1)
    busy = each.engine().submit(InferenceRequest(prompt="Hi", model="m"))
    gate.reached.wait()
    assert each.client.get("/", headers={"X-Request-Timeout": "0.05"}).status_code == 504
    assert each.figures == figures(accepted=2, active=1, timed_out={"deadline_exceeded": 1})
    gate.open()
    busy.get(10)


def test_a_slow_reader_is_an_end_of_its_own():
    each = served(*["x" * 60_000] * 400, slow_reader_seconds=0.3)
    with serving(each.app) as url, opened(url):
        wait_until(lambda: each.figures["slow_readers"])
    assert each.figures == figures(accepted=1, slow_readers=1)


def test_a_backend_that_fails_before_and_after_the_first_token():
    for script in ([ValueError("as planned")], ["Hel", ValueError("as planned")]):
        each = served(*script)
        assert "engine_error" in each.client.get("/").text
        each.expect(accepted=1, failed={"engine_error": 1})


def test_what_is_dropped_for_a_newer_one(gate):
    each = served(gate, "Hi", worker_threads=1, queue_size=1, backpressure="drop_oldest")
    handles = []
    for _ in range(3):
        handles.append(each.engine().submit(InferenceRequest(prompt="Hi", model="m")))
        gate.reached.wait()
    assert each.figures == figures(accepted=3, active=1, queued=1, dropped=1)
    gate.open()
    handles[2].get(10)
    each.expect(accepted=3, completed=2, dropped=1)


def test_what_finds_no_place_was_not_accepted(gate):
    each = served(gate, "Hi", worker_threads=1, queue_size=0, backpressure="reject")
    busy = each.engine().submit(InferenceRequest(prompt="Hi", model="m"))
    gate.reached.wait()
    assert each.client.get("/").status_code == 429
    assert each.figures == figures(accepted=1, active=1, rejected={"queue_full": 1})
    gate.open()
    busy.get(10)


def test_who_is_blocked_is_not_accepted_yet(gate):
    each = served(gate, "Hi", worker_threads=1, queue_size=0)
    busy = each.engine().submit(InferenceRequest(prompt="Hi", model="m"))
    gate.reached.wait()
    asking = Background(lambda: each.client.get("/").status_code)
    wait_until(lambda: each.figures["blocked"])
    assert each.figures == figures(accepted=1, active=1, blocked=1)
    gate.open()
    busy.get(10)
    assert asking.result() == 200
    each.expect(accepted=2, completed=2)


def test_a_shutdown_fails_what_it_cannot_finish(gate):
    each = served("Hel", gate, "lo")
    response = each.client.get("/")
    error = ServerShutdownError("The server is shutting down.")
    each.engine().refuse(error)
    each.engine().end_all(error)
    assert "server_shutdown" in response.text
    assert each.client.get("/").status_code == 503
    each.expect(accepted=1, failed={"server_shutdown": 1}, rejected={"server_shutdown": 1})


def test_who_joins_another_one_s_run_is_no_run(gate):
    engine = InferenceEngineEnhanced()
    engine.register_model("m", ScriptedBackend(gate, "Hi"))
    llm = LLMStream()
    llm.add_engine(engine, models=["m"])
    each = Served(llm)

    def ask():
        return each.client.post("/v1/chat/completions", json=chat()).status_code

    asking = [Background(ask) for _ in range(3)]
    wait_until(lambda: each.figures["joined"] == 2)
    assert each.figures == figures(accepted=1, active=1, joined=2)
    gate.open()
    assert {each.result() for each in asking} == {200}
    assert ask() == 200
    each.expect(accepted=1, completed=1, joined=2, cache_hits=1)
    engine.shutdown(timeout_seconds=10)


def test_prompts_that_are_asked_together_are_accepted_together_or_not_at_all(gate, caplog):
    each = served(gate, "Hi", worker_threads=1, queue_size=0, backpressure="reject")
    told = []
    caplog.set_level(logging.INFO, "flask_llmstream")
    with request_finished.connected_to(
        lambda app, outcome: told.append(outcome.error.cause), sender=each.app
    ):
        body = {"prompt": ["a", "b"], "stream": True}
        assert each.client.post("/v1/completions", json=body).status_code == 429
    assert each.figures == figures(
        accepted=1, cancelled={"other_part": 1}, rejected={"queue_full": 1}
    )
    assert told == ["other_part"]
    assert caplog.text.count(" cause=other_part ") == 1


def test_counting_the_tokens_of_a_prompt_is_no_request():
    class Counting(ScriptedBackend):
        def count_tokens(self, request):
            return 7

    llm = LLMStream()
    llm.add_backend("m", Counting())
    each = Served(llm)
    each.app.register_blueprint(llm.anthropic_blueprint())
    answer = each.client.post("/v1/messages/count_tokens", json=chat(model="m"))
    assert answer.json == {"input_tokens": 7}
    assert each.figures == new_figures()


def test_a_stream_that_is_resumed_is_one_request(gate):
    each = served("Hel", gate, "lo", resume_seconds=30)
    with serving(each.app) as url:
        with opened(url) as stream:
            id = stream.read_until("id")
        assert each.figures == figures(accepted=1, active=1)
        gate.open()
        with opened(url, {"Last-Event-ID": id}) as stream:
            assert "[DONE]" in stream.rest()
    each.expect(accepted=1, completed=1)
