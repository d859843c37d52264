"""Whatever is sent, it is answered or refused: no 5xx, and nothing is read without a limit."""

import copy
import io
import json
import re

import pytest
import schemathesis
from described_app import described_app
from hypothesis import given, settings
from hypothesis import strategies as st
from rich_bodies import RICH_BODIES
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_llmstream import InvalidRequestError, ToolCallDelta
from flask_llmstream.backends.llama_chat import chat_body
from flask_llmstream.backends.tool_grammar import Toolbox
from flask_llmstream.backends.upstream_chat import chat_request
from flask_llmstream.dialects import NativeDialect
from flask_llmstream.dialects.decoding import MAX_DEPTH
from flask_llmstream.typing import FEATURES

MEBIBYTE = 2**20


class PassingOn:
    """A backend that writes requests as the real ones do, and asks nobody."""

    supports = FEATURES | {"extra_body"}

    def count_tokens(self, request):
        self._write(request)
        return 7

    def generate(self, request):
        self._write(request)
        yield "Hi"
        yield ToolCallDelta(0, id="c9", name="f", arguments="{}")

    def _write(self, request):
        chat_request(request, "m")
        json.dumps(chat_body(request, Toolbox.of(request))).encode()


@pytest.fixture(scope="module")
def app():
    return described_app(backend=PassingOn(), resume_seconds=30)


@pytest.fixture(scope="module")
def client(app):
    return app.test_client()


every_route = pytest.mark.parametrize("path", RICH_BODIES)


def ask(client, path, body):
    """The status; of a refusal the reason is one that a client can read."""
    response = client.post(path, data=body, content_type="application/json")
    text = response.get_data(as_text=True)
    assert response.status_code < 500, text
    assert "engine_error" not in text, text
    if response.status_code >= 400:
        assert response.json
        assert response.headers["X-Request-ID"]
    return response.status_code


def test_every_route_with_a_body_is_tried_here(app):
    description = app.test_client().get("/openapi.json").json
    told = {
        path.removesuffix("/") if path == "/stream/" else path
        for path, methods in description["paths"].items()
        if "requestBody" in methods.get("post", {})
    }
    assert told == set(RICH_BODIES)


@every_route
def test_the_bodies_that_are_spoilt_here_are_good_ones(client, path):
    assert ask(client, path, json.dumps(RICH_BODIES[path])) == 200


# --- by the description


described = described_app(backend=PassingOn())


def serve(environ, start_response):
    """A plain function: of a Flask app schemathesis imports what it is named after."""
    return described(environ, start_response)


schema = schemathesis.openapi.from_wsgi("/openapi.json", serve)


@schema.parametrize()
@settings(max_examples=8)
def test_nothing_that_the_description_allows_or_forbids_is_a_server_error(case):
    response = case.call()
    # A time limit of a microsecond is one.
    assert response.status_code < 500 or "X-Request-Timeout" in (case.headers or {}), response.text


# --- wrong types


WRONG = [
    *(None, True, 0, -1, 1.5, 1e308, 2**64, -(10**30), "", "\0", "\r\ndata: x\n\n", "x" * 2000),
    *([], {}, [None], [{}], [[[]]], {"a": 1}, {"type": "text"}, {"type": []}, {"type": "function"}),
    *({"": ""}, {"role": "user"}, {"type": "function", "function": None}),
]


def places(value, path=()):
    yield path
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def spoilt(body, path, value):
    """*body* with *value* at *path*; without the field where it is ``...``."""
    if not path:
        return value
    body = copy.deepcopy(body)
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return body


@every_route
def test_a_wrong_type_at_any_place_is_refused_or_ignored(client, path):
    body = RICH_BODIES[path]
    statuses = set()
    for place in places(body):
        for value in WRONG:
            statuses.add(ask(client, path, json.dumps(spoilt(body, place, value))))
        if place:
            statuses.add(ask(client, path, json.dumps(spoilt(body, place, ...))))
    assert {200, 400} <= statuses


def json_values(**floats):
    return st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, **floats), st.text()
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(st.text(), st.sampled_from(["type", "role", "text"])), inner, max_size=3
            ),
        ),
        max_leaves=8,
    )


@every_route
@given(data=st.data())
@settings(max_examples=40)
def test_several_strange_values_at_once_are_refused_or_ignored(client, path, data):
    body = RICH_BODIES[path]
    for _ in range(data.draw(st.integers(1, 3))):
        body = spoilt(
            body, data.draw(st.sampled_from(list(places(body)))), data.draw(json_values())
        )
    # Infinity is no JSON.
    ask(client, path, json.dumps(body))


# --- what JSON does not say, or not clearly


def with_field(path, name, text):
    """A good body, and in it a field as it is written in *text*."""
    rest = {key: value for key, value in RICH_BODIES[path].items() if key != name}
    return json.dumps(rest)[:-1].encode() + b", " + json.dumps(name).encode() + b": " + text + b"}"


