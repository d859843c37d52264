"""The protocol from the caller's side, without a network: cut anywhere, odd servers."""

from __future__ import annotations

import json

import pytest

from flask_llmstream import (
    Finish,
    IncompleteStreamError,
    Refusal,
    StreamReader,
    Token,
    ToolCallDelta,
    UpstreamError,
    Usage,
)
from flask_llmstream.backends import upstream
from flask_llmstream.backends.upstream_chat import model_ids, read_chunk, read_error

STREAM = (
    ": comment\n\n"
    'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{"content":"Grüße"}}]}\r\n\r\n'
    'data: {"choices":[{"index":0,"delta":{"content":" 🍰"}}]}\n\n'
    'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    "data: [DONE]\n\n"
).encode()
ITEMS = ["Grüße", " 🍰", Usage(1, 2), Finish("stop")]


class Pieces:
    """A body in pieces, as an `Exchange` gives it."""

    def __init__(self, *pieces):
        self._pieces = iter(pieces)
        self.is_finished = False

    def __iter__(self):
        return self._pieces

    def finish(self):
        self.is_finished = True


def read(*pieces):
    return list(upstream._read_events(Pieces(*pieces)))


def test_a_stream_may_be_cut_into_pieces_anywhere():
    for at in range(len(STREAM)):
        assert read(STREAM[:at], STREAM[at:]) == ITEMS
    assert read(*(STREAM[at : at + 1] for at in range(len(STREAM)))) == ITEMS


def test_a_stream_that_breaks_off_anywhere_has_no_finish():
    # The marker's own empty line may be missing at a length that still ends its event.
    for at in range(len(STREAM) - 1):
        items = []
        with pytest.raises(IncompleteStreamError) as caught:
            items.extend(upstream._read_events(Pieces(STREAM[:at])))
        assert caught.value.code == "stream_incomplete"
        assert items == ITEMS[: len(items)]
        assert not any(isinstance(item, Finish) for item in items)


def test_the_rest_of_the_body_is_read_after_the_marker():
    pieces = Pieces(STREAM)
    list(upstream._read_events(pieces))
    assert pieces.is_finished


def chunk(**choice):
    return list(read_chunk(json.dumps({"choices": [choice]})))


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("tool_calls", "tool_calls"),
        ("content_filter", "content_filter"),
        ("function_call", "tool_calls"),
        ("eos", "stop"),
        ("max_tokens", "length"),
        ("abort", "stop"),
    ],
)
def test_finish_reasons_are_those_that_clients_know(said, means):
    assert chunk(finish_reason=said) == [Finish(means)]


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"choices": None},
        {"choices": [], "usage": None},
        {"choices": [{"delta": None, "logprobs": None, "finish_reason": None}]},
        {"choices": [{"delta": {"content": None, "tool_calls": None}}]},
        {"choices": [{"delta": {}, "logprobs": {"content": None}}]},
    ],
)
def test_what_says_nothing_is_nothing(event):
    assert list(read_chunk(json.dumps(event))) == []


def test_usage_may_have_holes():
    usage = {"prompt_tokens": 3, "completion_tokens": None, "prompt_tokens_details": {}}
    assert list(read_chunk(json.dumps({"usage": usage}))) == [Usage(3, 0)]


def test_a_refusal_is_no_text():
    assert chunk(delta={"refusal": "No."}) == [Refusal("No.")]


def test_another_choices_text_says_so():
    (token,) = chunk(index=2, delta={"content": "x"})
    assert (token, token.choice) == ("x", 2)


def test_calls_without_an_index_are_told_apart_by_their_place():
    calls = [{"id": "a", "function": {"name": "f"}}, {"id": "b", "function": {"name": "g"}}]
    assert chunk(delta={"tool_calls": calls}) == [
        ToolCallDelta(0, id="a", name="f"),
        ToolCallDelta(1, id="b", name="g"),
    ]


def test_positions_of_one_chunk_are_tokens_each_where_they_are_its_text():
    positions = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]
    tokens = chunk(delta={"content": "ab"}, logprobs={"content": positions})
    assert [(token, token.logprob) for token in tokens] == [("a", -1.0), ("b", -2.0)]
    assert all(isinstance(token, Token) for token in tokens)


def test_positions_that_split_a_character_leave_the_text_whole():
    positions = [{"token": "\\xc3", "logprob": -1.0}, {"token": "\\xbc", "logprob": -2.0}]
    tokens = chunk(delta={"content": "ü"}, logprobs={"content": positions})
    assert [(token, token.logprob) for token in tokens] == [("ü", -1.0), ("", -2.0)]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"error": {"message": "m", "code": "c", "param": "p"}}, ("m", "c", "p")),
        ({"error": {"message": "m", "code": None}}, ("m", "", None)),
        ({"error": {"message": None, "code": "not a word"}}, ("", "", None)),
        ({"error": "m"}, ("m", "", None)),
        ({"message": "m", "code": 400}, ("m", "", None)),
        ({"detail": "m"}, ("m", "", None)),
        ({"detail": [{"msg": "a"}, {"msg": "b"}, 1]}, ("a; b", "", None)),
        ({"error": []}, ("", "", None)),
        (1, ("", "", None)),
    ],
)
def test_errors_are_read_in_every_form(document, expected):
    assert read_error(json.dumps(document).encode()) == expected


def test_the_models_are_listed():
    assert model_ids(b'{"data": [{"id": "a"}, {"id": "b"}]}') == ("a", "b")


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b"null", b'{"data": [1]}', b"\xff"])
def test_what_is_no_list_of_models(document):
    with pytest.raises(UpstreamError):
        model_ids(document)


def test_a_reader_takes_the_status_in_an_error_for_its_class():
    events = StreamReader([b'data: {"error":{"message":"m","code":400}}\n\n'])
    with pytest.raises(Exception, match="m") as caught:
        next(events)
    assert caught.value.code == "invalid_request"
