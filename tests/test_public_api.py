"""What code outside of this package is written against."""

import ast
import inspect
from pathlib import Path
from typing import get_origin

import pytest

import flask_llmstream
from flask_llmstream import (
    AsyncInferenceEngine,
    Deadline,
    Finish,
    InferenceHandle,
    InferenceRequest,
    InferenceResponse,
    LLMStream,
    Message,
    Outcome,
    Reasoning,
    StreamingHandler,
    StreamReader,
    Token,
    ToolCallDelta,
    UpstreamBackend,
    Usage,
)


def names_of(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_all_is_sorted_and_names_each_thing_once():
    assert sorted(set(flask_llmstream.__all__)) == sorted(flask_llmstream.__all__)


def test_all_is_the_namespace():
    tree = ast.parse(Path(flask_llmstream.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(flask_llmstream.__all__)
    assert all(hasattr(flask_llmstream, name) for name in flask_llmstream.__all__)


def test_every_error_is_exported():
    from flask_llmstream import exceptions

    assert set(exceptions.__all__) <= set(flask_llmstream.__all__)


@pytest.mark.parametrize("name", sorted(set(flask_llmstream.__all__) - {"__version__"}))
def test_what_is_exported_says_what_it_is(name):
    thing = getattr(flask_llmstream, name)
    is_alias = get_origin(thing) is not None  # Python 3.10 takes one for a class.
    if not is_alias and (inspect.isclass(thing) or inspect.isroutine(thing)):
        assert inspect.getdoc(thing)


@pytest.mark.parametrize("name", [name for name in vars(LLMStream) if not name.startswith("_")])
def test_every_public_method_of_the_extension_says_what_it_does(name):
    assert inspect.getdoc(getattr(LLMStream, name))


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (LLMStream, ["app", "store"]),
        (LLMStream.init_app, ["app"]),
        (LLMStream.backend, ["model", "worker", "supports", "options"]),
        (LLMStream.add_backend, ["model", "backend", "options"]),
        (LLMStream.add_engine, ["engine", "models"]),
        (LLMStream.openai_blueprint, ["name", "models", "settings"]),
        (LLMStream.anthropic_blueprint, ["name", "models", "settings"]),
        (LLMStream.ops_blueprint, ["name", "api_keys"]),
        (LLMStream.stream, ["request", "on_finish"]),
        (LLMStream.complete, ["request"]),
        (LLMStream.tokens, ["request"]),
        (Message, ["role", "content", "tool_calls", "tool_call_id", "name"]),
        (Token, ["text", "logprob", "top_logprobs", "choice"]),
        (Reasoning, ["text", "choice"]),
        (ToolCallDelta, ["index", "id", "name", "arguments", "choice"]),
        (Usage, ["prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"]),
        (Finish, ["reason", "stop_sequence", "choice"]),
        (
            UpstreamBackend,
            [
                *("base_url", "api_key", "model", "headers", "max_concurrency"),
                *("max_tokens_field", "connect_timeout_seconds", "discover"),
            ],
        ),
        (AsyncInferenceEngine.submit, ["request", "priority", "timeout_seconds"]),
        (
            AsyncInferenceEngine.submit_async,
            ["request", "callback", "priority", "timeout_seconds"],
        ),
        (
            AsyncInferenceEngine.submit_streaming,
            ["request", "token_callback", "priority", "timeout_seconds"],
        ),
        (AsyncInferenceEngine.cancel, ["request_id", "identity"]),
        (AsyncInferenceEngine.wait_for_completion, ["timeout_seconds"]),
        (AsyncInferenceEngine.shutdown, ["timeout_seconds"]),
        (InferenceHandle.get, ["timeout_seconds"]),
        (
            StreamReader,
            ["chunks", "framing", "terminal", "max_event_bytes", "reconnect", "backoff"],
        ),
        (StreamingHandler.format_sse_event, ["token", "request_id", "index", "done"]),
        (StreamingHandler.format_done_event, ["request_id"]),
        (StreamingHandler.format_chunked_data, ["data"]),
        (StreamingHandler.make_stream_callback, ["sink", "request_id"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_parameters_have_their_names_and_order(function, names):
    assert names_of(function) == names


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            AsyncInferenceEngine,
            [
                "worker_threads",
                "queue_size",
                "priorities",
                "backpressure",
                "block_timeout_seconds",
            ],
        ),
        (AsyncInferenceEngine.shutdown, ["timeout_seconds"]),
        (LLMStream.backend, ["worker", "supports"]),
        (LLMStream.add_engine, ["models"]),
        (LLMStream.openai_blueprint, ["name", "models"]),
        (LLMStream.stream, ["on_finish"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_options_are_keyword_only(function, names):
    parameters = inspect.signature(function).parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names)


def test_a_request_needs_keywords_and_has_every_field():
    parameters = inspect.signature(InferenceRequest).parameters
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters.values())
    assert {
        "prompt", "messages", "model", "request_id", "max_tokens", "temperature", "top_p",
        "top_k", "seed", "stop", "tools", "tool_choice", "response_format", "n", "logprobs",
        "top_logprobs", "stream", "stream_callback", "deadline", "priority", "metadata",
    } <= set(parameters)  # fmt: skip
    assert InferenceRequest().prompt == ""


def test_a_response_needs_keywords_and_has_every_field():
    parameters = inspect.signature(InferenceResponse).parameters
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters.values())
    assert {
        "request_id", "model", "text", "tool_calls", "finish_reason", "usage", "logprobs",
        "cache_hit", "timings",
    } <= set(parameters)  # fmt: skip


def test_an_engine_s_defaults_are_as_promised():
    parameters = inspect.signature(AsyncInferenceEngine).parameters
    assert parameters["worker_threads"].default == 2
    assert parameters["queue_size"].default == 1000
    assert parameters["priorities"].default is True
    assert parameters["backpressure"].default.value == "block"
    assert parameters["block_timeout_seconds"].default is None
    assert inspect.signature(AsyncInferenceEngine.shutdown).parameters[
        "timeout_seconds"
    ].default == pytest.approx(30)


def test_an_outcome_has_what_a_view_keeps():
    assert names_of(Outcome)[:4] == ["request", "text", "finish_reason", "error"]


def test_a_deadline_tells_what_is_left():
    deadline = Deadline.after(60)
    assert 59 < deadline.remaining_seconds() <= 60
    assert not deadline.expired
