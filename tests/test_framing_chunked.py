"""Chunked transfer coding against RFC 9112 7.1."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.exceptions import StreamError
from flask_llmstream.framing import ChunkedDecoder, encode_chunk
from flask_llmstream.framing.chunked import MAX_LINE_BYTES, MAX_TRAILER_BYTES


def decode(data):
    """Body and decoder of *data*, the same in every two-piece split and byte by byte."""
    splits = [[data[:i], data[i:]] for i in range(len(data) + 1)]
    splits.append([data[i : i + 1] for i in range(len(data))])
    results = []
    for split in splits:
        decoder = ChunkedDecoder()
        body = b"".join(part for piece in split for part in decoder.feed(piece))
        results.append((body, decoder.complete, decoder.trailers, decoder.unused_data))
    assert all(result == results[0] for result in results)
    return results[0]


def feed_all(decoder, pieces, values):
    for piece in pieces:
        values += decoder.feed(piece)


def test_a_chunk_is_its_size_in_hex_and_its_data():
    assert encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_empty_data_is_the_last_chunk():
    assert encode_chunk(b"") == b"0\r\n\r\n"


def test_whole_chunks_keep_their_borders():
    decoder = ChunkedDecoder()
    assert decoder.feed(b"4\r\nWiki\r\n5\r\npedia\r\n0\r\n\r\n") == [b"Wiki", b"pedia"]
    assert decoder.complete


def test_data_is_returned_before_its_chunk_ends():
    decoder = ChunkedDecoder()
    assert decoder.feed(b"ff\r\nabc") == [b"abc"]


@pytest.mark.parametrize("size", [b"a", b"A", b"0a", b"000000000000000A"])
def test_sizes_are_hex_in_either_case_with_leading_zeros(size):
    assert decode(size + b"\r\n0123456789\r\n00\r\n\r\n") == (b"0123456789", True, [], b"")


@pytest.mark.parametrize(
    "extension",
    [b";a", b";a=b", b';a="b; c\\"d\\\\"', b";a;b=1;c", b" ; a = b", b'\t;\ta="\xff\t"'],
)
def test_extensions_are_ignored(extension):
    body = b"2" + extension + b"\r\nhi\r\n0" + extension + b"\r\n\r\n"
    assert decode(body) == (b"hi", True, [], b"")


def test_trailers_are_read():
    assert decode(b"0\r\nA: 1 \r\na:\t2\r\nB:\r\nC: x:y\xe9\r\n\r\n") == (
        b"",
        True,
        [("A", "1"), ("a", "2"), ("B", ""), ("C", "x:yé")],
        b"",
    )


def test_what_follows_the_body_is_handed_back():
    assert decode(b"1\r\na\r\n0\r\n\r\nHTTP/1.1 200") == (b"a", True, [], b"HTTP/1.1 200")


def test_an_input_that_ends_early_is_not_complete():
    body = b"3\r\nabc\r\n0\r\nA: b\r\n\r\n"
    for cut in range(len(body)):
        assert not decode(body[:cut])[1]
    assert decode(body)[1]


@pytest.mark.parametrize(
    "line",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\n",
        b"0x1\r\n",
        b"1_0\r\n",
        b" 1\r\n",
        b"1 \r\n",
        b"1\n",
        b"1\r\r\n",
        b"1;\r\n",
        b"1;=a\r\n",
        b"1;a=\r\n",
        b'1;a="b\r\n',
        b"1;a=b c\r\n",
        b"1;a\x00\r\n",
        b'1;a="\x7f"\r\n',
        b"1;a\rb\r\n",
        b"1,1\r\n",
        b"10000000000000000\r\n",
        b"\xb2\r\n",
    ],
)
def test_a_malformed_size_line_is_an_error(line):
    stream = b"2\r\nok\r\n" + line + b"x\r\n0\r\n\r\n"
    for cut in range(len(stream)):
        decoder = ChunkedDecoder()
        body = []
        with pytest.raises(StreamError, match="RFC 9112"):
            feed_all(decoder, (stream[:cut], stream[cut:], b""), body)
        assert b"".join(body) == b"ok"
        assert not decoder.complete


@pytest.mark.parametrize("end", [b"\n", b"x\r\n", b"\rx", b"3\r\n"])
def test_data_that_does_not_end_with_its_chunk_is_an_error(end):
    decoder = ChunkedDecoder()
    assert decoder.feed(b"1\r\na" + end) == [b"a"]
    with pytest.raises(StreamError, match="longer than its size"):
        decoder.feed(b"")


@pytest.mark.parametrize(
    "field", [b"A : 1", b" A: 1", b": 1", b"A", b"A: \x00", b"A: a\rb", b"A: 1\n"]
)
def test_a_malformed_trailer_is_an_error(field):
    with pytest.raises(StreamError, match="RFC 9112"):
        ChunkedDecoder().feed(b"0\r\n" + field + b"\r\n\r\n")


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_a_line_over_the_limit_is_an_error(end):
    with pytest.raises(StreamError, match="longer than"):
        ChunkedDecoder().feed(b"1;" + b"a" * MAX_LINE_BYTES + end)


def test_an_endless_line_is_refused_before_it_ends():
    decoder = ChunkedDecoder()
    with pytest.raises(StreamError, match="longer than"):
        feed_all(decoder, [b"1"] * MAX_LINE_BYTES, [])


def test_endless_trailers_are_refused():
    decoder = ChunkedDecoder()
    decoder.feed(b"0\r\n")
    with pytest.raises(StreamError, match="trailer section"):
        feed_all(decoder, [b"A: " + b"b" * 1000 + b"\r\n"] * (1 + MAX_TRAILER_BYTES // 1000), [])


@given(st.lists(st.binary(min_size=1), max_size=5), st.data())
def test_what_is_encoded_is_decoded(parts, data):
    stream = b"".join(map(encode_chunk, [*parts, b""]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    edges = [0, *cuts, len(stream)]
    decoder = ChunkedDecoder()
    pieces = [decoder.feed(stream[a:b]) for a, b in pairwise(edges)]
    assert b"".join(part for piece in pieces for part in piece) == b"".join(parts)
    assert decoder.complete
    assert not decoder.unused_data


@given(st.binary())
def test_any_bytes_decode_or_raise_a_stream_error(data):
    decoder = ChunkedDecoder()
    try:
        decoder.feed(data)
        decoder.feed(b"")
    except StreamError:
        assert not decoder.complete
