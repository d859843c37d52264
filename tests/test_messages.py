"""Requests, items and responses."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.core.messages import (
    Choice,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Message,
    Reasoning,
    Token,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from flask_llmstream.exceptions import InvalidRequestError

# Tokens.


def test_a_token_is_its_text_and_more():
    token = Token("yes", logprob=-0.25, top_logprobs=[("yes", -0.25), ("no", -2.0)], choice=1)

    assert token == "yes"
    assert hash(token) == hash("yes")
    assert (token.logprob, token.choice) == (-0.25, 1)
    assert token.top_logprobs == (TopLogprob("yes", -0.25), TopLogprob("no", -2.0))
    assert token.top_logprobs[1].token == "no"
    assert repr(token) == "Token('yes', logprob=-0.25, choice=1)"


def test_a_token_alone_is_a_plain_piece_of_text():
    token = Token("a")

    assert (token.logprob, token.top_logprobs, token.choice) == (None, (), 0)
    assert type(token + "b") is str
    assert type(token[:1]) is str
    assert type("".join([token, token])) is str  # noqa: FLY002


@given(st.text(), st.none() | st.floats(max_value=0), st.integers(0, 9))
def test_a_token_survives_copying_and_pickling(text, logprob, choice):
    token = Token(text, logprob=logprob, top_logprobs=[(text, -1.0)], choice=choice)
    for other in (copy.copy(token), copy.deepcopy(token), pickle.loads(pickle.dumps(token))):
        assert type(other) is Token
        assert other == token
        assert (other.logprob, other.choice) == (token.logprob, token.choice)
        assert other.top_logprobs == token.top_logprobs


def test_a_token_takes_nothing_else():
    with pytest.raises(AttributeError):
        Token("a").other = 1


@pytest.mark.parametrize(
    "item", [Reasoning("a"), ToolCallDelta(0), Usage(1, 2), Finish("stop"), Message("user")]
)
def test_items_are_immutable(item):
    name = dataclasses.fields(item)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(item, name, "other")


def test_thinking_is_no_text():
    assert not isinstance(Reasoning("a"), str)
    assert Reasoning("a", choice=1) != Reasoning("a")


def test_usage_adds_up():
    assert Usage(3, 4, cached_tokens=2, reasoning_tokens=1).total_tokens == 7


# Chat messages.


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ([], ""),
        (
            [
                {"type": "text", "text": "one "},
                {"type": "image_url", "image_url": {"url": "data:"}, "text": "no"},
                {"type": "text", "text": "two"},
                {"type": "text"},
            ],
            "one two",
        ),
    ],
)
def test_a_messages_text_is_its_text_parts(content, text):
    assert Message("user", content).text == text


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ((), "the prompt"),
        ((Message("system", "s"),), "the prompt"),
        ((Message("user", "first"), Message("assistant", "a"), Message("user", "last")), "last"),
        ((Message("user", "u"), Message("tool", "t", tool_call_id="c")), "u"),
    ],
)
def test_the_last_user_text(messages, text):
    assert InferenceRequest(prompt="the prompt", messages=messages).last_user_text == text


# Requests.


def test_a_request_needs_nothing_but_a_prompt():
    request = InferenceRequest(prompt="p")

    assert request.messages == ()
    assert (request.n, request.stop, request.stream, request.priority) == (1, (), False, 0)
    assert not request.cancelled
    assert not request.timed_out
    request.on_cancel(pytest.fail)  # Nobody runs it, so nobody cancels it.


def test_one_stop_string_may_stand_for_itself():
    assert InferenceRequest(stop="END").stop == ("END",)
    assert list(InferenceRequest(stop=["a", "b"]).stop) == ["a", "b"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("n", 0),
        ("top_k", 0),
        ("top_logprobs", -1),
        ("stop", [""]),
        ("stop", ["a", ""]),
    ],
)
def test_what_means_nothing_is_refused_by_its_name(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        InferenceRequest(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("least", [{"max_tokens": 1, "n": 1, "top_k": 1, "top_logprobs": 0}])
def test_the_least_of_everything_is_fine(least):
    InferenceRequest(**least)


def test_the_engines_own_fields_are_neither_compared_nor_shown():
    class Control:
        is_over = True
        timed_out = True

        def __init__(self):
            self.functions = []

        def on_cancel(self, function):
            self.functions.append(function)

    control = Control()
    theirs = InferenceRequest(prompt="p", stream_callback=print)
    running = dataclasses.replace(theirs, control=control)
    running.on_cancel(print)

    assert running == theirs == InferenceRequest(prompt="p")
    assert "control" not in repr(running)
    assert "stream_callback" not in repr(running)
    assert running.cancelled
    assert running.timed_out
    assert control.functions == [print]


# Responses.


def test_a_response_makes_its_one_choice_of_its_fields():
    call = ToolCall("c", "f", "{}")
    token = Token("a", logprob=-1.0)
    response = InferenceResponse(
        text="a", tool_calls=[call], finish_reason="length", logprobs=[token]
    )

    assert response.choices == (
        Choice(text="a", tool_calls=(call,), finish_reason="length", logprobs=(token,)),
    )


def test_a_response_keeps_the_choices_it_is_given():
    choices = (Choice(text="a"), Choice(index=1, text="b"))

    assert InferenceResponse(choices=choices).choices == choices


def test_a_copy_of_a_request_has_all_its_fields_and_is_its_own():
    request = InferenceRequest(prompt="p", model="m", stop=["."], metadata={"a": 1}, n=2)

    copied = copy.copy(request)
    copied.model = "other"

    assert dataclasses.replace(copied, model="m") == request
    assert (request.model, copied.model) == ("m", "other")
