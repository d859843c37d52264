"""llama.cpp's own HTTP server as the upstream, the official OpenAI client in front."""

from __future__ import annotations

import openai
import pytest
from server.process import Process

from .conftest import SERVERS, new_id, scripts

MESSAGES = [{"role": "user", "content": "Say hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module", params=SERVERS)
def client(request, scripted, llama_url):
    environment = {"UPSTREAM_TEST_ORIGIN": scripted.origin, "UPSTREAM_TEST_LLAMA": llama_url}
    server = Process(SERVERS[request.param], environment=environment)
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.address[1]}/v1",
        api_key="x",
        max_retries=0,
        timeout=60,
    ) as client:
        yield client
    log = server.log
    server.kill()
    assert "Traceback" not in log


@pytest.fixture
def chat(client):
    def chat(**options):
        options = {"messages": MESSAGES, "max_tokens": 8, "seed": 1, "temperature": 0, **options}
        return client.chat.completions.create(model="llama", **options)

    return chat


def test_a_stream_with_usage(chat):
    *chunks, last = chat(stream=True, stream_options={"include_usage": True})
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 8
    assert last.usage.prompt_tokens > 8


def test_a_whole_answer_is_the_same_text(chat):
    chunks = list(chat(stream=True))
    answer = chat()
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert answer.choices[0].message.content == text
    assert answer.model == "llama"
    assert answer.usage.completion_tokens == 8


def test_log_probabilities(chat):
    answer = chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)


def test_several_choices(chat):
    answer = chat(n=2, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.content for choice in answer.choices)


def test_a_tool_call_and_reasoning_in_pieces(client):
    # By the scripted upstream: this model does not call tools, nor think.
    def delta(**delta):
        return ["event", {"choices": [{"index": 0, "delta": delta}]}]

    def call(id=None, **function):
        return delta(tool_calls=[{"index": 0, "id": id, "function": function}])

    script = [
        *(["head"], delta(reasoning_content="hm"), call("c1", name="get_weather")),
        *(call(arguments='{"city"'), call(arguments=': "Oslo"}')),
        *(["finish", "tool_calls"], ["done"], ["end"]),
    ]
    names, arguments, reasoning, finishes = [], "", "", []
    message = {"role": "user", "content": scripts(new_id(), script)}
    for chunk in client.chat.completions.create(
        model="one", messages=[message], tools=[TOOL], tool_choice="required", stream=True
    ):
        choice = chunk.choices[0]
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        finishes += [choice.finish_reason] if choice.finish_reason else []
        for part in choice.delta.tool_calls or ():
            names += [part.function.name] if part.function.name else []
            arguments += part.function.arguments or ""
    assert (names, arguments) == (["get_weather"], '{"city": "Oslo"}')
    assert (reasoning, finishes) == ("hm", ["tool_calls"])


def test_a_stop_string_and_json(chat):
    answer = chat(stop=["e", "a"], max_tokens=30)
    assert not set("ea") & set(answer.choices[0].message.content)
    answer = chat(response_format={"type": "json_object"}, max_tokens=30)
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_fields_that_have_no_name_here_go_through(chat):
    # llama.cpp's own: with a grammar it can only say this.
    answer = chat(extra_body={"grammar": 'root ::= "rinse"'})
    assert answer.choices[0].message.content == "rinse"


def test_a_prompt_that_is_too_long_is_the_callers_fault(chat):
    with pytest.raises(openai.BadRequestError, match="context size"):
        chat(messages=[{"role": "user", "content": "word " * 5000}])
