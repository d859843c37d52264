"""Server-sent events against WHATWG HTML 9.2.6."""

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flask_llmstream.exceptions import StreamError
from flask_llmstream.framing import SSE, ServerSentEvent, SSEDecoder, encode_event


def decode(data, pieces=None, **options):
    """Events of *data* in every two-piece split and byte by byte, or of the given pieces."""
    splits = [pieces] if pieces else [[data[:i], data[i:]] for i in range(len(data) + 1)]
    splits.append([data[i : i + 1] for i in range(len(data))])
    results = []
    for split in splits:
        decoder = SSEDecoder(**options)
        results.append([event for piece in split for event in decoder.feed(piece)])
    assert all(result == results[0] for result in results)
    return results[0]


def feed_all(decoder, pieces, values):
    for piece in pieces:
        values += decoder.feed(piece)


def messages(*data):
    return [ServerSentEvent(text) for text in data]


# --- the standard's own examples


def test_example_of_a_multi_line_message():
    assert decode(b"data: YHOO\ndata: +2\ndata: 10\n\n") == messages("YHOO\n+2\n10")


def test_example_with_comments_and_ids():
    stream = (
        b": test stream\n\n"
        b"data: first event\nid: 1\n\n"
        b"data:second event\nid\n\n"
        b"data:  third event\n\n"
    )
    assert decode(stream + b"\n") == [
        ServerSentEvent("first event", id="1"),
        ServerSentEvent("second event", id=""),
        ServerSentEvent(" third event", id=""),
    ]
    assert len(decode(stream[:-1])) == 2, "without its blank line the third is discarded"


def test_example_of_empty_data():
    assert decode(b"data\n\ndata\ndata\n\ndata:") == messages("", "\n")
    assert decode(b"data\n\ndata\ndata\n\ndata:\n\n") == messages("", "\n", "")


def test_example_of_the_space_after_the_colon():
    assert decode(b"data:test\n\ndata: test\n\n") == messages("test", "test")


def test_example_of_event_types():
    stream = b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\ndata: 113411\n\n"
    assert decode(stream) == [
        ServerSentEvent("73857293", "add"),
        ServerSentEvent("2153", "remove"),
        ServerSentEvent("113411", "message"),
    ]


# --- lines and text


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard(end):
    stream = end.join([b": hi", b"id: 7", b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert decode(stream) == [ServerSentEvent("a\nb", id="7"), ServerSentEvent("c", id="7")]


def test_line_ends_may_be_mixed():
    assert decode(b"data: a\r\ndata: b\rdata: c\n\r\n") == messages("a\nb\nc")


def test_an_event_is_returned_as_soon_as_its_blank_line_is_there():
    decoder = SSEDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\n") == messages("a")
    assert decoder.feed(b"data: b\r\n\r") == messages("b")
    assert decoder.feed(b"\ndata: c\n\n") == messages("c")


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_other_separators_of_unicode_end_no_line(separator):
    text = f"a{separator}b"
    assert decode(b"data: " + text.encode() + b"\n\n") == messages(text)


def test_one_byte_order_mark_at_the_start_is_dropped():
    bom = b"\xef\xbb\xbf"
    assert decode(bom + b"data: a\n\n") == messages("a")
    assert decode(bom + b"data: " + bom + b"a\n\n") == messages("\ufeffa")
    assert decode(bom + bom + b"data: a\n\n") == [], "a second one is part of the field's name"
    assert decode(b"\n" + bom + b"data: a\n\n") == []


def test_malformed_utf8_becomes_replacement_characters():
    assert decode(b"data: \xf0\x9f\xff\xc3\nevent: \xe2\x82\n\n") == [
        ServerSentEvent("\ufffd\ufffd\ufffd", "\ufffd")
    ]


@pytest.mark.parametrize("line", [b"data: \xff", b"event: \xff", b"id: \xff"])
def test_malformed_utf8_is_an_error_where_strict(line):
    decoder = SSEDecoder(errors="strict")
    assert decoder.feed(b"data: a\n\n" + line + b"\n\n") == messages("a")
    with pytest.raises(StreamError, match="not UTF-8"):
        decoder.feed(b"")


def test_malformed_utf8_in_a_comment_is_nobodys_business():
    assert decode(b": \xff\ndata: a\n\n", errors="strict") == messages("a")


# --- fields


def test_a_comment_may_stand_inside_an_event():
    assert decode(b"data: a\n: ping\ndata: b\n\n") == messages("a\nb")


def test_heartbeats_are_no_events():
    assert decode(SSE.heartbeat * 3) == []


def test_unknown_fields_and_wrong_case_are_ignored():
    assert decode(b"Data: x\n data: y\ndatum: z\nfoo\ndata: a\n\n") == messages("a")


def test_an_event_without_data_is_dropped_with_its_type():
    assert decode(b"event: add\n\ndata: a\n\n") == messages("a")


def test_an_empty_event_type_is_message():
    assert decode(b"event: add\nevent:\ndata: a\n\n") == messages("a")


def test_an_id_stays_until_the_next_one():
    assert decode(b"id: 1\ndata: a\n\ndata: b\n\nid\ndata: c\n\n") == [
        ServerSentEvent("a", id="1"),
        ServerSentEvent("b", id="1"),
        ServerSentEvent("c", id=""),
    ]


def test_an_id_with_nul_is_ignored():
    assert decode(b"id: 1\nid: 2\x003\ndata: a\n\n") == [ServerSentEvent("a", id="1")]


def test_the_last_event_id_counts_from_the_blank_line_even_without_data():
    decoder = SSEDecoder()
    decoder.feed(b"id: 1\n")
    assert decoder.last_event_id == ""
    decoder.feed(b"\n")
    assert decoder.last_event_id == "1"


@pytest.mark.parametrize(
    ("line", "milliseconds"),
    [
        (b"retry: 3000", 3000),
        (b"retry:0", 0),
        (b"retry", None),
        (b"retry: -1", None),
        (b"retry: 1.5", None),
        (b"retry: 1s", None),
        (b"retry:  5", None),
        ("retry: \u0663".encode(), None),
        (b"retry: " + b"9" * 5000, None),
    ],
)
def test_retry_takes_ascii_digits_only(line, milliseconds):
    decoder = SSEDecoder()
    assert decoder.feed(line + b"\ndata: a\n\n") == messages("a")
    assert decoder.retry_milliseconds == milliseconds


def test_an_event_is_not_returned_where_the_input_ends_before_its_blank_line():
    stream = b"data: a\n\ndata: [DONE]\n\n"
    for cut in range(len(stream)):
        assert decode(stream[:cut]) == (messages("a") if cut >= 9 else [])


# --- limits


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 15,
        b"data: " + b"x" * 15 + b"\n\n",
        b"data: 12345\ndata: 1234\n\n",
        b"data: 12345\nevent: 123",
        b"data: 12345\nid: 1234567\n\n",
        b": " + b"x" * 19,
        b"unknown: " + b"x" * 12 + b"\n",
    ],
)
def test_an_event_over_the_limit_is_an_error_in_every_split(stream):
    whole = b"data: before\n\n" + stream
    for cut in range(len(whole)):
        decoder = SSEDecoder(max_event_bytes=20)
        events = []
        with pytest.raises(StreamError, match=r"max_event_bytes \(20\)"):
            feed_all(decoder, (whole[:cut], whole[cut:], b""), events)
        assert events == messages("before")


