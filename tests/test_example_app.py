"""The example app in this process: its factory, config, routes and backends."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from flask import Flask, request
from flask_apps import serving

import flask_llmstream
from flask_llmstream import ConfigurationError, Finish, QueueFullError, Usage
from flask_llmstream.testing import Gate, ScriptedBackend

ROOT = Path(__file__).parent.parent
SOUP = "leek-and-potato-soup"


@pytest.fixture
def import_example(monkeypatch):
    """
    Imports the app anew, with *backend* instead of the embedded model.

    Its `llm` is a module's: a test that shared it with another would share its models.
    """

    def import_example(backend=None):
        monkeypatch.setattr(
            flask_llmstream, "LlamaCppBackend", lambda model: backend or ScriptedBackend()
        )
        return importlib.import_module("example_app")

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "example_app"]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(ROOT)
    forget()
    yield import_example
    forget()


@pytest.fixture
def make_app(import_example, tmp_path):
    def make_app(*script, **config):
        """The app, whose model "small" plays *script*, and that backend."""
        backend = ScriptedBackend(*script)
        config = {"DATABASE": str(tmp_path / "suggestions.sqlite3"), "TESTING": True, **config}
        return import_example(backend).create_app(config), backend

    return make_app


def ask(client, prompt="Why?", accept="text/plain", **fields):
    with client.post(
        "/generate", json={"prompt": prompt, **fields}, headers={"Accept": accept}
    ) as response:
        return response.status_code, response.text


def chat(client, url="/v1/chat/completions", **fields):
    body = {"messages": [{"role": "user", "content": "Why?"}], **fields}
    with client.post(url, json=body) as response:
        return response.status_code, response.json


# The factory and its config.


def test_settings_come_from_the_config_file(make_app):
    app, _ = make_app()
    assert app.config["LLMSTREAM_DEFAULT_MODEL"] == "small"
    assert app.config["LLMSTREAM_DEADLINE_SECONDS"] == 120


def test_the_environment_wins_over_the_file(make_app, monkeypatch):
    monkeypatch.setenv("FLASK_LLMSTREAM_DEADLINE_SECONDS", "60")
    app, backend = make_app("Hi")
    chat(app.test_client())
    assert 50 < backend.requests[0].deadline.remaining_seconds() <= 60


def test_an_argument_wins_over_the_environment(make_app, monkeypatch):
    monkeypatch.setenv("FLASK_LLMSTREAM_DEFAULT_MODEL", "small")
    app, backend = make_app("Hi", LLMSTREAM_DEFAULT_MODEL="cookbook")
    assert ask(app.test_client(), "leeks")[1].startswith("From the cookbook:")
    assert backend.requests == []


def test_a_setting_that_is_wrong_is_named(make_app, monkeypatch):
    monkeypatch.setenv("FLASK_LLMSTREAM_DEADLINE_SECONDS", "soon")
    with pytest.raises(ConfigurationError, match=r"LLMSTREAM_DEADLINE_SECONDS .*'soon'"):
        make_app()


def test_the_database_is_in_the_instance_folder_unless_told_otherwise(import_example, tmp_path):
    example = import_example()
    path = tmp_path / "elsewhere" / "kept.sqlite3"
    example.create_app({"DATABASE": str(path)})
    assert path.exists()


def test_apps_of_one_process_do_not_share_settings(make_app, import_example, tmp_path):
    first, _ = make_app("Hi", LLMSTREAM_API_KEYS="secret")
    second = import_example().create_app({"DATABASE": str(tmp_path / "other.sqlite3")})
    assert chat(first.test_client())[0] == 401
    assert chat(second.test_client())[0] == 200


def test_gunicorn_is_configured_by_the_environment(monkeypatch):
    for name in ("BIND", "PORT", "WEB_CONCURRENCY"):
        monkeypatch.delenv(name, raising=False)
    file = str(ROOT / "example_app" / "gunicorn.conf.py")
    assert runpy.run_path(file)["bind"] == "127.0.0.1:8000"
    monkeypatch.setenv("PORT", "9000")
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    settings = runpy.run_path(file)
    assert (settings["bind"], settings["workers"]) == ("127.0.0.1:9000", 2)
    monkeypatch.setenv("BIND", "unix:/run/bayleaf.sock")
    assert runpy.run_path(file)["bind"] == "unix:/run/bayleaf.sock"
    assert settings["worker_class"] == "gevent"
    assert not settings["preload_app"]


def test_the_environment_names_an_upstream(make_app, monkeypatch):
    hello = {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
    upstream = Flask("upstream")
    asked = []

    @upstream.post("/v1/chat/completions")
    def completions():
        asked.append((request.headers["Authorization"], request.json["model"]))
        return hello

    with serving(upstream) as origin:
        monkeypatch.setenv("FLASK_UPSTREAM_URL", f"{origin}/v1")
        monkeypatch.setenv("FLASK_UPSTREAM_KEY", "sk-1")
        monkeypatch.setenv("FLASK_UPSTREAM_MODEL", "theirs")
        client = make_app()[0].test_client()
        status, answer = chat(client, model="upstream")
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert asked == [("Bearer sk-1", "theirs")]


def test_without_it_there_is_none(make_app):
    assert chat(make_app()[0].test_client(), model="upstream")[0] == 404


# The pages.


@pytest.mark.parametrize("path", ["/", "/?q=leek", f"/recipes/{SOUP}", "/chat", "/nothing"])
def test_every_page_may_only_load_from_its_own_origin(make_app, path):
    app, _ = make_app()
    response = app.test_client().get(path)
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "<script>" not in response.text
    assert " style=" not in response.text


def test_recipes_are_found_by_title_and_by_ingredient(make_app):
    client = make_app()[0].test_client()
    assert "Leek and potato soup" in client.get("/").text
    assert "Leek and potato soup" in client.get("/?q=NUTMEG").text
    assert "Leek and potato soup" not in client.get("/?q=lentils").text
    assert "has “&lt;b&gt;” in it" in client.get("/?q=<b>").text


@pytest.mark.parametrize("path", ["/recipes/none", "/nothing"])
def test_a_page_that_is_not_there_leads_back(make_app, path):
    response = make_app()[0].test_client().get(path)
    assert response.status_code == 404
    assert "There is no such page" in response.text


def test_the_chat_page_knows_where_the_api_is_and_what_it_is_about(make_app):
    client = make_app()[0].test_client()
    page = client.get(f"/chat?about={SOUP}", base_url="http://localhost/kitchen").text
    assert 'data-api="/kitchen/v1"' in page
    assert 'data-default-model="small"' in page
    assert "About Leek and potato soup: " in page


# The API, for the world and for the house.


def test_the_models_are_on_offer(make_app):
    client = make_app()[0].test_client()
    assert [m["id"] for m in client.get("/v1/models").json["data"]] == ["small", "cookbook"]
    assert [m["id"] for m in client.get("/internal/v1/models").json["data"]] == ["small"]


def curls_of_the_readme():
    """Path and body of each ``curl -N $URL/… -d '…'``."""
    return re.findall(
        r"^curl -N \$URL(/\S+) -d '(.*)'$", (ROOT / "README.md").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize(("path", "body"), curls_of_the_readme())
def test_every_api_streams_what_the_model_says(make_app, path, body):
    app, backend = make_app("Rinse", " it.")
    # What curl says of its bodies.
    form = "application/x-www-form-urlencoded"
    with app.test_client().post(path, data=body, content_type=form) as response:
        assert response.status_code == 200
        assert '"Rinse"' in response.text
        assert '" it."' in response.text
    assert backend.requests[0].last_user_text == "Hi"


def test_the_readme_asks_every_api():
    paths = {path for path, _ in curls_of_the_readme()}
    assert paths == {"/v1/chat/completions", "/v1/messages", "/api/chat", "/api/ai", "/stream"}


def test_the_house_has_one_model_and_more_time(make_app):
    app, backend = make_app("Hi")
    client = app.test_client()
    status, answer = chat(client, "/internal/v1/chat/completions", model="cookbook")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert chat(client, model="cookbook")[0] == 200
    assert chat(client, "/internal/v1/chat/completions")[0] == 200
    assert chat(client)[0] == 200
    in_house, outside = (request.deadline.remaining_seconds() for request in backend.requests)
    assert 500 < in_house <= 600
    assert 100 < outside <= 120


def test_the_model_is_told_what_it_is_for(make_app):
    app, backend = make_app("Hi")
    chat(app.test_client())
    system, question = backend.requests[0].messages
    assert (system.role, question.text) == ("system", "Why?")
    assert "cook" in system.text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_client_may_say_itself_what_the_model_is_for(make_app, role):
    app, backend = make_app("Hi")
    messages = [{"role": role, "content": "Be a poet."}, {"role": "user", "content": "Why?"}]
    chat(app.test_client(), messages=messages)
    assert [message.text for message in backend.requests[0].messages] == ["Be a poet.", "Why?"]


def test_the_api_refuses_a_large_body_in_its_own_words(make_app):
    client = make_app()[0].test_client()
    messages = [{"role": "user", "content": "x" * 1024 * 1024}]
    status, answer = chat(client, messages=messages)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_it_tells_an_orchestrator_how_it_is(make_app):
    client = make_app()[0].test_client()
    assert client.get("/healthz").json == {"status": "ok"}
    assert client.get("/readyz").json == {"status": "ready", "model": "small"}


# The backend that is a function.


def test_the_cookbook_answers_from_its_recipes(make_app):
    _, answer = chat(
        make_app()[0].test_client(),
        model="cookbook",
        messages=[{"role": "user", "content": "Leeks, butter and a potato?"}],
    )
    text = answer["choices"][0]["message"]["content"]
    first, *others = text.removeprefix("From the cookbook:\n\n").split("\n")
    assert first == "Leek and potato soup, 40 minutes. It uses leeks and potatoes and butter."
    assert others


def test_the_cookbook_says_when_it_has_nothing(make_app):
    _, answer = chat(make_app()[0].test_client(), model="cookbook")
    assert answer["choices"][0]["message"]["content"].startswith("Nothing in the cookbook")


def test_the_cookbook_streams_each_piece(make_app):
    body = {"model": "cookbook", "stream": True, "messages": [{"role": "user", "content": "leeks"}]}
    with make_app()[0].test_client().post("/v1/chat/completions", json=body) as response:
        events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert "From the cookbook:\n" in pieces


# /generate, the view of the app's own.


def test_generate_streams_and_keeps_the_answer(make_app):
    app, backend = make_app("Bread, ", "or ", "cheese.", Usage(3, 3))
    client = app.test_client()
    assert ask(client, "What <b>goes</b> with it?", recipe=SOUP) == (200, "Bread, or cheese.")
    assert backend.requests[0].max_tokens == 200
    question = backend.requests[0].last_user_text
    assert question.startswith("Leek and potato soup. Ingredients: 3 leeks")
    assert question.endswith("\n\nWhat <b>goes</b> with it?")
    page = client.get(f"/recipes/{SOUP}").text
    assert "Asked before" in page
    assert "What &lt;b&gt;goes&lt;/b&gt; with it?" in page
    assert "Bread, or cheese." in page
    assert "Asked before" not in client.get("/recipes/omelette").text


def test_a_recipe_shows_the_newest_three_answers(make_app):
    client = make_app("Yes.")[0].test_client()
    for number in range(4):
        ask(client, f"Question {number}?", recipe=SOUP)
    page = client.get(f"/recipes/{SOUP}").text
    shown = [number for number in range(4) if f"Question {number}?" in page]
    assert shown == [1, 2, 3]
    assert page.index("Question 3?") < page.index("Question 1?")


@pytest.mark.parametrize("recipe", [{}, {"recipe": "none"}, {"recipe": None}, {"recipe": 3}])
def test_generate_answers_about_no_recipe(make_app, recipe):
    app, backend = make_app("Yes.")
    assert ask(app.test_client(), **recipe) == (200, "Yes.")
    assert backend.requests[0].last_user_text == "Why?"


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("text/plain", "text/plain; charset=utf-8"),
        ("text/event-stream", "text/event-stream"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("application/json;q=0.5, text/plain", "text/plain; charset=utf-8"),
    ],
)
def test_accept_picks_the_framing(make_app, accept, content_type):
    client = make_app("Yes.")[0].test_client()
    with client.post("/generate", json={"prompt": "?"}, headers={"Accept": accept}) as response:
        assert response.content_type == content_type
        assert "Yes." in response.text


@pytest.mark.parametrize("body", [{}, [], "Why?", 3, {"prompt": " "}, {"prompt": ["Why?"]}])
def test_generate_wants_a_prompt(make_app, body):
    app, backend = make_app("Yes.")
    response = app.test_client().post("/generate", json=body)
    assert (response.status_code, response.json["error"]["message"]) == (
        400,
        "prompt: must be a text that is not empty",
    )
    assert backend.requests == []


def test_generate_refuses_what_is_too_large(make_app):
    app, backend = make_app("Yes.")
    assert ask(app.test_client(), "x" * (2 * 1024 * 1024))[0] == 413
    assert backend.requests == []


@pytest.mark.parametrize(
    "script", [("Half an ", Finish("length")), ("Half an ", RuntimeError("out of memory"))]
)
def test_an_answer_that_is_not_whole_is_not_kept(make_app, script, caplog):
    app, backend = make_app(*script)
    client = app.test_client()
    with client.post("/generate", json={"prompt": "Why?", "recipe": SOUP}) as response:
        assert "Half an " in response.text
    assert len(backend.requests) == 1
    assert "Asked before" not in client.get(f"/recipes/{SOUP}").text


def test_an_answer_that_nobody_waited_for_is_stopped_and_not_kept(make_app):
    gate = Gate()
    app, backend = make_app("Half an ", gate, "answer.")
    client = app.test_client()
    with client.post(
        "/generate", json={"prompt": "Why?", "recipe": SOUP}, headers={"Accept": "text/plain"}
    ) as response:
        assert next(response.iter_encoded()) == b"Half an "
        gate.reached.wait()
    gate.open()
    backend.closed.wait()
    assert backend.requests[0].cancelled
    assert "Asked before" not in client.get(f"/recipes/{SOUP}").text


def test_what_fails_before_the_first_token_has_a_status(make_app):
    app, _ = make_app(QueueFullError("Too many cooks.", retry_after=3))
    response = app.test_client().post("/generate", json={"prompt": "Why?"})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "3"
    assert response.json["error"]["message"] == "Too many cooks."
