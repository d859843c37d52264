"""How many requests one caller may have under way, and waiting: 429 beyond it."""

import gc

import pytest
from concurrency import Background, wait_until
from flask import request
from flask_apps import chat, make_app

from flask_llmstream import (
    ConfigurationError,
    InferenceEngineEnhanced,
    InferenceRequest,
    LLMStream,
    TooManyRequestsError,
    UpstreamError,
)
from flask_llmstream.testing import ScriptedBackend

KEYS = {"alice": "secret", "bob": "other"}
ALICE = {"Authorization": "Bearer secret"}
BOB = {"Authorization": "Bearer other"}


class Asking:
    """An app whose callers may have so much under way."""

    def __init__(self, *script, llm=None, blueprint=None, **settings):
        self.llm = llm or LLMStream()
        if llm is None:
            self.llm.add_backend("m", ScriptedBackend(*script))
        self.app = make_app(self.llm, **{"api_keys": KEYS, **settings})
        self.app.register_blueprint(self.llm.openai_blueprint(**(blueprint or {})))
        self.client = self.app.test_client()
        self.open = []

    def ask(self, headers=ALICE, **fields):
        body = chat(**{"stream": True, **fields})
        response = self.client.post("/v1/chat/completions", json=body, headers=headers)
        self.open.append(response)  # Else it is dropped, and over.
        return response

    def statuses(self, times, headers=ALICE, **fields):
        return [self.ask(headers, **fields).status_code for _ in range(times)]

    @property
    def figures(self):
        with self.app.app_context():
            return self.llm.stats()["total"]


def test_a_caller_has_so_many_streams_and_another_one_as_many(gate):
    each = Asking("Hel", gate, identity_streams=2)
    assert each.statuses(3) == [200, 200, 429]
    assert each.statuses(3, BOB) == [200, 200, 429]
    assert each.figures["active"] == each.figures["accepted"] == 4
    assert each.figures["rejected"] == {"too_many_requests": 2}


def test_the_answer_says_what_and_when_to_come_back(gate):
    each = Asking("Hel", gate, identity_streams=1)
    each.ask()
    response = each.ask()
    assert response.status_code == 429
    assert response.json["error"]["code"] == "too_many_requests"
    assert response.json["error"]["type"] == "rate_limit_error"
    assert response.headers["Retry-After"] == "1"
    assert "X-Should-Retry" not in response.headers


def test_by_default_there_is_no_limit(gate):
    each = Asking("Hel", gate, worker_threads=8)
    assert each.statuses(8) == [200] * 8


def test_who_has_its_answer_may_ask_again_at_once():
    each = Asking("Hel", "lo", identity_streams=1)
    for stream in (True, False) * 10:
        response = each.ask(stream=stream)
        assert response.status_code == 200
        assert b"Hel" in response.data


def test_who_left_may_ask_again(gate):
    each = Asking("Hel", gate, identity_streams=1)
    each.ask().close()
    assert each.statuses(2) == [200, 429]


@pytest.mark.parametrize("end", ["cancel", "first_token", "deadline", "drop"])
def test_whatever_ends_it_gives_the_place_back(gate, end):
    each = Asking(
        *(["Hel"] if end in ("cancel", "drop") else []),
        gate,
        identity_streams=1,
        first_token_seconds=0.05 if end == "first_token" else 60,
        deadline_seconds=0.05 if end == "deadline" else 60,
        worker_threads=3,
    )
    for _ in range(3):
        response = each.ask()
        if end == "cancel":
            assert each.ask().status_code == 429
            id = response.headers["X-Request-ID"]
            assert each.client.delete(f"/v1/streams/{id}", headers=ALICE).status_code == 200
        elif end == "drop":
            del response
            each.open.clear()
            gc.collect()
        else:
            assert response.status_code == 504
    assert each.figures["accepted"] == 3
    assert each.figures["active"] == 0


def test_a_failure_gives_the_place_back():
    each = Asking(UpstreamError("down"), identity_streams=1)
    assert each.statuses(3) == [502] * 3


def test_what_the_engine_refuses_gives_the_place_back(gate):
    each = Asking("Hel", gate, identity_streams=1)
    with each.app.app_context():
        each.llm.engine_of("m").shutdown(timeout_seconds=0)
    assert each.statuses(3) == [503] * 3
    assert each.figures["rejected"] == {"engine_closed": 3}


def test_what_policy_refuses_takes_no_place():
    each = Asking("Hi", identity_streams=1)
    assert each.statuses(2, model="unknown") == [404, 404]
    assert each.statuses(1) == [200]


