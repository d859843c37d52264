"""From items to blocks: one at a time is open, and none is ever reopened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream import (
    Choice,
    Finish,
    InferenceResponse,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.dialects.blocks import BlockRenderer, blocks_of
from flask_llmstream.framing import SSE


class Spelled(BlockRenderer):
    """A dialect that writes down what it is told."""

    def start(self):
        return b"start;"

    def opened(self, block):
        assert block.text == ""
        return f"open {block.index} {block.kind.value} {block.id}{block.name};".encode()

    def delta(self, block, text):
        assert type(text) is str
        return f"{block.index}+{text};".encode()

    def closed(self, block):
        return f"close {block.index} {block.text};".encode()

    def ended(self, response):
        return b"end"

    def error(self, error):
        return b"error"


def render(*items):
    renderer = Spelled(SSE)
    frames = [renderer.start(), *map(renderer.render, items), renderer.end(InferenceResponse())]
    assert frames[0] == b"start;"
    assert frames[-1].endswith(b"end")
    return b"".join(frames).decode().removeprefix("start;").removesuffix("end")


def call(index, arguments, **first):
    return ToolCallDelta(index, arguments=arguments, **first)


def test_text_is_one_block():
    assert render("Hel", "lo", Finish("stop"), Usage(1, 2)) == (
        "open 0 text ;0+Hel;0+lo;close 0 Hello;"
    )


def test_an_empty_answer_has_no_blocks():
    assert render("", Token(""), Reasoning(""), Refusal(""), Finish("stop")) == ""


def test_each_kind_has_a_block_of_its_own():
    assert render(Reasoning("hm"), "a", Refusal("no"), "b") == (
        "open 0 reasoning ;0+hm;close 0 hm;"
        "open 1 text ;1+a;close 1 a;"
        "open 2 refusal ;2+no;close 2 no;"
        "open 3 text ;3+b;close 3 b;"
    )


def test_a_token_is_its_text():
    assert render(Token("a", logprob=-1.0), "b") == "open 0 text ;0+a;0+b;close 0 ab;"


def test_other_choices_have_no_place():
    assert render(Token("a", choice=1), Reasoning("b", choice=1), Finish("stop", choice=1)) == ""


def test_a_tool_call_is_a_block():
    assert render("a", call(0, "", id="c0", name="f"), call(0, '{"a":'), call(0, "1}")) == (
        'open 0 text ;0+a;close 0 a;open 1 tool_call c0f;1+{"a":;1+1};close 1 {"a":1};'
    )


def test_calls_one_after_the_other_wait_for_nothing():
    renderer = Spelled(SSE)
    renderer.render(call(0, "{}", id="c0", name="f"))

    assert renderer.render(call(1, "[", id="c1", name="g")) == (
        b"close 0 {};open 1 tool_call c1g;1+[;"
    )


def test_what_comes_for_another_block_waits_until_a_call_is_whole():
    renderer = Spelled(SSE)
    renderer.render(call(0, "[", id="c0", name="f"))

    assert renderer.render(call(1, "[", id="c1", name="g")) == b""
    assert renderer.render("text") == b""
    assert renderer.render(call(0, "1")) == b"0+1;"
    assert renderer.render(call(0, "]")) == b"0+];close 0 [1];open 1 tool_call c1g;1+[;"
    assert renderer.render(call(1, "]")) == b"1+];close 1 [];open 2 text ;2+text;"


def test_a_call_that_is_never_whole_holds_nothing_back_beyond_the_end():
    assert render(call(0, "[", id="c0", name="f"), call(1, "[", id="c1", name="g"), "a") == (
        "open 0 tool_call c0f;0+[;close 0 [;open 1 tool_call c1g;1+[;close 1 [;"
        "open 2 text ;2+a;close 2 a;"
    )


def test_arguments_after_a_calls_end_are_an_error_and_not_lost():
    renderer = Spelled(SSE)
    renderer.render(call(0, "{}", id="c0", name="f"))
    renderer.render("a")

    assert renderer.render(call(0, " ")) == b""
    with pytest.raises(ValueError, match="whole already"):
        renderer.render(call(0, "{}"))


pieces = st.lists(
    st.tuples(st.integers(0, 2), st.text("ab", min_size=1, max_size=3)), min_size=1, max_size=12
)


@given(pieces)
def test_every_piece_arrives_in_its_block_whatever_the_turns(pieces):
    """Each call's arguments are one JSON string, cut anywhere."""
    texts = {}
    for index, text in pieces:
        texts[index] = texts.get(index, "") + text
    left = {index: f'"{text}"' for index, text in texts.items()}
    renderer = Spelled(SSE)
    for index, text in pieces:
        size = len(text) + 1
        piece, left[index] = left[index][:size], left[index][size:]
        renderer.render(call(index, piece, id=f"c{index}"))
    for index, piece in left.items():
        if piece:
            renderer.render(call(index, piece))
    renderer.end(InferenceResponse())

    assert {block.call: block.text for block in renderer.blocks} == {
        index: f'"{text}"' for index, text in texts.items()
    }


def test_a_whole_answer_has_the_blocks_of_its_parts():
    choice = Choice(text="b", reasoning="a", refusal="c", tool_calls=(ToolCall("id", "f", "{}"),))

    assert [(block.index, block.kind.value, block.text) for block in blocks_of(choice)] == [
        (0, "reasoning", "a"),
        (1, "text", "b"),
        (2, "refusal", "c"),
        (3, "tool_call", "{}"),
    ]
    assert blocks_of(Choice()) == []
