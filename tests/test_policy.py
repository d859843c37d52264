"""What is decided about a request before anything is queued."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import Headers

from flask_llmstream import (
    FEATURES,
    AuthenticationError,
    InferenceRequest,
    InvalidRequestError,
    Message,
)
from flask_llmstream.config import Settings, check_values
from flask_llmstream.policy import authenticate, check_features, check_limits, request_id_of
from flask_llmstream.testing import ScriptedBackend

OPEN = Settings()


def locked(keys):
    return Settings(**check_values({"api_keys": keys}))


# Request ids.


@pytest.mark.parametrize(
    "id", ["a", "req_1", "01J8Z-3", "a.b:c/d+e=f@g", "x" * 128, "urn:uuid:6e8bc430"]
)
def test_a_client_s_request_id_is_kept(id):
    assert request_id_of(Headers({"X-Request-ID": id})) == id


@pytest.mark.parametrize(
    "id", ["", " ", "a b", "x" * 129, "é", "<script>", 'a"b', "a;b", "a,b", "a\tb", "${jndi}"]
)
def test_what_is_no_request_id_is_replaced(id):
    made = request_id_of(Headers({"X-Request-ID": id}))
    assert made != id
    assert len(made) == 24


def test_a_newline_at_the_end_is_no_request_id():
    class Raw:
        def get(self, name, default):
            return "a\n"

    assert request_id_of(Raw()) != "a\n"


def test_ids_that_are_made_differ():
    assert request_id_of(Headers()) != request_id_of(Headers())


# API keys.


def test_without_keys_everyone_is_let_in():
    assert authenticate(Headers(), OPEN) is None
    assert authenticate(Headers({"Authorization": "Bearer whatever"}), OPEN) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer one"},
        {"Authorization": "bearer one"},
        {"Authorization": "BEARER   one  "},
        {"X-API-Key": "one"},
        {"x-api-key": " one "},
        {"Authorization": "Basic YTpi", "X-API-Key": "one"},
        {"Authorization": "Bearer one", "X-API-Key": "wrong"},
    ],
)
def test_a_key_comes_as_bearer_or_as_x_api_key(headers):
    assert authenticate(Headers(headers), locked({"alice": "one", "bob": "two"})) == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic one"},
        {"Authorization": "one"},
        {"X-API-Key": ""},
        {"X-API-Key": "  "},
    ],
)
def test_a_missing_key_is_asked_for(headers):
    with pytest.raises(AuthenticationError, match="needed: send it as Authorization: Bearer"):
        authenticate(Headers(headers), locked("one"))


@pytest.mark.parametrize("key", ["wrong", "on", "onee", "ONE", "clé", "\udcff", "one two"])
def test_a_wrong_key_is_refused_without_repeating_it(key):
    with pytest.raises(AuthenticationError) as caught:
        authenticate(Headers({"Authorization": f"Bearer {key}"}), locked("one"))
    assert str(caught.value) == "The API key is wrong."


@given(st.text(st.characters(exclude_characters="\r\n")))
def test_no_header_gets_in_by_accident(header):
    if header.strip() == "one":
        return
    for name in ("Authorization", "X-API-Key"):
        with pytest.raises(AuthenticationError):
            authenticate(Headers({name: header}), locked("one"))


# Limits.


def test_a_request_without_max_tokens_gets_the_limit():
    request = InferenceRequest(prompt="Hi")
    check_limits(request, Settings(max_tokens_limit=100))
    assert request.max_tokens == 100


def test_a_request_within_the_limit_stays_as_it_is():
    request = InferenceRequest(prompt="Hi", max_tokens=100)
    check_limits(request, Settings(max_tokens_limit=100))
    assert request.max_tokens == 100


def test_a_request_over_the_limit_is_refused():
    with pytest.raises(InvalidRequestError, match="101; at most 100") as caught:
        check_limits(InferenceRequest(max_tokens=101), Settings(max_tokens_limit=100))
    assert caught.value.param == "max_tokens"


def test_without_a_limit_none_is_set():
    request = InferenceRequest(prompt="Hi")
    check_limits(request, OPEN)
    assert request.max_tokens is None


# Features.

TOOL = {"type": "function", "function": {"name": "f"}}


def parts(*kinds):
    return [Message("user", [{"type": kind} for kind in kinds])]


ASKS = [
    ("tools", "tools", {"tools": [TOOL]}),
    ("tools", "tools", {"tools": [TOOL], "tool_choice": "auto"}),
    ("n", "n", {"n": 2}),
    ("logprobs", "logprobs", {"logprobs": True}),
    ("json_object", "response_format", {"response_format": {"type": "json_object"}}),
    ("json_schema", "response_format", {"response_format": {"type": "json_schema"}}),
    ("images", "messages[0].content (image_url)", {"messages": parts("text", "image_url")}),
    ("images", "messages[0].content (input_audio)", {"messages": parts("input_audio")}),
    ("images", "messages[0].content (file)", {"messages": parts("file")}),
]
SHOWS = {"tools", "n", "logprobs"}


class Undeclared:
    def generate(self, request):
        raise NotImplementedError


def refusal_of(backend, fields):
    try:
        check_features(InferenceRequest(prompt="Hi", **fields), backend, "m")
    except InvalidRequestError as error:
        return error
    return None


@pytest.mark.parametrize(("feature", "param", "fields"), ASKS)
def test_a_feature_that_the_backend_lacks_is_refused_by_its_field(feature, param, fields):
    error = refusal_of(ScriptedBackend(supports=FEATURES - {feature}), fields)
    assert error.param == param
    assert str(error).startswith(f"The model 'm' does not support {param}")


@pytest.mark.parametrize(("feature", "param", "fields"), ASKS)
def test_a_feature_that_the_backend_declares_is_let_through(feature, param, fields):
    assert refusal_of(ScriptedBackend(supports={feature}), fields) is None


@pytest.mark.parametrize(("feature", "param", "fields"), ASKS)
def test_an_undeclared_backend_is_trusted_with_what_its_output_shows(feature, param, fields):
    assert (refusal_of(Undeclared(), fields) is None) == (feature in SHOWS)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL], "tool_choice": "none"},
        {"n": 1},
        {"logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text"}},
        {"response_format": {}},
        {"messages": parts("text", "refusal")},
        {"messages": [Message("user", "plain")]},
        {"stop": "x", "seed": 1, "temperature": 0, "top_p": 0.5, "max_tokens": 3},
    ],
)
def test_what_every_backend_can_do_is_never_refused(fields):
    assert refusal_of(ScriptedBackend(supports=()), fields) is None


@pytest.mark.parametrize("backend", [ScriptedBackend(), Undeclared()])
def test_a_field_without_a_name_that_would_be_noticed_is_refused(backend):
    error = refusal_of(backend, {"extra_body": {"reasoning_effort": "high"}})
    assert error.param == "reasoning_effort"
    assert refusal_of(backend, {"extra_body": {"store": True, "whatever": 1}}) is None


def test_a_backend_may_take_every_field():
    backend = ScriptedBackend(supports={"extra_body"})
    assert refusal_of(backend, {"extra_body": {"reasoning_effort": "high"}}) is None


def test_the_kind_of_format_is_named():
    error = refusal_of(
        ScriptedBackend(supports={"json_object"}), {"response_format": {"type": "json_schema"}}
    )
    assert str(error) == "The model 'm' does not support response_format of type json_schema."


def test_every_feature_can_be_asked_for():
    assert {feature for feature, *_ in ASKS} == FEATURES
