"""What an orchestrator asks."""

import os
import re

import pytest
from flask_apps import make_app, scripted

from flask_llmstream import ConfigurationError, InferenceRequest, LLMStream
from flask_llmstream.testing import ScriptedBackend


def client_of(llm, **config):
    app = make_app(llm, **config)
    app.register_blueprint(llm.ops_blueprint())
    return app.test_client()


def answer(response):
    return response.status_code, response.get_json()


def test_a_process_that_answers_is_alive_whatever_else():
    assert answer(client_of(LLMStream()).get("/healthz")) == (200, {"status": "ok"})


def test_it_is_ready_where_the_default_model_is():
    llm, backend = scripted(model="small")
    client = client_of(llm)
    assert answer(client.get("/readyz")) == (200, {"status": "ready", "model": "small"})
    assert backend.requests == []


def test_without_any_model_it_is_not_ready():
    assert answer(client_of(LLMStream()).get("/readyz")) == (
        503,
        {"status": "unavailable", "model": "", "code": "model_not_found"},
    )


def test_with_a_default_model_that_does_not_exist_it_is_not_ready():
    llm, _ = scripted(model="small")
    status, document = answer(client_of(llm, default_model="typo").get("/readyz"))
    assert (status, document["code"]) == (503, "model_not_found")


def test_it_is_the_default_model_that_counts():
    llm, _ = scripted(model="small")
    llm.add_backend("large", ScriptedBackend())
    client = client_of(llm, default_model="large")
    with client.application.app_context():
        llm.engine_of("small").shutdown(timeout_seconds=0)
    assert client.get("/readyz").get_json()["model"] == "large"
    assert client.get("/readyz").status_code == 200


def test_an_engine_that_is_shut_down_is_not_ready():
    llm, _ = scripted(model="small")
    client = client_of(llm)
    with client.application.app_context():
        llm.engine_of("small").shutdown(timeout_seconds=0)
    assert answer(client.get("/readyz")) == (
        503,
        {"status": "unavailable", "model": "small", "code": "engine_closed"},
    )
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("There is no file /srv/model.gguf."), "configuration_error"),
        (OSError("/srv is gone"), "engine_error"),
    ],
)
def test_a_backend_says_itself_whether_it_is_ready(error, code, caplog):
    class Unready(ScriptedBackend):
        def check_ready(self):
            raise error

    llm = LLMStream()
    llm.add_backend("m", Unready())
    response = client_of(llm).get("/readyz")
    assert answer(response) == (503, {"status": "unavailable", "model": "m", "code": code})
    assert str(error) in caplog.text  # The orchestrator shows a code; the reason is here.


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_be_head_and_need_no_key(path):
    llm, _ = scripted()
    client = client_of(llm, api_keys="secret")
    assert client.head(path).status_code == 200
    assert client.get(path).status_code == 200


def test_the_figures_are_the_app_s():
    llm, _ = scripted("Hel", "lo", model="small")
    client = client_of(llm)
    client.application.add_url_rule(
        "/ask", view_func=lambda: llm.complete(InferenceRequest(prompt="secret question")).text
    )
    assert client.get("/ask").text == "Hello"

    response = client.get("/llmstream/stats")

    assert response.headers["Cache-Control"] == "no-store"
    with client.application.app_context():
        assert response.json == llm.stats()
    assert response.json["pid"] == os.getpid()
    assert response.json["models"]["small"]["completed"] == 1
    assert not {"secret", "question", "Hello"} & set(re.findall(r"\w+", response.text))


KEY = {"Authorization": "Bearer secret"}
OPS_KEY = {"Authorization": "Bearer ops"}


@pytest.mark.parametrize(
    ("app_keys", "own_keys", "headers", "status"),
    [
        (None, None, {}, 200),
        ("secret", None, {}, 401),
        ("secret", None, OPS_KEY, 401),
        ("secret", None, KEY, 200),
        (None, "ops", {}, 401),
        (None, {"ops": "ops"}, OPS_KEY, 200),
        ("secret", "ops", KEY, 401),
        ("secret", ["ops"], OPS_KEY, 200),
    ],
)
def test_the_figures_need_a_key_where_there_are_any(app_keys, own_keys, headers, status):
    llm, _ = scripted()
    app = make_app(llm, api_keys=app_keys)
    app.register_blueprint(llm.ops_blueprint(api_keys=own_keys))
    response = app.test_client().get("/llmstream/stats", headers=headers)
    assert response.status_code == status
    assert ("models" in response.json) == (status == 200)


@pytest.mark.parametrize("keys", ["", [], {"ops": ""}])
def test_an_empty_key_lets_nobody_in(keys):
    with pytest.raises(ConfigurationError):
        LLMStream().ops_blueprint(api_keys=keys)


def test_it_may_have_another_name_and_prefix():
    llm, _ = scripted()
    app = make_app(llm)
    app.register_blueprint(llm.ops_blueprint(name="probes"), url_prefix="/ops")
    assert app.test_client().get("/ops/healthz").status_code == 200
    assert "probes.readyz" in app.view_functions