ODD_VALUES = [
    *(b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1e" + b"9" * 50, b"1e-400"),
    *(b"9" * 5000, b"-" + b"9" * 30, b"9" * 400 + b".5", b"01", b"1.", b".5", b"+1", b"-", b"0x1"),
    *(rb'"\ud800"', rb'"\udc00\ud800"', rb'{"\ud800": 1}', b'"\xed\xa0\x80"', b'"\xff"', b'"\0"'),
    *(rb'"\u12"', rb'"\x"', b'"\n"', b"'x'", b"tru", b"[1,]", b'{"a":1,}', b"/**/1", b""),
]


@every_route
@pytest.mark.parametrize("name", ["unknown", "metadata", "options", "seed", "stream", "tools"])
def test_odd_numbers_and_texts_are_refused_or_ignored(client, path, name):
    for value in ODD_VALUES:
        ask(client, path, with_field(path, name, value))
        ask(client, path, with_field(path, name, b'{"a": [' + value + b"]}"))


@every_route
@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"null", b"[]", b"1", b'"x"', b"{", b"}", b"{}x", b"{}\0", b"\xff", b"\0" * 9),
        *(b"\xef\xbb\xbf{}", "{}".encode("utf-16"), "{}".encode("utf-32"), b"prompt=Hi", b"[" * 99),
    ],
)
def test_what_is_no_json_object_is_refused(client, path, body):
    assert ask(client, path, body) == 400


@every_route
def test_of_a_key_that_comes_twice_both_values_are_looked_at(client, path):
    body = json.dumps(RICH_BODIES[path])[:-1]
    assert ask(client, path, f'{body}, "model": "m"}}') == 200
    assert ask(client, path, f'{body}, "model": {{}}}}') == 400
    assert ask(client, path, f'{{"model": {{}}, {body[1:]}}}') == 400


@pytest.mark.parametrize(
    ("value", "status"), [(b"1", 200), (b'"x"', 200), (b"1e400", 400), (b"9" * 5000, 400)]
)
def test_a_number_out_of_range_in_a_field_that_is_passed_on_is_named(client, value, status):
    for path in ("/v1/chat/completions", "/v1/completions"):
        body = with_field(path, "min_p", b'{"a": ' + value + b"}")
        assert ask(client, path, body) == status
        if status == 400:
            error = client.post(path, data=body).json["error"]
            assert error["param"].startswith("min_p")


# --- depth


@every_route
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", [200, 900, 960, 980, 1000, 10_000, 100_000])
@pytest.mark.parametrize("is_whole", [True, False])
def test_what_is_nested_deeply_is_refused(client, path, opening, depth, is_whole):
    closing = {b"[": b"]", b'{"a":': b"}"}[opening] * depth if is_whole else b""
    middle = b"" if opening == b"[" else b"1"
    for name in ("unknown", "metadata", "tools", "messages"):
        body = with_field(path, name, opening * depth + middle + closing)
        assert ask(client, path, body) == 400


def depth_of(value):
    if not isinstance(value, (dict, list)):
        return 0
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, parts), default=0)


@given(
    json_values(allow_infinity=False),
    st.integers(MAX_DEPTH - 8, MAX_DEPTH + 2),
    st.sampled_from(["", '"', "\\", '\\"', "[[[", "]]]", '{"', '\\\\"[', "\u2028[", "{" * 300]),
)
def test_depth_is_counted_as_json_has_it(value, levels, text):
    for _ in range(levels):
        value = {text: value} if len(text) % 2 else [text, value]
    body = {"prompt": text + "x", "unknown": value}
    if depth_of(body) <= MAX_DEPTH:
        NativeDialect().parse(json.dumps(body).encode())
    else:
        with pytest.raises(InvalidRequestError, match="levels deep"):
            NativeDialect().parse(json.dumps(body, ensure_ascii=False).encode(errors="replace"))


def test_what_only_looks_nested_is_not(client):
    brackets = "[{" * 50_000
    assert ask(client, "/stream", json.dumps({"prompt": brackets, brackets: brackets})) == 200
    assert ask(client, "/stream", json.dumps({"prompt": "x", "flat": [[]] * 50_000})) == 200


# --- size


class Endless(io.RawIOBase):
    """A body that goes on and on, and counts how much of it was wanted."""

    def __init__(self):
        self.taken = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.taken += len(buffer)
        buffer[:] = b" " * len(buffer)
        return len(buffer)


def post_endless(app, path, **environ):
    body = Endless()
    environ = {**EnvironBuilder(path=path, method="POST").get_environ(), **environ}
    parts, status, _ = run_wsgi_app(app, {**environ, "wsgi.input": body})
    return status, b"".join(parts), body.taken


@every_route
def test_a_body_that_says_it_is_too_large_is_not_read(app, path):
    size = str(100 * MEBIBYTE)
    status, document, taken = post_endless(app, path, CONTENT_LENGTH=size)
    assert status.startswith("413")
    assert json.loads(document)
    assert taken == 0


