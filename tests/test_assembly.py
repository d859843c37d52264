"""From what a backend emits to clean items and the whole answer."""

from __future__ import annotations

import pytest

from flask_llmstream.core.assembly import Assembler
from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Reasoning,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.exceptions import EngineError


def run(emitted, **options):
    """What is passed on, the whole answer, and the assembler."""
    assembler = Assembler(InferenceRequest(prompt="p", **options))
    passed = [item for each in emitted for item in assembler.accept(each)]
    passed += assembler.finish()
    return passed, assembler.response(), assembler


def absorb(response, emitted=(), **options):
    """The same for a backend that emitted something and then returned *response*."""
    assembler = Assembler(InferenceRequest(prompt="p", **options))
    passed = [item for each in emitted for item in assembler.accept(each)]
    passed += [item for each in assembler.absorb(response) for item in assembler.accept(each)]
    passed += assembler.finish()
    return passed, assembler.response()


# max_tokens.


def test_text_that_was_held_back_is_shown_when_thinking_reaches_the_limit():
    passed, response, _ = run(["a", Reasoning("hm")], stop=["ab"], max_tokens=1)

    assert passed == ["a", Finish("length")]
    assert response.text == "a"


def test_the_backend_need_not_go_on_once_every_choice_has_ended_and_one_was_cut():
    request = InferenceRequest(prompt="p", n=2, max_tokens=1)
    first_cut, second_cut = Assembler(request), Assembler(request)

    for item in ("a", "b"):
        first_cut.accept(Token(item, choice=0))
    assert not first_cut.is_cut
    first_cut.accept(Finish("stop", choice=1))
    assert first_cut.is_cut

    second_cut.accept(Finish("stop", choice=0))
    for item in ("a", "b"):
        assert not second_cut.is_cut
        second_cut.accept(Token(item, choice=1))
    assert second_cut.is_cut


# Bytes.


def test_a_cut_character_may_complete_a_stop_string():
    passed, response, _ = run([b"end\xe2\x82"], stop=["d\N{REPLACEMENT CHARACTER}"])
    finish = Finish("stop", stop_sequence="d\N{REPLACEMENT CHARACTER}")

    assert passed == ["en", finish]
    assert (response.text, response.finish_reason) == ("en", "stop")
    assert response.choices[0].stop_sequence == finish.stop_sequence


# Unicode.


@pytest.mark.parametrize(
    "item",
    [
        "a\ud800",
        Token("\udfff"),
        Reasoning("\ud800"),
        ToolCallDelta(0, arguments="\ud800"),
        ToolCallDelta(0, name="\ud800"),
        ToolCallDelta(0, id="\ud800"),
    ],
)
@pytest.mark.parametrize("stop", [(), ("x",)])
def test_a_lone_surrogate_is_an_engine_error(item, stop):
    with pytest.raises(EngineError, match="not valid Unicode"):
        run([item], stop=stop)


# Tool calls.


@pytest.mark.parametrize("missing", [None, ""])
def test_a_tool_call_without_an_id_gets_one_and_keeps_it(missing):
    passed, response, _ = run(
        [ToolCallDelta(0, id=missing, name="f"), ToolCallDelta(0, arguments="{}")]
    )

    assert passed[0].id.startswith("call_")
    assert passed[1].id is None
    assert response.tool_calls == (ToolCall(passed[0].id, "f", "{}"),)


# Whole answers.


def test_a_returned_answer_adds_what_was_not_emitted():
    call = ToolCall("call_1", "f", "{}")
    response = InferenceResponse(
        text="ab",
        finish_reason="length",
        tool_calls=[call],
        usage=Usage(1, 2),
    )

    passed, whole = absorb(response, ["a", "b"])

    assert passed == [
        "a",
        "b",
        ToolCallDelta(0, id="call_1", name="f", arguments="{}"),
        Finish("length"),
        Usage(1, 2),
    ]
    assert (whole.text, whole.finish_reason, whole.usage) == ("ab", "length", Usage(1, 2))


def test_a_returned_answer_follows_its_emitted_reasoning():
    response = InferenceResponse(choices=(Choice(text="yes", reasoning="hm"),))

    passed, whole = absorb(response, [Reasoning("hm")])

    assert passed == [Reasoning("hm"), "yes", Finish("stop")]
    assert whole.choices[0].reasoning == "hm"


def test_a_returned_answer_is_not_repeated_though_it_was_held_back():
    passed, whole = absorb(InferenceResponse(text="a"), ["a"], stop=["ab"])

    assert passed == ["a", Finish("stop")]
    assert whole.text == "a"
