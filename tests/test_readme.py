"""What the README shows works, and what it lists is all there is."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

import flask_llmstream
from flask_llmstream.config import Settings
from flask_llmstream.exceptions import LLMStreamError

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text):
    """The one Python block that holds *text*."""
    (found,) = (code for code in PYTHON if text in code)
    return found


@pytest.fixture
def names(smollm2_path):
    """The names of the quick start, which has been run."""
    names = {"__name__": "readme"}
    exec(block("app = Flask(__name__)"), names)
    return names


def test_the_quick_start_streams_from_the_model(names):
    with names["app"].test_client() as client:
        response = client.post("/generate", json={"prompt": "Say hello."})
        assert response.mimetype == "text/event-stream"
        assert response.text.endswith("data: [DONE]\n\n")


def test_the_shortest_backend_answers(names):
    exec(block('@llm.backend("shout")'), names)
    with names["app"].test_client() as client:
        body = {"model": "shout", "messages": [{"role": "user", "content": "be loud"}]}
        answer = client.post("/v1/chat/completions", json=body).json
    assert answer["choices"][0]["message"]["content"] == "BE LOUD "


def test_the_hooks_complete_and_refuse(names):
    seen = []

    class User:
        is_authenticated = True
        id = "u1"

    names |= {name: getattr(flask_llmstream, name) for name in flask_llmstream.__all__}
    names |= {"replace": replace, "current_user": User(), "is_staff": lambda _: False}
    exec(block("@llm.identity_loader"), names)

    @names["llm"].backend("large")
    def large(request):
        seen.append(request)
        return "no"

    @names["llm"].backend("tiny")
    def tiny(request):
        seen.append(request)
        return "yes"

    with names["app"].test_client() as client:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        refused = client.post("/v1/chat/completions", json={**body, "model": "large"})
        client.post("/v1/chat/completions", json={**body, "model": "tiny"})
    assert refused.status_code == 403
    (request,) = seen
    assert (request.identity, request.messages[0].text) == ("u1", "Be brief.")


def test_the_scripted_backend_waits_for_its_gate(names):
    exec(block("from flask_llmstream.testing import"), names)
    names["gate"].open()
    with names["app"].app_context():
        request = names["InferenceRequest"](prompt="x", model="scripted")
        assert names["llm"].complete(request).text == "Hello"


def test_the_table_of_settings_is_complete_and_right():
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*?) \|", README, re.MULTILINE)
    listed = {}
    for left, default in rows:
        settings = re.findall(r"[A-Z_]+", left)
        defaults = default.split(", ") if len(settings) > 1 else [default]
        listed |= zip(settings, defaults, strict=True)
    assert set(listed) == {field.name.upper() for field in fields(Settings)}
    for field in fields(Settings):
        shown = listed[field.name.upper()].strip('`"')
        if isinstance(field.default, (int, float)):
            factor = {"KiB": 1024, "MiB": 1024**2}.get(shown.rpartition(" ")[2], 1)
            assert float(shown.split()[0]) * factor == field.default, field.name


def test_the_table_of_errors_lists_every_code_that_a_client_can_see():
    codes = {
        cls.code
        for name in flask_llmstream.__all__
        if isinstance(cls := getattr(flask_llmstream, name), type)
        and issubclass(cls, LLMStreamError)
    }
    # The roots of the tree, and what only a consumer or a misconfigured server raises.
    hidden = {"internal_error", "stream_error", "configuration_error", "stream_incomplete"}
    table = README[README.index("## Errors") : README.index("## Deployment")]
    assert codes - hidden <= set(re.findall(r"`([a-z_]+)`", table))
