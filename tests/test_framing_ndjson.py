import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.exceptions import StreamError
from flask_llmstream.framing import NDJSON, NDJSONDecoder, escape_line_separators


def decode(data, **options):
    results = []
    for cut in range(len(data) + 1):
        decoder = NDJSONDecoder(**options)
        results.append(decoder.feed(data[:cut]) + decoder.feed(data[cut:]))
    assert all(result == results[0] for result in results)
    return results[0]


def feed_all(decoder, pieces):
    for piece in pieces:
        decoder.feed(piece)


def test_lines_are_returned_as_they_end():
    decoder = NDJSONDecoder()
    assert decoder.feed(b'{"a"') == []
    assert decoder.feed(b':1}\n{"b":2}\n{') == ['{"a":1}', '{"b":2}']


def test_crlf_ends_a_line_too():
    assert decode(b"1\r\n2\r\n") == ["1", "2"]


def test_blank_lines_are_skipped():
    assert decode(b"\n1\n\n \t\n2\n") == ["1", "2"]


def test_a_line_without_its_end_is_not_returned():
    assert decode(b'{"done":false}\n{"done":true}') == ['{"done":false}']


def test_separators_of_unicode_end_no_line():
    assert decode("a\x85b\u2028c\u2029d\n".encode()) == ["a\x85b\u2028c\u2029d"]


def test_malformed_utf8_is_an_error():
    decoder = NDJSONDecoder()
    assert decoder.feed(b"1\n\xff\n2\n") == ["1"]
    with pytest.raises(StreamError, match="not UTF-8"):
        decoder.feed(b"")


@pytest.mark.parametrize("stream", [b"12345678901", b"12345678901\n"])
def test_a_line_over_the_limit_is_an_error_in_every_split(stream):
    for cut in range(len(stream)):
        decoder = NDJSONDecoder(max_event_bytes=10)
        with pytest.raises(StreamError, match=r"max_event_bytes \(10\)"):
            feed_all(decoder, (stream[:cut], stream[cut:], b""))


def test_a_line_at_the_limit_passes_as_often_as_it_comes():
    assert decode(b"1234567890\n" * 3, max_event_bytes=10) == ["1234567890"] * 3


def test_line_separators_are_escaped():
    assert (
        escape_line_separators('"\x85\u2028\u2029é"'.encode())
        == '"\\u0085\\u2028\\u2029é"'.encode()
    )


@pytest.mark.parametrize("payload", [b'"plain"', '"é😀\u2027\u202a\x84\x86"'.encode()])
def test_a_payload_without_separators_is_left_alone(payload):
    assert escape_line_separators(payload) == payload


@given(st.recursive(st.text(st.characters(exclude_categories=["Cs"])), st.lists))
def test_escaping_keeps_the_value_and_leaves_one_line_to_every_reader(value):
    payload = escape_line_separators(json.dumps(value, ensure_ascii=False).encode())
    assert json.loads(payload) == value
    assert NDJSON.frame(payload).decode().splitlines() == [payload.decode()]
    assert NDJSONDecoder().feed(NDJSON.frame(payload)) == [payload.decode()]
