"""What Ollama's clients ask, as requests."""

from __future__ import annotations

import base64
import json

import pytest

from flask_llmstream.core.messages import InferenceRequest, Message, ToolCall
from flask_llmstream.dialects import OllamaChatDialect, OllamaGenerateDialect
from flask_llmstream.dialects.extra_body import check_extra_body
from flask_llmstream.exceptions import InvalidRequestError

HI = [{"role": "user", "content": "Hi"}]
CALL = {"function": {"name": "f", "arguments": {"a": 1, "b": "é"}}}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n rest").decode()


def chat(**fields):
    return OllamaChatDialect().parse(json.dumps({"messages": HI, **fields}).encode())


def generate(**fields):
    return OllamaGenerateDialect().parse(json.dumps({"prompt": "Hi", **fields}).encode())


def messages(*bodies):
    return chat(messages=bodies).request.messages


def refused(parse, **fields):
    with pytest.raises(InvalidRequestError) as caught:
        parse(**fields)
    assert caught.value.message.startswith(f"{caught.value.param}: ")
    return caught.value


class TestChat:
    def test_the_least(self):
        parsed = chat(model="m")

        assert parsed.request == InferenceRequest(messages=(Message("user", "Hi"),), model="m")
        assert (parsed.stream, parsed.is_load, parsed.shows_thinking) == (None, False, True)

    def test_a_role_is_written_in_any_case_and_content_may_be_missing(self):
        assert messages({"role": "User"}, {"role": "assistant", "content": None}) == (
            Message("user", ""),
            Message("assistant", ""),
        )

    def test_what_a_model_thought_is_not_told_again(self):
        assert messages({"role": "assistant", "content": "Hi", "thinking": "Hm"}) == (
            Message("assistant", "Hi"),
        )

    @pytest.mark.parametrize("nothing", [{"messages": []}, {"messages": None}])
    def test_no_message_asks_whether_the_model_can_be_had(self, nothing):
        assert chat(model="m", **nothing).is_load

    def test_tools_need_no_type(self):
        function = {"name": "f", "parameters": {"type": "object", "properties": {}}}

        assert chat(tools=[{"function": function}]).request.tools == (
            {"type": "function", "function": function},
        )

    def test_unknown_fields_and_those_about_loading_are_ignored(self):
        parsed = chat(keep_alive="5m", truncate=True, context=[1], options={"num_ctx": 4096})

        assert parsed.request == chat().request

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
            ({"messages": [{"role": "robot"}]}, "messages[0].role"),
            ({"messages": [*HI, {"role": "user", "content": 1}]}, "messages[1].content"),
            ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
            ({"stream": "yes"}, "stream"),
            ({"tools": [{}]}, "tools[0].function"),
            ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools[0].type"),
            ({"format": "yaml"}, "format"),
            ({"think": "hard"}, "think"),
            ({"options": {"temperature": -1}}, "options.temperature"),
            ({"options": {"temperature": "hot"}}, "options.temperature"),
            ({"options": {"stop": [""]}}, "options.stop[0]"),
            ({"options": {"seed": 2**63}}, "options.seed"),
            ({"options": []}, "options"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ],
    )  # fmt: skip
    def test_a_wrong_field_is_named(self, fields, param):
        assert refused(chat, **fields).param == param

    def test_what_is_not_json_is_refused(self):
        with pytest.raises(InvalidRequestError, match="body is not valid JSON"):
            OllamaChatDialect().parse(b"model=m")


