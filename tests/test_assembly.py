"""From what a backend emits to clean items and the whole answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.core.assembly import Assembler
from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Reasoning,
    Refusal,
    Token,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from flask_llmstream.exceptions import EngineError, InvalidRequestError


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


def text_of(items, choice=0):
    """The answer text that a client of *choice* reads."""
    texts = (item for item in items if isinstance(item, str))
    return "".join(text for text in texts if getattr(text, "choice", 0) == choice)


def split(data, cuts):
    """*data* in pieces, empty ones among them."""
    places = sorted(min(cut, len(data)) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


# Plain text.


def test_text_passes_through_and_adds_up():
    passed, response, assembler = run(["Hello", " ", "world", ""], model="m", request_id="r")

    assert passed == ["Hello", " ", "world"]
    assert (response.text, response.finish_reason) == ("Hello world", "stop")
    assert (response.model, response.request_id) == ("m", "r")
    assert response.usage == Usage(0, 3), "counted, since the backend reports none"
    assert assembler.text == "Hello world"
    assert not assembler.is_cut


def test_what_the_backend_reports_counts():
    passed, response, assembler = run(
        ["a", Finish("length"), Usage(5, 7, cached_tokens=2), "after the end"]
    )

    assert passed == ["a", Finish("length"), Usage(5, 7, cached_tokens=2)]
    assert (response.text, response.finish_reason) == ("a", "length")
    assert response.usage == Usage(5, 7, cached_tokens=2)
    assert assembler.finished_choices == 1


def test_an_empty_answer_is_an_answer():
    passed, response, _ = run([])

    assert passed == []
    assert (response.text, response.finish_reason, response.usage) == ("", "stop", Usage(0, 0))


def test_thinking_never_leaks_into_text():
    passed, response, assembler = run([Reasoning("hm"), Reasoning("..."), "yes"])

    assert passed == [Reasoning("hm"), Reasoning("..."), "yes"]
    assert response.text == assembler.text == "yes"
    assert response.choices[0].reasoning == "hm..."
    assert response.usage == Usage(0, 3)


def test_a_refusal_is_kept_apart_from_text():
    passed, response, assembler = run([Refusal("No"), Refusal(".")])

    assert passed == [Refusal("No"), Refusal(".")]
    assert response.text == assembler.text == ""
    assert response.choices[0].refusal == "No."


@pytest.mark.parametrize("item", [None, 1, {"text": "a"}, bytearray(b"a"), ["a"]])
def test_what_no_backend_may_emit_is_an_engine_error(item):
    with pytest.raises(EngineError, match=f"emitted {type(item).__name__}; it may emit str"):
        run([item])


# Stop strings.


def reference(text, stops):
    """Cut at the first stop string to be complete; of two at once, the longer one."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


stops = st.lists(st.text("ab\N{EURO SIGN}", min_size=1, max_size=4), min_size=1, max_size=3)
texts = st.text("ab\N{EURO SIGN}", max_size=20)
cuts = st.lists(st.integers(0, 60), max_size=12)


@given(texts, stops, cuts, st.sampled_from(["str", "Token", "bytes", "logprobs"]))
def test_stop_strings_end_any_text_however_it_is_split(text, stop, cuts, kind):
    shown, matched = reference(text, stop)
    if kind == "bytes":
        emitted = split(text.encode(), cuts)
    elif kind == "str":
        emitted = split(text, cuts)
    elif kind == "Token":
        emitted = [Token(piece) for piece in split(text, cuts)]
    else:
        emitted = [Token(piece, logprob=-0.5) for piece in split(text, cuts)]
    passed, response, assembler = run([*emitted, Finish("length")], stop=stop)

    assert text_of(passed) == response.text == shown
    assert response.choices[0].stop_sequence == matched
    assert response.finish_reason == ("stop" if matched else "length")
    assert assembler.is_cut is (matched is not None)
    if kind == "logprobs" and matched is None:
        assert len(response.logprobs) == len(emitted), "each keeps its log probability"


def test_a_stop_string_ends_the_choice_with_its_text_before():
    passed, response, assembler = run(["one, t", "wo", " three"], stop=["two"])

    assert passed == ["one, ", Finish("stop", stop_sequence="two")]
    assert response.text == "one, "
    assert assembler.is_cut