@every_route
def test_a_body_that_does_not_say_is_read_up_to_the_limit(app, path):
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    status, document, taken = post_endless(app, path, **chunked)
    assert status.startswith("413")
    assert json.loads(document)
    assert taken <= 1.2 * MEBIBYTE


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "+5", "5, 5", "\u0665", "9" * 30])
def test_a_length_that_is_none_means_an_empty_body_or_one_that_is_too_large(app, length):
    status, document, taken = post_endless(app, "/stream", CONTENT_LENGTH=length)
    assert status[:3] in ("400", "413")
    assert json.loads(document)
    assert taken == 0


# --- headers and paths


ODD_HEADERS = [
    *("", " ", "a\r\nX-Evil: 1", "a\nb", "a\rb", "\0", "é", "ÿ" * 10, "x" * 100_000, '"', "\\"),
    *("nan", "inf", "-1", "0", "1e400", "1_000", "0x10", "9" * 5000, "NOT_GIVEN", "None", "true"),
    *("Bearer", "Bearer ", "Bearer é", "Bearer " + "x" * 100_000, "Basic eA==", "bearer  x", ":"),
    *("application/json;q=nan", "*/*;q=0", "text/event-stream;;;,,,", "a/b;q=" + "1" * 5000),
    *("f" * 32 + ".1", "f" * 32 + "." + "9" * 15, "f" * 32 + ".-1"),
]
HEADERS = [
    *("X-Request-ID", "X-Request-Timeout", "X-Stainless-Timeout", "X-Stainless-Read-Timeout"),
    *("X-Litellm-Timeout", "X-Litellm-Stream-Timeout", "Last-Event-ID", "Accept", "Authorization"),
    *("X-API-Key", "Anthropic-Version", "Content-Type", "Content-Encoding", "Origin"),
]


@pytest.fixture(scope="module")
def locked_app():
    return described_app(backend=PassingOn(), api_keys="secret", resume_seconds=30)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("path", ["/stream", "/v1/models", "/anthropic/v1/messages", "/api/chat"])
def test_an_odd_header_does_no_harm(app, locked_app, path, header):
    key = "CONTENT_TYPE" if header == "Content-Type" else f"HTTP_{header.upper().replace('-', '_')}"
    body = json.dumps(RICH_BODIES.get(path)).encode()
    for one in (app, locked_app):
        for value in ODD_HEADERS:
            method = "POST" if path in RICH_BODIES else "GET"
            environ = EnvironBuilder(path=path, method=method, data=body).get_environ()
            parts, status, headers = run_wsgi_app(one, {**environ, key: value})
            b"".join(parts)
            assert int(status[:3]) < 500
            for name, text in headers:
                assert not re.search(r"[\r\n\0]", name + text), (name, text)
            assert "X-Evil" not in headers


@pytest.mark.parametrize(
    "name", ["a\r\nX-Evil: 1", "\0", "é" * 1000, "x" * 100_000, "../../etc/passwd", "%0d%0a", "m\n"]
)
def test_the_name_of_a_model_comes_back_in_no_header_and_not_in_full(client, name):
    for path, body in RICH_BODIES.items():
        response = client.post(path, json={**body, "model": name})
        assert response.status_code == 404
        assert "X-Evil" not in response.headers
        assert len(response.data) < 5000
        response.json["error" if "error" in response.json else "errorText"]


@pytest.mark.parametrize(
    "id", ["%00", "%0d%0aX-Evil:1", "%ff", "%ed%a0%80", "x" * 5000, "%25", "..%2f", "a/b/c", "é"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", "/v1/models/{}"), ("DELETE", "/v1/streams/{}"), ("DELETE", "/stream/{}")),
        *(("GET", "/v1/responses/{}"), ("DELETE", "/v1/responses/{}")),
        *(("POST", "/v1/responses/{}/cancel"), ("GET", "/v1/responses/{}/input_items")),
        *(("GET", "/v1/responses/{}?stream=true&starting_after=1"), ("GET", "/api/ai/{}/stream")),
    ],
)
def test_an_odd_id_is_not_found(client, method, path, id):
    response = client.open(path.format(id), method=method)
    assert response.status_code in (204, 308, 404)  # Double slashes are made one.
    assert "X-Evil" not in response.headers


@pytest.mark.parametrize(
    "value", ["", "-1", "x", "1e3", "9" * 5000, "0" * 5000, "\u0663", "1 ", "nan"]
)
@pytest.mark.parametrize("name", ["starting_after", "limit", "after", "order", "stream"])
def test_an_odd_query_is_refused_or_ignored(client, name, value):
    body = {"input": "Hi", "model": "m", "background": True}
    id = client.post("/v1/responses", json=body).json["id"]
    for path in (f"/v1/responses/{id}", f"/v1/responses/{id}/input_items"):
        query = {"stream": "true", name: value}
        assert client.get(path, query_string=query).status_code in (200, 400, 404)