def test_an_event_at_the_limit_passes():
    assert decode(b"data: " + b"x" * 14 + b"\n\n", max_event_bytes=20) == messages("x" * 14)
    assert decode(b"data: 1234\ndata: 5678\n\n", max_event_bytes=20) == messages("1234\n5678")


def test_any_number_of_comments_passes():
    decoder = SSEDecoder(max_event_bytes=20)
    for _ in range(100):
        assert decoder.feed(b": ping\n") == []
    assert decoder.feed(b"data: a\n\n") == messages("a")


# --- properties


def reference(stream):
    """9.2.6 over the whole text at once."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    events, data, event_type, last_id = [], "", "", ""
    for line in re.split("\r\n|\n|\r", text)[:-1]:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data:
                events.append(ServerSentEvent(data[:-1], event_type or "message", last_id))
            data = event_type = ""
        elif name == "data":
            data += value + "\n"
        elif name == "event":
            event_type = value
        elif name == "id" and "\0" not in value:
            last_id = value
    return events


FRAGMENTS = st.sampled_from(
    b"data|data: |event|id|retry|:| |\n|\n\n|\r|\r\n|x|1|\0|\xff|\x80|\xf0\x9f|\xef\xbb\xbf".split(
        b"|"
    )
)


@given(st.lists(st.lists(FRAGMENTS, max_size=6).map(b"".join), max_size=8))
@example([b"\xef\xbb\xbfdata: x\r", b"\n\r", b"\n"])
def test_any_bytes_in_any_pieces_decode_as_the_standard_says(pieces):
    stream = b"".join(pieces)
    assert decode(stream, pieces) == reference(stream)


NAMES = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=9)


@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1
            ),
            st.none() | NAMES.filter(bool),
            NAMES,
        ),
        max_size=5,
    ),
    st.data(),
)
def test_what_is_encoded_is_decoded(events, data):
    stream = b"".join(encode_event(d.encode(), event=e, id=i) for d, e, i in events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    edges = [0, *cuts, len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    assert decode(stream, pieces, errors="strict") == [
        ServerSentEvent(d, e or "message", i) for d, e, i in events
    ]


# --- the encoder


def test_an_encoded_event_is_one_data_line():
    assert encode_event(b"{}") == b"data: {}\n\n"
    assert encode_event(b"{}", event="ping", id="3") == b"id: 3\nevent: ping\ndata: {}\n\n"


@pytest.mark.parametrize("data", [b"", b"a\nb", b"a\rb", b"a\n"])
def test_data_that_would_not_be_one_line_is_refused(data):
    with pytest.raises(ValueError, match="data"):
        encode_event(data)


@pytest.mark.parametrize("value", ["a\nb", "a\r", "a\0"])
def test_fields_that_would_forge_others_are_refused(value):
    with pytest.raises(ValueError, match="event holds"):
        encode_event(b"{}", event=value)
    with pytest.raises(ValueError, match="id holds"):
        encode_event(b"{}", id=value)