def test_text_before_and_the_end_come_of_one_item():
    passed, _, _ = run(["all of it. And more"], stop=["."])

    assert passed == ["all of it", Finish("stop", stop_sequence=".")]


def test_what_was_held_back_comes_with_the_end():
    assembler = Assembler(InferenceRequest(prompt="p", stop=["END"]))

    assert assembler.accept("the EN") == ("the ",)
    assert assembler.accept("") == ()
    assert assembler.finish() == ("EN",)


# max_tokens.


@pytest.mark.parametrize(
    "emitted", [["a", "b", "c"], [b"a", b"b", b"c"], [Token(t, logprob=-1.0) for t in "abc"]]
)
def test_the_first_token_over_the_limit_ends_the_choice(emitted):
    passed, response, assembler = run(emitted, max_tokens=2)

    assert text_of(passed) == response.text == "ab"
    assert passed[-1] == Finish("length")
    assert response.finish_reason == "length"
    assert assembler.is_cut


def test_a_backend_that_ends_at_the_limit_says_how_itself():
    passed, response, assembler = run(["a", "b", Finish("stop"), Usage(1, 2)], max_tokens=2)

    assert passed == ["a", "b", Finish("stop"), Usage(1, 2)]
    assert response.finish_reason == "stop"
    assert not assembler.is_cut


def test_thinking_and_tool_calls_count_too():
    for item in (Reasoning("hm"), ToolCallDelta(0, id="c", name="f")):
        passed, _, _ = run(["a", item, item], max_tokens=2)
        assert passed == ["a", item, Finish("length")]


def test_half_a_character_at_the_limit_is_shown_not_lost():
    passed, response, _ = run([b"a\xe2", b"", Reasoning("hm")], max_tokens=1)

    assert passed == ["a", "\N{REPLACEMENT CHARACTER}", Finish("length")]
    assert response.text == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_at_the_limit_ends_it_as_such():
    stop = "a\N{REPLACEMENT CHARACTER}"
    passed, response, _ = run([b"xa\xe2", Reasoning("b")], max_tokens=1, stop=[stop])

    assert passed == ["x", Finish("stop", stop_sequence=stop)]
    assert response.finish_reason == "stop"


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


@given(st.text(max_size=20), cuts)
def test_bytes_become_the_same_text_however_they_are_split(text, cuts):
    passed, response, _ = run(split(text.encode(), cuts))

    assert text_of(passed) == response.text == text


def test_bytes_split_at_every_byte():
    text = "a\N{EURO SIGN}\N{GRINNING FACE}z"
    passed, _, _ = run([bytes([byte]) for byte in text.encode()])

    assert passed == list(text), "each character as soon as it is complete"


@pytest.mark.parametrize("data", [b"\xff", b"a\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80"])
def test_invalid_utf8_is_an_engine_error(data):
    with pytest.raises(EngineError, match="not valid UTF-8"):
        run([data])
    with pytest.raises(EngineError, match="not valid UTF-8"):
        run([bytes([byte]) for byte in data])


def test_text_in_the_middle_of_a_character_is_an_engine_error():
    assert text_of(run([b"\xe2\x82\xac", "x", b"\xe2", "", b"\x82\xac"])[0]) == "€x€"
    with pytest.raises(EngineError, match="not valid UTF-8"):
        run([b"\xe2", "x"])


def test_a_character_cut_off_by_the_end_is_replaced():
    for end in ([], [Finish("length")]):
        passed, response, _ = run([b"a\xf0\x9f", *end])
        assert text_of(passed) == response.text == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("end", [[], [Finish("length")]])
def test_a_cut_character_may_complete_a_stop_string(end):
    passed, response, _ = run([b"end\xe2\x82", *end], stop=["d\N{REPLACEMENT CHARACTER}"])
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


def test_all_valid_text_passes():
    for text in ("\N{GRINNING FACE}", "e\N{COMBINING ACUTE ACCENT}", "\0", "\u2028"):
        assert run([text])[0] == [text]


# Several choices.


