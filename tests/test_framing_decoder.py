"""Lines, and faults that keep their place."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.exceptions import StreamError
from flask_llmstream.framing.decoder import Decoder, LineSplitter


def reference_lines(data):
    """WHATWG HTML 9.2.6, written down the slow way; the last line has not ended."""
    return re.split(rb"\r\n|\n|\r", data)


@given(st.lists(st.text("ab\r\n\x0b\x0c\x1c\x85\u2028", max_size=6).map(str.encode)))
def test_lines_are_the_same_for_every_split(pieces):
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)]
    *whole, rest = reference_lines(b"".join(pieces))
    assert lines == whole
    assert splitter.unfinished_bytes == len(rest)


def test_a_line_that_ends_in_cr_is_returned_without_waiting_for_an_lf():
    splitter = LineSplitter()
    assert list(splitter.feed(b"a\r")) == [b"a"]
    assert list(splitter.feed(b"")) == []
    assert list(splitter.feed(b"\n")) == []
    assert list(splitter.feed(b"\n")) == [b""]


class Letters(Decoder[bytes]):
    """One letter a value; anything else is a fault."""

    def _decode(self, data, values):
        for byte in data:
            if not bytes([byte]).isalpha():
                raise StreamError("not a letter")
            values.append(bytes([byte]))


def test_a_fault_comes_after_the_values_before_it():
    decoder = Letters()
    assert decoder.feed(b"ab1c") == [b"a", b"b"]
    with pytest.raises(StreamError, match="not a letter"):
        decoder.feed(b"")


def test_a_fault_with_nothing_before_it_is_raised_at_once():
    with pytest.raises(StreamError):
        Letters().feed(b"1")


def test_a_decoder_that_failed_stays_failed():
    decoder = Letters()
    for data in (b"1", b"a", b""):
        with pytest.raises(StreamError):
            decoder.feed(data)
