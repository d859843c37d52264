"""Accept and the body's stream flag, against RFC 9110 12.5.1 and what clients send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_llmstream.exceptions import NotAcceptableError
from flask_llmstream.framing import JSON, NDJSON, SSE, TEXT, negotiate

OPENAI = {"streams_by_default": False}
OLLAMA = {"streams_by_default": True, "offers": (NDJSON, SSE, TEXT, JSON)}


def openai(accept, stream=None):
    return negotiate(accept, stream=stream, **OPENAI)


def ollama(accept, stream=None):
    return negotiate(accept, stream=stream, **OLLAMA)


NEUTRAL = [
    None,
    "",
    " , ,",
    "*/*",
    "application/json",
    "Application/JSON; charset=utf-8",
    "application/json, */*;q=0.5",
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8",  # browsers
    "application/json, text/plain, */*",  # axios, Angular
    "text/plain, application/json, application/*+json, */*",  # Spring's RestTemplate
    "application/json, text/javascript, */*; q=0.01",  # jQuery
    "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2",  # Java's HttpURLConnection
]


@pytest.mark.parametrize("accept", NEUTRAL)
def test_a_neutral_accept_leaves_it_to_the_body_and_the_dialect(accept):
    assert openai(accept, None) is JSON
    assert openai(accept, False) is JSON
    assert openai(accept, True) is SSE
    assert ollama(accept, None) is NDJSON
    assert ollama(accept, False) is JSON
    assert ollama(accept, True) is NDJSON


@pytest.mark.parametrize(
    ("accept", "framing"),
    [
        ("text/event-stream", SSE),  # EventSource
        ("TEXT/Event-Stream", SSE),
        ("text/event-stream; charset=UTF-8", SSE),
        ('text/event-stream; charset="utf-8"', SSE),
        ("application/x-ndjson", NDJSON),
        ("application/x-ndjson, */*;q=0.1", NDJSON),
        ("application/x-ndjson, */*", NDJSON),
        ("application/x-ndjson, application/json;q=0.9", NDJSON),
        ("text/plain", TEXT),
        ("text/plain;charset=utf-8", TEXT),
        ("text/plain, */*", TEXT),
        ("text/plain, application/json;q=0.9, */*;q=0.5", TEXT),
        ("text/plain, text/html", TEXT),
        ("text/plain;q=0.1, text/html", TEXT),
        ("text/plain;q=0.5, application/x-ndjson;q=0.6", NDJSON),
        ("text/plain, application/x-ndjson;q=0.6", TEXT),
    ],
)
def test_a_streaming_framing_that_is_named_picks_itself_and_asks_for_a_stream(accept, framing):
    for stream in (None, True):
        assert openai(accept, stream) is framing
        assert ollama(accept, stream) is framing


@pytest.mark.parametrize(
    ("accept", "framing"),
    [
        ("application/json, text/event-stream", SSE),
        ("application/json, text/event-stream;q=0.5", SSE),
        ("application/x-ndjson, application/json", NDJSON),
        ("application/json, text/plain;q=0.5, application/x-ndjson;q=0.1", NDJSON),
    ],
)
def test_naming_json_as_high_leaves_the_choice_to_stream_open(accept, framing):
    assert openai(accept, None) is JSON
    assert openai(accept, True) is framing
    assert ollama(accept, None) is framing
    assert ollama(accept, False) is JSON


@pytest.mark.parametrize(
    ("accept", "framing"),
    [
        ("text/event-stream", SSE),
        ("text/plain", TEXT),
        ("application/x-ndjson", NDJSON),
        ("application/x-ndjson, application/json;q=0", NDJSON),
        ("text/event-stream, application/json;q=0.1", JSON),
        ("text/event-stream, */*;q=0.1", JSON),
        ("text/event-stream, application/*;q=0.1", JSON),
    ],
)
def test_a_body_against_streaming_gets_json_wherever_accept_has_room_for_it(accept, framing):
    assert openai(accept, False) is framing
    assert ollama(accept, False) is framing


@pytest.mark.parametrize(
    ("accept", "default", "framing"),
    [
        ("text/*", "sse", SSE),
        ("text/*", "ndjson", SSE),
        ("application/*", "sse", NDJSON),
        ("application/*;q=0.5, text/*;q=0.6", "ndjson", SSE),
        ("text/*, text/event-stream;q=0", "sse", TEXT),
        ("*/*, text/event-stream;q=0.0", "sse", NDJSON),
        ("*/*;q=0.1, text/*;q=0", "sse", NDJSON),
        ("application/json, text/event-stream;q=0", "sse", NDJSON),
        ("text/event-stream;q=0.1, */*", "sse", NDJSON),
        ("text/plain;q=0.9, */*", "sse", SSE),
        ("text/plain, text/event-stream", "sse", SSE),
        ("text/plain;q=0.5, text/*;q=0.5", "sse", TEXT),
        ("application/json, */*;q=0", "sse", JSON),
    ],
)
def test_which_framing_a_stream_gets(accept, default, framing):
    assert (openai if default == "sse" else ollama)(accept, True) is framing


@pytest.mark.parametrize(
    ("accept", "framing"),
    [
        # The most specific range has precedence, whatever its weight and place.
        ("text/plain;q=0.2, text/*, application/x-ndjson;q=0.5", SSE),
        ("text/*;q=0.9, text/event-stream;q=0.1, application/x-ndjson;q=0.5", TEXT),
        ("text/plain;charset=utf-8;q=0.9, text/plain;q=0.1, text/event-stream;q=0.5", TEXT),
        ("text/plain;charset=utf-8;q=0, text/plain, text/event-stream;q=0.1", SSE),
        # Of equal ranges the better weight.
        ("text/plain;q=0.1, text/plain;q=0.9, text/event-stream;q=0.5", TEXT),
        # A parameter named q is the weight wherever it stands.
        ("text/plain;q=0.9;charset=utf-8, text/event-stream;q=0.95", SSE),
        # Parameters that we do not send name another type.
        ("text/plain;format=flowed, text/event-stream;q=0.1", SSE),
        ("text/plain;charset=latin-1, text/event-stream;q=0.1", SSE),
        ("text/plain; charset = utf-8, text/event-stream;q=0.1", TEXT),
        # Malformed ranges are skipped.
        ("text/plain;q=high, text/event-stream;q=0.1", SSE),
        ("text/plain;q=1.1, text/event-stream;q=0.1", SSE),
        ("text/plain;q=-1, text/event-stream;q=0.1", SSE),
        ("text/plain;q=, text/event-stream;q=0.1", SSE),
        ("text/plain;q=nan, text/event-stream;q=0.1", SSE),
        ("text, /, text/, /plain, */plain, te xt/plain, ;q=1, ;, text/event-stream", SSE),
        ("text/plain;;q=0.1;, text/event-stream;q=0.05", TEXT),
        ("text/plain;q=0.12345, text/event-stream;q=0.2", SSE),
        ("text/plain;q=1.000, text/event-stream;q=0.", TEXT),
        ("text/plain\t; q=0.1 , text/event-stream;q=0.2", SSE),
        # Separators in quoted strings separate nothing.
        ('text/html;a="x, text/plain;q=1, \\"", text/event-stream;q=0.1', SSE),
        ('text/event-stream, text/html;a="unterminated, text/plain', SSE),
        ('text/event-stream, text/html;a="unterminated\\', SSE),
    ],
)
def test_accept_is_read_as_rfc_9110_has_it(accept, framing):
    assert openai(accept) is framing


@pytest.mark.parametrize("accept", ["text/plain;q=high", "nonsense", ";", "text/plain;q=2, *"])
def test_an_accept_without_a_valid_range_accepts_everything(accept):
    assert openai(accept, None) is JSON
    assert openai(accept, True) is SSE


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/*",
        "application/xml, text/html;q=0.9",
        "*/*;q=0",
        "application/json;q=0",
        "application/json;version=2",
        "text/plain;q=0, application/json;q=0.000",
    ],
)
@pytest.mark.parametrize("stream", [None, True, False])
def test_an_accept_that_names_nothing_we_have_is_refused(accept, stream):
    for negotiate_as in (openai, ollama):
        with pytest.raises(NotAcceptableError, match="text/event-stream") as caught:
            negotiate_as(accept, stream)
        assert caught.value.status == 406


def test_a_route_that_only_streams_takes_the_accept_of_the_sdks():
    for accept in (None, "application/json", "application/json, text/plain, */*"):
        for stream in (None, True, False):
            assert (
                negotiate(accept, stream=stream, streams_by_default=False, offers=(SSE, TEXT))
                is SSE
            )


def test_a_route_that_only_streams_text_is_not_refused_to_generic_clients():
    accept = "application/json, text/plain"
    assert negotiate(accept, stream=None, streams_by_default=True, offers=(TEXT,)) is TEXT


def test_a_route_that_never_streams_answers_json_or_refuses():
    offers = (JSON,)
    assert negotiate("*/*", stream=True, streams_by_default=True, offers=offers) is JSON
    with pytest.raises(NotAcceptableError):
        negotiate("text/event-stream", stream=True, streams_by_default=True, offers=offers)


@given(
    st.text('*/;,="\\q. 01.+-\tabtextplainjson', max_size=80), st.sampled_from([None, True, False])
)
def test_any_accept_gives_an_offer_or_is_refused(accept, stream):
    try:
        assert openai(accept, stream) in (SSE, NDJSON, TEXT, JSON)
    except NotAcceptableError:
        pass


def test_a_hostile_accept_takes_linear_time():
    for hostile in ('"\\' * 50_000, '\\"' * 50_000, '"' * 99_999, "a/b;" * 25_000, " ;=" * 33_000):
        assert openai(hostile + ", text/event-stream", True) is not None