def test_choices_are_told_apart():
    emitted = [
        Token("a", choice=0),
        Token("b", choice=1),
        "c",
        Reasoning("r", choice=1),
        Finish("stop", choice=0),
        ToolCallDelta(0, id="t", name="f", choice=1),
        Token("d", choice=1),
        Finish("tool_calls", choice=1),
    ]
    passed, response, assembler = run(emitted, n=2)

    assert passed == emitted
    assert [choice.text for choice in response.choices] == ["ac", "bd"]
    assert [choice.finish_reason for choice in response.choices] == ["stop", "tool_calls"]
    assert response.choices[1].reasoning == "r"
    assert response.choices[1].tool_calls == (ToolCall("t", "f", ""),)
    assert (response.text, response.tool_calls) == ("ac", ())
    assert assembler.finished_choices == 2
    assert assembler.text == "ac"


def test_each_choice_has_its_own_stop_and_limit():
    emitted = [Token(text, choice=choice) for text in ("a", "x.", "y") for choice in (0, 1)]
    passed, response, assembler = run([*emitted[:-1], Token("E", choice=1)], n=2, stop=[".", "EN"])

    assert text_of(passed, 0) == "ax"
    assert text_of(passed, 1) == "ax"
    assert assembler.is_cut
    assert {choice.stop_sequence for choice in response.choices} == {"."}


def test_held_back_text_stays_with_its_choice():
    passed, response, _ = run(["a", Token("bE", choice=1)], n=2, stop=["END"])

    assert [(item, getattr(item, "choice", 0)) for item in passed] == [
        ("a", 0),
        ("b", 1),
        ("E", 1),
    ]
    assert [choice.text for choice in response.choices] == ["a", "bE"]


@pytest.mark.parametrize("item", [Token("a", choice=1), Finish("stop", choice=-1)])
def test_a_choice_nobody_asked_for_is_an_engine_error(item):
    with pytest.raises(EngineError, match="1 were asked for"):
        run([item])


def test_choices_that_do_not_come_are_an_error_of_the_request():
    with pytest.raises(InvalidRequestError, match="one choice only") as caught:
        run(["a"], n=2)
    assert caught.value.param == "n"

    run(["a", Finish("stop", choice=1)], n=2)  # An empty one is one.


# Log probabilities.


def test_tokens_keep_their_log_probabilities():
    emitted = [Token("a", logprob=-0.1, top_logprobs=[("a", -0.1), ("b", -2.0)]), Token("b")]
    passed, response, _ = run(emitted, logprobs=True)

    assert passed == emitted
    assert passed[0].top_logprobs == emitted[0].top_logprobs
    assert response.logprobs == (emitted[0],)


def test_log_probabilities_survive_a_token_that_is_held_back():
    emitted = [Token(text, logprob=-number) for number, text in enumerate("aEx", 1)]
    passed, response, _ = run(emitted, stop=["END"], logprobs=True)

    assert passed == ["a", "", "Ex"]
    assert [token.logprob for token in response.logprobs] == [-1, -2, -3]
    assert response.text == "aEx"


def test_the_token_that_completes_a_stop_string_shows_only_what_is_before():
    emitted = [Token("a", logprob=-1.0), Token("bEND", logprob=-2.0)]
    passed, response, _ = run(emitted, stop=["END"])
    assert passed == ["a", "b", Finish("stop", stop_sequence="END")]
    assert response.logprobs == ("a", "b")

    passed, response, _ = run([Token("END", logprob=-1.0)], stop=["END"])
    assert passed == [Finish("stop", stop_sequence="END")]
    assert response.logprobs == ()


def test_a_token_without_text_may_carry_a_log_probability():
    passed, response, _ = run([Token("", logprob=-1.0), Token(""), Token("a")])

    assert passed == ["", "a"]
    assert len(response.logprobs) == 1


@pytest.mark.parametrize("first", ["a", b"a", Token("a")])
def test_a_model_without_log_probabilities_is_an_error_of_the_request(first):
    with pytest.raises(InvalidRequestError, match="does not return logprobs") as caught:
        run([first], logprobs=True)
    assert caught.value.param == "logprobs"


def test_log_probabilities_are_not_asked_of_what_is_no_text():
    passed, _, _ = run([Reasoning("hm"), "", Finish("stop")], logprobs=True)

    assert passed == [Reasoning("hm"), Finish("stop")]


