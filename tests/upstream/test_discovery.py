"""What upstreams list, in an app of this process; and when a model behind HTTP is ready."""

from __future__ import annotations

import logging

import pytest
from concurrency import wait_until
from flask_apps import chat, make_app

from flask_llmstream import LLMStream, UpstreamBackend, UpstreamError
from flask_llmstream.backends import upstream
from flask_llmstream.testing import ScriptedBackend

from .conftest import HELLO, new_id, scripts


class Listing(ScriptedBackend):
    """A scripted backend that lists models as an upstream does."""

    fails_over = True

    def __init__(self, *script, discovered=()):
        super().__init__(*script)
        self.discovered = discovered


@pytest.fixture
def llm():
    return LLMStream()


def offered(app):
    app.register_blueprint(app.extensions["llmstream"].openai_blueprint())
    return lambda: [m["id"] for m in app.test_client().get("/v1/models").json["data"]]


def ask(app, model):
    answer = app.test_client().post("/v1/chat/completions", json=chat(model=model))
    return answer.status_code, answer.json


def test_registered_models_come_first_and_once(llm):
    llm.add_backend("a", Listing(discovered=("z", "b", "a")))
    llm.add_backend("b", Listing(discovered=("z", "y")))
    assert offered(make_app(llm))() == ["a", "b", "z", "y"]


def test_a_listed_model_is_balanced_over_all_that_list_it_lately(llm):
    first, second = Listing("1", discovered=("z",)), Listing("2")
    llm.add_backend("a", first)
    llm.add_backend("b", second)
    app = make_app(llm)
    offered(app)
    for _ in range(2):
        assert ask(app, "z")[0] == 200
    second.discovered = ("z",)
    for _ in range(4):
        assert ask(app, "z")[0] == 200
    assert (len(first.requests), len(second.requests)) == (4, 2)
    assert first.requests[0].model == "z"


def test_a_model_that_is_listed_no_more_is_gone(llm):
    backend = Listing("1", discovered=("z",))
    llm.add_backend("a", backend)
    app = make_app(llm)
    offered(app)
    assert ask(app, "z")[0] == 200
    backend.discovered = ()
    assert ask(app, "z")[0] == 404
    assert ask(app, "a")[0] == 200


def test_a_route_may_leave_them_out(llm):
    llm.add_backend("a", Listing("1", discovered=("z",)))
    app = make_app(llm)
    app.register_blueprint(llm.openai_blueprint(models=["a"]))
    assert ask(app, "z")[0] == 404


def test_a_listed_model_may_be_the_default(llm):
    llm.add_backend("a", Listing("1", discovered=("z",)))
    app = make_app(llm, default_model="z")
    offered(app)
    assert ask(app, None)[1]["model"] == "z"


@pytest.fixture
def clock(monkeypatch):
    """Lets the list become old."""
    now = [1000.0]
    monkeypatch.setattr(upstream, "monotonic", lambda: now[0])
    return now


def test_the_list_is_kept_for_a_minute_and_asked_for_in_the_background(scripted, clock):
    backend = UpstreamBackend(scripted.url("x"), discover=True)
    assert backend.discovered == ()
    wait_until(lambda: backend.discovered == ("x-model", "shared-model"))
    scripted.get("/set-models?x=new")
    clock[0] += 59
    assert backend.discovered == ("x-model", "shared-model")
    clock[0] += 1
    wait_until(lambda: backend.discovered == ("new",))
    scripted.get("/set-models?y=other")


def test_what_was_listed_stays_where_it_cannot_be_asked(scripted, clock, caplog, monkeypatch):
    backend = UpstreamBackend(scripted.url("x"), discover=True)
    wait_until(lambda: backend.discovered)
    clock[0] += 60
    monkeypatch.setattr(backend._http, "url", backend._http.url.copy_with(port=9))
    assert backend.discovered
    wait_until(lambda: caplog.records)
    assert backend.discovered
    assert "did not list its models" in caplog.text
    assert "127.0.0.1" not in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_only_who_is_told_to_asks(scripted):
    backend = UpstreamBackend(scripted.url("x"))
    assert backend.discovered == ()
    assert backend._discover_at == 0


def test_a_listed_model_goes_under_its_own_id_beside_the_upstreams_one(llm, scripted):
    llm.add_backend("ours", UpstreamBackend(scripted.url("w"), model="theirs", discover=True))
    app = make_app(llm)
    wait_until(lambda: "w-model" in llm.models())
    app.register_blueprint(llm.openai_blueprint())
    for model, sent in (("ours", "theirs"), ("w-model", "w-model")):
        id = new_id()
        body = chat(scripts(id, HELLO), model=model)
        assert app.test_client().post("/v1/chat/completions", json=body).status_code == 200
        assert scripted.records(id)[0]["body"]["model"] == sent


def test_a_model_whose_upstreams_all_failed_lately_is_not_ready(llm):
    llm.add_backend("a", Listing(UpstreamError("Down.")))
    app = make_app(llm)
    app.register_blueprint(llm.ops_blueprint())
    offered(app)
    assert app.test_client().get("/readyz").status_code == 200
    assert ask(app, "a")[0] == 502
    ready = app.test_client().get("/readyz")
    assert (ready.status_code, ready.json["code"]) == (503, "upstream_error")
