import pytest

from flask_llmstream.backends.llama_chat import AnswerReader, chat_body
from flask_llmstream.backends.tool_grammar import Toolbox
from flask_llmstream.core.messages import (
    Finish,
    InferenceRequest,
    Message,
    Reasoning,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)

TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]


def body(**fields):
    request = InferenceRequest(**fields)
    return chat_body(request, Toolbox.of(request))


def chat(*messages, **fields):
    return [
        (each["role"], each["content"]) for each in body(messages=messages, **fields)["messages"]
    ]


def chunk(delta=None, finish_reason=None, *, index=0, timings=None, **more):
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish_reason, **more}
    return {"choices": [choice], **({"timings": timings} if timings else {})}


def read(request, *chunks):
    reader = AnswerReader(request, Toolbox.of(request))
    return [item for each in chunks for item in reader.read(each)], reader


# The body


def test_unset_fields_are_left_to_the_model():
    assert body(prompt="hi") == {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "return_progress": True,
        "timings_per_token": True,
        "n": 1,
    }


def test_sampling_fields_are_passed_on_zero_included():
    sent = body(prompt="x", max_tokens=5, temperature=0.0, top_p=0.5, top_k=3, n=2)
    assert [sent[key] for key in ("max_tokens", "temperature", "top_p", "top_k", "n")] == [
        5,
        0.0,
        0.5,
        3,
        2,
    ]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 - 1, 2**63 - 1, -(2**63)])
def test_no_seed_becomes_the_one_that_means_random(seed):
    assert 0 <= body(prompt="x", seed=seed)["seed"] < 2**32 - 1


def test_stop_strings_are_the_engines():
    assert "stop" not in body(prompt="x", stop=("a",))


def test_one_alternative_is_asked_for_even_where_none_is_wanted():
    assert body(prompt="x", logprobs=True)["top_logprobs"] == 1
    assert body(prompt="x", logprobs=True, top_logprobs=5)["top_logprobs"] == 5
    assert "logprobs" not in body(prompt="x")


def schema_of(**fields):
    return body(prompt="x", **fields)["response_format"]["json_schema"]["schema"]


def test_response_formats_become_schemas():
    schema = {"type": "array"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert schema_of(response_format=wanted) == schema
    assert schema_of(response_format={"type": "json_object"}) == {"type": "object"}
    assert "response_format" not in body(prompt="x", response_format={"type": "text"})


def test_a_call_is_an_alternative_to_a_wanted_format():
    both = schema_of(response_format={"type": "json_object"}, tools=TOOLS)
    assert len(both["anyOf"]) == 2


def test_developers_speak_as_the_system():
    assert chat(Message("developer", "Be brief."), Message("user", "hi")) == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]


def test_adjacent_messages_of_one_role_are_joined():
    assert chat(
        Message("system", "a"),
        Message("system", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
        Message("user", "e"),
    ) == [("system", "a\n\nb"), ("user", "c"), ("assistant", "d"), ("user", "e")]


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(Message("user", parts)) == [("user", "ab")]


def test_tool_calls_and_their_results_are_written_out():
    assert chat(
        Message("user", "Weather?"),
        Message("assistant", "Let me see.", tool_calls=[ToolCall("1", "get_weather", '{"c": 1}')]),
        Message("tool", "12 C", tool_call_id="1"),
        Message("tool", "no idea", tool_call_id="?"),
        Message("tool", "fine", tool_call_id="?", name="ask"),
    ) == [
        ("user", "Weather?"),
        ("assistant", 'Let me see.\n{"name": "get_weather", "arguments": {"c": 1}}'),
        (
            "user",
            "Result of get_weather: 12 C\n\nResult of the function: no idea\n\nResult of ask: fine",
        ),
    ]


def test_the_functions_are_described_before_the_system_prompt():
    (role, text), _ = chat(Message("system", "Be brief."), Message("user", "hi"), tools=TOOLS)
    assert role == "system"
    assert '{"name": "get_weather"}' in text
    assert text.endswith("\n\nBe brief.")


# The chunks


def test_role_and_progress_chunks_are_no_items():
    items, reader = read(
        InferenceRequest(prompt="x"),
        chunk({"role": "assistant", "content": None}),
        {"choices": []},
        chunk({"content": ""}),
    )
    assert items == []
    assert not reader.is_complete


def test_thinking_is_reasoning():
    items, _ = read(
        InferenceRequest(prompt="x"),
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "yes"}),
        chunk(finish_reason="stop"),
    )
    assert items == [Reasoning("hm"), "yes", Finish("stop")]


def test_other_choices_are_marked():
    items, reader = read(
        InferenceRequest(prompt="x", n=2),
        chunk({"content": "b"}, index=1),
        chunk({"content": "a"}),
        chunk(finish_reason="stop", index=1),
    )
    assert items == ["b", "a", Finish("stop", choice=1)]
    assert items[0].choice == 1
    assert type(items[1]) is str
    assert not reader.is_complete


def test_a_token_has_the_log_probability_of_its_last_piece():
    entry = {
        "token": "é",
        "logprob": -0.5,
        "top_logprobs": [{"token": "é", "logprob": -0.5}, {"token": "e", "logprob": -2.0}],
    }
    items, _ = read(
        InferenceRequest(prompt="x", logprobs=True, top_logprobs=1),
        chunk({"content": "é"}, logprobs={"content": [entry]}),
    )
    assert isinstance(items[0], Token)
    assert (items[0], items[0].logprob, items[0].top_logprobs) == ("é", -0.5, (("é", -0.5),))


def test_usage_is_the_last_count_of_every_choice():
    def timings(predicted):
        return {"cache_n": 3, "prompt_n": 4, "predicted_n": predicted}

    _, reader = read(
        InferenceRequest(prompt="x", n=2),
        chunk({"content": "a"}, timings=timings(1)),
        chunk({"content": "b"}, index=1, timings=timings(1)),
        chunk(finish_reason="length", timings=timings(5)),
    )
    assert reader.usage == Usage(7, 6, cached_tokens=3)


def test_a_call_by_choice_ends_the_answer_before_the_model_does():
    items, reader = read(
        InferenceRequest(prompt="x", tools=TOOLS),
        chunk({"content": '{"name": "get_weather", "arguments": {}'}),
        chunk({"content": "}\n\nAnd so on"}),
        chunk(finish_reason="stop"),
    )
    assert [type(item) for item in items] == [ToolCallDelta, ToolCallDelta, Finish]
    assert items[-1] == Finish("tool_calls")
    assert reader.is_complete


def test_a_call_that_the_model_leaves_unfinished_is_still_one():
    items, _ = read(
        InferenceRequest(prompt="x", tools=TOOLS),
        chunk({"content": '{"name": "get_weather", "arguments": {"a"'}),
        chunk(finish_reason="stop"),
    )
    assert items[-1] == Finish("tool_calls")


def test_text_that_might_have_become_a_call_comes_before_the_finish():
    items, _ = read(
        InferenceRequest(prompt="x", tools=TOOLS),
        chunk({"content": "{"}),
        chunk(finish_reason="length"),
    )
    assert items == ["{", Finish("length")]


def test_the_start_of_a_required_call_is_never_text():
    items, _ = read(
        InferenceRequest(prompt="x", tools=TOOLS, tool_choice="required"),
        chunk({"content": '{"name": "get'}),
        chunk(finish_reason="length"),
    )
    assert items == [Finish("length")]