# Tool calls.


def test_tool_calls_add_up():
    emitted = [
        ToolCallDelta(1, id="b", name="g", arguments='{"x"'),
        ToolCallDelta(0, id="a"),
        ToolCallDelta(1, arguments=": 1}"),
        ToolCallDelta(0, name="f", arguments="{}"),
        ToolCallDelta(0, name="ignored"),
        Finish("tool_calls"),
    ]
    passed, response, _ = run(emitted)

    assert passed == emitted
    assert response.tool_calls == (ToolCall("a", "f", "{}"), ToolCall("b", "g", '{"x": 1}'))


TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("tool_choice", ["required", NAMED])
@pytest.mark.parametrize("end", [[], [Finish("stop")], [Finish("tool_calls")]])
def test_a_required_call_that_does_not_come_is_an_error_of_the_request(tool_choice, end):
    with pytest.raises(InvalidRequestError, match="did not call a tool") as caught:
        run(["in prose", *end], tools=TOOLS, tool_choice=tool_choice)
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("tool_choice", [None, "auto", "none", "required", NAMED])
def test_a_call_that_comes_is_fine(tool_choice):
    run([ToolCallDelta(0, name="f")], tools=TOOLS, tool_choice=tool_choice)


def test_prose_is_fine_where_a_call_is_not_required_or_was_cut_off():
    for tool_choice in (None, "auto", "none"):
        run(["in prose"], tools=TOOLS, tool_choice=tool_choice)
    run(["in prose", Finish("length")], tools=TOOLS, tool_choice="required")
    run(["in prose"], tool_choice="required")  # No tools to call.


@pytest.mark.parametrize("missing", [None, ""])
def test_a_tool_call_without_an_id_gets_one_and_keeps_it(missing):
    passed, response, _ = run(
        [ToolCallDelta(0, id=missing, name="f"), ToolCallDelta(0, arguments="{}")]
    )

    assert passed[0].id.startswith("call_")
    assert passed[1].id is None
    assert response.tool_calls == (ToolCall(passed[0].id, "f", "{}"),)


# Whole answers.


def test_a_whole_answer_becomes_its_items():
    call = ToolCall("call_1", "f", "{}")
    token = Token("yes", logprob=-0.5)
    response = InferenceResponse(
        choices=(
            Choice(reasoning="hm", refusal="no", text="yes", logprobs=(token,)),
            Choice(index=1, text="no", tool_calls=(call,), stop_sequence="."),
            Choice(index=2),
        ),
        usage=Usage(1, 2),
    )
    passed, whole = absorb(response, n=3)

    assert passed == [
        Reasoning("hm"),
        Refusal("no"),
        token,
        Finish("stop"),
        Token("no", choice=1),
        ToolCallDelta(0, id="call_1", name="f", arguments="{}", choice=1),
        Finish("stop", stop_sequence=".", choice=1),
        Finish("stop", choice=2),
        Usage(1, 2),
    ]
    assert whole.choices == response.choices
    assert whole.usage == Usage(1, 2)


def test_a_whole_answer_obeys_stop_and_limit_too():
    assert absorb(InferenceResponse(text="a.b"), stop=["."])[1].text == "a"
    assert absorb(InferenceResponse(text="b"), ["a"], max_tokens=1)[1].text == "a"


def test_emitted_usage_is_not_replaced():
    _, whole = absorb(InferenceResponse(usage=Usage(1, 1)), ["a", Usage(2, 2)])

    assert whole.usage == Usage(2, 2)


def test_emitted_tool_calls_are_not_repeated():
    call = ToolCall("call_1", "f", "{}")
    response = InferenceResponse(text="a", tool_calls=[call])
    _, whole = absorb(response, [ToolCallDelta(0, id="call_1", name="f", arguments="{}")])

    assert whole.tool_calls == (call,)
    assert whole.text == "a"


def test_a_returned_choice_nobody_asked_for_is_an_engine_error():
    response = InferenceResponse(choices=(Choice(text="a"), Choice(index=1, text="b")))

    with pytest.raises(EngineError, match="choice 1; 1 were asked for"):
        absorb(response)


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