def test_models_and_routes_are_counted_together(gate):
    llm = LLMStream()
    for model in ("a", "b"):
        llm.add_backend(model, ScriptedBackend("Hel", gate))
    each = Asking(llm=llm, identity_streams=2)
    assert each.statuses(1, model="a") + each.statuses(2, model="b") == [200, 200, 429]
    assert each.figures["rejected"] == {"too_many_requests": 1}


def test_a_blueprint_may_have_a_limit_of_its_own(gate):
    each = Asking("Hel", gate, blueprint={"identity_streams": 1})
    assert each.statuses(2) == [200, 429]
    with pytest.raises(ConfigurationError, match="not a blueprint's to say"):
        LLMStream().openai_blueprint(identity_queue_share=0.5)


def test_it_holds_for_views_and_every_way_to_ask(gate):
    each = Asking("Hel", gate, identity_streams=1, api_keys=None)
    hi = InferenceRequest(prompt="Hi", identity="alice")
    with each.app.test_request_context():
        tokens = each.llm.tokens(hi)
        for ask in (each.llm.tokens, each.llm.stream, each.llm.complete):
            with pytest.raises(TooManyRequestsError):
                ask(hi)
        tokens.close()
        each.llm.tokens(hi).close()


def test_who_has_no_identity_is_not_limited_and_may_be_given_one(gate):
    each = Asking("Hel", gate, identity_streams=1, api_keys=None, worker_threads=4)
    assert each.statuses(3, {}) == [200] * 3
    each.llm.identity_loader(lambda: request.remote_addr)
    assert each.statuses(2, {}) == [200, 429]


def test_an_identity_that_cannot_be_counted_is_for_the_log(caplog):
    each = Asking("Hi", identity_streams=1)
    each.llm.identity_loader(object)
    response = each.ask()
    assert response.status_code == 500
    assert response.json["error"]["code"] == "configuration_error"
    assert "Have the identity_loader return an id" in caplog.text


def test_who_joins_another_one_s_run_has_a_request_under_way_too(gate):
    engine = InferenceEngineEnhanced()
    engine.register_model("m", ScriptedBackend(gate, "Hi"))
    llm = LLMStream()
    llm.add_engine(engine, models=["m"])
    each = Asking(llm=llm, identity_streams=1)
    first = Background(lambda: each.ask(stream=False).status_code)
    gate.reached.wait()
    assert each.ask(stream=False).status_code == 429
    gate.open()
    assert first.result() == 200
    assert each.statuses(2, stream=False) == [200, 200]  # From the cache, one after another.
    assert each.figures["rejected"] == {"too_many_requests": 1}
    engine.shutdown(timeout_seconds=10)


def test_an_answer_of_several_prompts_has_as_many_requests_under_way(gate):
    each = Asking("Hel", gate, identity_streams=3, worker_threads=8)

    def prompts(number, headers=ALICE):
        body = {"prompt": ["x"] * number, "stream": True}
        response = each.client.post("/v1/completions", json=body, headers=headers)
        each.open.append(response)
        return response

    assert prompts(2).status_code == 200
    assert prompts(2).status_code == 429
    assert each.figures["accepted"] == 2  # Of those that were refused none was begun.
    assert prompts(1).status_code == 200
    response = prompts(4)
    assert response.status_code == 400  # No retry helps.
    assert response.json["error"]["param"] == "prompt"
    for open_response in each.open:
        open_response.close()
    wait_until(lambda: not each.figures["active"])
    assert prompts(3).status_code == 200


def test_counting_tokens_is_under_way_as_well(gate):
    class Counting(ScriptedBackend):
        def count_tokens(self, request):
            return 7

    llm = LLMStream()
    llm.add_backend("m", Counting("Hel", gate))
    each = Asking(llm=llm, identity_streams=1)
    each.app.register_blueprint(llm.anthropic_blueprint())

    def count():
        url = "/v1/messages/count_tokens"
        return each.client.post(url, json=chat(model="m"), headers=ALICE).status_code

    stream = each.ask()
    assert count() == 429
    stream.close()
    assert [count(), count()] == [200, 200]


def test_one_caller_fills_its_share_of_a_queue_only(gate):
    each = Asking("Hel", gate, worker_threads=1, queue_size=4, identity_queue_share=0.5)
    busy = each.ask()
    assert busy.status_code == 200
    with each.app.app_context():
        engine = each.llm.engine_of("m")
        waiting = [
            engine.submit(InferenceRequest(prompt="x", identity="alice", model="m"))
            for _ in range(2)
        ]
    response = each.ask()
    assert response.status_code == 429
    assert response.json["error"]["code"] == "too_many_requests"
    assert int(response.headers["Retry-After"]) >= 1
    with each.app.app_context():
        waiting.append(engine.submit(InferenceRequest(prompt="x", identity="bob", model="m")))
    busy.close()
    gate.open()
    for handle in waiting:
        handle.get(10)