class TestToolCalls:
    def test_arguments_become_json_text(self):
        (message,) = messages({"role": "assistant", "tool_calls": [{"id": "c", **CALL}]})

        assert message.tool_calls == (ToolCall("c", "f", '{"a":1,"b":"é"}'),)

    @pytest.mark.parametrize("nothing", [{}, {"arguments": None}, {"arguments": {}}])
    def test_there_may_be_none(self, nothing):
        call = {"function": {"name": "f", **nothing}}
        (message,) = messages({"role": "assistant", "tool_calls": [call]})

        assert message.tool_calls[0].arguments == "{}"

    def test_arguments_as_text_are_refused(self):
        call = {"function": {"name": "f", "arguments": "{}"}}
        error = refused(chat, messages=[{"role": "assistant", "tool_calls": [call]}])

        assert error.param == "messages[0].tool_calls[0].function.arguments"

    def test_calls_and_results_without_ids_are_told_apart_by_their_order(self):
        call = {"role": "assistant", "tool_calls": [CALL, CALL]}
        chat = (*HI, call, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"})

        _, called, first, second = messages(*chat)

        assert [each.id for each in called.tool_calls] == ["call_1_0", "call_1_1"]
        assert (first.tool_call_id, first.text) == ("call_1_0", "1")
        assert (second.tool_call_id, second.text) == ("call_1_1", "2")
        # In the next turn they have the same ids, so that what a model keeps of its
        # prompt still fits.
        assert messages(*chat, *HI)[:4] == (_, called, first, second)

    def test_results_are_told_apart_by_their_tool_s_name_where_there_is_one(self):
        calls = [{"function": {"name": name, "arguments": {}}} for name in "fgf"]
        _, g, f, again, late = messages(
            {"role": "assistant", "tool_calls": calls},
            *({"role": "tool", "tool_name": name} for name in ("g", "f", "f", "f")),
        )

        assert (g.tool_call_id, g.name) == ("call_0_1", "g")
        assert (f.tool_call_id, again.tool_call_id) == ("call_0_0", "call_0_2")
        assert late.tool_call_id is None

    def test_ids_are_kept_where_a_client_has_them(self):
        called, result = messages(
            {"role": "assistant", "tool_calls": [{"id": "c", **CALL}]},
            {"role": "tool", "content": "1", "tool_call_id": "c"},
        )

        assert called.tool_calls[0].id == result.tool_call_id == "c"

    def test_only_an_assistant_calls(self):
        assert messages({"role": "user", "content": "Hi", "tool_calls": [CALL]}) == (
            Message("user", "Hi"),
        )


class TestImages:
    def image(self, data):
        return base64.b64encode(data).decode()

    def test_an_image_comes_before_the_text_and_says_what_it_is(self):
        (message,) = messages({"role": "user", "content": "What is it?", "images": [PNG]})

        assert message.content == [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            {"type": "text", "text": "What is it?"},
        ]
        assert message.text == "What is it?"

    @pytest.mark.parametrize(
        ("start", "media_type"),
        [
            (b"\xff\xd8\xff\xe0", "image/jpeg"),
            (b"GIF89a", "image/gif"),
            (b"RIFF\x01\x02\n\x04WEBPVP8 ", "image/webp"),
        ],
    )
    def test_its_type_is_told_from_its_data(self, start, media_type):
        (message,) = messages({"role": "user", "images": [self.image(start)]})

        (part,) = message.content
        assert part["image_url"]["url"].startswith(f"data:{media_type};base64,")

    def test_lines_of_base64_are_joined(self):
        (message,) = messages({"role": "user", "images": [f"{PNG[:8]}\r\n{PNG[8:]}\n"]})

        assert message.content[0]["image_url"]["url"] == f"data:image/png;base64,{PNG}"

    @pytest.mark.parametrize(
        "image",
        ["", "hello", f"data:image/png;base64,{PNG}", "é", base64.b64encode(b"RIFF....WAVE").decode()],
    )  # fmt: skip
    def test_what_is_no_image_is_refused(self, image):
        body = {"role": "user", "content": "Hi", "images": [PNG, image]}

        assert refused(chat, messages=[body]).param == "messages[0].images[1]"

    def test_a_prompt_has_images_too(self):
        (message,) = generate(images=[PNG]).request.messages

        assert [part["type"] for part in message.content] == ["image_url", "text"]
        assert refused(generate, images=["x"]).param == "images[0]"


class TestGenerate:
    def test_the_least(self):
        parsed = generate(model="m", stream=False)

        assert parsed.request == InferenceRequest(prompt="Hi", model="m")
        assert (parsed.stream, parsed.is_load) == (False, False)

    def test_a_system_prompt_makes_it_a_chat(self):
        assert generate(system="Be brief.").request == InferenceRequest(
            messages=(Message("system", "Be brief."), Message("user", "Hi"))
        )

    @pytest.mark.parametrize("prompt", ["", None])
    def test_no_prompt_asks_whether_the_model_can_be_had(self, prompt):
        assert generate(prompt=prompt).is_load
        assert generate(prompt=prompt, system="Be brief.").is_load

    @pytest.mark.parametrize(
        "fields", [{"suffix": "}"}, {"raw": True}, {"template": "{{ .Prompt }}"}]
    )
    def test_what_would_be_another_question_is_refused(self, fields):
        assert refused(generate, **fields).param in fields

    def test_where_it_says_nothing_it_is_not(self):
        assert not generate(suffix="", raw=False, template="", system="", images=[]).is_load


@pytest.mark.parametrize("parse", [chat, generate])
class TestOptions:
    def test_those_with_a_name_in_a_request(self, parse):
        request = parse(
            options={
                "num_predict": 7,
                "temperature": 3.5,
                "top_p": 0.5,
                "top_k": 20,
                "seed": 0,
                "stop": ["\n", "user:"],
            }
        ).request

        assert (request.max_tokens, request.temperature, request.top_p) == (7, 3.5, 0.5)
        assert (request.top_k, request.seed, list(request.stop)) == (20, 0, ["\n", "user:"])

    def test_null_is_the_same_as_absent(self, parse):
        nothing = dict.fromkeys(("num_predict", "temperature", "top_k", "stop", "min_p"))
        request = parse(options=nothing, format=None, think=None, logprobs=None).request

        assert request == parse().request
        assert parse(options=None).request == request

    @pytest.mark.parametrize("unlimited", [-1, -2, 0])
    def test_no_limit(self, parse, unlimited):
        assert parse(options={"num_predict": unlimited}).request.max_tokens is None

    def test_a_random_seed(self, parse):
        assert parse(options={"seed": -1}).request.seed is None
        assert parse(options={"seed": -2}).request.seed == -2

    def test_a_top_k_that_keeps_all_is_not_the_backend_s_own(self, parse):
        assert parse(options={"top_k": 0}).request.top_k > 10**6

    def test_others_are_for_backends_that_take_them(self, parse):
        options = {"min_p": 0.05, "repeat_penalty": 1.1, "num_gpu": 1, "num_ctx": 8192}
        request = parse(options=options).request

        assert request.extra_body == {"min_p": 0.05, "repeat_penalty": 1.1}
        check_extra_body(request.extra_body)

    def test_penalties_are_not_ignored_by_backends_that_have_none(self, parse):
        neutral = parse(options={"presence_penalty": 0.0}).request
        assert neutral.extra_body == {}
        with pytest.raises(InvalidRequestError, match="frequency_penalty: is not supported"):
            check_extra_body(parse(options={"frequency_penalty": 1.5}).request.extra_body)

    def test_format(self, parse):
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}

        assert parse(format="json").request.response_format == {"type": "json_object"}
        assert parse(format="").request.response_format is None
        wanted = parse(format=schema).request.response_format
        assert wanted["type"] == "json_schema"
        assert wanted["json_schema"]["schema"] == schema

    def test_logprobs(self, parse):
        request = parse(logprobs=True, top_logprobs=3).request
        assert (request.logprobs, request.top_logprobs) == (True, 3)
        request = parse(top_logprobs=3).request
        assert (request.logprobs, request.top_logprobs) == (False, 0)

    @pytest.mark.parametrize(("think", "shows"), [(True, True), (False, False), ("low", True)])
    def test_think_says_whether_to_show_it(self, parse, think, shows):
        assert parse(think=think).shows_thinking is shows

    @pytest.mark.parametrize(("level", "effort"), [("low", "low"), ("max", "high")])
    def test_a_level_of_thinking_is_an_effort(self, parse, level, effort):
        assert parse(think=level).request.extra_body == {"reasoning_effort": effort}
        assert parse(think=True).request.extra_body == {}
