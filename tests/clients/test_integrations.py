"""What is built on OpenAI's protocol: streamed text, and a tool whose result goes back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from flask_apps import make_app, serving

from flask_llmstream import Finish, LLMStream, ToolCallDelta, UpstreamError, Usage
from flask_llmstream.testing import ScriptedBackend

LITELLM = Path(sys.prefix) / "litellm" / "bin" / "python"


@pytest.fixture(scope="module")
def base_url():
    llm = LLMStream()
    llm.add_backend("text", ScriptedBackend("Hel", "lo", Usage(3, 2)))
    llm.add_backend("breaks", ScriptedBackend("Hel", UpstreamError("The server is gone.")))

    @llm.backend("weather")
    def weather(request):
        """Call the tool; then say what it gave."""
        last = request.messages[-1]
        if last.role == "tool":
            yield f"It is {last.text}."
        else:
            assert request.tools[0]["function"]["name"] == "weather"
            yield ToolCallDelta(0, id="call_1", name="weather", arguments='{"ci')
            yield ToolCallDelta(0, arguments='ty":"Oslo"}')
            yield Finish("tool_calls")

    app = make_app(llm, default_model="text")
    app.register_blueprint(llm.openai_blueprint())
    with serving(app) as url:
        yield f"{url}/v1"


@pytest.fixture(autouse=True)
def tells_nobody(monkeypatch):
    """No library may report what it does."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


def weather(city: str) -> str:
    """How warm it is in a city."""
    return f"4 degrees in {city}"


class TestLangChain:
    @pytest.fixture
    def model(self, base_url):
        from langchain_openai import ChatOpenAI

        def model(name):
            return ChatOpenAI(model=name, base_url=base_url, api_key="key", stream_usage=True)

        return model

    def test_it_streams(self, model):
        chunks = list(model("text").stream("Hi"))
        assert [chunk.content for chunk in chunks if chunk.content] == ["Hel", "lo"]
        (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert (usage["input_tokens"], usage["output_tokens"]) == (3, 2)

    def test_it_calls_a_tool(self, model):
        from langchain_core.messages import HumanMessage, ToolMessage

        model = model("weather").bind_tools([weather])
        turns = [HumanMessage("How cold is it?")]
        first, *others = model.stream(turns)
        answer = sum(others, first)
        (call,) = answer.tool_calls
        turns += [answer, ToolMessage(weather(**call["args"]), tool_call_id=call["id"])]
        assert model.invoke(turns).content == "It is 4 degrees in Oslo."


class TestPydanticAI:
    @pytest.fixture
    def agent(self, base_url):
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        def agent(name, **options):
            provider = OpenAIProvider(base_url=base_url, api_key="key")
            return Agent(OpenAIChatModel(name, provider=provider), **options)

        return agent

    def test_it_streams(self, agent):
        assert self.stream(agent("text")) == ["Hel", "lo"]

    def test_it_calls_a_tool(self, agent):
        assert self.stream(agent("weather", tools=[weather])) == ["It is 4 degrees in Oslo."]

    def stream(self, agent):
        async def read():
            async with agent.run_stream("How cold is it?") as result:
                texts = result.stream_text(delta=True, debounce_by=None)
                return [text async for text in texts]

        return asyncio.run(read())


class TestLLM:
    @pytest.fixture
    def model(self, base_url, tmp_path, monkeypatch):
        monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
        models = [
            {"model_id": f"my-{name}", "model_name": name, "api_base": base_url, **options}
            for name, options in {"text": {}, "weather": {"supports_tools": True}}.items()
        ]
        # JSON is YAML, too.
        (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))
        from llm import get_model

        return get_model

    def test_it_streams(self, model):
        response = model("my-text").prompt("Hi", key="key", stream=True)
        assert list(response) == ["Hel", "lo"]
        assert (response.usage().input, response.usage().output) == (3, 2)

    def test_it_calls_a_tool(self, model):
        chain = model("my-weather").chain("How cold is it?", tools=[weather], key="key")
        assert "".join(chain) == "It is 4 degrees in Oslo."


def test_litellm(base_url):
    if not LITELLM.exists():
        pytest.skip(f"needs tests/clients/litellm.txt in {LITELLM.parent}: `make test` installs it")
    script = Path(__file__).parent / "ask_litellm.py"
    asked = subprocess.run(
        [LITELLM, script, base_url], stdout=subprocess.PIPE, timeout=50, check=True
    )
    answer = json.loads(asked.stdout)
    failure, message = answer.pop("failure")
    assert failure == "MidStreamFallbackError"
    assert "The server is gone." in message
    assert answer == {
        "text": "Hello",
        "usage": [3, 2],
        "call": ["tool_calls", "weather", '{"city":"Oslo"}'],
        "after the tool": "It is 4 degrees.",
    }
