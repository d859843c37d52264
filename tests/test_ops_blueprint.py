"""What an orchestrator asks."""

import pytest
from flask_apps import make_app, scripted

from flask_llmstream import ConfigurationError, LLMStream
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


def test_it_may_have_another_name_and_prefix():
    llm, _ = scripted()
    app = make_app(llm)
    app.register_blueprint(llm.ops_blueprint(name="probes"), url_prefix="/ops")
    assert app.test_client().get("/ops/healthz").status_code == 200
    assert "probes.readyz" in app.view_functions
